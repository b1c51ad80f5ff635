"""`posttrain run FILE`: jobs without a cluster, in processes of this machine.

The same parsing, plan and trainer as on a cluster; only the operator's place is taken: a claim is a folder, a pod a
launcher process on loopback. The documents of a file run in order, `fromJob` finds jobs of the same file and of earlier
calls. Ends with each job's status as YAML on standard output; progress and messages go to standard error. Exit code 0
when every job has succeeded, 1 when one failed, 130 when interrupted (the same command then goes on).
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from posttrain_api import names
from posttrain_api.job import InvalidJob, Job, parse_job
from posttrain_cli.local.documents import Documents, sort_documents
from posttrain_cli.local.outcome import may_go_on
from posttrain_cli.local.runner import run_plan
from posttrain_cli.local.workspace import Workspace
from posttrain_cli.manifests import ManifestError, load_documents, read_text
from posttrain_operator.plan.build import build_plan
from posttrain_operator.plan.errors import PlanError
from posttrain_operator.plan.parents import dependencies
from posttrain_operator.plan.types import Plan

NEEDED = ("torch", "transformers", "deepspeed", "peft", "datasets", "posttrain_trainer")
DONE, FAILED, INTERRUPTED = 0, 1, 130


class RunError(Exception):
    """What keeps a job from being started here; the message says the next step."""


def add_parser(subparsers: Any) -> None:
    """Adds the subcommand."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "run", help="run jobs on this machine, without a cluster", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("file", help="YAML with PostTrainingJobs and the ConfigMaps they use; - for standard input")
    parser.add_argument(
        "--workdir",
        type=Path,
        default=Path(".posttrain"),
        metavar="DIR",
        help="logs, state, status (default: .posttrain)",
    )
    parser.add_argument(
        "--volumes", type=Path, metavar="DIR", help="claim NAME is the folder DIR/NAME (default: WORKDIR/volumes)"
    )
    parser.add_argument("--cpu", action="store_true", help="run on the CPU although this machine has GPUs")
    parser.set_defaults(main=main)


def main(args: argparse.Namespace) -> int:
    """Runs the file; the exit code."""
    try:
        require_trainer()
        workspace = make_workspace(args)
        return run_file(read_file(args.file), workspace, cpu=args.cpu)
    except InvalidJob as error:
        print(f"posttrain run: {args.file} is not valid:\n{error}", file=sys.stderr)
    except ManifestError as error:
        print(f"posttrain run: {args.file}:{error.line}: {error}", file=sys.stderr)
    except (RunError, PlanError, OSError) as error:
        print(f"posttrain run: {error}", file=sys.stderr)
    return FAILED


def require_trainer() -> None:
    """RunError where the trainer's libraries are not installed beside the command line."""
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise RunError(
            f"the trainer is not installed here ({', '.join(missing)} missing); "
            "next: pip install '.[operator,trainer]' in a checkout of posttrain, or apply the file to a cluster with "
            "kubectl"
        )


def make_workspace(args: argparse.Namespace) -> Workspace:
    """The folders, made where they are missing."""
    root = args.workdir.absolute()
    volumes = args.volumes.absolute() if args.volumes else root / "volumes"
    for folder in (root, volumes):
        folder.mkdir(parents=True, exist_ok=True)
    return Workspace(root, volumes)


def read_file(name: str) -> Documents:
    """The file's documents. RunError where no job is among them."""
    values = (document.value for document in load_documents(read_text(name)))
    documents = sort_documents(value for value in values if isinstance(value, dict))
    if not documents.jobs:
        raise RunError(f"{name} holds no {names.KIND}; next: write one, examples/quickstart shows how")
    for other in documents.others:
        note(f"{other} is left alone: a local run knows jobs and ConfigMaps only")
    return documents


def run_file(documents: Documents, workspace: Workspace, cpu: bool) -> int:
    """All jobs in order; stops at the first that does not succeed. Every job is parsed before the first one starts."""
    for config_map in documents.config_maps:
        workspace.write_config_map(config_map)
    jobs = [(manifest, parse_job(with_uid(manifest, workspace))) for manifest in documents.jobs]
    for manifest, job in jobs:
        status = run_job(job, workspace, cpu)
        result = {**with_uid(manifest, workspace), "status": status}
        workspace.write_result(job.name, result)
        print("---\n" + yaml.safe_dump(result, sort_keys=False, allow_unicode=True), end="", flush=True)
        if status["state"] != "Succeeded":
            say_what_next(job.name, status, workspace)
            return INTERRUPTED if status["state"] == "Suspended" else FAILED
    return DONE


