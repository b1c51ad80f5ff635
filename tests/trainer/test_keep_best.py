"""evaluation.keepBest: which evaluation is the best, that its checkpoint stays, and that it is exported whatever
happens."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import resume_jobs
import torch
import transformers
from trainer_kit import make_config, make_model, prepare, rows, start_ranks

from posttrain_api.reasons import Reason
from posttrain_api.records import Best
from posttrain_trainer.best import Judge, judge_of
from posttrain_trainer.checkpoint_files import committed
from posttrain_trainer.errors import TrainerFailure
from posttrain_trainer.export import OutputManifest
from posttrain_trainer.state import State

LESS = Judge("eval_loss", -1.0, "pvc://runs/tiny/u1/best")
MORE = Judge("eval_accuracy", 1.0, "pvc://runs/tiny/u1/best")


def _over(judge: Judge, values: list[float]) -> int | None:
    best: Best | None = None
    for step, value in enumerate(values, 1):
        best = judge.choose(best, step, {judge.metric: value, "eval_other": 0.0})
    return None if best is None else best.step


@pytest.mark.parametrize(
    ("judge", "values", "step"),
    [
        (LESS, [3.0, 2.0, 2.5], 2),
        (MORE, [0.1, 0.3, 0.2], 2),
        (LESS, [2.0, 2.0], 1),
        (MORE, [0.5, 0.5], 1),
        (LESS, [math.nan, 4.0, math.nan], 2),
        (LESS, [-math.inf, 4.0], 2),
        (MORE, [math.nan, math.inf], None),
        (MORE, [-1.0, 0.0], 2),
    ],
)
def test_the_best_of_some_evaluations(judge: Judge, values: list[float], step: int | None) -> None:
    assert _over(judge, values) == step


def test_an_unknown_metric_is_refused_by_name() -> None:
    with pytest.raises(TrainerFailure) as refused:
        LESS.choose(None, 4, {"eval_entropy": 1.0, "eval_accuracy": 0.5})
    assert refused.value.reason is Reason.IMAGE_INCOMPATIBLE
    assert "'eval_loss', but the evaluation at step 4 gives eval_accuracy, eval_entropy." in refused.value.message


def test_only_where_it_is_asked_for(tmp_path: Path) -> None:
    assert judge_of(make_config(tmp_path)) is None
    config = make_config(tmp_path, evaluation={"metric": "eval_accuracy", "goal": "Maximize", "keep_best": True})
    assert judge_of(config) == MORE


def test_the_state_travels_as_json() -> None:
    best = Best(step=3, metric="eval_loss", value=0.5, uri="pvc://r/best")
    state = State(4, 99, {"loss": 1.5, "eval_loss": math.nan}, best)
    assert State.from_wire(json.loads(json.dumps(state.to_wire(), allow_nan=False))) == State(
        4, 99, {"loss": 1.5}, best
    )
    assert State.from_wire({"step": 2, "tokens": 7, "metrics": None}) == State(2, 7)  # of a release without best


def _job(run_dir: Path, model: Path | None = None, **changes: Any) -> Any:
    """Six steps, evaluated after each, saved only where it is the best and at the end."""
    settings = {
        "evaluation": {"every_steps": 1, "keep_best": True},
        "checkpoint__keep_last": 1,
        "zero_stage": 0,
        **changes,
    }
    if model is not None:
        settings["model__source__path"] = str(model)
    config = make_config(run_dir, **settings)
    if model is None:
        make_model(run_dir / "model")
    prepare(config, rows(25), rows(9, seed=1), model_dir=str(model or run_dir / "model"))
    return config


def _run(configs: list[Any], attempt: int, values: resume_jobs.Values, job: Callable[..., None], *given: Any) -> Any:
    ranks = configs[0].topology.processes_per_node
    folders = [config.run_dir for config in configs]
    logs = Path(folders[0]) / f"logs-{attempt}"
    running = start_ranks(resume_jobs.scripted, (values, job, *given, folders), ranks, logs)
    return running.wait(), running


def _ended(configs: list[Any], attempt: int, values: resume_jobs.Values) -> list[dict[str, Any]]:
    """Runs whole workers; rank 0's end records."""
    codes, running = _run(configs, attempt, values, resume_jobs.attempt, attempt)
    assert set(codes) == {0}, running.output()
    return [json.loads((Path(config.work_dir) / "ends" / "rank-0.json").read_text()) for config in configs]


