"""The scripted engine cuts as the real ones do."""

from __future__ import annotations

from rollout_kit import ALONE, never, requests, tokens_of

from posttrain_trainer.rollout.base import Sampling
from posttrain_trainer.rollout.fake import Scripted


def test_the_script_is_cut_at_a_stop_and_at_the_length() -> None:
    asked = requests(3)
    answers = {asked[0].seed: [5, 1, 6], asked[1].seed: [5, 6, 7, 8, 9], asked[2].seed: [4]}
    engine = Scripted(lambda request: answers[request.seed], ALONE, logprob=-0.5)
    samples = engine.generate(asked, Sampling(4, stops=(1,)), 3, never)
    assert samples is not None
    assert tokens_of(samples) == [[5, 1], [5, 6, 7, 8], [4]]
    assert [sample.finish for sample in samples] == ["Stop", "Length", "Length"]
    assert [sample.version for sample in samples] == [3, 3, 3]
    assert samples[0].logprobs.tolist() == [-0.5, -0.5]
    assert engine.calls == [asked]


def test_it_stops_too() -> None:
    assert Scripted(lambda request: [5], ALONE).generate(requests(2), Sampling(4), 0, lambda: True) is None
