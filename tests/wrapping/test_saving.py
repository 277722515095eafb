"""Wrapped models on disk."""

import copy
import hashlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from taulearn import load_model, prune, save_model, summary, wrap
from taulearn.nn.pruned_models import prunable_of
from taulearn.wrapping import PassThrough, wrapping_of
from wrapping.hosts import BY_NAME, HOSTS, Block, Host, evaluated, features, gpt2, sequential, tokens

ROUND_TRIPS = [
    pytest.param(host, constraint, id=f"{constraint}-{host}", marks=[pytest.mark.long] * long)
    for host in HOSTS
    for constraint in ("free", "fixed", "dependent", "simplex")
    for long in (host is not HOSTS[0] and constraint != "free",)
]


@pytest.mark.parametrize(("host", "constraint"), ROUND_TRIPS)
def test_round_trip(host: Host, constraint: str, tmp_path: Path) -> None:
    init = [0.5, 1.25, 0.25, 2.0]
    model = host.wrapped(init=init, constraint=constraint, lower_bound=0.125)
    prune(model, keep=[0, 1, 3])
    save_model(model, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"model.json", "model.safetensors"}
    options: dict[str, Any] = {"init": init, "constraint": constraint, "lower_bound": 0.125}
    for fresh in (host.make(), host.wrapped(**options), copy.deepcopy(model)):
        loaded = load_model(tmp_path, host=fresh)
        assert torch.equal(evaluated(loaded, host.inputs()), evaluated(model, host.inputs()))
        assert loaded.state_dict().keys() == model.state_dict().keys()
        assert repr(loaded) == repr(model)
        steps = loaded.time_steps
        assert (steps.constraint, steps.horizon, steps.lower_bound) == (constraint, 4.0, 0.125)
    prune(loaded, keep=[0, 2])
    save_model(loaded, tmp_path)
    assert load_model(tmp_path, host=host.make()).time_steps.origin == (0, 3)


def test_a_wrapped_model_is_never_rebuilt_from_files_alone(tmp_path: Path) -> None:
    save_model(HOSTS[0].wrapped(), tmp_path)
    with pytest.raises(ValueError, match=r"host must be given for the 'Sequential' .*it is a wrapped model"):
        load_model(tmp_path)


class Skipping(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(4) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for i in range(3):
            x = self.blocks[i](x)
        return x


def test_placeholders_need_a_wrapped_host(tmp_path: Path) -> None:
    x = torch.randn(2, 4)
    model = wrap(Skipping(), example_inputs=x)
    prune(model, keep=[0, 2])
    save_model(model, tmp_path)
    with pytest.raises(ValueError, match="wrap the host with example_inputs before loading"):
        load_model(tmp_path, host=Skipping())
    loaded = load_model(tmp_path, host=wrap(Skipping(), example_inputs=x))
    assert isinstance(loaded.blocks[1], PassThrough)
    assert torch.equal(evaluated(loaded, x), evaluated(model, x))


def smaller() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6), *(Block(6) for _ in range(3)), nn.Linear(6, 2))


def wider() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 5), *(Block(5) for _ in range(4)), nn.Linear(5, 2))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: BY_NAME["encoder"].make(), r"host must be a model like the 'Sequential'.*it has no '1'"),
        (smaller, r"host must be a model like the 'Sequential'.*it has no '4.inner'"),
        (wider, r"0.weight must be .float32 \(5, 4\)., got .float32 \(6, 4\)"),
        (lambda: wrap(sequential(), "[123]"), r"host must have the layers|model.blocks"),
        (lambda: wrap(sequential(), "[1234]", constraint="simplex"), "time_steps.constraint must be 'free', got 'sim"),
        (lambda: wrap(sequential(), "[1234]", horizon=3.0), "time_steps.horizon must be 4.0, got 3.0"),
    ],
)
def test_another_host_is_refused_and_left_as_it_was(make: Callable[[], Any], message: str, tmp_path: Path) -> None:
    save_model(HOSTS[0].wrapped(), tmp_path)
    host = make()
    before, names = repr(host), dict(host.named_parameters())
    with pytest.raises(ValueError, match=message):
        load_model(tmp_path, host=host)
    assert repr(host) == before
    assert all(p is names[name] for name, p in host.named_parameters())
    assert [key for m in host.modules() for key in vars(m)] == [
        key for m in copy.deepcopy(host).modules() for key in vars(m)
    ]


