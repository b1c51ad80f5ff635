"""`posttrain validate` and `posttrain run` with jobs of stage RL: scripts, parents, what must be there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from posttrain_api.job import parse_job
from posttrain_cli import run
from posttrain_cli.__main__ import main
from posttrain_cli.local.documents import sort_documents
from posttrain_cli.local.workspace import Workspace
from posttrain_operator.plan.build import build_plan
from tests.api.online_cases import JUDGE, PYTHON, RL
from tests.api.rule_cases import REMOVE, REWARD, job

SCRIPTED = {**RL, "spec.rewards": [PYTHON], "spec.model.uri": "pvc://models/a"}
TOKEN = {"http": {"url": "https://judge.example.com", "secretRef": {"name": "judge-token"}}}


def config_map(text: str, key: str = "reward.py") -> dict[str, Any]:
    return {"kind": "ConfigMap", "apiVersion": "v1", "metadata": {"name": "my-reward"}, "data": {key: text}}


def validate(folder: Path, capsys: pytest.CaptureFixture[str], *manifests: Any) -> tuple[int, str]:
    path = folder / "job.yaml"
    path.write_text("---\n".join(yaml.safe_dump(manifest, default_style="|") for manifest in manifests))
    code = main(["validate", str(path)])
    return code, capsys.readouterr().out


def test_a_good_script(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for text in (
        "def score(prompts, completions, **columns): return [1.0 for _ in completions]\n",
        "async def score(prompts, completions): return []\n",
        "from functools import partial\nscore = partial(print)\n",
        "try:\n    from mine import score\nexcept ImportError:\n    raise\n",
    ):
        code, out = validate(tmp_path, capsys, job(SCRIPTED), config_map(text))
        assert code == 0, out
    assert validate(tmp_path, capsys, job(SCRIPTED))[0] == 0, "a ConfigMap of the cluster's is not looked at"


def test_a_script_that_is_no_python(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "job.yaml"
    script = (
        "kind: ConfigMap\napiVersion: v1\nmetadata:\n  name: my-reward\ndata:\n  reward.py: |\n    x = 1\n    def (:\n"
    )
    path.write_text(f"{script}---\n{yaml.safe_dump(job(SCRIPTED))}")
    assert main(["validate", str(path)]) == 1
    assert f"{path}:8: error reward.py of ConfigMap my-reward is no Python: invalid syntax" in capsys.readouterr().out


def test_a_script_without_the_function(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out = validate(tmp_path, capsys, job(SCRIPTED), config_map("def scores(p, c): ...\n"))
    assert code == 1
    assert "spec.rewards[0].python.function: reward.py has no function score (it has scores)" in out


def test_a_config_map_without_the_key(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out = validate(tmp_path, capsys, job(SCRIPTED), config_map("", "other.py"))
    assert code == 1
    assert "spec.rewards[0].python.configMapRef.key: ConfigMap my-reward has no text at reward.py" in out


def test_a_reward_model_of_the_same_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    child = job({**RL, "spec.rewards": [JUDGE]})
    scorer, writer = job({**REWARD, "metadata.name": "judge"}), job({"metadata.name": "judge"})
    assert validate(tmp_path, capsys, scorer, child)[0] == 0
    code, out = validate(tmp_path, capsys, writer, child)
    assert code == 1
    assert "names a job of stage SFT, whose model answers and cannot score" in out
    assert validate(tmp_path, capsys, child)[0] == 0, "of a job elsewhere nothing is known"


def test_a_circle_through_a_reward(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    child = job({**RL, "spec.rewards": [JUDGE]})
    scorer = job({**REWARD, "metadata.name": "judge", "spec.model": {"fromJob": {"name": "my-job"}}})
    code, out = validate(tmp_path, capsys, scorer, child)
    assert code == 1
    assert "judge waits, in the end, for itself" in out


def test_moving_models_are_noted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rewards = [{"model": {"uri": "hf://a/judge"}}, {"model": {"uri": f"hf://a/b@{'0' * 40}"}}]
    _, out = validate(tmp_path, capsys, job({**RL, "spec.model.uri": "pvc://a", "spec.rewards": rewards}))
    assert "note spec.rewards[0].model.uri: hf://a/judge names no revision" in out
    assert "rewards[1]" not in out


def test_a_local_run_finds_scripts_and_tokens(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path, tmp_path / "volumes")
    for claim in ("datasets", "models"):
        (workspace.volumes / claim).mkdir(parents=True)
    manifest = job({**SCRIPTED, "metadata.uid": "u", "spec.rewards": [PYTHON, TOKEN], "spec.lora": REMOVE,
                    "spec.tuning": "Full"})  # fmt: skip
    plan = build_plan(parse_job(manifest), workspace.settings("my-job", "runs", allow_cpu=True), {})
    with pytest.raises(run.RunError, match=r"configmaps/my-reward/reward\.py is missing; next: put it there"):
        run.check_machine(plan, workspace, on_cpu=True)
    for document in sort_documents([config_map("def score(p, c): ...")]).config_maps:
        workspace.write_config_map(document)
    with pytest.raises(run.RunError, match="secrets/judge-token/token is missing"):
        run.check_machine(plan, workspace, on_cpu=True)
    (tmp_path / "secrets" / "judge-token").mkdir(parents=True)
    (tmp_path / "secrets" / "judge-token" / "token").write_text("x")
    run.check_machine(plan, workspace, on_cpu=True)
