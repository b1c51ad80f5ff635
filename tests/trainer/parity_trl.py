"""TRL's side of the parity tests: its own code, run whole: its tokenisation, its collator, its loss."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import datasets
from parity_kit import Pair, Side, gradients, text, tokenizer
from torch import Tensor

from posttrain_api.trainer import PreferenceConfig


def arguments(folder: Path, **changes: Any) -> dict[str, Any]:
    """What every configuration gets: fp32 on the CPU, no reports, no files but its own folder."""
    plain = {
        "output_dir": str(folder),
        "bf16": False,
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        "save_strategy": "no",
        "gradient_checkpointing": False,
        "per_device_train_batch_size": 8,
        "seed": 1,
    }
    return plain | changes


def pretrain(model: Any, pairs: Sequence[Pair], folder: Path, **changes: Any) -> Any:
    """SFTTrainer on documents: prompt and chosen answer, every token counted."""
    return _sft(model, [{"text": text((*each.prompt, *each.chosen))} for each in pairs], folder, changes)


def sft(model: Any, pairs: Sequence[Pair], folder: Path, **changes: Any) -> Any:
    """SFTTrainer on prompts and chosen answers; it counts the answer and its EOS. `pad`: the pad token."""
    rows = [{"prompt": text(each.prompt), "completion": text(each.chosen)} for each in pairs]
    return _sft(model, rows, folder, changes)


def _sft(model: Any, rows: list[dict[str, Any]], folder: Path, changes: dict[str, Any]) -> Any:
    from trl import SFTConfig, SFTTrainer

    data, words = datasets.Dataset.from_list(rows), tokenizer(changes.pop("pad", "<pad>"))
    args = SFTConfig(**arguments(folder, **changes))
    return SFTTrainer(model, args=args, train_dataset=data, eval_dataset=data, processing_class=words)


def dpo(model: Any, reference: Any, pairs: Sequence[Pair], folder: Path, **changes: Any) -> Any:
    """DPOTrainer with a reference model of its own; `pad`, `peft_config`: as the trainer takes them."""
    from trl import DPOConfig, DPOTrainer

    given = {
        "processing_class": tokenizer(changes.pop("pad", "<pad>")),
        "peft_config": changes.pop("peft_config", None),
    }
    args = DPOConfig(**arguments(folder, **changes))
    return DPOTrainer(model, ref_model=reference, args=args, train_dataset=_answers(pairs), **given)


def simpo(model: Any, pairs: Sequence[Pair], folder: Path) -> Any:
    """CPOTrainer with SimPO's loss, β = 2."""
    from trl.experimental.cpo import CPOConfig, CPOTrainer

    given = arguments(folder, loss_type="simpo", cpo_alpha=0.0, beta=2.0, simpo_gamma=1.0, max_length=64)
    trainer = CPOTrainer(model, args=CPOConfig(**given), train_dataset=_answers(pairs), processing_class=tokenizer())
    trainer._metrics = {"train": {}}
    return trainer


def reward(model: Any, pairs: Sequence[Pair], folder: Path, *, margin: bool, **changes: Any) -> Any:
    """RewardTrainer; the annotated margins where asked for."""
    from trl import RewardConfig, RewardTrainer

    rows = [
        {
            "chosen": text((*each.prompt, *each.chosen)),
            "rejected": text((*each.prompt, *each.rejected)),
            **({"margin": each.margin} if margin else {}),
        }
        for each in pairs
    ]
    args = RewardConfig(**arguments(folder, **changes))
    data = datasets.Dataset.from_list(rows)
    return RewardTrainer(model, args=args, train_dataset=data, processing_class=tokenizer())


def _answers(pairs: Sequence[Pair]) -> Any:
    rows = [
        {"prompt": text(each.prompt), "chosen": text(each.chosen), "rejected": text(each.rejected)} for each in pairs
    ]
    return datasets.Dataset.from_list(rows)


def batch(trainer: Any, begin: int = 0, end: int | None = None) -> dict[str, Any]:
    """These rows of the data set as the trainer's own collator gives them."""
    trainer._set_signature_columns_if_needed()
    columns = trainer._signature_columns
    rows = [{name: row[name] for name in row if name in columns} for row in trainer.train_dataset]
    collated: dict[str, Any] = trainer.data_collator(rows[begin:end])
    return collated


def side(trainer: Any, loss_of: Callable[[], Tensor]) -> Side:
    """One backward. `loss_of`: calls the trainer's own loss function."""
    trainer.model.train()
    trainer.model.zero_grad()
    loss = loss_of()
    loss.backward()
    logged = {name: float(values[-1]) for name, values in trainer._metrics["train"].items()}
    return Side(float(loss.detach()), gradients(trainer.model), logged)


def language(trainer: Any) -> Side:
    """SFTTrainer's loss of the whole data set, with its tokens as transformers' Trainer counts them."""
    inputs = batch(trainer)
    items = (inputs["labels"][:, 1:] != -100).sum()
    return side(trainer, lambda: trainer.compute_loss(trainer.model, dict(inputs), num_items_in_batch=items))


def preference(trainer: Any, losses: Sequence[str], settings: PreferenceConfig, inputs: dict[str, Any]) -> Side:
    """DPOTrainer's loss by these names, the second one weighted by `sft_weight`."""
    trainer.loss_types, trainer.loss_weights = list(losses), [1.0, settings.sft_weight][: len(losses)]
    trainer.beta, trainer.label_smoothing = settings.beta, settings.label_smoothing
    return side(trainer, lambda: trainer._compute_loss(trainer.model, inputs, return_outputs=False))
