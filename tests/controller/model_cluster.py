"""A cluster in memory: holds one job's objects, carries out reconcile's actions, and plays training-operator and
kubelet.

Objects are whole Kubernetes objects and reach reconcile through the same `slim` functions as in the operator.
"""

from __future__ import annotations

import copy
import json
from datetime import UTC, datetime, timedelta
from typing import Any, TypeVar

from posttrain_operator import clock
from posttrain_operator.actions import Actions, Create, Delete, Object, Patch
from posttrain_operator.backends.pod import StatusEndpoint
from posttrain_operator.claimlook import claimed
from posttrain_operator.execute import found_of
from posttrain_operator.facts import Intent, JobFacts, Missing, Note, Observation, StatusServer
from posttrain_operator.plan.types import PlanSettings
from posttrain_operator.reconcile import lookups
from posttrain_operator.reconcile.core import reconcile
from posttrain_operator.reconcile.intent import understand
from posttrain_operator.reconcile.relatives import Family, read
from posttrain_operator.records import PodRecord
from posttrain_operator.settings import Timing
from posttrain_operator.slim import child_record, job_record, pod_record

Json = dict[str, Any]
START = datetime(2026, 1, 1, tzinfo=UTC)
SPEC: Json = {
    "stage": "Pretrain",
    "model": {"scratch": {"family": "Llama", "vocabSize": 512, "hiddenSize": 64, "layers": 2, "heads": 4}},
    "data": {"train": [{"uri": "pvc://runs/corpus.jsonl"}]},
    "storage": {"claimName": "runs"},
    "resources": {"nodes": 2, "gpusPerNode": 0, "processesPerNode": 1},
}
PLAN = PlanSettings(trainer_image="trainer:1")


