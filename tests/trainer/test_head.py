"""The fused head against log-softmax of all logits: values, gradients, and that the logits are never there."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from head_jobs import KINDS, RATE, STEPS, TEMPERATURE, examples, model_of
from head_jobs import cells as train_cells
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint
from trainer_kit import start_ranks

from posttrain_trainer import head as head_module
from posttrain_trainer.head import LogitTransform, fused_scores, scores_by_rows
from posttrain_trainer.losses import Scores

TRANSFORMS = {
    "plain": LogitTransform(),
    "temperature": LogitTransform(temperature=0.7),
    "scale": LogitTransform(scale=0.25),
    "cap": LogitTransform(cap=3.0, temperature=0.7),
    "all": LogitTransform(scale=2.0, cap=5.0, temperature=1.3),
}


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Five tokens by five of the vocabulary."""
    monkeypatch.setattr(head_module, "TILE", 25)


def naive(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, transform: LogitTransform) -> Scores:
    """The formulas as they are written, in fp32."""
    logits = hidden.float() @ weight.float().T
    logits = (logits if bias is None else logits + bias.float()) * transform.scale
    if transform.cap is not None:
        logits = transform.cap * torch.tanh(logits / transform.cap)
    log_probs = torch.log_softmax(logits / transform.temperature, -1)
    entropy = -(log_probs.exp() * log_probs).sum(-1)
    return log_probs.gather(1, targets[:, None])[:, 0], entropy, (log_probs.argmax(-1) == targets).float()


@dataclasses.dataclass(frozen=True)
class Case:
    """`size`: tokens, hidden size, vocabulary."""

    size: tuple[int, int, int]
    seed: int = 0
    bias: bool = False
    dtype: torch.dtype = torch.float32

    def operands(self) -> tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor]:
        """Hidden states, weight, bias, targets, weights of the tokens; the same ones each time."""
        generator = torch.Generator().manual_seed(self.seed)
        tokens, width, vocabulary = self.size

        def drawn(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator).to(self.dtype).requires_grad_()

        targets = torch.randint(0, vocabulary, (tokens,), generator=generator)
        bias = drawn(vocabulary) if self.bias else None
        return drawn(tokens, width), drawn(vocabulary, width), bias, targets, torch.randn(tokens, generator=generator)


def gradients(score: Any, case: Case, transform: LogitTransform) -> tuple[Scores, list[Tensor]]:
    """Scores, and gradients of Σ w·log p."""
    hidden, weight, bias, targets, weights = case.operands()
    scores = score(hidden, weight, bias, targets, transform)
    wanted = [tensor for tensor in (hidden, weight, bias) if tensor is not None]
    return scores, list(torch.autograd.grad((scores[0] * weights).sum(), wanted))


def relative(ours: Tensor, theirs: Tensor) -> float:
    return float((ours.double() - theirs.double()).norm() / theirs.double().norm().clamp(min=1e-30))


def assert_equal(case: Case, transform: LogitTransform) -> None:
    ours, theirs = gradients(fused_scores, case, transform), gradients(naive, case, transform)
    for value, expected in zip(ours[0][:2], theirs[0][:2], strict=True):
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, expected, rtol=1e-6, atol=1e-6)
    assert ours[0][2].tolist() == theirs[0][2].tolist()
    # What bf16 gradients are rounded to, at half a unit; and where p is almost 1, fp32 knows 1 − p to 6e-8 only, times
    # the operands.
    tolerance = 1e-5 if case.dtype == torch.float32 else 2**-8
    hidden, weight, _, _, weights = case.operands()
    floor = 2e-7 * float(weights.norm() * (1.0 + hidden.norm() + weight.norm()))
    for value, expected in zip(ours[1], theirs[1], strict=True):
        assert value.dtype == expected.dtype
        assert float((value.double() - expected.double()).norm()) <= tolerance * float(expected.double().norm()) + floor


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("name", TRANSFORMS)
@settings(max_examples=15)
@given(data=st.data())
def test_equals_log_softmax(name: str, data: st.DataObject) -> None:
    size = data.draw(st.tuples(st.integers(1, 17), st.integers(1, 9), st.integers(1, 33)))
    case = Case(size, data.draw(st.integers(0, 1000)), bias=data.draw(st.booleans()))
    assert_equal(case, TRANSFORMS[name])


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("name", ["plain", "cap"])
def test_bf16_weights_are_multiplied_in_fp32(name: str) -> None:
    assert_equal(Case((13, 8, 33), bias=True, dtype=torch.bfloat16), TRANSFORMS[name])


@pytest.mark.usefixtures("small_tiles")
def test_autocast_does_not_reach_the_products() -> None:
    case = Case((13, 8, 33))
    expected = gradients(fused_scores, case, LogitTransform())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = gradients(fused_scores, case, LogitTransform())
    assert all(torch.equal(*pair) for pair in zip([*found[0], *found[1]], [*expected[0], *expected[1]], strict=True))


