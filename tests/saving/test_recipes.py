"""Networks are saved as the call of their builder, unless they were changed since; files of format 1 still load."""

import copy
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from taulearn import load_model, prune, save_model, truncate, wrap
from taulearn.nn import (
    ComposedSkips,
    Dense,
    IdentitySkips,
    Residual,
    TimeSteps,
    TimeVariableNetwork,
    densenet,
    feedforward,
    fractional_dnn,
    resnet,
    resnet_v2,
)
from taulearn.nn.builders import FullyConnected
from taulearn.saving.recipe import _SHAPES

STORED = Path(__file__).parent / "stored"


def pruned(network: TimeVariableNetwork, *keep: int) -> TimeVariableNetwork:
    prune(network, keep=keep)
    return network


def cut(network: TimeVariableNetwork, depth: int) -> TimeVariableNetwork:
    truncate(network, depth)
    return network


def model_in(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "model.json").read_text())["model"]
    return found


def assert_equal(loaded: TimeVariableNetwork, network: TimeVariableNetwork, x: torch.Tensor) -> None:
    assert torch.equal(loaded.eval()(x), network.eval()(x))
    assert repr(loaded) == repr(network)
    assert loaded.fixed_layers() == network.fixed_layers()


MIXED = [4, 4, 2, 5]
BUILT: dict[str, Callable[[], TimeVariableNetwork]] = {
    "feedforward": lambda: feedforward(3, 4, 2, 3),
    "feedforward cut": lambda: cut(feedforward(3, MIXED, 2, 4), 2),
    "resnet": lambda: resnet(3, 4, 2, 3, init=[0.5, 1.25, 0.25], constraint="simplex", horizon=2.0, lower_bound=0.125),
    "resnet dependent": lambda: pruned(resnet(3, 4, 2, 4, constraint="dependent", lower_bound=0.25), 0, 3),
    "resnet half": lambda: resnet(3, 4, 2, 3).bfloat16(),
    "resnet pruned, cut, pruned": lambda: pruned(
        cut(pruned(resnet(3, [4, 4, 4, 4, 2, 2], 2, 6), 0, 2, 3, 4, 5), 3), 0, 2
    ),
    "densenet": lambda: densenet(3, MIXED, 2, 4, skips="learned"),
    "densenet cut": lambda: cut(densenet(3, MIXED, 2, 4, skips="learned", activation="prelu"), 2),
    "fractional_dnn": lambda: pruned(fractional_dnn(3, 4, 2, 4, gamma=0.3, memory_from=0, memory="exact"), 0, 3),
    "resnet_v2": lambda: pruned(resnet_v2(2, 3, 1, (2, 3, 3), activation=nn.ELU(0.5), stem_stride=2), 2, 4, 5),
    "resnet_v2 cut": lambda: cut(resnet_v2((1, 2), 3, 1, (2, 3)), 1),
    "resnet_v2 of constant width": lambda: pruned(resnet_v2(3, 3, 1, 2), 1),
}


def inputs(network: TimeVariableNetwork) -> torch.Tensor:
    shape = (2, 1, 8, 8) if "resnet_v2" in str(network.recipe) else (2, 3)
    return torch.linspace(-1.0, 1.0, torch.Size(shape).numel()).view(shape).to(network.time_steps.values.dtype)


@pytest.mark.parametrize("name", BUILT)
def test_a_network_from_a_builder_is_saved_as_its_call(name: str, tmp_path: Path) -> None:
    network = BUILT[name]()
    save_model(network, tmp_path)
    assert model_in(tmp_path)["builder"] == name.split()[0]
    loaded = load_model(tmp_path)
    assert_equal(loaded, network, inputs(network))
    save_model(loaded, tmp_path / "again")
    assert model_in(tmp_path / "again") == model_in(tmp_path)


def test_the_call_can_be_made_as_it_stands(tmp_path: Path) -> None:
    save_model(resnet_v2((1, 2), 3, 1, (2, 3), activation="tanh"), tmp_path)
    again = resnet_v2(**model_in(tmp_path)["keywords"])
    assert_equal(load_model(tmp_path, host=again), again, torch.ones(1, 1, 8, 8))


def with_bias(network: TimeVariableNetwork) -> None:
    network.head = nn.Linear(4, 2)


def other_activation(network: TimeVariableNetwork) -> None:
    network.layers[1].activation = nn.LeakyReLU(0.25)


def other_option(network: TimeVariableNetwork) -> None:
    network.layers[1].activation.negative_slope = 0.5


def other_skips(network: TimeVariableNetwork) -> None:
    network.skips = ComposedSkips([None, None, nn.Linear(4, 4)])


