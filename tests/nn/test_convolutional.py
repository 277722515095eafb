"""Pre-activation residual networks, against the same equations written with torch's functions."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from contract import Case, TimeVariableContract
from taulearn import load_model, prune, save_model
from taulearn.depth.truncate import truncate
from taulearn.nn import TimeVariableNetwork, resnet_v2

DOUBLE = torch.float64


def images(number: int = 5, channels: int = 1, size: int = 7, dtype: torch.dtype = DOUBLE) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(number, channels, size, size, generator=generator, dtype=dtype)


def small(blocks: Any = (2, 3), widths: Any = (2, 3), **options: Any) -> TimeVariableNetwork:
    torch.manual_seed(0)
    return resnet_v2(blocks, 4, 1, widths, **{"dtype": DOUBLE, "activation": "tanh"} | options)


def normal(y: Tensor, state: dict[str, Tensor], name: str, training: bool) -> Tensor:
    dims = (0, 2, 3)
    mean = y.mean(dims) if training else state[f"{name}.running_mean"]
    var = y.var(dims, correction=0) if training else state[f"{name}.running_var"]
    scale = state[f"{name}.weight"] / torch.sqrt(var + 1e-5)
    return (y - mean[:, None, None]) * scale[:, None, None] + state[f"{name}.bias"][:, None, None]


def by_hand(
    network: TimeVariableNetwork,
    x: Tensor,
    *,
    training: bool = False,
    sigma: Any = torch.tanh,
    depth: int | None = None,
) -> Tensor:
    """He et al. (2016), figure 4(e), with the steps in front of the blocks; from the state dict alone."""
    state, tau = network.state_dict(), network.time_steps.tau.tolist()
    stride = network.stem.convolution.stride
    y = F.conv2d(x, state["stem.convolution.weight"], stride=stride, padding=1)
    for l in range(len(tau)):
        skip = state.get(f"skips.maps.{l}.convolution.weight")
        step = 1 if skip is None or network.skips.maps[l].stride == 1 else 2
        if depth is None or l < depth:
            f = sigma(normal(y, state, f"layers.{l}.norm_1", training))
            f = F.conv2d(f, state[f"layers.{l}.convolution_1.weight"], stride=step, padding=1)
            f = sigma(normal(f, state, f"layers.{l}.norm_2", training))
            f = tau[l] * F.conv2d(f, state[f"layers.{l}.convolution_2.weight"], padding=1)
        else:
            f = torch.zeros(())
        y = (y if skip is None else F.conv2d(y, skip, stride=step)) + f
    y = sigma(normal(y, state, "head.norm", training))
    return y.mean((2, 3)) @ state["head.linear.weight"].T + state["head.linear.bias"]


def warmed(network: TimeVariableNetwork) -> TimeVariableNetwork:
    """In evaluation mode, with statistics that differ from those at the start, and scales and biases too."""
    with torch.no_grad():
        for _ in range(3):
            network(torch.randn(8, 1, 7, 7, dtype=DOUBLE))
        for name, p in network.named_parameters():
            if "norm" in name:
                p += 0.3 * torch.randn_like(p)
    return network.eval()


class TestReference:
    @pytest.mark.parametrize("size", [7, 8], ids=str)
    @pytest.mark.parametrize(
        "options", [{}, {"widths": 3}, {"stem_stride": 2}, {"init": [1.0, 0.5, -1.0, 2.0, 0.25]}], ids=str
    )
    def test_outputs(self, options: dict[str, Any], size: int) -> None:
        network, x = warmed(small(**options)), images(size=size)
        torch.testing.assert_close(network(x), by_hand(network, x), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(network.train()(x), by_hand(network, x, training=True), rtol=1e-10, atol=1e-10)

    def test_relu(self) -> None:
        network, x = warmed(small(activation="relu")), images()
        torch.testing.assert_close(network(x), by_hand(network, x, sigma=torch.relu), rtol=1e-12, atol=1e-12)

    def test_steps_are_one_at_the_start(self) -> None:
        assert small().time_steps.tau.tolist() == [1.0] * 5
        assert small().time_steps.horizon == 5.0
        assert small(horizon=1.0).time_steps.tau.tolist() == [0.2] * 5

    @pytest.mark.parametrize(
        ("blocks", "depth", "millions"), [((3, 3, 3), 20, 0.27), ((9, 9, 9), 56, 0.85), ((18, 18, 18), 110, 1.7)]
    )
    def test_the_published_sizes(self, blocks: tuple[int, ...], depth: int, millions: float) -> None:
        """He et al. (2016), Deep residual learning, table 6: ResNet-20, -56 and -110."""
        network = resnet_v2(blocks, 10, constraint="fixed")
        convolutions = sum(isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3) for m in network.modules())
        assert convolutions + 1 == depth
        assert round(sum(p.numel() for p in network.parameters()) / 1e6, 2) == pytest.approx(millions, abs=0.04)

    def test_counts_in_closed_form(self) -> None:
        blocks, widths, expected = (2, 1, 3), (4, 6, 5), 9 * 3 * 4  # the stem
        n = widths[0]
        for s, (count, m) in enumerate(zip(blocks, widths, strict=True)):
            for b in range(count):
                expected += 9 * n * m + 9 * m * m + 2 * n + 2 * m + (n * m if s and b == 0 else 0)
                n = m
        expected += 2 * n + n * 7 + 7
        network = resnet_v2(blocks, 7, 3, widths, constraint="fixed")
        assert sum(p.numel() for p in network.parameters()) == expected

    def test_initial_weights(self) -> None:
        torch.manual_seed(0)
        network = resnet_v2((1, 2), 10, 3, (64, 128))
        for name, p in network.named_parameters():
            if "convolution" in name:
                deviation = math.sqrt(2 / (p.shape[0] * p.shape[2] * p.shape[3]))
                assert float(p.detach().std()) == pytest.approx(deviation, rel=0.05), name
                assert abs(float(p.detach().mean())) < 4 * deviation / math.sqrt(p.numel()), name
            elif "norm" in name:
                assert p.unique().tolist() == [1.0 if name.endswith("weight") else 0.0]
        assert not network.head.linear.bias.any()


class TestConstruction:
    def test_stages_start_with_a_map(self) -> None:
        network = small((2, 1, 2), (2, 3, 4))
        assert sorted(network.fixed_layers()) == [2, 3]
        shapes = [tuple(y.shape[1:]) for y in network.states(images(), initial=True)]
        assert shapes == [(2, 7, 7)] * 3 + [(3, 4, 4), (4, 2, 2), (4, 2, 2)]

    def test_constant_width(self) -> None:
        network = small(5, 3)
        assert network.fixed_layers() == {}
        assert len({y.shape for y in network.states(images(), initial=True)}) == 1
        assert small((2, 3), 3).time_steps.num_steps == 5

    def test_inputs_of_another_floating_point_type_under_autocast(self) -> None:
        with torch.autocast("cpu", torch.bfloat16):
            assert small(dtype=torch.float32)(images(dtype=torch.bfloat16)).dtype == torch.bfloat16

    def test_integers_of_numpy(self) -> None:
        network = resnet_v2(np.int64(2), 10, 3, np.int64(4))  # type: ignore[arg-type]
        assert (len(network.layers), network.fixed_layers()) == (2, {})


class TestIntermediateOutputs:
    """The tests of the pages on all networks, and what is particular to normalisation and stages."""

    @pytest.mark.parametrize("options", [{}, {"widths": 3}, {"blocks": (2, 1, 2), "widths": (2, 3, 4)}], ids=str)
    def test_are_the_networks_with_zero_steps(self, options: dict[str, Any]) -> None:
        network, x = warmed(small(**options)), images()
        found = network.intermediate_outputs(x)
        assert list(found) == [0, 1, 2, 3, 4, 5]
        for k, output in found.items():
            torch.testing.assert_close(output, by_hand(network, x, depth=k), rtol=1e-12, atol=1e-12)
        for k in reversed(range(6)):
            with torch.no_grad():
                network.time_steps.values[k:] = 0.0
            torch.testing.assert_close(found[k], network(x), rtol=1e-12, atol=1e-12)

    @pytest.mark.parametrize("widths", [3, (2, 3)], ids=str)
    def test_of_an_empty_batch(self, widths: Any) -> None:
        found = small(widths=widths).eval().intermediate_outputs(images(0))
        assert {k: tuple(y.shape) for k, y in found.items()} == dict.fromkeys(range(6), (0, 4))

    def test_a_head_without_running_statistics(self) -> None:
        """By those of the batch in evaluation mode too, each state by its own."""
        network, x = small(), images()
        network.head.norm = nn.BatchNorm2d(3, track_running_stats=False, dtype=DOUBLE)
        found = network.eval().intermediate_outputs(x)
        for k in reversed(range(6)):
            with torch.no_grad():
                network.time_steps.values[k:] = 0.0
            torch.testing.assert_close(found[k], network(x), rtol=1e-10, atol=1e-10)

    def test_in_training_each_state_has_its_own_statistics(self) -> None:
        network, x = small((2, 1, 2), (2, 3, 4)), images()
        for k, output in network.intermediate_outputs(x).items():
            state = network.state_dict()
            y = network.states(x, initial=True)[k]
            for l in range(k, 5):
                y = network.skips.carry(y, l, l + 1)
            y = torch.tanh(normal(y, state, "head.norm", True)).mean((2, 3))
            expected = y @ state["head.linear.weight"].T + state["head.linear.bias"]
            torch.testing.assert_close(output, expected, rtol=1e-10, atol=1e-10)

    def test_only_the_final_state_enters_the_running_statistics(self) -> None:
        network, twin, x = small(), small(), images()
        network.intermediate_outputs(x)
        twin(x)
        for (name, ours), theirs in zip(network.state_dict().items(), twin.state_dict().values(), strict=True):
            assert torch.equal(ours, theirs), name
        before = {name: value.clone() for name, value in network.state_dict().items()}
        network.intermediate_outputs(x, states=twin.states(x, initial=True), final=False)
        assert all(torch.equal(before[name], value) for name, value in network.state_dict().items())

    @pytest.mark.parametrize("device", ["cpu", "other"])
    def test_gradients(self, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
        """Both ways of normalising several states, the one for accelerators tried on the CPU."""
        network, x = small((1, 1), (2, 3)), images(3, size=4)
        last = network.states(x)[-1].detach()
        rows = [last + shift for shift in (0.0, 0.5, torch.randn_like(last))]
        if device == "other":
            monkeypatch.setattr(type(network.head), "_by_state", lambda self, rows: False)

        def outputs(*values: Tensor) -> Tensor:
            return torch.stack(network.head.each(values))

        expected = torch.stack([network.head(y) for y in rows])
        torch.testing.assert_close(outputs(*rows), expected, rtol=1e-10, atol=1e-10)
        assert torch.autograd.gradcheck(outputs, tuple(y.requires_grad_() for y in rows))


class TestShrinking:
    def test_blocks_within_a_stage_are_deleted_exactly(self) -> None:
        network, x = warmed(small((2, 3), (2, 3))), images()
        with torch.no_grad():
            network.time_steps.values[[1, 3]] = 0.0
        expected = network(x)
        report = prune(network)
        assert sorted(d.layer for d in report.deleted) == [1, 3]
        assert torch.equal(network(x), expected)
        with pytest.raises(ValueError, match="the skip past it is not the identity"):
            prune(network, keep=[0, 2])

    @pytest.mark.parametrize("change", ["none", "prune", "truncate", "truncate twice"])
    def test_saving(self, change: str, tmp_path: Any) -> None:
        network, x = warmed(small((2, 1, 2), (2, 3, 4), activation="relu")), images()
        if change == "prune":
            prune(network, keep=[0, 2, 3])
        if "truncate" in change:
            truncate(network, 3)
        if change == "truncate twice":
            truncate(network, 1)
        save_model(network, tmp_path)
        assert torch.equal(load_model(tmp_path).eval()(x), network(x))

    def test_unusual_normalisation_needs_a_host(self, tmp_path: Any) -> None:
        network = small()
        network.layers[1].norm_2.eps = 1e-3
        save_model(network, tmp_path)
        with pytest.raises(ValueError, match=r"layers\.1\.norm_2\.eps must .*got 0\.001"):
            load_model(tmp_path)


def build(constraint: str) -> TimeVariableNetwork:
    return resnet_v2((2, 3), 2, 1, (2, 3), activation="tanh", constraint=constraint, dtype=DOUBLE).eval()


class TestContract(TimeVariableContract):
    @pytest.fixture
    def case(self) -> Case:
        return Case("resnet_v2", build, lambda: images(3, size=4), lambda model, x: by_hand(model, x).detach().numpy())

    @pytest.mark.parametrize("constraint", ["free"])
    def test_gradcheck_of_all_parameters(self, case: Case, constraint: str) -> None:
        super().test_gradcheck_of_all_parameters(case, constraint)
