"""The operator with 100, 1,000 and 10,000 jobs in a real API server, beside a bare client and the training-operator.

One cluster (etcd, API server, garbage collector) is filled step by step. Up to a thousand jobs run with two pods each,
which a status runner plays; of the others nine in ten have finished, one in ten is suspended. At each size the real
operator, under the chart's rights, is started, given single jobs and bursts, watched while all running jobs report, and
asked for a resync, which must write nothing. A bare client makes the same writes in turn with it: on a small machine
the API server is what limits both. At the end the training-operator shows what it needs for its own part.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import platform
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from benchmarks import operator_peer, operator_phases
from benchmarks.operator_lives import Template
from benchmarks.operator_process import Operator
from benchmarks.operator_report import Figures, markdown, note, save, table, together
from benchmarks.operator_world import World
from devcluster.testing import Cluster, control_plane

EXAMPLES = """examples:
  make bench-operator                                          everything; on two cores three quarters of an hour
  make bench-operator BENCH_ARGS=--quick                       100 jobs, small samples: about four minutes
  python -m benchmarks.operator_bench --jobs 100,1000          without the largest size
  python -m benchmarks.operator_bench --jobs 1000 --no-peer --keep /tmp/bench

how to read it:
  apply → child: from the user's request to the moment when a watch shows the PyTorchJob.
  A loop lag of "≤ 25 ms" names the histogram's bucket. "start: writes" and "no-op resync: writes" must be 0.
"""
MOST_RUNNING = 1000


@dataclass(frozen=True)
class Plan:
    """How much of everything."""

    sizes: tuple[int, ...]
    lives: int
    burst: int
    rounds: int
    steady: float
    peer: bool


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(
        "python -m benchmarks.operator_bench",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("--jobs", default="100,1000,10000", help="numbers of jobs, growing (default %(default)s)")
    made.add_argument("--quick", action="store_true", help="100 jobs, small samples, one round")
    made.add_argument("--lives", type=int, default=100, help="single jobs at each size (default 100)")
    made.add_argument("--burst", type=int, default=300, help="jobs of a burst, at most the size (default 300)")
    made.add_argument("--rounds", type=int, default=2, help="bursts of each side, in turn (default 2)")
    made.add_argument("--steady", type=float, default=60, help="seconds of reports from all that run (default 60)")
    made.add_argument("--no-peer", action="store_true", help="leave the training-operator out")
    made.add_argument("--json", type=Path, default=Path(".build/bench-operator.json"), help="default %(default)s")
    made.add_argument("--keep", type=Path, help="a folder for logs and state, kept (default: a temporary one)")
    return made


def plan_of(options: argparse.Namespace) -> Plan:
    """What the options ask for. SystemExit for sizes that do not grow."""
    if options.quick:
        return Plan((100,), 20, 50, 1, 10.0, not options.no_peer)
    sizes = tuple(int(each) for each in options.jobs.split(","))
    if any(later <= sooner for sooner, later in zip((0, *sizes), sizes, strict=False)):
        raise SystemExit(f"--jobs: write growing numbers, as in 100,1000 (found {options.jobs})")
    return Plan(sizes, options.lives, options.burst, options.rounds, options.steady, not options.no_peer)


class Bench:
    """One run. `columns`: the figures of each size, as far as it has come."""

    def __init__(self, world: World, plan: Plan) -> None:
        self._world, self._plan = world, plan
        self._operator: Operator | None = None
        self._templates: dict[str, Template] = {}
        self._archived = 0
        self.columns: dict[str, Figures] = {}
        self.peer: Figures = {}

    async def run(self) -> None:
        """All sizes, then the peer."""
        await self._world.open()
        try:
            await self._warm_up()
            for size in self._plan.sizes:
                note(f"{size:,} jobs")
                figures = self.columns.setdefault(f"{size:,} jobs", {})
                await self._size(size, figures)
            self._stop()
            if self._plan.peer:
                count = min(self._plan.burst, self._plan.sizes[-1])
                started = self._templates["started"]
                self.peer = await operator_peer.measured(self._world, started, self._plan.lives, count)
        finally:
            self._stop()
            await self._world.close()

    async def _warm_up(self) -> None:
        """One job of each kind, whose writes are the bare client's model."""
        await self._start()
        probe = self._world.hands(self._world.probe)
        self._templates = await operator_phases.templates(self._world, probe)
        await self._world.clear(probe)

    async def _size(self, size: int, figures: Figures) -> None:
        """Fills `figures` part by part: what is interrupted keeps what it has."""
        world, plan = self._world, self._plan
        probe, rush = world.hands(world.probe), world.hands(world.rush)
        count, running = min(plan.burst, size), min(size, MOST_RUNNING)
        if self._operator is None:
            await self._start()
        figures |= await operator_phases.fleet(world, self._running(), running)
        self._stop()
        await operator_phases.archive(world, self._templates, size - running - self._archived)
        self._archived = size - running
        rounds: list[Figures] = []
        for number in range(plan.rounds):
            measured = await operator_phases.bare(world, rush, self._templates["started"], count)
            measured |= await self._start()
            if number == 0:
                figures |= await operator_phases.lives(world, self._running(), probe, plan.lives)
            measured |= await operator_phases.burst(world, self._running(), rush, count)
            share = measured["burst: jobs/s"] / measured["bare client: jobs/s"]
            measured["burst: share of the bare client's rate"] = share
            rounds.append(measured)
            if number == plan.rounds - 1:
                figures |= await operator_phases.steady(world, self._running(), running, plan.steady)
            self._stop()
        figures |= together(rounds)
        figures |= await operator_phases.no_op(world)

    async def _start(self) -> Figures:
        self._operator, figures = await operator_phases.started(self._world)
        return figures

    def _running(self) -> Operator:
        assert self._operator is not None
        return self._operator

    def _stop(self) -> None:
        if self._operator:
            self._operator.stop()
        self._operator = None


