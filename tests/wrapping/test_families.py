"""One contract for the families of models in wrapping.families, and what each of them cannot do."""

import warnings
from collections.abc import Iterator
from fnmatch import fnmatch
from functools import reduce
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from copies import copied
from taulearn import load_model, prune, save_model, unwrap, wrap
from taulearn._calls import call
from taulearn.diagnostics import summary
from taulearn.wrapping import wrapping_of
from wrapping.families import FAMILIES, PAGE, table


def each(names: list[str]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize(
        "name", [pytest.param(name, marks=[pytest.mark.long] * (not FAMILIES[name].short)) for name in names]
    )


every_family = each([*FAMILIES])
every_foldable = each([name for name, family in FAMILIES.items() if family.form == "branches"])
every_pretrained = each([name for name, family in FAMILIES.items() if family.is_pretrained])


@pytest.fixture(autouse=True)
def _fast_path(request: pytest.FixtureRequest) -> Iterator[None]:
    """Whether torch's encoder may take its fast path."""
    before, case = torch.backends.mha.get_fastpath_enabled(), getattr(request.node, "callspec", None)
    torch.backends.mha.set_fastpath_enabled(
        case is None or "name" not in case.params or FAMILIES[case.params["name"]].fast
    )
    yield
    torch.backends.mha.set_fastpath_enabled(before)


@copied
def stepped(name: str, **options: Any) -> Any:
    family = FAMILIES[name]
    return wrap(family.bare(), example_inputs=family.inputs, **options)


def answer(host: nn.Module, inputs: Any) -> list[Tensor]:
    """The first output."""
    with torch.no_grad():
        found = call(host, inputs)
    leaves = tree_leaves(found.to_tuple()[:1] if hasattr(found, "to_tuple") else found)
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)]


def equal(found: list[Tensor], expected: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def assert_like(found: list[Tensor], expected: list[Tensor], error: float = 1e-5) -> None:
    """Up to an error relative to the largest entry."""
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=error * float(theirs.abs().max()))


def set_steps(host: Any, *values: float) -> None:
    """These steps, or some where they fold."""
    steps = host.time_steps
    with torch.no_grad():
        if values:
            steps.values.copy_(torch.tensor(values))
        elif wrapping_of(host).form == "branches":
            steps.values.copy_(torch.linspace(0.4, 1.7, steps.num_steps))


def shorter(name: str) -> tuple[Any, list[Tensor]]:
    """The model with steps of zero, and those blocks deleted; and what it answered before that."""
    host, family = stepped(name), FAMILIES[name]
    set_steps(host)
    with torch.no_grad():
        host.time_steps.values[list(family.gone)] = 0.0
    before = answer(host, family.inputs)
    prune(host, keep=[l for l in range(host.time_steps.num_steps) if l not in family.gone])
    return host, before


def branch_numbers(host: Any) -> list[int]:
    """The first branch of blocks 0 and 2, the last of block 1, and all of the last block, if they can go."""
    owners = [layer.block for layer in wrapping_of(host).present]
    blocks = [*dict.fromkeys(owners)]
    last = [l for l, owner in enumerate(owners) if owner is blocks[-1]]
    return sorted(
        {0, owners.index(blocks[2]) - 1, owners.index(blocks[2]), *last} - wrapping_of(host).fixed_layers().keys()
    )


def fewer_branches(name: str) -> tuple[Any, list[Tensor]]:
    """The same for branches."""
    host, inputs = stepped(name, per="branch"), FAMILIES[name].inputs
    set_steps(host)
    lost = branch_numbers(host)
    with torch.no_grad():
        host.time_steps.values[lost] = 0.0
    before = answer(host, inputs)
    prune(host, keep=[l for l in range(host.time_steps.num_steps) if l not in lost])
    return host, before


def logits_of(host: Any, inputs: Any, *, use_cache: bool) -> tuple[Tensor, Tensor]:
    """The tokens that it generates, and their logits."""
    prompt = {key: value for key, value in inputs.items() if "decoder" not in key}
    found = host.generate(
        **prompt,
        max_new_tokens=8,
        min_new_tokens=8,
        do_sample=False,
        use_cache=use_cache,
        pad_token_id=1,
        output_logits=True,
        return_dict_in_generate=True,
    )
    return found.sequences, torch.stack(found.logits)


def assert_generates_alike(host: Any, inputs: Any) -> None:
    (tokens, logits), (others, theirs) = (logits_of(host, inputs, use_cache=flag) for flag in (True, False))
    assert torch.equal(tokens, others)
    assert len(logits) > 4
    assert_like([logits], [theirs])
    key = "decoder_input_ids" if "decoder_input_ids" in inputs else "input_ids"
    with torch.no_grad():
        whole, first = (host(**inputs | {key: inputs[key][:, :end]}, use_cache=True) for end in (12, 7))
        if "past_key_values" not in first:  # Mamba's cache takes one token at a time, as generation does
            return
        last = host(**inputs | {key: inputs[key][:, 7:]}, past_key_values=first.past_key_values)
    assert_like([last.logits], [whole.logits[:, 7:]])


