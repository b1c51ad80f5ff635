"""Rollout engine Generate: a plain loop over padded batches with a cache of keys and values. The reference.

It asks nothing of a model but the interface that training uses too, body and head, so it runs where the other engine
does not. Requests of similar length go together; what the batch holds is bounded, and completions that have ended leave
it when they are half of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from transformers import DynamicCache

from posttrain_trainer.rollout.base import Request, Sample, Sampling
from posttrain_trainer.rollout.checks import finished
from posttrain_trainer.rollout.frame import Framed, Work
from posttrain_trainer.rollout.sampling import draw
from posttrain_trainer.rollout.turns import Turns
from posttrain_trainer.scorer import logit_transform

MAX_ROWS = 256
"""Completions of a batch: bounds the logits of one step."""


class Generate(Framed):
    """See frame.py. `budget`: tokens of a batch, prompts and completions."""

    def samples(self, model: Any, work: Work, turns: Turns) -> list[Sample]:
        """As Framed.samples."""
        found: dict[int, Sample] = {}
        for numbers in batches(work.requests, work.sampling.max_new_tokens, work.budget):
            batch = _Batch(model, [work.requests[number] for number in numbers], work.sampling)
            found |= zip(numbers, batch.complete(work.version, turns), strict=True)
        return [found[number] for number in range(len(work.requests))]


def batches(requests: Sequence[Request], new_tokens: int, budget: int) -> Iterator[list[int]]:
    """Numbers of requests, the shortest prompts first. A batch of b rows has room for b · (its longest prompt +
    new_tokens) tokens, at most `budget` of them or one row."""
    order = sorted(range(len(requests)), key=lambda number: len(requests[number].prompt))
    batch: list[int] = []
    for number in order:
        size = (len(batch) + 1) * (len(requests[number].prompt) + new_tokens)
        if batch and (size > budget or len(batch) == MAX_ROWS):
            yield batch
            batch = []
        batch.append(number)
    if batch:
        yield batch


class _Batch:
    """Padded on the left, so that every row's next token is in the last column. ids [b, t]: what the model has not
    seen; positions [b, t]: of them; mask [b, longest prompt + max_new_tokens]: 0 on the padding."""

    def __init__(self, model: Any, requests: Sequence[Request], sampling: Sampling) -> None:
        self._model, self._sampling = model, sampling
        self._transform = logit_transform(model.config)
        self._seeds = [request.seed for request in requests]
        self._tokens: list[list[int]] = [[] for _ in requests]
        self._logprobs: list[list[float]] = [[] for _ in requests]
        self._rows = list(range(len(requests)))  # whose row each one of the batch is
        self._cache = DynamicCache(config=model.config.get_text_config())
        self._pad([request.prompt for request in requests])

    def _pad(self, prompts: Sequence[Any]) -> None:
        device = self._model.get_input_embeddings().weight.device
        width = max(len(prompt) for prompt in prompts)
        ids = np.zeros((len(prompts), width), dtype=np.int64)
        mask = np.ones((len(prompts), width + self._sampling.max_new_tokens), dtype=np.int64)
        for row, prompt in enumerate(prompts):
            ids[row, width - len(prompt) :] = prompt
            mask[row, : width - len(prompt)] = 0
        self._ids, self._mask = (torch.from_numpy(array).to(device) for array in (ids, mask))
        self._positions = (self._mask[:, :width].cumsum(-1) - 1).clamp_(min=0)
        self._seen = 0

    def complete(self, version: int, turns: Turns) -> list[Sample]:
        """One sample for each request, in order. Raises Stopped."""
        while self._rows:
            turns.pass_by()
            self._step()
        pairs = zip(self._tokens, self._logprobs, strict=True)
        return [finished(tokens, logprobs, self._sampling, version) for tokens, logprobs in pairs]

    def _step(self) -> None:
        indices = [len(self._tokens[row]) for row in self._rows]
        seeds = [self._seeds[row] for row in self._rows]
        drawn, logprobs = draw(self._logits(), seeds, indices, self._sampling)
        for row, token, logp in zip(self._rows, drawn.tolist(), logprobs.tolist(), strict=True):
            if not self._ended(row):
                self._tokens[row].append(token)
                self._logprobs[row].append(logp)
        self._ids, self._positions = drawn[:, None], self._positions[:, -1:] + 1
        self._leave()

    def _logits(self) -> Any:
        """[b, V] of the last column only."""
        self._seen += self._ids.shape[1]
        hidden = self._model.base_model(
            input_ids=self._ids,
            attention_mask=self._mask[:, : self._seen],
            position_ids=self._positions,
            past_key_values=self._cache,
            use_cache=True,
        ).last_hidden_state[:, -1]
        return self._transform(self._model.get_output_embeddings()(hidden).float())

    def _ended(self, row: int) -> bool:
        tokens = self._tokens[row]
        return bool(tokens) and (tokens[-1] in self._sampling.stops or len(tokens) == self._sampling.max_new_tokens)

    def _leave(self) -> None:
        """Rows that have ended go when they are half of the batch: taking them out copies the cache."""
        going_on = [place for place, row in enumerate(self._rows) if not self._ended(row)]
        if 2 * len(going_on) > len(self._rows):
            return
        self._rows = [self._rows[place] for place in going_on]
        if not going_on:
            return
        places = torch.tensor(going_on, device=self._ids.device)
        self._cache.batch_select_indices(places)
        self._ids, self._positions, self._mask = (kept[places] for kept in (self._ids, self._positions, self._mask))
