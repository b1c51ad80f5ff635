"""The folders of local runs: volumes, ConfigMaps, and what each job left behind.

A claim is a folder of the same name below the volumes folder, a ConfigMap a folder of files: the trainer sees the
layout of a pod. What a job ended with is kept, so that a later job, also in a later call, may start from it.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from posttrain_api.base import canonical_json
from posttrain_api.records import Best, Checkpoint, Output
from posttrain_operator.plan.types import Parent, PlanSettings

_NOT_IDENTITY = ("suspend", "runPolicy")
"""Fields that may change while a job runs: changing them is no new job."""
RESULT_FILE = "result.yaml"


@dataclass(frozen=True)
class Workspace:
    """`root` holds all but the claims, which are the folders of `volumes`. Both are absolute."""

    root: Path
    volumes: Path

    def job(self, name: str) -> Path:
        """Folder of a job: its config, logs, termination messages and status."""
        return self.root / "jobs" / name

    def uid(self, manifest: Mapping[str, Any]) -> str:
        """The same job in the same folder has the same uid, so it goes on where it was; a changed spec is a new job."""
        spec = {key: value for key, value in manifest["spec"].items() if key not in _NOT_IDENTITY}
        return str(uuid.uuid5(uuid.NAMESPACE_URL, canonical_json([str(self.root), manifest["metadata"]["name"], spec])))

    def settings(self, job: str, storage_claim: str, allow_cpu: bool) -> PlanSettings:
        """Where a pod's mounts are on this machine."""
        return PlanSettings(
            trainer_image="local",
            allow_cpu=allow_cpu,
            storage_dir=str(self.volumes / storage_claim),
            claims_dir=str(self.volumes),
            configmaps_dir=str(self.root / "configmaps"),
            secrets_dir=str(self.root / "secrets"),
            work_dir=str(self.job(job) / "work"),
        )

    def write_config_map(self, manifest: Mapping[str, Any]) -> None:
        """Puts a ConfigMap's keys where `configmap://` sources look for them."""
        folder = self.root / "configmaps" / str(manifest["metadata"]["name"])
        folder.mkdir(parents=True, exist_ok=True)
        for key, text in (manifest.get("data") or {}).items():
            (folder / key).write_text(text)

    def write_result(self, name: str, result: Mapping[str, Any]) -> None:
        """Keeps the job as it ended: its manifest with uid and status."""
        self.job(name).mkdir(parents=True, exist_ok=True)
        (self.job(name) / RESULT_FILE).write_text(yaml.safe_dump(dict(result), sort_keys=False, allow_unicode=True))

    def result(self, name: str) -> dict[str, Any] | None:
        """The job as it ended here, None where it never ran to an end."""
        path = self.job(name) / RESULT_FILE
        return dict(yaml.safe_load(path.read_text())) if path.exists() else None

    def parent(self, name: str) -> Parent | None:
        """A job that succeeded here, as `fromJob` needs it; None where there is none."""
        result = self.result(name)
        if result is None or result["status"]["state"] != "Succeeded":
            return None
        status = result["status"]
        last, best = (status.get("checkpoints", {}).get(which) for which in ("last", "best"))
        return Parent(
            name=name,
            uid=result["metadata"]["uid"],
            stage=result["spec"]["stage"],
            output=Output.model_validate(status["output"]),
            checkpoint=Checkpoint.model_validate(last) if last else None,
            best=Best.model_validate(best) if best else None,
            resolved=status.get("resolved") or {},
        )