def _steps(config: Any) -> list[int]:
    return [entry.manifest.step for entry in committed(Path(config.run_dir) / "checkpoints")]


def _files(config: Any, folder: str) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (Path(config.run_dir) / folder).iterdir() if path.is_file()}


def _weight_bytes(config: Any, folder: str = "best") -> dict[str, bytes]:
    return {name: data for name, data in _files(config, folder).items() if name.endswith(".safetensors")}


def _weights(config: Any, folder: str) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(Path(config.run_dir) / folder).state_dict()


FALLS_THEN_RISES = {1: 5.0, 2: 3.0, 3: 3.0, 4: math.nan, 5: 4.0, 6: 3.5}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Any:
    config = _job(tmp_path_factory.mktemp("plain") / "run")
    end = _ended([config], 1, FALLS_THEN_RISES)[0]
    return config, end["success"]


def test_the_best_stays_beside_the_newest_and_is_exported(plain: Any) -> None:
    config, success = plain
    assert success["best"] == {"step": 2, "metric": "eval_loss", "value": 3.0, "uri": "pvc://runs/tiny/u1/best"}
    assert _steps(config) == [6, 2]
    manifest = OutputManifest.model_validate_json(_files(config, "best")["manifest.json"])
    assert (manifest.step, manifest.stage, manifest.format) == (2, "SFT", "safetensors")
    checkpoint = Path(config.run_dir) / "checkpoints" / "step-000002" / "ds" / "mp_rank_00_model_states.pt"
    kept = torch.load(checkpoint, weights_only=False)["module"]
    found = _weights(config, "best")
    assert all(torch.equal(kept["lm." + name], value) for name, value in found.items())
    assert not all(torch.equal(found[name], value) for name, value in _weights(config, "output").items())


def test_a_number_that_is_none_is_null_in_the_line(plain: Any) -> None:
    lines = [json.loads(line) for line in (Path(plain[0].run_dir) / "metrics.jsonl").read_text().splitlines()]
    assert [line["eval_loss"] for line in lines] == [5.0, 3.0, 3.0, None, 4.0, 3.5]


@pytest.mark.parametrize("place", ["between", "before the rename", "after the rename"])
def test_killed_around_the_export(plain: Any, tmp_path: Path, place: str) -> None:
    config = _job(tmp_path)
    codes, _ = _run([config], 1, FALLS_THEN_RISES, resume_jobs.die_in_export, place)
    assert codes == [-9]
    assert (tmp_path / "output").exists()
    assert (tmp_path / "best").exists() is (place == "after the rename")
    end = _ended([config], 2, FALLS_THEN_RISES)[0]
    assert end["success"]["best"] == plain[1]["best"]
    assert _weight_bytes(config) == _weight_bytes(plain[0])
    left = {path.name for path in tmp_path.glob("*") if path.name.startswith(("best", "output"))}
    assert left == {"best", "output"}


def test_killed_inside_the_removal_of_the_former_best(tmp_path: Path) -> None:
    """Step 3 ousts step 2; the same job undisturbed is the other."""
    values = {1: 5.0, 2: 3.0, 3: 2.0, 4: 9.0, 5: 9.0, 6: 9.0}
    whole, broken = _job(tmp_path / "whole"), _job(tmp_path / "broken")
    expected = _ended([whole], 1, values)[0]["success"]["best"]
    codes, _ = _run([broken], 1, values, resume_jobs.killed, "removal", 2, 0)
    assert codes == [-9]
    assert _steps(broken) == [3]
    assert _ended([broken], 2, values)[0]["success"]["best"] == expected
    assert _steps(broken) == _steps(whole) == [6, 3]
    assert _weight_bytes(broken) == _weight_bytes(whole)


