"""The command line: `python -m devcluster --help` teaches it.

Parsing and printing only; what happens is in launcher and faults.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from devcluster import binaries, control, images, launcher, state
from devcluster.errors import DevclusterError
from devcluster.workload import parse_forward

EPILOG = """\
a first session:
  python -m devcluster up                                  control plane, 2 nodes with 8 GPUs each, training-operator
  export KUBECONFIG=$(python -m devcluster kubeconfig)     any kubectl works from here on
  python -m devcluster kubectl get nodes                   ... or the one that came with the cluster
  python -m devcluster helm install ptj helm/posttrain-operator
  python -m devcluster fault oom pod=myjob-worker-0        see `fault --help` for all faults
  python -m devcluster down

a test of the API alone: `up --control-plane-only`; in Python: `devcluster.testing` (see devcluster/README.md).
The first `up` builds Kubernetes from source: about 8 minutes on two cores, with progress; later ones take seconds.
"""
FAULTS = """\
faults, with KEY=VALUE arguments (namespace=default unless given):
  kill pod=P [container=C] [signal=TERM]     a signal to a container's first process (default KILL)
  oom pod=P [container=C]                    killed as if out of memory: exit 137, OOMKilled
  lose-node node=N        restore-node node=N
  refuse-image image=I    allow-image image=I
  fill-volume claim=C     empty-volume claim=C         claims annotated with devcluster/size-limit
  read-only-volume claim=C  writable-volume claim=C    (the same; not while a file is open for writing)
  stop-component name=C [signal=TERM]  start-component name=C    etcd, kube-apiserver, ... (default KILL)
