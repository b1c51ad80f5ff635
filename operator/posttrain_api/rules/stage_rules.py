"""Which field means something in which stage, and what the preference losses need of each other's fields.

A block of another stage or algorithm is refused, never ignored: a job that says something must get it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from posttrain_api.rules.types import Rule, cel_has, excludes, get, has, needs

PAIRED = ("RewardModel", "Preference")
PROMPTED = ("SFT", *PAIRED, "RL")
COMPARED = ("Preference", "RL")
SMOOTHED = ("DPO", "RobustDPO")


def _only(stages: tuple[str, ...], field: str, instead: str, values: tuple[str, ...] = ()) -> Rule:
    """The field, or one of its values, is for these stages only."""
    listed, cel_there = ", ".join(f"'{stage}'" for stage in stages), cel_has(field)
    if values:
        cel_there += f" && self.{field} in [{', '.join(repr(value) for value in values)}]"
    words = ("stage " + stages[0]) if len(stages) == 1 else "stages " + " and ".join(stages)
    return Rule(
        at=("spec",),
        cel=f"self.stage in [{listed}] || !({cel_there})",
        must=f"is for {words} only",
        instead=instead,
        field=f".{field}",
        forbidden=True,
        holds=lambda spec: get(spec, "stage") in (*stages, None) or not _says(spec, field, values),
    )


def _says(spec: Any, field: str, values: tuple[str, ...]) -> bool:
    return get(spec, field) in values if values else has(spec, field)


STAGE_RULES: tuple[Rule, ...] = (
    _only(("Pretrain",), "model.scratch", "start from model.uri or model.fromJob"),
    _only(
        ("Pretrain",), "data.tooLong", "write Skip, Truncate or Fail: an answer cut in two has no prompt", ("Split",)
    ),
    _only(
        ("SFT",),
        "data.lossOn",
        "leave it out: pre-training learns every token, the other stages their answers",
        ("Completion", "Assistant"),
    ),
    _only(("Pretrain", "SFT"), "data.lossOn", "leave it out: the answers count", ("All",)),
    _only(PROMPTED, "model.chatTemplate", "leave it out: pre-training reads plain text"),
    _only(PROMPTED, "data.maxPromptLength", "leave it out: a plain text has no prompt"),
    excludes(
        "spec.data",
        ".maxPromptLength",
        "has(self.maxPromptLength) && has(self.lossOn) && self.lossOn in ['Assistant', 'All']",
        lambda data: has(data, "maxPromptLength") and get(data, "lossOn") in ("Assistant", "All"),
        ("means nothing with lossOn Assistant or All", "remove it: no prompt is set apart there, maxLength holds"),
    ),
    _only(COMPARED, "algorithm", "remove it: the stage has one loss"),
    _only(("Preference",), "preference", "remove it, or write stage: Preference"),
    _only(COMPARED, "reference", "remove it: nothing is compared with another model here"),
    _only(("RewardModel",), "rewardModel", "remove it, or write stage: RewardModel"),
    _only(
        ("Pretrain", "SFT", *PAIRED),
        "data.tooLong",
        "write Skip or Fail: a prompt cut short asks something else",
        ("Truncate",),
    ),
    *(
        _only(("RL",), field, "remove it, or write stage: RL")
        for field in ("rewards", "rollout", "grpo", "ppo", "rloo", "critic")
    ),
)


def _algorithm(spec: Any) -> Any:
    return "DPO" if get(spec, "algorithm") is None else get(spec, "algorithm")


def _smooths(spec: Any) -> bool:
    share = get(spec, "preference.labelSmoothing")
    return share is not None and (not _number(share) or share > 0)


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _of_algorithms(names: tuple[str, ...], field: str, instead: str) -> Rule:
    """The field is for these algorithms only."""
    listed = ", ".join(f"'{name}'" for name in names)
    said = f"has(self.algorithm) && self.algorithm in [{listed}]"
    default = "!has(self.algorithm) || " if "DPO" in names else ""
    return excludes(
        "spec",
        f".{field}",
        f"{cel_has(field)} && !({default}({said}))",
        lambda spec: has(spec, field) and _algorithm(spec) not in names,
        (f"is for algorithm {' and '.join(names)} only", instead),
    )


def _not_simpo(field: str, cel_there: str, there: Callable[[Any], bool]) -> Rule:
    return excludes(
        "spec",
        field,
        f"has(self.algorithm) && self.algorithm == 'SimPO' && {cel_there}",
        lambda spec: get(spec, "algorithm") == "SimPO" and there(spec),
        ("means nothing with SimPO", "remove it: SimPO compares with no reference"),
    )


PREFERENCE_RULES: tuple[Rule, ...] = (
    needs(
        "spec",
        ".preference.labelSmoothing",
        "!has(self.algorithm) || self.algorithm != 'RobustDPO' || "
        f"({cel_has('preference.labelSmoothing')} && self.preference.labelSmoothing > 0.0)",
        lambda spec: get(spec, "algorithm") != "RobustDPO" or _smooths(spec),
        ("must be more than 0 for RobustDPO", "write the share of pairs that are swapped, e.g. 0.1"),
    ),
    # A rule and no bound: the API server cuts a fractional bound to a whole number when the value is one.
    needs(
        "spec.preference",
        ".labelSmoothing",
        "!has(self.labelSmoothing) || self.labelSmoothing < 0.5",
        lambda preference: not _number(get(preference, "labelSmoothing")) or preference["labelSmoothing"] < 0.5,
        ("must be less than 0.5", "choose e.g. 0.1: from half on, the pairs say nothing or the contrary"),
    ),
    _of_algorithms(SMOOTHED, "preference.labelSmoothing", "remove it, or choose DPO (cDPO) or RobustDPO"),
    _of_algorithms(("SimPO",), "preference.gammaBetaRatio", "remove it, or write algorithm: SimPO"),
    _not_simpo(".reference", "has(self.reference)", lambda spec: has(spec, "reference")),
    _not_simpo(
        ".preference.cacheReference",
        f"{cel_has('preference.cacheReference')} && self.preference.cacheReference",
        lambda spec: get(spec, "preference.cacheReference") is True,
    ),
)
