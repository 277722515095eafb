"""Branch steps: what has them, what folds, and in what they work; for families of models see test_families.py."""

import copy
import pickle
import threading
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from taulearn import load_model, prune, save_model, unwrap, wrap
from taulearn.wrapping import wrapping_of
from wrapping.families import FAMILIES
from wrapping.hosts import Block, sequential
from wrapping.test_families import answer, assert_like, set_steps, stepped
from wrapping.test_saved_families import drawn, ids


class Ends(nn.Module):
    """A block whose branch ends as the argument says."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.inner(x)
        return x + y


class Int8Linear(nn.Module):
    """Weights as integers and a scale."""

    def __init__(self, width: int) -> None:
        super().__init__()
        numbers = torch.randint(-127, 128, (width, width), dtype=torch.int8)
        self.weight = nn.Parameter(numbers, requires_grad=False)
        self.scale: Tensor
        self.register_buffer("scale", torch.full((width, 1), 0.003))

    def forward(self, x: Tensor) -> Tensor:
        return x @ (self.weight.to(x.dtype) * self.scale).T


def chain(make: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*(Ends(nn.Sequential(nn.Linear(4, 4), nn.Tanh(), make())) for _ in range(3)))


X = drawn(5, 4)


def assert_steps_work(host: Any) -> None:
    expected = answer(host, X)
    wrap(host, example_inputs=X, form="branches")
    assert torch.equal(answer(host, X)[0], expected[0])
    set_steps(host)
    y = X
    with torch.no_grad():
        for block, tau in zip(wrapping_of(host).layers, host.time_steps.tau, strict=True):
            y = y + tau * wrapping_of(host).blocks[0].branches[0].form.leaving(
                type(block.inner).forward(block.inner, y)
            )
    torch.testing.assert_close(answer(host, X)[0], y)


def test_quantised_weights_have_steps_that_do_not_fold(tmp_path: Path) -> None:
    host = chain(lambda: Int8Linear(4))
    assert_steps_work(host)
    with pytest.raises(ValueError, match=r"steps must fold .*'0' .*quantised") as caught:
        unwrap(host)
    assert "save_model" in str(caught.value)
    with pytest.raises(ValueError, match="quantised"):
        save_model(host, tmp_path, plain=True)
    assert not list(tmp_path.iterdir())
    save_model(host, tmp_path)
    loaded = load_model(tmp_path, host=chain(lambda: Int8Linear(4)))
    assert torch.equal(answer(loaded, X)[0], answer(host, X)[0])
    set_steps(host, 1.0, 1.0, 1.0)
    assert not hasattr(unwrap(host), "time_steps")


@pytest.mark.parametrize("after", [nn.Softsign, nn.ReLU])
def test_what_is_not_linear_behind_the_end_has_steps_that_do_not_fold(after: type[nn.Module]) -> None:
    host = chain(lambda: nn.Sequential(nn.Linear(4, 4), after()))
    assert_steps_work(host)
    with pytest.raises(ValueError, match="not proportional"):
        unwrap(host)


def test_a_normalisation_behind_the_end_leaves_form_whole() -> None:
    host = wrap(nn.Sequential(*(Normalised(nn.Linear(4, 4)) for _ in range(2))), example_inputs=X)
    assert wrapping_of(host).form == "whole"  # type: ignore[union-attr]
    assert "scaling test" in wrapping_of(host).why  # type: ignore[union-attr]


class Normalised(Ends):
    def forward(self, x: Tensor) -> Tensor:
        return x + nn.functional.layer_norm(self.inner(x), (4,))


class Experts(nn.Module):
    """Each sample goes to one of several experts."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        y = torch.zeros_like(x)
        for chosen, expert in zip((x[:, 0] > 0, x[:, 0] <= 0), self.experts, strict=True):
            if chosen.any():
                y[chosen] = expert(x[chosen])
        return y


