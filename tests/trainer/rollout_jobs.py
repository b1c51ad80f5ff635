"""What test_rollout_ranks.py runs in ranks: two updates of a tiny policy with rollouts between them and without, for
many cells in one process group."""

from __future__ import annotations

import gc
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rollout_kit import micro_of, model_of, never, requests
from trainer_jobs import sgd
from trainer_kit import Shape, rows

from posttrain_api.trainer import LoraConfig, Topology
from posttrain_trainer import engine as engine_module
from posttrain_trainer import runtime as runtime_module
from posttrain_trainer.engine import Engine
from posttrain_trainer.engine_config import EngineSettings
from posttrain_trainer.lora import add_adapter
from posttrain_trainer.microbatch import collate
from posttrain_trainer.packing import use_packed_attention
from posttrain_trainer.rollout import turns as turns_module
from posttrain_trainer.rollout.base import Request, Sample, Sampling
from posttrain_trainer.rollout.continuous import ContinuousBatching
from posttrain_trainer.rollout.generate import Generate
from posttrain_trainer.runtime import Runtime
from posttrain_trainer.scorer import Scorer
from posttrain_trainer.tokenset import Example, TrainingRow

UPDATES, ROWS, RATE = 2, 6, 0.02
KINDS = (Generate, ContinuousBatching)
SAMPLING = Sampling(6, 0.9, top_p=0.95, stops=(1, 7))


def cells(folder: str, names: Sequence[str]) -> None:
    """Names: <ZeRO stage>-<full or adapter>, `-dropout`, `-bf16`. Rank 0 keeps what was found."""
    gc.freeze()  # the library collects garbage after each rollout: of what was imported there is none
    engine_module.PERSISTENCE_THRESHOLD = 0
    runtime = runtime_module.start(Topology(nodes=1, processes_per_node=1, gpus_per_node=0), 0)
    found = {}
    for name in names:
        quiet, _ = _course(runtime, name, rolls=False)
        rolled, rollouts = _course(runtime, name, rolls=True)
        found[name] = {"equal": quiet == rolled, "rollouts": rollouts}
    found["turns"] = runtime.control.gather(_turns(runtime))
    if runtime.first:
        (Path(folder) / "found.json").write_text(json.dumps(found))
    runtime.control.barrier()


def _turns(runtime: Runtime) -> dict[str, Any]:
    """A rollout of rank 0 alone that the last rank, long idle, asks to stop at its fifth turn; and one that ends."""
    turns_module.SECONDS = 0.0
    engine, turns = _engine("0-full"), [0]

    def stopping() -> bool:
        turns[0] += 1
        return runtime.control.any(turns[0] == stop_at and runtime.rank == runtime.ranks - 1)

    asked, found = requests(3 if runtime.first else 0), {}
    for kind in KINDS:
        for stop_at in (5, 0):
            turns[0] = 0
            samples = kind(engine, runtime.control).generate(asked, Sampling(30), 0, stopping)
            found[f"{kind.__name__}-{stop_at}"] = (None if samples is None else len(samples), turns[0])
    return found


def _course(runtime: Runtime, name: str, rolls: bool) -> tuple[list[str], list[dict[str, Any]]]:
    """Digests of the weights after each update, and what every rollout gave: before, between and after them."""
    runtime_module.seed_all(5 + runtime.rank)
    engine, digests, rollouts = _engine(name), [], []
    for update in range(UPDATES + 1):
        if rolls:
            rollouts += [_rollout(engine, runtime, kind, update) for kind in KINDS]
        if update < UPDATES:
            _update(engine, runtime)
            digests.append(_digest(engine))
    gc.collect()
    return digests, rollouts


def _engine(name: str) -> Engine:
    dropout = 0.3 if "dropout" in name else 0.0
    model = model_of(Shape(attention_dropout=dropout))
    if "adapter" in name:
        lora = LoraConfig(rank=4, alpha=8.0, dropout=dropout, target_modules=("all-linear",))
        model = add_adapter(model, lora, seed=5)
        for number, (key, parameter) in enumerate(model.named_parameters()):
            if "lora_B" in key:  # away from zero, where it would be the base
                torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(number))
    scorer = Scorer(model, SAMPLING.temperature)
    assert use_packed_attention(scorer)
    scorer.train()
    learning = [parameter for parameter in scorer.parameters() if parameter.requires_grad]
    settings = EngineSettings(int(name[0]), 1.0, adapter="adapter" in name, bf16="bf16" in name)
    return Engine(scorer, sgd([{"params": learning}]), settings)


def _update(engine: Engine, runtime: Runtime) -> None:
    made = [Example(np.array(ids, dtype=np.int32), np.array(mask, dtype=np.uint8)) for ids, mask in rows(ROWS, seed=4)]
    micro = collate([TrainingRow((example,), {}) for example in made[runtime.rank :: runtime.ranks]], packed=True)
    logp = engine.forward(micro)[0]
    engine.backward(-logp.sum() * runtime.ranks / sum(int(example.mask[1:].sum()) for example in made))
    engine.set_learning_rate(RATE)
    engine.step()


def _digest(engine: Engine) -> str:
    parameters = list(engine.module.parameters())
    with engine.gathered(parameters):
        return hashlib.sha256(b"".join(each.detach().float().numpy().tobytes() for each in parameters)).hexdigest()


def _rollout(engine: Engine, runtime: Runtime, kind: Any, update: int) -> dict[str, Any]:
    """The samples of all ranks in order, and how far their log-probabilities are from the engine's own. In the second
    rollout only rank 0 has a request."""
    asked = requests(1 if update == 1 else 5, seed=update, longest=40)
    mine = range(runtime.rank, len(asked), runtime.ranks)
    samples = kind(engine, runtime.control).generate([asked[i] for i in mine], SAMPLING, update, never)
    difference = _difference(engine, [asked[i] for i in mine], samples)
    parts = runtime.control.gather((list(mine), [sample.tokens.tolist() for sample in samples], difference))
    tokens = {i: each for numbers, part, _ in parts for i, each in zip(numbers, part, strict=True)}
    return {"tokens": [tokens[i] for i in range(len(asked))], "difference": max(part[2] for part in parts)}


def _difference(engine: Engine, asked: Sequence[Request], samples: Sequence[Sample]) -> float:
    """Through the engine, on every rank: at ZeRO-3 its forward is a collective."""
    none = not samples
    if none:
        asked, samples = requests(1), [Sample(np.array([5], dtype=np.int32), np.zeros(1, dtype=np.float32), "Stop", 0)]
    engine.train(False)
    with torch.no_grad():
        logp = engine.forward(micro_of(asked, samples, packed=True))[0]
    engine.train(True)
    drawn = np.concatenate([sample.logprobs for sample in samples])
    return 0.0 if none else float(np.abs(logp.float().numpy() - drawn).max())
