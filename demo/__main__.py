"""`python -m demo`: the whole way of two jobs, or of six, on this machine, called by `make demo`.

Prepares a cluster, trains, measures the result with plain libraries, says where everything is, and cleans up: also when
it fails or is interrupted. Ends with 0 only when every job succeeded and the model got better.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from demo import cluster as platform
from demo import figures, jobs, show
from demo.settings import (
    BASE,
    OPERATOR_NAMESPACE,
    RAISES,
    RELEASE,
    ROOT,
    SCORES,
    TUNED,
    DemoError,
    Settings,
    from_environment,
)
from devcluster import binaries, launcher
from devcluster.errors import DevclusterError
from devcluster.state import ClusterSpec
from devcluster.testing import Cluster

TITLES = {
    True: "Six jobs: pre-train from scratch, fine-tune, then a reward model, DPO, GRPO and PPO side by side",
    False: "Two jobs: pre-train a model from scratch, then fine-tune it with LoRA on two pods",
}
"""By whether all stages are run."""


def main() -> int:
    """The exit code: 0 done, 1 failed, 130 interrupted."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        return demonstrate(from_environment())
    except KeyboardInterrupt:
        show.line("\ninterrupted; everything that was started has been stopped", show.RED)
        return 130
    except (DemoError, DevclusterError, RuntimeError, OSError) as error:
        show.line(f"\nthe demo failed: {error}", show.RED)
        return 1


def demonstrate(settings: Settings) -> int:
    """All steps; the cluster is stopped on every way out, unless it is to be kept and all went well."""
    steps = show.Steps()
    spec = platform.describe(settings)
    with steps.step("Kubernetes components (compiled once, then kept in the user's cache)"):
        platform.build(say)
    keep = False
    try:
        with steps.step("A cluster on this machine: real control plane, two nodes that offer 8 nvidia.com/gpu each"):
            cluster = platform.start(spec, say)
        train(cluster, steps, settings)
        keep = settings.keep
    finally:
        if not keep:
            launcher.stop(spec)
    closing_words(spec, keep, steps)
    return 0


def train(cluster: Cluster, steps: show.Steps, settings: Settings) -> None:
    """Installs, applies, waits, measures. On failure the cluster is asked why before the error goes on."""
    try:
        with steps.step("The operator, by helm, under the chart's own rights"):
            platform.install(cluster)
        with steps.step("A claim with the data: arithmetic with worked answers, four of ten training answers wrong"):
            volume = platform.write_data(cluster)
        with steps.step(TITLES[settings.whole]):
            jobs.run(cluster, settings)
    except (DemoError, RuntimeError):
        jobs.explain_failure(cluster)
        raise
    with steps.step("Accuracy on 200 held-out problems, by plain transformers on the exported models"):
        folders = {name: output_folder(cluster, name, volume) for name in settings.jobs}
        answering = {name: folder for name, folder in folders.items() if name not in SCORES}
        measured = measure(answering, volume / "data" / "held_out.jsonl")
        figures.show_all(measured, settings.state / "accuracy.svg")
        check(measured)
    show_results(cluster, folders)


def output_folder(cluster: Cluster, name: str, volume: Path) -> Path:
    """Where the volume holds the model that the job's status names."""
    uri = str(cluster.get("ptj", name)["status"]["output"]["uri"])
    return volume / uri.removeprefix("pvc://").split("/", 1)[1]


def measure(folders: dict[str, Path], questions: Path) -> list[dict[str, Any]]:
    """The accuracy of each model, in order. DemoError where a model cannot be measured."""
    command = [
        sys.executable,
        "-m",
        "demo.accuracy",
        str(questions),
        *(f"{name}={path}" for name, path in folders.items()),
    ]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "TRANSFORMERS_VERBOSITY": "error"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise DemoError(f"measuring failed: {done.stderr.strip()[-2000:]}")
    return [json.loads(line) for line in done.stdout.splitlines()]


def check(measured: list[dict[str, Any]]) -> None:
    """DemoError where fine-tuning did not raise the accuracy of the most probable answer, or a later stage not enough
    that of sampled ones."""
    by_name = {each["name"]: each for each in measured}
    before, after = by_name[BASE]["greedy"], by_name[TUNED]["greedy"]
    if after <= before:
        raise DemoError(f"fine-tuning did not raise the accuracy ({before:.0%} before, {after:.0%} after)")
    start = by_name[TUNED]["sampled"]
    for name, least in RAISES.items():
        found = by_name[name]["sampled"] if name in by_name else 1.0
        if found <= start + least:
            raise DemoError(
                f"{name} should raise the accuracy of sampled answers by more than {least:.0%}: {start:.0%} before, "
                f"{found:.0%} after"
            )


def show_results(cluster: Cluster, folders: dict[str, Path]) -> None:
    """The jobs as they stand, and where models and metrics are."""
    show.line()
    show.line("The jobs", show.BOLD)
    show.block(cluster.kubectl("get", "ptj", "-o", "wide"))
    show.line()
    show.line("Models and metrics", show.BOLD)
    for name, folder in folders.items():
        show.block(f"{name}: model {folder}\n{' ' * len(name)}  metrics {folder.parent / 'metrics.jsonl'}")


def closing_words(spec: ClusterSpec, keep: bool, steps: show.Steps) -> None:
    """How to look further, and what became of the cluster."""
    show.line()
    if keep:
        metrics = f"/api/v1/namespaces/{OPERATOR_NAMESPACE}/services/{RELEASE}:metrics/proxy/metrics"
        show.line("The cluster is still running. Look further:", show.BOLD)
        show.block(
            f"alias kubectl='{binaries.binary('kubectl')} --kubeconfig={spec.kubeconfig}'\n"
            f"kubectl describe ptj {TUNED}\n"
            f"kubectl logs {TUNED}-master-0\n"
            f"kubectl get --raw {metrics} | grep posttraining_\n"
            f"stop it: {sys.executable} -m devcluster down --state {spec.state}"
        )
    else:
        show.line("The cluster has been stopped. `make demo KEEP=1` keeps it, to look further with kubectl.")
    show.line(f"Demo finished in {steps.total():.0f} s.", show.GREEN)


def say(text: str) -> None:
    """One line of progress from the cluster's own tools."""
    show.block(text)


if __name__ == "__main__":
    sys.exit(main())
