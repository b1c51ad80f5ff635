"""Rollout engine ContinuousBatching: transformers' scheduler and paged cache, with this trainer's own sampler in it.

Requests of any length share a batch, and one that has ended makes room at once. Where the library is not used as its
manual says: no background thread, because it swallows exceptions; a cache of its own for every rollout, because a kept
one answers with the keys and values of old weights; the sampler is replaced, because the library's depends on what else
is in the batch. So no CUDA graphs either: a sampler inside one could not look at its requests.
"""

from __future__ import annotations

import logging
import queue
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
from torch import Tensor
from transformers import ContinuousBatchingConfig, GenerationConfig

from posttrain_api.reasons import Reason
from posttrain_trainer.errors import TrainerFailure, describe
from posttrain_trainer.rollout.base import Sample, Sampling
from posttrain_trainer.rollout.checks import finished, refused
from posttrain_trainer.rollout.frame import Framed, Work
from posttrain_trainer.rollout.sampling import draw
from posttrain_trainer.rollout.turns import Turns

PAGE = 32
"""Tokens of a page: a request wastes half of one."""
MAX_BATCH_TOKENS = 2048
"""Of one forward, prompts included."""
MASK = 2**26
"""Numbers in the mask of a forward, its tokens by those of the cache."""
MAX_ROWS = 256
"""Completions of a forward: bounds the logits of one step."""


class ContinuousBatching(Framed):
    """See frame.py. `budget`: tokens that the cache holds."""

    def samples(self, model: Any, work: Work, turns: Turns) -> list[Sample]:
        """As Framed.samples."""
        asked = _Asked(**vars(work))
        outputs = _outputs(model, asked, turns) if work.requests else {}
        return [
            _sample(outputs.get(str(number)), number, work.sampling, work.version)
            for number in range(len(work.requests))
        ]


@dataclass(frozen=True)
class _Asked(Work):
    """A request's id is its number."""

    def settings(self) -> ContinuousBatchingConfig:
        """Room for every request at once, or for `budget` tokens; never less than for the longest request."""
        pages = [-(-(len(request.prompt) + self.sampling.max_new_tokens) // PAGE) + 1 for request in self.requests]
        blocks = max(max(pages), min(sum(pages), self.budget // PAGE))
        rows = min(MAX_ROWS, len(self.requests))
        at_once = max(rows, min(MAX_BATCH_TOKENS, MASK // (blocks * PAGE)))
        return ContinuousBatchingConfig(
            page_size=PAGE,
            num_blocks=blocks,
            max_batch_tokens=min(at_once, blocks * PAGE),
            max_requests_per_batch=rows,
            max_memory_percent=1.0,  # the room is counted by us
            allow_block_sharing=True,
            use_async_batching=False,
            use_cuda_graph=False,
            return_logprobs=True,
            auto_switch_to_flash=False,  # it would fetch a kernel from the Hub
            disable_nccl_graph_mixing=False,  # it would set a variable of the environment
            seed=0,
        )

    def draw(self, states: Sequence[Any], scores: Tensor) -> tuple[Tensor, Tensor]:
        """The next token of each state from its row of scores [n, V]. A state that lost its place in the cache has its
        tokens in front of it, as part of a longer prompt."""
        asked = [self.requests[int(state.request_id)] for state in states]
        lengths = [len(state.initial_tokens) + len(state.generated_tokens) for state in states]
        indices = [length - len(request.prompt) for length, request in zip(lengths, asked, strict=True)]
        return draw(scores, [request.seed for request in asked], indices, self.sampling)


def _outputs(model: Any, work: _Asked, turns: Turns) -> dict[str, Any]:
    """What the library says of each request, by id."""
    outputs = {}
    with _processor(model, work) as (manager, processor):
        while processor.prepare_next_batch():
            processor._generation_step(model)
            processor.update_batch()
            turns.pass_by()
        for output in _drained(manager.output_router.output_queue):
            outputs[output.request_id] = output
    return outputs


@contextmanager
def _processor(model: Any, work: _Asked) -> Iterator[tuple[Any, Any]]:
    """A manager with all requests queued, and the part of it that makes the steps."""
    stops = list(work.sampling.stops) or -1
    logging.getLogger("ContinuousBatchingLogger").setLevel(logging.WARNING)  # it tells of its cache at every rollout
    plain = GenerationConfig(do_sample=False, max_new_tokens=work.sampling.max_new_tokens, eos_token_id=stops)
    try:
        manager = model.init_continuous_batching(plain, work.settings())
        processor = manager._create_batch_processor()
    except ValueError as error:
        raise TrainerFailure(
            Reason.ROLLOUT_ERROR,
            f"rollout.engine: ContinuousBatching cannot run {type(model).__name__} ({describe(error)}). "
            "Set rollout.engine to Generate.",
        ) from error
    _replace_sampler(processor.model_runner, work)
    for number, request in enumerate(work.requests):
        manager.add_request(request.prompt.tolist(), str(number), eos_token_id=stops)
    try:
        yield manager, processor
    finally:
        manager.destroy()


def _replace_sampler(runner: Any, work: _Asked) -> None:
    def sample(runner: Any, scores: Tensor, out: Tensor) -> None:
        """scores [1, n or more, V] → out [2, ...]: tokens, and log-probabilities as bits."""
        states = [future.state for future in runner.inputs_and_outputs.requests_in_batch if future.has_new_token]
        if not states:
            return
        tokens, logprobs = work.draw(states, scores[0, : len(states)])
        out[0, : len(states)].copy_(tokens)
        out[1, : len(states)].copy_(logprobs.view(torch.int32))

    runner._sample = MethodType(sample, runner)


def _drained(outputs: queue.Queue[Any]) -> Iterator[Any]:
    while not outputs.empty():
        yield outputs.get_nowait()


def _sample(output: Any, number: int, sampling: Sampling, version: int) -> Sample:
    """A failed request may have tokens, and an answer may be missing: neither is a sample."""
    if output is None:
        raise refused(number, "it was never answered", "Set rollout.engine to Generate.")
    if output.error is not None or not output.generated_tokens:
        raise refused(number, f"it failed ({output.error or 'no tokens'})", "Set rollout.engine to Generate.")
    return finished(output.generated_tokens, output.logprobs, sampling, version)
