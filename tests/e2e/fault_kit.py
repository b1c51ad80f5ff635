"""Jobs of two pods that are hit in the middle, and how: real processes killed, real nodes lost; what no kill from
outside can do is done by `saboteur/sitecustomize.py` inside the pod."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from e2e_kit import OPERATOR_NAMESPACE, RELEASE, TINY_SFT, Bench, Manifest, job, merged, step

SABOTEUR = Path(__file__).parent / "saboteur" / "sitecustomize.py"
PACE = {"SFT": 0.25, "RL": 0.5}
STEPS = {"SFT": 40, "RL": 12}
EVERY = {"SFT": 8, "RL": 3}
GRACE = 25
PROMPTS = [{"prompt": f"What is {a}+{b}?", "digit": str((a + b) % 10)} for a in range(8) for b in range(4)]
SCORES = """
def digits(prompts, completions, digit, **columns):
    return [float(len(text)) / 100 + (one in text) for text, one in zip(completions, digit)]
"""
_TIMES = ("time/", "step_time", "tokens_per_second", "memory_bytes")


def install(bench: Bench) -> None:
    """The saboteur, prompts and the reward function."""
    target = bench.volume() / "saboteur"
    target.mkdir(exist_ok=True)
    shutil.copy(SABOTEUR, target)
    bench.rows("data/prompts.jsonl", PROMPTS)
    scores: Manifest = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "scores"}}
    bench.apply({**scores, "data": {"reward.py": SCORES}})


def paced(name: str, seconds: float) -> list[Manifest]:
    """The environment of a job with the saboteur in it, and its pause before each step."""
    variables = {"PYTHONPATH": "/claims/runs/saboteur", "SABOTAGE": name, "SABOTAGE_PACE": str(seconds)}
    return [{"name": key, "value": value} for key, value in variables.items()]


def two_pods(name: str, stage: str, **changes: Any) -> Manifest:
    """SFT or GRPO on two pods, slow enough to be hit in the middle."""
    online: Manifest = {
        "algorithm": "GRPO",
        "data": {"train": [{"uri": "pvc://runs/data/prompts.jsonl"}], "maxLength": 64},
        "rewards": [{"python": {"configMapRef": {"name": "scores"}, "function": "digits"}}],
        "rollout": {"maxNewTokens": 8, "batchSize": 8},
        "grpo": {"groupSize": 4},
        "training": {"batchSize": 8},
    }
    made = job(
        name,
        TINY_SFT,
        stage=stage,
        env=paced(name, PACE[stage]),
        checkpoint={"everySteps": EVERY[stage]},
        resources={"nodes": 2},
        runPolicy={"terminationGracePeriodSeconds": GRACE},
    )
    made["spec"] = merged(made["spec"], merged(online if stage == "RL" else {}, changes))
    made["spec"]["training"]["maxSteps"] = STEPS[stage]
    return made


@dataclass(frozen=True)
class Hit:
    """A job at the moment of its fault."""

    bench: Bench
    name: str
    before: Mapping[str, Any] = field(default_factory=dict)

    @property
    def pods(self) -> list[str]:
        """Names of its pods, the first pod first."""
        return [f"{self.name}-master-0", f"{self.name}-worker-0"]

    def order(self, **what: Any) -> None:
        """To the saboteur in the job's pods: who, do (exit with code, tear, nan), and for tear: always, step."""
        path = self.bench.volume() / "saboteur" / f"{self.name}.json"
        path.with_suffix(".tmp").write_text(json.dumps(what))
        path.with_suffix(".tmp").rename(path)

    def signal_rank(self, rank: int, number: signal.Signals) -> None:
        """A signal to a rank's own process."""
        os.kill(process_of(self.bench, self.name, rank), number)

    def node_of(self, pod: str) -> str:
        """The node that a pod runs on."""
        return str(self.bench.get("pod", pod)["spec"]["nodeName"])


def process_of(bench: Bench, name: str, rank: int) -> int:
    """The pid, on this machine, of a rank; its configuration tells it from a job of another cluster."""
    uid, wanted = str(bench.get("ptj", name)["metadata"]["uid"]), f"RANK={rank}".encode()
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            command = (folder / "cmdline").read_bytes()
            if b"posttrain_trainer.worker" not in command or b"torch.distributed" in command:
                continue
            ours = uid in (folder / "root/etc/posttrain/config/config.json").read_text()
            if ours and wanted in (folder / "environ").read_bytes().split(b"\0"):
                return int(folder.name)
        except OSError:  # ended meanwhile, another user's, or no container of a job
            continue
    raise AssertionError(f"no process of rank {rank} of {name}:\n{bench.story(name)}")


def in_the_middle(bench: Bench, name: str, stage: str) -> Hit:
    """Waits until the job has a checkpoint and some steps after it."""
    first = EVERY[stage]
    status = bench.until(name, lambda status: step(status) > first and last_saved(status) >= first, 600)
    return Hit(bench, name, status)


def last_saved(status: Mapping[str, Any]) -> int:
    """Step of the last checkpoint that the status knows."""
    return int(((status.get("checkpoints") or {}).get("last") or {}).get("step") or 0)


def weights(bench: Bench, name: str) -> str:
    """Digest of the adapter that the job put out."""
    found = sorted((bench.run_folder(name) / "output").rglob("*.safetensors"))
    assert found, f"{name} put no weights out"
    digest = hashlib.sha256()
    for path in found:
        digest.update(path.read_bytes())
    return digest.hexdigest()


def lines(bench: Bench, name: str) -> list[dict[str, Any]]:
    """metrics.jsonl without what is measured with a clock."""
    return [
        {key: value for key, value in line.items() if not key.startswith(_TIMES) and not key.endswith("/seconds")}
        for line in bench.metrics(name)
    ]


def resumed_at(bench: Bench, name: str) -> int:
    """The step that the last attempt went on from, by its own log; 0: from the start."""
    for line in bench.kubectl("logs", f"{name}-master-0", check=False).splitlines():
        if "newest checkpoint: " in line:
            found = line.rpartition("newest checkpoint: ")[2].strip()
            return int(found) if found.isdigit() else 0
    return 0


def operator(bench: Bench, replicas: int, *deletion: str) -> None:
    """Scales the operator and waits until it is so; `deletion`: how its pods are ended, where not gently."""
    name, pods = f"deployment/{RELEASE}", ("pods", "-l", "app.kubernetes.io/name=posttrain-operator")
    bench.cluster.kubectl("-n", OPERATOR_NAMESPACE, "scale", name, f"--replicas={replicas}")
    if deletion:
        bench.cluster.kubectl("-n", OPERATOR_NAMESPACE, "delete", *pods, *deletion)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if len(bench.cluster.kubectl("-n", OPERATOR_NAMESPACE, "get", *pods, "-o", "name").split()) == replicas:
            return
        time.sleep(0.5)
    raise AssertionError(f"the operator was not scaled to {replicas}")


Strike = Callable[[Hit], None]
