"""A network beside finite elements: how fine must a mesh be to represent a field as well as the network has learned it?

The network maps (x, f(x), phi(x)) to the solution u(x) of a Maxwell problem (Antil, Diaz and Herberg 2022, section 7).
It is trained in a cylinder by full-batch steepest descent, and compared on the unit cube, part of which it has never
seen, with the best approximation by lowest order Nedelec elements. Run

    python examples/maxwell_surrogate.py
"""

import argparse

import torch

from taulearn import data, fem, fit, nn
from taulearn.data import maxwell
from taulearn.functional import half_mse_loss
from taulearn.optim import SteepestDescent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200, help="steps of steepest descent")
    parser.add_argument("--hidden-layers", type=int, default=2)
    parser.add_argument("--width", type=int, default=50)
    parser.add_argument("--meshes", type=int, nargs="+", default=[1, 2, 4, 7, 10], help="subdivisions per edge")
    arguments = parser.parse_args()

    torch.manual_seed(0)
    network = nn.resnet(7, arguments.width, 3, arguments.hidden_layers, activation="smooth_relu", init=1.0)
    train = data.load("maxwell")
    history = fit(
        network,
        train,
        loss=half_mse_loss,
        optimizer=SteepestDescent(network.parameters()),
        epochs=arguments.steps,  # one step each, on all samples
        batch_size=len(train.inputs),
        progress=False,
    )
    loss = history.iterations["loss"]
    print(f"mean squared error {loss[0]:.3e} -> {loss[-1]:.3e} in {len(loss)} steps, none of which raised it")
    print(f"learned steps: {', '.join(f'{tau:.3f}' for tau in network.time_steps.tau.tolist())}\n")

    print(f"{'n':>3}{'unknowns':>10}{'finite elements':>17}{'network':>11}")
    for n in arguments.meshes:
        elements = fem.best_approximation_error(n)
        error = fem.l2_error(lambda x: network(maxwell.inputs_at(x).float()), n)
        print(f"{n:3}{elements.dofs:10,}{elements.l2:17.3e}{error:11.3e}")


if __name__ == "__main__":
    main()
