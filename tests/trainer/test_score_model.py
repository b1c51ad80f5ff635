"""The reward model: its head, where its score is read, and what plain transformers and peft read from its export."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from model_jobs import export_all
from trainer_kit import Shape, make_config, make_model, make_reward_model, pairs, prepare, run_ranks, write_tokens

from posttrain_api.reasons import Reason
from posttrain_trainer.errors import TrainerFailure
from posttrain_trainer.loading import ModelFolder, load_reward
from posttrain_trainer.microbatch import collate
from posttrain_trainer.score_model import ScoreModel, pad_token
from posttrain_trainer.tokenset import TokenSet

LORA = {"rank": 4, "alpha": 8.0, "dropout": 0.0, "target_modules": ["all-linear"]}
EOS = 1


def _load(folder: Path, seed: int = 7) -> Any:
    return load_reward(ModelFolder(folder), folder, seed)


def _classifier(folder: Path) -> Any:
    return transformers.AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32)


def test_a_new_head_is_drawn_from_the_seed_alone(tmp_path: Path) -> None:
    make_model(tmp_path, Shape(hidden=64))
    torch.manual_seed(1)
    first = _load(tmp_path).score.weight
    torch.manual_seed(2)
    assert torch.equal(_load(tmp_path).score.weight, first)
    assert not torch.equal(_load(tmp_path, seed=8).score.weight, first)
    assert float(first.detach().std()) == pytest.approx(65**-0.5, rel=0.3)  # 64 numbers: ± 9 %


def test_an_earlier_reward_model_keeps_its_head(tmp_path: Path) -> None:
    make_reward_model(tmp_path)
    assert torch.equal(_load(tmp_path).score.weight, _classifier(tmp_path).score.weight)


def test_other_classifiers_are_refused(tmp_path: Path) -> None:
    config = Shape().config()
    config.num_labels = 3
    transformers.AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(TrainerFailure, match=r"mismatched, the first is score\.weight") as caught:
        load_reward(ModelFolder(tmp_path), tmp_path, 0)
    assert caught.value.reason is Reason.MODEL_INCOMPATIBLE


def _rows(folder: Path, end: int = EOS, count: int = 6) -> list[Any]:
    """Pairs whose answers end with EOS, as real ones do."""
    ended = [tuple(([*tokens, end], [*mask, 1]) for tokens, mask in row) for row in pairs(count)]
    write_tokens(folder, ended)
    tokens = TokenSet(folder)
    return [tokens[number] for number in range(count)]


@pytest.mark.parametrize("end", [EOS, 2])
def test_the_score_is_read_at_the_last_token(tmp_path: Path, end: int) -> None:
    """Also where it is the pad token: nothing asks what it is."""
    make_reward_model(tmp_path / "model")
    rows = _rows(tmp_path / "rows", end)
    model = ScoreModel(_load(tmp_path / "model"))
    micro = collate(rows, whole=True)
    scores = model(*ScoreModel.inputs(micro))
    plain = _classifier(tmp_path / "model")
    for score, example in zip(scores, [each for row in rows for each in row.examples], strict=True):
        hidden = plain.model(input_ids=torch.tensor(example.tokens.astype("int64"))[None]).last_hidden_state
        torch.testing.assert_close(score, (hidden[0, -1] * plain.score.weight[0]).sum(), rtol=1e-5, atol=1e-5)


def test_the_head_is_computed_in_fp32(tmp_path: Path) -> None:
    make_reward_model(tmp_path)
    head = _load(tmp_path).score.bfloat16()
    hidden = torch.randn(5, 32).bfloat16()
    scores = head(hidden)
    assert scores.dtype is torch.float32
    torch.testing.assert_close(scores[:, 0], hidden.float() @ head.weight.float()[0], rtol=1e-6, atol=1e-6)


def _tokenizer(pad: str | None, *special: str) -> Any:
    import tokenizers

    words = {name: number for number, name in enumerate(["<s>", "</s>", "<unk>", "word", *special])}
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner,
        bos_token="<s>",
        eos_token="</s>",
        pad_token=pad,
        additional_special_tokens=list(special),
    )


@pytest.mark.parametrize(
    ("own", "special", "expected"),
    [
        ("<unk>", (), "<unk>"),
        ("</s>", (), "<s>"),
        (None, ("<|end|>",), "<|end|>"),
        ("</s>", ("<|end|>", "<|vision_pad|>", "<|reserved_1|>"), "<|vision_pad|>"),
        ("</s>", ("<|end|>", "<|reserved_1|>"), "<|reserved_1|>"),
    ],
)
def test_a_pad_token_that_ends_no_sequence(own: str | None, special: tuple[str, ...], expected: str) -> None:
    assert pad_token(_tokenizer(own, *special), 100, "here") == expected


def test_tokens_of_the_template_do_not_pad() -> None:
    tokenizer = _tokenizer("</s>", "<|end|>")
    tokenizer.chat_template = "{{ messages[0]['content'] }}<|end|>"
    assert pad_token(tokenizer, 100, "here") == "<s>"
    tokenizer.bos_token = "</s>"
    tokenizer.chat_template += "<s>"
    with pytest.raises(TrainerFailure, match="no other special token"):
        pad_token(tokenizer, 100, "here")


def _pad_with_eos(folder: Path) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.save_pretrained(folder)


CASES = {
    "full": {"zero_stage": 0},
    "full-z3": {"zero_stage": 3},
    "lora": {"zero_stage": 2, "tuning": "LoRA", "lora": LORA},
    "lora-z3": {"zero_stage": 3, "tuning": "LoRA", "lora": LORA},
    "merged": {"zero_stage": 2, "tuning": "LoRA", "lora": LORA, "merge_adapter": True},
    "eos": {"zero_stage": 2},
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every case trained and exported in one group of two ranks; `eos` pads with EOS."""
    root = tmp_path_factory.mktemp("reward")
    for name, changes in CASES.items():
        config = make_config(root / name, stage="RewardModel", training__max_steps=2, **changes)
        make_model(root / name / "model")
        prepare(config, pairs(12))
        if name == "eos":
            _pad_with_eos(root / name / "prepared" / "tokenizer")
    _rows(root / "probe")
    run_ranks(export_all, ([str(root / name) for name in CASES], str(root / "probe")), 2, root / "logs")
    return root


