"""Seconds per epoch of the papers' network on MNIST: fit against four other loops, interleaved in one run.

(a) ``taulearn.fit``, compiled, steady state
(b) the plain loop an expert writes: eager, data resident in memory, torch.optim.SGD
(c) the loop of published codes: DataLoader without workers, a transform per sample from a PIL image
(d) the bare matrix products of the same sizes, forward and backward
(e) a jitted jax.lax.scan over the epoch, where jax can be imported

``python benchmarks/training_step.py [--epochs 5] [--network resnet|fractional] [--skip-published]``; the data lie where
``taulearn train --data mnist`` looks for them.
"""

import argparse
import os
import platform
import resource
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import nn

BATCH = 100
LR = 0.01


def plain_loop(make: Callable[[], nn.Module], inputs: torch.Tensor, targets: torch.Tensor) -> Callable[[], float]:
    """(b) One epoch of the loop an expert writes."""
    network = make()
    optimizer = torch.optim.SGD(network.parameters(), lr=LR)

    def epoch() -> float:
        began = time.perf_counter()
        for index in torch.randperm(len(inputs)).split(BATCH):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(network(inputs[index]), targets[index])
            loss.backward()
            optimizer.step()
        return time.perf_counter() - began

    return epoch


def published_loop(make: Callable[[], nn.Module], images: torch.Tensor, targets: torch.Tensor) -> Callable[[], float]:
    """(c) One epoch with a transform per sample."""
    from PIL import Image

    class Samples(torch.utils.data.Dataset[tuple[torch.Tensor, int]]):
        def __len__(self) -> int:
            return len(images)

        def __getitem__(self, i: int) -> tuple[torch.Tensor, int]:
            picture = Image.fromarray(images[i, 0].numpy(), mode="L")
            pixels = torch.from_numpy(np.array(picture, np.uint8, copy=True)).view(28, 28, 1)
            return pixels.permute(2, 0, 1).contiguous().to(torch.float32).div(255), int(targets[i])

    network = make()
    optimizer = torch.optim.SGD(network.parameters(), lr=LR)
    loader = torch.utils.data.DataLoader(Samples(), batch_size=BATCH, shuffle=True)

    def epoch() -> float:
        began = time.perf_counter()
        for x, z in loader:
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(network(x), z)
            loss.backward()
            optimizer.step()
        return time.perf_counter() - began

    return epoch


def bare_products(inputs: torch.Tensor) -> Callable[[], float]:
    """(d) The matrix products of one epoch over the data: forward, gradients of weights and states."""
    weights = [torch.randn(100, 784), *(torch.randn(100, 100) for _ in range(5)), torch.randn(10, 100)]
    states = [torch.randn(BATCH, w.shape[1]) for w in weights]
    gradients = [torch.randn(BATCH, w.shape[0]) for w in weights]

    @torch.no_grad()
    def epoch() -> float:
        began = time.perf_counter()
        for x in inputs.flatten(1).split(BATCH):
            for l, (w, y, g) in enumerate(zip(weights, [x, *states[1:]], gradients, strict=True)):
                y @ w.T
                g.T @ y
                if l:
                    g @ w
        return time.perf_counter() - began

    return epoch


def steps_alone(
    make: Callable[[], nn.Module], images: torch.Tensor, targets: torch.Tensor, *, looking: bool = False
) -> Callable[[], float]:
    """The steps of (a) without record, progress and hooks: what these cost is the difference.

    With ``looking``, after each of them it is asked whether a layer has to go, as ``Pruning(every=1)`` does.
    """
    from taulearn import Pruning
    from taulearn.adaptivity.adaptation import Adaptation
    from taulearn.training.batches import TensorBatches
    from taulearn.training.objective import Objective, StepOptions
    from taulearn.training.step import Engine

    network = make()
    objective = Objective(network, nn.functional.cross_entropy, ())
    batches = TensorBatches(images, targets, BATCH, 0)
    optimizer = torch.optim.SGD(network.parameters(), lr=LR)
    policies = Adaptation(Pruning(every=1), None, network, optimizer, 1, len(batches)) if looking else None
    engine = Engine(objective, optimizer, batches, StepOptions(), compiled=True, policies=policies)

    def epoch() -> float:
        began = time.perf_counter()
        for _ in engine.epoch(0, 0, 0):
            if policies is not None and not policies.pruner.idle(network.time_steps.tau.detach()[None]):
                raise RuntimeError("a layer would be deleted: the loops are no longer alike")
        return time.perf_counter() - began

    return epoch


