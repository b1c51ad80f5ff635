"""What a reward must be: one kind, a name of its own, bounds that leave something, an address that can be called."""

from __future__ import annotations

from collections import Counter
from typing import Any

from posttrain_api.rules.types import Rule, cel_matches, excludes, get, has, matches, needs, one_of, whole
from posttrain_api.spec.rewards import KINDS

_HOST = r"[A-Za-z0-9](?:[-A-Za-z0-9.]{0,251}[A-Za-z0-9])?"
HTTP = rf"https?://(?:{_HOST}|\[[0-9A-Fa-f:.]{{2,45}}\])(?::[0-9]{{1,5}})?(?:[/?][^#\x00-\x20\x7f]*)?"
"""A host, perhaps a port, a path and a query; no user, no password, no fragment."""


def _names_differ(rewards: Any) -> bool:
    if not isinstance(rewards, list):
        return True
    names = [name for reward in rewards if isinstance(name := get(reward, "name"), str)]
    return not names or max(Counter(names).values()) == 1


def _bounds_fit(length: Any) -> bool:
    if not (has(length, "minTokens") or has(length, "maxTokens")):
        return False
    low, high = whole(length, "minTokens", 0), whole(length, "maxTokens", -1)
    return low is None or high is None or high == -1 or low <= high


def _not_scored_by_itself(root: Any) -> bool:
    rewards, own = get(root, "spec.rewards"), get(root, "metadata.name")
    named = [get(reward, "model.fromJob.name") for reward in rewards] if isinstance(rewards, list) else []
    return own is None or own not in named


REWARD_RULES: tuple[Rule, ...] = (
    one_of("spec.rewards[]", KINDS, "keep one kind; another reward is another item of the list"),
    one_of("spec.rewards[].model", ("uri", "fromJob"), "keep the one that scores"),
    Rule(
        at=("spec.rewards",),
        cel="self.all(one, !has(one.name) || self.exists_one(other, has(other.name) && other.name == one.name))",
        must="must not have two rewards of one name",
        instead="give each a name of its own, or none",
        holds=_names_differ,
    ),
    excludes(
        "spec.rewards[]",
        ".timeoutSeconds",
        "has(self.timeoutSeconds) && (has(self.model) || has(self.length))",
        lambda reward: has(reward, "timeoutSeconds") and (has(reward, "model") or has(reward, "length")),
        ("means nothing for model and length", "remove it: these are computed with the step, not called"),
    ),
    needs(
        "spec.rewards[].length",
        "",
        "(has(self.minTokens) || has(self.maxTokens)) && "
        "(!has(self.minTokens) || !has(self.maxTokens) || self.minTokens <= self.maxTokens)",
        _bounds_fit,
        ("needs minTokens or maxTokens, the first not more than the second", "write e.g. {maxTokens: 400}"),
    ),
    Rule(
        at=("spec.rewards[].http.url",),
        cel=cel_matches("self", HTTP),
        must="must be an http:// or https:// address with a host and without a user",
        instead="write e.g. https://judge.example.com/score; a token belongs into secretRef",
        holds=lambda url: matches(url, HTTP),
    ),
    Rule(
        at=("",),
        cel="!has(self.spec.rewards) || self.spec.rewards.all(reward, !has(reward.model) || "
        "!has(reward.model.fromJob) || reward.model.fromJob.name != self.metadata.name)",
        must="must not name the job itself",
        instead="name the earlier job whose reward model scores",
        field=".spec.rewards",
        holds=_not_scored_by_itself,
    ),
)