def about() -> dict[str, object]:
    """The machine and the moment."""
    load = os.getloadavg()
    return {
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "machine": platform.machine(),
        "load at the end": [round(each, 1) for each in load],
        "time": time.strftime("%Y-%m-%d %H:%M:%S"),
    }


@contextlib.contextmanager
def folder(kept: Path | None) -> Iterator[Path]:
    """Where logs go."""
    if kept:
        kept.mkdir(parents=True, exist_ok=True)
        yield kept.resolve()
        return
    with tempfile.TemporaryDirectory(prefix="bench-operator-") as made:
        yield Path(made)


def measure(cluster: Cluster, place: Path, plan: Plan) -> Bench:
    """The run; what there is of it also after Ctrl-C."""
    bench = Bench(World(cluster, place), plan)
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(bench.run())
        return bench
    note("interrupted; what was measured so far:")
    return bench


def show(bench: Bench, path: Path) -> None:
    """Tables on stdout, and the files."""
    columns = {**bench.columns}
    print(table(columns))
    if bench.peer:
        print("\n" + table({"training-operator": bench.peer}))
    save(path, {**columns, **({"training-operator": bench.peer} if bench.peer else {})}, about())
    parts = [markdown(columns), *([markdown({"training-operator": bench.peer})] if bench.peer else [])]
    path.with_suffix(".md").write_text("\n\n".join(parts) + "\n")
    note(f"the same in {path} and {path.with_suffix('.md')}")


def main() -> None:
    """Starts the cluster, measures, ends everything that it started."""
    options = parser().parse_args()
    plan = plan_of(options)
    # TERM ends us as Ctrl-C does: everything is stopped on the way out.
    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
    with folder(options.keep) as place, control_plane(host_network=True) as cluster:
        bench = measure(cluster, place, plan)
    show(bench, options.json)
    sys.exit(0 if any(bench.columns.values()) else 1)


if __name__ == "__main__":
    main()