@pytest.mark.parametrize(("tuning", "zero", "ranks"), [("Full", 2, 2), ("Full", 3, 2), ("LoRA", 3, 1), ("LoRA", 0, 2)])
def test_the_best_of_every_kind_is_what_an_earlier_end_would_have_given(
    tmp_path: Path, tuning: str, zero: int, ranks: int
) -> None:
    """With a constant rate, the same job of three steps ends with the weights of step 3. And where the last is the
    best, `best` is `output` in hard links."""
    lora = {"lora": {"rank": 4, "alpha": 8.0, "dropout": 0.0, "target_modules": ["all-linear"]}}
    common = {
        "tuning": tuning,
        **(lora if tuning == "LoRA" else {}),
        "zero_stage": zero,
        "topology__processes_per_node": ranks,
        "training__schedule": "Constant",
    }
    make_model(tmp_path / "model")
    long, short = (
        _job(tmp_path / name, tmp_path / "model", training__max_steps=steps, **common)
        for name, steps in (("long", 5), ("short", 3))
    )
    ends = _ended([long, short], 1, {1: 3.0, 2: 2.0, 3: 1.0, 4: 2.0, 5: 2.0})
    assert [end["success"]["best"]["step"] for end in ends] == [3, 3]
    assert _weight_bytes(long, "best") == _weight_bytes(short, "output")
    assert _weight_bytes(long, "output") != _weight_bytes(short, "output")
    for path in (tmp_path / "short" / "best").iterdir():
        assert path.samefile(tmp_path / "short" / "output" / path.name)


def test_a_lost_best_is_found_anew(tmp_path: Path) -> None:
    """The newest checkpoint is damaged, and the older one's best was ousted: the job goes on from the older one."""
    values = {1: 3.0, 2: 4.0, 3: 4.0, 4: 4.0, 5: 4.0, 6: 2.0}
    config = _job(tmp_path, checkpoint__every_steps=5, checkpoint__keep_last=2)
    _ended([config], 1, values)
    assert _steps(config) == [6, 5]
    expected = _weight_bytes(config)
    path = tmp_path / "checkpoints" / "step-000006" / "trainer.json"
    path.write_text(path.read_text().replace("6", "7", 1))
    end = _ended([config], 2, values)[0]
    log = (tmp_path / "logs-2" / "rank-0.log").read_text()
    assert "resumed from" in log
    assert "at step 5" in log
    assert "the best checkpoint so far is lost" in log
    assert end["success"]["best"]["step"] == 6
    assert _weight_bytes(config) == expected


def test_a_best_that_is_damaged_at_the_end_is_an_error(tmp_path: Path) -> None:
    config = _job(tmp_path)
    codes, running = _run([config], 1, FALLS_THEN_RISES, resume_jobs.damaged_before_best, 2)
    assert codes == [0], running.output()
    end = json.loads((tmp_path / "work" / "ends" / "rank-0.json").read_text())
    assert end["reason"] == "CheckpointIncompatible"
    assert "step-000002/trainer.json: " in end["message"]
    assert (tmp_path / "output" / "manifest.json").exists()
    assert not (tmp_path / "best").exists()


@pytest.mark.parametrize("last", [2.0, 9.0])
def test_a_newer_attempt_fences_the_best(tmp_path: Path, last: float) -> None:
    """Linked, where the last is the best, and exported."""
    config = _job(tmp_path, training__max_steps=2)
    _run([config], 1, {1: 3.0, 2: last}, resume_jobs.overtaken_before_best)
    end = json.loads((tmp_path / "work" / "ends" / "rank-0.json").read_text())
    assert end["reason"] == "PeerLost"
    assert not (tmp_path / "best").exists()


def test_an_unknown_metric_ends_the_job(tmp_path: Path) -> None:
    config = _job(tmp_path, evaluation={"every_steps": 1, "keep_best": True, "metric": "eval_acc"})
    end = _ended([config], 1, {})[0]
    assert (end["reason"], end["exitCode"], end["step"]) == ("ImageIncompatible", 10, 1)
    assert "gives eval_entropy, eval_loss, eval_mean_token_accuracy" in end["message"]