def rewritten(folder: Path, keys: list[str | int], value: object) -> None:
    manifest = json.loads((folder / "model.json").read_text())
    part = manifest
    for key in keys[:-1]:
        part = part[key]
    part[keys[-1]] = value
    (folder / "model.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("keys", "value", "message"),
    [
        (["model", "blocks"], ["os.system", "1", "2", "3"], "it has no 'os.system'"),
        (["model", "blocks"], ["1", "1", "2", "3"], "blocks must be different modules"),
        (["model", "blocks"], ["", "1", "2", "3"], "it has no ''|must not contain each other"),
        (["model", "blocks"], [], "at least 1 item"),
        (["model", "blocks"], "1234", "model.blocks must be"),
        (["model", "shortened"], ["1"], "'1' must be a ModuleList or a Sequential, got a Block"),
        (["model", "shortened"], ["__class__"], "it has no '__class__'"),
        (["model", "code"], "import os", r"model must be .* differs in \['code'\]"),
        (["model", "saved_from"], ["os", "system"], "saved_from"),
        (["time_steps", "origin"], [0, 1, 2, 3, 4], "host must have the layers"),
        (["time_steps", "origin"], [3, 2, 1, 0], "host must have the layers"),
        (["time_steps", "horizon"], -1.0, "horizon must be a positive finite number"),
        (["time_steps", "constraint"], "os.system", "constraint must be one of"),
    ],
)
def test_a_hostile_manifest_is_refused(keys: list[str | int], value: object, message: str, tmp_path: Path) -> None:
    save_model(HOSTS[0].wrapped(), tmp_path)
    rewritten(tmp_path, keys, value)
    host = sequential()
    before, modules = repr(host), set(sys.modules)
    with pytest.raises(ValueError, match=message):
        load_model(tmp_path, host=host)
    assert repr(host) == before
    assert not hasattr(host, "time_steps")
    assert set(sys.modules) == modules


def test_a_manifest_that_names_code_executes_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "bomb.py").write_text("raise SystemExit('executed')\n")
    monkeypatch.syspath_prepend(tmp_path)
    folder = tmp_path / "model"
    save_model(HOSTS[0].wrapped(), folder)
    rewritten(folder, ["model", "saved_from"], "bomb.Bomb")
    with pytest.raises(ValueError, match=r"host must be given for the 'bomb.Bomb'"):
        load_model(folder)
    with pytest.raises(ValueError, match=r"model.saved_from must .*got 'Sequential'"):
        load_model(folder, host=sequential())
    assert "bomb" not in sys.modules