class Stacked(nn.Module):
    """Two layers as parameters of one module, the last one first."""

    def __init__(self, activation: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.last, self.first = (nn.Parameter(torch.randn(4, 4)) for _ in range(2))
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(x @ self.first) @ self.last


@pytest.mark.parametrize("activation", [torch.relu, torch.tanh])
def test_of_the_parameters_of_a_module_the_last_layers_are_the_end(activation: Callable[[Tensor], Tensor]) -> None:
    host = chain(lambda: Stacked(activation))
    wrap(host, example_inputs=X, form="branches", init=[-0.5, 0.5, 2.0])
    expected = answer(host, X)
    assert wrapping_of(host).blocks[0].branches[0].ends[0].parameter == "inner.2.last"  # type: ignore[union-attr]
    assert_like(answer(unwrap(host), X), expected)


def test_experts_that_no_example_reaches_might_be_ends() -> None:
    few = X[X[:, 0] > 0.1]
    torch.manual_seed(0)
    host = nn.Sequential(Ends(Experts()), Ends(Experts())).eval()
    reached = wrap(copy.deepcopy(host), example_inputs=torch.cat([X, -X]), form="branches", init=0.5)
    expected = answer(reached, X)
    assert_like(answer(unwrap(reached), X), expected)
    wrap(host, example_inputs=few, form="branches", init=0.5)
    assert_like(answer(host, X), expected)
    with pytest.raises(ValueError, match=r"takes no part on the example inputs"):
        unwrap(host)


def test_tied_weights_do_not_fold() -> None:
    host = chain(lambda: nn.Linear(4, 4))
    host[2].inner[2].weight = host[0].inner[2].weight  # type: ignore[index, union-attr]
    wrap(host, example_inputs=X, form="branches", init=[1.0, 0.5, 1.0])
    copy.deepcopy(unwrap(copy.deepcopy(host)))
    set_steps(host, 0.5, 1.0, 1.0)
    before = {name: value.clone() for name, value in host.state_dict().items()}
    with pytest.raises(ValueError, match=r"shared with '2.inner.2.weight'"):
        unwrap(host)
    assert all(torch.equal(value, before[name]) for name, value in host.state_dict().items())


def test_steps_fold_into_the_weights_that_are_handed_over(tmp_path: Path) -> None:
    host = wrap(FAMILIES["gpt2"].bare(), example_inputs=ids(), init=[0.5, 1.0, 1.0, 1.0])
    own = host.transformer.h[0].mlp.c_proj.weight.detach().clone()
    averaged = {
        name: value + 1.0 if name.endswith("mlp.c_proj.weight") else value for name, value in host.state_dict().items()
    }
    host.save_pretrained(tmp_path, state_dict=averaged)
    loaded = type(host).from_pretrained(tmp_path)
    torch.testing.assert_close(loaded.transformer.h[0].mlp.c_proj.weight, 0.5 * (own + 1.0))


def test_a_state_dict_that_is_handed_over_gets_zeros_for_deleted_branches(tmp_path: Path) -> None:
    host = wrap(FAMILIES["gpt2"].bare(), example_inputs=ids(), per="branch").eval()
    prune(host, keep=[0, 1, 3, 4, 5, 6, 7])
    with pytest.warns(UserWarning, match="weights of zero"):
        host.save_pretrained(tmp_path, state_dict=host.state_dict())
    loaded = type(host).from_pretrained(tmp_path).eval()
    assert_like(answer(loaded, ids()), answer(host, ids()))


def test_zeros_for_deleted_branches_are_of_the_type_of_the_model(tmp_path: Path) -> None:
    host = wrap(FAMILIES["gpt2"].bare(), example_inputs=ids(), per="branch").eval()
    prune(host, keep=[0, 1, 3, 4, 5, 6, 7])
    host.to(torch.bfloat16)
    with pytest.warns(UserWarning, match="weights of zero") as told:
        host.save_pretrained(tmp_path)
    assert [each.filename for each in told if "of zero" in str(each.message)] == [__file__]
    tensors = safetensors.torch.load_file(tmp_path / "model.safetensors")
    assert {value.dtype for value in tensors.values()} == {torch.bfloat16}


class ReadsAnEnd(nn.Module):
    """A host that takes the weights of an end for something else, too."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = chain(lambda: nn.Linear(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        end: Any = self.blocks[0]
        return self.blocks(x) * end.inner[2].weight.mean()


@pytest.mark.parametrize("leave", [unwrap, lambda host: save_model(host, "never", plain=True)], ids=["unwrap", "save"])
def test_weights_that_are_read_elsewhere_do_not_fold(leave: Callable[[Any], Any]) -> None:
    host = wrap(ReadsAnEnd(), example_inputs=X, form="branches", init=[0.5, 1.0, 1.0])
    before = answer(host, X)[0]
    with pytest.raises(ValueError, match="must answer the same"):
        leave(host)
    assert torch.equal(answer(host, X)[0], before)


class TwoBranches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = (nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.a(x)
        return x + self.b(x)


class ByNumber(nn.Module):
    """A host that can do without no block, as it takes them by number and reads from each."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(TwoBranches() for _ in range(3))
        for block in self.blocks:
            block.size = 1.0

    def forward(self, x: Tensor) -> Tensor:
        for l in range(3):
            x = self.blocks[l](x) * self.blocks[l].size
        return x


def test_a_block_that_stays_without_branches_is_a_plain_one() -> None:
    host = wrap(ByNumber(), example_inputs=X, per="branch")
    expected = answer(copy.deepcopy(host), X)
    prune(host, keep=[2, 3])
    assert [wrapping_of(host).names[l] for l in host.time_steps.origin] == ["blocks.1.a", "blocks.1.b"]  # type: ignore[union-attr]
    pruned = answer(host, X)[0]
    assert not torch.equal(pruned, expected[0])
    unwrap(host)
    assert torch.equal(answer(host, X)[0], pruned)
    assert not any("forward" in vars(module) for module in host.modules())


class Gated(nn.Module):
    """x + alpha f(x) with alpha = 0 at the start: nothing is added before training."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.alpha = nn.Linear(4, 4), nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.alpha * torch.tanh(x) @ self.inner.weight.T


class Adaptive(nn.Module):
    """A gate that is computed, and zero at the start (adaLN-zero)."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.inner = nn.Linear(4, 4), nn.Linear(4, 4)
        nn.init.zeros_(self.gate.weight)
        nn.init.zeros_(self.gate.bias)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.gate(x) * self.inner(torch.tanh(x))
        return x + y


def test_branches_that_are_zero_at_the_start_are_found() -> None:
    torch.manual_seed(0)
    host = wrap(nn.Sequential(*(Adaptive() for _ in range(3))), example_inputs=X)
    assert wrapping_of(host).form == "branches"  # type: ignore[union-attr]
    with torch.no_grad():
        for parameter in host.parameters():
            parameter.copy_(torch.randn_like(parameter))
    set_steps(host)
    expected = answer(host, X)
    assert_like(answer(unwrap(host), X), expected)


def test_a_branch_that_no_module_ends_leaves_form_whole() -> None:
    host = wrap(nn.Sequential(Gated(), Gated()), example_inputs=X)
    assert wrapping_of(host).form == "whole"  # type: ignore[union-attr]


def test_code_that_leaves_a_site_out_is_noticed() -> None:
    fast, x = torch.backends.mha.get_fastpath_enabled(), FAMILIES["encoder"].inputs
    try:
        torch.backends.mha.set_fastpath_enabled(False)
        host = wrap(FAMILIES["encoder"].bare(), example_inputs=x, form="branches", init=0.5)
        expected = answer(host, x)
        torch.backends.mha.set_fastpath_enabled(True)
        with pytest.raises(ValueError, match=r"'layers.0' must run once.*set_fastpath_enabled\(False\)"):
            answer(host, x)
        assert_like(answer(unwrap(host), x), expected)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


class Deep(nn.Module):
    """A block with stochastic depth: in training it may leave its branch out and return its input."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.skipped, self.fast = nn.Linear(4, 4), False, False

    def forward(self, x: Tensor) -> Tensor:
        if self.skipped:
            return x
        y: Tensor = x @ self.inner.weight.T if self.fast else self.inner(x)
        return x + y


def test_a_block_that_is_skipped_as_a_whole_is_the_identity() -> None:
    blocks = [Deep() for _ in range(3)]
    host = wrap(nn.Sequential(*blocks), example_inputs=X, init=[0.5, 0.3, 0.7], form="branches")
    blocks[0].skipped = True
    expected = X
    for block, tau in zip(blocks[1:], (0.3, 0.7), strict=True):
        expected = expected + tau * nn.functional.linear(expected, block.inner.weight, block.inner.bias)
    torch.testing.assert_close(host(X), expected)
    host(X).sum().backward()
    assert host.time_steps.values.grad[0] == 0 != host.time_steps.values.grad[1]  # type: ignore[index]
    blocks[0].skipped, blocks[0].fast = False, True
    with pytest.raises(ValueError, match="must run once"):
        host(X)


def test_copies_are_independent() -> None:
    host = stepped("gpt2")
    for twin in (copy.deepcopy(host), pickle.loads(pickle.dumps(host))):
        set_steps(twin)
        expected = answer(twin, ids())
        assert torch.equal(answer(host, ids())[0], answer(FAMILIES["gpt2"].bare(), ids())[0])
        assert_like(answer(unwrap(twin), ids()), expected, 2e-6)


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(reentrant: bool) -> None:
    gradients = []
    for checkpointed in (False, True):
        host = stepped("gpt2").train()
        for module in host.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        set_steps(host)
        if checkpointed:
            host.gradient_checkpointing_enable({"use_reentrant": reentrant})
        host(**ids(), labels=ids()["input_ids"]).loss.backward()
        gradients.append(host.time_steps.values.grad)
    torch.testing.assert_close(gradients[0], gradients[1])
    assert bool((gradients[0] != 0).all())


def test_autocast() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        for a, b in zip(answer(stepped("llama"), ids()), answer(FAMILIES["llama"].bare(), ids()), strict=True):
            assert torch.equal(a, b)


def test_compiled_block_by_block_it_takes_one_graph_for_all() -> None:
    """torch gives up on a function after 8 versions of it."""
    torch.compiler.reset()
    host = wrap(nn.Sequential(*(Block(4) for _ in range(10))), example_inputs=X, form="branches").eval()
    set_steps(host)
    expected, graphs = answer(host, X), []

    def backend(graph: torch.fx.GraphModule, _inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    for block in host:
        block.compile(backend=backend, fullgraph=True)
    for _ in range(3):
        assert_like(answer(host, X), expected)
    assert len(graphs) < 5
    torch.compiler.reset()


def test_adapters_that_were_there_before() -> None:
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    lora = peft.LoraConfig(r=2, target_modules=["c_proj"], fan_in_fan_out=True)  # their last factors are zero
    host = wrap(peft.get_peft_model(FAMILIES["gpt2"].bare(), lora), example_inputs=ids(), form="branches").eval()
    for name, parameter in host.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    set_steps(host)
    prune(host, keep=[0, 1, 3])
    expected = answer(host, ids())
    merged = unwrap(host).merge_and_unload().eval()
    assert type(merged).__name__ == "GPT2LMHeadModel"
    assert_like(answer(merged, ids()), expected, 1e-5)


@pytest.mark.parametrize("first", ["adapters", "steps"])
def test_ends_are_found_anew_where_adapters_came_or_were_merged(first: str, tmp_path: Path) -> None:
    """The weights into which the steps would have folded are gone then, or stand elsewhere."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    lora = peft.LoraConfig(r=2, target_modules=["q_proj", "o_proj", "down_proj"], init_lora_weights=False)
    if first == "adapters":
        adapted = host = wrap(peft.get_peft_model(FAMILIES["llama"].bare(), lora), example_inputs=ids())
    else:
        host = wrap(FAMILIES["llama"].bare(), example_inputs=ids(), init=0.5)
        adapted = peft.get_peft_model(host, lora)
    set_steps(host)
    prune(host, keep=[0, 2, 3])
    expected = answer(adapted.eval(), ids())
    if first == "adapters":
        merged = host.merge_and_unload()
        merged.save_pretrained(tmp_path / "folded")
        assert_like(answer(type(merged).from_pretrained(tmp_path / "folded").eval(), ids()), expected, 1e-5)
        unwrap(host)
    else:
        unwrap(host)
        assert_like(answer(adapted, ids()), expected, 1e-5)
        merged = adapted.merge_and_unload()
    assert not any("forward" in vars(module) for module in merged.modules())
    assert_like(answer(merged.eval(), ids()), expected, 1e-5)


def test_the_model_that_has_the_steps_is_named() -> None:
    peft = pytest.importorskip("peft")
    lora = peft.LoraConfig(r=2, target_modules=["q_proj"])
    with pytest.raises(ValueError, match=r"model must be wrapped, got PeftModel.*'base_model.model'"):
        unwrap(peft.get_peft_model(stepped("llama"), lora))
    merged = wrap(peft.get_peft_model(FAMILIES["llama"].bare(), lora), example_inputs=ids()).merge_and_unload()
    with pytest.raises(ValueError, match=r"model must be wrapped, got LlamaForCausalLM.*around it"):
        unwrap(merged)


def test_threads_that_share_a_model_are_told_to_unwrap_it() -> None:
    """One thread is in the block while the other runs all of it."""
    host = wrap(nn.Sequential(*(Ends(Waiting()) for _ in range(2))), example_inputs=X, form="branches", init=0.5)
    inner: Waiting = host[0].inner  # type: ignore[union-attr,assignment]
    inner.then = lambda: threading_run(lambda: host(X))
    with pytest.raises(ValueError, match=r"'0' must run once.*threads"):
        host(X)


class Waiting(nn.Linear):
    """Calls something, once, before it computes."""

    def __init__(self) -> None:
        super().__init__(4, 4)
        self.then: Callable[[], None] | None = None

    def forward(self, x: Tensor) -> Tensor:
        then, self.then = self.then, None
        if then is not None:
            then()
        return super().forward(x)


def threading_run(run: Callable[[], Any]) -> None:
    thread = threading.Thread(target=run)
    thread.start()
    thread.join()


@pytest.mark.filterwarnings(
    "ignore:torch.ao.quantization is deprecated", "ignore:.*reduce_range", "ignore:.*TypedStorage"
)
def test_weights_that_are_no_parameters_leave_form_whole_and_say_so() -> None:
    host = nn.Sequential(Block(4), Block(4))
    quantised = torch.ao.quantization.quantize_dynamic(copy.deepcopy(host), {nn.Linear})
    expected = answer(quantised, X)
    wrap(quantised, example_inputs=X)
    assert torch.equal(answer(quantised, X)[0], expected[0])
    wrapping = wrapping_of(quantised)
    assert wrapping is not None
    assert (wrapping.form, "no parameters, as quantised" in wrapping.why) == ("whole", True)
    later = torch.ao.quantization.quantize_dynamic(wrap(host, example_inputs=X, init=0.5), {nn.Linear})
    with pytest.raises(ValueError, match=r"unwrap before .* weights quantised"):
        unwrap(later)


def assert_cached(host: Any) -> None:
    """The last token gets the same logits with a cache."""
    tokens = ids()["input_ids"]
    with torch.no_grad():
        cache = host(input_ids=tokens[:, :-1], use_cache=True).past_key_values
        last = host(input_ids=tokens[:, -1:], past_key_values=cache).logits[:, -1]
        assert_like([last], [host(input_ids=tokens).logits[:, -1]], 1e-5)


def test_a_model_that_lost_branches_is_wrapped_per_branch_again(tmp_path: Path) -> None:
    host = stepped("llama", per="branch")
    prune(host, keep=[0, 1, 2, 4, 5, 6, 7])
    set_steps(host)
    expected = answer(unwrap(host), ids())
    wrap(host, example_inputs=ids(), per="branch")
    assert torch.equal(answer(host, ids())[0], expected[0])
    assert host.time_steps.num_steps == 7
    set_steps(host)
    with torch.no_grad():
        host.time_steps.values[2] = 0.0
    expected = answer(host, ids())
    prune(host, keep=[0, 1, 3, 4, 5, 6])  # the rest of block 1
    assert_like(answer(host, ids()), expected, 1e-5)
    assert len(host.model.layers) == 3
    assert_cached(host)
    again = stepped("llama", per="branch")
    prune(again, keep=[0, 1, 3, 4, 5, 6, 7])
    wrap(unwrap(again), example_inputs=ids(), per="branch")
    prune(again, keep=[0, 1, 2, 4, 5, 6])  # the attention of a block whose number is not its place any more
    assert [getattr(block.self_attn, "layer_idx", None) for block in again.model.layers][::3] == [0, 1]
    assert_cached(again)
    host.save_pretrained(tmp_path)
    assert_like(answer(type(host).from_pretrained(tmp_path).eval(), ids()), expected, 1e-5)


@pytest.mark.long
@pytest.mark.parametrize("first", ["adapters", "steps"])
def test_branches_with_adapters_that_are_deleted_and_saved(first: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    lora = peft.LoraConfig(
        r=2, target_modules=["c_attn", "c_proj"], init_lora_weights=False, fan_in_fan_out=True, lora_dropout=0.1
    )
    if first == "adapters":
        host = wrap(peft.get_peft_model(FAMILIES["gpt2"].bare(), lora), example_inputs=ids(), per="branch").eval()
        adapted: Any = host
    else:
        host = wrap(FAMILIES["gpt2"].bare(), example_inputs=ids(), per="branch")
        adapted = peft.get_peft_model(host, lora).eval()
    prune(host, keep=[0, 3, 4, 5, 6, 7])
    expected = answer(adapted, ids())
    if first == "adapters":
        unwrap(host)
    merged = adapted.merge_and_unload().eval()
    with pytest.warns(UserWarning, match="weights of zero"):
        merged.save_pretrained(tmp_path)
    assert_like(answer(type(merged).from_pretrained(tmp_path).eval(), ids()), expected, 1e-5)


def test_files_without_a_form_are_whole(tmp_path: Path) -> None:
    import json

    host = wrap(sequential(), example_inputs=X, form="whole", init=0.5)
    save_model(host, tmp_path)
    path = tmp_path / "model.json"
    manifest = json.loads(path.read_text())
    for key in ("form", "per", "branches", "plain"):
        del manifest["model"][key]
    path.write_text(json.dumps(manifest))
    for fresh in (sequential(), wrap(sequential(), example_inputs=X, horizon=2.0)):
        loaded = load_model(tmp_path, host=fresh)
        assert wrapping_of(loaded).form == "whole"  # type: ignore[union-attr]
        torch.testing.assert_close(answer(loaded.eval(), X), answer(host.eval(), X))


def test_a_deletion_of_branches_that_fails_leaves_everything() -> None:
    host = stepped("gpt2", per="branch")
    before = {name: (type(each), vars(each).get("forward")) for name, each in host.named_modules()}
    expected = answer(host, ids())
    optimizer = torch.optim.SGD(host.parameters(), lr=0.1)

    def failing(*_: Any) -> None:
        raise RuntimeError("stop")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("taulearn.adaptivity.transaction.follow", failing)
        with pytest.raises(RuntimeError, match="stop"):
            prune(host, keep=[1, 2, 4, 5, 7], optimizer=optimizer)
    after = {name: (type(each), vars(each).get("forward")) for name, each in host.named_modules()}
    assert after == before
    assert torch.equal(answer(host, ids())[0], expected[0])


def test_influence_of_branches_is_of_the_states_between_them() -> None:
    """With serial branches the state before the second one is x + tau g_1(x)."""
    from taulearn.adaptivity.criteria import on_data

    host = stepped("gpt2", per="branch")
    set_steps(host)
    seen: list[Tensor] = []
    for block in host.transformer.h:
        block.ln_1.register_forward_pre_hook(lambda _m, args: seen.append(args[0]))
        block.ln_2.register_forward_pre_hook(lambda _m, args: seen.append(args[0]))
    host.transformer.ln_f.register_forward_pre_hook(lambda _m, args: seen.append(args[0]))
    found = on_data("influence", [ids()])(host.time_steps.tau, host)
    states = seen[: host.time_steps.num_steps + 1]
    expected = [
        float((1 - nn.functional.cosine_similarity(x.double(), y.double(), dim=-1)).mean()) for x, y in pairwise(states)
    ]
    assert found.tolist() == pytest.approx(expected, rel=1e-3)


def test_states_are_those_between_blocks() -> None:
    from taulearn.depth.wrapped_states import record_states

    host = stepped("gpt2", per="branch")
    with pytest.raises(ValueError, match="per block"):
        record_states(host, ids())
    assert len(record_states(stepped("gpt2"), ids())[1]) == 5


@pytest.mark.parametrize("per", ["block", "branch"])
def test_fit_prunes_them_to_a_target_with_averaged_weights(per: str) -> None:
    from torch.optim.swa_utils import AveragedModel

    from taulearn import Pruning, fit, parameter_groups

    torch.manual_seed(0)
    host = wrap(nn.Sequential(*(Twofold() for _ in range(4))), example_inputs=X, per=per)
    averaged = AveragedModel(host)
    x = drawn(64, 4)
    optimizer = torch.optim.Adam(parameter_groups(host, lr=1e-3, tau_lr=0.05))
    pruning = Pruning(target_blocks=3, criterion="contribution")
    options: dict[str, Any] = {
        "loss": nn.functional.mse_loss,
        "optimizer": optimizer,
        "batch_size": 8,
        "progress": False,
    }
    fit(host, (x, x.flip(1)), epochs=6, pruning=pruning, averaged=averaged, **options)
    assert host.time_steps.num_steps == averaged.module.time_steps.num_steps == 3
    assert bool((host.time_steps.tau != 1).any())
    for each in (host.eval(), averaged.module.eval()):
        expected = answer(each, X)
        assert_like(answer(unwrap(each), X), expected)


class Twofold(nn.Module):
    """Two residual branches."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Block(4).inner, Block(4).inner

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.first(x)
        y: Tensor = x + self.second(x)
        return y


@pytest.mark.parametrize("format_", ["torch", pytest.param("onnx", marks=pytest.mark.long)])
def test_exported_programs_have_no_steps(format_: str, tmp_path: Path) -> None:
    from taulearn.export import export_model

    host = wrap(nn.Sequential(*(Twofold() for _ in range(3))), example_inputs=X).eval()
    set_steps(host)
    exported = export_model(host, tmp_path, X, format=format_)
    assert exported.difference <= 1e-6 * exported.size
    assert host.time_steps.num_steps == 3
    if format_ == "torch":
        program = torch.export.load(exported.files[0])
        assert not any("time_steps" in name for name in program.state_dict)
        multiplications = [n for n in program.graph.nodes if n.op == "call_function" and "mul" in str(n.target)]
        assert not multiplications


class Uncopied:
    def __deepcopy__(self, _memo: Any) -> Any:
        raise TypeError("no copies")


@pytest.mark.parametrize("where", ["argument", "block", "zero"])
def test_blocks_that_cannot_be_tried_leave_form_whole(where: str) -> None:
    class Picky(Ends):
        def forward(self, x: Tensor, other: Any = None) -> Tensor:
            if where == "zero" and not bool(self.inner[2].weight.any()):  # type: ignore[index]
                raise ArithmeticError
            return super().forward(x)

    class Handing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            inner = (nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)) for _ in range(3))
            self.blocks = nn.ModuleList(Picky(each) for each in inner)
            for block in self.blocks:
                vars(block)["held"] = Uncopied() if where == "block" else None

        def forward(self, x: Tensor) -> Tensor:
            for block in self.blocks:
                x = block(x, Uncopied() if where == "argument" else None)
            return x

    host = wrap(Handing(), example_inputs=X, init=0.5)
    assert wrapping_of(host).form == "whole"  # type: ignore[union-attr]
    assert {"argument": "copied", "block": "TypeError", "zero": "ArithmeticError"}[where] in wrapping_of(host).why  # type: ignore[union-attr]
    assert prune(host, keep=[0, 2]).layers_after == 2


def test_parts_and_state_dicts_that_are_handed_over_are_folded(tmp_path: Path) -> None:
    host = stepped("gpt2")
    set_steps(host)
    expected = answer(host, ids())
    host.save_pretrained(tmp_path / "given", state_dict=host.state_dict())
    assert_like(answer(type(host).from_pretrained(tmp_path / "given"), ids()), expected)
    host.transformer.save_pretrained(tmp_path / "part")
    part = type(host.transformer).from_pretrained(tmp_path / "part").eval()
    assert_like(answer(part, ids()), answer(host.transformer, ids()))
