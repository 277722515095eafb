"""A vision transformer in Hugging Face's Trainer that learns its time steps and loses layers while it trains.

The callback is all that Trainer needs; the model is wrapped before, and the optimiser gets the time steps in a group of
their own. Run

    python examples/huggingface_trainer.py
"""

import argparse
import tempfile

import torch
from transformers import Trainer, TrainingArguments, ViTConfig, ViTForImageClassification

import taulearn
from taulearn import Pruning, penalties
from taulearn.integrations.huggingface import TimeStepsCallback


class Digits(torch.utils.data.Dataset):
    """The digits as Trainer wants them."""

    def __init__(self, split: str) -> None:
        self.inputs, self.targets = taulearn.data.load("digits", split=split)

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        return {"pixel_values": self.inputs[i], "labels": self.targets[i]}


def accuracy(prediction: object) -> dict[str, float]:
    return {"accuracy": float((prediction.predictions.argmax(1) == prediction.label_ids).mean())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=15)
    epochs = parser.parse_args().epochs

    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=8,
        num_attention_heads=4,
        image_size=8,
        patch_size=4,
        num_channels=1,
        num_labels=10,
    )
    train, test = Digits("train"), Digits("test")

    model = taulearn.wrap(ViTForImageClassification(config), example_inputs=train.inputs[:2])
    optimizer = torch.optim.AdamW(taulearn.parameter_groups(model, lr=2e-3, tau_lr=5e-3, weight_decay=0.01))
    callback = TimeStepsCallback(
        penalties=[penalties.L1(0.6, proximal=True)],
        pruning=Pruning(0.05),
    )
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            num_train_epochs=epochs,
            per_device_train_batch_size=25,
            logging_steps=10,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
        )
        trainer = Trainer(
            model,
            arguments,
            train_dataset=train,
            eval_dataset=test,
            compute_metrics=accuracy,
            optimizers=(optimizer, None),
            callbacks=[callback],
        )
        trainer.train()
        figures = trainer.evaluate()

    layers = callback.history.epochs["layers"]
    print(f"layers: {layers[0]} -> {layers[-1]}, those left: {list(model.time_steps.origin)}")
    print(f"test accuracy: {figures['eval_accuracy']:.4f}")


if __name__ == "__main__":
    main()
