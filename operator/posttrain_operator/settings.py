"""Settings of the operator: read once from the environment, then passed on as frozen values.

Called by `app`. The chart writes the variables; a name that is missing means the default here, a value that cannot be
read stops the process with one sentence that names the variable.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Literal, TypeVar

from posttrain_api import names
from posttrain_operator.backends import BACKENDS, DEFAULT
from posttrain_operator.plan.types import PlanSettings

PREFIX = "POSTTRAIN_OPERATOR_"
T = TypeVar("T")


class SettingsError(ValueError):
    """A variable that cannot be read; the message names it, the rule and the value found."""


@dataclass(frozen=True)
class Timing:
    """Every time constant of the operator, in seconds. Deadlines that a user writes are not among them."""

    settle: float = 5
    """How long after a symptom (PeerLost, a failed child) its cause may still show."""
    forming: float = 2
    """An attempt's pods are recorded at once when complete, else so long after the first."""
    missing_pods: float = 3
    """Pods missing for so long: the reason is looked up in Events."""
    mount: float = 10
    """A scheduled pod whose containers do not start for so long: the same."""
    retry: float = 15
    """A stalled job is looked at again so often."""
    success: float = 30
    """How long the success record may come after the child's own Succeeded."""
    silence: float = 60
    """Pods ready for so long without any report count as running."""
    fresh: float = 120
    """A job whose last report is older is not judged on it: it is not known whether it stands still."""
    stacks: float = 60
    """What the pods of a job that stands still have to send their stacks, before they are restarted."""
    lost_node: float = 60
    """A node that has not been ready for so long is lost: the job's pods on it are deleted by force."""
    named: float = 60
    """A first pod that has been ready for so long is found by its name, whatever a resolver still remembers."""
    half_placed: float = 300
    """Some pods have a node and another finds none for so long: all places are given back."""
    placement: float = 30
    """Pause before they are asked for again; doubled each time, up to the limit, and jittered by half."""
    placement_limit: float = 600
    lookup: float = 10
    """A claim, ConfigMap or conflict that was found is believed for so long."""
    restart: float = 10
    """Pause before the next attempt after one that never trained; doubled each time, up to the limit."""
    restart_limit: float = 300
    backoff: float = 1
    backoff_limit: float = 300
    resync: float = 600
    divergence: float = 300
    discovery: float = 300
    discovery_missing: float = 10
    request: float = 15
    """How long an answer of the API server may take; a page of a list four times as long."""
    brake: float = 0.5
    """Rest of all workers after the first request without an answer; doubled each time, up to the limit."""
    brake_limit: float = 30
    silent_watch: float = 70
    """A watch without a word for so long is opened anew: the API server sends a bookmark every minute."""
    stuck: float = 600
    """A pass over one job that takes so long will never end: the process starts anew."""
    lease: float = 15
    """A lease that nobody renewed for so long may be taken by another replica."""
    lease_renew: float = 10
    """Who could not renew it for so long no longer leads."""
    lease_retry: float = 2
    """Between two renewals; a standby looks twice as often."""

    def with_lease(self, seconds: float) -> Timing:
        """The same with a lease of so many seconds, and its other two times in proportion."""
        share = seconds / self.lease
        renew, retry = self.lease_renew * share, self.lease_retry * share
        return replace(self, lease=seconds, lease_renew=renew, lease_retry=retry)

    def scaled(self, factor: float) -> Timing:
        """Every constant times `factor` (tests run at a tenth)."""
        return Timing(**{field.name: getattr(self, field.name) * factor for field in fields(self)})


@dataclass(frozen=True)
class Settings:
    """What the environment says. `status_port` and `metrics_port` None: not served. `status_url` empty: no reports."""

    namespace: str
    plan: PlanSettings
    status_url: str = ""
    status_port: int | None = None
    status_secret: str = ""
    metrics_port: int | None = 8080
    log_level: str = "info"
    log_format: Literal["text", "json"] = "json"
    watch_namespaces: tuple[str, ...] = ()
    timing: Timing = Timing()
    workers: int = 16
    lease: str = "posttrain-operator"
    """Name of the Lease: one for each installation in a namespace."""
    failpoint: str = ""
    """For tests: see cluster.failpoints."""


