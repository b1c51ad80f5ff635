"""Guards in real trainings on two ranks: every rank ends alike, the good checkpoint stays and can be used, nothing of
the sick weights is exported, and what was counted survives a kill.

The learning rate rises by 0.01 a step, so that a rule on it is broken in steps that are known.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import guard_jobs
import pytest
import resume_jobs
from online_kit import TWENTIES, online_config, online_job, prepare_online
from trainer_kit import exported, make_config, make_model, prepare, rows, start_ranks, steady_lines

from posttrain_api.measured import SAMPLING_DIFFERENCE
from posttrain_trainer.checkpoint_files import committed, damaged
from posttrain_trainer.signs import ENV_SIGNS, REPORT

RISING = {"training__learning_rate": 0.09, "training__warmup_steps": 8, "training__schedule": "Linear"}
STEPS = 8
RATE = {"metric": "learning_rate", "above": 0.035, "for_steps": 2}
"""Broken from step 4 on."""
EXPLODES = {"training__learning_rate": 3.0, "training__max_steps": 6, "checkpoint__every_steps": 1}
KL = {
    "grpo__beta": 0.1,
    "training__learning_rate": 0.3,
    "training__warmup_steps": 2,
    "guards": {"rules": [{"metric": "kl", "above": 1.5}]},
}
PPO_KL = {"guards": {"rules": [{"metric": "objective/kl", "above": 20}]}}
pytestmark = pytest.mark.timeout(900)  # on a busy machine; alone it is done in a minute


def _sft(folder: Path, model: Path, **changes: Any) -> None:
    given: dict[str, Any] = {
        **RISING,
        "training__max_steps": STEPS,
        "checkpoint__every_steps": 1,
        "checkpoint__keep_last": 1,
        "topology__processes_per_node": 2,
    }
    config = make_config(folder, **{**given, **changes})
    prepare(config, rows(40), model_dir=str(model))


def _end(folder: Path, rank: int = 0) -> dict[str, Any]:
    return dict(json.loads((folder / "work" / "ends" / f"rank-{rank}.json").read_text()))


def _steps(folder: Path) -> list[int]:
    whole = [each for each in committed(folder / "checkpoints") if damaged(each, each.manifest.files) is None]
    return [each.manifest.step for each in whole]


def _rules(*rules: dict[str, Any]) -> dict[str, Any]:
    return {"guards": {"rules": list(rules)}}


def _attempt(root: Path, number: int, ranks: int, names: list[str]) -> str:
    """What rank 0 said."""
    logs = root / f"logs-{number}-{ranks}-{names[0]}"
    running = start_ranks(resume_jobs.attempt, (number, [str(root / name) for name in names]), ranks, logs)
    assert running.wait(600) == [0] * ranks, running.output()
    return (logs / "rank-0.log").read_text()


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every job once, or twice where its name says that it goes on."""
    root = tmp_path_factory.mktemp("guards")
    model = root / "model"
    make_model(model)
    _sft(root / "failed", model, zero_stage=2, **_rules(RATE))
    _sft(root / "suspended", model, **_rules({**RATE, "for_steps": 3, "action": "Suspend"}))
    _sft(root / "free", model)
    _sft(root / "warned", model, **_rules({**RATE, "action": "Warn"}))
    _sft(root / "unknown", model, **_rules({"metric": "kl", "above": 1}))
    for name, algorithm, rule in (("grpo", "GRPO", KL), ("ppo", "PPO", PPO_KL)):
        online_job(root / name, model, algorithm, **{**EXPLODES, **rule, "topology__processes_per_node": 2})
    names = ["failed", "suspended", "free", "warned", "unknown", "grpo", "ppo"]
    (root / "said.log").write_text(_attempt(root, 1, 2, names))
    (root / "suspended.json").write_text(
        json.dumps({"end": _end(root / "suspended"), "steps": _steps(root / "suspended")})
    )
    _go_on(root, model)
    return root


def _go_on(root: Path, model: Path) -> None:
    """The suspended job, and a job of another name on each good checkpoint."""
    start = {"uri": "pvc://runs/failed/u1/checkpoints", "path": str(root / "failed" / "checkpoints")}
    _sft(root / "after", model, zero_stage=2, checkpoint__start_from=start)
    for name, algorithm, rule in (("grpo", "GRPO", {"grpo__beta": 0.1}), ("ppo", "PPO", {})):
        step = max(_steps(root / name)[-1:] or [0])
        path = root / name / "checkpoints" / f"step-{step:06d}"
        start = {"uri": "pvc://runs/x/u1/checkpoints/step", "path": str(path)}
        changes = {"training__learning_rate": 1e-4, "training__max_steps": step + 1, "checkpoint__start_from": start}
        both = {**EXPLODES, **changes, **rule}
        online_job(root / f"after-{name}", model, algorithm, topology__processes_per_node=2, **both)
    _attempt(root, 2, 2, ["suspended", "after", "after-grpo", "after-ppo"])


