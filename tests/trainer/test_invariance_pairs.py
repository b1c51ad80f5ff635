"""The law of the trainer for rows of two sequences: the same global batch gives the same update and the same
evaluation, however it is cut, packed, sharded or spread, and wherever the reference's log-probabilities come from.

At most twelve cells a stage, chosen so that any two settings meet: ranks × ZeRO stage × split × padded or packed × full
or LoRA × reference. In fp32 under SGD without clipping, each against plain torch written out here, one pair after the
other: loss, gradient norm and evaluation to 1e-6, the update to 1e-5 of its length.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch.nn.functional import logsigmoid
from trainer_kit import Shape, call, make_config, make_model, make_reward_model, pairs, prepare, run_ranks

from posttrain_trainer.lora import add_adapter
from posttrain_trainer.sampler import Sampler

STEPS, BATCH, RATE, ROWS = 2, 5, 0.2, 14
SPLITS = {"whole": 10**6, "cut": 90, "single": 1}
LORA = {"rank": 4, "alpha": 8.0, "dropout": 0.0, "target_modules": ["all-linear"]}
BETA, SMOOTHING, SFT, RATIO, CENTERING = 0.2, 0.1, 0.3, 0.4, 0.05
TRAIN, HELD_OUT = (pairs(count, seed, longest=16, margins=True) for count, seed in ((ROWS, 5), (5, 6)))
"""Short answers: a sum of 80 nats has a spacing of 8e-6 in fp32, and a difference of two such sums no digits to
spare."""

# ranks, ZeRO stage, split, layout, tuning, loss, reference
PREFERENCE = [
    (1, 0, "whole", "padded", "Full", "DPO", "frozen"),
    (1, 1, "cut", "packed", "Full", "DPO", "cached"),
    (1, 2, "single", "padded", "LoRA", "DPO", "off"),
    (1, 3, "cut", "packed", "Full", "DPO", "frozen"),
    (1, 0, "cut", "packed", "LoRA", "IPO", "off"),
    (1, 3, "whole", "padded", "LoRA", "DPO", "other"),
    (2, 0, "single", "packed", "LoRA", "DPO", "cached"),
    (2, 1, "whole", "padded", "LoRA", "DPO", "off"),
    (2, 2, "cut", "packed", "Full", "DPO", "other"),
    (2, 3, "cut", "padded", "LoRA", "DPO", "off"),
    (2, 3, "single", "padded", "Full", "IPO", "cached"),
    (2, 2, "whole", "packed", "Full", "SimPO", "none"),
]
REWARD = [
    (1, 0, "whole", "packed", "Full", "Reward", "none"),
    (1, 1, "cut", "padded", "LoRA", "Reward", "none"),
    (1, 2, "single", "packed", "Full", "Reward", "none"),
    (1, 3, "cut", "padded", "Full", "Reward", "none"),
    (2, 0, "cut", "padded", "Full", "Reward", "none"),
    (2, 1, "single", "padded", "Full", "Reward", "none"),
    (2, 2, "whole", "padded", "LoRA", "Reward", "none"),
    (2, 3, "cut", "packed", "LoRA", "Reward", "none"),
    (2, 3, "single", "packed", "Full", "Reward", "none"),
]
CELLS = {"-".join([loss, tuning, f"z{zero}", split, layout, reference, f"r{ranks}"]): cell
         for cell in [*PREFERENCE, *REWARD]
         for ranks, zero, split, layout, tuning, loss, reference in [cell]}  # fmt: skip


def _make(root: Path, name: str) -> None:
    ranks, zero, split, layout, tuning, loss, reference = CELLS[name]
    folder = root / name
    folder.mkdir()
    reward = loss == "Reward"
    changes: dict[str, Any] = {"lora": LORA} if tuning == "LoRA" else {}
    if reference == "other":
        changes["reference"] = {"source": {"uri": "pvc://models/other", "path": str(root / "other")}}
    if not reward:
        changes |= {"algorithm": loss, "preference__label_smoothing": SMOOTHING if loss == "DPO" else 0.0}
    config = make_config(
        folder,
        stage="RewardModel" if reward else "Preference",
        tuning=tuning,
        zero_stage=zero,
        preference__beta=BETA,
        preference__sft_weight=SFT if loss == "DPO" else 0.0,
        preference__gamma_beta_ratio=RATIO,
        preference__cache_reference=reference == "cached",
        reward_model__centering=CENTERING,
        evaluation__every_steps=1,
        topology__processes_per_node=ranks,
        training__max_steps=STEPS,
        training__batch_size=BATCH,
        training__tokens_per_micro_batch=SPLITS[split],
        training__max_grad_norm=0.0,
        training__learning_rate=RATE,
        training__schedule="Constant",
        training__warmup_steps=0,
        **changes,
    )
    model = root / ("reward" if reward else "model")
    given = {"reference_dir": str(root / "other"), "reference_digest": "sha256:other"} if reference == "other" else {}
    prepare(config, TRAIN, HELD_OUT, model_dir=str(model), tokenizer_dir=str(model), **given)
    (folder / "max_logits").write_text(str(2**26))
    if layout == "packed":
        (folder / "packed").touch()


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders of all cells; each number of ranks is one process group that trains all of its own."""
    torch.set_num_threads(1)  # the machine is shared with the ranks
    root = tmp_path_factory.mktemp("pairs")
    make_model(root / "model", Shape(attention_dropout=0.2))  # switched off by the stage
    make_model(root / "other", seed=4)
    make_reward_model(root / "reward")
    for name in CELLS:
        _make(root, name)
    for ranks in (1, 2):
        names = [name for name, cell in CELLS.items() if cell[0] == ranks]
        run_ranks(call, ("cells", str(root), names, str(root / "done")), ranks, root / f"logs-{ranks}")
    return root