@every_family
def test_which_form(name: str) -> None:
    family, host = FAMILIES[name], stepped(name)
    wrapping = wrapping_of(host)
    assert wrapping.form == family.form
    assert wrapping.why in str(summary(host))
    if family.form == "whole":
        assert family.whole
        assert family.whole in wrapping.why
        with pytest.raises(ValueError, match=rf"form must be .*'branches'.*{family.whole}"):
            wrap(family.bare(), example_inputs=family.inputs, form="branches")
        return
    found = [block.branches for block in wrapping.blocks]
    ends = [end.parameter.rpartition(".")[0] for branch in found[0] for end in branch.ends]
    assert tuple(dict.fromkeys(ends)) == family.ends
    assert not any(branch.not_folded for branches in found for branch in branches)


@every_family
def test_steps_of_one_change_nothing_to_the_bit(name: str) -> None:
    inputs = FAMILIES[name].inputs
    assert equal(answer(stepped(name), inputs), answer(FAMILIES[name].bare(), inputs))


@every_family
def test_a_step_of_zero_is_the_identity_to_the_bit(name: str) -> None:
    host, inputs, gone = stepped(name), FAMILIES[name].inputs, FAMILIES[name].gone[0]
    set_steps(host)
    with torch.no_grad():
        host.time_steps.values[gone] = 0.0
    form, block = wrapping_of(host).present[gone].form, wrapping_of(host).layers[gone]
    seen: list[tuple[Tensor, Tensor]] = []
    block.register_forward_hook(
        lambda _m, args, kwargs, output: seen.append((form.arriving(args, kwargs), form.leaving(output))),
        with_kwargs=True,
    )
    answer(host, inputs)
    assert equal([seen[0][0]], [seen[0][1]])


@pytest.mark.long
@every_family
def test_bfloat16(name: str) -> None:
    """The same form, exact at steps of 1 and after a deletion."""
    family = FAMILIES[name]
    inputs = tree_map(lambda x: x.bfloat16() if x.is_floating_point() else x, family.inputs)
    host = wrap(family.bare().bfloat16(), example_inputs=inputs)
    assert wrapping_of(host).form == family.form
    assert equal(answer(host, inputs), answer(family.bare().bfloat16(), inputs))
    with torch.no_grad():
        host.time_steps.values[list(family.gone)] = 0.0
    before = answer(host, inputs)
    prune(host, keep=[l for l in range(host.time_steps.num_steps) if l not in family.gone])
    assert equal(answer(host, inputs), before)


@every_foldable
def test_folded_is_stepped(name: str) -> None:
    host, inputs = stepped(name), FAMILIES[name].inputs
    set_steps(host)
    expected, plain = answer(host, inputs), answer(FAMILIES[name].bare(), inputs)
    assert all(bool((a - b).abs().max() > 1e-2 * b.abs().max()) for a, b in zip(expected, plain, strict=True))
    assert unwrap(host) is host
    assert not hasattr(host, "time_steps")
    assert not any("forward" in vars(module) for module in host.modules())
    assert_like(answer(host, inputs), expected)


@every_foldable
def test_the_gradient_of_a_step_is_its_slope(name: str) -> None:
    family, host = FAMILIES[name], stepped(name)
    dtype = torch.float64 if family.double else torch.float32
    host.to(dtype)
    set_steps(host)
    inputs = tree_map(lambda x: x.to(dtype) if x.is_floating_point() else x, family.inputs)
    tau = host.time_steps.values

    def value() -> Tensor:
        found = call(host, inputs)
        first: Tensor = tree_leaves(found.to_tuple()[:1] if hasattr(found, "to_tuple") else found)[0]
        return (first * torch.linspace(-1, 1, first.numel(), dtype=dtype).view_as(first)).sum()

    step = 1e-3
    (slope,) = torch.autograd.grad(value(), tau)
    for l in (0, len(tau) - 1):
        sides = []
        for sign in (1, -1):
            with torch.no_grad():
                tau[l] += sign * step
                sides.append(float(value()))
                tau[l] -= sign * step
        # normalisations in single precision inside
        assert float(slope[l]) == pytest.approx(
            (sides[0] - sides[1]) / (2 * step), rel=1e-2 if family.double else 0.1, abs=1e-3
        )


