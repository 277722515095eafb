"""What wrapping leaves as it was, and what it adds, on every kind of host."""

import copy
import inspect
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from taulearn import TimeSteps, attach, parameter_groups, unwrap, wrap
from taulearn._calls import call
from taulearn.optim import register_projection
from taulearn.wrapping import wrapping_of
from wrapping.hosts import BY_NAME, Block, Host, bert, encoder, evaluated, every_host, sequential, tensor, tokens


def outputs_and_gradients(model: Any, inputs: Any, *, seed: int = 3) -> tuple[Tensor, dict[str, Tensor]]:
    torch.manual_seed(seed)
    model.zero_grad()
    output = tensor(call(model, inputs))
    output.square().sum().backward()
    return output, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@every_host
def test_at_init_outputs_and_gradients_are_those_of_the_host_to_the_bit(host: Host) -> None:
    for training in (True, False):
        model, bare = host.wrapped().train(training), host.make().train(training)
        found, expected = (outputs_and_gradients(each, host.inputs()) for each in (model, bare))
        assert torch.equal(found[0], expected[0])
        assert found[1].pop("time_steps.values").abs().sum() > 0
        assert found[1].keys() == expected[1].keys()
        assert all(torch.equal(found[1][name], expected[1][name]) for name in expected[1])
        with torch.no_grad():  # torch's encoder takes another path here
            assert torch.equal(evaluated(model, host.inputs()), evaluated(bare, host.inputs()))


@every_host
def test_names_and_checkpoints_are_those_of_the_host(host: Host) -> None:
    bare = host.make()
    model = host.wrapped()
    assert [n for n, _ in model.named_parameters()] == [*(n for n, _ in bare.named_parameters()), "time_steps.values"]
    assert set(model.state_dict()) - set(bare.state_dict()) == {"time_steps.values"}
    other = copy.deepcopy(bare)
    with torch.no_grad():
        for p in other.parameters():
            p.add_(0.1)
    values = model.time_steps.values
    found = model.load_state_dict(other.state_dict())  # strictly
    assert found.missing_keys == []
    assert found.unexpected_keys == []
    assert model.time_steps.values is values
    assert torch.equal(evaluated(model, host.inputs()), evaluated(other, host.inputs()))
    with pytest.raises(RuntimeError, match=r"time_steps.values"):
        bare.load_state_dict(model.state_dict())


@every_host
def test_blocks_and_lists_are_found(host: Host) -> None:
    wrapping = wrapping_of(host.wrapped())
    assert wrapping is not None
    assert wrapping.names == host.blocks
    assert wrapping.shorten == set(host.lists)
    assert wrapping.fixed_layers() == {}


@every_host
def test_wrapping_leaves_no_trace_in_modes_generators_and_buffers(host: Host) -> None:
    model = host.make()
    model.train()
    next(m for m in model.modules() if isinstance(m, nn.LayerNorm | nn.BatchNorm2d | nn.Linear)).eval()
    modes = [m.training for m in model.modules()]
    state, buffers = torch.get_rng_state(), copy.deepcopy(dict(model.named_buffers()))
    wrap(model, example_inputs=host.inputs())
    assert [m.training for n, m in model.named_modules() if not n.startswith("time_steps")] == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in model.named_buffers())
    assert all(p.grad is None for p in model.parameters())


@every_host
def test_unwrap_gives_the_host_back(host: Host) -> None:
    bare, model = host.make(), host.make()
    before = [dict(vars(m)) for m in model.modules()]
    assert unwrap(wrap(model, example_inputs=host.inputs(), train="tau")) is model
    assert [vars(m).keys() for m in model.modules()] == [each.keys() for each in before]
    assert repr(model) == repr(bare)
    assert [n for n, p in model.named_parameters() if p.requires_grad] == [n for n, _ in bare.named_parameters()]
    assert torch.equal(evaluated(model, host.inputs()), evaluated(bare, host.inputs()))
    wrap(model, example_inputs=host.inputs())


