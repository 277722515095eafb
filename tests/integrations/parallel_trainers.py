"""One process of a training with Trainer, Lightning or accelerate: -m integrations.parallel_trainers FOLDER NAME ..

It leaves the steps of each iteration and all tensors of the model in FOLDER/NAME/RANK.safetensors.
"""

import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, Dataset, DistributedSampler, TensorDataset

import taulearn
from taulearn import Pruning, attach
from taulearn.files import write_tensors
from taulearn.training import History

RANK, SIZE = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
PRUNING = Pruning(target_blocks=3, criterion="contribution")


class Sentences(Dataset[dict[str, Tensor]]):
    """64 sentences of ten words, in two classes."""

    def __init__(self) -> None:
        self.words = torch.randint(50, (64, 10), generator=torch.Generator().manual_seed(0))
        self.classes = self.words.sum(1) % 2

    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.words[index], "labels": self.classes[index]}


def bert() -> Any:
    import transformers

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "vocab_size": 50}
    quiet = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    config = transformers.BertConfig(num_hidden_layers=6, max_position_embeddings=16, **sizes, **quiet)
    model = transformers.BertForSequenceClassification(config).double()
    for factor, layer in zip((5.0, 1.0, 3.0, 0.2, 4.0, 2.0), model.bert.encoder.layer, strict=True):
        layer.output.dense.weight.data *= 5 * factor  # so that no two contribute alike
    return taulearn.wrap(model, example_inputs={"input_ids": Sentences().words[:2]})


def network() -> Any:
    torch.manual_seed(0)
    return taulearn.nn.resnet(10, 8, 2, 6, dtype=torch.float64)


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(taulearn.parameter_groups(model, 0.05, tau_lr=0.02), momentum=0.9)


def batches() -> Iterable[Any]:
    """Batches of 16 of all processes together, in the order of the data."""
    data = TensorDataset(Sentences().words.double() / 50, Sentences().classes)
    sampler = DistributedSampler(data, SIZE, RANK, shuffle=False)
    return DataLoader(data, batch_size=16 // SIZE, sampler=sampler)


def leave(folder: Path, model: Any, history: History) -> None:
    tensors = {f"model/{name}": getattr(t, "full_tensor", lambda t=t: t)() for name, t in model.state_dict().items()}
    tensors["tau"] = torch.from_numpy(history.iterations["tau"])
    write_tensors(folder / f"{RANK}.safetensors", tensors, {"origin": str(model.time_steps.origin)})


def trainer(folder: Path, resume: str | None = None) -> None:
    """Hugging Face's Trainer, with clipping and checkpoints."""
    import transformers

    from taulearn.integrations.huggingface import TimeStepsCallback

    class InOrder(transformers.Trainer):
        def _get_train_sampler(self, *_: Any) -> Any:  # accelerate gives each process its share
            return torch.utils.data.SequentialSampler(Sentences())

    model, callback = bert(), TimeStepsCallback(pruning=PRUNING, progress=False)
    arguments = transformers.TrainingArguments(
        str(folder.parent / "runs"),
        per_device_train_batch_size=16 // SIZE,
        num_train_epochs=8,
        save_strategy="epoch",
        average_tokens_across_devices=False,  # which doubles losses that are means already
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        ddp_backend="gloo" if SIZE > 1 else None,
    )
    training = InOrder(
        model, arguments, train_dataset=Sentences(), optimizers=(optimizer_of(model), None), callbacks=[callback]
    )
    training.train(resume_from_checkpoint=resume)
    leave(folder, model, callback.history)


def trainer_resumed(folder: Path) -> None:
    """From the checkpoint of the fourth epoch, after the first deletion."""
    trainer(folder, str(folder.parent / "runs" / "checkpoint-16"))


def lightning(folder: Path, *, sharded: bool = False) -> None:
    """Lightning, with clipping; sharded: without, which does not take shards beside whole tensors."""
    import lightning as pl
    from lightning.pytorch.strategies import ModelParallelStrategy

    from taulearn.integrations.lightning import TimeStepsCallback

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.network = network()

        def configure_model(self) -> None:
            if sharded and SIZE > 1:
                shard(self.network, self.device_mesh["data_parallel"])

        def training_step(self, batch: Any, _: int) -> Tensor:
            return nn.functional.cross_entropy(self.network(batch[0]), batch[1])

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return optimizer_of(self.network)

        def train_dataloader(self) -> Any:
            return batches()

    module, callback = Module(), TimeStepsCallback(pruning=PRUNING, progress=False)
    training = pl.Trainer(
        max_epochs=8,
        accelerator="cpu",
        devices=SIZE,
        strategy="auto" if SIZE == 1 else ModelParallelStrategy(SIZE, 1) if sharded else "ddp",
        use_distributed_sampler=False,
        gradient_clip_val=None if sharded else 1.0,
        callbacks=[callback],
        logger=False,
        enable_progress_bar=False,
        enable_checkpointing=False,
        enable_model_summary=False,
    )
    training.fit(module)
    if sharded:
        training.save_checkpoint(folder / "end.ckpt")
    leave(folder, module.network, callback.history)


def lightning_sharded(folder: Path) -> None:
    """Lightning's strategy for models whose blocks are sharded (FSDP2)."""
    lightning(folder, sharded=True)


def shard(model: Any, mesh: Any) -> None:
    for block in model.layers:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh, ignored_params={model.time_steps.values})


def accelerate(folder: Path) -> None:
    """A loop with ``Accelerator.prepare`` and ``attach``."""
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    model = network()
    called, optimizer = accelerator.prepare(model, optimizer_of(model))
    session = attach(accelerator.unwrap_model(called), optimizer, pruning=PRUNING, iterations=32)
    for _ in range(8):
        for inputs, targets in batches():
            optimizer.zero_grad()
            accelerator.backward(nn.functional.cross_entropy(called(inputs), targets))
            accelerator.clip_grad_norm_(called.parameters(), 1.0)
            optimizer.step()
    session.detach()
    leave(folder, model, session.history)


def main(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).mkdir(parents=True, exist_ok=True)
        globals()[name](folder / name)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), *sys.argv[2:])
