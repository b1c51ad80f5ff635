"""What only a CUDA machine can show: numbers in bf16, the head's tiles, ZeRO 2 and 3, packing, speed beside TRL.

The tests train on the CPU; this is run by hand on a machine with one GPU. Each training is a process of its own that
begins from the same weights and rows; mean loss and gradient norm of its steps are compared with fp32 at ZeRO 0. Every
line says what was found and what is allowed; exit code 1 where one is out of bounds, 2 where there is no CUDA device.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch

from benchmarks.cases import Case, write_case
from benchmarks.trainer_vs_trl import compare, note, start, table
from posttrain_trainer.head import LogitTransform, fused_scores

FP32, BF16 = 1e-4, 2e-2
"""Relative, of the mean loss of a few steps. fp32: sums in another order (TF32 is off); bf16: numbers of 8 bits."""
NORM = 5
"""A gradient norm may be off by this many times what a loss may."""
BUDGET = 8192


@dataclass(frozen=True)
class Finding:
    """One comparison: `value` must be at most `allowed`."""

    title: str
    value: float
    allowed: float

    def __str__(self) -> str:
        word = "ok" if self.value <= self.allowed else "OUT OF BOUNDS"
        return f"  {word:<14}{self.title:<52}{self.value:.2e}  (at most {self.allowed:.0e})"


def head() -> Iterator[Finding]:
    """Fused head against log-softmax of all logits, in double precision, at a vocabulary of 150,000."""
    torch.manual_seed(0)
    hidden = torch.randn(512, 256, device="cuda")
    weight, targets = 0.05 * torch.randn(150_000, 256, device="cuda"), torch.randint(0, 150_000, (512,), device="cuda")
    found = [each.clone().requires_grad_() for each in (hidden, weight)]
    naive = [each.double().requires_grad_() for each in (hidden, weight)]
    logp = fused_scores(found[0], found[1], None, targets, LogitTransform())[0]
    exact = torch.log_softmax(naive[0] @ naive[1].T, dim=-1).gather(-1, targets[:, None])[:, 0]
    logp.sum().backward()
    exact.sum().backward()
    yield Finding("fused head: log p, relative", distance(logp, exact), 1e-5)
    for name, ours, theirs in zip(("hidden", "weight"), found, naive, strict=True):
        assert ours.grad is not None
        assert theirs.grad is not None
        yield Finding(f"fused head: gradient of {name}, relative", distance(ours.grad, theirs.grad), 1e-4)


def distance(found: torch.Tensor, exact: torch.Tensor) -> float:
    """|found − exact| / |exact|, in the Euclidean norm."""
    return float((found.double() - exact).norm() / exact.norm())


def losses(case: Case) -> Iterator[Finding]:
    """fp32 and bf16 at ZeRO 2 and 3, and packed under the attention there is (SDPA), against fp32."""
    exact = measured(case)
    for precision, allowed in (("FP32", FP32), ("BF16", BF16)):
        for stage in (2, 3):
            found = measured(replace(case, precision=precision, zero_stage=stage))
            yield from against(exact, found, f"{case.stage}, {precision} at ZeRO {stage}", allowed)
    yield from against(exact, measured(replace(case, packed=True)), f"{case.stage}, packed into one line", FP32)


def against(exact: dict[str, float], found: dict[str, float], title: str, allowed: float) -> Iterator[Finding]:
    """Loss and gradient norm, relative. A preference loss hardly leaves log 2 in a few steps: the norm shows more."""
    yield Finding(f"{title}: loss", abs(found["loss"] / exact["loss"] - 1), allowed)
    yield Finding(f"{title}: gradient norm", abs(found["grad_norm"] / exact["grad_norm"] - 1), NORM * allowed)


def measured(case: Case) -> dict[str, float]:
    """Loss and gradient norm of one round in a process of its own."""
    note(f"{case.stage} {case.precision} ZeRO {case.zero_stage}")
    child = start(case, "ours")
    try:
        child.answer()
        value = child.say(f"round {BUDGET}")
        child.end()
        return value
    finally:
        child.process.kill()


def checks(stage: str) -> Iterator[Finding]:
    """The losses of one stage on one set of rows."""
    with tempfile.TemporaryDirectory() as folder:
        case = Case(stage, folder, 64, 16, 32_000, 512, 4, max_length=1024, threads=8, device="cuda")
        write_case(case)
        yield from losses(case)


def speed(stage: str) -> None:
    """Tokens per second beside TRL, both in bf16. Wall clock: CPU seconds say nothing here."""
    with tempfile.TemporaryDirectory() as folder:
        shape = (32_000, 1024, 12)
        case = Case(stage, folder, 512, 64, *shape, max_length=1024, threads=8, device="cuda", precision="BF16")
        compared = compare(replace(case, zero_stage=2), {"ours": (16_384,), "trl": (16,)}, 3)
        print(table(compared, f"{stage}, bf16, one GPU: read tokens per second"), flush=True)


def main() -> int:
    """0 where every finding is within its bounds."""
    parser = argparse.ArgumentParser("python -m benchmarks.gpu_check", description=__doc__)
    parser.add_argument("--no-speed", action="store_true", help="leave TRL out")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print(
            f"gpu-check: torch {torch.__version__} sees no CUDA device on this machine, so nothing was checked. Run it "
            "where `nvidia-smi` lists a GPU and torch is built for its driver.",
            file=sys.stderr,
        )
        return 2
    print(f"torch {torch.__version__}, {torch.cuda.get_device_name()}, CUDA {torch.version.cuda}")
    parts: list[Callable[[], Iterator[Finding]]] = [head, lambda: checks("SFT"), lambda: checks("Preference")]
    passed = True
    for part in parts:
        for finding in part():
            print(finding, flush=True)
            passed &= finding.value <= finding.allowed
    for stage in () if options.no_speed else ("SFT", "Preference"):
        speed(stage)
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
