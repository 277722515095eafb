"""Three ways to need less depth, on the digits: stage cost, l1 with pruning in the same run, and early exit.

A residual network of 12 layers is trained twice, with and without the loss at every intermediate output. With it a few
layers are enough: the network is cut where the validation accuracy allows, and single samples stop even earlier.

``python examples/stage_cost.py [--epochs 30]`` takes some seconds.
"""

import argparse

import torch
from torch.nn.functional import cross_entropy

import taulearn
from taulearn.diagnostics import choose_layers, depth_profile, early_exit
from taulearn.nn import TimeVariableNetwork
from taulearn.penalties import L1, Penalty, StageCost


def trained(penalties: list[Penalty], pruning: taulearn.Pruning | None, epochs: int) -> TimeVariableNetwork:
    torch.manual_seed(0)
    network = taulearn.nn.resnet(64, 40, 10, hidden_layers=12, horizon=6.0)
    taulearn.fit(
        network,
        taulearn.data.load("digits"),
        loss=cross_entropy,
        optimizer=torch.optim.SGD(taulearn.parameter_groups(network, lr=0.05, weight_decay=1e-4), momentum=0.5),
        epochs=epochs,
        batch_size=20,
        penalties=penalties,
        pruning=pruning,
        progress=False,
    )
    return network


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--epochs", type=int, default=30)
    epochs = arguments.parse_args().epochs
    x, z = taulearn.data.load("digits", "test")

    plain = trained([], None, epochs)
    print("without stage cost")
    print(depth_profile(plain, x, z, cross_entropy))

    cost = [StageCost(0.2, cross_entropy), L1(0.003, proximal=True)]
    network = trained(cost, taulearn.Pruning(0.02), epochs)
    print(f"\nwith stage cost, l1 and pruning: {network.time_steps.num_steps} of 12 layers left")
    print(depth_profile(network, x, z, cross_entropy, example_inputs=x[:100]))

    print("\nearly exit")
    print(early_exit(network, x, z, (0.8, 0.9, 0.95, 0.99, 1.0)))
    found = network.predict(x, confidence=0.9)
    print(f"predict: accuracy {(found.classes == z).float().mean():.4f}, mean depth {found.depths.float().mean():.2f}")

    decision = choose_layers(network, x, z, cross_entropy, tolerance=0.005)
    print(f"\n{decision}\n{decision.apply_(network)}")


if __name__ == "__main__":
    main()
