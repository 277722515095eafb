"""Wrapped models with new blocks, in both forms: nothing changes at step 0, and hosts, files and caches follow."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from small_networks import Picture, assert_same_bits
from taulearn import fit, load_model, prune, refine, save_model, unwrap, wrap
from taulearn._calls import call
from taulearn.integrations.checkpoints import mark_
from taulearn.nn.pruned_models import prunable_of
from taulearn.training import EpochEnd
from training.support import Crash, assert_same_history, assert_same_weights, crash_after
from wrapping.hosts import BY_NAME, HOSTS, LANGUAGE, Block, Host, evaluated, every_host, features, sequential, tensor

FORMS = ["whole", "branches"]
both_forms = pytest.mark.parametrize("form", FORMS)


def refinable(host: Host, form: str, **options: Any) -> Any:
    try:
        return host.wrapped(form=form, **options)
    except ValueError:
        if form == "whole":
            raise
        pytest.skip("it has no branches that were found")


def loss_of(model: Any, inputs: Any) -> Tensor:
    return tensor(call(model, inputs)).square().mean()


def train(model: Any, inputs: Any, optimizer: torch.optim.Optimizer, iterations: int = 2) -> None:
    for _ in range(iterations):
        optimizer.zero_grad()
        torch.manual_seed(3)
        loss_of(model, inputs).backward()
        optimizer.step()


def ties(model: nn.Module) -> int:
    return len(list(model.named_parameters(remove_duplicate=False))) - len(list(model.parameters()))


@every_host
@both_forms
def test_an_insertion_leaves_outputs_to_the_bit(host: Host, form: str) -> None:
    model, inputs = refinable(host, form, init=0.7), host.inputs()
    before, number, tied = evaluated(model, inputs), model.time_steps.num_steps, ties(model)
    report = refine(model, range(number), by="insert")
    assert torch.equal(evaluated(model, inputs), before)
    assert model.time_steps.tau.tolist().count(0.0) == number
    assert report.layers_after == 2 * number == len(prunable_of(model).layers)
    assert ties(model) == tied
    assert report.parameters_after == sum(p.numel() for p in model.parameters())
    model.eval()
    loss_of(model, inputs).backward()
    assert bool((model.time_steps.values.grad != 0).all())


@every_host
@both_forms
def test_insert_then_prune_gives_all_back(host: Host, form: str) -> None:
    model, inputs = refinable(host, form, init=0.9), host.inputs()
    optimizer, averaged = torch.optim.Adam(model.named_parameters(), lr=0.01), AveragedModel(model)
    train(model, inputs, optimizer)
    averaged.update_parameters(model)
    things = model, optimizer, averaged
    before = copy.deepcopy([each.state_dict() for each in things])
    output, number = evaluated(model, inputs), model.time_steps.num_steps
    held = {name: dict(vars(module)) for name, module in model.named_modules() if name != "time_steps"}
    refine(model, [0, number - 1], by="insert", optimizer=optimizer, averaged=averaged)
    train_groups = [len(group["params"]) for group in optimizer.param_groups]
    assert train_groups == [len(list(model.parameters()))]
    origin = model.time_steps.origin
    keep = [l for l, n in enumerate(origin) if n < number]
    prune(model, keep=keep, optimizer=optimizer, averaged=averaged)
    assert_same_bits([each.state_dict() for each in things], before)
    assert model.time_steps.origin == tuple(range(number))
    assert model.time_steps.next_number == number + 2
    assert torch.equal(evaluated(model, inputs), output)
    for name, module in model.named_modules():
        for key, value in held.get(name, {}).items():
            if type(value) in (int, str, bool, list, tuple):
                assert vars(module)[key] == value, (name, key)
    train(model, inputs, optimizer)


@every_host
@both_forms
def test_halves_of_a_block(host: Host, form: str) -> None:
    """A split block is itself twice with half of its step, as the same block called twice is."""
    model, inputs = refinable(host, form, init=0.6), host.inputs()
    twin = copy.deepcopy(model)
    refine(model, [1])
    assert model.time_steps.tau.tolist() == pytest.approx([0.6, 0.3, 0.3, *[0.6] * (twin.time_steps.num_steps - 2)])
    block = prunable_of(twin).layers[1]
    with torch.no_grad():
        twin.time_steps.values[1] = 0.3
    form_of, run = prunable_of(twin).present[1].form, block.forward

    def again(*args: Any, **kwargs: Any) -> Any:
        others, named = form_of.handing(form_of.leaving(run(*args, **kwargs)), args, kwargs)
        return run(*others, **named)

    for each in (model, twin):
        if hasattr(each, "config"):
            each.config.use_cache = False
    refined = evaluated(model, inputs)
    vars(block)["forward"] = again
    torch.testing.assert_close(evaluated(twin, inputs), refined, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("host", LANGUAGE, ids=str)
@both_forms
def test_generation_with_a_cache(host: Host, form: str) -> None:
    model = refinable(host, form, init=0.8).eval()
    refine(model, [0, 2])
    refine(model, [1], by="insert")
    prune(model, keep=[0, 1, 2, 4, 5, 6])
    assert model.config.num_hidden_layers == 6
    prompt = host.inputs()[:1]
    texts = [model.generate(prompt, max_new_tokens=6, do_sample=False, use_cache=cache) for cache in (True, False)]
    assert torch.equal(*texts)
    output = model(prompt, use_cache=True)
    assert len(output.past_key_values) == 6
    assert [output.past_key_values.get_seq_length(l) for l in range(6)] == [prompt.shape[1]] * 6


@pytest.mark.parametrize("host", HOSTS, ids=str)
@both_forms
def test_files(host: Host, form: str, tmp_path: Path) -> None:
    model, inputs = refinable(host, form, init=0.8).eval(), host.inputs()
    refine(model, [0, 1])
    refine(model, [2], by="insert")
    last = model.time_steps.next_number - 1
    prune(model, keep=[l for l, n in enumerate(model.time_steps.origin) if n not in (1, last - 2)])
    save_model(model, tmp_path / "model")
    for fresh in (host.make(), refinable(host, form, init=0.8)):
        loaded = load_model(tmp_path / "model", host=fresh).eval()
        assert loaded.time_steps.grid == model.time_steps.grid
        assert torch.equal(evaluated(loaded, inputs), evaluated(model, inputs))
        assert list(loaded.state_dict()) == list(model.state_dict())
        refine(loaded, [0])
        assert last + 1 in loaded.time_steps.origin


@pytest.mark.parametrize("host", HOSTS[2:], ids=str)
def test_a_plain_checkpoint_of_a_deeper_model(host: Host, tmp_path: Path) -> None:
    """New blocks whose steps were annealed to 1, as after training, or folded."""
    model, inputs = host.wrapped(form="auto").eval(), host.inputs()
    refine(model, [0, 1], by="insert")
    if prunable_of(model).form == "branches":
        with torch.no_grad():
            model.time_steps.values.copy_(torch.linspace(0.5, 1.0, model.time_steps.num_steps))
    else:
        model.time_steps.values.data.fill_(1.0)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).eval()
    assert not hasattr(loaded, "time_steps")
    torch.testing.assert_close(evaluated(loaded, inputs), evaluated(model, inputs), rtol=1e-4, atol=1e-5)
    unwrap(model)
    torch.testing.assert_close(evaluated(model, inputs), evaluated(loaded, inputs), rtol=1e-4, atol=1e-5)


def test_a_new_block_trains_alone_and_folds() -> None:
    host = BY_NAME["llama"]
    model, inputs = host.wrapped().eval(), host.inputs()
    before = evaluated(model, inputs)
    refine(model, [1, 3], by="insert", train="new")
    state = copy.deepcopy(model.state_dict())
    train(model, inputs, torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.01), 4)
    moved = [name for name, v in model.state_dict().items() if not torch.equal(v, state[name])]
    assert {".".join(name.split(".")[:3]) for name in moved} == {
        "model.layers.2",
        "model.layers.5",
        "time_steps.values",
    }
    tau = model.time_steps.tau.tolist()
    assert [tau[l] for l in (0, 1, 3, 4)] == [1.0] * 4
    assert 0.0 not in (tau[2], tau[5])
    after = evaluated(model, inputs)
    assert not torch.equal(after, before)
    torch.testing.assert_close(evaluated(unwrap(model), inputs), after, rtol=1e-5, atol=1e-5)


def test_a_block_of_ones_own() -> None:
    model, inputs = BY_NAME["sequential"].wrapped(form="whole"), features()
    before = evaluated(model, inputs)
    seen = []

    def make(neighbour: nn.Module) -> nn.Module:
        seen.append(neighbour)
        assert "forward" not in vars(neighbour)
        return nn.Sequential(nn.Linear(6, 6), nn.Tanh())

    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    refine(model, [1], by="insert", layer=make, optimizer=optimizer)
    assert isinstance(seen[0], Block)
    assert all(seen[0] is not each for each in model.modules())
    assert torch.equal(evaluated(model, inputs), before)
    assert isinstance(model[3], nn.Sequential)
    train(model, inputs, optimizer)
    with pytest.raises(ValueError, match="layer must make a block with the branches"):
        refine(BY_NAME["sequential"].wrapped(form="branches"), [1], by="insert", layer=make)


@both_forms
@pytest.mark.parametrize("where", ["grow_", "change_lists", "follow_lists", "install", "observe"])
def test_when_anything_fails_all_is_as_before(form: str, where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from taulearn.nn.time_steps import TimeSteps
    from taulearn.wrapping import add_blocks, configurations, remove_blocks

    host = BY_NAME["gpt2"]
    model, inputs = host.wrapped(form=form, init=0.8), host.inputs()
    optimizer, averaged = torch.optim.Adam(model.parameters(), lr=0.01), AveragedModel(model)
    train(model, inputs, optimizer)
    output = evaluated(model, inputs)
    picture = Picture(model, averaged, optimizer)
    held = [(dict(vars(module)), id(vars(module).get("config"))) for module in model.modules()]
    owners = {"grow_": TimeSteps, "follow_lists": configurations, "change_lists": remove_blocks}
    owner: Any = owners.get(where, add_blocks)
    original, calls = getattr(owner, where), []

    def failing(*args: Any, **options: Any) -> Any:
        result = original(*args, **options)
        calls.append(where)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return result

    monkeypatch.setattr(owner, where, failing)
    with pytest.raises(KeyboardInterrupt):
        refine(model, [0, 2], optimizer=optimizer, averaged=averaged)
    monkeypatch.undo()
    picture.assert_unchanged()
    assert [(dict(vars(module)), id(vars(module).get("config"))) for module in model.modules()] == held
    assert torch.equal(evaluated(model, inputs), output)


class Tied(nn.Module):
    """A host that uses one block twice, and one that shares its weights with another."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(Block(4) for _ in range(4))
        self.blocks[3].inner = self.blocks[2].inner

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