def with_uid(manifest: Mapping[str, Any], workspace: Workspace) -> dict[str, Any]:
    """The manifest with the uid that it has in this workspace."""
    if not isinstance(manifest.get("spec"), dict) or not (manifest.get("metadata") or {}).get("name"):
        return dict(manifest)  # parse_job says what is wrong with it
    return {**manifest, "metadata": {**manifest["metadata"], "uid": workspace.uid(manifest)}}


def run_job(job: Job, workspace: Workspace, cpu: bool) -> dict[str, Any]:
    """Plans and runs one job; its status."""
    claim = job.storage_claim
    (workspace.volumes / claim).mkdir(exist_ok=True)
    parents = {name: parent for name in dependencies(job) if (parent := workspace.parent(name))}
    on_cpu = cpu or not gpus_here()
    plan = build_plan(job, workspace.settings(job.name, claim, on_cpu), parents)
    check_machine(plan, workspace, on_cpu)
    note(f"{job.name}: {describe(plan, on_cpu)}; logs in {workspace.job(job.name)}")
    return run_plan(plan, workspace.job(job.name), sys.stderr)


def check_machine(plan: Plan, workspace: Workspace, on_cpu: bool) -> None:
    """RunError where a claim, a script or a token is missing, or this machine has fewer GPUs than asked for."""
    for claim in plan.claims:
        if not (workspace.volumes / claim).is_dir():
            raise RunError(
                f"claim {claim!r} has no folder here; next: mkdir {workspace.volumes / claim} and put the data into it"
            )
    for path in needed_files(plan):
        if not path.is_file():
            raise RunError(f"{path} is missing; next: put it there, or for a script its ConfigMap into the same file")
    asked = plan.config.topology.nodes * plan.config.topology.gpus_per_node
    if not on_cpu and asked > gpus_here():
        raise RunError(
            f"{plan.config.job.name} asks for {asked} GPUs and this machine has {gpus_here()}; "
            "next: lower spec.resources, or add --cpu"
        )


def needed_files(plan: Plan) -> list[Path]:
    """What rewards read on this machine: scripts, which come from ConfigMaps, and tokens of servers."""
    scripts = [Path(reward.python.path) for reward in plan.config.rewards if reward.python]
    folders = [reward.http.secret_path for reward in plan.config.rewards if reward.http]
    return [*scripts, *(Path(folder) / "token" for folder in folders if folder)]


def describe(plan: Plan, on_cpu: bool) -> str:
    """Where it runs, in words."""
    topology = plan.config.topology
    where = f"{topology.nodes} launcher(s) with {topology.processes_per_node} process(es) each"
    instead = " instead of the GPUs asked for" if on_cpu and topology.gpus_per_node else ""
    device = f"CPU ({plan.config.training.precision.lower()})" if on_cpu else "GPU"
    return f"{where} on the {device}{instead}"


def gpus_here() -> int:
    """NVIDIA devices of this machine that CUDA_VISIBLE_DEVICES leaves visible."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return len([each for each in visible.split(",") if each.strip() not in ("", "-1")])
    return len([each for each in Path("/dev").glob("nvidia[0-9]*") if each.name.removeprefix("nvidia").isdigit()])


def say_what_next(name: str, status: Mapping[str, Any], workspace: Workspace) -> None:
    """One line on standard error for a job that did not succeed."""
    reason = f" ({status['reason']})" if "reason" in status else ""
    note(f"{name}: {status['state']}{reason}: {status['message']}")
    if may_go_on(status):
        note("run the same command again and it goes on from its last checkpoint")
    note(f"logs: {workspace.job(name)}")


def note(text: str) -> None:
    """A line for the person: standard output is the status alone."""
    print(text, file=sys.stderr, flush=True)


__all__: Sequence[str] = ("add_parser", "main")