def other_layer(network: TimeVariableNetwork) -> None:
    network.layers[2] = FullyConnected(4, 4, "tanh")


def another_origin(network: TimeVariableNetwork) -> None:
    network.time_steps.origin = (0, 1, 7)


def kept_input(network: TimeVariableNetwork) -> None:
    network.skips.from_input = True


BY_HAND = [with_bias, other_activation, other_option, other_skips, other_layer, another_origin, kept_input]


@pytest.mark.parametrize("change", BY_HAND)
def test_a_network_changed_by_hand_is_not_saved_as_its_builders(
    change: Callable[[TimeVariableNetwork], None], tmp_path: Path
) -> None:
    network = resnet(4, 4, 2, 3, activation=nn.LeakyReLU(0.125))
    change(network)
    save_model(network, tmp_path)
    assert model_in(tmp_path)["builder"] == "TimeVariableNetwork"
    assert_equal(load_model(tmp_path), network, torch.linspace(-1.0, 1.0, 8).view(2, 4))


def own_layer(network: TimeVariableNetwork) -> None:
    network.layers[1] = nn.Sequential(nn.Linear(4, 4), nn.Tanh())


def dropout(network: TimeVariableNetwork) -> None:
    network.head = nn.Sequential(nn.Dropout(), network.head)


def other_norm(network: TimeVariableNetwork) -> None:
    network.layers[1].norm_2.eps = 0.5


def no_norm(network: TimeVariableNetwork) -> None:
    network.layers[1].norm_1 = nn.Identity()


def parametrized(network: TimeVariableNetwork) -> None:
    torch.nn.utils.parametrizations.weight_norm(network.layers[1].linear)


def two_types(network: TimeVariableNetwork) -> None:
    network.head.double()


@pytest.mark.parametrize(
    ("make", "change", "message"),
    [
        (lambda: resnet(4, 4, 2, 3), own_layer, "layers.1.1 is a Tanh"),
        (lambda: resnet(4, 4, 2, 3), dropout, "head.0 is a Dropout"),
        (lambda: resnet(4, 4, 2, 3), parametrized, "layers.1.linear must be a Linear, got a Parametrized"),
        (lambda: resnet(4, 4, 2, 3), two_types, "head.weight must be .float32 .* got .float64"),
        (lambda: resnet_v2(2, 2, 1, 3), other_norm, "layers.1.norm_2.eps must be 1e-05, got 0.5"),
        (lambda: resnet_v2(2, 2, 1, 3), no_norm, "layers.1.norm_1 must be a BatchNorm2d, got a Identity"),
    ],
)
def test_a_network_that_no_recipe_gives_needs_a_host(
    make: Callable[[], TimeVariableNetwork],
    change: Callable[[TimeVariableNetwork], None],
    message: str,
    tmp_path: Path,
) -> None:
    network, host = make(), make()
    change(network)
    change(host)
    save_model(network, tmp_path)
    with pytest.raises(ValueError, match=f"host must be given .*{message}"):
        load_model(tmp_path)
    assert load_model(tmp_path, host) is host
    assert all(torch.equal(a, b) for a, b in zip(host.parameters(), network.parameters(), strict=True))


def test_a_network_put_together_of_known_parts_needs_no_host(tmp_path: Path) -> None:
    layers = [FullyConnected(3, 3, sigma) for sigma in ("tanh", nn.ELU(0.5), "relu")]
    network = TimeVariableNetwork(
        layers, nn.Identity(), Residual(), TimeSteps(3, constraint="fixed"), stem=nn.Identity()
    )
    prune(network, keep=[0, 2])
    save_model(network, tmp_path)
    loaded = load_model(tmp_path)
    assert_equal(loaded, network, torch.ones(2, 3))
    prune(loaded, keep=[1])
    save_model(loaded, tmp_path)
    assert load_model(tmp_path).time_steps.origin == (2,)


def test_a_deep_copy_keeps_its_recipe(tmp_path: Path) -> None:
    network = copy.deepcopy(resnet(3, 4, 2, 3, activation=nn.PReLU()))
    save_model(network, tmp_path)
    assert model_in(tmp_path)["builder"] == "resnet"
    assert [name for name, _ in network.named_parameters()] == [*load_model(tmp_path).state_dict()]


def hand_made() -> TimeVariableNetwork:
    layers = [FullyConnected(3, 3, a) for a in ("tanh", "relu", nn.ELU(0.5))]
    steps = TimeSteps(3, constraint="fixed")
    return TimeVariableNetwork(layers, nn.Identity(), Residual(), steps, stem=nn.Identity())