def read_settings(environ: Mapping[str, str] | None = None) -> Settings:
    """Settings from the environment. SettingsError where a required name is missing or a value cannot be read."""
    env = _Reader(os.environ if environ is None else environ)
    return Settings(
        namespace=env.text("NAMESPACE", "posttrain-system"),
        plan=_plan_settings(env),
        status_url=env.text("STATUS_URL", "").rstrip("/"),
        status_port=env.port("STATUS_PORT", None),
        status_secret=env.text("STATUS_SECRET", ""),
        metrics_port=env.port("METRICS_PORT", 8080),
        log_level=env.choice("LOG_LEVEL", ("debug", "info", "warning", "error"), "info"),
        log_format="text" if env.choice("LOG_FORMAT", ("text", "json"), "json") == "text" else "json",
        watch_namespaces=tuple(part.strip() for part in env.text("WATCH_NAMESPACES", "").split(",") if part.strip()),
        timing=_timing(env).scaled(env.number("TIME_SCALE", 1.0)),
        lease=env.text("LEASE_NAME", Settings.lease),
        failpoint=env.text("FAILPOINT", ""),
    )


def _timing(env: _Reader) -> Timing:
    """What depends on the cluster and may be said."""
    lost_node = env.number("LOST_NODE_SECONDS", Timing.lost_node)
    half_placed = env.number("HALF_PLACED_SECONDS", Timing.half_placed)
    lease = env.number("LEASE_SECONDS", Timing.lease)
    return Timing(lost_node=lost_node, half_placed=half_placed).with_lease(lease)


def _plan_settings(env: _Reader) -> PlanSettings:
    return PlanSettings(
        trainer_image=env.required("TRAINER_IMAGE"),
        image_pull_policy=env.choice("TRAINER_IMAGE_PULL_POLICY", ("Always", "IfNotPresent", "Never"), "IfNotPresent"),
        allow_cpu=env.choice("ALLOW_CPU", ("true", "false"), "false") == "true",
        backend=env.choice("BACKEND", tuple(BACKENDS), DEFAULT),
        rendezvous_port=names.RENDEZVOUS_PORT,
        metrics_port=names.METRICS_PORT,
    )


class _Reader:
    """Reads one kind of value each; the errors name the variable."""

    def __init__(self, environ: Mapping[str, str]) -> None:
        self._environ = environ

    def text(self, name: str, default: str) -> str:
        return self._environ.get(PREFIX + name, "") or default

    def required(self, name: str) -> str:
        value = self.text(name, "")
        if not value:
            raise SettingsError(f"{PREFIX}{name} is required and not set; the chart sets it from its values")
        return value

    def choice(self, name: str, allowed: tuple[str, ...], default: str) -> str:
        value = self.text(name, default)
        if value not in allowed:
            raise SettingsError(f"{PREFIX}{name} must be one of {', '.join(allowed)} (found {value!r})")
        return value

    def number(self, name: str, default: float) -> float:
        value = self._parsed(name, default, float)
        if not 0 < value < float("inf"):
            raise SettingsError(f"{PREFIX}{name} must be a positive number (found {value!r})")
        return value

    def port(self, name: str, default: int | None) -> int | None:
        value = self._parsed(name, default, int)
        if value is not None and not 0 <= value <= 65535:
            raise SettingsError(f"{PREFIX}{name} must be a port from 0 to 65535 (found {value!r})")
        return value

    def _parsed(self, name: str, default: T, parse: Callable[[str], T]) -> T:
        text = self.text(name, "")
        if not text:
            return default
        try:
            return parse(text)
        except ValueError as error:
            raise SettingsError(f"{PREFIX}{name} must be a number (found {text!r})") from error
