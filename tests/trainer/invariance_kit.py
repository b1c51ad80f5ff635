"""Cells of the invariance law for language modelling: how one is trained by the engine and by plain torch, and how the
two are compared. A cell's name says what it is: `<kind>-z<stage>-<split>`, then `chunked` or `packed`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from trainer_kit import Shape, call, make_config, make_model, prepare, rows, run_ranks

from posttrain_trainer.lora import add_adapter
from posttrain_trainer.sampler import Sampler
from posttrain_trainer.tokenset import TokenSet

STEPS, BATCH, RATE, ROWS = 2, 7, 0.2, 40
SPLITS = {"whole": 10**6, "cut": 70, "single": 1}
LORA = {"rank": 4, "alpha": 8.0, "dropout": 0.0, "target_modules": ["all-linear"]}
CLIP = 0.5
"""Below the norms of all steps, which are above 1."""
ADAM_RATE, DECAY, BETAS, EPSILON = 0.01, 0.5, (0.8, 0.7), 1e-3
"""A large epsilon, because AdamW makes whole steps of gradients that are rounding errors without it."""

_SGD = {"training__learning_rate": RATE, "training__schedule": "Constant", "training__warmup_steps": 0}
_ADAMW = {
    "training__learning_rate": ADAM_RATE,
    "training__schedule": "Linear",
    "training__warmup_steps": 1,
    "training__weight_decay": DECAY,
    "training__beta1": BETAS[0],
    "training__beta2": BETAS[1],
    "training__epsilon": EPSILON,
}


def _make(root: Path, name: str) -> None:
    kind, zero, split, *more = name.split("-")
    folder = root / name
    folder.mkdir()
    config = make_config(
        folder,
        tuning="LoRA" if kind == "LoRA" else "Full",
        **({"lora": LORA} if kind == "LoRA" else {}),
        zero_stage=int(zero[1]),
        training__max_steps=STEPS,
        training__batch_size=BATCH,
        training__tokens_per_micro_batch=SPLITS[split],
        training__max_grad_norm=CLIP if kind == "Clipped" else 0.0,
        **(_ADAMW if kind == "AdamW" else _SGD),
    )
    model = root / ("tied" if kind == "Tied" else "model")
    prepare(config, rows(ROWS), model_dir=str(model), tokenizer_dir=str(model))
    (folder / "max_logits").write_text("400" if "chunked" in more else str(2**26))  # 400: six rows of logits
    if "packed" in more:
        (folder / "packed").touch()


def train(root: Path, names: Sequence[str], ranks: int) -> None:
    """All cells in one process group; each leaves lines.json and weights.pt in its folder."""
    torch.set_num_threads(1)  # the machine is shared with the ranks
    make_model(root / "model")
    make_model(root / "tied", Shape(tied=True))
    for name in names:
        _make(root, name)
    run_ranks(call, ("cells", str(root), list(names), str(root / "done")), ranks, root)


def runs_of(names: Sequence[str]) -> Any:
    """A fixture: the folder of all cells, for one rank and for two; each number of ranks is one process group that
    trains them all."""

    @pytest.fixture(scope="module", params=[1, 2])
    def runs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
        root = tmp_path_factory.mktemp(f"ranks{request.param}")
        train(root, names, request.param)
        return root

    return runs


def plain(root: Path, kind: str) -> dict[str, Any]:
    """Plain torch: no engine, no micro-batches, one row after the other."""
    folder = root / ("tied" if kind == "Tied" else "model")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if kind == "LoRA":
        config = make_config(root, tuning="LoRA", lora=LORA)
        assert config.lora is not None
        model = add_adapter(model, config.lora, config.training.seed)
    tokens = TokenSet(next(root.glob("Full-*")) / "prepared" / "train")
    sampler = Sampler(ROWS, BATCH, STEPS * BATCH, seed=7)
    learning = {name: p for name, p in model.named_parameters() if p.requires_grad}
    start = {name: p.detach().clone() for name, p in learning.items()}
    adamw = torch.optim.AdamW(
        [
            {"params": [p for name, p in learning.items() if "norm" not in name], "weight_decay": DECAY},
            {"params": [p for name, p in learning.items() if "norm" in name], "weight_decay": 0.0},
        ],
        betas=BETAS,
        eps=EPSILON,
    )
    lines = []
    for step in range(STEPS):
        examples = [tokens[int(row)].examples[0] for row in sampler.rows(step)]
        weight = sum(int(example.mask.sum()) for example in examples)
        loss = sum(_nll(model, example) for example in examples) / weight
        model.zero_grad()
        loss.backward()
        norm = torch.sqrt(sum((p.grad.double() ** 2).sum() for p in learning.values()))
        lines.append({"loss": float(loss.detach()), "grad_norm": float(norm)})
        if kind == "Clipped":
            assert norm > 2 * CLIP
            torch.nn.utils.clip_grad_norm_(learning.values(), CLIP)
        if kind == "AdamW":
            for group in adamw.param_groups:
                group["lr"] = ADAM_RATE * (step + 1) / 2  # warm-up over one step, then the top
            adamw.step()
            continue
        with torch.no_grad():
            for parameter in learning.values():
                parameter -= RATE * parameter.grad
    return {"lines": lines, "start": start, "end": {name: p.detach() for name, p in learning.items()}}


def _nll(model: Any, example: Any) -> torch.Tensor:
    ids = torch.tensor(example.tokens.astype("int64"))[None]
    logits = model(input_ids=ids, use_cache=False).logits[0, :-1]
    each = torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none")
    return (each * torch.tensor(example.mask[1:].astype("float32"))).sum()


def compare(folder: Path, reference: dict[str, Any]) -> None:
    """Loss and gradient norm to 1e-6, the update to 1e-5 of its length."""
    lines = json.loads((folder / "lines.json").read_text())
    assert len(lines) == STEPS
    for ours, theirs in zip(lines, reference["lines"], strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-6)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-6)
    weights = {key.removeprefix("lm."): value for key, value in torch.load(folder / "weights.pt").items()}
    difference, length = 0.0, 0.0
    for key, end in reference["end"].items():
        difference += float(((weights[key] - end).double() ** 2).sum())
        length += float(((end - reference["start"][key]).double() ** 2).sum())
    assert (difference / length) ** 0.5 <= 1e-5
