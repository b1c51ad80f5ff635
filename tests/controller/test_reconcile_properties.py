"""reconcile under anything that may happen, with a process that may die after any write."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from model_cluster import START, Cluster

from posttrain_api.reasons import Reason
from posttrain_api.records import Failure, Output, Success, render_termination
from posttrain_api.spec.run import RESTARTS
from posttrain_operator import clock
from posttrain_operator.actions import Object
from posttrain_operator.status.conditions import TYPES

GPUS = 8
OUTPUT = Output(uri="pvc://runs/job/output", digest="sha256:a", format="safetensors", size_bytes=1)
ENDS: dict[str, tuple[int, str, str]] = {
    "success": (0, render_termination(Success(output=OUTPUT, step=5)), "Completed"),
    "silent": (0, "", "Completed"),
    "permanent": (
        21,
        render_termination(Failure(reason=Reason.DATA_ROWS_REJECTED, message="m", exit_code=21)),
        "Error",
    ),
    "peer lost": (160, render_termination(Failure(reason=Reason.PEER_LOST, message="m", exit_code=160)), "Error"),
    "error": (
        190,
        render_termination(Failure(reason=Reason.TRAINER_ERROR, message="m", exit_code=190, step=3)),
        "Error",
    ),
    "held": (163, render_termination(Failure(reason=Reason.GUARD_SUSPENDED, message="m", exit_code=163)), "Error"),
    "oom": (137, "", "OOMKilled"),
    "killed": (137, "", "Error"),
    "preempted": (143, "", "Error"),
}


class Life(RuleBasedStateMachine):
    """Everybody but the operator acts at random; between the acts it makes some passes, whole or cut short."""

    MODEL: type[Cluster] = Cluster

    def __init__(self) -> None:
        super().__init__()
        self.cluster = self.MODEL(resources={"nodes": 2, "gpusPerNode": GPUS // 2})
        self.cluster.bundle = "PEM 1"
        self.final: tuple[Any, ...] | None = None
        self.step = 0
        self.gpu_seconds = 0

    def _decided(self) -> bool:
        status = self.cluster.status
        closed = int(status.get("attempts", 0)) > int((status.get("attempt") or {}).get("number", 0))
        return closed or status.get("reason") == Reason.GUARD_SUSPENDED

    def _unrecorded(self) -> set[str]:
        """Pods on their way out that are no attempt: nobody recorded their child while it was there."""
        pods = {} if self.cluster.facts().has_started else self.cluster.pods
        return {uid for uid, pod in pods.items() if "deletionTimestamp" in pod["metadata"]}

    @rule(prefix=st.none() | st.integers(0, 3), lives=st.booleans())
    def operator(self, prefix: int | None, lives: bool) -> None:
        """A pass that is cut short: the process dies there, or it lives and a request of its was refused."""
        decided, going = self._decided(), self._unrecorded()
        actions = self.cluster.step(prefix)
        doomed = [delete for delete in actions.delete if delete.kind is Object.POD]
        kept = [each for each in doomed if each.grace_seconds != 0 or not self.cluster.unready if each.uid not in going]
        assert decided or not kept, "pods are deleted only after the decision is in the status"
        assert len({delete.uid for delete in doomed}) == len(doomed), "a pod is deleted once in a pass"
        if prefix is not None and not lives:
            self.cluster.forget()

    @rule()
    def operator_settles(self) -> None:
        self.cluster.settle()
        before = self.cluster.job["metadata"]["resourceVersion"]
        assert self.cluster.step().nothing
        assert self.cluster.job["metadata"]["resourceVersion"] == before

    @rule()
    def operator_restarts(self) -> None:
        self.cluster.forget()

    @rule()
    def training_operator(self) -> None:
        self.cluster.training_operator()

    @rule()
    def kubelet(self) -> None:
        self.cluster.kubelet()

    @rule()
    def pods_run(self) -> None:
        self.cluster.run_all()

    @precondition(lambda self: self.cluster.pods)
    @rule(data=st.data(), how=st.sampled_from(sorted(ENDS)))
    def pod_ends(self, data: st.DataObject, how: str) -> None:
        uid = data.draw(st.sampled_from(sorted(self.cluster.pods)))
        self.cluster.end(uid, *ENDS[how])

    @precondition(lambda self: any(map(self.cluster.waits_for_the_first, self.cluster.pods)))
    @rule(data=st.data())
    def a_worker_waits_in_vain(self, data: st.DataObject) -> None:
        waiting = sorted(filter(self.cluster.waits_for_the_first, self.cluster.pods))
        self.cluster.give_up(data.draw(st.sampled_from(waiting)))

    @precondition(lambda self: self.cluster.pods)
    @rule(data=st.data())
    def pod_vanishes(self, data: st.DataObject) -> None:
        self.cluster.vanish(data.draw(st.sampled_from(sorted(self.cluster.pods))))

    @rule(suspend=st.booleans())
    def user_suspends(self, suspend: bool) -> None:
        self.cluster.edit(suspend=suspend)

    @precondition(lambda self: self.cluster.child is not None)
    @rule()
    def child_is_deleted(self) -> None:
        self.cluster.lose_child()

    @precondition(lambda self: any("nodeName" in pod["spec"] for pod in self.cluster.pods.values()))
    @rule(data=st.data())
    def node_falls_silent(self, data: st.DataObject) -> None:
        placed = sorted(uid for uid, pod in self.cluster.pods.items() if "nodeName" in pod["spec"])
        self.cluster.lose_node(data.draw(st.sampled_from(placed)))

    @rule()
    def nodes_answer(self) -> None:
        self.cluster.restore_nodes()

    @rule(room=st.integers(0, 2))
    def others_come_and_go(self, room: int) -> None:
        self.cluster.room = room
        self.cluster.scheduler()

    @rule(steps=st.integers(0, 2))
    def checkpoint_is_committed(self, steps: int) -> None:
        self.step += steps
        self.cluster.commit(self.step)

    @rule(budget=st.sampled_from(sorted(RESTARTS)), times=st.integers(0, 5))
    def user_edits_a_budget(self, budget: str, times: int) -> None:
        self.cluster.edit(runPolicy={"restarts": {budget: min(times, RESTARTS[budget])}})

    @rule(phase=st.sampled_from(["Preparing", "Training"]))
    def trainer_reports(self, phase: str) -> None:
        self.cluster.report(phase=phase)

    @rule(idle=st.sampled_from([0, 100, 4000]))
    def trainer_tells_since_when_it_stands(self, idle: int) -> None:
        advanced = clock.render(self.cluster.now - timedelta(seconds=idle))
        self.cluster.report(phase="Training", lastAdvanceTime=advanced)

    @rule(bundle=st.sampled_from(["PEM 1", "PEM 2"]))
    def certificates_rotate(self, bundle: str) -> None:
        self.cluster.bundle = bundle

    @rule(seconds=st.sampled_from([1, 5, 70, 400]))
    def time_passes(self, seconds: int) -> None:
        self.cluster.now += timedelta(seconds=seconds)

    @invariant()
    def all_conditions_once(self) -> None:
        conditions = self.cluster.status.get("conditions")
        if conditions:
            assert [c["type"] for c in conditions] == list(TYPES)

    @invariant()
    def the_end_is_the_end(self) -> None:
        held = {c["type"]: c["reason"] for c in self.cluster.status.get("conditions", ()) if c["status"] == "True"}
        assert not ("Complete" in held and "Failed" in held)
        assert ("Finished" in held) == ("Complete" in held or "Failed" in held)
        terminal = tuple((kind, held[kind]) for kind in ("Complete", "Failed", "Finished") if kind in held)
        if self.final:
            assert terminal == self.final
        self.final = terminal or None

    @invariant()
    def budgets_hold(self) -> None:
        restarts = self.cluster.status.get("restarts") or {}
        assert restarts.get("total", 0) <= RESTARTS["total"]
        assert all(times <= RESTARTS[budget] for budget, times in restarts.get("sinceCheckpoint", {}).items())
        counted = sum(restarts.get("byCause", {}).values())
        assert counted < max(1, self.cluster.status.get("attempts", 0))

    @invariant()
    def time_is_counted_once(self) -> None:
        usage = self.cluster.status.get("usage") or {}
        elapsed = (self.cluster.now - START).total_seconds()
        assert 0 <= usage.get("gpuSecondsLost", 0) <= usage.get("gpuSeconds", 0) <= GPUS * elapsed
        assert usage.get("gpuSeconds", 0) >= self.gpu_seconds
        self.gpu_seconds = usage.get("gpuSeconds", 0)

    def teardown(self) -> None:
        """Whatever happened, with everybody doing their part the job comes to rest."""
        self.cluster.room = 1000
        self.cluster.restore_nodes()
        self._say_suspend_once()
        for _ in range(30):
            self.cluster.training_operator()
            self.cluster.scheduler()
            self.cluster.run_all()
            self.cluster.settle()
            self.cluster.kubelet()
            self.cluster.now += timedelta(seconds=70)
        self.cluster.training_operator()
        self.cluster.run_all()
        self.cluster.report(phase="Training")
        self.cluster.settle()
        assert self.cluster.status["state"] in ("Running", "Succeeded", "Failed"), self.cluster.status

    def _say_suspend_once(self) -> None:
        """What a guard has suspended waits for its user to have said so."""
        self.cluster.edit(suspend=True)
        for _ in range(4):
            self.cluster.training_operator()
            self.cluster.kubelet()
            self.cluster.now += timedelta(seconds=70)
            self.cluster.run_all()
            self.cluster.settle()
        self.cluster.edit(suspend=False)


Life.TestCase.settings = settings(max_examples=60, stateful_step_count=40, suppress_health_check=[HealthCheck.too_slow])
TestLife = Life.TestCase
