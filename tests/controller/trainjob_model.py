"""The cluster in memory with Trainer, JobSet and the Job controller in place of the training-operator."""

from __future__ import annotations

from typing import Any

from model_cluster import Cluster, Json

from posttrain_operator import clock
from posttrain_operator.actions import Create, Delete, Object

JOBS = {"m": "master", "w": "worker"}


class TrainJobCluster(Cluster):
    """A failed pod brings all down; the next ones are made when the last of the old is gone."""

    def __init__(self, spec: Json | None = None, **extra: Any) -> None:
        super().__init__(spec, **{"backend": "TrainJob", **extra})
        self.failing = False

    def _create(self, write: Create) -> None:
        if write.kind is Object.TRAINING_RUNTIME and write.name in self.maps:
            assert self.maps[write.name]["spec"] == write.body["spec"], "a runtime's name says its content"
        else:
            super()._create(write)

    def _delete(self, write: Delete) -> None:
        if write.kind is Object.TRAINING_RUNTIME:
            self.maps.pop(write.name, None)
        else:
            super()._delete(write)

    def training_operator(self) -> None:
        """What Trainer, JobSet and the Job controller do in one round."""
        if self.child is None:
            return
        suspended = self.child["spec"]["suspend"]
        if suspended or self.failing or self._child_is("Failed") or self._child_is("Succeeded"):
            self._bring_down()
        if suspended or self._child_is("Failed") or self._child_is("Succeeded"):
            self.failing = False
            return
        self.failing = self.failing and bool(self.pods)
        if not self.failing:
            self._make_missing()

    def _bring_down(self) -> None:
        for uid, pod in list(self.pods.items()):
            if pod["status"]["phase"] in ("Succeeded", "Failed"):
                if not (self._child_is("Failed") or self._child_is("Succeeded")):
                    self.vanish(uid)
            elif "deletionTimestamp" not in pod["metadata"]:
                self.terminate(uid, 30)

    def _make_missing(self) -> None:
        assert self.child is not None
        runtime = self.maps[self.child["spec"]["runtimeRef"]["name"]]
        for job in runtime["spec"]["template"]["spec"]["replicatedJobs"]:
            for index in range(job["template"]["spec"]["completions"]):
                if not self._of(job["name"], index):
                    self._make(job, index)

    def _of(self, job: str, index: int) -> list[str]:
        wanted = {"jobset.sigs.k8s.io/replicatedjob-name": job, "batch.kubernetes.io/job-completion-index": str(index)}
        return [uid for uid, pod in self.pods.items() if wanted.items() <= pod["metadata"]["labels"].items()]

    def _make(self, job: Json, index: int) -> None:
        identity = self._identity(f"job-{job['name']}-0-{index}")
        labels = job["template"]["spec"]["template"]["metadata"]["labels"] | {
            "jobset.sigs.k8s.io/replicatedjob-name": job["name"],
            "batch.kubernetes.io/job-completion-index": str(index),
        }
        owner = {"kind": "Job", "name": f"job-{job['name']}-0", "uid": "j", "controller": True}
        metadata = {"name": identity["uid"], "namespace": "ns", "labels": labels, "ownerReferences": [owner]}
        metadata |= {**identity, "creationTimestamp": clock.render(self.now)}
        self.pods[identity["uid"]] = {"metadata": metadata, "spec": {}, "status": {"phase": "Pending"}}
        self.place(self.pods[identity["uid"]])

    def _conclude(self, uid: str, code: int) -> None:
        if self.child is None or self.failing:
            return
        if code == 0 and uid in self._of("m", 0):
            self._child_condition("Complete")
        elif 0 < code < 128:
            self._child_condition("Failed")
        elif code >= 128:
            self.failing = not self.child["spec"]["suspend"]

    def vanish(self, uid: str) -> None:
        pod = self.pods.get(uid)
        unended = pod is not None and pod["status"]["phase"] in ("Pending", "Running")
        if unended and self.child is not None and not self.child["spec"]["suspend"]:
            self.failing = True
        super().vanish(uid)

    def uid(self, role: str, index: int = 0) -> str:
        job = next(name for name, of in JOBS.items() if of == role)
        return self._of(job, index)[0]