@pytest.mark.parametrize("damage", ["truncated", "flipped", "text"])
def test_damaged_weights_are_refused(damage: str, tmp_path: Path) -> None:
    save_model(HOSTS[0].wrapped(), tmp_path)
    file = tmp_path / "model.safetensors"
    content = bytearray(file.read_bytes())
    if damage == "truncated":
        content = content[: len(content) // 2]
    elif damage == "flipped":
        content[-1] ^= 1
    else:
        content = bytearray(b"no tensors")
    file.write_bytes(content)
    host = sequential()
    with pytest.raises(ValueError, match="must have the sha256"):
        load_model(tmp_path, host=host)
    rewritten(tmp_path, ["weights_sha256"], hashlib.sha256(content).hexdigest())
    if damage != "flipped":
        with pytest.raises(ValueError, match="must be a safetensors file"):
            load_model(tmp_path, host=host)
    assert not hasattr(host, "time_steps")


class Reading(nn.Module):
    """A block that adds what the first of its kind computes for all."""

    def __init__(self, *, first: bool) -> None:
        super().__init__()
        self.inner, self.bias = nn.Linear(4, 4), nn.Linear(4, 4) if first else None

    def forward(self, x: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        bias = bias if self.bias is None else self.bias(x).sin()
        return x + self.inner(x).tanh() + (0.0 if bias is None else bias), bias


class FirstForAll(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Reading(first=l == 0) for l in range(4))

    def forward(self, x: Tensor) -> Tensor:
        bias = None
        for block in self.blocks:
            x, bias = block(x, bias)
        return x


def test_a_loaded_model_knows_which_blocks_must_stay(tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 4)
    model = wrap(FirstForAll(), example_inputs=x)
    fixed = prunable_of(model).fixed_layers()
    assert set(fixed) == {0}
    save_model(model, tmp_path)
    loaded = load_model(tmp_path, FirstForAll())
    assert prunable_of(loaded).fixed_layers() == fixed
    with pytest.raises(ValueError, match="keep must contain layer 0"):
        prune(loaded, keep=[1, 2, 3])
    prune(loaded, keep=[0, 3])
    save_model(loaded, tmp_path)
    assert prunable_of(load_model(tmp_path, FirstForAll())).fixed_layers() == fixed


def test_a_loaded_model_of_branches_knows_which_blocks_must_stay(tmp_path: Path) -> None:
    for per in ("block", "branch"):
        family = wrap(BY_NAME["gpt2"].make(), example_inputs=tokens(), per=per)
        blocks = wrapping_of(family).blocks  # type: ignore[union-attr]
        save_model(family, tmp_path)
        manifest = json.loads((tmp_path / "model.json").read_text())
        assert manifest["model"]["stays"] == [] == [block for block in blocks if block.stays]
        manifest["model"]["stays"] = [{"block": 2, "why": "it is the best of all"}]
        (tmp_path / "model.json").write_text(json.dumps(manifest))
        loaded = load_model(tmp_path, BY_NAME["gpt2"].make())
        if per == "block":
            assert prunable_of(loaded).fixed_layers() == {2: "it is the best of all"}
        else:
            assert [block.stays for block in wrapping_of(loaded).blocks]  # type: ignore[union-attr] == [False, False, True, False]


def test_a_loaded_model_says_what_save_pretrained_refuses(tmp_path: Path) -> None:
    model = wrap(gpt2(scale_attn_by_inverse_layer_idx=True), example_inputs=tokens())
    told = summary(model).not_saved
    assert set(told) == {0, 1, 2}
    save_model(model, tmp_path)
    assert summary(load_model(tmp_path, gpt2(scale_attn_by_inverse_layer_idx=True))).not_saved == told


def test_files_without_reasons_load(tmp_path: Path) -> None:
    model = HOSTS[0].wrapped()
    save_model(model, tmp_path)
    manifest = json.loads((tmp_path / "model.json").read_text())
    del manifest["model"]["stays"], manifest["model"]["not_saved"]
    (tmp_path / "model.json").write_text(json.dumps(manifest))
    loaded = load_model(tmp_path, HOSTS[0].make())
    assert torch.equal(evaluated(loaded, features()), evaluated(model, features()))
    assert prunable_of(loaded).fixed_layers() == {}


def test_steps_of_half_precision_in_older_files_load(tmp_path: Path) -> None:
    model = wrap(sequential().bfloat16(), "[1234]", init=0.7)
    model.time_steps.values.data = model.time_steps.values.data.bfloat16()
    save_model(model, tmp_path)
    loaded = load_model(tmp_path, sequential().bfloat16())
    assert loaded.time_steps.values.dtype == torch.float32
    assert torch.equal(loaded.time_steps.values, model.time_steps.values.float())


def test_a_host_that_shares_what_the_saved_model_does_not_is_refused(tmp_path: Path) -> None:
    model = wrap(gpt2(tie_word_embeddings=False), example_inputs=tokens())
    save_model(model, tmp_path)
    host = gpt2()
    before = copy.deepcopy(host.state_dict())
    with pytest.raises(ValueError, match=r"lm_head.weight must have values of its own, got one that is shared with"):
        load_model(tmp_path, host)
    assert all(torch.equal(value, before[name]) for name, value in host.state_dict().items())
    save_model(wrap(gpt2(), example_inputs=tokens()), tmp_path)
    load_model(tmp_path, gpt2(tie_word_embeddings=False))  # which holds the same values twice
    load_model(tmp_path, gpt2())
