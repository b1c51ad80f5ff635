"""From a URI to a place inside the pod: which volume it needs, which path it has there, which revision is meant.

Pure text. Nothing is opened, and no path leads out of its mount: a `..` step is refused here once more, because an
object may be
older than the rule that refuses it.
"""

from __future__ import annotations

import posixpath
from dataclasses import dataclass, field

from posttrain_api.places import Source
from posttrain_api.spec.references import ObjectRef
from posttrain_operator.plan.errors import refuse
from posttrain_operator.plan.types import PlanSettings


@dataclass(frozen=True)
class Location:
    """A source and what has to be mounted for it."""

    source: Source
    claims: frozenset[str] = field(default_factory=frozenset)
    config_maps: frozenset[str] = field(default_factory=frozenset)
    secrets: frozenset[str] = field(default_factory=frozenset)


def locate(uri: str, secret: ObjectRef | None, settings: PlanSettings, path: str) -> Location:
    """Where `uri` is inside the pod. `path` is the field's, for the message. Raises PlanError on a form that is not
    known."""
    scheme, _, rest = uri.partition("://")
    if ".." in rest.split("/"):
        raise refuse(path, "must not contain a .. step", uri, "write the path without it")
    locator = _LOCATORS.get(scheme)
    if locator is None or not rest:
        raise refuse(path, "must be a URI of a scheme that works here", uri, f"use one of {', '.join(_LOCATORS)}")
    location = locator(uri, rest, settings)
    if secret is None:
        return location
    source = location.source.model_copy(update={"secret_path": posixpath.join(settings.secrets_dir, secret.name)})
    return Location(source, location.claims, location.config_maps, frozenset({secret.name}))


def split_claim(uri: str) -> tuple[str, str]:
    """`pvc://claim/a/b` → ("claim", "a/b"). ValueError on another scheme."""
    if not uri.startswith("pvc://"):
        raise ValueError(f"not a pvc:// URI: {uri!r}")
    claim, _, inner = uri.removeprefix("pvc://").partition("/")
    return claim, inner.rstrip("/")


def _hub(uri: str, rest: str, settings: PlanSettings) -> Location:
    del settings
    _, _, revision = rest.partition("@")
    return Location(Source(uri=uri, revision=revision or None))


def _bucket(uri: str, rest: str, settings: PlanSettings) -> Location:
    del rest, settings
    return Location(Source(uri=uri))


def _claim(uri: str, rest: str, settings: PlanSettings) -> Location:
    del rest
    claim, inner = split_claim(uri)
    path = posixpath.join(settings.claims_dir, claim, inner).rstrip("/")
    return Location(Source(uri=uri, path=path), claims=frozenset({claim}))


def _image(uri: str, rest: str, settings: PlanSettings) -> Location:
    del settings
    return Location(Source(uri=uri, path=posixpath.normpath("/" + rest.lstrip("/"))))


def _config_map(uri: str, rest: str, settings: PlanSettings) -> Location:
    name, _, key = rest.partition("/")
    return Location(
        Source(uri=uri, path=posixpath.join(settings.configmaps_dir, name, key)), config_maps=frozenset({name})
    )


_LOCATORS = {"hf": _hub, "s3": _bucket, "gs": _bucket, "pvc": _claim, "image": _image, "configmap": _config_map}