class Plain:
    """Plain torch: no engine, no micro-batches, one sequence after the other."""

    def __init__(self, root: Path, tuning: str, loss: str, reference: str) -> None:
        auto = (
            transformers.AutoModelForSequenceClassification if loss == "Reward" else transformers.AutoModelForCausalLM
        )
        self.loss = loss
        folder = root / ("reward" if loss == "Reward" else "model")
        model = auto.from_pretrained(folder, dtype=torch.float32).eval()
        if tuning == "LoRA":
            config = make_config(root, tuning="LoRA", lora=LORA)
            assert config.lora is not None
            model = add_adapter(model, config.lora, config.training.seed, scores=loss == "Reward").eval()
        self.model = model
        other = root / ("other" if reference == "other" else "model")
        self.reference = None if reference == "none" else auto.from_pretrained(other, dtype=torch.float32).eval()
        self.learning = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.start = {name: p.detach().clone() for name, p in self.learning.items()}

    def train(self) -> list[dict[str, float]]:
        sampler = Sampler(ROWS, BATCH, STEPS * BATCH, seed=7)
        lines = []
        for step in range(STEPS):
            loss = self.mean([TRAIN[row] for row in sampler.rows(step)])
            self.model.zero_grad()
            loss.backward()
            norm = torch.sqrt(sum((p.grad.double() ** 2).sum() for p in self.learning.values()))
            with torch.no_grad():
                for parameter in self.learning.values():
                    parameter -= RATE * parameter.grad
                held_out = float(self.mean(HELD_OUT))
            lines.append({"loss": float(loss.detach()), "grad_norm": float(norm), "eval_loss": held_out})
        return lines

    def mean(self, rows: list[Any]) -> torch.Tensor:
        total = sum(self.pair(*row) for row in rows) / len(rows)
        if self.loss != "DPO":
            return total
        chosen = [token_logps(self.model, row[0]) for row in rows]
        return total - SFT * sum(each.sum() for each in chosen) / sum(len(each) for each in chosen)

    def pair(self, chosen: Any, rejected: Any, margin: float) -> torch.Tensor:
        if self.loss == "Reward":
            good, bad = score(self.model, chosen), score(self.model, rejected)
            return -logsigmoid(good - bad - margin) + CENTERING * (good + bad) ** 2
        good, bad = token_logps(self.model, chosen), token_logps(self.model, rejected)
        if self.loss == "SimPO":
            return -logsigmoid(BETA * (good.mean() - bad.mean() - RATIO))
        good = good - token_logps(self.reference, chosen).detach()
        bad = bad - token_logps(self.reference, rejected).detach()
        if self.loss == "IPO":
            return (good.mean() - bad.mean() - 1 / (2 * BETA)) ** 2
        delta = BETA * (good.sum() - bad.sum())
        return -(1 - SMOOTHING) * logsigmoid(delta) - SMOOTHING * logsigmoid(-delta)


def token_logps(model: Any, example: tuple[list[int], list[int]]) -> torch.Tensor:
    """log p of the counted tokens; fp32, but added up in float64."""
    tokens, mask = torch.tensor(example[0]), torch.tensor(example[1], dtype=torch.bool)
    log_probs = model(input_ids=tokens[None], use_cache=False).logits[0, :-1].log_softmax(-1)
    return log_probs.gather(1, tokens[1:, None])[:, 0][mask[1:]].double()


def score(model: Any, example: tuple[list[int], list[int]]) -> torch.Tensor:
    inner = getattr(model, "get_base_model", lambda: model)()
    hidden = inner.base_model(input_ids=torch.tensor(example[0])[None], use_cache=False).last_hidden_state
    return inner.score(hidden[0, -1])[0]


@pytest.fixture(scope="module")
def by_hand(runs: Path) -> dict[Any, tuple[Plain, list[dict[str, float]]]]:
    found = {}
    for cell in CELLS.values():
        key = (*cell[4:6], "model" if cell[6] in ("off", "frozen", "cached") else cell[6])
        if key not in found:
            plain = Plain(runs, *key)
            found[key] = (plain, plain.train())
    return found


@pytest.mark.parametrize("name", CELLS)
def test_update_depends_on_the_global_batch_only(runs: Path, by_hand: dict[Any, Any], name: str) -> None:
    cell = CELLS[name]
    plain, expected = by_hand[(*cell[4:6], "model" if cell[6] in ("off", "frozen", "cached") else cell[6])]
    lines = json.loads((runs / name / "lines.json").read_text())
    assert len(lines) == STEPS
    for ours, theirs in zip(lines, expected, strict=True):
        for metric, value in theirs.items():
            assert ours[metric] == pytest.approx(value, rel=1e-6), metric
    weights = {key.removeprefix("lm."): value for key, value in torch.load(runs / name / "weights.pt").items()}
    difference, length = 0.0, 0.0
    for key, end in plain.learning.items():
        difference += float(((weights[key] - end.detach()).double() ** 2).sum())
        length += float(((end.detach() - plain.start[key]).double() ** 2).sum())
    assert (difference / length) ** 0.5 <= 1e-5
