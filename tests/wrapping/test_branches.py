"""Branch steps: what has them, what folds, and in what they work; for families of models see test_families.py."""

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
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
            y = y + tau * wrapping_of(host).branches.found[0][0].form.leaving(type(block.inner).forward(block.inner, y))
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


def test_what_is_not_linear_behind_the_end_has_steps_that_do_not_fold() -> None:
    host = chain(lambda: nn.Sequential(nn.Linear(4, 4), nn.Softsign()))
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