@every_host
def test_the_step_is_the_euler_step(host: Host) -> None:
    """Every block gets x + tau (B(x) - x), whoever looks at it from outside."""
    model = host.wrapped(init=0.25, form="whole").eval()
    bare = host.make().eval()
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def look(name: str) -> Any:
        def hook(_m: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            x = args[0] if args else kwargs["hidden_states"]
            seen[name] = x, output if isinstance(output, Tensor) else output[0]

        return hook

    for name in host.blocks:
        model.get_submodule(name).register_forward_hook(look(name), with_kwargs=True)
    inner: dict[str, Tensor] = {}
    evaluated(model, host.inputs())
    for name in host.blocks:
        x, y = seen[name]
        step = model.get_submodule(name).forward
        assert step.name == name
        with torch.no_grad():
            if name in ("1", "layers.0", "vit.layers.0"):
                block = bare.get_submodule(name)
                inner[name] = block(x) if isinstance(block(x), Tensor) else block(x)[0]
                torch.testing.assert_close(y, x + 0.25 * (inner[name] - x))
    assert len(seen) == len(host.blocks)


@every_host
def test_a_deep_copy_has_steps_of_its_own(host: Host) -> None:
    model = host.wrapped()
    twin = copy.deepcopy(model)
    wrapping = wrapping_of(twin)
    assert wrapping is not None
    assert wrapping.host is twin
    assert wrapping.time_steps is twin.time_steps
    assert all(block in set(twin.modules()) for block in wrapping.layers)
    before = evaluated(model, host.inputs())
    with torch.no_grad():
        twin.time_steps.values.fill_(0.5)
    assert not torch.equal(evaluated(twin, host.inputs()), before)
    assert torch.equal(evaluated(model, host.inputs()), before)


@every_host
def test_functional_call_sees_swapped_steps(host: Host) -> None:
    model = host.wrapped().eval()
    swapped = {"time_steps.values": torch.full((len(host.blocks),), 0.5)}
    inputs = host.inputs()
    with torch.no_grad():
        args, kwargs = ((), inputs) if isinstance(inputs, dict) else ((inputs,), None)
        found = tensor(functional_call(model, swapped, args, kwargs))
        model.time_steps.values.fill_(0.5)
    assert torch.equal(found, evaluated(model, inputs))


@pytest.mark.parametrize(
    ("train", "trained"),
    [
        ("tau", []),
        ("5", ["5.weight", "5.bias"]),
        (["*.norm.weight", "0.*"], ["0.weight", "0.bias", "1.norm.weight", "2.norm.weight"]),
    ],
)
def test_the_user_says_what_trains(train: Any, trained: list[str]) -> None:
    model = BY_NAME["sequential"].wrapped(train=train)
    found = [name for name, p in model.named_parameters() if p.requires_grad]
    assert found[-1] == "time_steps.values"
    assert set(trained) <= set(found)
    assert {name.split(".")[0] for name in found[:-1]} <= {"0", "1", "2", "3", "4", "5"} if trained else len(found) == 1
    groups = parameter_groups(model, lr=0.1, tau_lr=0.01)
    assert list(groups[-1]["params"]) == [model.time_steps.values]
    assert len(groups[0]["params"]) == len(found) - 1


def test_training_all_leaves_frozen_parameters_frozen() -> None:
    model = sequential()
    model[0].requires_grad_(False)
    wrap(model, example_inputs=torch.ones(1, 4))
    assert [n for n, p in model.named_parameters() if not p.requires_grad] == ["0.weight", "0.bias"]


@pytest.mark.parametrize("constraint", ["free", "fixed", "dependent", "simplex"])
def test_constraints_start_as_the_host(constraint: str) -> None:
    host = BY_NAME["sequential"]
    model = host.wrapped(constraint=constraint)
    assert model.time_steps.horizon == 4.0
    assert torch.equal(evaluated(model, host.inputs()), evaluated(host.make(), host.inputs()))
    wrapping = wrapping_of(model)
    assert wrapping is not None
    assert sorted(wrapping.fixed_layers()) == ([3] if constraint == "dependent" else [])


def test_horizon_is_the_sum_of_init() -> None:
    model = wrap(sequential(), example_inputs=torch.ones(1, 4), init=[0.5, 1.0, 0.25, 0.25])
    assert model.time_steps.horizon == 2.0


def test_names_and_patterns() -> None:
    for blocks, expected in [("1", ("1",)), (["3", "1"], ("1", "3")), ("[12]", ("1", "2"))]:
        for inputs in (None, torch.ones(1, 4)):
            wrapping = wrapping_of(wrap(sequential(), blocks, example_inputs=inputs))
            assert wrapping is not None
            assert wrapping.names == expected


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_types_of_host_and_steps(dtype: torch.dtype) -> None:
    model, bare = sequential().to(dtype).eval(), sequential().to(dtype).eval()
    bare.load_state_dict(model.state_dict())
    wrap(model, example_inputs=torch.ones(1, 4, dtype=dtype))
    assert model.time_steps.tau.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    x = torch.randn(3, 4, dtype=dtype)
    assert torch.equal(model(x), bare(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("units", ["steps", "displacement"])
def test_steps_of_a_host_that_is_cast_are_at_least_of_single_precision(dtype: torch.dtype, units: str) -> None:
    model = wrap(sequential(), "[1234]", units=units).train()
    model(torch.randn(3, 4))
    before = {name: value.clone() for name, value in model.time_steps.state_dict().items()}
    model.to(dtype)
    assert model[0].weight.dtype == dtype
    for name, value in model.time_steps.state_dict().items():
        assert value.dtype == (before[name].double().to(dtype).dtype if dtype == torch.float64 else torch.float32)
        assert torch.equal(value, before[name].to(value.dtype))
    model.time_steps.values.grad = torch.full_like(model.time_steps.values, 1.0)
    torch.optim.SGD([model.time_steps.values], lr=1e-3).step()
    assert bool((model.time_steps.tau < 1.0).all())
    assert model(torch.randn(3, 4, dtype=dtype)).dtype == dtype


def test_a_model_with_a_session_or_a_projection_is_not_unwrapped() -> None:
    model = wrap(sequential(), "[1234]")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    session = attach(model, optimizer, iterations=2)
    with pytest.raises(ValueError, match=r"got a session of taulearn.attach: call session.detach\(\) before"):
        unwrap(model)
    session.detach()
    handle = register_projection(optimizer, model)
    with pytest.raises(ValueError, match=r"got a projection of register_projection: call remove\(\) of its handle"):
        unwrap(model)
    handle.remove()
    register_projection(torch.optim.SGD(model.parameters(), lr=0.1), model)  # which nobody holds
    unwrap(model)
    optimizer.step()


def test_parameters_and_modules_train_under_each_of_their_names() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.blocks = nn.Linear(4, 4), nn.ModuleList([Block(4), Block(4)])
            self.last = nn.Linear(4, 4)
            self.last.weight, self.same = self.first.weight, self.first

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.first(x)
            for block in self.blocks:
                y = block(y)
            return self.same(self.last(y))

    for train, expected in {
        "last": {"first.weight", "last.bias"},
        "last.weight": {"first.weight"},
        "same": {"first.weight", "first.bias"},
    }.items():
        model = wrap(Tied(), example_inputs=torch.ones(1, 4), train=[train])
        assert {name for name, p in model.named_parameters() if p.requires_grad} == expected | {"time_steps.values"}


@every_host
def test_under_autocast_the_start_is_the_host(host: Host) -> None:
    model, bare = host.wrapped().train(), host.make().train()
    for each in (model, bare):
        torch.manual_seed(5)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            output = tensor(call(each, host.inputs()))
        output.float().square().sum().backward()
        if each is model:
            first = output
    assert output.dtype == first.dtype
    assert torch.equal(output, first)
    assert bool(torch.isfinite(model.time_steps.values.grad).all())


class Pair(Block):
    """Returns the state in a tuple, takes it as a keyword."""

    def forward(self, *, scale: float = 1.0, hidden_states: Tensor, mask: Tensor | None = None) -> Any:
        return super().forward(scale * hidden_states), mask


class Pairs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Pair(4) for _ in range(3))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        for block in self.blocks:
            x, _ = block(mask=mask, hidden_states=x)
        return x


def test_tuples_and_keywords() -> None:
    model = Pairs().eval()
    x = torch.randn(2, 4)
    expected = model(x)
    wrap(model, example_inputs={"x": x, "mask": torch.ones(2)})
    assert model.time_steps.num_steps == 3
    assert torch.equal(model(x), expected)
    with torch.no_grad():
        model.time_steps.values.zero_()
    assert torch.equal(model(x, torch.ones(2)), x)


def test_signatures_stay() -> None:
    model = wrap(Pairs(), example_inputs=torch.ones(1, 4))
    assert list(inspect.signature(model.blocks[0].forward).parameters) == ["scale", "hidden_states", "mask"]


def test_hidden_states_of_transformers_are_those_of_the_steps() -> None:
    model = wrap(bert(), example_inputs=tokens(), init=0.5).eval()
    states = model(tokens(), output_hidden_states=True).hidden_states
    with torch.no_grad():
        model.time_steps.values.zero_()
    still = model(tokens(), output_hidden_states=True).hidden_states
    assert len(states) == len(still) == 5
    assert all(torch.equal(state, still[0]) for state in still)
    assert not any(torch.equal(a, b) for a, b in itertools.pairwise(states))


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(reentrant: bool) -> None:
    gradients = []
    for checkpointed in (True, False):
        model = BY_NAME["llama"].wrapped(init=0.7).train()
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        gradients.append(outputs_and_gradients(model, tokens())[1])
    assert gradients[0].keys() == gradients[1].keys()
    for name in gradients[0]:
        torch.testing.assert_close(gradients[0][name], gradients[1][name])


def test_torchs_encoder_keeps_its_fast_path(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[int] = []
    fast = torch._transformer_encoder_layer_fwd
    monkeypatch.setattr(torch, "_transformer_encoder_layer_fwd", lambda *args: taken.append(1) or fast(*args))
    model = wrap(encoder(), example_inputs=torch.ones(1, 3, 8)).eval()
    taken.clear()
    with torch.no_grad():
        model(torch.ones(1, 3, 8))
    assert len(taken) == 4


def test_a_sequential_still_runs_through_its_members() -> None:
    model = wrap(nn.Sequential(Block(3), Block(3)), "[01]")
    assert isinstance(model.time_steps, TimeSteps)
    assert [name for name, _ in model.named_children()] == ["0", "1", "time_steps"]


def test_errors_of_the_model_say_that_wrap_called_it() -> None:
    with pytest.raises(AttributeError) as caught:
        wrap(bert(), example_inputs=["good", "bad"])
    assert "example_inputs, a list" in caught.value.__notes__[0]
    with pytest.raises(ValueError, match=r"there are '0', '0\.norm', .*\.\."):
        wrap(nn.Sequential(*(Block(4) for _ in range(2))), blocks="xyz.*", example_inputs=torch.ones(1, 4))
