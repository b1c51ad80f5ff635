"""Bad input ends in its reason, with a message that names field or row, value and next step; nothing hangs."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import e2e_models
import pytest
from e2e_kit import PAIRS, TEXTS, TINY_SFT, Bench, Manifest, job, merged, restarts

pytestmark = [pytest.mark.e2e, pytest.mark.xdist_group("e2e")]

LONG = {"prompt": "What is 1+1?", "completion": " " + "2" * 400}
TURNS = (("user", "1+1?"), ("assistant", "2"))
CHAT = [{"messages": [{"role": role, "content": text} for role, text in TURNS]}] * 20


@dataclass(frozen=True)
class Case:
    """A job, the reason it must end with, and what its message must name."""

    manifest: Manifest
    reason: str
    names: tuple[str, ...]


def pairs(name: str, path: str, **changes: Any) -> Manifest:
    return job(name, TINY_SFT, **merged({"data": {"train": [{"uri": f"pvc://runs/{path}"}]}}, changes))


def model(name: str, folder: str) -> Manifest:
    return job(name, TINY_SFT, model={"uri": f"pvc://runs/models/{folder}"})


CASES = {
    "file missing": Case(pairs("file-missing", "data/none.jsonl"), "DatasetNotFound", ("data/none.jsonl",)),
    "broken json": Case(pairs("broken-json", "data/broken.jsonl"), "DataRowsRejected", ("broken.jsonl", "17")),
    "no completion": Case(pairs("no-completion", "data/half.jsonl"), "DataRowsRejected", ("half.jsonl", "completion")),
    "other columns": Case(pairs("other-columns", "data/other.jsonl"), "DatasetSchemaInvalid", ("question", "prompt")),
    "too long": Case(pairs("too-long", "data/long.jsonl"), "NothingToLearn", ("maxLength", "64", "long.jsonl")),
    "nothing to learn": Case(
        pairs("nothing-to-learn", "data/empty.jsonl", data={"badRows": {"policy": "Skip", "maxFraction": 1.0}}),
        "NothingToLearn",
        ("lossOn", "20"),
    ),
    "template": Case(
        pairs("template", "data/chat.jsonl", model={"chatTemplate": e2e_models.NO_PREFIX_TEMPLATE}),
        "DataRowsRejected",
        ("prefix", "chatTemplate"),
    ),
    "no model": Case(model("no-model", "none"), "ModelNotFound", ("models/none",)),
    "no weights": Case(model("no-weights", "no-weights"), "ModelNotFound", ("safetensors",)),
    "no eos": Case(model("no-eos", "no-eos"), "ModelIncompatible", ("eos_token",)),
    "no layer": Case(
        job("no-layer", TINY_SFT, lora={"targetModules": ["no_such_layer"]}), "ModelIncompatible", ("no_such_layer",)
    ),
}


@pytest.fixture(scope="module")
def submitted(bench: Bench) -> Bench:
    """All data, all models, all jobs: applied at once."""
    bench.rows("data/broken.jsonl", [*map(json.dumps, PAIRS[:16]), '{"prompt": "What is', *map(json.dumps, PAIRS[16:])])
    bench.rows("data/half.jsonl", [*PAIRS[:2], {"prompt": "What is 3+3?"}, *PAIRS[2:]])
    bench.rows("data/other.jsonl", [{"question": "1+1?", "reply": "2"}] * 20)
    bench.rows("data/long.jsonl", [LONG] * 20)
    bench.rows("data/empty.jsonl", [{"prompt": "What is 1+1?", "completion": ""}] * 20)
    bench.rows("data/chat.jsonl", CHAT)
    folder = bench.volume() / "models"
    words = e2e_models.tokenizer([row["text"] for row in TEXTS])
    e2e_models.save(folder / "good", words)
    e2e_models.without_weights(folder / "no-weights", words)
    e2e_models.without_eos(folder / "no-eos", words)
    e2e_models.pad_is_eos(folder / "pad-is-eos", words)
    bench.apply(*(case.manifest for case in CASES.values()), model("pad-is-eos", "pad-is-eos"))
    return bench


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_ends_in_its_reason_and_names_the_place(submitted: Bench, case: Case) -> None:
    name = case.manifest["metadata"]["name"]
    status = submitted.finished(name)
    assert (status["state"], status["reason"]) == ("Failed", case.reason), submitted.story(name)
    message = status["failure"]["message"]
    assert all(part in message for part in case.names), message
    assert restarts(status) == 0


def test_padding_with_the_end_token_works_and_the_end_is_learned(submitted: Bench) -> None:
    status = submitted.succeeded("pad-is-eos")
    report = status["dataReport"]
    words = e2e_models.tokenizer([row["text"] for row in TEXTS])
    answers = sum(len(words(row["completion"])["input_ids"]) for row in PAIRS)
    assert report["used"] == len(PAIRS)
    assert report["countedTokens"] == answers + len(PAIRS), "each row counts its answer and its end"


REFUSED: dict[str, tuple[Manifest, str]] = {
    "unknown field": (job("unknown", TINY_SFT, lora={"rnak": 8}), "rnak"),
    "block of another stage": (
        job("other-stage", TINY_SFT, preference={"beta": 0.2}),
        "is for stage Preference only; remove it",
    ),
    "rank zero": (job("rank-zero", TINY_SFT, lora={"rank": 0}), "spec.lora.rank"),
    "name of 51 characters": (job("n" * 51), "at most 50 characters"),
    "two model sources": (
        job("two-models", TINY_SFT, model={"fromJob": {"name": "other"}}),
        "exactly one of uri, fromJob, scratch",
    ),
    "neither lora nor tuning": (job("no-tuning", TINY_SFT, lora=None), "add lora: {rank: 16}"),
    "no storage": (job("homeless", storage=None), "storage"),
    "secret in env": (job("secret-env", env=[{"name": "MY_TOKEN", "value": "x"}]), "secretRef"),
}


@pytest.mark.parametrize(("manifest", "part"), REFUSED.values(), ids=REFUSED.keys())
def test_the_api_server_refuses_and_says_why(bench: Bench, manifest: Manifest, part: str) -> None:
    """`part` is in no job's name, which the server repeats."""
    assert part in bench.refused(manifest)