def fractional() -> TimeVariableNetwork:
    options = {"gamma": 0.7, "memory_from": 0, "memory": "exact", "skips": "learned", "activation": "prelu"}
    return fractional_dnn(3, [4, 4, 4, 2, 2], 1, 5, **options)


def leaky() -> TimeVariableNetwork:
    options: dict[str, Any] = {"constraint": "simplex", "lower_bound": 0.125, "horizon": 2.0, "dtype": torch.float64}
    return resnet(3, 4, 2, 3, activation=nn.LeakyReLU(0.2), **options)


FORMAT_1: dict[str, Callable[[], TimeVariableNetwork]] = {
    "resnet": leaky,
    "fractional_pruned": lambda: pruned(fractional(), 0, 2, 3),
    "densenet_cut": lambda: cut(densenet(3, [4, 4, 2, 5], 2, 4), 2),
    "resnet_v2_pruned": lambda: pruned(
        resnet_v2((2, 2), 3, in_channels=1, widths=(2, 3), stem_stride=2, activation="tanh"), 1, 2
    ),
    "assembled": lambda: pruned(hand_made(), 0, 2),
}
"""Files saved by the version that wrote format 1, with other weights."""


@pytest.mark.parametrize("name", FORMAT_1)
def test_networks_saved_in_format_1_still_load(name: str, tmp_path: Path) -> None:
    assert json.loads((STORED / name / "model.json").read_text())["format"] == 1
    network, host = FORMAT_1[name](), FORMAT_1[name]()
    network.load_state_dict(load_file(STORED / name / "model.safetensors"))
    for loaded in (load_model(STORED / name), load_model(STORED / name, host=host)):
        assert_equal(loaded, network, inputs(network))
        save_model(loaded, tmp_path)
        assert_equal(load_model(tmp_path), network, inputs(network))


def test_other_models_saved_in_format_1_still_load(tmp_path: Path) -> None:
    def network() -> TimeVariableNetwork:
        layers = [nn.Linear(3, 3) for _ in range(2)]
        return TimeVariableNetwork(layers, nn.Identity(), Dense(), TimeSteps(2), IdentitySkips(2, from_input=True))

    with pytest.raises(ValueError, match=r"host must be given .*layers.0 is a Linear"):
        load_model(STORED / "own_layers")
    state = load_file(STORED / "own_layers" / "model.safetensors")
    assert torch.equal(load_model(STORED / "own_layers", host=network()).layers[1].weight, state["layers.1.weight"])

    def host() -> nn.Module:
        blocks = (nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(3))
        return nn.Sequential(nn.Linear(2, 4), *blocks, nn.Linear(4, 1))

    with pytest.raises(ValueError, match=r"host must be given .*it is a wrapped model"):
        load_model(STORED / "wrapped")
    wrapped = wrap(host(), ["1", "2", "3"])
    prune(wrapped, keep=[0, 2])
    state = load_file(STORED / "wrapped" / "model.safetensors")
    wrapped.load_state_dict({name: value.squeeze(0) for name, value in state.items()})
    shutil.copytree(STORED / "wrapped", tmp_path / "older")
    manifest = json.loads((tmp_path / "older" / "model.json").read_text())
    del manifest["model"]["states"]  # which the first files had not
    (tmp_path / "older" / "model.json").write_text(json.dumps(manifest))
    for folder in (STORED / "wrapped", tmp_path / "older"):
        assert torch.equal(load_model(folder, host=host())(torch.ones(1, 2)), wrapped(torch.ones(1, 2)))


def test_saving_asks_for_torch_and_safetensors_alone() -> None:
    program = (
        "import sys, torch, safetensors.torch; before = set(sys.modules); import taulearn.saving;"
        "print(*set(sys.modules) - before)"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert not {name.partition(".")[0] for name in run.stdout.split()} & {"pydantic", "pydantic_core", "tyro", "rich"}


def test_a_network_deeper_than_a_few_bytes_may_ask_for_is_saved_by_its_parts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(_SHAPES, "hidden_layers", range(1, 5))
    network = resnet(3, 4, 2, 5)
    save_model(network, tmp_path)
    assert model_in(tmp_path)["builder"] == "TimeVariableNetwork"
    assert_equal(load_model(tmp_path), network, torch.ones(2, 3))


def test_a_model_of_ones_own_may_have_another_recipe(tmp_path: Path) -> None:
    class Cake(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.recipe, self.scheme, self.time_steps = "flour, eggs", Residual(), TimeSteps(2)

    cake = Cake()
    save_model(cake, tmp_path)
    assert model_in(tmp_path) == {
        "kind": "host",
        "saved_from": Cake.__qualname__,
        "because": "the model is a Cake",
        "modules": {"the model": "Cake", "scheme": "Residual"},
    }
