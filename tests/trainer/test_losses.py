"""Log-probabilities and cross-entropy: by hand, against transformers' own loss."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import transformers
from trainer_kit import Shape, rows

from posttrain_trainer.algorithms.language_modeling import LanguageModeling
from posttrain_trainer.head import LogitTransform, fused_scores
from posttrain_trainer.losses import nll_sum
from posttrain_trainer.microbatch import collate, dummy
from posttrain_trainer.scorer import Scorer, logit_transform
from posttrain_trainer.tokenset import Example, TrainingRow


def _examples(count: int, seed: int = 0) -> list[Example]:
    return [Example(np.array(t, dtype=np.int32), np.array(m, dtype=np.uint8)) for t, m in rows(count, seed)]


def test_by_hand() -> None:
    # two classes with logits (0, log 3): p = 1/4, 3/4
    weight = torch.tensor([[0.0], [math.log(3.0)]])
    logp, entropy, correct = fused_scores(torch.ones(2, 1), weight, None, torch.tensor([0, 1]), LogitTransform())
    assert logp.tolist() == pytest.approx([math.log(0.25), math.log(0.75)], rel=1e-6)
    expected = -(0.25 * math.log(0.25) + 0.75 * math.log(0.75))
    assert entropy.tolist() == pytest.approx([expected, expected], rel=1e-6)
    assert correct.tolist() == [0.0, 1.0]
    total = nll_sum(logp, torch.tensor([1.0, 2.0]))
    assert float(total) == pytest.approx(math.log(4) + 2 * math.log(4 / 3), rel=1e-6)


def test_equals_the_loss_of_transformers() -> None:
    """HF's own cross-entropy with labels -100, one row at a time, summed; ours in one padded batch without a mask."""
    torch.manual_seed(1)
    model = transformers.AutoModelForCausalLM.from_config(Shape().config(), dtype=torch.float32)
    examples = _examples(9)
    count = sum(int(example.mask.sum()) for example in examples)
    theirs = 0.0
    for example in examples:
        ids = torch.tensor(example.tokens.astype(np.int64))[None]
        labels = torch.where(torch.tensor(example.mask)[None].bool(), ids, -100)
        theirs = theirs + model(input_ids=ids, labels=labels).loss * int(example.mask.sum()) / count
    theirs.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    micro = collate([TrainingRow((example,), {}) for example in examples])
    algorithm = LanguageModeling()
    assert algorithm.weights(micro) == {"nll": count}
    scores = Scorer(model)(*Scorer.inputs(micro))
    ours = algorithm.losses(scores, micro)["nll"] / count
    ours.backward()
    assert float(ours.detach()) == pytest.approx(float(theirs.detach()), rel=1e-6)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-5, atol=1e-7)


def test_the_head_is_as_before_without_targets() -> None:
    model = transformers.AutoModelForCausalLM.from_config(Shape().config(), dtype=torch.float32)
    ids = torch.arange(6)[None]
    before = model(input_ids=ids).logits
    Scorer(model)
    assert torch.equal(model(input_ids=ids).logits, before)


def test_a_dummy_has_no_gradient_but_a_graph() -> None:
    model = transformers.AutoModelForCausalLM.from_config(Shape().config(), dtype=torch.float32)
    micro = dummy(TrainingRow((_examples(1)[0],), {}))
    algorithm = LanguageModeling()
    assert algorithm.weights(micro) == {"nll": 0.0}
    scores = Scorer(model)(*Scorer.inputs(micro))
    algorithm.losses(scores, micro)["nll"].backward()
    for parameter in model.parameters():
        assert parameter.grad is not None
        assert float(parameter.grad.abs().max()) == 0.0


def test_logits_of_other_families() -> None:
    class Gemma:
        final_logit_softcapping = 30.0

    class Cohere:
        logit_scale = 0.25

    class Granite:
        logits_scaling = 8.0

    logits = torch.tensor([10.0, -40.0])
    torch.testing.assert_close(logit_transform(Gemma())(logits), 30 * torch.tanh(logits / 30))
    torch.testing.assert_close(logit_transform(Cohere())(logits), logits * 0.25)
    torch.testing.assert_close(logit_transform(Granite())(logits), logits / 8)
    assert logit_transform(object())(logits) is logits
