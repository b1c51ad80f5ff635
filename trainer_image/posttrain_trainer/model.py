"""The policy: a causal language model made or loaded in fp32, its adapter, and the scorer that the engine runs.

Called by the worker before DeepSpeed sees anything. Every rank makes the same weights: drawn from the job's seed,
or read from the folder that `prepare` left. The scorer's forward returns log-probabilities of counted tokens, never
logits of a whole batch.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from posttrain_api.reasons import Reason
from posttrain_api.trainer import TrainerConfig
from posttrain_trainer import losses
from posttrain_trainer.errors import TrainerFailure
from posttrain_trainer.lora import add_adapter
from posttrain_trainer.losses import Scores, token_scores
from posttrain_trainer.microbatch import MicroBatch
from posttrain_trainer.model_files import CONFIG, digest_of, weight_files
from posttrain_trainer.prepared import Prepared


class Scorer(nn.Module):
    """Tokens in, scores of counted positions out. The engine must be called, never this module: ZeRO-3 counts
    forwards there."""

    def __init__(self, lm: nn.Module, chunk: int | None = None) -> None:
        super().__init__()
        self.lm = lm
        inner = causal_lm(lm)
        vocabulary = inner.get_output_embeddings().weight.shape[0]
        patch_head(inner, chunk or max(1, losses.MAX_LOGITS // vocabulary))

    @staticmethod
    def inputs(micro: MicroBatch) -> tuple[Tensor | None, ...]:
        """What `forward` takes of a micro-batch."""
        return micro.input_ids, micro.positions, micro.index, micro.targets

    def forward(self, input_ids: Tensor, positions: Tensor | None, index: Tensor, targets: Tensor) -> Scores:
        """input_ids [b, T], positions [b, T] of packed sequences, index [n] into the flattened b·T, targets [n]
        → log p, entropy, correct, each [n] fp32.

        No mask: rows are padded on the right. `use_cache` is off in evaluation too: it would change the positions'
        meaning.
        """
        inner = causal_lm(self.lm)
        hidden = inner.base_model(input_ids=input_ids, position_ids=positions, use_cache=False).last_hidden_state
        scores: Scores = inner.get_output_embeddings()(hidden.flatten(0, 1)[index], targets)
        return scores


def causal_lm(model: nn.Module) -> Any:
    """The transformers model itself, below peft where there is an adapter."""
    below: Any = getattr(model, "get_base_model", None)
    return model if below is None else below()


def patch_head(lm: Any, chunk: int) -> None:
    """Lets `lm_head(hidden, targets)` return scores; `lm_head(hidden)` stays as it was.

    On the instance and before the engine is made, so that ZeRO-3's hooks gather the weight around the new forward.
    """
    head = lm.get_output_embeddings()
    project, shape_logits = head.forward, logit_transform(lm.config)

    def forward(_: nn.Module, hidden: Tensor, targets: Tensor | None = None) -> Tensor | Scores:
        if targets is None:
            logits: Tensor = project(hidden)
            return logits
        return token_scores(lambda rows: shape_logits(project(rows)), hidden, targets, chunk)

    head.forward = types.MethodType(forward, head)


def logit_transform(config: Any) -> Callable[[Tensor], Tensor]:
    """What some families do to logits after the head: Cohere multiplies, Granite divides, Gemma caps by tanh."""
    factor = getattr(config, "logit_scale", None) or 1.0
    factor /= getattr(config, "logits_scaling", None) or 1.0
    cap = getattr(config, "final_logit_softcapping", None)

    def transform(logits: Tensor) -> Tensor:
        logits = logits if factor == 1.0 else logits * factor
        return logits if cap is None else cap * torch.tanh(logits / cap)

    return transform


def check_unchanged(config: TrainerConfig, prepared: Prepared) -> None:
    """The model folder is still the one that was prepared. TrainerFailure(ModelIncompatible); reads every file of
    it."""
    if config.model.source is None:
        return
    folder, uri = Path(prepared.model_dir), config.model.source.uri
    digest = digest_of([folder / CONFIG, *weight_files(folder, uri)])
    if digest != prepared.model_digest:
        raise TrainerFailure(
            Reason.MODEL_INCOMPATIBLE,
            f"{uri}: its files changed after this job had begun ({prepared.model_digest} then, {digest} now). "
            "Put the old files back, or run a new job.",
        )


@dataclass(frozen=True)
class Counts:
    """Parameters of the whole model and those that learn; tied ones count once."""

    parameters: int
    trainable: int


def count(model: nn.Module) -> Counts:
    """Before the engine is made: ZeRO-3 leaves empty tensors behind."""
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in model.parameters()]
    return Counts(sum(size for size, _ in sizes), sum(size for size, learns in sizes if learns))


def build_policy(config: TrainerConfig, prepared: Prepared) -> nn.Module:
    """The starting policy in fp32 on the CPU, with its adapter under LoRA. TrainerFailure where it cannot be used."""
    folder = Path(prepared.model_dir)
    options = {"attn_implementation": prepared.resolved.attention.lower(), "dtype": torch.float32}
    model: Any = _drawn(config, folder, options) if config.model.scratch else _loaded(config, folder, options)
    check_head(model)
    if config.lora is not None and config.tuning == "LoRA":
        model = add_adapter(model, config.lora, config.training.seed)
    policy: nn.Module = model
    return policy


def _drawn(config: TrainerConfig, folder: Path, options: dict[str, Any]) -> Any:
    shape = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.training.seed)
        return transformers.AutoModelForCausalLM.from_config(shape, **options)


def _loaded(config: TrainerConfig, folder: Path, options: dict[str, Any]) -> Any:
    remote = config.model.trust_remote_code
    try:
        model, info = transformers.AutoModelForCausalLM.from_pretrained(
            folder, local_files_only=True, trust_remote_code=remote, output_loading_info=True, **options
        )
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise TrainerFailure(
            Reason.MODEL_INCOMPATIBLE,
            f"{folder}: transformers {transformers.__version__} cannot load it as a causal language model: {error}. "
            "Check that config.json and the safetensors files belong together.",
        ) from error
    _check_complete(folder, info)
    return model


def _check_complete(folder: Path, info: dict[str, Any]) -> None:
    for what in ("missing_keys", "mismatched_keys"):
        names = sorted(str(name) for name in info.get(what) or ())
        if names:
            raise TrainerFailure(
                Reason.MODEL_INCOMPATIBLE,
                f"{folder}: {len(names)} weights are {what.removesuffix('_keys')}, the first is {names[0]}. "
                "They would be drawn at random; give a folder whose weights fit its config.json.",
            )


@torch.no_grad()
def check_head(model: Any) -> None:
    """A few tokens through the whole model and through body and head apart must give the same logits.

    A family that does something else between its body and its logits is refused here instead of being trained wrong.
    """
    device = model.get_input_embeddings().weight.device
    ids = torch.arange(min(8, model.get_input_embeddings().weight.shape[0]), device=device)[None]
    was_training = model.training
    model.eval()
    whole = model(input_ids=ids, use_cache=False).logits
    hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
    apart = logit_transform(model.config)(model.get_output_embeddings()(hidden))
    model.train(was_training)
    if not torch.allclose(whole, apart, rtol=1e-4, atol=1e-4):
        raise TrainerFailure(
            Reason.MODEL_INCOMPATIBLE,
            f"{type(model).__name__}: its logits are not its output embedding applied to the last hidden state "
            f"(difference {float((whole - apart).abs().max()):.2g}), which this trainer builds on. "
            "Use another model family.",
        )
