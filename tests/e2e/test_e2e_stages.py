"""Every offline stage on a cluster, each from the one before: a base, an adapter, preferences on top of it, a reward
model, and the best checkpoint as a start."""

from __future__ import annotations

import json
import math

import pytest
from e2e_kit import TINY, TINY_SFT, Bench, Manifest, job

pytestmark = [pytest.mark.e2e, pytest.mark.xdist_group("e2e")]

STEPS, PATIENCE = 4, 600
PREFERENCES = [
    {"prompt": f"What is {a}+{b}?", "chosen": f" {a + b}", "rejected": f" {a + b + 1}"}
    for a in range(12)
    for b in range(6)
]
EVAL = {"eval": [{"uri": "pvc://runs/data/preferences.jsonl", "maxRows": 16}]}


def _from(name: str, **more: str) -> Manifest:
    return {"uri": None, "fromJob": {"name": name, **more}}


def _on_pairs(name: str, stage: str, parent: str, **changes: object) -> Manifest:
    data = {"train": [{"uri": "pvc://runs/data/preferences.jsonl"}], **EVAL}
    return job(name, TINY_SFT, stage=stage, model=_from(parent), data=data, **changes)


@pytest.fixture(scope="module")
def stages(bench: Bench) -> Bench:
    """All jobs at once; they wait for each other."""
    bench.rows("data/preferences.jsonl", PREFERENCES)
    best = {"everySteps": 2, "keepBest": True}
    text = {"eval": [{"uri": "pvc://runs/data/text.jsonl", "maxRows": 16}]}
    full = {"tuning": "Full", "lora": None}
    bench.apply(
        job("base", TINY, data=text, evaluation=best),
        job("tuned", TINY_SFT, model=_from("base")),
        _on_pairs("preferred", "Preference", "tuned", resources={"gpusPerNode": 2}, deepspeed={"zeroStage": 2}),
        _on_pairs("further", "Preference", "tuned", lora={"rank": None, "continueAdapter": True}),
        _on_pairs("simple", "Preference", "base", algorithm="SimPO", **full),
        _on_pairs(
            "scored", "RewardModel", "base", evaluation={**best, "metric": "eval_accuracy", "goal": "Maximize"}, **full
        ),
        job("again", TINY_SFT, model=_from("base", checkpoint="Best")),
    )
    return bench


def test_preference_begins_where_the_reference_is(stages: Bench) -> None:
    """Policy and reference are the same model at first: every pair's loss is log 2."""
    stages.succeeded("preferred", PATIENCE)
    lines = stages.metrics("preferred")
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    assert lines[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert lines[0]["rewards/margins"] == pytest.approx(0, abs=1e-6)
    assert lines[-1]["rewards/margins"] != 0


def test_an_adapter_of_an_adapter_names_its_chain(stages: Bench) -> None:
    status = stages.succeeded("preferred", PATIENCE)
    assert status["output"]["format"] == "peft"
    assert [each["job"] for each in status["lineage"]] == ["base", "tuned"]
    manifest = json.loads((stages.run_folder("preferred") / "output" / "manifest.json").read_text())
    assert manifest["base"]["uri"].startswith("pvc://runs/base/")
    assert "tuned" in json.dumps(manifest)


def test_an_adapter_is_trained_further(stages: Bench) -> None:
    status = stages.succeeded("further", PATIENCE)
    settings = json.loads((stages.run_folder("further") / "output" / "adapter_config.json").read_text())
    assert settings["r"] == 4
    assert status["resolved"]["lora"]["continueAdapter"] is True


def test_simpo_needs_no_reference(stages: Bench) -> None:
    status = stages.succeeded("simple", PATIENCE)
    assert status["resolved"]["algorithm"] == "SimPO"
    assert "rewards/accuracies" in stages.metrics("simple")[-1]


def test_a_reward_model_is_a_sequence_classifier_for_transformers(stages: Bench) -> None:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    status = stages.succeeded("scored", PATIENCE)
    assert status["checkpoints"]["best"]["metric"] == "eval_accuracy"
    folder = stages.run_folder("scored") / "output"
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    ids = AutoTokenizer.from_pretrained(folder)("What is 1+1? 2", return_tensors="pt")
    assert model(input_ids=ids["input_ids"]).logits.shape == (1, 1)


def test_the_best_checkpoint_is_a_model_to_start_from(stages: Bench) -> None:
    best = stages.succeeded("base")["checkpoints"]["best"]
    evaluated = {line["step"]: line["eval_loss"] for line in stages.metrics("base") if "eval_loss" in line}
    assert best["value"] == pytest.approx(min(evaluated.values()), rel=1e-6)
    assert evaluated[best["step"]] == min(evaluated.values())
    stages.succeeded("again", PATIENCE)
    assert [each["job"] for each in stages.get("ptj", "again")["status"]["lineage"]] == ["base"]
