"""Training wrapped models, by fit and by hand."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from taulearn import Pruning, fit, load_model, parameter_groups, prune, wrap
from taulearn.optim import register_projection
from taulearn.penalties import L1
from taulearn.wrapping import anneal_to_one
from wrapping.hosts import BY_NAME, Block, evaluated, images, vit


def spiral(n: int = 96) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, 2, generator=generator)
    return x, (x[:, 0] * x[:, 1] > 0).long()


def blocks() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, 8), *(Block(8) for _ in range(5)), nn.Linear(8, 2))


def trained(**options: Any) -> tuple[nn.Module, Any]:
    model = wrap(blocks(), example_inputs=torch.ones(1, 2), init=[1.0, 0.02, 1.0, 0.015, 1.0])
    optimizer = torch.optim.SGD(parameter_groups(model, lr=0.05, tau_lr=0.05), momentum=0.9)
    torch.manual_seed(1)
    history = fit(
        model,
        spiral(),
        loss=nn.functional.cross_entropy,
        optimizer=optimizer,
        epochs=6,
        batch_size=16,
        penalties=[L1(0.05, proximal=True)],
        pruning=Pruning(0.01),
        progress=False,
        **options,
    )
    return model, history


def test_fit_trains_and_prunes(tmp_path: Path) -> None:
    model, history = trained(validation=spiral(), run=tmp_path / "run")
    assert 0 < len(history.deletions) < 5
    assert {d.layer for d in history.deletions} <= {1, 3}
    assert history.epochs["validation.accuracy"][-1] > 0.6
    assert history.epochs["layers"][-1] == model.time_steps.num_steps == 5 - len(history.deletions)
    x, _ = spiral()
    loaded = load_model(tmp_path / "run", host=blocks())
    assert torch.equal(evaluated(loaded, x), evaluated(model, x))


@pytest.mark.long
def test_fit_compiled_gives_what_eager_gives(recwarn: pytest.WarningsRecorder) -> None:
    found = []
    for mode in ("always", "never"):
        model = wrap(blocks().eval(), example_inputs=torch.ones(1, 2), init=[1.0, 0.001, 1.0, 0.5, 1.0])
        optimizer = torch.optim.AdamW(parameter_groups(model, lr=0.01, tau_lr=1e-4))
        torch.manual_seed(1)
        history = fit(
            model,
            spiral(),
            loss=lambda output, target: nn.functional.cross_entropy(output, target),
            optimizer=optimizer,
            epochs=2,
            batch_size=32,
            pruning=Pruning(0.01),
            compile=mode,
            progress=False,
        )
        assert [d.layer for d in history.deletions] == [1]
        found.append(history.iterations["loss"])
    assert not [w for w in recwarn if "uncompiled" in str(w.message)]
    assert found[0] == pytest.approx(found[1], rel=1e-4)


def test_fit_goes_on_from_a_checkpoint(tmp_path: Path) -> None:
    class Stop(Exception):
        pass

    def stop(end: Any) -> None:
        if end.epoch == 4:
            raise Stop

    whole, history = trained()
    with pytest.raises(Stop):
        trained(run=tmp_path / "run", callbacks=[stop])
    resumed, _ = trained(run=tmp_path / "run", resume=True)
    assert history.deletions
    assert resumed.time_steps.origin == whole.time_steps.origin
    x, _ = spiral()
    torch.testing.assert_close(evaluated(resumed, x), evaluated(whole, x))


def test_a_model_of_transformers_in_fit() -> None:
    torch.manual_seed(0)
    model = wrap(vit(), example_inputs=images(8)())
    x = torch.rand(24, 1, 8, 8)
    with torch.no_grad():
        model.time_steps.values[1] = 0.0
    history = fit(
        model,
        (x, torch.arange(24) % 3),
        loss=lambda output, target: nn.functional.cross_entropy(output.logits, target),
        optimizer=torch.optim.AdamW(parameter_groups(model, lr=1e-3, tau_lr=1e-4)),
        epochs=2,
        batch_size=12,
        pruning=Pruning(0.02),
        progress=False,
    )
    assert [d.layer for d in history.deletions] == [1]
    assert model.config.num_hidden_layers == 3


def test_a_loop_of_ones_own_with_annealing() -> None:
    host = BY_NAME["encoder"]
    model = host.wrapped(init=[1.0, 0.6, 0.0, 1.2])
    optimizer = torch.optim.AdamW(parameter_groups(model, lr=1e-3))
    register_projection(optimizer, model)
    prune(model, optimizer=optimizer)
    epochs = 3
    distance = []
    for epoch in range(epochs):
        optimizer.zero_grad()
        model(host.inputs()).square().mean().backward()
        optimizer.step()
        anneal_to_one(model, 1 / (epochs - epoch))
        distance.append(float((model.time_steps.tau.detach() - 1).abs().max()))
    assert distance == sorted(distance, reverse=True)
    assert torch.equal(model.time_steps.tau.detach(), torch.ones(3))
