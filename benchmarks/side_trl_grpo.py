"""TRL's side of the comparison of GRPO: its own trainer, which samples with transformers' `generate`. Started by
`trainer_vs_trl`.

Nothing of TRL is changed but that its phases are timed. The settings are the same as ours: one update for each rollout,
no reference, the DAPO loss, groups scaled by their deviation, and a reward that costs nothing.
"""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
import trl

from benchmarks.cases import GROUP, LUCKY, Case, Round, Stopwatch, read_rows, serve
from benchmarks.side_trl import Laps, Timed


def lucky(completions: list[str], **columns: Any) -> list[float]:
    """The same rule."""
    return [float(LUCKY in text) for text in completions]


class GRPO(Timed, trl.GRPOTrainer):
    """Prompts as text."""

    def _generate(self, *args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        made = super()._generate(*args, **kwargs)
        self.phases["rollout"] = self.phases.get("rollout", 0.0) + time.perf_counter() - start
        return made


class TRL:
    """One trainer for each micro-batch size that was asked for; they share the model."""

    def __init__(self, case: Case) -> None:
        self._case, self._folder = case, Path(case.folder)
        self._rows = [{"prompt": " ".join(map(str, row["prompt"]))} for row in read_rows(case)]
        self._tokenizer = transformers.AutoTokenizer.from_pretrained(self._folder / "model")
        self._model = transformers.AutoModelForCausalLM.from_pretrained(self._folder / "model", dtype=torch.float32)
        self._watch = Stopwatch()

    def round(self, size: int, steps: int) -> Round:
        """The first `steps` rollouts, `size` completions in a micro-batch."""
        trainer = self._trainer(size, steps)
        trainer.phases = {"data": 0.0, "forward_backward": 0.0}
        trainer.train()
        logged = [line for line in trainer.state.log_history if "loss" in line]
        loss, norm = (statistics.mean(line[name] for line in logged) for name in ("loss", "grad_norm"))
        phases = dict(trainer.phases)
        phases["forward_backward"] -= phases.get("rollout", 0.0)  # sampling is a part of its training_step
        tokens = int(logged[-1]["num_tokens"])
        return Round(self._watch.seconds, self._watch.cpu_seconds, tokens, loss, norm, phases)

    def _trainer(self, size: int, steps: int) -> Any:
        case = self._case
        arguments = trl.GRPOConfig(
            output_dir=str(self._folder / "trl"),
            per_device_train_batch_size=size,
            gradient_accumulation_steps=case.batch * GROUP // size,
            generation_batch_size=case.batch * GROUP,
            num_generations=GROUP,
            max_completion_length=case.answer,
            max_steps=steps,
            beta=0.0,
            loss_type="dapo",
            scale_rewards="group",
            learning_rate=1e-5,
            lr_scheduler_type="constant",
            max_grad_norm=1.0,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            dataloader_pin_memory=False,
            disable_tqdm=True,
            seed=0,
        )
        return GRPO(
            model=self._model,
            reward_funcs=[lucky],
            args=arguments,
            train_dataset=datasets.Dataset.from_list(self._rows[: steps * case.batch]),
            processing_class=self._tokenizer,
            callbacks=[Laps(self._watch)],
        )


if __name__ == "__main__":
    serve(TRL)
