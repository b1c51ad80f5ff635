"""Adapter or whole model, and what is evaluated and kept: what these fields need of others."""

from __future__ import annotations

from typing import Any

from posttrain_api.rules.types import Rule, cel_has, excludes, get, has, needs

_CEL_LORA = "(has(self.lora) || (has(self.tuning) && self.tuning == 'LoRA'))"
_CEL_CONTINUES = f"{cel_has('lora.continueAdapter')} && self.lora.continueAdapter"
_SHAPE = ("rank", "alpha", "targetModules", "rslora", "dora")
_BEST = "(has(self.keepBest) && self.keepBest)"


def _means_lora(spec: Any) -> bool:
    return has(spec, "lora") or get(spec, "tuning") == "LoRA"


def _keeps_best(evaluation: Any) -> bool:
    return get(evaluation, "keepBest") is True


TUNING_RULES: tuple[Rule, ...] = (
    Rule(
        at=("spec",),
        cel="self.stage == 'Pretrain' || has(self.lora) || has(self.tuning)",
        must="must be said outside stage Pretrain",
        instead="add lora: {rank: 16} to train an adapter, or tuning: Full to change every weight",
        field=".tuning",
        holds=lambda spec: get(spec, "stage") in ("Pretrain", None) or has(spec, "lora") or has(spec, "tuning"),
    ),
    Rule(
        at=("spec",),
        cel="!has(self.lora) || !has(self.tuning) || self.tuning == 'LoRA'",
        must="contradicts tuning: Full",
        instead="remove the lora block or write tuning: LoRA",
        field=".lora",
        forbidden=True,
        holds=lambda spec: not has(spec, "lora") or get(spec, "tuning") != "Full",
    ),
    Rule(
        at=("spec",),
        cel=f"!has(self.model.scratch) || !{_CEL_LORA}",
        must="must be Full for a model made from scratch",
        instead="remove lora and tuning: there are no weights yet that an adapter could sit on",
        field=".tuning",
        holds=lambda spec: not has(spec, "model.scratch") or not _means_lora(spec),
    ),
    Rule(
        at=("spec",),
        cel=f"!has(self.output) || !has(self.output.mergeAdapter) || !self.output.mergeAdapter || {_CEL_LORA}",
        must="needs an adapter",
        instead="remove it or train with lora: {rank: 16}",
        field=".output.mergeAdapter",
        forbidden=True,
        holds=lambda spec: get(spec, "output.mergeAdapter") is not True or _means_lora(spec),
    ),
    needs(
        "spec",
        ".lora.continueAdapter",
        f"!({_CEL_CONTINUES}) || has(self.model.fromJob)",
        lambda spec: get(spec, "lora.continueAdapter") is not True or has(spec, "model.fromJob"),
        ("needs an earlier job whose adapter is trained further", "name it in model.fromJob, or remove this"),
    ),
    excludes(
        "spec.lora",
        ".continueAdapter",
        "has(self.continueAdapter) && self.continueAdapter && ("
        + " || ".join(f"has(self.{name})" for name in _SHAPE)
        + ")",
        lambda lora: get(lora, "continueAdapter") is True and any(has(lora, name) for name in _SHAPE),
        ("goes on with an adapter that has its shape already", f"remove {', '.join(_SHAPE)}, or remove this"),
    ),
    needs(
        "spec",
        ".deepspeed.zeroStage",
        f"!({cel_has('lora.quantization')} && {cel_has('deepspeed.zeroStage')} && self.deepspeed.zeroStage == 3)",
        lambda spec: not (has(spec, "lora.quantization") and get(spec, "deepspeed.zeroStage") == 3),
        (
            "3 cannot be combined with lora.quantization: weights in 4 bits are not sharded",
            "write 2 or Auto, and no offloadParameters, or remove lora.quantization",
        ),
    ),
)

EVALUATION_RULES: tuple[Rule, ...] = (
    Rule(
        at=("spec",),
        cel="!has(self.evaluation) || !has(self.evaluation.everySteps) || has(self.data.eval)",
        must="needs rows to evaluate on",
        instead="add data.eval or remove it",
        field=".evaluation.everySteps",
        forbidden=True,
        holds=lambda spec: not has(spec, "evaluation.everySteps") or has(spec, "data.eval"),
    ),
    needs(
        "spec.evaluation",
        ".keepBest",
        f"!{_BEST} || has(self.everySteps)",
        lambda evaluation: not _keeps_best(evaluation) or has(evaluation, "everySteps"),
        ("needs more than the one evaluation at the end", "add everySteps, e.g. 100"),
    ),
    *(
        excludes(
            "spec.evaluation",
            f".{name}",
            f"has(self.{name}) && !{_BEST}",
            lambda evaluation, name=name: has(evaluation, name) and not _keeps_best(evaluation),  # type: ignore[misc]
            ("decides what is kept as the best", "add keepBest: true or remove it; every metric is reported anyway"),
        )
        for name in ("metric", "goal")
    ),
    needs(
        "spec.evaluation",
        ".goal",
        "!has(self.metric) || self.metric in ['eval_loss', 'eval_reward'] || has(self.goal)",
        lambda evaluation: get(evaluation, "metric") in (None, "eval_loss", "eval_reward") or has(evaluation, "goal"),
        ("must be said for another metric than eval_loss and eval_reward", "write goal: Maximize or goal: Minimize"),
    ),
    excludes(
        "spec.data.eval[]",
        ".weight",
        "has(self.weight)",
        lambda source: has(source, "weight"),
        ("is for training sets only", "remove it: every row is evaluated once; maxRows takes fewer"),
    ),
)
