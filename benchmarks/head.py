"""The fused head against the one before it: time and memory of forward and backward.

`python -m benchmarks.head [--threads N] [--tiles]`. The other side takes log-softmax of whole rows of logits, 2^26 of
them at a time, and makes each chunk once more in backward where there are several. The two alternate in one process,
the median of the rounds' ratios is told. Memory is the growth of the peak resident set of a process of its own over
what it held before the head. `--tiles` tries sizes of a tile.
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from posttrain_trainer import head
from posttrain_trainer.head import LogitTransform, fused_scores

ROUNDS, CHUNK_LOGITS = 3, 2**26
Score = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Size:
    """Counted tokens of a micro-batch, hidden size, vocabulary."""

    tokens: int
    hidden: int
    vocabulary: int
    dtype: torch.dtype = torch.float32
    frozen: bool = False

    def operands(self) -> tuple[Tensor, Tensor, Tensor]:
        """Hidden states, weight, targets."""
        torch.manual_seed(0)
        hidden = torch.randn(self.tokens, self.hidden).to(self.dtype).requires_grad_()
        weight = (0.05 * torch.randn(self.vocabulary, self.hidden)).to(self.dtype).requires_grad_(not self.frozen)
        return hidden, weight, torch.randint(0, self.vocabulary, (self.tokens,))


SIZES = (
    Size(2816, 128, 261),
    Size(2048, 256, 32_000),
    Size(1024, 256, 150_000),
    Size(1024, 256, 150_000, frozen=True),
    Size(1024, 256, 150_000, dtype=torch.bfloat16),
)
LARGE = Size(4096, 64, 150_000)


def fused(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """log p [n] of the trainer's head."""
    return fused_scores(hidden, weight, None, targets, LogitTransform())[0]


def chunked(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """log p [n] by rows."""
    chunk = max(1, CHUNK_LOGITS // len(weight))
    if len(targets) <= chunk:
        return _rows(weight, hidden, targets)
    pairs = zip(hidden.split(chunk), targets.split(chunk), strict=True)
    parts = [checkpoint(_rows, weight, *pair, use_reentrant=False, preserve_rng_state=False) for pair in pairs]
    return torch.cat(parts)


def _rows(weight: Tensor, hidden: Tensor, targets: Tensor) -> Tensor:
    log_probs = torch.log_softmax((hidden @ weight.T).float(), dim=-1)
    with torch.no_grad():  # as the trainer did
        detached = log_probs.detach()
        _ = -(detached.exp() * detached).sum(-1), (detached.argmax(-1) == targets).float()
    return log_probs.gather(-1, targets[:, None])[:, 0]


def seconds(score: Score, size: Size) -> float:
    """CPU seconds of one forward and backward: other work on the machine does not decide."""
    hidden, weight, targets = size.operands()
    begin = time.process_time()
    score(hidden, weight, targets).sum().backward()
    return time.process_time() - begin


def time_ratio(size: Size) -> tuple[float, float]:
    """Median of fused / chunked, and the median seconds of the chunked one. The first round warms up."""
    pairs = [(seconds(fused, size), seconds(chunked, size)) for _ in range(ROUNDS + 1)][1:]
    return statistics.median(ours / theirs for ours, theirs in pairs), statistics.median(pair[1] for pair in pairs)


def peak_bytes(score: Score, size: Size) -> int:
    """By a new process: a peak never goes down again."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_grown, (score, size))


def _grown(score: Score, size: Size) -> int:
    hidden, weight, targets = size.operands()
    seconds(score, Size(8, 8, 8))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    score(hidden, weight, targets).sum().backward()
    return 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)


def main() -> None:
    """Prints the memory, then a line per size."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--tiles", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if not arguments.tiles:
        ours, theirs = peak_bytes(fused, LARGE), peak_bytes(chunked, LARGE)
        print(f"{LARGE}: peak {ours / 2**20:.0f} MiB against {theirs / 2**20:.0f} MiB: {ours / theirs:.2f}", flush=True)
    for tile in [2**power for power in range(16, 25, 2)] if arguments.tiles else [head.TILE]:
        head.TILE = tile
        for size in SIZES:
            ratio, theirs = time_ratio(size)
            print(f"tile {tile}: {size}: fused / chunked time {ratio:.2f} (chunked {theirs:.2f} s)", flush=True)


if __name__ == "__main__":
    main()
