"""What forked ranks run in tests. A module of its own, because the fork server imports it before it forks."""

from __future__ import annotations

import ctypes
import gc
import json
import os
import shutil
import signal
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import torch

from posttrain_api.trainer import Topology, TrainerConfig
from posttrain_trainer import checkpoint_files as files_module
from posttrain_trainer import engine as engine_module
from posttrain_trainer import head as head_module
from posttrain_trainer import packing as packing_module
from posttrain_trainer import runtime as runtime_module
from posttrain_trainer.assemble import assemble, course_of
from posttrain_trainer.checkpoint_files import committed, damaged
from posttrain_trainer.engine import EngineSettings
from posttrain_trainer.export import Finished, export
from posttrain_trainer.job import Job, Outside
from posttrain_trainer.loop import Loop
from posttrain_trainer.microbatch import MicroBatch, collate
from posttrain_trainer.prepared import read_manifest
from posttrain_trainer.record import failed
from posttrain_trainer.recorder import Recorder
from posttrain_trainer.state import State
from posttrain_trainer.tokenset import Example, TrainingRow
from posttrain_trainer.update import Updater
from posttrain_trainer.worker import Worker, main


def work() -> None:
    """A worker as torchrun would start it; leaves with its own exit code. Tiny tensors are sharded too."""
    engine_module.PERSISTENCE_THRESHOLD = 0
    main()


