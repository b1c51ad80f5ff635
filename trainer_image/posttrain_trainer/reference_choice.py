"""Which reference a job has, and what its first loss must be then. Called by assemble, once the engine stands.

Under a new adapter the policy's base is the reference; else it is a second model; and a cache of what either says
where `preference.cacheReference` asks for it. Nothing of it depends on the algorithm but whether there is one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from posttrain_api.reasons import Reason
from posttrain_api.trainer import TrainerConfig
from posttrain_trainer import nf4
from posttrain_trainer.algorithms.base import Algorithm
from posttrain_trainer.algorithms.preference import Preference
from posttrain_trainer.batching import Share
from posttrain_trainer.engine import Engine, FrozenEngine
from posttrain_trainer.errors import TrainerFailure
from posttrain_trainer.model import build_module
from posttrain_trainer.model_files import folder_digest
from posttrain_trainer.objective import StartLoss
from posttrain_trainer.packing import packs
from posttrain_trainer.prepared import Prepared
from posttrain_trainer.reference import Reference
from posttrain_trainer.reference_cache import Cache, key_of
from posttrain_trainer.reference_models import AdapterOff, FrozenModel, Untrained
from posttrain_trainer.runtime import Runtime
from posttrain_trainer.token_scores import Score
from posttrain_trainer.tokenset import TokenSet


@dataclass(frozen=True)
class Compared:
    """The job whose policy is compared with a reference."""

    config: TrainerConfig
    prepared: Prepared
    runtime: Runtime
    engine: Engine
    part: Share

    def references(self, algorithm: Algorithm, sets: Sequence[tuple[Path, TokenSet]]) -> list[Reference | None]:
        """The reference of each token set, in order; None where the algorithm has none."""
        if not isinstance(algorithm, Preference) or not algorithm.needs_reference:
            return [None] * len(sets)
        if self.config.preference.cache_reference:
            return self._cached(sets)
        return [self._model()] * len(sets)

    def start(self, algorithm: Algorithm) -> StartLoss | None:
        """The first step's loss, where policy and reference begin as one model.

        In bf16 a cached sum of log-probabilities, made in other micro-batches, is another by some tenths; in fp32 by
        1e-4 at most.
        """
        if not isinstance(algorithm, Preference) or self.config.reference is not None:
            return None
        value = algorithm.start_loss()
        if value is None:
            return None
        relative = 1e-4 if self.prepared.resolved.precision == "FP32" else 0.05
        return StartLoss(next(iter(algorithm.terms)), value, relative * max(1.0, value))

    def by_token(self) -> Score:
        """Of stage RL: log p of each token of a rollout."""
        return self._model().logp

    def _model(self) -> AdapterOff | FrozenModel:
        """The reference as a model that stays."""
        lora = self.config.lora if self.config.tuning == "LoRA" else None
        if self.config.reference is None and lora is not None and not lora.continue_adapter:
            return AdapterOff(self.engine)
        return FrozenModel(self._frozen())

    def _frozen(self) -> FrozenEngine:
        module = build_module(*self._second())
        if self.part.packed:  # where it cannot, transformers' mask does the same more slowly
            packs(module, self.prepared.resolved.attention, self.runtime.device)
        return FrozenEngine(module, self.engine.settings)

    def _second(self) -> tuple[TrainerConfig, Prepared]:
        """What the second model is made from: `config.reference`, or the starting policy once more."""
        config, prepared, reference = self.config, self.prepared, self.config.reference
        if reference is None:
            return config, prepared
        if prepared.reference_dir is None:
            raise TrainerFailure(
                Reason.MODEL_NOT_FOUND,
                f"{reference.source.uri}: the prepared folder does not say where this reference is. "
                "Remove the prepared folder, so that it is made anew.",
            )
        given = {"source": reference.source, "adapters": reference.adapters, "scratch": None}
        model = config.model.model_copy(update=given)
        whole = config.model_copy(update={"model": model, "tuning": "Full", "lora": None})
        there = {"model_dir": prepared.reference_dir, "adapters": prepared.reference_adapters}
        return whole, prepared.model_copy(update=there)

    def _cached(self, sets: Sequence[tuple[Path, TokenSet]]) -> list[Reference | None]:
        """From storage, computed first where it is not there. None where the ranks agreed to stop meanwhile: the loop
        will not begin."""
        cache = Cache(key_of(self._facts()), self.part, self.runtime)
        missing = [each for each in sets if cache.open(*each) is None]
        if missing:
            with self._before_training() as model:
                for folder, tokens in missing:
                    cache.fill(folder, tokens, model)
        return [cache.open(*each) for each in sets]

    @contextmanager
    def _before_training(self) -> Iterator[Reference]:
        """The reference for as long as nothing was learned; a second model is gone afterwards."""
        if self.config.reference is None:
            yield Untrained(self.engine)
            return
        second = self._frozen()
        try:
            yield FrozenModel(second)
        finally:
            second.close()

    def _facts(self) -> dict[str, object]:
        """What the reference's log-probabilities depend on, beside the token set whose folder holds them. The data
        digest is over tokens, so over template and lengths too."""
        config, prepared = self.config, self.prepared
        own = config.reference is None
        return {
            "model": prepared.model_digest if own else prepared.reference_digest,
            "adapters": [each.digest for each in (prepared.adapters if own else prepared.reference_adapters)],
            "data": prepared.data_digest,
            "tokenizer": folder_digest(Path(prepared.tokenizer_dir)),
            "max length": config.data.max_length,
            "precision": prepared.resolved.precision,
            **({"quantization": "NF4"} if own and nf4.asked(config) else {}),
        }