def jax_scan(images: torch.Tensor, targets: torch.Tensor) -> Callable[[], float]:
    """(e) One epoch of the residual network as one jitted scan."""
    import jax
    import jax.numpy as jnp

    x, z = jnp.asarray(images.flatten(1).numpy()), jnp.asarray(targets.numpy().astype(np.int32))
    rng = np.random.default_rng(0)
    sizes = [(784, 100), *[(100, 100)] * 5]
    parameters = {
        "w": [jnp.asarray(rng.uniform(-(n**-0.5), n**-0.5, (n, m)), jnp.float32) for n, m in sizes],
        "b": [jnp.zeros(m, jnp.float32) for _, m in sizes],
        "tau": jnp.full(6, 1 / 6, jnp.float32),
        "head": jnp.asarray(rng.uniform(-0.1, 0.1, (100, 10)), jnp.float32),
    }

    def loss(p: dict, index: jax.Array) -> jax.Array:
        y = x[index].astype(jnp.float32) / 255
        for l, (w, b) in enumerate(zip(p["w"], p["b"], strict=True)):
            f = p["tau"][l] * jax.nn.relu(y @ w + b)
            y = f if l == 0 else y + f
        logits = jax.nn.log_softmax(y @ p["head"])
        return -jnp.take_along_axis(logits, z[index][:, None], 1).mean()

    def step(p: dict, index: jax.Array) -> tuple[dict, jax.Array]:
        value, g = jax.value_and_grad(loss)(p, index)
        return jax.tree.map(lambda a, b: a - LR * b, p, g), value

    run = jax.jit(lambda p, order: jax.lax.scan(step, p, order.reshape(-1, BATCH)))

    def epoch() -> float:
        nonlocal parameters
        began = time.perf_counter()
        parameters, values = run(parameters, jnp.asarray(rng.permutation(len(x))))
        values.block_until_ready()
        return time.perf_counter() - began

    epoch()
    return epoch


def pruned_ratio(make: Callable[[], nn.Module], images: torch.Tensor, targets: torch.Tensor, epochs: int) -> float:
    """Seconds per epoch after pruning from 6 to 3 layers over seconds before, the two networks trained in turn."""
    import taulearn

    whole, pruned = make(), make()
    optimizers = [torch.optim.SGD(n.parameters(), lr=LR) for n in (whole, pruned)]
    taulearn.prune(pruned, keep=[0, 1, 2], optimizer=optimizers[1])
    data, loss, inner = (images, targets), nn.functional.cross_entropy, []

    def train_whole(_: object) -> None:
        history = taulearn.fit(
            whole, data, loss=loss, optimizer=optimizers[0], epochs=2, compile="always", progress=False
        )
        inner.append(history.epochs["seconds"][2])

    history = taulearn.fit(
        pruned,
        data,
        loss=loss,
        optimizer=optimizers[1],
        epochs=epochs + 1,
        compile="always",
        progress=False,
        callbacks=[train_whole],
    )
    return float(history.epochs["seconds"][2:].min() / min(inner))


