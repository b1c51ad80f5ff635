"""How long the rows of a job may be: what it asks for, within what the model can take.

Called by `prepare` before anything is tokenised. In stage RL the limit is that of a prompt, because completions are
grown later: prompt and rollout.maxNewTokens together must fit into data.maxLength and the model's positions.
"""

from __future__ import annotations

import logging

from posttrain_api.reasons import Reason
from posttrain_api.trainer import DataConfig, TrainerConfig
from posttrain_trainer.data.fit import Limits
from posttrain_trainer.errors import TrainerFailure

_log = logging.getLogger("posttrain.prepare")


def settle(config: TrainerConfig, positions: int | None) -> tuple[DataConfig, Limits]:
    """The job's data with the limits that hold, and these limits as the rows are cut to them. TrainerFailure where no
    token is left for a prompt. `positions`: tokens of the longest sequence of the job's models, None: no limit."""
    data = _within_positions(config.data, positions)
    if config.stage != "RL":
        return data, Limits(data.max_length, data.too_long, data.max_prompt_length)
    limits = _prompts(data, config.rollout.max_new_tokens, lowered=data.max_length < config.data.max_length)
    return data.model_copy(update={"max_prompt_length": limits.max_length}), limits


def _within_positions(data: DataConfig, positions: int | None) -> DataConfig:
    """With the limit that holds: a model has no use for tokens past its last position."""
    if positions is None or positions >= data.max_length:
        return data
    _log.warning("data.maxLength is %d, the model has %d positions: those are the limit", data.max_length, positions)
    return data.model_copy(update={"max_length": positions})


def _prompts(data: DataConfig, new: int, *, lowered: bool) -> Limits:
    """`lowered`: max_length is the model's positions. A maxPromptLength that does not fit is lowered: prompts that
    nobody has cost nobody anything."""
    whole = f"the model's {data.max_length} positions" if lowered else f"data.maxLength {data.max_length}"
    advice = "Lower rollout.maxNewTokens" if lowered else "Raise data.maxLength"
    left, asked = data.max_length - new, data.max_prompt_length
    if left < 1:
        raise TrainerFailure(
            Reason.MODEL_INCOMPATIBLE if lowered else Reason.NOTHING_TO_LEARN,
            f"rollout.maxNewTokens is {new}, of {whole}: no token is left for a prompt. Lower it"
            f"{'' if lowered else ' or raise data.maxLength'}.",
        )
    if asked is not None and asked <= left:
        return Limits(asked, data.too_long, source="data.maxPromptLength", advice="Raise data.maxPromptLength")
    if asked is not None:
        _log.warning(
            "data.maxPromptLength is %d, but rollout.maxNewTokens %d leaves %d of %s: those are the limit of a prompt",
            *(asked, new, left, whole),
        )
    return Limits(left, data.too_long, source=f"{whole} less rollout.maxNewTokens {new}", advice=advice)
