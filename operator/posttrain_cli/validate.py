"""`posttrain validate FILE`: says everything that is wrong with the jobs of a file, without a cluster.

The same models and rules as the API server's, and the operator's own plan on top (memory that cannot hold /dev/shm, a
parent whose
output cannot be trained further). What only the cluster knows (claims, Secrets, other jobs) is not looked at.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from posttrain_api import names
from posttrain_api.job import InvalidJob, Job, parse_job
from posttrain_cli.colours import paint
from posttrain_cli.findings import Finding, file_findings, job_findings, placeholder_parents, with_uid
from posttrain_cli.manifests import STDIN, Document, ManifestError, load_documents, read_text
from posttrain_cli.scripts import script_findings
from posttrain_operator.plan.build import build_plan
from posttrain_operator.plan.errors import PlanError
from posttrain_operator.plan.types import Plan, PlanSettings

GOOD, BAD = 0, 1
_COLOURS = {"error": "red", "warning": "yellow", "note": "blue"}
PLATFORM_IMAGE = "the platform's trainer image"
DESCRIPTION = """\
Checks the PostTrainingJobs of FILE as the API server and the operator would, without a cluster, and prints every
problem with its line: the field, the rule, the value found, and what to write instead.

Exit code 0: all jobs are valid; 1: at least one problem.

  posttrain validate job.yaml
  posttrain validate job.yaml --resolved      what the job gets where it says nothing
  kustomize build . | posttrain validate -    standard input, several documents
"""


def add_parser(subparsers: Any) -> None:
    """Adds the subcommand."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "validate",
        help="check jobs without a cluster",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("file", metavar="FILE", help="YAML with one or more documents; - reads standard input")
    parser.add_argument("--strict", action="store_true", help="warnings count as problems (notes do not)")
    parser.add_argument("--resolved", action="store_true", help="print the effective values of each job as YAML")
    parser.set_defaults(main=main)


@dataclass(frozen=True)
class _Checked:
    """A document, the job in it, and its plan, as far as they could be made."""

    document: Document
    job: Job | None
    plan: Plan | None
    findings: tuple[Finding, ...]


def main(args: argparse.Namespace) -> int:
    """Runs the command; the exit code."""
    shown = "<stdin>" if args.file == STDIN else args.file
    try:
        documents = load_documents(read_text(args.file))
    except (OSError, UnicodeDecodeError) as error:
        return _refuse(f"{shown}: cannot be read: {error}")
    except ManifestError as error:
        return _refuse(f"{shown}:{error.line}: {error}")
    checked = _check_all(documents)
    findings = [*(finding for item in checked for finding in item.findings), *file_findings(documents)]
    findings += script_findings(documents, [(item.document, item.job) for item in checked if item.job])
    for finding in sorted(findings, key=lambda found: found.line):
        _print_finding(shown, finding)
    counted = ("error", "warning") if args.strict else ("error",)
    bad = any(finding.level in counted for finding in findings)
    _print_summary(shown, checked, bad)
    if args.resolved:
        _print_resolved(checked)
    return BAD if bad else GOOD


def _check_all(documents: Sequence[Document]) -> list[_Checked]:
    jobs = [(document, *_parse(document)) for document in documents if _is_job(document)]
    known = {job.name: job for _, job, _ in jobs if job}
    return [_plan(document, job, problems, known) for document, job, problems in jobs]


def _is_job(document: Document) -> bool:
    return isinstance(document.value, dict) and document.value.get("kind") == names.KIND


def _parse(document: Document) -> tuple[Job | None, tuple[Finding, ...]]:
    try:
        job = parse_job(with_uid(document.value))
    except InvalidJob as error:
        return None, tuple(Finding(document.line_of(problem.path), str(problem)) for problem in error.problems)
    return job, job_findings(document, job)


def _plan(document: Document, job: Job | None, found: tuple[Finding, ...], known: dict[str, Job]) -> _Checked:
    if job is None:
        return _Checked(document, None, None, found)
    try:
        plan = build_plan(job, PlanSettings(trainer_image=PLATFORM_IMAGE), placeholder_parents(job, known))
    except PlanError as error:
        problems = tuple(Finding(document.line_of(problem.path), str(problem)) for problem in error.problems)
        return _Checked(document, job, None, found + problems)
    return _Checked(document, job, plan, found)


def _refuse(message: str) -> int:
    print(paint("error ", "red", sys.stderr) + message, file=sys.stderr)
    return BAD


def _print_finding(file: str, finding: Finding) -> None:
    mark = paint(f"{finding.level} ", _COLOURS[finding.level], sys.stdout)
    print(f"{file}:{finding.line}: {mark}{finding.text}")


def _print_summary(file: str, checked: Sequence[_Checked], bad: bool) -> None:
    jobs = [item.job.name for item in checked if item.job and item.plan]
    if not bad:
        print(paint("valid ", "green", sys.stdout) + f"{file}: {', '.join(jobs)}")


def _print_resolved(checked: Sequence[_Checked]) -> None:
    for item in checked:
        if item.job and item.plan:
            text = yaml.safe_dump({item.job.name: dict(item.plan.resolved)}, sort_keys=False, allow_unicode=True)
            print(f"---\n{text}", end="")