def sgd(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """Adam would hide a wrong scale of the loss."""
    return torch.optim.SGD([{**group, "weight_decay": 0.0} for group in groups], lr=0.0)


class Lines:
    """An observer that keeps what each step measured."""

    def __init__(self) -> None:
        self.lines: list[dict[str, float]] = []

    def observe(self, metrics: dict[str, float], step: int) -> None:
        self.lines.append({"step": step, **metrics})


def cells(run_dir: str, names: list[str], result: str) -> None:
    """Trains each named configuration `<run_dir>/<name>` in one process group; rank 0 keeps lines and weights."""
    engine_module.PERSISTENCE_THRESHOLD = 0
    runtime = None
    for name in names:
        folder = Path(run_dir) / name
        config = TrainerConfig.model_validate_json((folder / "config.json").read_text())
        runtime = runtime or runtime_module.start(config.topology, config.training.seed)
        head_module.TILE = int((folder / "max_logits").read_text())
        packing_module.PACKED = (folder / "packed").exists()
        prepared = read_manifest(folder / "prepared")
        assert prepared is not None
        lines = Lines()
        outside = Outside(observers=[lines]) if runtime.first else Outside()
        optimizer = None if name.startswith("AdamW") else sgd
        parts, resolved = assemble(Job(config, prepared, runtime), outside, optimizer)
        if (folder / "keep_start").exists() and (start := parts.engine.weights()) is not None:
            torch.save({key: value.clone() for key, value in start.items()}, folder / "start.pt")
        assert Loop(parts, course_of(config, resolved), runtime, State()).run()
        parts.feed.close()
        weights = parts.engine.weights()
        if weights is not None:
            torch.save(weights, folder / "weights.pt")
            (folder / "lines.json").write_text(json.dumps(lines.lines))
            shutil.rmtree(folder / "checkpoints")
        del parts
        gc.collect()
    Path(result).touch()


class _TwoWeights(torch.nn.Module):
    """log p = first·token, and + second·token where the row begins with token 1."""

    def __init__(self) -> None:
        super().__init__()
        self.first = torch.nn.Parameter(torch.ones(4))
        self.second = torch.nn.Parameter(torch.ones(4))

    @staticmethod
    def inputs(micro: MicroBatch) -> tuple[torch.Tensor]:
        return (micro.input_ids,)

    def forward(self, ids: torch.Tensor) -> Any:
        weight = self.first + self.second if int(ids[0, 0]) == 1 else self.first
        score = (weight * ids[0].float()).sum()[None]
        return score, score.detach(), score.detach()


def unused_in_a_step(zero: int, result: str) -> None:
    """Two steps; the second parameter has a gradient in the first only. Keeps both as lists after each step."""
    engine_module.PERSISTENCE_THRESHOLD = 0
    topology = Topology(nodes=1, processes_per_node=1, gpus_per_node=0)
    runtime_module.start(topology, 0)
    model = _TwoWeights()
    engine = engine_module.Engine(model, sgd([{"params": list(model.parameters())}]), EngineSettings(zero, 0.0))
    kept = []
    for begin in (1, 2):
        tokens = np.array([begin, 1, 1, 1], dtype=np.int32)
        micro = collate([TrainingRow((Example(tokens, np.array([0, 1, 1, 1], dtype=np.uint8)),), {})], whole=True)
        engine.backward(engine.forward(micro)[0].sum())
        engine.set_learning_rate(0.5)
        engine.step()
        with engine.gathered(engine.module.parameters()):
            kept.append([parameter.tolist() for parameter in engine.module.parameters()])
    Path(result).write_text(json.dumps(kept))


def draw(seed: int, folder: str) -> None:
    """The first random numbers of a rank."""
    runtime = runtime_module.start(Topology(nodes=1, processes_per_node=2, gpus_per_node=0), seed)
    (Path(folder) / f"drawn-{runtime.rank}").write_text(str(torch.rand(3).tolist()))
    runtime.control.barrier()  # a rank that leaves early resets a peer that is still connecting


def die_after_line(step: int) -> None:
    """A worker whose rank 0 is killed by signal 9 right after it has written the line of `step`."""
    write = Recorder.step

    def write_and_die(recorder: Recorder, done: int, metrics: dict[str, float]) -> None:
        write(recorder, done, metrics)
        if done == step and os.environ["RANK"] == "0":
            os.kill(os.getpid(), signal.SIGKILL)

    Recorder.step = write_and_die  # type: ignore[method-assign]
    work()


def die_in_save(place: str, step: int) -> None:
    """A worker killed by signal 9 inside the save of `step`: the last rank before DeepSpeed writes, or rank 0 with the
    manifest written, with the folder renamed, or with the folder of `step` half removed."""
    last = os.environ["RANK"] == str(int(os.environ["WORLD_SIZE"]) - 1)
    owner, name, ending, here = {
        "DeepSpeed": (engine_module.Engine, "save", f"step-{step:06d}.tmp-1", last),
        "manifest": (files_module, "write_json", f"step-{step:06d}.tmp-1/manifest.json", True),
        "commit": (files_module, "commit", f"step-{step:06d}.tmp-1", True),
        "removal": (files_module.shutil, "rmtree", f"step-{step:06d}", True),
    }[place]
    original = getattr(owner, name)

    def work_and_die(*given: Any, **named: Any) -> None:
        paths = [value for value in given if isinstance(value, Path)]
        due = here and str(paths[0]).endswith(ending)
        if due and place == "removal":
            (paths[0] / "trainer.json").unlink()
        elif not due or place != "DeepSpeed":
            original(*given, **named)
        if due:
            os.kill(os.getpid(), signal.SIGKILL)

    setattr(owner, name, work_and_die)
    work()


def overtaken(place: str, result: str) -> None:
    """A worker that a newer attempt overtakes inside its first save, or between its last step and its export."""
    config = TrainerConfig.model_validate_json(Path(os.environ["POSTTRAIN_CONFIG"]).read_text())
    owner, name = {"save": (engine_module.Engine, "save"), "export": (Loop, "run")}[place]
    original = getattr(owner, name)

    def lose_and_go_on(*given: Any) -> Any:
        (Path(config.run_dir) / "attempt.json").write_text('{"attempt": 3}')
        return original(*given)

    setattr(owner, name, lose_and_go_on)
    try:
        end = Worker(config).run()
    except Exception as error:  # noqa: BLE001  as in the worker's main
        end = failed(0, error)
    Path(result).write_text(end.to_json())


def term_at(place: str, number: int, rank: int) -> None:
    """A worker of which one rank gets SIGTERM as its `number`-th forward, training and evaluation counted, or update
    begins (from 1)."""
    owner, name = {"forward": (engine_module.Engine, "forward"), "update": (Updater, "run")}[place]
    original, done = getattr(owner, name), [0]

    def term_and_go_on(*given: Any) -> Any:
        done[0] += 1
        if done[0] == number and os.environ["RANK"] == str(rank):
            os.kill(os.getpid(), signal.SIGTERM)
        return original(*given)

    setattr(owner, name, term_and_go_on)
    work()


def on_small_storage(size: str, result: str) -> None:
    """Runs a worker whose checkpoints folder is a tmpfs of `size` in a mount namespace of its own."""
    config = TrainerConfig.model_validate_json(Path(os.environ["POSTTRAIN_CONFIG"]).read_text())
    root = Path(config.run_dir) / "checkpoints"
    root.mkdir()
    problem = _mount_small(root, size)
    if problem is not None:
        Path(result).write_text(json.dumps({"skipped": problem}))
        return
    try:
        end = Worker(config).run()
    except Exception as error:  # noqa: BLE001  as in the worker's main
        end = failed(0, error)
    free = os.statvfs(root)
    names = sorted(str(path.relative_to(root)) for path in root.rglob("*"))
    found = {"reason": end.reason, "message": end.message, "names": names, "free": free.f_bavail * free.f_bsize}
    whole = [entry.folder.name for entry in committed(root) if damaged(entry, entry.manifest.files) is None]
    Path(result).write_text(json.dumps({**found, "whole": whole}))


def _mount_small(root: Path, size: str) -> str | None:
    libc = ctypes.CDLL(None, use_errno=True)
    new_user, new_mount, private, recursive = 0x10000000, 0x00020000, 1 << 18, 1 << 14
    user, group = os.getuid(), os.getgid()
    if libc.unshare(new_mount if user == 0 else new_mount | new_user):
        return f"no mount namespace here: {os.strerror(ctypes.get_errno())}"
    if user != 0:  # an owner that is mapped nowhere may create nothing on a tmpfs
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"{user} {user} 1")
        Path("/proc/self/gid_map").write_text(f"{group} {group} 1")
    if libc.mount(b"none", b"/", None, private | recursive, None):
        return f"no private mounts here: {os.strerror(ctypes.get_errno())}"
    if libc.mount(b"tmpfs", bytes(root), b"tmpfs", 0, f"size={size}".encode()):
        return f"no tmpfs here: {os.strerror(ctypes.get_errno())}"
    return None