def _export(folder: Path) -> Any:
    if not (folder / "adapter_config.json").exists():
        return _classifier(folder)
    model = peft.AutoPeftModelForSequenceClassification.from_pretrained(folder, num_labels=1, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model.config.pad_token_id = tokenizer.pad_token_id
    return model


@pytest.mark.parametrize("case", CASES)
def test_the_export_gives_the_same_scores(trained: Path, tmp_path: Path, case: str) -> None:
    rows = _rows(tmp_path)
    ours = torch.load(trained / case / "probe.pt")
    exported = _export(trained / case / "output").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(trained / case / "output")
    assert tokenizer.pad_token_id != EOS
    assert exported.config.pad_token_id == tokenizer.pad_token_id
    texts = [{"input_ids": each.tokens.tolist()} for row in rows for each in row.examples]
    for side in ("right", "left"):
        batch = tokenizer.pad(texts, padding=True, padding_side=side, return_tensors="pt")
        with torch.no_grad():
            theirs = exported(**batch).logits
        assert theirs.shape == (12, 1)
        torch.testing.assert_close(theirs[:, 0], ours, rtol=1e-5, atol=1e-5)


def test_with_eos_as_pad_transformers_reads_another_place(trained: Path, tmp_path: Path) -> None:
    """Why the export pads with another token than the model's own tokenizer."""
    rows = _rows(tmp_path)
    exported = _export(trained / "eos" / "output").eval()
    exported.config.pad_token_id = EOS
    ids = torch.tensor(rows[0].examples[0].tokens.astype("int64"))[None]
    ours = torch.load(trained / "eos" / "probe.pt")[0]
    assert abs(float(exported(input_ids=ids).logits[0, 0]) - float(ours)) > 1e-3


def test_the_head_learns_beside_the_adapter(trained: Path) -> None:
    resolved = json.loads((trained / "lora" / "counts.json").read_text())
    model = peft.AutoPeftModelForSequenceClassification.from_pretrained(trained / "lora" / "output", num_labels=1)
    low = [p.numel() for name, p in model.named_parameters() if "lora_" in name]
    assert resolved["trainable"] == sum(low) + 32
    head = model.base_model.model.score.modules_to_save["default"].weight
    drawn = _load(trained / "lora" / "model").score.weight
    assert not torch.equal(head, drawn)
    assert float((head - drawn).detach().abs().max()) < 0.1
