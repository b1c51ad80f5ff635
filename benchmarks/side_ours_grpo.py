"""Our side of the comparison of GRPO: a job's own parts and loop, rollouts included. Started by `trainer_vs_trl`."""

from __future__ import annotations

import json
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.cases import GROUP, LUCKY, Case, Round, Stopwatch, read_rows, serve
from benchmarks.side_ours import assembled, configuration, prepared_as
from posttrain_api.trainer import TrainerConfig
from posttrain_trainer import packing
from posttrain_trainer.assemble import course_of
from posttrain_trainer.loop import Loop
from posttrain_trainer.online import Collector
from posttrain_trainer.sampler import Sampler
from posttrain_trainer.state import State
from posttrain_trainer.tokenset import Example, TokenSetWriter


def online(case: Case) -> TrainerConfig:
    """One update for each rollout, no reference, the reward a pattern."""
    wire = configuration(case).to_wire()
    return TrainerConfig.model_validate(
        {
            **wire,
            "algorithm": "GRPO",
            "rollout": {"engine": "Generate", "batchSize": case.batch, "maxNewTokens": case.answer},
            "rewards": [{"name": "lucky", "regex": {"pattern": LUCKY}}],
            "grpo": {"groupSize": GROUP},
        }
    )


def write_prompts(case: Case, folder: Path) -> None:
    """The rows' prompts, as `prepare` writes them."""
    with TokenSetWriter(folder, records=True) as writer:
        for row in read_rows(case):
            tokens = np.array(row["prompt"], dtype=np.int32)
            writer.append(Example(tokens, np.zeros(len(tokens), dtype=np.uint8)), record=json.dumps({}))


class Ours:
    """The assembled parts; a round starts the loop from step 0 with the weights of the round before."""

    def __init__(self, case: Case) -> None:
        packing.PACKED = case.packed
        self.config = config = online(case)
        folder = Path(config.run_dir) / "train"
        write_prompts(case, folder)
        here = prepared_as(case, config, folder).model_copy(update={"stop_tokens": (1,)})
        self._job, self.parts, self._resolved = assembled(config, here, self)
        self._watch, self.lines = Stopwatch(), list[dict[str, float]]()

    def observe(self, metrics: dict[str, float], step: int) -> None:
        """After each step."""
        self._watch.lap()
        self.lines.append(dict(metrics))

    def round(self, size: int, steps: int) -> Round:
        """The first `steps` rollouts and their updates, micro-batches of `size` tokens."""
        collector: Any = self.parts.feed
        assert isinstance(collector, Collector)
        batch = self.config.rollout.batch_size
        sampler = Sampler(len(collector.groups.drawer.prompts), batch, steps * batch, 0)
        part = replace(collector.scores.part, budget=size)
        feed = replace(
            collector,
            groups=replace(collector.groups, sampler=sampler),
            scores=replace(collector.scores, part=part),
        )
        course = course_of(self.config, self._resolved.model_copy(update={"total_steps": steps}))
        self.lines.clear()
        self._watch.start()
        assert Loop(replace(self.parts, feed=feed), course, self._job.runtime, State()).run()
        names = {name for line in self.lines for name in line if name.startswith("time/")}
        phases = {name.removeprefix("time/"): sum(line.get(name, 0.0) for line in self.lines) for name in sorted(names)}
        loss, norm = (statistics.mean(line[name] for line in self.lines) for name in ("loss", "grad_norm"))
        tokens = int(self.lines[-1]["num_tokens"])
        return Round(self._watch.seconds, self._watch.cpu_seconds, tokens, loss, norm, phases)


if __name__ == "__main__":
    serve(Ours)
