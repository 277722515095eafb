"""Distillation in the callbacks for Trainer and Lightning, against plain loops of torch."""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import taulearn
from taulearn.penalties import Distillation

STEPS = 3


def term(logits: Tensor, teachers: Tensor, temperature: float) -> Tensor:
    p, q = ((each / temperature).log_softmax(-1) for each in (teachers, logits))
    return temperature**2 * F.kl_div(q, p, log_target=True, reduction="batchmean")


class TestTrainer:
    def pair(self) -> tuple[Any, Any]:
        runs = pytest.importorskip("integrations.huggingface_runs")
        model, teacher = runs.vit(), runs.vit()
        with torch.no_grad():
            for p in teacher.parameters():
                p.add_(0.2 * torch.randn_like(p))
        return model, teacher

    @pytest.mark.parametrize("accumulate", [1, 2])
    def test_it_is_a_plain_loop(self, accumulate: int, tmp_path: Path) -> None:
        model, teacher = self.pair()
        from integrations.huggingface_runs import BATCH, Items, TimeStepsCallback, trainer

        plain, before = copy.deepcopy(model), copy.deepcopy(teacher.state_dict())
        callback = TimeStepsCallback(Distillation(teacher, 0.5, 2.0, hidden=0.2), progress=False)
        options = {"max_steps": STEPS, "gradient_accumulation_steps": accumulate, "max_grad_norm": 0.0}
        options |= {"lr_scheduler_type": "constant", "data_seed": 0}
        training = trainer(model, callback, tmp_path, optimizer=torch.optim.SGD(model.parameters(), 0.05), **options)
        order: list[Tensor] = []
        model.register_forward_pre_hook(lambda _, __, given: order.append(given["pixel_values"]), with_kwargs=True)
        training.train()
        pixels = [x for i, x in enumerate(order) if i % 2 == 0]  # the states cost a second forward pass
        labels = {
            items["pixel_values"].numpy().tobytes(): items["labels"] for items in (Items()[i] for i in range(200))
        }
        optimizer, found = torch.optim.SGD(plain.parameters(), 0.05), []
        for step in range(STEPS):
            optimizer.zero_grad()
            for x in pixels[step * accumulate : (step + 1) * accumulate]:
                z = torch.stack([labels[each.numpy().tobytes()] for each in x])
                with torch.no_grad():
                    teacher.eval()
                    t, its = taulearn.depth.states.forward_with_states(teacher, x)
                y, own = taulearn.depth.states.forward_with_states(plain, x)
                states = torch.stack([(a - b).square().mean() for a, b in zip(own[1:], its[1:], strict=True)]).mean()
                added = 0.5 * term(y.logits, t.logits, 2.0) + 0.2 * states
                found.append((F.cross_entropy(y.logits, z), added))
                ((found[-1][0] + added) / accumulate).backward()
            optimizer.step()
        history = callback.history
        for name, i in (("loss", 0), ("penalty.distillation", 1)):
            means = np.array([each[i].item() for each in found]).reshape(STEPS, accumulate).mean(1)
            np.testing.assert_allclose(history.iterations[name], means, rtol=1e-4)
        torch.testing.assert_close(model.state_dict(), plain.state_dict(), rtol=1e-4, atol=1e-5)
        assert len(pixels) == STEPS * accumulate
        assert len(pixels[0]) == BATCH
        assert all(torch.equal(tensor, before[name]) for name, tensor in teacher.state_dict().items())
        assert not model._forward_hooks

    @pytest.mark.long
    def test_the_last_batches_of_an_epoch_that_accumulate_are_a_mean_too(self, tmp_path: Path) -> None:
        transformers = pytest.importorskip("transformers")
        from integrations.huggingface_runs import TimeStepsCallback
        from wrapping.hosts import BY_NAME, gpt2

        torch.manual_seed(0)
        model, teacher, size = BY_NAME["gpt2"].wrapped(), gpt2(), 2
        for each in model.modules():
            if isinstance(each, nn.Dropout):
                each.p = 0.0
        plain, rows, order = copy.deepcopy(model), torch.randint(3, 40, (6, 5)), list[Tensor]()
        model.register_forward_pre_hook(lambda _, __, given: order.append(given["input_ids"]), with_kwargs=True)
        options = {"per_device_train_batch_size": size, "gradient_accumulation_steps": 2, "num_train_epochs": 2}
        options |= {"report_to": [], "use_cpu": True, "disable_tqdm": True, "save_strategy": "no"}
        callback = TimeStepsCallback(Distillation(teacher, 0.5, 2.0), progress=False)
        arguments = transformers.TrainingArguments(
            str(tmp_path), max_grad_norm=0.0, lr_scheduler_type="constant", **options
        )
        sgd = torch.optim.SGD(model.parameters(), 0.05), None
        # some versions of Trainer count the first label, which the model's loss leaves out
        data = [{"input_ids": row, "labels": torch.cat([torch.tensor([-100]), row[1:]])} for row in rows]
        transformers.Trainer(model, arguments, train_dataset=data, callbacks=[callback], optimizers=sgd).train()
        optimizer, teacher = torch.optim.SGD(plain.parameters(), 0.05), teacher.eval()
        found, left = [], list(order)
        for number in (2, 1, 2, 1):  # three batches an epoch
            optimizer.zero_grad()
            parts, left = left[:number], left[number:]
            losses = []
            for x in parts:
                y = plain(input_ids=x)
                loss = F.cross_entropy(y.logits[:, :-1].flatten(0, 1), x[:, 1:].flatten())
                with torch.no_grad():
                    t = teacher(input_ids=x).logits
                losses.append((loss, 0.5 * term(y.logits[:, :-1].flatten(0, 1), t[:, :-1].flatten(0, 1), 2.0)))
            means = [sum(each) / number for each in zip(*losses, strict=True)]
            sum(means).backward()
            optimizer.step()
            found.append([each.item() for each in means])
        assert not left
        for name, expected in zip(("loss", "penalty.distillation"), zip(*found, strict=True), strict=True):
            np.testing.assert_allclose(callback.history.iterations[name], expected, rtol=1e-4)
        torch.testing.assert_close(model.state_dict(), plain.state_dict(), rtol=1e-4, atol=1e-5)

    def test_a_model_that_returns_no_loss_is_refused(self, tmp_path: Path) -> None:
        model, teacher = self.pair()
        from integrations.huggingface_runs import TimeStepsCallback, trainer

        callback = TimeStepsCallback(Distillation(teacher, 0.5), progress=False)
        training = trainer(model, callback, tmp_path, max_steps=1)
        training.compute_loss = lambda model, inputs, **_: model(inputs["pixel_values"]).logits.square().mean()
        with pytest.raises(ValueError, match=r"forward must return the loss with 'distillation'.*NoneType"):
            training.train()

    def test_evaluation_and_later_passes_are_left_alone(self, tmp_path: Path) -> None:
        model, teacher = self.pair()
        from integrations.huggingface_runs import Items, TimeStepsCallback, trainer

        callback = TimeStepsCallback(Distillation(teacher, 0.5), progress=False)
        options = {"compute_metrics": lambda _: {}, "eval_strategy": "steps", "eval_steps": 1}
        training = trainer(model, callback, tmp_path, max_steps=2, **options)
        training.train()
        found = training.evaluate()["eval_loss"]
        x, z = torch.stack([Items()[i]["pixel_values"] for i in range(20)]), taulearn.data.load("digits").targets[:20]
        model.eval()
        assert found == pytest.approx(F.cross_entropy(model(x).logits, z).item(), rel=1e-5)


