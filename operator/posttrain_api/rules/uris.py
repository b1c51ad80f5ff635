"""The forms a URI may have, as rules: each says which schemes work and how they are written.

The groups of the expressions are used by the plan's `sources`; here they only decide.
"""

from __future__ import annotations

import re

from posttrain_api.rules.types import Rule, cel_matches, get, has, matches

_LABEL = r"[a-z0-9](?:[-a-z0-9.]{0,251}[a-z0-9])?"
_SEGMENT = r"[^/\x00-\x1f\x7f]+"
HF = r"hf://[A-Za-z0-9][A-Za-z0-9_.-]{0,95}(?:/[A-Za-z0-9][A-Za-z0-9_.-]{0,95})?(?:@[A-Za-z0-9][A-Za-z0-9_./-]{0,79})?"
PVC = rf"pvc://{_LABEL}(?:/{_SEGMENT})*/?"
_KEY = r"[^/?#\x00-\x1f\x7f]+"
S3 = rf"s3://[a-z0-9][-a-z0-9.]{{1,61}}[a-z0-9](?:/{_KEY})*/?"
GS = rf"gs://[a-z0-9][-a-z0-9._]{{1,220}}[a-z0-9](?:/{_KEY})*/?"
IMAGE = rf"image://(?:/{_SEGMENT})+/?"
CONFIG_MAP = rf"configmap://{_LABEL}/[A-Za-z0-9._-]{{1,253}}"
PINNED = r"hf://[^@]+@[0-9a-f]{40}"
PARENT_STEP = r"(?:.*/)?\.\.(?:/.*)?"

_MODEL = f"{HF}|{S3}|{GS}|{PVC}|{IMAGE}"
_DATA = f"{HF}|{S3}|{GS}|{PVC}|{CONFIG_MAP}"


def _form(at: tuple[str, ...], pattern: str, instead: str) -> Rule:
    return Rule(
        at=at,
        cel=cel_matches("self", pattern),
        must="must be a URI of a scheme that works here",
        instead=instead,
        holds=lambda uri: matches(uri, pattern),
    )


def _only_for(at: tuple[str, ...], name: str, schemes: tuple[str, ...]) -> Rule:
    """A field that says something about sources that are fetched and nothing about a folder or a job."""
    starts = " || ".join(f"self.uri.startsWith('{scheme}')" for scheme in schemes)
    return Rule(
        at=at,
        cel=f"!has(self.{name}) || (has(self.uri) && ({starts}))",
        must=f"is for an {' or '.join(schemes)} uri only",
        instead="remove it",
        field=f".{name}",
        forbidden=True,
        holds=lambda node: not has(node, name) or _starts(get(node, "uri") or "", schemes),
    )


def _starts(uri: object, schemes: tuple[str, ...]) -> bool:
    return not isinstance(uri, str) or uri.startswith(schemes)


def _no_escape(uri: object) -> bool:
    return not isinstance(uri, str) or re.fullmatch(PARENT_STEP, uri) is None


_BESIDE = ("spec.reference", "spec.critic.model", "spec.rewards[].model")
"""Models beside the one that is trained."""
_MODEL_NODES = ("spec.model.uri", "spec.model.scratch.tokenizer.uri", *(f"{node}.uri" for node in _BESIDE))
_DATA_NODES = ("spec.data.train[].uri", "spec.data.eval[].uri")
_CHECKPOINT_NODE = ("spec.checkpoint.from.uri",)
_SETS = ("spec.data.train[]", "spec.data.eval[]")

URI_RULES: tuple[Rule, ...] = (
    _form(
        _MODEL_NODES,
        _MODEL,
        "write hf://org/name[@revision], s3://bucket/folder, gs://bucket/folder, pvc://claim/path or "
        "image:///absolute/path",
    ),
    _form(
        _DATA_NODES,
        _DATA,
        "write pvc://claim/path, s3://bucket/key, gs://bucket/key, hf://org/name[@revision] or configmap://name/key",
    ),
    _form(_CHECKPOINT_NODE, PVC, "write pvc://claim/path/of/a/checkpoint"),
    Rule(
        at=_MODEL_NODES + _DATA_NODES + _CHECKPOINT_NODE,
        cel=f"!{cel_matches('self', PARENT_STEP)}",
        must="must not contain a .. step",
        instead="write the path without it: nothing outside the claim or bucket can be read",
        holds=_no_escape,
    ),
    _only_for(
        ("spec.model", "spec.model.scratch.tokenizer", *_BESIDE, *_SETS),
        "secretRef",
        ("hf://", "s3://", "gs://"),
    ),
    _only_for(_SETS, "split", ("hf://",)),
    _only_for(_SETS, "subset", ("hf://",)),
)
