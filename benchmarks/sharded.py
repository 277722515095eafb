"""A sharded decoder: what time steps cost, what a deletion takes, and what it frees, on two processes.

    python benchmarks/sharded.py [--width 512] [--blocks 12] [--rounds 20]

Two gloo processes of one thread each; the same decoder bare and wrapped, sharded block by block by fully_shard, takes
training steps in turn. Printed are the median of the ratios with its 95 % interval by the bootstrap, the seconds of one
``taulearn.prune`` of half of the blocks, and the bytes of parameters and AdamW's state a process, before and after.
"""

import argparse
import copy
import os
import socket
import time
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard

import taulearn

TOKENS, VOCABULARY, BATCH = 64, 512, 4


class Block(nn.Module):
    """A pre-norm block of a decoder: attention, then a multilayer perceptron."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.heads = width // 64
        self.qkv, self.project = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (t.unflatten(-1, (self.heads, 64)).transpose(1, 2) for t in self.qkv(self.norm_1(x)).chunk(3, -1))
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.project(mixed.transpose(1, 2).flatten(2))
        return x + self.down(nn.functional.gelu(self.up(self.norm_2(x))))


class Decoder(nn.Module):
    """Words in, scores of the next words out."""

    def __init__(self, width: int, blocks: int) -> None:
        super().__init__()
        self.words, self.head = nn.Embedding(VOCABULARY, width), nn.Linear(width, VOCABULARY)
        self.blocks = nn.ModuleList(Block(width) for _ in range(blocks))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.words(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(x).clone()  # not a view, of which fully_shard warns


def shard(model: Any) -> None:
    """Each block a unit, and the rest."""
    for block in model.blocks:
        fully_shard(block)
    steps = getattr(model, "time_steps", None)
    fully_shard(model, ignored_params=None if steps is None else {steps.values})


def nbytes(model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Bytes of parameters and of the optimiser's state in this process."""
    tensors = [*model.parameters(), *(t for state in optimizer.state.values() for t in state.values())]
    local = [t.to_local() if hasattr(t, "to_local") else t for t in tensors if isinstance(t, torch.Tensor)]
    return sum(t.untyped_storage().nbytes() for t in local)


def work(rank: int, port: int, arguments: argparse.Namespace) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    torch.manual_seed(0)
    bare = Decoder(arguments.width, arguments.blocks)
    wrapped: Any = copy.deepcopy(bare)
    ids = torch.randint(VOCABULARY, (BATCH, TOKENS), generator=torch.Generator().manual_seed(rank))
    taulearn.wrap(wrapped, example_inputs=ids)
    optimizers = []
    for model in (bare, wrapped):
        shard(model)
        groups = taulearn.parameter_groups(model, 1e-4) if model is wrapped else model.parameters()
        optimizers.append(torch.optim.AdamW(groups, lr=1e-4))
    session = taulearn.attach(wrapped, optimizers[1])

    def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> float:
        dist.barrier()
        start = time.perf_counter()
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten()).backward()
        optimizer.step()
        return time.perf_counter() - start

    ratios = []
    for round_ in range(arguments.rounds + 2):
        order = [0, 1] if round_ % 2 else [1, 0]
        seconds = {i: step((bare, wrapped)[i], optimizers[i]) for i in order}
        if round_ > 1:
            ratios.append(seconds[1] / seconds[0])
    session.detach()
    before, gone = nbytes(wrapped, optimizers[1]), sum(p.numel() for b in wrapped.blocks[::2] for p in b.parameters())
    share = gone / sum(p.numel() for p in wrapped.parameters())
    dist.barrier()
    start = time.perf_counter()
    taulearn.prune(wrapped, keep=range(1, arguments.blocks, 2), optimizer=optimizers[1])
    seconds = time.perf_counter() - start
    after = nbytes(wrapped, optimizers[1])
    step(wrapped, optimizers[1])
    if rank == 0:
        draws = np.random.default_rng(0).choice(ratios, (10_000, len(ratios)))
        low, high = np.quantile(np.median(draws, axis=1), [0.025, 0.975])
        print(f"{arguments.blocks} blocks of width {arguments.width}, two processes, {len(ratios)} pairs")
        print(f"training step, wrapped over bare   {np.median(ratios):.3f} ({low:.3f} .. {high:.3f})")
        print(f"prune of every other block         {seconds:.3f} s")
        print(f"parameters and state a process     {before / 1e6:.1f} -> {after / 1e6:.1f} MB")
        print(f"share freed                        {1 - after / before:.4f}, that of the blocks {share:.4f}")
    dist.barrier()
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in {"width": 512, "blocks": 12, "rounds": 20}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(work, (port, parser.parse_args()), nprocs=2)


if __name__ == "__main__":
    main()
