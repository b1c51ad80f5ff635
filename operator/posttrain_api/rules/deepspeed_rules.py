"""What ZeRO, offloading and number formats need of each other, and the DeepSpeed keys that a job may not set.

The keys and what to do instead are one list (`deepspeed_keys`), one rule for each: the message then names the key.
"""

from __future__ import annotations

from typing import Any

from posttrain_api.deepspeed_keys import OWNED
from posttrain_api.rules.types import Rule, cel_has, excludes, get, has, needs
from posttrain_api.spec.deepspeed import refused_paths

_ZERO_0 = f"{cel_has('deepspeed.zeroStage')} && self.deepspeed.zeroStage == 0"
_PRECISION = cel_has("training.precision")
_ON_CPU = f"{cel_has('resources.gpusPerNode')} && self.resources.gpusPerNode == 0"
_OVERRIDES = "spec.deepspeed.overrides"


def _stage(deepspeed: Any) -> Any:
    """The number, so that true is not 1."""
    stage = get(deepspeed, "zeroStage")
    return None if isinstance(stage, bool) else stage


def _is_fp32(spec: Any) -> bool:
    precision, gpus = get(spec, "training.precision"), get(spec, "resources.gpusPerNode")
    on_cpu = gpus == 0 and not isinstance(gpus, bool)
    return bool(precision == "FP32" or (precision is None and on_cpu))


def _refused(path: str, instead: str) -> Rule:
    at, _, name = f"{_OVERRIDES}.{path}".rpartition(".")
    must = "is set by the trainer itself" if path in OWNED else "was removed from DeepSpeed"
    return excludes(at, f".{name}", f"has(self.{name})", lambda node: has(node, name), (must, instead))


DEEPSPEED_RULES: tuple[Rule, ...] = (
    needs(
        "spec",
        ".deepspeed.zeroStage",
        f"!({_ZERO_0}) || ({_PRECISION} ? self.training.precision == 'FP32' : ({_ON_CPU}))",
        lambda spec: _stage(get(spec, "deepspeed")) != 0 or _is_fp32(spec),
        (
            "0 needs FP32: without ZeRO there are no FP32 weights behind BF16 ones",
            "write training: {precision: FP32}, or choose 1, 2, 3 or Auto",
        ),
    ),
    needs(
        "spec.deepspeed",
        ".offloadOptimizer",
        "!has(self.offloadOptimizer) || !self.offloadOptimizer || !has(self.zeroStage) || self.zeroStage != 0",
        lambda deepspeed: get(deepspeed, "offloadOptimizer") is not True or _stage(deepspeed) != 0,
        ("needs ZeRO", "choose zeroStage 1, 2, 3 or Auto, or remove it"),
    ),
    needs(
        "spec.deepspeed",
        ".offloadParameters",
        "!has(self.offloadParameters) || !self.offloadParameters || (has(self.zeroStage) && self.zeroStage == 3)",
        lambda deepspeed: get(deepspeed, "offloadParameters") is not True or _stage(deepspeed) == 3,
        ("needs zeroStage 3", "write zeroStage: 3, or remove it"),
    ),
    *(_refused(path, instead) for path, instead in refused_paths().items()),
)
