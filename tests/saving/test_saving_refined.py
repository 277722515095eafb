"""Files of refined models: the layers come back with their numbers and parents, and no number is used twice."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from small_networks import DOUBLE, assert_same_bits, batch, network
from taulearn import TimeSteps, load_model, prune, refine, save_model, truncate
from taulearn.integrations.checkpoints import follow_states, mark_
from taulearn.nn import Residual, TimeVariableNetwork, fractional_dnn, resnet_v2
from taulearn.nn.grid import Grid


def cycles(model: Any) -> Any:
    """Splits, insertions and deletions; at the end layer 1 is gone, and one of its descendants is there."""
    refine(model, [1, 3])
    refine(model, [2], by="insert")
    gone = 1, 2, model.time_steps.next_number - 2
    prune(model, keep=[l for l, n in enumerate(model.time_steps.origin) if n not in gone])
    return model


def images(n: int = 3) -> Tensor:
    return torch.randn(n, 3, 8, 8, generator=torch.Generator().manual_seed(1))


MODELS: dict[str, tuple[Callable[[], Any], Callable[[], Tensor]]] = {
    "resnet": (network, batch),
    "simplex": (lambda: network(constraint="simplex"), batch),
    "dependent": (lambda: network(constraint="dependent"), batch),
    "fractional": (lambda: network(builder=fractional_dnn), batch),
    "resnet_v2": (lambda: resnet_v2(6, 4, widths=4), images),
    "stages": (lambda: resnet_v2((6, 2), 4, widths=(4, 6)), images),
}
models = pytest.mark.parametrize("name", MODELS)


@models
def test_a_round_trip(name: str, tmp_path: Path) -> None:
    make, inputs = MODELS[name]
    model, x = cycles(make()).eval(), inputs()
    save_model(model, tmp_path)
    for loaded in (load_model(tmp_path), load_model(tmp_path, host=make())):
        assert loaded.time_steps.grid == model.time_steps.grid
        assert_same_bits(dict(loaded.state_dict()), dict(model.state_dict()))
        assert torch.equal(loaded.eval()(x), model(x))
        refine(loaded, [1])
        assert model.time_steps.next_number in loaded.time_steps.origin
        assert len({id(p) for p in loaded.parameters()}) == len(list(loaded.named_parameters(remove_duplicate=False)))


def test_a_number_is_not_used_again_after_loading(tmp_path: Path) -> None:
    model = network()
    refine(model, [4])
    prune(model, keep=range(4))
    assert (model.time_steps.origin, model.time_steps.next_number) == ((0, 1, 2, 3), 6)
    save_model(model, tmp_path)
    assert load_model(tmp_path).time_steps.next_number == 6
    assert load_model(tmp_path, host=network()).time_steps.next_number == 6


def test_a_refined_model_that_was_truncated(tmp_path: Path) -> None:
    model = cycles(network())
    truncate(model, 3)
    save_model(model, tmp_path)
    loaded = load_model(tmp_path)
    assert loaded.time_steps.grid == model.time_steps.grid
    assert torch.equal(loaded(batch()), model(batch()))


def test_a_manifest_from_before_there_was_refinement(tmp_path: Path) -> None:
    model = network()
    prune(model, keep=[0, 2])
    save_model(model, tmp_path)
    manifest = json.loads((tmp_path / "model.json").read_text())
    del manifest["time_steps"]["next_number"], manifest["time_steps"]["parents"]
    (tmp_path / "model.json").write_text(json.dumps(manifest))
    loaded = load_model(tmp_path)
    assert (loaded.time_steps.origin, loaded.time_steps.next_number) == ((0, 2), 3)
    assert load_model(tmp_path, host=network()).time_steps.next_number == 5


def own(neighbour: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(4, 4, dtype=DOUBLE), nn.Tanh())


def test_a_layer_of_ones_own_needs_a_host_that_has_it(tmp_path: Path) -> None:
    model = network()
    refine(model, [1], by="insert", layer=own)
    save_model(model, tmp_path)
    with pytest.raises(ValueError, match="host must be given"):
        load_model(tmp_path)
    with pytest.raises(ValueError, match="host"):
        load_model(tmp_path, host=network())
    host = network()
    refine(host, [1], by="insert", layer=own)
    assert torch.equal(load_model(tmp_path, host=host)(batch()), model(batch()))


def test_a_network_by_hand(tmp_path: Path) -> None:
    def make() -> TimeVariableNetwork:
        layers = [nn.Sequential(nn.Linear(3, 3), nn.Tanh()) for _ in range(4)]
        return TimeVariableNetwork(layers, nn.Linear(3, 2), Residual(), TimeSteps(4), stem=nn.Identity()).double()

    model = make()
    refine(model, [0, 2])
    prune(model, keep=[1, 2, 3, 5])
    save_model(model, tmp_path)
    loaded = load_model(tmp_path, host=make())
    assert loaded.time_steps.grid == model.time_steps.grid == Grid((4, 1, 2, 3), 6, {4: 0, 5: 2})
    assert torch.equal(loaded(batch()), model(batch()))


def test_a_host_that_was_changed_otherwise(tmp_path: Path) -> None:
    model = cycles(network())
    save_model(model, tmp_path)
    for keep in ([0, 1], [0, 2, 3]):
        host = network()
        prune(host, keep=keep)
        before = copy.deepcopy(host.state_dict())
        with pytest.raises(ValueError, match="host must have the layers"):
            load_model(tmp_path, host=host)
        assert_same_bits(dict(host.state_dict()), dict(before))
        assert host.time_steps.origin == tuple(keep)


@models
@pytest.mark.parametrize("lifted", [False, True])
@pytest.mark.parametrize("with_optimizer", [False, True])
def test_a_marked_state_dict(name: str, lifted: bool, with_optimizer: bool) -> None:
    make, inputs = MODELS[name]
    model, fresh = cycles(make()).eval(), make().eval()
    optimizer = torch.optim.Adam(fresh.parameters(), lr=0.1)
    if with_optimizer:
        follow_states(fresh, optimizer)
    state = dict(model.state_dict())
    mark_(model, state, lifted=lifted)
    fresh.load_state_dict(state)
    assert fresh.time_steps.grid == model.time_steps.grid
    assert torch.equal(fresh(inputs()), model(inputs()))
    if with_optimizer:
        held = [id(p) for group in optimizer.param_groups for p in group["params"]]
        assert held == [id(p) for p in fresh.parameters()]


@pytest.mark.parametrize(
    ("grid", "present", "expected"),
    [
        (Grid((0, 1, 2), 3, {}), (0, 1, 2), ([0, 1, 2], [0, 1, 2], [])),
        (Grid((0, 2), 3, {}), (0, 1, 2), ([0, 2], [0, 1], [])),
        (Grid((0, 3, 1, 2), 4, {3: 0}), (0, 1, 2), ([0, 1, 2], [0, 0, 1, 2], [1])),
        (Grid((3, 0, 2), 4, {3: 0}), (0, 1, 2), ([0, 2], [0, 0, 1], [0])),
        (Grid((3, 4, 2), 5, {3: 0, 4: 3}), (0, 1, 2), ([0, 2], [0, 0, 1], [1])),
        (Grid((3, 4, 2), 5, {3: 0, 4: 3}), (0, 3, 2), ([1, 2], [0, 0, 1], [1])),
    ],
)
def test_how_one_grid_is_made_from_another(grid: Grid, present: Any, expected: Any) -> None:
    assert grid.made_from(present) == expected
    assert Grid.from_plain(json.loads(json.dumps(grid.plain()))) == grid


@pytest.mark.parametrize(
    "grid",
    [Grid((0, 3), 4, {}), Grid((1, 0), 3, {}), Grid((0, 0), 3, {}), Grid((3, 0), 4, {3: 1}), Grid((3,), 4, {3: 4})],
)
def test_grids_that_cannot_be_made(grid: Grid) -> None:
    with pytest.raises(ValueError, match="origin must"):
        grid.made_from((0, 1, 2))