class Cluster:
    """One namespace with one job. `now` moves only when told."""

    def __init__(self, spec: Json | None = None, **extra: Any) -> None:
        self.now = START
        self.timing = Timing()
        self._counter = 0
        self.job: Json = {
            "apiVersion": "posttrain.dev/v1alpha1",
            "kind": "PostTrainingJob",
            "metadata": {"name": "job", "namespace": "ns", "generation": 1, **self._identity("job")},
            "spec": {**copy.deepcopy(SPEC), **(spec or {}), **extra},
            "status": {},
        }
        self.child: Json | None = None
        self.maps: dict[str, Json] = {}
        self.claim: Json | None = None
        """Of the name that the job's own claim has."""
        self.unbound: tuple[Missing, ...] = ()
        self.pods: dict[str, Json] = {}
        self.gone: dict[str, PodRecord] = {}
        self.family: Family = {}
        self.missing: tuple[Missing, ...] = ()
        self.notes: tuple[Note, ...] = ()
        self.backend_available = True
        self.foreign_child: Json | None = None
        self.bundle: str | None = None
        self.unready: dict[str, str | None] = {}
        self.room = 1000
        """Pods that find a node; the others are unschedulable."""
        self.history: list[Actions] = []

    # Looking.

    @property
    def status(self) -> Json:
        return dict(self.job["status"])

    def condition(self, kind: str) -> Json:
        return next(c for c in self.status["conditions"] if c["type"] == kind)

    def facts(self) -> JobFacts:
        return JobFacts.of(job_record(self.job))

    def observation(self) -> Observation:
        job = self.facts()
        child = child_record(self.child) if self.child else None
        live = [record for pod in self.pods.values() if (record := pod_record(pod))]
        wanted = lookups.needs_plan(job, child is not None)
        config = self.maps.get("job-config")
        return Observation(
            intent=understand(self.job, {**self.family, **self._remembered(job)}, PLAN) if wanted else Intent(),
            timing=self.timing,
            backend=str((job.status.get("backend") or {}).get("kind") or self._wanted()),
            child=child,
            pods=tuple(sorted([*live, *self.gone.values()], key=lambda pod: (pod.name, pod.uid))),
            backend_available=self.backend_available,
            missing=self.missing if child is None else (),
            config=found_of(config) if config else None,
            obstacle=found_of(self.foreign_child) if self.foreign_child else None,
            notes=self.notes,
            claim=claimed(self.claim) if self.claim else None,
            unbound=self.unbound,
            unready_nodes=self._unready(job),
            status_server=self._status_server(),
        )

    def _remembered(self, job: JobFacts) -> Family:
        data = (self.maps.get("job-config") or {}).get("data") or {}
        return read(data.get("parents.json", "")) if job.has_started else {}

    def _wanted(self) -> str:
        said = self.job["spec"].get("backend", "Auto")
        return PLAN.backend if said == "Auto" else said

    def _unready(self, job: JobFacts) -> dict[str, str | None]:
        """Only nodes that were asked for are seen."""
        child = child_record(self.child) if self.child else None
        pods = tuple(record for pod in self.pods.values() if (record := pod_record(pod)))
        seen = Observation(intent=Intent(), timing=self.timing, child=child, pods=pods)
        return {n: self.unready[n] for n in lookups.while_running(job, seen, self.now).nodes if n in self.unready}

    def _status_server(self) -> StatusServer | None:
        if self.bundle is None:
            return None
        published = (self.maps.get("job-status-ca") or {}).get("data", {}).get("ca.crt")
        return StatusServer(StatusEndpoint("https://status.svc:10443"), self.bundle, published)

    # The operator.

    def step(self, prefix: int | None = None) -> Actions:
        """One pass; only the first `prefix` writes are carried out where a number is given: the process died there."""
        actions = reconcile(self.facts(), self.observation(), self.now)
        self.history.append(actions)
        writes: list[Any] = [*actions.create, *actions.patch, *actions.delete]
        for write in writes[:prefix]:
            self._carry_out(write)
        whole = prefix is None or prefix > len(writes)
        if actions.status is not None and whole:
            self._write_status(actions.status)
        if actions.attempt_uids is not None and whole:
            self.gone = {uid: pod for uid, pod in self.gone.items() if uid in actions.attempt_uids}
        return actions

    def settle(self, passes: int = 20) -> int:
        """Passes until nothing is written any more; the clock stands still. AssertionError where it never ends."""
        for number in range(passes):
            if self.step().nothing:
                return number
        raise AssertionError(f"still writing after {passes} passes: {self.history[-1]}")

    def _carry_out(self, write: Create | Patch | Delete) -> None:
        if isinstance(write, Create):
            self._create(write)
        elif isinstance(write, Patch):
            assert self.child is not None
            assert write.body["metadata"]["resourceVersion"] == self.child["metadata"]["resourceVersion"]
            merge(self.child["spec"], write.body["spec"])
            self._touch(self.child)
        else:
            self._delete(write)

    def _create(self, write: Create) -> None:
        made = json.loads(json.dumps(write.body))
        made["metadata"].update(self._identity(write.name), creationTimestamp=clock.render(self.now))
        if write.kind.is_child:
            assert self.child is None, "a second child"
            self.child = made
        elif write.kind is Object.CLAIM:
            assert self.claim is None, "a second claim"
            self.claim = made
        else:
            assert write.upsert or write.name not in self.maps, "an immutable ConfigMap made twice"
            self.maps[write.name] = made

    def _delete(self, write: Delete) -> None:
        if write.kind is Object.POD:
            pod = next((p for p in self.pods.values() if p["metadata"]["uid"] == write.uid), None)
            assert pod is not None
            self.terminate(pod["metadata"]["uid"], write.grace_seconds or 0)
            if write.grace_seconds == 0:
                self.vanish(pod["metadata"]["uid"])
        elif write.kind is Object.CONFIG_MAP:
            self.maps.pop(write.name, None)
        elif self.child and self.child["metadata"]["uid"] == write.uid:
            self.lose_child()

    def _write_status(self, status: Any) -> None:
        progress = self.job["status"].get("progress")
        self.job["status"] = json.loads(json.dumps(status)) | ({"progress": progress} if progress else {})
        self._touch(self.job)

    # Everybody else.

    def pass_time(self, seconds: float) -> None:
        self.now += timedelta(seconds=seconds)

    def edit(self, **spec: Any) -> None:
        self.job["spec"].update(spec)
        self.job["metadata"]["generation"] += 1
        self._touch(self.job)

    def report(self, **progress: Any) -> None:
        """A report; the status server carries the checkpoint over to later ones."""
        before = self.job["status"].get("progress") or {}
        carried = {"checkpoint": before["checkpoint"]} if "checkpoint" in before else {}
        self.job["status"]["progress"] = {**carried, "lastUpdateTime": clock.render(self.now), **progress}
        self._touch(self.job)

    def commit(self, step: int, at: datetime | None = None) -> None:
        """A checkpoint was committed, now or before, and is reported."""
        time = clock.render(at or self.now)
        self.report(phase="Training", checkpoint={"step": step, "time": time, "digest": str(step)})

    def training_operator(self) -> None:
        """Makes missing pods of a child that is neither suspended nor finished, removes those of a suspended one."""
        if self.child is None or self._child_is("Failed") or self._child_is("Succeeded"):
            return
        suspended = self.child["spec"]["runPolicy"]["suspend"]
        for name, role, index in self._slots():
            present = [p for p in self.pods.values() if p["metadata"]["name"] == name]
            if suspended:
                for pod in present:
                    self.terminate(pod["metadata"]["uid"], 30)
            elif not present:
                self._make_pod(name, role, index)

    def _slots(self) -> list[tuple[str, str, int]]:
        assert self.child is not None
        replicas = self.child["spec"]["pytorchReplicaSpecs"]
        return [
            (f"job-{role.lower()}-{i}", role, i) for role, spec in replicas.items() for i in range(spec["replicas"])
        ]

    def _make_pod(self, name: str, role: str, index: int) -> None:
        assert self.child is not None
        template = self.child["spec"]["pytorchReplicaSpecs"][role]["template"]
        labels = {
            **template["metadata"]["labels"],
            "training.kubeflow.org/replica-type": role.lower(),
            "training.kubeflow.org/replica-index": str(index),
        }
        identity = self._identity(name)
        metadata = {"name": name, "namespace": "ns", "labels": labels, **identity}
        metadata["creationTimestamp"] = clock.render(self.now)
        self.pods[identity["uid"]] = {"metadata": metadata, "spec": {}, "status": {"phase": "Pending"}}
        self.place(self.pods[identity["uid"]])

    def place(self, pod: Json) -> None:
        """Each pod on a node of its own, as long as there is room; nothing is placed on a node that is not ready."""
        node = f"node-{pod['metadata']['name']}"
        taken = sum("nodeName" in other["spec"] for other in self.pods.values())
        if taken < self.room:
            pod["spec"]["nodeName"] = f"{node}-b" if node in self.unready else node
            pod["status"].pop("conditions", None)
        else:
            blocked = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": "0/2 nodes"}
            pod["status"]["conditions"] = [blocked]
        self._touch(pod)

    def scheduler(self) -> None:
        """Looks once more at the pods that found no node."""
        for pod in self.pods.values():
            if "nodeName" not in pod["spec"]:
                self.place(pod)

    def lose_node(self, uid: str) -> None:
        """The node of a pod stops answering; the node controller takes the Ready of its pods away."""
        node = self.pods[uid]["spec"]["nodeName"]
        self.unready.setdefault(node, clock.render(self.now))
        for pod in self.pods.values():
            ready = next((c for c in pod["status"].get("conditions", ()) if c["type"] == "Ready"), None)
            if ready and pod["spec"].get("nodeName") == node:
                ready.update(status="False", lastTransitionTime=clock.render(self.now))
                self._touch(pod)

    def restore_nodes(self) -> None:
        """All nodes answer again."""
        nodes, self.unready = set(self.unready), {}
        for uid, pod in self.pods.items():
            if pod["spec"].get("nodeName") in nodes and pod["status"]["phase"] == "Running":
                self.run(uid)

    def answers(self, uid: str) -> bool:
        """Whether the pod's node does."""
        return self.pods[uid]["spec"].get("nodeName") not in self.unready

    def run(self, uid: str) -> None:
        ready = {"type": "Ready", "status": "True", "lastTransitionTime": clock.render(self.now)}
        self._set_pod(uid, {"phase": "Running", "conditions": [ready]})

    def run_all(self) -> None:
        for uid, pod in self.pods.items():
            placed = "nodeName" in pod["spec"] and self.answers(uid)
            if placed and pod["status"]["phase"] == "Pending" and "deletionTimestamp" not in pod["metadata"]:
                self.run(uid)

    def end(self, uid: str, code: int, message: str = "", reason: str = "Error") -> None:
        """The container ends; the training-operator draws its conclusion at once."""
        if self.pods[uid]["status"]["phase"] in ("Succeeded", "Failed") or not self.answers(uid):
            return
        terminated = {"exitCode": code, "message": message, "reason": reason, "finishedAt": clock.render(self.now)}
        phase = "Succeeded" if code == 0 else "Failed"
        self._set_pod(
            uid, {"phase": phase, "containerStatuses": [{"name": "pytorch", "state": {"terminated": terminated}}]}
        )
        self._conclude(uid, code)

    def _conclude(self, uid: str, code: int) -> None:
        if self.child is None or self.child["spec"]["runPolicy"]["suspend"]:
            return
        master = "-master-" in self.pods[uid]["metadata"]["name"]
        if code == 0 and master:
            self._child_condition("Succeeded")
        elif 0 < code < 128:
            self._child_condition("Failed")
        elif code >= 128:
            self.vanish(uid)

    def terminate(self, uid: str, grace: int) -> None:
        metadata = self.pods[uid]["metadata"]
        metadata["deletionTimestamp"] = clock.render(self.now + timedelta(seconds=grace))
        metadata["deletionGracePeriodSeconds"] = grace
        self._touch(self.pods[uid])

    def kubelet(self) -> None:
        """Terminating pods end with 143 and go."""
        for uid, pod in list(self.pods.items()):
            if "deletionTimestamp" in pod["metadata"] and self.answers(uid):
                if pod["status"]["phase"] in ("Running", "Pending"):
                    self.end(uid, 143)
                self.vanish(uid)

    def give_up(self, uid: str) -> None:
        """The worker's init container has looked for the master's name for long enough: the training-operator makes
        another one."""
        its = {"name": "init-pytorch", "state": {"terminated": {"exitCode": 1, "finishedAt": clock.render(self.now)}}}
        self._set_pod(uid, {"phase": "Failed", "initContainerStatuses": [its]})
        self.vanish(uid)

    def waits_for_the_first(self, uid: str) -> bool:
        """Whether the pod's init container runs and finds no name: that appears when the master is ready."""
        pod = self.pods[uid]
        begins = pod["status"]["phase"] == "Pending" and "nodeName" in pod["spec"] and self.answers(uid)
        masters = (p["status"] for p in self.pods.values() if "-master-" in p["metadata"]["name"])
        return begins and "-worker-" in pod["metadata"]["name"] and not any("Running" in m["phase"] for m in masters)

    def vanish(self, uid: str) -> None:
        pod = self.pods.pop(uid, None)
        record = pod_record(pod) if pod else None
        if record:
            self.gone[uid] = record.as_gone()

    def lose_child(self) -> None:
        self.child = None
        for uid in list(self.pods):
            self.terminate(uid, 30)

    def forget(self) -> None:
        """The operator's process ends: what only its memory knew is lost."""
        self.gone = {}

    def uid(self, role: str, index: int = 0) -> str:
        name = f"job-{role}-{index}"
        return next(uid for uid, pod in self.pods.items() if pod["metadata"]["name"] == name)

    def _child_is(self, kind: str) -> bool:
        return self.child is not None and child_record(self.child).holds(kind)

    def _child_condition(self, kind: str) -> None:
        assert self.child is not None
        if self._child_is("Failed"):
            return
        entry = {
            "type": kind,
            "status": "True",
            "reason": kind,
            "message": kind,
            "lastTransitionTime": clock.render(self.now),
        }
        self.child.setdefault("status", {}).setdefault("conditions", []).append(entry)
        self._touch(self.child)

    def _set_pod(self, uid: str, status: Json) -> None:
        self.pods[uid]["status"] = status
        self._touch(self.pods[uid])

    def _identity(self, name: str) -> Json:
        self._counter += 1
        return {"uid": f"{name}-uid-{self._counter}", "resourceVersion": str(self._counter)}

    def _touch(self, obj: Json) -> None:
        self._counter += 1
        obj["metadata"]["resourceVersion"] = str(self._counter)


def merge(into: Json, patch: Json) -> None:
    """A merge patch, in place."""
    for name, value in patch.items():
        if isinstance(value, dict):
            merge(into.setdefault(name, {}), value)
        else:
            into[name] = value


C = TypeVar("C", bound=Cluster)


def running_cluster(**spec: Any) -> Cluster:
    """A job whose pods all run, and have for long enough to have trained."""
    return made_to_run(Cluster(**spec))


def made_to_run(cluster: C) -> C:
    """The cluster, brought so far."""
    cluster.settle()
    cluster.training_operator()
    cluster.run_all()
    cluster.settle()
    assert cluster.status["state"] == "Running", cluster.status
    cluster.pass_time(cluster.timing.silence)
    return cluster