"""


def _parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    top = argparse.ArgumentParser(
        prog="python -m devcluster",
        description="A real Kubernetes control plane on this machine, without Docker.",
        epilog=EPILOG,
        formatter_class=raw,
    )
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    place = argparse.ArgumentParser(add_help=False)
    place.add_argument("--name", default="default", help="the cluster's name (default: %(default)s)")
    place.add_argument("--state", type=Path, help="its state folder (default: by name, in the user's state folder)")
    _add_up(commands.add_parser("up", parents=[place], help="start a cluster and wait until it is Ready"))
    for name, text in (
        ("down", "stop it and remove its state folder"),
        ("status", "what runs, and where volumes and logs lie"),
        ("kubeconfig", "print the kubeconfig's path"),
    ):
        commands.add_parser(name, parents=[place], help=text)
    for tool in ("kubectl", "helm"):
        passing = commands.add_parser(tool, parents=[place], help=f"run {tool} against it", add_help=False)
        passing.add_argument("arguments", nargs=argparse.REMAINDER)
    fault = commands.add_parser("fault", parents=[place], help="do harm on demand", epilog=FAULTS, formatter_class=raw)
    fault.add_argument("action")
    fault.add_argument("values", nargs="*", metavar="KEY=VALUE")
    image = commands.add_parser("image", parents=[place], help="map image names to environments while it runs")
    image.add_argument("images", nargs="+", metavar="NAME=ENVDIR[:UID]")
    build = commands.add_parser("build", help="build the components now (up does so by itself)")
    all_names = ", ".join(binaries.PACKAGES)
    build.add_argument("names", nargs="*", metavar="NAME", help=f"of: {all_names}; default: those of every `up`")
    commands.add_parser("path", help="print the folder of the binaries (kubectl, helm, ...), for your PATH")
    return top


def _add_up(up: argparse.ArgumentParser) -> None:
    up.add_argument("--nodes", type=int, default=2)
    up.add_argument("--gpus-per-node", type=int, default=8, help="nvidia.com/gpu of each node; none is needed here")
    up.add_argument("--control-plane-only", action="store_true", help="API server alone: no nodes, nothing runs")
    up.add_argument(
        "--forward", action="append", default=[], metavar="PORT=SVC.NS:PORT", help="a service's port on 127.0.0.1"
    )
    up.add_argument(
        "--crd", action="append", default=[], metavar="FILE", help="a CRD to install before the controllers"
    )
    up.add_argument(
        "--with", action="append", default=[], dest="extras", choices=sorted(binaries.EXTRAS), help="start this besides"
    )
    up.add_argument("--image", action="append", default=[], metavar="NAME=ENVDIR[:UID]", help="an image name")


def _spec(args: argparse.Namespace) -> state.ClusterSpec:
    folder = (args.state or state.default_state(args.name)).absolute()
    return state.load_spec(folder) if args.command != "up" else _new_spec(args, folder)


def _new_spec(args: argparse.Namespace, folder: Path) -> state.ClusterSpec:
    for text in args.forward:
        parse_forward(text)
    return state.ClusterSpec(
        name=args.name,
        state=str(folder),
        nodes=args.nodes,
        gpus_per_node=args.gpus_per_node,
        control_plane_only=args.control_plane_only,
        forwards=tuple(args.forward),
        crds=tuple(str(Path(each).absolute()) for each in args.crd),
        extras=tuple(dict.fromkeys(args.extras)),
        images=images.present() | dict(images.parse_option(text) for text in args.image),
    )


def _up(args: argparse.Namespace) -> int:
    spec = _spec(args)
    launcher.start(spec, lambda text: print(text, flush=True))
    ready = spec.ready()
    print(f"cluster {spec.name!r} is Ready after {ready['seconds']} s; API at {ready['api']}")
    print(f"export KUBECONFIG={spec.kubeconfig}")
    return 0


def _down(args: argparse.Namespace) -> int:
    spec = _spec(args)
    print(f"cluster {spec.name!r}: {'stopped' if launcher.stop(spec) else 'was not running'}")
    launcher.sweep(spec)
    return 0


def _status(args: argparse.Namespace) -> int:
    spec = _spec(args)
    pid = state.running_pid(spec)
    if pid is None:
        print(f"cluster {spec.name!r} does not run; its files lie in {spec.state}")
        return 1
    ready = spec.ready()
    print(
        f"cluster {spec.name!r} runs: supervisor {pid}, API {ready['api']}, files in {spec.state}, logs in {spec.logs}"
    )
    if spec.control_plane_only:
        return 0
    print(f"{spec.nodes} nodes with {spec.gpus_per_node} GPUs; forwards: {', '.join(spec.forwards) or 'none'}")
    for name in sorted(spec.images):
        print(f"image {name}: {spec.images[name]['env']}")
    for claim, folder in control.ask(spec, "claims").items():
        print(f"claim {claim}: {folder}")
    sys.stdout.flush()
    return _exec("kubectl", spec, ["get", "nodes,pods", "-A", "-o", "wide"], replace=False)


def _exec(tool: str, spec: state.ClusterSpec, arguments: Sequence[str], replace: bool = True) -> int:
    binaries.ensure([tool])
    command = [str(binaries.binary(tool)), *arguments]
    environment = {**os.environ, "KUBECONFIG": str(spec.kubeconfig)}
    if replace:
        os.execve(command[0], command, environment)
    return os.spawnve(os.P_WAIT, command[0], command, environment)


def _tool(args: argparse.Namespace) -> int:
    arguments = args.arguments[1:] if args.arguments[:1] == ["--"] else args.arguments
    return _exec(args.command, _spec(args), arguments)


def _fault(args: argparse.Namespace) -> int:
    pairs = [value.partition("=") for value in args.values]
    wrong = [key for key, equals, _ in pairs if not equals]
    if wrong:
        raise DevclusterError(f"fault: {wrong[0]!r} is not KEY=VALUE; see `fault --help`")
    print(control.ask(_spec(args), args.action, **{key: value for key, _, value in pairs}))
    return 0


def _image(args: argparse.Namespace) -> int:
    print(control.ask(_spec(args), "add-image", entries=dict(images.parse_option(text) for text in args.images)))
    return 0


def _kubeconfig(args: argparse.Namespace) -> int:
    spec = _spec(args)
    spec.ready()
    print(spec.kubeconfig)
    return 0


def _build(args: argparse.Namespace) -> int:
    unknown = set(args.names) - set(binaries.PACKAGES)
    if unknown:
        raise DevclusterError(f"build: unknown {sorted(unknown)}; there are {', '.join(binaries.PACKAGES)}")
    print(binaries.ensure(args.names or binaries.EVERYTHING))
    return 0


def _path(_args: argparse.Namespace) -> int:
    print(binaries.bin_folder())
    return 0


COMMANDS = {
    "up": _up,
    "down": _down,
    "status": _status,
    "kubeconfig": _kubeconfig,
    "kubectl": _tool,
    "helm": _tool,
    "fault": _fault,
    "image": _image,
    "build": _build,
    "path": _path,
}


def _shielded(argv: Sequence[str]) -> list[str]:
    """`kubectl` and `helm` take all that follows our own two options: a `--` keeps the parser's hands off it."""
    words = list(argv)
    if words[:1] not in (["kubectl"], ["helm"]):
        return words
    cut = 1
    while words[cut : cut + 1] and words[cut].split("=")[0] in ("--name", "--state"):
        cut += 1 if "=" in words[cut] else 2
    return [*words[:cut], "--", *words[cut:]]


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; an error that the user can mend is one line on stderr and exit code 1."""
    args = _parser().parse_args(_shielded(sys.argv[1:] if argv is None else argv))
    try:
        return COMMANDS[args.command](args)
    except DevclusterError as error:
        print(f"devcluster: {error}", file=sys.stderr)
        return 1
