"""Two adjoints of one network: the gradient, and what comes out when the adjoint equation is discretised instead.

For the fractional scheme, "optimize-then-discretize" takes the right-sided Caputo derivative of the adjoint equation
and discretises it. Antil, Diaz and Herberg (2022, section 5.2) note that the result is not the gradient of the discrete
loss. How far is it off? Run

    python examples/two_adjoints.py
"""

import argparse

import torch
from torch.nn.functional import mse_loss

from taulearn import adjoint, data, nn


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden-layers", type=int, default=7)
    parser.add_argument("--width", type=int, default=20)
    parser.add_argument("--gamma", type=float, default=0.5)
    arguments = parser.parse_args()

    inputs, targets = (part[:200].double() for part in data.load("sine"))
    sizes = (inputs.shape[1], arguments.width, targets.shape[1], arguments.hidden_layers)
    uneven = torch.linspace(0.5, 1.5, arguments.hidden_layers) ** 2
    uneven /= uneven.sum()

    for title, make in {
        "residual": lambda: nn.resnet(*sizes, activation="tanh", dtype=torch.float64),
        "fractional, equal steps": lambda: nn.fractional_dnn(
            *sizes, gamma=arguments.gamma, activation="tanh", dtype=torch.float64
        ),
        "fractional, growing steps": lambda: nn.fractional_dnn(
            *sizes, gamma=arguments.gamma, activation="tanh", init=uneven, dtype=torch.float64
        ),
    }.items():
        torch.manual_seed(0)
        network = make()
        explicit = adjoint.gradients(network, inputs, targets, mse_loss)
        mse_loss(network(inputs), targets).backward()
        errors = [
            float((explicit[name] - p.grad).norm() / p.grad.norm())
            for name, p in network.named_parameters()
            if p.grad is not None
        ]
        print(f"{title}: discretize-then-optimize equals autograd to {max(errors):.1e};")
        print("optimize-then-discretize against it, by layer:")
        print(adjoint.deviation(network, inputs, targets, mse_loss), end="\n\n")


if __name__ == "__main__":
    main()
