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
IMAGE = rf"image://(?:/{_SEGMENT})+/?"
CONFIG_MAP = rf"configmap://{_LABEL}/[A-Za-z0-9._-]{{1,253}}"
PINNED = r"hf://[^@]+@[0-9a-f]{40}"
PARENT_STEP = r"(?:.*/)?\.\.(?:/.*)?"

_MODEL = f"{HF}|{PVC}|{IMAGE}"
_DATA = f"{HF}|{PVC}|{CONFIG_MAP}"


def _form(at: tuple[str, ...], pattern: str, instead: str) -> Rule:
    return Rule(
        at=at,
        cel=cel_matches("self", pattern),
        must="must be a URI of a scheme that works here",
        instead=instead,
        holds=lambda uri: matches(uri, pattern),
    )


def _for_the_hub(at: tuple[str, ...], name: str) -> Rule:
    """A field that says something about hf:// and nothing about a folder or a job."""
    return Rule(
        at=at,
        cel=f"!has(self.{name}) || (has(self.uri) && self.uri.startsWith('hf://'))",
        must="is for an hf:// uri only",
        instead="remove it",
        field=f".{name}",
        forbidden=True,
        holds=lambda node: not has(node, name) or matches(get(node, "uri") or "", r"hf://.*"),
    )


def _no_escape(uri: object) -> bool:
    return not isinstance(uri, str) or re.fullmatch(PARENT_STEP, uri) is None


_MODEL_NODES = ("spec.model.uri", "spec.model.scratch.tokenizer.uri")
_DATA_NODES = ("spec.data.train[].uri", "spec.data.eval[].uri")
_CHECKPOINT_NODE = ("spec.checkpoint.from.uri",)
_SETS = ("spec.data.train[]", "spec.data.eval[]")

URI_RULES: tuple[Rule, ...] = (
    _form(
        _MODEL_NODES,
        _MODEL,
        "write hf://org/name[@revision], pvc://claim/path or image:///absolute/path (s3:// and gs:// "
        "are not supported yet)",
    ),
    _form(
        _DATA_NODES,
        _DATA,
        "write pvc://claim/path, hf://org/name[@revision] or configmap://name/key (s3:// and gs:// "
        "are not supported yet)",
    ),
    _form(_CHECKPOINT_NODE, PVC, "write pvc://claim/path/of/a/checkpoint"),
    Rule(
        at=_MODEL_NODES + _DATA_NODES + _CHECKPOINT_NODE,
        cel=f"!{cel_matches('self', PARENT_STEP)}",
        must="must not contain a .. step",
        instead="write the path without it: nothing outside the claim can be read",
        holds=_no_escape,
    ),
    _for_the_hub(("spec.model", "spec.model.scratch.tokenizer", *_SETS), "secretRef"),
    _for_the_hub(_SETS, "split"),
    _for_the_hub(_SETS, "subset"),
)