def refinement_ratios(make: Callable[[], nn.Module], data: tuple[torch.Tensor, torch.Tensor], mode: str) -> list[float]:
    """Processor time per epoch with a policy of refinement that does not fire, over that without, in turn.

    Each fit trains in a thread of its own, and hands over to the other one at the end of each epoch. The policy's only
    round is at the very end, in an epoch that does not count, as the first three do not.
    """
    import taulearn

    turns, seconds = [threading.Semaphore(1), threading.Semaphore(0)], ([], [])

    def train(me: int, refinement: "taulearn.Refinement | None") -> None:
        def hand_over(_: object) -> None:
            seconds[me].append(time.thread_time() - began[0])
            turns[1 - me].release()
            turns[me].acquire()
            began[0] = time.thread_time()

        turns[me].acquire()
        network, began = make(), [time.thread_time()]
        taulearn.fit(
            network,
            data,
            loss=nn.functional.cross_entropy,
            optimizer=torch.optim.SGD(network.parameters(), lr=LR),
            epochs=44,
            compile=mode,
            progress=False,
            refinement=refinement,
            callbacks=[hand_over],
        )
        turns[1 - me].release()

    policies = None, taulearn.Refinement(7, until=1.0, indicator=lambda tau, _: tau)
    threads = [threading.Thread(target=train, args=each) for each in enumerate(policies)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [after / before for before, after in zip(*seconds, strict=True)][3:-1]


def print_refinement(make: Callable[[], nn.Module], images: torch.Tensor, targets: torch.Tensor, rounds: int) -> None:
    """The ratios of several pairs of trainings on a tenth of the data."""
    for mode in ("never", "always"):
        data = images[:6000], targets[:6000]
        medians = [statistics.median(refinement_ratios(make, data, mode)) for _ in range(rounds)]
        print(
            f"epoch with a policy of refinement that does not fire, over one without, compile={mode!r}: "
            f"{statistics.median(medians):.4f}, median of {', '.join(f'{each:.4f}' for each in medians)}"
        )


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--epochs", type=int, default=5, help="epochs of each loop (at least 3)")
    arguments.add_argument("--network", choices=["resnet", "fractional"], default="resnet")
    arguments.add_argument("--skip-published", action="store_true", help="leave out the slow loop (c)")
    arguments.add_argument("--only-refinement", action="store_true", help="measure the policy of refinement alone")
    options = arguments.parse_args()
    baseline = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    import taulearn
    from taulearn.nn import fractional_dnn, resnet

    build = {"resnet": resnet, "fractional": fractional_dnn}[options.network]

    def make() -> nn.Module:
        torch.manual_seed(0)
        return build(784, 100, 10, 6)

    images, targets = taulearn.data.load("mnist", as_uint8=True)
    if options.only_refinement:
        print_refinement(make, images, targets, options.epochs)
        return
    network = make()
    optimizer = torch.optim.SGD(network.parameters(), lr=LR)

    with tempfile.TemporaryDirectory() as folder:
        alone = taulearn.fit(
            network,
            (images, targets),
            loss=nn.functional.cross_entropy,
            optimizer=optimizer,
            epochs=4,
            compile="always",
            progress=False,
            run=Path(folder) / "run",
        )
    peak = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - baseline) / 1024

    inputs = images.float() / 255
    loops = {
        "b plain loop": plain_loop(make, inputs, targets),
        "d matrix products": bare_products(inputs),
        "a without record": steps_alone(make, images, targets),
        "a looking each step": steps_alone(make, images, targets, looking=True),
    }
    if not options.skip_published:
        loops["c published loop"] = published_loop(make, images, targets)
    if options.network == "resnet":
        try:
            loops["e jax scan"] = jax_scan(images, targets)
        except ImportError:
            print("jax cannot be imported: (e) is left out")
    seconds: dict[str, list[float]] = {name: [] for name in loops}

    def others(_: object) -> None:
        for name, epoch in loops.items():
            seconds[name].append(epoch())

    network = make()
    optimizer = torch.optim.SGD(network.parameters(), lr=LR)
    history = taulearn.fit(
        network,
        (images, targets),
        loss=nn.functional.cross_entropy,
        optimizer=optimizer,
        epochs=options.epochs + 1,
        compile="always",
        progress=False,
        callbacks=[others],
    )
    seconds["a fit"] = history.epochs["seconds"][2:].tolist()

    machine = f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores"
    print(f"{machine}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    print(f"{options.network} 784-100x6-10, MNIST, batch {BATCH}, SGD; seconds per epoch, {options.epochs} in turn")
    fastest = {name: min(values) for name, values in seconds.items()}
    print(f"{'':20}{'min':>9}{'median':>9}{'a / this':>10}")
    for name in sorted(seconds):
        ratio = fastest["a fit"] / fastest[name]
        print(f"{name:20}{fastest[name]:9.3f}{statistics.median(seconds[name]):9.3f}{ratio:10.2f}")
    if options.network == "resnet":
        print(f"fit with 3 layers left of 6, against 6: {pruned_ratio(make, images, targets, options.epochs):.2f}")
    print_refinement(make, images, targets, options.epochs)
    print(f"peak resident set of a 4 epoch run above the process that has imported torch: {peak:.0f} MB")
    print(f"first epoch with compilation: {alone.epochs['seconds'][1]:.1f} s")


if __name__ == "__main__":
    main()
