"""The demo's path, small: a model from scratch, then LoRA on two pods with two processes each, as a user types it."""

from __future__ import annotations

import json

import pytest
from e2e_kit import TINY, TINY_SFT, Bench, job, restarts, step, waiting

pytestmark = [pytest.mark.e2e, pytest.mark.xdist_group("e2e")]

STEPS, TUNING_STEPS = 6, 4


@pytest.fixture(scope="module")
def chain(bench: Bench) -> Bench:
    """The second job first: it waits for the one it names."""
    second = job(
        "tuned",
        TINY_SFT,
        model={"uri": None, "fromJob": {"name": "base"}},
        data={"eval": [{"uri": "pvc://runs/data/pairs.jsonl", "maxRows": 16}]},
        training={"maxSteps": TUNING_STEPS},
        evaluation={"everySteps": 2},
        deepspeed={"zeroStage": 2},
        output={"mergeAdapter": True},
        resources={"nodes": 2, "gpusPerNode": 2, "memory": "4Gi"},
    )
    bench.apply(second)
    bench.until("tuned", waiting, 30)
    bench.apply(job("base", TINY, training={"maxSteps": STEPS}, checkpoint={"everySteps": 3}))
    return bench


def test_both_succeed_and_the_second_waited_for_the_first(chain: Bench) -> None:
    base, tuned = chain.succeeded("base"), chain.succeeded("tuned")
    assert tuned["lineage"] == [
        {
            "job": "base",
            "uid": chain.get("ptj", "base")["metadata"]["uid"],
            "stage": "Pretrain",
            "outputDigest": base["output"]["digest"],
        }
    ]
    assert base["completionTime"] <= tuned["attempt"]["startTime"]
    assert tuned["resources"] == {"gpus": 4, "pods": 2}


def test_the_status_says_what_happened(chain: Bench) -> None:
    status = chain.succeeded("base")
    assert restarts(status) == 0
    assert status["checkpoints"]["last"]["step"] == STEPS
    assert status["dataReport"]["used"] == status["dataReport"]["rows"] == 200
    assert status["output"]["uri"].startswith("pvc://runs/base/")
    assert status["resolved"]["deepspeed"]["zeroStage"] in (0, 1, 2, 3)
    conditions = {each["type"]: each["status"] for each in status["conditions"]}
    expected = {"Validated": "True", "Complete": "True", "Finished": "True", "Failed": "False", "Stalled": "False"}
    assert expected.items() <= conditions.items()


def test_metrics_have_every_step_once(chain: Bench) -> None:
    chain.succeeded("tuned")
    trained = [line for line in chain.metrics("tuned") if "loss" in line]
    assert [line["step"] for line in trained] == list(range(1, TUNING_STEPS + 1))
    assert any("eval_loss" in line for line in chain.metrics("tuned"))


def test_the_merged_export_loads_with_plain_transformers(chain: Bench) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    chain.succeeded("tuned")
    folder = chain.run_folder("tuned") / "output"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    ids = tokenizer("What is 1+1?", return_tensors="pt")
    out = model.generate(input_ids=ids["input_ids"], max_new_tokens=3, do_sample=False)
    assert out.shape[1] > ids["input_ids"].shape[1]
    assert not (folder / "adapter_config.json").exists()


def test_get_shows_one_line_per_job(chain: Bench) -> None:
    chain.succeeded("tuned")
    lines = chain.kubectl("get", "ptj").splitlines()
    assert lines[0].split() == ["NAME", "STAGE", "MODEL", "STATE", "PROGRESS", "GPUS", "DURATION", "AGE"]
    row = next(line for line in lines if line.startswith("tuned"))
    assert {"SFT", "Succeeded", "100", "4"} <= set(row.split())
    assert all(len(line) <= 110 for line in lines)
    wide = chain.kubectl("get", "posttrainingjobs", "-o", "wide").splitlines()
    assert "OUTPUT" in wide[0]
    assert any("pvc://runs/tuned/" in line for line in wide)


def test_wait_describe_logs_and_events(chain: Bench) -> None:
    assert "condition met" in chain.kubectl("wait", "ptj/tuned", "--for=condition=Finished", "--timeout=120s")
    assert chain.kubectl("get", "ptj", "tuned", "-o", "jsonpath={.status.state}") == "Succeeded"
    described = chain.kubectl("describe", "ptj", "tuned")
    assert "Conditions:" in described
    assert "Succeeded" in described.split("Events:")[1]
    assert "loss" in chain.kubectl("logs", "base-master-0")


@pytest.mark.parametrize(
    ("path", "word"),
    [("spec.lora.rank", "1 to 512"), ("spec.resources.gpusPerNode", "GPU"), ("status.conditions", "Finished")],
)
def test_explain_answers(chain: Bench, path: str, word: str) -> None:
    assert word in chain.kubectl("explain", f"ptj.{path}")


def test_prometheus_sees_the_loss_of_metrics_jsonl(bench: Bench) -> None:
    """Scraped while it runs; each step's loss is the one that metrics.jsonl has for it."""
    bench.apply(job("scraped", training={"maxSteps": 400, "batchSize": 64}))
    bench.until("scraped", lambda status: step(status) >= 1)
    seen: dict[int, float] = {}
    path = f"/api/v1/namespaces/{bench.namespace}/pods/scraped-master-0:9464/proxy/metrics"
    while len(seen) < 3 and bench.status("scraped").get("state") not in ("Succeeded", "Failed"):
        text = bench.cluster.kubectl("get", "--raw", path, check=False)
        plain = [line.split() for line in text.splitlines() if line.startswith("posttrain_") and "{" not in line]
        values = {name: value for name, value, *_ in plain}
        if "posttrain_loss" in values:
            seen[int(float(values["posttrain_step"]))] = float(values["posttrain_loss"])
    bench.succeeded("scraped")
    written = {line["step"]: line["loss"] for line in bench.metrics("scraped") if "loss" in line}
    seen.pop(0, None)
    assert seen, "nothing was scraped while it ran"
    assert seen == pytest.approx({step: written[step] for step in seen}, rel=1e-6), json.dumps(seen)
