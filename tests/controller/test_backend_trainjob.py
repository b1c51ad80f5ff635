"""A TrainJob with its runtime, held word for word, and how it and its pods are read.

POSTTRAIN_UPDATE_GOLDEN=1 writes the golden file anew.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from test_backend_pytorchjob import STATUS, plan_of

from posttrain_api import names
from posttrain_operator.backends import BACKENDS, backend, trainjob
from posttrain_operator.backends.pod import pod_template
from posttrain_operator.slim import child_record, pod_record

GOLDEN = Path(__file__).parent / "golden" / "trainjob.yaml"
Json = dict[str, Any]


def made_of(**spec: Any) -> Json:
    """The JobSet's spec in the runtime of a plan."""
    (runtime,) = trainjob.before(plan_of(**spec), STATUS)
    job_set: Json = runtime["spec"]["template"]["spec"]
    return job_set


def pod_of(job_set: Json, name: str) -> Json:
    job = next(each for each in job_set["replicatedJobs"] if each["name"] == name)
    template: Json = job["template"]["spec"]["template"]
    return template


def env_of(pod: Json) -> Json:
    return {each["name"]: each.get("value", each.get("valueFrom")) for each in pod["spec"]["containers"][0]["env"]}


def test_the_runtime_and_the_child_word_for_word() -> None:
    plan = replace(plan_of(), spec_hash="sha256:of-the-plan")
    made = [*trainjob.before(plan, STATUS), trainjob.build(plan, STATUS)]
    text = yaml.safe_dump_all(made, sort_keys=False, width=120)
    if os.environ.get("POSTTRAIN_UPDATE_GOLDEN"):
        GOLDEN.write_text(text)
    assert text == GOLDEN.read_text()


def test_one_node_has_no_others() -> None:
    job_set = made_of(resources={"nodes": 1, "gpusPerNode": 8})
    assert [each["name"] for each in job_set["replicatedJobs"]] == ["m"]


def test_the_pods_are_those_of_every_backend_and_their_rendezvous() -> None:
    """What is added to the template: PET_*, the offset, and that a pod is not restarted in its place."""
    pod = pod_of(made_of(), "m")
    same = pod_template(plan_of(), STATUS, metrics=True)
    assert pod["spec"].pop("restartPolicy") == "Never"
    env = pod["spec"]["containers"][0]["env"]
    added = env[len(same["spec"]["containers"][0]["env"]) :]
    del env[-len(added) :]
    assert pod == same
    assert {each["name"] for each in added} == {
        "PET_NNODES",
        "PET_NPROC_PER_NODE",
        "PET_MASTER_ADDR",
        "PET_MASTER_PORT",
        "PET_NODE_RANK",
        names.ENV_NODE_RANK_OFFSET,
    }


def test_ranks_count_on_over_the_first_pod() -> None:
    job_set = made_of()
    first, others = env_of(pod_of(job_set, "m")), env_of(pod_of(job_set, "w"))
    assert (first["PET_NNODES"], others["PET_NNODES"]) == ("3", "3")
    assert (first[names.ENV_NODE_RANK_OFFSET], others[names.ENV_NODE_RANK_OFFSET]) == ("0", "1")
    assert first["PET_MASTER_ADDR"] == others["PET_MASTER_ADDR"] == "gsm8k-m-0-0.gsm8k"


def test_only_the_first_pod_has_the_secrets_and_is_scraped() -> None:
    job_set = made_of()
    mounted = {
        name: [v["secret"]["secretName"] for v in pod_of(job_set, name)["spec"]["volumes"] if "secret" in v]
        for name in ("m", "w")
    }
    assert mounted == {"m": ["hf-token"], "w": []}
    assert names.LABEL_METRICS in pod_of(job_set, "m")["metadata"]["labels"]
    assert names.LABEL_METRICS not in pod_of(job_set, "w")["metadata"]["labels"]


def test_the_contract_of_exit_codes() -> None:
    """1–127 fail the Job for a reason that fails the set; everything else restarts the set."""
    job_set = made_of()
    permanent, gang = job_set["failurePolicy"]["rules"]
    assert (permanent["action"], permanent["onJobFailureReasons"]) == ("FailJobSet", ["PodFailurePolicy"])
    assert (gang["action"], "onJobFailureReasons" in gang) == ("RestartJobSetAndIgnoreMaxRestarts", False)
    for job in job_set["replicatedJobs"]:
        spec = job["template"]["spec"]
        (rule,) = spec["podFailurePolicy"]["rules"]
        assert (spec["backoffLimit"], rule["action"]) == (0, "FailJob")
        assert rule["onExitCodes"]["values"] == list(range(1, 128))