class Counting(nn.Module):
    """A host that runs through as many blocks as it had at the start."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(Block(4) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks[:4]:
            x = block(x)
        return x


class Named(nn.Module):
    """A host whose blocks are in no list."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.third = Block(4), Block(4), Block(4)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.third(self.second(self.first(x)))
        return y


def swin() -> nn.Module:
    from wrapping.hosts import transformers

    config = transformers.SwinConfig(
        image_size=16, patch_size=2, num_channels=1, embed_dim=4, depths=[2, 2], num_heads=[2, 2], window_size=2
    )
    return transformers.SwinForImageClassification(config)


REFUSED: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor], dict[str, Any], list[int], str]] = {
    "tied": (Tied, features, {}, [2], "shares"),
    "counting": (Counting, features, {}, [1], "another output"),
    "named": (Named, features, {}, [1], "no list"),
    "displacement": (sequential, features, {"units": "displacement"}, [1], "displacement"),
    "per branch": (BY_NAME["gpt2"].make, BY_NAME["gpt2"].inputs, {"per": "branch"}, [1], "branch"),
    "swin": (swin, lambda: torch.ones(1, 1, 16, 16), {}, [0], "shift_size"),
}


@pytest.mark.parametrize("by", ["split", "insert"])
@pytest.mark.parametrize("name", REFUSED)
def test_hosts_that_do_not_allow_it(name: str, by: str) -> None:
    make, inputs, options, layers, said = REFUSED[name]
    model = wrap(make(), example_inputs=inputs(), **options)
    picture, output = Picture(model), evaluated(model, inputs())
    with pytest.raises(ValueError, match=f"layers.*{said}"):
        refine(model, layers, by=by)
    picture.assert_unchanged()
    assert torch.equal(evaluated(model, inputs()), output)


