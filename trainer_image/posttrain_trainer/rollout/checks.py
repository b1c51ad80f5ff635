"""What is refused of a rollout before and after it: requests that the model cannot answer, and answers that are none.

Called by both engines. A wrong token number would be an error deep inside an embedding, or none at all.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from posttrain_api.reasons import Reason
from posttrain_trainer.errors import TrainerFailure
from posttrain_trainer.rollout.base import Request, Sample, Sampling


def check_requests(requests: Sequence[Request], sampling: Sampling, config: Any) -> None:
    """TrainerFailure(RolloutError) for the first prompt that is empty, has a token the model has not, or leaves no room
    for `max_new_tokens`. config: the model's."""
    text = config.get_text_config()
    positions = getattr(text, "max_position_embeddings", None)
    for number, request in enumerate(requests):
        length = len(request.prompt)
        if length == 0:
            raise refused(number, "its prompt has no tokens", "Remove the row, or give its prompt a beginning token.")
        low, high = int(request.prompt.min()), int(request.prompt.max())
        if low < 0 or high >= text.vocab_size:
            wrong = low if low < 0 else high
            raise refused(
                number,
                f"its prompt has token {wrong}, the model's are 0 to {text.vocab_size - 1}",
                "Use the model's own tokenizer.",
            )
        if positions is not None and length + sampling.max_new_tokens > positions:
            raise refused(
                number,
                f"its prompt has {length} tokens; with rollout.maxNewTokens {sampling.max_new_tokens} that is "
                f"{length + sampling.max_new_tokens}, and the model has {positions} positions",
                "Lower rollout.maxNewTokens or data.maxPromptLength.",
            )


def check_samples(samples: Sequence[Sample]) -> None:
    """TrainerFailure(NonFinite) where a log-probability is no number."""
    for number, sample in enumerate(samples):
        if not np.isfinite(sample.logprobs).all():
            raise TrainerFailure(
                Reason.NON_FINITE,
                f"rollout: the policy's logits for completion {number} of this rank are not finite after "
                f"{int(np.isfinite(sample.logprobs).argmin())} tokens; the checkpoints before are kept. "
                "Lower training.learningRate, or raise training.warmupSteps.",
            )


def refused(number: int, what: str, advice: str) -> TrainerFailure:
    """RolloutError for a request, by its number among this rank's."""
    return TrainerFailure(Reason.ROLLOUT_ERROR, f"rollout: request {number} of this rank: {what}. {advice}")


def finished(tokens: Sequence[int], logprobs: Sequence[float], sampling: Sampling, version: int) -> Sample:
    """The sample of these tokens."""
    return Sample(
        np.asarray(tokens, dtype=np.int32),
        np.asarray(logprobs, dtype=np.float32),
        "Stop" if tokens[-1] in sampling.stops else "Length",
        version,
    )