@every_family
def test_blocks_of_step_zero_are_deleted_and_configurations_follow(name: str) -> None:
    family = FAMILIES[name]
    fixed = wrapping_of(stepped(name)).fixed_layers()
    assert fixed.keys() == family.stays.keys()
    assert all(why in fixed[l] for l, why in family.stays.items())
    host, before = shorter(name)
    assert not equal(before, answer(family.bare(), family.inputs))
    assert_like(answer(host, family.inputs), before)
    config = getattr(host, "config", None)
    assert {key: reduce(getattr, key.split("."), config) for key in family.config} == family.config
    numbers = [vars(m)["layer_idx"] for m in host.modules() if isinstance(vars(m).get("layer_idx"), int)]
    assert set(numbers) <= set(range(host.time_steps.num_steps))


@each([name for name, family in FAMILIES.items() if family.generates])
def test_generation_with_and_without_the_cache_is_the_same(name: str) -> None:
    assert_generates_alike(shorter(name)[0], FAMILIES[name].inputs)


def assert_plain_loading_gives(host: Any, folder: Path, expected: list[Tensor], inputs: Any) -> None:
    bits = {key: value.clone() for key, value in host.state_dict().items()}
    host.save_pretrained(folder)
    loaded, info = type(host).from_pretrained(folder, output_loading_info=True)
    assert not any(info.values())
    assert_like(answer(loaded.eval(), inputs), expected)
    assert all(torch.equal(value, bits[key]) for key, value in host.state_dict().items())


@every_pretrained
def test_plain_transformers_loads_what_is_saved(name: str, tmp_path: Path) -> None:
    family, host = FAMILIES[name], stepped(name)
    set_steps(host)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert_plain_loading_gives(host, tmp_path / "all", answer(host, family.inputs), family.inputs)
        host, expected = shorter(name)
        if family.unsaved:
            with pytest.raises(ValueError, match=rf"save_pretrained, got .*{family.unsaved}"):
                host.save_pretrained(tmp_path / "fewer")
            assert not (tmp_path / "fewer").exists()
        else:
            assert_plain_loading_gives(host, tmp_path / "fewer", expected, family.inputs)


@every_family
def test_load_model_restores_it(name: str, tmp_path: Path) -> None:
    family, (host, _) = FAMILIES[name], shorter(name)
    expected = answer(host, family.inputs)
    save_model(host, tmp_path / "steps")
    loaded = load_model(tmp_path / "steps", host=family.bare())
    assert wrapping_of(loaded).form == family.form
    assert equal(answer(loaded, family.inputs), expected)
    save_model(host, tmp_path / "plain", plain=True)
    plain = load_model(tmp_path / "plain", host=family.bare())
    assert not hasattr(plain, "time_steps")
    assert_like(answer(plain, family.inputs), expected)


@every_family
def test_branches_are_deleted_one_by_one(name: str, tmp_path: Path) -> None:
    family = FAMILIES[name]
    if family.together:
        with pytest.raises(ValueError, match=family.together):
            stepped(name, per="branch")
        return
    wrapping = wrapping_of(stepped(name, per="branch"))
    block, sites = wrapping.present[0].block, {branch.site for branch in wrapping.blocks[0].branches}
    matrices = [key for key, p in block.named_parameters() if p.ndim > 1]
    outside = [key for key in matrices if not any(key.startswith(f"{site}.") for site in sites)]
    assert tuple(dict.fromkeys(key.partition(".")[0] for key in outside)) == family.runs_on
    fixed = {wrapping.names[l]: why for l, why in wrapping.fixed_layers().items()}
    expected_fixed = {key: why for key in wrapping.names for like, why in family.alone.items() if fnmatch(key, like)}
    assert fixed.keys() == expected_fixed.keys()
    assert all(why in fixed[key] for key, why in expected_fixed.items())

    host, before = fewer_branches(name)
    assert not equal(before, answer(family.bare(), family.inputs))
    assert_like(answer(host, family.inputs), before)
    if family.generates:
        assert_generates_alike(host, family.inputs)
    expected = answer(host, family.inputs)
    save_model(host, tmp_path / "steps")
    loaded = load_model(tmp_path / "steps", host=family.bare())
    assert wrapping_of(loaded).per == "branch"
    assert equal(answer(loaded, family.inputs), expected)
    if family.is_pretrained:
        with pytest.warns(UserWarning, match="weights of zero"):
            assert_plain_loading_gives(host, tmp_path / "zeros", expected, family.inputs)
        assert equal(answer(host, family.inputs), expected)


@pytest.mark.long
@pytest.mark.parametrize("gone", [(1,), (2,), (3,), (1, 2), (1, 3)], ids=str)
def test_a_cache_of_several_kinds_without_attentions(gone: tuple[int, ...]) -> None:
    """Sliding and full attention in turn: those that are left of a kind fill its first places."""
    name = "qwen2, two kinds"
    host, inputs = stepped(name, per="branch"), FAMILIES[name].inputs
    prune(host, keep=[l for l in range(8) if l not in {2 * block for block in gone}])
    assert_generates_alike(host, inputs)


def test_the_page_shows_the_table() -> None:
    assert f"\n\n{table()}\n" in PAGE.read_text(encoding="utf-8")