def test_lists_of_an_untried_host_are_not_made_longer() -> None:
    model = wrap(Counting(), blocks=["blocks.0", "blocks.1"])
    with pytest.raises(ValueError, match=r"layers.*example_inputs"):
        refine(model, [0])


@pytest.mark.parametrize("name", ["sequential", "llama"])
@both_forms
def test_a_marked_state_dict(name: str, form: str) -> None:
    host = BY_NAME[name]
    model = host.wrapped(form=form, init=0.8).eval()
    refine(model, [1, 2])
    prune(model, keep=[0, 2, 3, 5])
    state = dict(model.state_dict())
    mark_(model, state)
    fresh = host.wrapped(form=form).eval()
    fresh.load_state_dict(state)
    assert fresh.time_steps.grid == model.time_steps.grid
    assert torch.equal(evaluated(fresh, host.inputs()), evaluated(model, host.inputs()))


@both_forms
def test_a_run_that_a_callback_refined_goes_on_with_the_same_bits(form: str, tmp_path: Path) -> None:
    def run(folder: str, *more: Callable[[EpochEnd], None], **options: Any) -> tuple[Any, Any]:
        model = BY_NAME["sequential"].wrapped(form=form, init=0.8)
        optimizer = torch.optim.Adam(model.named_parameters(), lr=0.01)

        def callback(end: EpochEnd) -> None:
            if end.epoch == 2:
                refine(end.model, [1], optimizer=end.optimizer)
            if end.epoch == 3:
                prune(end.model, keep=[0, 2, 3, 4], optimizer=end.optimizer)

        torch.manual_seed(5)
        x = torch.randn(20, 4)
        options = {"epochs": 4, "batch_size": 5, "progress": False, "run": tmp_path / folder} | options
        loss = nn.functional.mse_loss
        return model, fit(model, (x, x[:, :2]), loss=loss, optimizer=optimizer, callbacks=[callback, *more], **options)

    model, history = run("whole")
    assert model.time_steps.origin == (0, 4, 2, 3)
    assert [(each.layer, each.parent) for each in history.insertions] == [(4, 1)]
    for epoch in (2, 3):
        with pytest.raises(Crash):
            run(str(epoch), crash_after(epoch))
        resumed, record = run(str(epoch), resume=True)
        assert_same_weights(resumed, model)
        assert_same_history(record, history)