def test_all_ranks_fail_with_one_message(runs: Path) -> None:
    ends = [_end(runs / "failed", rank) for rank in (0, 1)]
    assert {(end["reason"], end["exitCode"], end["step"]) for end in ends} == {("GuardTripped", 41, 5)}
    assert ends[0]["message"] == ends[1]["message"]
    assert "learning_rate was 0.05 at step 5, above 0.035 in 2 steps running since step 4" in ends[0]["message"]
    assert "is kept: pvc://runs/tiny/u1/checkpoints/step-000002 (step 2)" in ends[0]["message"]


def test_the_good_checkpoint_stays_and_nothing_is_exported(runs: Path) -> None:
    """keepLast is 1: the newer one is of the step before the one that tripped."""
    assert _steps(runs / "failed") == [4, 2]
    assert not (runs / "failed" / "output").exists()
    assert [line["step"] for line in steady_lines(make_config(runs / "failed"))] == [1, 2, 3, 4, 5]


def test_training_goes_on_from_the_good_checkpoint(runs: Path) -> None:
    """It names the folder of all, in which there is a newer one."""
    assert "success" in _end(runs / "after"), _end(runs / "after")
    assert [line["step"] for line in steady_lines(make_config(runs / "after"))] == list(range(3, STEPS + 1))


def test_suspended_with_its_state_saved(runs: Path) -> None:
    found = json.loads((runs / "suspended.json").read_text())
    assert (found["end"]["reason"], found["end"]["exitCode"]) == ("GuardSuspended", 163)
    assert found["steps"] == [6, 2]
    assert "the state is saved at pvc://runs/tiny/u1/checkpoints/step-000006" in found["end"]["message"]


def test_a_suspended_job_goes_on_as_if_nothing_had_been(runs: Path) -> None:
    """Its rule has three steps again, and the training two."""
    assert "success" in _end(runs / "suspended"), _end(runs / "suspended")
    configs = [make_config(runs / name) for name in ("suspended", "free")]
    assert exported(configs[0]) == exported(configs[1])
    assert steady_lines(configs[0]) == steady_lines(configs[1])


def test_a_warning_is_said_once_and_training_goes_on(runs: Path) -> None:
    assert "success" in _end(runs / "warned")
    said = [line for line in (runs / "said.log").read_text().splitlines() if "GuardWarned" in line]
    assert len(said) == 1
    assert "learning_rate was 0.05 at step 5, above 0.035 in 2 steps running" in said[0]
    assert exported(make_config(runs / "warned")) == exported(make_config(runs / "free"))


def test_a_metric_that_this_job_does_not_measure(runs: Path) -> None:
    ends = [_end(runs / "unknown", rank) for rank in (0, 1)]
    assert {(end["reason"], end["step"]) for end in ends} == {("GuardTripped", 1)}
    assert "spec.guards.rules[0].metric is 'kl', which step 1 did not measure" in ends[0]["message"]


@pytest.mark.parametrize(("name", "metric"), [("grpo", "kl"), ("ppo", "objective/kl")])
def test_an_explosion_of_the_divergence(runs: Path, name: str, metric: str) -> None:
    """The learning rate is absurd: the first steps throw the policy far from its reference."""
    ends = [_end(runs / name, rank) for rank in (0, 1)]
    assert {(end["reason"], end["exitCode"]) for end in ends} == {("GuardTripped", 41)}, ends
    assert ends[0]["message"].startswith(f"{metric} was ")
    good = _steps(runs / name)[-1]
    assert good < ends[0]["step"]
    assert f"/checkpoints/step-{good:06d} (step {good})" in ends[0]["message"]
    assert not (runs / name / "output").exists()
    assert "success" in _end(runs / f"after-{name}"), _end(runs / f"after-{name}")


def test_what_was_counted_survives_a_kill(tmp_path: Path) -> None:
    """Killed in step 6, with two of three broken steps counted: the rule trips there, and no later."""
    model = tmp_path / "model"
    make_model(model)
    for kind in ("whole", "broken"):
        rules = _rules({**RATE, "for_steps": 3})
        _sft(tmp_path / kind, model, topology__processes_per_node=1, **rules)
    killed = ("forward", 6, 0, [str(tmp_path / "broken")])
    assert start_ranks(resume_jobs.killed, killed, 1, tmp_path / "killed").wait()[0] == -9
    _attempt(tmp_path, 2, 1, ["broken", "whole"])
    ends = [_end(tmp_path / kind) for kind in ("whole", "broken")]
    assert [end["step"] for end in ends] == [6, 6]
    assert ends[0]["message"] == ends[1]["message"]
    assert "in 3 steps running since step 4" in ends[0]["message"]
    lines = [steady_lines(make_config(tmp_path / kind)) for kind in ("whole", "broken")]
    assert lines[0] == lines[1]
    assert _steps(tmp_path / "broken") == _steps(tmp_path / "whole")