def train_and_export(folder: str) -> None:
    """A training whose live weights rank 0 keeps as `live.pt`, taken from the parameters themselves, not by the
    export."""
    engine_module.PERSISTENCE_THRESHOLD = 0
    config = TrainerConfig.model_validate_json((Path(folder) / "config.json").read_text())
    runtime = runtime_module.start(config.topology, config.training.seed)
    prepared = read_manifest(Path(folder) / "prepared")
    assert prepared is not None
    parts, resolved = assemble(Job(config, prepared, runtime), Outside())
    assert Loop(parts, course_of(config, resolved), runtime, State()).run()
    live = {}
    for name, parameter in parts.engine.module.named_parameters():
        with parts.engine.gathered([parameter]):
            live[name.removeprefix("lm.")] = parameter.detach().clone()
    weights = parts.engine.weights()
    if runtime.first:
        assert weights is not None
        torch.save(live, Path(folder) / "live.pt")
        output = export(
            config, prepared, Finished(parts.engine.module, weights, resolved.total_steps, parts.checkpoints.fence)
        )
        (Path(folder) / "output.json").write_text(output.to_json())


def adapter_scope(folder: str) -> None:
    """Sums of a micro-batch with the adapter moved off zero: base alone, with it, inside the scope, after it."""
    engine_module.PERSISTENCE_THRESHOLD = 0
    config = TrainerConfig.model_validate_json((Path(folder) / "config.json").read_text())
    runtime = runtime_module.start(config.topology, config.training.seed)
    prepared = read_manifest(Path(folder) / "prepared")
    assert prepared is not None
    parts, _ = assemble(Job(config, prepared, runtime), Outside(), sgd)
    micro = parts.feed.micros(0)[0]

    def sums() -> list[float]:
        with torch.no_grad():
            return micro.by_sequence(parts.engine.forward(micro)[0]).tolist()

    def learning() -> list[bool]:
        return [parameter.requires_grad for parameter in parts.engine.module.parameters()]

    assert parts.reference is not None
    found: dict[str, Any] = {"base": sums(), "learning": learning()}  # a new adapter adds nothing
    logp = parts.engine.forward(micro)[0]
    parts.engine.backward(logp.sum())
    parts.engine.set_learning_rate(0.1)
    parts.engine.step()
    found["on"] = sums()
    found["off"] = parts.reference.attach(micro).values["reference"].tolist()
    found |= {"again": sums(), "learning_after": learning()}
    (Path(folder) / "scope.json").write_text(json.dumps(found))


def second_models(folder: str) -> None:
    """Assembles a job; keeps how many elements its frozen models had, and how many are still held, shards counted."""
    engine_module.PERSISTENCE_THRESHOLD = 0
    parameters: list[weakref.ref[torch.nn.Parameter]] = []
    made = [0]
    initialise = engine_module.FrozenEngine.__init__

    def remember(frozen: Any, model: torch.nn.Module, settings: EngineSettings) -> None:
        parameters.extend(weakref.ref(parameter) for parameter in model.parameters())
        made[0] += sum(parameter.numel() for parameter in model.parameters())
        initialise(frozen, model, settings)

    engine_module.FrozenEngine.__init__ = remember  # type: ignore[method-assign]
    config = TrainerConfig.model_validate_json((Path(folder) / "config.json").read_text())
    runtime = runtime_module.start(config.topology, config.training.seed)
    prepared = read_manifest(Path(folder) / "prepared")
    assert prepared is not None
    parts, _ = assemble(Job(config, prepared, runtime), Outside(), sgd)
    assert parts.reference is not None
    alive = [parameter for parameter in (each() for each in parameters) if parameter is not None]
    held = sum(each.numel() + (each.ds_tensor.numel() if hasattr(each, "ds_tensor") else 0) for each in alive)
    (Path(folder) / "models.json").write_text(json.dumps({"made": made[0], "held": held}))
