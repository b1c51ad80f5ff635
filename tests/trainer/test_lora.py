"""The adapter: its size, its start at zero, what cannot be adapted."""

from __future__ import annotations

import pytest
import torch
import transformers
from trainer_kit import Shape

from posttrain_api.reasons import Reason
from posttrain_api.trainer import LoraConfig
from posttrain_trainer.errors import TrainerFailure
from posttrain_trainer.lora import adapter_size, add_adapter
from posttrain_trainer.model import count
from posttrain_trainer.scorer import check_head


def _model(tied: bool = False) -> transformers.PreTrainedModel:
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(Shape(tied=tied).config(), dtype=torch.float32)


def _lora(*targets: str) -> LoraConfig:
    return LoraConfig(rank=4, alpha=8.0, dropout=0.0, target_modules=targets)


def test_trainable_parameters_are_r_times_in_plus_out() -> None:
    adapted = add_adapter(_model(), _lora("all-linear"), seed=0)
    hidden, heads, kv, inner = 32, 4 * 8, 2 * 8, 64
    attention = 2 * (hidden + heads) + 2 * (hidden + kv)  # q and o, k and v
    expected = 2 * 4 * (attention + 3 * (hidden + inner))
    assert count(adapted).trainable == expected == adapter_size(adapted, 4)
    assert all("lora_" in name for name, p in adapted.named_parameters() if p.requires_grad)
    assert not any("lm_head" in name for name, p in adapted.named_parameters() if p.requires_grad)


def test_the_first_forward_is_the_bases() -> None:
    ids = torch.arange(7)[None]
    before = _model()(input_ids=ids).logits
    adapted = add_adapter(_model(), _lora("q_proj", "v_proj"), seed=0)
    assert torch.equal(adapted(input_ids=ids).logits, before)


def test_seed_alone_draws_the_adapter() -> None:
    torch.manual_seed(1)
    first = add_adapter(_model(), _lora("q_proj"), seed=5).state_dict()
    torch.manual_seed(2)
    second = add_adapter(_model(), _lora("q_proj"), seed=5).state_dict()
    other = add_adapter(_model(), _lora("q_proj"), seed=6).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


@pytest.mark.parametrize("targets", [("no_such_layer",), ("q_proj", "no_such_layer")])
def test_no_such_module(targets: tuple[str, ...]) -> None:
    with pytest.raises(TrainerFailure, match=r"targetModules.*'no_such_layer'") as caught:
        add_adapter(_model(), _lora(*targets), seed=0)
    assert caught.value.reason is Reason.MODEL_INCOMPATIBLE


@pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
def test_tied_embeddings_take_no_adapter(target: str) -> None:
    """Merged, it would move the other of the two as well."""
    assert count(add_adapter(_model(), _lora("q_proj", target), seed=0)).trainable > 0
    with pytest.raises(TrainerFailure, match="are tied") as caught:
        add_adapter(_model(tied=True), _lora("q_proj", target), seed=0)
    assert caught.value.reason is Reason.MODEL_INCOMPATIBLE


def test_a_head_that_does_more_is_refused() -> None:
    model = _model()
    check_head(model)
    plain = model.lm_head.forward
    model.forward = _doubled(model.forward)
    with pytest.raises(TrainerFailure, match="output embedding"):
        check_head(model)
    assert model.lm_head.forward == plain


def _doubled(forward):  # type: ignore[no-untyped-def]
    def doubled(**given):  # type: ignore[no-untyped-def]
        result = forward(**given)
        result.logits = 2 * result.logits
        return result

    return doubled