@pytest.mark.parametrize("zero", [0, 2, 3])
def test_a_loss_that_is_no_number_on_one_rank(tmp_path: Path, zero: int) -> None:
    """Both ranks end alike, name the metric, the step and the rank, and have applied nothing of the step."""
    model = tmp_path / "model"
    make_model(model)
    _sft(tmp_path / "job", model, zero_stage=zero, training__tokens_per_micro_batch=2000)
    running = start_ranks(guard_jobs.poisoned, (1, 3, [str(tmp_path / "job")]), 2, tmp_path / "logs")
    assert running.wait() == [0, 0], running.output()
    ends = [_end(tmp_path / "job", rank) for rank in (0, 1)]
    assert {(end["reason"], end["exitCode"], end["step"]) for end in ends} == {("NonFinite", 40, 2)}
    assert {end["message"] for end in ends} == {ends[0]["message"]}
    assert ends[0]["message"].startswith("loss is not finite at step 3 (by the rows of rank 1). The step was not")
    assert _steps(tmp_path / "job") == [2]


def test_only_groups_of_equal_rewards(tmp_path: Path) -> None:
    """Nothing to learn, and nothing is: the weights stay as they were, and a guard says why."""
    rule = {"metric": "frac_reward_zero_std", "above": 0.99, "for_steps": 2, "action": "Warn"}
    same = {"name": "same", "regex": {"pattern": ""}}
    model = tmp_path / "model"
    config = online_job(tmp_path / "job", model, rewards=[same], guards={"rules": [rule]})
    said = _attempt(tmp_path, 1, 1, ["job"])
    assert "success" in _end(tmp_path / "job"), _end(tmp_path / "job")
    assert {line["grad_norm"] for line in steady_lines(config)} == {0.0}
    assert "GuardWarned: frac_reward_zero_std was 1 at step 2, above 0.99 in 2 steps running" in said
    start = (model / "model.safetensors").read_bytes()
    assert exported(config)["model.safetensors"][-4000:] == start[-4000:]


@pytest.mark.parametrize("updates", [1, 2])
def test_a_sampler_that_says_something_else(tmp_path: Path, updates: int) -> None:
    """The difference is found in steps of one update too, and the report says so."""
    rule = {"metric": SAMPLING_DIFFERENCE, "above": 0.1, "for_steps": 2, "action": "Warn"}
    online_job(
        tmp_path / "job",
        tmp_path / "model",
        rollout__batch_size=2 * updates,
        training__max_steps=2,
        guards={"rules": [rule]},
    )
    signs = tmp_path / "signs"
    signs.mkdir()
    arguments = (guard_jobs.misled, (0.5, [str(tmp_path / "job")]), 1, tmp_path / "logs")
    running = start_ranks(*arguments, **{ENV_SIGNS: str(signs)})
    assert running.wait() == [0], running.output()
    assert "success" in _end(tmp_path / "job"), _end(tmp_path / "job")
    warning = json.loads((signs / REPORT).read_text())["warning"]
    assert (warning["reason"], warning["step"]) == ("SamplerMismatch", 1)
    assert f"{SAMPLING_DIFFERENCE} was 0.5 at step 2, above 0.1 in 2 steps running" in warning["message"]


CELLS: dict[str, tuple[str, dict[str, Any]]] = {
    "never ends": ("GRPO", {"grpo__mask_truncated": True}),
    "never ends, PPO": ("PPO", {}),
    "empty": ("GRPO", {}),
    "empty, PPO": ("PPO", {}),
    "empty, RLOO": ("RLOO", {}),
}


def test_completions_that_never_end_and_that_are_empty(tmp_path: Path) -> None:
    """No stop token that the model has, or nothing but one: neither hangs, fails or divides by zero."""
    model = tmp_path / "model"
    make_model(model)
    configs = {}
    for name, (algorithm, changes) in CELLS.items():
        configs[name] = online_config(tmp_path / name, algorithm, rewards=[TWENTIES], training__max_steps=1, **changes)
        prepare_online(configs[name], model, stop_tokens=tuple(range(64)) if name.startswith("empty") else (99,))
    _attempt(tmp_path, 1, 1, list(CELLS))
    for name, config in configs.items():
        assert "success" in _end(tmp_path / name), (name, _end(tmp_path / name))
        (line,) = steady_lines(config)
        assert line["completions/clipped_ratio"] == float(not name.startswith("empty"))
        assert line["completions/max_length"] == (1 if name.startswith("empty") else 8)