def test_a_runtime_s_name_says_its_content() -> None:
    one, other = plan_of(), plan_of(lora={"rank": 8})
    names_made = {runtime["metadata"]["name"] for plan in (one, other) for runtime in trainjob.before(plan, STATUS)}
    assert len(names_made) == 2
    for plan in (one, other):
        (runtime,) = trainjob.before(plan, STATUS)
        named = trainjob.build(plan, STATUS)["spec"]["runtimeRef"]["name"]
        assert runtime["metadata"]["name"] == named
        assert trainjob.left("gsm8k", plan.spec_hash) == (("TrainingRuntime", named),)


@pytest.mark.parametrize(
    ("length", "nodes", "fits"), [(50, 1, True), (50, 2, True), (50, 101, True), (50, 102, False), (49, 102, True)]
)
def test_a_name_is_refused_only_where_a_pod_s_would_be_too_long(length: int, nodes: int, fits: bool) -> None:
    plan = plan_of(resources={"nodes": nodes, "gpusPerNode": 8})
    job = plan.config.job.model_copy(update={"name": "j" * length})
    refusal = trainjob.refusal(replace(plan, config=plan.config.model_copy(update={"job": job})))
    assert (refusal is None) == fits, refusal
    assert fits or "at most 49 characters" in str(refusal)


def child(spec: Json, *conditions: Json) -> Json:
    meta = {"name": "job", "namespace": "ns", "uid": "c", "resourceVersion": "1"}
    return {"kind": "TrainJob", "metadata": meta, "spec": spec, "status": {"conditions": list(conditions)}}


def test_a_child_is_read_in_the_names_of_all_backends() -> None:
    done = {"type": "Complete", "status": "True", "reason": "AllJobsCompleted", "lastTransitionTime": "t"}
    record = child_record(child({"suspend": True}, done))
    assert (record.kind, record.suspended, record.holds("Succeeded"), record.holds("Failed")) == (
        "TrainJob",
        True,
        True,
        False,
    )
    failed = {"type": "Failed", "status": "True", "message": "jobset failed"}
    assert child_record(child({}, failed)).conditions["Failed"].message == "jobset failed"


def pod(replicated: str = "w", index: str = "1", owner: str = "job-w-0", **meta: Any) -> Json:
    labels = {names.LABEL_JOB_NAME: "job", names.LABEL_JOB_UID: "u"}
    labels |= {"jobset.sigs.k8s.io/replicatedjob-name": replicated, "batch.kubernetes.io/job-completion-index": index}
    owners = [{"apiVersion": "batch/v1", "kind": "Job", "name": owner, "uid": "j", "controller": True}]
    base = {"name": f"{owner}-x", "namespace": "ns", "uid": "p", "resourceVersion": "1"}
    return {"metadata": {**base, "labels": labels, "ownerReferences": owners, **meta}, "status": {"phase": "Running"}}


def test_a_pod_has_the_seat_that_its_job_gives_it() -> None:
    read = [pod_record(each) for each in (pod("m", "0", "job-m-0"), pod())]
    seats = [(record.role, record.index, record.owned) for record in read if record]
    assert seats == [("Master", 0, True), ("Worker", 1, True)]


def test_a_pod_that_only_wears_the_labels_is_none_of_the_job_s() -> None:
    read = [pod_record(pod(owner=owner)) for owner in ("other-w-0", "job-m-0")]
    assert [record.owned for record in read if record] == [False, False]


def test_when_a_pod_was_asked_to_end_is_remembered_by_its_request() -> None:
    asked = pod(deletionTimestamp="2026-01-01T00:01:00Z", deletionGracePeriodSeconds=60)
    record = pod_record(asked)
    assert record is not None
    assert record.asked
    assert record.asked_at is not None
    assert record.asked_at.isoformat() == "2026-01-01T00:00:00+00:00"


def test_every_backend_answers_every_question() -> None:
    assert set(BACKENDS) == {"PyTorchJob", "TrainJob"}
    assert backend("ARayJobOfTomorrow").KIND == "PyTorchJob"
    for each in BACKENDS.values():
        record = child_record({**child({}), "kind": each.KIND})
        assert record.kind == each.KIND
        assert f"involvedObject.uid={record.uid}" in each.told_by(record)
        assert [each.unmade(reason) for reason in ("FailedCreate", "Killing")] == [True, False]
        patch = each.suspension("7", True)
        assert patch["metadata"] == {"resourceVersion": "7"}
        assert [each.suspended(said) for said in (patch, each.suspension("7", False))] == [True, False]
    assert trainjob.unseen("specified trainingRuntime must be created before the TrainJob is created")
