"""Models on disk: round trips, crashes, mixed-up pairs, hosts."""

import copy
import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import nn

import taulearn
from taulearn import files, load_model, prune, save_model
from taulearn.nn import (
    IdentitySkips,
    Residual,
    SmoothReLU,
    TimeSteps,
    TimeVariableNetwork,
    activation_names,
    densenet,
    feedforward,
    fractional_dnn,
    make_activation,
    resnet,
)

BUILDERS = {"feedforward": feedforward, "resnet": resnet, "densenet": densenet, "fractional": fractional_dnn}
FILES = {"model.safetensors", "model.json"}


def arguments(module: nn.Module) -> dict[str, Any]:
    hidden = ("training", "recipe")
    found = {key: value for key, value in vars(module).items() if not key.startswith("_") and key not in hidden}
    return {key: (type(value), vars(value)) if key == "rule" else value for key, value in found.items()}


@st.composite
def networks(draw: st.DrawFn) -> tuple[TimeVariableNetwork, Callable[[], TimeVariableNetwork]]:
    """A network with other weights than it was built with, perhaps pruned, and what builds it afresh."""
    kind = draw(st.sampled_from(sorted(BUILDERS)))
    layers = draw(st.integers(1, 5))
    widths = draw(st.one_of(st.integers(1, 4), st.lists(st.integers(1, 4), min_size=layers, max_size=layers)))
    options: dict[str, Any] = {
        "activation": draw(
            st.one_of(
                st.sampled_from(activation_names()),
                st.sampled_from([nn.LeakyReLU(0.2), nn.ELU(1, inplace=True), SmoothReLU(0.5), nn.GELU("tanh")]),
            )
        ),
        "constraint": draw(st.sampled_from(["free", "fixed", "dependent", "simplex"])),
        "horizon": draw(st.floats(0.5, 100.0)),
        "skips": draw(st.sampled_from(["pad", "learned"])),
        "dtype": draw(st.sampled_from([torch.float32, torch.float64])),
        "lower_bound": draw(st.sampled_from([1e-4, 0.01] if kind == "fractional" else [None, 0.0, 0.05])),
    }
    if kind == "fractional":
        options |= {"gamma": draw(st.floats(0.05, 0.95)), "memory_from": draw(st.integers(0, 1))}

    def build() -> TimeVariableNetwork:
        return BUILDERS[kind](3, widths, 2, layers, **options)

    network = build()
    with torch.no_grad():
        for value in network.state_dict().values():
            value.copy_(torch.rand_like(value) + 0.1)
        network.time_steps.project_()
    free = sorted(set(range(layers)) - network.fixed_layers().keys())
    if network.scheme.deletes_exactly and free and layers > 1:
        gone = draw(st.sets(st.sampled_from(free), max_size=layers - 1))
        prune(network, keep=[l for l in range(layers) if l not in gone])
    return network, build


@settings(max_examples=60, deadline=None)
@given(networks())
def test_round_trip_is_bit_identical(drawn: tuple[TimeVariableNetwork, Callable[[], TimeVariableNetwork]]) -> None:
    network, build = drawn
    x = torch.linspace(-2.0, 2.0, 12, dtype=network.time_steps.values.dtype).view(4, 3)
    network.eval()
    with tempfile.TemporaryDirectory() as folder:
        save_model(network, folder)
        assert {path.name for path in Path(folder).iterdir()} == FILES
        before = torch.get_rng_state()
        rebuilt = load_model(folder)
        assert torch.equal(torch.get_rng_state(), before)
        for loaded in (rebuilt, load_model(folder, host=build())):
            assert torch.equal(loaded.eval()(x), network(x))
            assert loaded.state_dict().keys() == network.state_dict().keys()
            assert loaded.time_steps.origin == network.time_steps.origin
            assert repr(loaded) == repr(network)
            assert [p.requires_grad for p in loaded.parameters()] == [p.requires_grad for p in network.parameters()]
            assert loaded.fixed_layers() == network.fixed_layers()
            for mine, its in zip(loaded.modules(), network.modules(), strict=True):
                assert type(mine) is type(its)
                assert arguments(mine) == arguments(its)