class Other(Block):
    """Refuses every type but that of its weights, as products do, and one more if it is told so."""

    refused = False

    def forward(self, x: Tensor) -> Tensor:
        if self.refused:
            raise TypeError("these inputs are not what it takes")
        return super().forward(x)


@pytest.mark.parametrize("form", FORMS)
def test_a_model_that_was_cast_is_refined(form: str) -> None:
    model = wrap(sequential(), example_inputs=features(), form=form).eval()
    model.to(torch.bfloat16)
    before = model(features().bfloat16())
    refine(model, [1], by="insert")
    assert torch.equal(model(features().bfloat16()), before)


def test_a_model_that_takes_other_inputs_by_now_is_refined_without_being_compared() -> None:
    model: Any = wrap(nn.Sequential(*(Other(4) for _ in range(3))), example_inputs=features())
    model[0].refused = True
    refine(model, [1], by="insert")
    assert model.time_steps.num_steps == 4


def test_steps_of_a_model_that_was_cast_are_tried_before_they_fold() -> None:
    model = wrap(nn.Sequential(*(Block(4) for _ in range(3))), example_inputs=features(), form="branches", init=0.5)
    model.to(torch.bfloat16)
    model[1].inner[-1].register_forward_hook(lambda *args: args[2] + 9.0)  # which no weight holds
    with pytest.raises(ValueError, match="must answer the same with its steps folded"):
        unwrap(model)
