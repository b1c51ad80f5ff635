"""`posttrain validate` as a user types it."""

from __future__ import annotations

import io
import json
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from posttrain_cli.__main__ import main
from tests.api.rule_cases import BEST, CHAIN, PREFERENCE, REMOVE, job

ONE_GOOD = yaml.safe_dump(job({"spec.model.uri": "pvc://models/a"}))


def validate(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = main(["validate", *arguments])
    printed = capsys.readouterr()
    return code, printed.out, printed.err


def write(folder: Path, *manifests: object) -> str:
    path = folder / "job.yaml"
    path.write_text("---\n".join(yaml.safe_dump(manifest) for manifest in manifests))
    return str(path)


def test_valid(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path, job({"spec.model.uri": "pvc://models/a"}))
    assert validate(capsys, path) == (0, f"valid {path}: my-job\n", "")


def test_every_problem_with_its_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "job.yaml"
    path.write_text(
        "apiVersion: posttrain.dev/v1alpha1\nkind: PostTrainingJob\nmetadata: {name: bad}\nspec:\n"
        "  stage: SFT\n  lora:\n    rank: 0\n    alhpa: 1\n"
        "  model:\n    uri: ftp://a/b\n  data:\n    train:\n    - uri: pvc://a/b\n"
    )
    code, out, _ = validate(capsys, str(path))
    assert code == 1
    assert out.splitlines() == [
        f"{path}:4: error spec.storage: is required (found nothing); write e.g. {{claimName: runs}}",
        f"{path}:7: error spec.lora.rank: must be between 1 and 512 (found 0); choose e.g. 16",
        f"{path}:8: error spec.lora.alhpa: unknown field (found 1); did you mean alpha?",
        (
            f'{path}:10: error spec.model.uri: must be a URI of a scheme that works here (found "ftp://a/b"); write '
            "hf://org/name[@revision], s3://bucket/folder, gs://bucket/folder, pvc://claim/path or "
            "image:///absolute/path"
        ),
    ]


def test_standard_input(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(ONE_GOOD + "---\n" + ONE_GOOD.replace("my-job", "other")))
    assert validate(capsys, "-") == (0, "valid <stdin>: my-job, other\n", "")


def test_file_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = validate(capsys, "nowhere.yaml")
    assert code == 1
    assert "nowhere.yaml: cannot be read" in err


def test_broken_yaml(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "x.yaml"
    path.write_text("a: [1\n")
    code, _, err = validate(capsys, str(path))
    assert code == 1
    assert f"{path}:2: not valid YAML" in err


def test_warnings_count_when_strict(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path, {**job({}), "status": {"state": "Succeeded"}})
    code, out, _ = validate(capsys, path)
    assert code == 0
    assert "warning status: is written by the operator" in out
    assert validate(capsys, path, "--strict")[0] == 1


def test_notes_never_count(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = validate(capsys, write(tmp_path, job({}), {"kind": "ConfigMap", "apiVersion": "v1"}), "--strict")
    assert code == 0
    assert "note spec.model.uri: hf://Qwen/Qwen2.5-1.5B-Instruct names no revision" in out
    assert "note ConfigMap: not a PostTrainingJob" in out


def test_file_without_a_job(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = validate(capsys, write(tmp_path, {"kind": "Pod"}, [1, 2]))
    assert code == 1
    assert "no PostTrainingJob in it" in out


def test_two_jobs_of_one_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = validate(capsys, write(tmp_path, job({}), job({})))
    assert code == 1
    assert "my-job is also the job of line 1" in out


def test_circle(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a = job({"metadata.name": "a", "spec.model": {"fromJob": {"name": "b"}}})
    b = job({"metadata.name": "b", "spec.checkpoint": {"from": {"fromJob": {"name": "a"}}}})
    code, out, _ = validate(capsys, write(tmp_path, a, b))
    assert code == 1
    assert "a waits, in the end, for itself" in out
    assert "b waits, in the end, for itself" in out


def test_a_chain_of_adapters_is_resolved(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The base is the first job's model; each adapter below is merged into it, a continued one counts once."""
    second = job({"metadata.name": "second", "spec.model": {"fromJob": {"name": "my-job"}}})
    third = job({**CHAIN, "metadata.name": "third", "spec.model": {"fromJob": {"name": "second"}}})
    last = job({**PREFERENCE, "metadata.name": "last", "spec.model": {"fromJob": {"name": "third"}}})
    code, out, _ = validate(capsys, write(tmp_path, job({}), second, third, last), "--resolved")
    assert code == 0, out
    models = {}
    for text in out.split("---\n")[1:]:
        ((name, resolved),) = yaml.safe_load(text).items()
        models[name] = resolved["model"]
    base = "hf://Qwen/Qwen2.5-1.5B-Instruct"
    outputs = [f"pvc://runs/{name}/uid/output" for name in ("my-job", "second", "third")]
    assert [models[name]["uri"] for name in ("second", "third", "last")] == [base] * 3
    assert models["second"]["adapters"] == outputs[:1]
    assert models["third"]["adapters"] == outputs[:2]
    assert models["last"]["adapters"] == [outputs[0], outputs[2]], "third's output is second's, trained further"
    merged = job({"spec.output": {"mergeAdapter": True}})
    code, out, _ = validate(capsys, write(tmp_path, merged, second), "--resolved")
    assert code == 0
    assert "adapters:" not in out


def test_best_of_a_job_that_keeps_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    child = job({"metadata.name": "child", "spec.model": {"fromJob": {"name": "my-job", "checkpoint": "Best"}}})
    code, out, _ = validate(capsys, write(tmp_path, job({}), child))
    assert code == 1
    assert "spec.model.fromJob.checkpoint: asks for the best model of my-job, which kept none" in out
    assert validate(capsys, write(tmp_path, job(BEST), child))[0] == 0
    assert validate(capsys, write(tmp_path, child))[0] == 0, "of a job elsewhere nothing is known"


def test_continuing_a_job_elsewhere(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert validate(capsys, write(tmp_path, job(CHAIN)))[0] == 0
    whole = job({"metadata.name": "base", "spec.lora": REMOVE, "spec.tuning": "Full"})
    code, out, _ = validate(capsys, write(tmp_path, whole, job(CHAIN)))
    assert code == 1
    assert "spec.lora.continueAdapter: needs a job whose output is an adapter" in out


def test_plan_problems_are_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path, job({"spec.resources": {"memory": "4Gi", "sharedMemory": "8Gi"}}))
    code, out, _ = validate(capsys, path)
    assert code == 1
    assert "spec.resources.sharedMemory: must be less than memory (4Gi)" in out


def test_resolved(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = validate(capsys, write(tmp_path, job({"spec.model.uri": "pvc://models/a"})), "--resolved")
    assert code == 0
    resolved = yaml.safe_load(out.partition("---\n")[2])["my-job"]
    said = {"rank": 16, "alpha": 32.0, "dropout": 0.0, "targetModules": ["all-linear"]}
    assert resolved["lora"] == {**said, "rslora": False, "dora": False, "continueAdapter": False}
    assert resolved["deepspeed"] == {"zeroStage": "Auto", "offloadOptimizer": False, "offloadParameters": False}


def test_json_is_yaml(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "job.json"
    path.write_text(json.dumps(job({"spec.lora": REMOVE})))
    assert validate(capsys, str(path))[0] == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [(["--help"], "kubectl apply -f job.yaml"), (["validate", "--help"], "every\nproblem with its line")],
)
def test_help_teaches(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 0
    assert words in capsys.readouterr().out


def test_colours_on_a_terminal_only(tmp_path: Path) -> None:
    path = write(tmp_path, job({"spec.lora.rank": 0}))
    command = [sys.executable, "-m", "posttrain_cli", "validate", path]
    plain = subprocess.run(command, capture_output=True, text=True, check=False)
    assert "\x1b" not in plain.stdout
    assert on_a_terminal(command, {}).count("\x1b[31merror") == 1
    assert "\x1b" not in on_a_terminal(command, {"NO_COLOR": "1"})


def on_a_terminal(command: list[str], environment: dict[str, str]) -> str:
    ours, theirs = pty.openpty()
    clean = {key: value for key, value in os.environ.items() if key != "NO_COLOR"}
    subprocess.run(command, stdout=theirs, stdin=theirs, env={**clean, **environment}, check=False)
    os.close(theirs)
    text = os.read(ours, 65536).decode()
    os.close(ours)
    return text


def test_reader_that_goes_away(tmp_path: Path) -> None:
    path = write(tmp_path, *(job({"metadata.name": f"job-{number}"}) for number in range(200)))
    command = f"{sys.executable} -m posttrain_cli validate {path} | head -1"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert "Traceback" not in done.stderr


def test_named_for_kubectl(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["/usr/local/bin/kubectl-posttrain"])
    with pytest.raises(SystemExit):
        main(["--help"])
    assert capsys.readouterr().out.startswith("usage: kubectl posttrain")


def test_needs_pydantic_and_yaml_only() -> None:
    """The command line is installed without the extras of operator and trainer."""
    heavy = (
        "aiohttp",
        "cryptography",
        "datasets",
        "deepspeed",
        "kopf",
        "kubernetes",
        "numpy",
        "prometheus_client",
        "torch",
    )
    code = f"import sys, posttrain_cli.__main__; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
