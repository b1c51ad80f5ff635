"""What the engine is compared with: plain torch, one row after the other, no micro-batches, no sharding; and adapters
that jobs start from, as plain peft makes and merges them."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from model_jobs import export_all
from trainer_kit import make_model, start_ranks

from posttrain_api.trainer import TrainerConfig
from posttrain_trainer.model_files import CONFIG, digest_of, weight_files
from posttrain_trainer.sampler import Sampler
from posttrain_trainer.tokenset import TokenSet

SGD = {
    "training__learning_rate": 0.2,
    "training__schedule": "Constant",
    "training__warmup_steps": 0,
    "training__max_grad_norm": 0.0,
    "training__max_steps": 2,
    "training__batch_size": 7,
    "training__tokens_per_micro_batch": 70,
}
"""Two steps without anything that could hide a wrong scale of the loss."""


@dataclass(frozen=True)
class Run:
    """Loss and gradient norm of each step; the learning weights before and after."""

    lines: list[dict[str, float]]
    start: dict[str, torch.Tensor]
    end: dict[str, torch.Tensor]


def train_all(root: Path, cells: Iterable[str], ranks: int, probe: bool = False) -> None:
    """Trains and exports the jobs `root`/<cell> under SGD in one process group; with `probe`, asks each about the rows
    in `root`/probe."""
    asked = str(root / "probe") if probe else ""
    running = start_ranks(export_all, ([str(root / cell) for cell in cells], asked, True), ranks, root / "logs")
    codes = running.wait(280)
    assert codes == [0] * ranks, running.output()


def plain_sgd(model: Any, config: TrainerConfig) -> Run:
    """Language modelling with the rows and the order of the job's sampler. One thread: more only wait for each other on
    a shared machine."""
    torch.set_num_threads(1)
    tokens = TokenSet(Path(config.run_dir) / "prepared" / "train")
    steps, batch = config.training.max_steps or 0, config.training.batch_size
    sampler = Sampler(len(tokens), batch, steps * batch, config.training.seed)
    learning = {name: each for name, each in model.named_parameters() if each.requires_grad}
    start = {name: each.detach().clone() for name, each in learning.items()}
    lines = []
    for step in range(steps):
        lines.append(_step(model, [tokens[int(row)].examples[0] for row in sampler.rows(step)]))
        for each in learning.values():
            each.data -= config.training.learning_rate * each.grad
    return Run(lines, start, {name: each.detach() for name, each in learning.items()})


def _step(model: Any, examples: list[Any]) -> dict[str, float]:
    model.zero_grad()
    losses = []
    for example in examples:
        ids = torch.tensor(example.tokens.astype("int64"))[None]
        logp = model(input_ids=ids, use_cache=False).logits[0, :-1].log_softmax(-1)
        counted = torch.tensor(example.mask[1:].astype("float32"))
        losses.append(-(logp.gather(1, ids[0, 1:, None])[:, 0] * counted).sum())
    loss = sum(losses) / sum(int(example.mask[1:].sum()) for example in examples)
    loss.backward()
    squares = [(each.grad.double() ** 2).sum() for each in model.parameters() if each.requires_grad]
    return {"loss": float(loss.detach()), "grad_norm": float(sum(squares) ** 0.5)}


def assert_same(folder: Path, expected: Run) -> None:
    """Loss and unclipped norm to 1e-6, the update to 1e-5 of its length: fp32 sums in another order differ by less."""
    for ours, theirs in zip(json.loads((folder / "lines.json").read_text()), expected.lines, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-6)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-6)
    assert distance(folder, expected) <= 1e-5


def distance(folder: Path, expected: Run) -> float:
    """‖ours − theirs‖ / ‖update‖ over all learning weights."""
    weights = {name.removeprefix("lm."): each for name, each in torch.load(folder / "weights.pt").items()}
    assert set(expected.end) <= set(weights)
    pairs = [(weights[name].double() - end, end.double() - expected.start[name]) for name, end in expected.end.items()]
    off, length = (sum(float((pair[which] ** 2).sum()) for pair in pairs) for which in (0, 1))
    assert length > 0
    return (off / length) ** 0.5


def causal(folder: Path) -> Any:
    """The model in the folder as plain transformers loads it."""
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def logp_of_rows(model: Any, probe: Path) -> torch.Tensor:
    """log p of the counted tokens of all rows in the folder, as plain transformers computes them."""
    found = []
    for example in [row.examples[0] for row in TokenSet(probe)]:
        ids = torch.tensor(example.tokens.astype("int64"))[None]
        logp = model(input_ids=ids, use_cache=False).logits[0, :-1].log_softmax(-1)
        found.append(logp.gather(1, ids[0, 1:, None])[:, 0][torch.tensor(example.mask[1:].astype(bool))])
    return torch.cat(found)


def make_adapter(folder: Path, model: Path, seed: int = 5, **settings: Any) -> None:
    """An adapter whose B is not zero, as peft saves it."""
    given = {"r": 3, "lora_alpha": 6, "target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM", **settings}
    kind = transformers.AutoModelForSequenceClassification if given["task_type"] == "SEQ_CLS" else None
    options = {"num_labels": 1} if kind else {}
    base = (kind or transformers.AutoModelForCausalLM).from_pretrained(model, dtype=torch.float32, **options)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        adapted = peft.get_peft_model(base, peft.LoraConfig(**given))
        for name, each in adapted.named_parameters():
            if "lora_B" in name or "score.modules_to_save" in name:
                torch.nn.init.normal_(each, std=0.05)
    adapted.save_pretrained(folder)


def make_chain(root: Path) -> list[Path]:
    """Two of different kinds; the second was trained on top of the first."""
    make_adapter(root / "first", root / "model", seed=5, use_rslora=True)
    make_adapter(root / "second", root / "model", seed=6, r=2, target_modules="all-linear", use_dora=True)
    return [root / "first", root / "second"]


def on_chain(root: Path, chain: list[Path]) -> dict[str, Any]:
    """`model` of a job's configuration."""
    sources = [{"uri": f"pvc://runs/{folder.name}", "path": str(folder)} for folder in chain]
    return {"source": {"uri": "pvc://models/tiny", "path": str(root / "model")}, "adapters": sources}


def merged_by_hand(root: Path, order: list[str]) -> Any:
    """peft's own merge of one adapter after the other, which leaves the model frozen."""
    model = causal(root / "model")
    for name in order:
        model = peft.PeftModel.from_pretrained(model, root / name).merge_and_unload()
    return model.requires_grad_(True)


def model_digest(folder: Path) -> str:
    return digest_of([folder / CONFIG, *weight_files(folder, "model")])


def check_unchanged(root: Path, again: Path) -> None:
    """Base and adapters of a chain in `root` are what `make_model` and `make_chain` make; `again`: an empty folder."""
    make_model(again / "model")
    make_chain(again)
    for name in ("model", "first", "second"):
        for file in (root / name).glob("*.safetensors"):
            assert file.read_bytes() == (again / name / file.name).read_bytes()
