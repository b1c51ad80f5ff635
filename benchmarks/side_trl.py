"""TRL's side of a comparison: its own trainer with its own loss, collator and metrics. Started by `trainer_vs_trl`.

Rows come tokenised, so the step that would tokenise them is left out; nothing else of TRL is changed. Settings are the
fastest that it has on a CPU: padded batches of rows grouped by length, no gradient checkpointing (its default is on).
The rows come in the order that `group_by_length` has in the limit of a large data set, which is better than what it
does on as few rows as are trained here: sorted over the whole round, cut into batches, the batches shuffled.
"""

from __future__ import annotations

import random
import statistics
import time
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
import trl

from benchmarks.cases import Case, Round, Stopwatch, read_rows, row_tokens, serve


class Timed:
    """Mixed into a trainer: seconds of its phases. Data: the batch of a step; forward_backward: its micro-batches."""

    phases: dict[str, float]

    def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        return dataset  # tokenised already

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        samples = super().get_batch_samples(*args, **kwargs)  # type: ignore[misc]
        self.phases["data"] += time.perf_counter() - start
        return samples

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        loss = super().training_step(*args, **kwargs)  # type: ignore[misc]
        self.phases["forward_backward"] += time.perf_counter() - start
        return loss


class SFT(Timed, trl.SFTTrainer):
    """Rows with input_ids and labels."""


class DPO(Timed, trl.DPOTrainer):
    """Rows with prompt_ids, chosen_ids, rejected_ids."""


class Laps(transformers.TrainerCallback):  # type: ignore[misc]
    """The stopwatch runs from the start of training to the end of the last step."""

    def __init__(self, watch: Stopwatch) -> None:
        self._watch = watch

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        """From here."""
        self._watch.start()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        """To here."""
        self._watch.lap()


class TRL:
    """One trainer for each micro-batch size that was asked for; they share the model."""

    def __init__(self, case: Case) -> None:
        self._case, self._folder = case, Path(case.folder)
        self._data = [_columns(case.stage, row) for row in read_rows(case)]
        self._tokenizer = transformers.AutoTokenizer.from_pretrained(self._folder / "model")
        dtype = torch.bfloat16 if case.precision == "BF16" else torch.float32
        load = transformers.AutoModelForCausalLM.from_pretrained
        self._model = load(self._folder / "model", dtype=dtype)
        self._reference = load(self._folder / "model", dtype=dtype) if case.stage == "Preference" else None
        self._watch = Stopwatch()

    def round(self, size: int, steps: int) -> Round:
        """One epoch of the first `steps` batches, `size` rows at a time."""
        rows = _grouped(self._data[: steps * self._case.batch], self._case.batch)
        trainer = self._trainer(size, rows)
        trainer.phases = {"data": 0.0, "forward_backward": 0.0}
        trainer.train()
        tokens = sum(row["length"] for row in rows)
        steps_logged = [line for line in trainer.state.log_history if "loss" in line]
        loss, norm = (statistics.mean(line[name] for line in steps_logged) for name in ("loss", "grad_norm"))
        return Round(self._watch.seconds, self._watch.cpu_seconds, tokens, loss, norm, trainer.phases)

    def _trainer(self, size: int, rows: list[dict[str, Any]]) -> Any:
        make, settings, further = SFT, trl.SFTConfig, {}
        if self._case.stage == "Preference":
            make, settings, further = DPO, trl.DPOConfig, {"ref_model": self._reference}
        arguments = settings(
            output_dir=str(self._folder / "trl"),
            per_device_train_batch_size=size,
            gradient_accumulation_steps=self._case.batch // size,
            num_train_epochs=1,
            max_length=self._case.max_length,
            train_sampling_strategy="sequential",
            remove_unused_columns=False,
            learning_rate=1e-5,
            lr_scheduler_type="constant",
            max_grad_norm=1.0,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            use_cpu=self._case.device == "cpu",
            bf16=self._case.precision == "BF16",
            gradient_checkpointing=False,
            dataloader_pin_memory=self._case.device != "cpu",
            disable_tqdm=True,
            seed=0,
        )
        return make(
            model=self._model,
            args=arguments,
            train_dataset=datasets.Dataset.from_list(rows),
            processing_class=self._tokenizer,
            callbacks=[Laps(self._watch)],
            **further,
        )


def _grouped(rows: list[dict[str, Any]], batch: int) -> list[dict[str, Any]]:
    ordered = sorted(rows, key=lambda row: row["longest"], reverse=True)
    batches = [ordered[start : start + batch] for start in range(0, len(ordered), batch)]
    random.Random(0).shuffle(batches)
    return [row for each in batches for row in each]


def _columns(stage: str, row: dict[str, Any]) -> dict[str, Any]:
    prompt = row["prompt"]
    facts = {"length": row_tokens(row), "longest": len(prompt) + max(map(len, row["answers"]))}
    if stage == "Preference":
        chosen, rejected = row["answers"]
        return {"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected, **facts}
    ids = prompt + row["answers"][0]
    return {"input_ids": ids, "labels": [-100] * len(prompt) + row["answers"][0], **facts}


if __name__ == "__main__":
    serve(TRL)