def test_every_activation_is_rebuilt_from_its_name(tmp_path: Path) -> None:
    for name in activation_names():
        save_model(resnet(2, 3, 1, 2, activation=name), tmp_path)
        assert json.loads((tmp_path / "model.json").read_text())["model"]["kind"] == "network"
        assert type(load_model(tmp_path).layers[1].activation) is type(make_activation(name))


def test_a_loaded_network_trains_and_is_pruned_further(tmp_path: Path) -> None:
    network = resnet(2, 3, 1, 5)
    prune(network, keep=[0, 1, 3, 4])
    save_model(network, tmp_path / "deep" / "folder")
    loaded = load_model(tmp_path / "deep" / "folder")
    optimizer = torch.optim.SGD(loaded.parameters(), lr=0.1)
    loaded(torch.ones(4, 2)).sum().backward()
    optimizer.step()
    report = prune(loaded, keep=[0, 2], optimizer=optimizer)
    assert [d.layer for d in report.deleted] == [1, 4]
    assert loaded.time_steps.origin == (0, 3)


def test_compiled_model_is_saved_under_its_own_names(tmp_path: Path) -> None:
    network = resnet(2, 3, 1, 2)
    save_model(torch.compile(network, backend="eager"), tmp_path)
    host = torch.compile(resnet(2, 3, 1, 2), backend="eager")
    assert load_model(tmp_path, host=host) is host
    assert torch.equal(host(torch.ones(1, 2)), network(torch.ones(1, 2)))


def test_a_horizon_that_no_builder_would_take_is_saved_nevertheless(tmp_path: Path) -> None:
    network = resnet(2, 3, 1, 4, constraint="simplex", lower_bound=0.2)
    network.time_steps.horizon = 0.5
    save_model(network, tmp_path)
    host = resnet(2, 3, 1, 4, constraint="simplex", lower_bound=0.1, horizon=0.5)
    host.time_steps.lower_bound = 0.2
    assert torch.equal(load_model(tmp_path, host=host)(torch.ones(1, 2)), network(torch.ones(1, 2)))


def test_the_manifest_says_what_it_is(tmp_path: Path) -> None:
    network = fractional_dnn(8, 4, 2, 3, gamma=0.7)
    prune(network, keep=[0, 2])
    save_model(network, tmp_path)
    manifest = json.loads((tmp_path / "model.json").read_text())
    assert manifest["format"] == 2
    assert manifest["taulearn"] == taulearn.__version__
    options = {"gamma": 0.7, "memory_from": 1, "memory": "auto", "tolerance": 1e-6}
    assert manifest["scheme"] == {"name": "fractional", "options": options}
    steps = {"origin": [0, 2], "next_number": 3, "parents": []}
    assert manifest["time_steps"] == steps | {"constraint": "free", "horizon": 1.0, "lower_bound": 1e-4}
    keywords = {
        "in_features": 8,
        "width": 4,
        "out_features": 2,
        "hidden_layers": 3,
        "activation": "relu",
        "skips": "pad",
    }
    assert manifest["model"] == {
        "kind": "network",
        "dtype": "float32",
        "builder": "fractional_dnn",
        "keywords": keywords,
    }