@pytest.mark.usefixtures("small_tiles")
def test_large_logits_lose_nothing() -> None:
    """Around 10,000 a unit of the last place is 1e-3: log p must not go through the log-sum-exp."""
    weight = torch.tensor([[10_000.0], [10_001.0], *[[0.0]] * 9, [9_999.0]])
    logp, entropy, _ = fused_scores(torch.ones(1, 1), weight, None, torch.tensor([0]), LogitTransform())
    exact = torch.log_softmax(weight[:, 0].double(), 0)
    assert float(logp) == pytest.approx(float(exact[0]), rel=1e-6)
    assert float(entropy) == pytest.approx(float(-(exact.exp() * exact).sum()), rel=1e-6)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("best", [0, 4, 5, 11])
def test_of_equal_logits_the_first_is_the_argmax(best: int) -> None:
    """Within a tile (width five) and over tiles."""
    weight = torch.zeros(12, 1)
    weight[best:] = 1.0
    targets = torch.arange(12)
    _, _, correct = fused_scores(torch.ones(12, 1), weight, None, targets, LogitTransform())
    assert correct.nonzero().flatten().tolist() == [best]


@pytest.mark.usefixtures("small_tiles")
def test_no_gradient_where_nobody_asks() -> None:
    hidden, weight, bias, targets, _ = Case((6, 3, 70), bias=True).operands()
    assert bias is not None
    scores = fused_scores(hidden, weight.detach(), bias.detach(), targets, LogitTransform())
    assert [score.requires_grad for score in scores] == [True, False, False]
    made: list[int] = []
    with _Largest(made):
        scores[0].sum().backward()
    assert weight.numel() not in made
    assert not fused_scores(hidden.detach(), weight.detach(), None, targets, LogitTransform())[0].requires_grad


@pytest.mark.parametrize("score", ["fused", "rows"])
def test_no_token_gives_zero_with_a_graph(score: str) -> None:
    linear, hidden = nn.Linear(5, 11), torch.randn(0, 5, requires_grad=True)
    targets = torch.zeros(0, dtype=torch.int64)
    if score == "fused":
        logp, entropy, correct = fused_scores(hidden, linear.weight, linear.bias, targets, LogitTransform())
    else:
        logp, entropy, correct = scores_by_rows(linear, hidden, targets, 11)
    assert logp.shape == entropy.shape == correct.shape == (0,)
    logp.sum().backward()
    for tensor in (hidden, linear.weight, linear.bias):
        assert tensor.grad is not None
        assert float(tensor.grad.abs().sum()) == 0.0


@pytest.mark.parametrize("target", [-100, -1, 7])
def test_a_target_outside_the_vocabulary_is_refused(target: int) -> None:
    with pytest.raises(ValueError, match=f"{min(target, 3)} to {max(target, 3)}, the head has 7 rows"):
        fused_scores(torch.ones(2, 1), torch.ones(7, 1), None, torch.tensor([3, target]), LogitTransform())


def test_a_number_that_is_not_finite_is_not_hidden() -> None:
    weight = torch.ones(7, 1)
    weight[5] = torch.nan
    logp, _, _ = fused_scores(torch.ones(1, 1), weight, None, torch.tensor([0]), LogitTransform())
    assert bool(logp.isnan())


@pytest.mark.usefixtures("small_tiles")
def test_inside_a_checkpoint() -> None:
    case = Case((13, 8, 33), bias=True)
    found = gradients(lambda *given: checkpoint(fused_scores, *given, use_reentrant=False), case, LogitTransform())
    expected = gradients(fused_scores, case, LogitTransform())
    assert all(torch.equal(*pair) for pair in zip(found[1], expected[1], strict=True))


