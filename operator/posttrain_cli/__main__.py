"""`posttrain` and `kubectl posttrain`: one parser, one module for each subcommand.

A subcommand module has `add_parser(subparsers)`, which sets `main` on its parser, and `main(args) -> int`.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from posttrain_cli import run, validate

COMMANDS = (validate, run)
DESCRIPTION = """\
Trains language models with PostTrainingJobs, the kind posttrain.dev/v1alpha1.

  posttrain validate job.yaml     check a job without a cluster
  posttrain run job.yaml          run it on this machine, without a cluster
  kubectl apply -f job.yaml       run it on a cluster
  kubectl get ptj -w              and watch it
"""


def make_parser(program: str) -> argparse.ArgumentParser:
    """The parser with every subcommand."""
    parser = argparse.ArgumentParser(
        prog=program, description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for command in COMMANDS:
        command.add_parser(subparsers)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; the exit code. 2 for a command line that makes no sense."""
    program = "kubectl posttrain" if Path(sys.argv[0]).name.startswith("kubectl-") else "posttrain"
    args = make_parser(program).parse_args(arguments)
    command: Callable[[argparse.Namespace], int] = args.main
    try:
        return command(args)
    except BrokenPipeError:
        # The reader has gone (`posttrain … | head`): say nothing more, not even at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


if __name__ == "__main__":
    sys.exit(main())