def test_a_crash_at_any_moment_leaves_the_old_pair_or_the_new(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old, new = resnet(2, 3, 1, 5), resnet(2, 3, 1, 5)
    prune(new, keep=[0, 2, 4])
    folder, moments = tmp_path / "model", tmp_path / "moments"
    save_model(old, folder)
    replace, count = Path.replace, iter(range(100))

    def snapshot() -> None:
        shutil.copytree(folder, moments / f"{next(count)}")

    def watched(self: Path, target: Path) -> Path:
        snapshot()
        done = replace(self, target)
        snapshot()
        return done

    monkeypatch.setattr(Path, "replace", watched)
    save_model(new, folder)
    found = [load_model(moment).time_steps.num_steps for moment in sorted(moments.iterdir())]
    assert found == [5, 5, 5, 3, 3, 3]


def test_a_crash_in_the_very_first_save_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("taulearn.saving.save.write_bytes", write_once())
    with pytest.raises(OSError, match="No space left"):
        save_model(resnet(2, 3, 1, 2), tmp_path)
    with pytest.raises(FileNotFoundError, match=r"model.safetensors does not exist"):
        load_model(tmp_path)


def write_once() -> Callable[[Path, bytes], None]:
    """A write_bytes that finds the disk full after one file."""
    written: list[Path] = []

    def write(path: Path, content: bytes) -> None:
        if written:
            raise OSError(28, "No space left on device")
        written.append(path)
        files.write_bytes(path, content)

    return write


def test_a_full_disk_leaves_the_old_pair(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = resnet(2, 3, 1, 5)
    save_model(old, tmp_path)
    monkeypatch.setattr("taulearn.saving.save.write_bytes", write_once())
    with pytest.raises(OSError, match="No space left"):
        save_model(resnet(2, 4, 1, 5), tmp_path)
    assert torch.equal(load_model(tmp_path)(torch.ones(1, 2)), old(torch.ones(1, 2)))
    monkeypatch.undo()
    save_model(resnet(2, 4, 1, 5), tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == FILES


def test_a_mixed_up_pair_is_noticed(tmp_path: Path) -> None:
    save_model(resnet(2, 3, 1, 4), tmp_path / "a")
    save_model(resnet(2, 3, 1, 4), tmp_path / "b")
    shutil.copy(tmp_path / "a" / "model.safetensors", tmp_path / "b")
    with pytest.raises(ValueError, match=r"must have the sha256 .* damaged or from another save"):
        load_model(tmp_path / "b")


def custom(
    layers: int = 4, *, activation: type[nn.Module] = nn.Tanh, width: int = 3, **options: Any
) -> TimeVariableNetwork:
    blocks = [nn.Sequential(nn.Linear(width, width), activation()) for _ in range(layers)]
    steps = TimeSteps(layers, **options)
    return TimeVariableNetwork(blocks, nn.Linear(width, 1), Residual(), steps, IdentitySkips(layers, from_input=True))


def test_custom_layers_need_a_host_and_are_pruned_with_it(tmp_path: Path) -> None:
    network = custom()
    prune(network, keep=[1, 2])
    save_model(network, tmp_path)
    with pytest.raises(ValueError, match=r"host must be given .*layers.0.1 is a Tanh.*host=model"):
        load_model(tmp_path)
    host = custom()
    assert load_model(tmp_path, host) is host
    assert host.time_steps.origin == (1, 2)
    assert torch.equal(host(torch.ones(2, 3)), network(torch.ones(2, 3)))
    assert load_model(tmp_path, host) is host


class Halved(nn.ReLU):
    def forward(self, y: torch.Tensor) -> torch.Tensor:
        return 0.5 * super().forward(y)


class Doubled(TimeVariableNetwork):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2.0 * super().forward(x)


def doubled() -> TimeVariableNetwork:
    network = resnet(2, 3, 1, 2)
    return Doubled(network.layers, network.head, network.scheme, network.time_steps, network.skips, stem=network.stem)


def widened() -> TimeVariableNetwork:
    network = resnet(2, 3, 1, 2)
    network.layers[0].scale = nn.Parameter(torch.ones(1))
    return network


@pytest.mark.parametrize(
    ("make", "because"),
    [
        (lambda: resnet(2, 3, 1, 2, activation=Halved()), "layers.0.activation is a Halved"),
        (lambda: resnet(2, 3, 1, 2, activation=nn.Hardtanh(-1.0, float("inf"))), "layers.0.activation has max_val=inf"),
        (doubled, "the model is a Doubled"),
        (widened, "layers.0.scale is unexpected"),
    ],
)
def test_whatever_the_manifest_cannot_say_needs_a_host(
    make: Callable[[], TimeVariableNetwork], because: str, tmp_path: Path
) -> None:
    network = make()
    save_model(network, tmp_path)
    with pytest.raises(ValueError, match=f"host must be given .*{because}"):
        load_model(tmp_path)
    assert torch.equal(load_model(tmp_path, host=make())(torch.ones(1, 2)), network(torch.ones(1, 2)))


@pytest.mark.parametrize(
    ("saved", "host", "message"),
    [
        (custom(3), custom(2), r"host must have the layers \(0, 1, 2\).*got \(0, 1\)"),
        (custom(3), custom(4, constraint="dependent"), r"layers can be changed to the \(0, 1, 2\) .*dependent"),
        (custom(3), custom(3, width=4), r"layers.0.0.weight must be .float32 \(4, 4\)., got .float32 \(3, 3\)"),
        (custom(3), custom(3).double(), r"must be .float64 \(3, 3\)., got .float32 \(3, 3\)"),
        (custom(3), custom(3, horizon=2.0), r"time_steps.horizon must be 1.0, got 2.0"),
        (custom(3), custom(3, constraint="simplex"), r"time_steps.constraint must be 'free', got 'simplex'"),
        (custom(3), resnet(3, 3, 1, 3), r"layers.0.linear.weight is missing.*layers.0.0.weight is unexpected"),
        (resnet(3, 3, 1, 3), custom(3), r"layers.0 must be a FullyConnected, got a Sequential"),
        (
            resnet(3, 3, 1, 3),
            resnet(3, 3, 1, 3, activation="tanh"),
            r"layers.0.activation must be a ReLU, got a Tanh",
        ),
        (fractional_dnn(3, 3, 1, 3), fractional_dnn(3, 3, 1, 3, gamma=0.4), r"scheme.gamma must be 0.5, got 0.4"),
        (resnet(3, 3, 1, 3), densenet(3, 3, 1, 3), r"scheme must be a Residual, got a Dense"),
        (feedforward(3, [3, 2], 1, 2), densenet(3, [3, 2], 1, 2), r"scheme must be a Feedforward, got a Dense"),
    ],
)
def test_another_host_is_refused_with_what_differs(
    saved: TimeVariableNetwork, host: TimeVariableNetwork, message: str, tmp_path: Path
) -> None:
    save_model(saved, tmp_path)
    before = copy.deepcopy(host)
    with pytest.raises(ValueError, match=message):
        load_model(tmp_path, host=host)
    assert repr(host) == repr(before)
    assert all(torch.equal(a, b) for a, b in zip(host.parameters(), before.parameters(), strict=True))


def test_a_refused_host_gets_its_layers_back(tmp_path: Path) -> None:
    network, host = custom(4), custom(4, activation=nn.PReLU)
    prune(network, keep=[0, 2])
    save_model(network, tmp_path)
    before = dict(host.named_parameters())
    with pytest.raises(ValueError, match=r"layers.0.1.weight is missing; layers.1.1.weight is missing"):
        load_model(tmp_path, host=host)
    assert host.time_steps.origin == (0, 1, 2, 3)
    assert all(p is before[name] for name, p in host.named_parameters())


def test_what_cannot_be_saved_is_named(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"model must .*got Linear"):
        save_model(nn.Linear(2, 2), tmp_path)
    save_model(resnet(2, 3, 1, 2), tmp_path)
    with pytest.raises(TypeError, match=r"host must .*got Linear"):
        load_model(tmp_path, host=nn.Linear(2, 2))
    with pytest.raises(NotADirectoryError, match=r"path must .*got the file"):
        save_model(resnet(2, 3, 1, 2), tmp_path / "model.json")


def test_state_that_is_no_tensor_is_refused(tmp_path: Path) -> None:
    class Counting(nn.ReLU):
        def get_extra_state(self) -> int:
            return 3

    with pytest.raises(TypeError, match=r"got a int at 'layers.0.activation._extra_state': make it a buffer"):
        save_model(resnet(2, 3, 1, 2, activation=Counting()), tmp_path)
    assert not list(tmp_path.iterdir())