@pytest.mark.parametrize("chunk", [1, 3, 7, 100])
def test_by_rows_equals_log_softmax(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head_module, "ROW_TILES", 1)
    monkeypatch.setattr(head_module, "TILE", chunk * 33)
    case, transform = Case((13, 8, 33), bias=True), TRANSFORMS["all"]

    def score(hidden: Tensor, weight: Tensor, bias: Tensor, targets: Tensor, transform: LogitTransform) -> Scores:
        return scores_by_rows(
            lambda rows: transform(nn.functional.linear(rows, weight, bias)), hidden, targets, len(weight)
        )

    found, expected = gradients(score, case, transform), gradients(naive, case, transform)
    for ours, theirs in zip(found[0], expected[0], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
    assert all(relative(*pair) <= 1e-5 for pair in zip(found[1], expected[1], strict=True))


def _plain(kind: str) -> tuple[list[dict[str, float]], dict[str, Tensor], dict[str, Tensor]]:
    """Lines, weights at the start and at the end: plain torch, no engine, no fused head, one row after the other."""
    model = model_of(kind)
    learning = {name: p for name, p in model.named_parameters() if p.requires_grad}
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    lines = []
    for _ in range(STEPS):
        scores = [_scores(model, row.examples[0]) for row in examples()]
        logp, entropy, correct = (torch.cat(column) for column in zip(*scores, strict=True))
        model.zero_grad()
        (-logp.mean()).backward()
        norm = torch.sqrt(sum((p.grad.double() ** 2).sum() for p in learning.values()))
        sums = {"logp": logp, "entropy": entropy, "correct": correct}
        lines.append({name: float(value.detach().sum()) for name, value in sums.items()} | {"norm": float(norm)})
        with torch.no_grad():
            for parameter in learning.values():
                parameter -= RATE * parameter.grad
    return lines, start, {name: p.detach() for name, p in model.named_parameters()}


def _scores(model: Any, example: Any) -> Scores:
    ids = torch.from_numpy(example.tokens.astype("int64"))
    counted = torch.from_numpy(example.mask[1:]).bool()
    logits = model(input_ids=ids[None], use_cache=False).logits[0, :-1][counted]
    unit = torch.eye(logits.shape[1])
    return naive(logits, unit, None, ids[1:][counted], LogitTransform(temperature=TEMPERATURE))


HOOKED = ("untied-checkpointed", "untied-adapter")
"""What may go wrong here are the hooks of the higher stages."""
CELLS = [f"{kind}-z{zero}" for kind in KINDS for zero in ((2, 3) if kind in HOOKED else range(4))]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Folders by number of ranks; each number of ranks is one process group for all cells."""
    roots = {ranks: tmp_path_factory.mktemp(f"ranks{ranks}") for ranks in (1, 2)}
    for ranks, root in roots.items():
        running = start_ranks(train_cells, (str(root), CELLS, ranks), ranks, root)
        assert running.wait(timeout=400) == [0] * ranks, running.output()
    return roots


@pytest.fixture(scope="module")
def references() -> dict[str, Any]:
    return {kind: _plain(kind) for kind in KINDS}


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("name", CELLS)
def test_under_every_stage(runs: dict[int, Path], references: dict[str, Any], name: str, ranks: int) -> None:
    """Scores and gradient norm to 1e-6, the update of two steps to 1e-5 of its length; what is frozen stays."""
    lines, start, end = references[name.rsplit("-z", 1)[0]]
    found = torch.load(runs[ranks] / f"{name}.pt")
    for ours, theirs in zip(found["lines"], lines, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-6)
    assert found["weights"].keys() == end.keys()
    moved = [key for key in end if not torch.equal(start[key], end[key])]
    difference = sum(float(((found["weights"][key] - end[key]).double() ** 2).sum()) for key in moved)
    length = sum(float(((end[key] - start[key]).double() ** 2).sum()) for key in moved)
    assert (difference / length) ** 0.5 <= 1e-5
    assert all(torch.equal(found["weights"][key], start[key]) for key in end.keys() - set(moved))


class _Largest(TorchDispatchMode):
    """Notes the elements of every tensor that is made, and its storage; a view is not."""

    def __init__(self, sizes: list[int]) -> None:
        super().__init__()
        self.sizes = sizes
        self.storages: list[tuple[StorageWeakRef, int]] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        given = {each.untyped_storage()._cdata for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)}
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in given:
                self.sizes.append(tensor.numel())
                storage = tensor.untyped_storage()
                self.storages.append((StorageWeakRef(storage), storage.nbytes()))
        return result

    def kept(self) -> int:
        """Bytes of what is still there, whoever holds it: autograd, or the head's own context."""
        return sum(size for storage, size in self.storages if not storage.expired())


def _without_data(monkeypatch: pytest.MonkeyPatch) -> tuple[Tensor, Tensor, None, Tensor]:
    """4,096 tokens of a vocabulary of 150,000, the hidden states 4 wide."""
    monkeypatch.setattr(head_module, "_check", lambda *_: None)  # there are no numbers to look at
    with torch.device("meta"):
        hidden, weight = (torch.randn(size, 4, requires_grad=True) for size in (4096, 150_000))
        return hidden, weight, None, torch.zeros(4096, dtype=torch.int64)


def test_logits_are_never_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward and backward on tensors without data: none is larger than the weight or a pair of tiles, 1/200 of the
    logits. The naive head shows that the test would see them."""
    operands = _without_data(monkeypatch)
    largest = []
    for score in (fused_scores, naive):
        made: list[int] = []
        with _Largest(made):
            score(*operands, LogitTransform(cap=30.0))[0].sum().backward()
        largest.append(max(made))
    assert largest[0] <= 2 * head_module.TILE < largest[1] // 200
    assert largest[1] == 4096 * 150_000


def test_no_tile_is_kept_for_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    """All tiles together would be the logits again. Between forward and backward there are, besides the operands, the
    three scores and two numbers per token; the naive head keeps the logits more than once."""
    operands = _without_data(monkeypatch)
    kept = []
    for score in (fused_scores, naive):
        with _Largest([]) as seen:
            scores = score(*operands, LogitTransform(cap=30.0))
        kept.append(seen.kept())
        assert scores[0].requires_grad
    assert kept[0] <= 4 * 8 * 4096
    assert kept[1] >= 4 * 4096 * 150_000
