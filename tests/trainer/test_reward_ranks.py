"""Rewards on two ranks: a failure of one is raised by both, and a reward model scores alike however it is run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from reward_jobs import CASES, ON_RANK_1, completions_of, scores
from reward_kit import completion, reward, write_functions
from trainer_kit import Shape, make_config, make_model, make_reward_model, make_tokenizer, run_ranks

from posttrain_api.reasons import Reason
from posttrain_trainer.errors import TrainerFailure
from posttrain_trainer.loading import ModelFolder
from posttrain_trainer.rewards.model import RewardModel, reward_module
from posttrain_trainer.rewards.reward_set import RewardSet


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Any:
    root = tmp_path_factory.mktemp("ranks")
    make_reward_model(root / "model", Shape(hidden=64))
    write_functions(root)
    (root / "config.json").write_text(make_config(root, topology__processes_per_node=2).to_json())
    run_ranks(scores, (str(root),), 2, root)
    return root, {path.stem: json.loads(path.read_text()) for path in root.glob("*-[01].json")}


def test_a_reward_that_fails_on_one_rank_is_raised_on_both(results: Any) -> None:
    first, second = (results[1][f"failed-{rank}"] for rank in (0, 1))
    assert first == second
    reason, message = first
    assert reason == Reason.REWARD_ERROR
    assert message.startswith("reward 'mine': reward.py raised ValueError: only here at line")
    assert message.endswith("(rank 1, 1 of 2 ranks)")


@pytest.mark.parametrize(("case", "said"), zip(ON_RANK_1, ("3 s", "nan", "0 "), strict=True))
def test_what_goes_wrong_on_one_rank_is_no_dead_collective(results: Any, case: str, said: str) -> None:
    first, second = (results[1][f"{case}-{rank}"] for rank in (0, 1))
    assert first == second
    reason, message = first
    assert reason == Reason.REWARD_ERROR
    assert message.startswith("reward 'mine': ")
    assert said in message
    assert message.endswith("(rank 1, 1 of 2 ranks)")


@pytest.mark.parametrize("case", CASES)
def test_a_model_scores_as_transformers_does(results: Any, case: str) -> None:
    root, found = results
    model = transformers.AutoModelForSequenceClassification.from_pretrained(root / "model", dtype=torch.float32).eval()
    model.config.pad_token_id = None  # then a batch of one is read at its last token
    expected = []
    for sample in completions_of(0):
        ids = torch.tensor([[*sample.prompt_tokens.tolist(), *sample.tokens.tolist()]])
        with torch.no_grad():
            expected.append(float(model(input_ids=ids).logits[0, 0]))
    values = found[f"{case}-0"]
    # 1e-6: fp32, other orders of summation; the scores differ by some 0.1 from another.
    assert [score for _, score in values] == pytest.approx(expected, abs=1e-6)
    assert min(abs(a - b) for a in expected for b in expected if a is not b) > 1e-3
    assert [short for short, _ in values] == [1, 1, 0, 1, 0]
    assert found[f"{case}-1"] == []


class Fake:
    """A control of one rank and an engine that says what it is told."""

    def __init__(self, scores: list[float]) -> None:
        self.scores = scores

    def forward(self, micro: Any) -> Any:
        return torch.tensor(self.scores[: len(micro.ends)])

    def max(self, values: Any) -> Any:
        return values

    def close(self) -> None:
        self.scores = []


@pytest.mark.parametrize("on_error", ["Fail", "Skip"])
def test_a_score_that_is_no_number(on_error: str) -> None:
    from posttrain_trainer.batching import Share

    fake: Any = Fake([1.0, float("nan")])
    model = RewardModel(fake, fake, Share(0, 1, 1000, whole=True), torch.device("cpu"))
    config = reward(name="judge", on_error=on_error, model={"source": {"uri": "pvc://m/r", "path": "/m"}})
    rewards = RewardSet([config], lambda verdict: [verdict], {"judge": model})
    two = [completion("a", number=8), completion("b", number=9)]
    if on_error == "Skip":
        assert rewards.score(two).failures == {"judge": 1}
        return
    with pytest.raises(TrainerFailure, match=r"reward 'judge': it scored nan \(completion 1 of 2, row 9\)"):
        rewards.score(two)


def test_a_model_without_a_head_is_refused(tmp_path: Path) -> None:
    make_model(tmp_path)
    with pytest.raises(TrainerFailure, match=r"missing, the first is score\.weight"):
        reward_module("judge", ModelFolder(tmp_path), tmp_path)


def test_another_vocabulary_is_refused(tmp_path: Path) -> None:
    make_reward_model(tmp_path / "model")
    make_tokenizer(tmp_path / "policy")
    vocabulary = tmp_path / "policy" / "tokenizer.json"
    vocabulary.write_text(vocabulary.read_text().replace('"t7"', '"seven"'))
    with pytest.raises(TrainerFailure, match=r"reward 'judge': .*1 of the policy's 61 tokens .*'seven'"):
        reward_module("judge", ModelFolder(tmp_path / "model"), tmp_path / "policy")


def test_a_model_without_tokenizer_is_refused(tmp_path: Path) -> None:
    make_reward_model(tmp_path / "model")
    make_tokenizer(tmp_path / "policy")
    for file in (tmp_path / "model").glob("tokenizer*"):
        file.unlink()
    with pytest.raises(TrainerFailure, match="its tokenizer cannot be loaded"):
        reward_module("judge", ModelFolder(tmp_path / "model"), tmp_path / "policy")