class TestLightning:
    @pytest.mark.parametrize("training", [True, False], ids=["training", "as from_pretrained leaves it"])
    @pytest.mark.parametrize("kind", ["Built", "Itself"])
    def test_it_is_a_plain_loop(self, kind: str, training: bool) -> None:
        runs = pytest.importorskip("integrations.lightning_runs")
        module = getattr(runs, kind)().train(training)  # Lightning trains a module in the mode that it finds
        module.configure_optimizers = lambda: torch.optim.SGD(module.parameters(), 0.05)
        plain, teacher = copy.deepcopy(module), nn.Linear(6, 3)
        callback = runs.TimeStepsCallback(Distillation(teacher, 0.5, 2.0), progress=False)
        runs.trainer(callback, max_epochs=1).fit(module, runs.batches())
        optimizer, found = torch.optim.SGD(plain.parameters(), 0.05), []
        for x, z in runs.batches():
            optimizer.zero_grad()
            y = plain(x)
            found.append((F.cross_entropy(y, z), 0.5 * term(y, teacher(x).detach(), 2.0)))
            sum(found[-1]).backward()
            optimizer.step()
        for name, i in (("loss", 0), ("penalty.distillation", 1)):
            expected = [each[i].item() for each in found]
            np.testing.assert_allclose(callback.history.iterations[name], expected, rtol=1e-5)
        ours, theirs = runs.tensors(module), runs.tensors(plain)
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
        assert "training_step" not in vars(module)

    def test_a_step_that_returns_no_loss_is_refused(self) -> None:
        runs = pytest.importorskip("integrations.lightning_runs")
        module = runs.Built()
        module.training_step = lambda batch, index: None
        callback = runs.TimeStepsCallback(Distillation(nn.Linear(6, 3), 0.5), progress=False)
        with pytest.raises(ValueError, match=r"training_step must return the loss with 'distillation'"):
            runs.trainer(callback, max_epochs=1).fit(module, runs.batches())
