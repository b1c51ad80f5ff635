"""Policy and critic learn what plain torch makes them learn, at every ZeRO stage: on two engines (plan B), and as two
adapters on one frozen base (plan A). Checkpoints hold both, exports the policy."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from role_jobs import UPDATES, Case, plain_roles, train_roles
from safetensors import safe_open
from trainer_kit import make_config, make_model, prepare, rows, run_ranks

from posttrain_trainer.microbatch import collate
from posttrain_trainer.prepared import write_manifest
from posttrain_trainer.scorer import Scorer
from posttrain_trainer.tokenset import TokenSet

pytestmark = pytest.mark.timeout(900)  # on a busy machine; alone it is done in a minute
LORA: dict[str, Any] = {"rank": 4, "alpha": 8.0, "dropout": 0.0, "target_modules": ["all-linear"]}
CLIP = 0.5
"""Below the norm of both together, and above the policy's."""
IDLE, SAVED_AFTER = 1, 2
"""Of three updates the policy is left out of the first, and saved after the second."""


def _case(name: str) -> Case:
    """A name is `<kind>-<plan>-z<stage>`; kinds: LoRA (or Full); again: with gradient checkpointing; idle: AdamW, the
    policy joins later; resumed: the same, from a checkpoint; adopted: from one that is taken over by name; clipped."""
    kind, plan, zero = name.split("-")
    return Case(
        plan,
        int(zero[1]),
        tuning="Full" if kind == "Full" else "LoRA",
        checkpointing=kind == "again",
        clip=CLIP if kind == "clipped" else 0.0,
        idle=IDLE if kind in ("idle", "resumed", "adopted") else 0,
        adam=kind in ("idle", "resumed", "adopted"),
        resume=kind in ("resumed", "adopted"),
        adopt=kind == "adopted",
        export=name in EXPORTED,
    )


EXPORTED = ("Full-separate-z3", "LoRA-shared-z0", "again-shared-z3")
NAMES = {
    1: [
        *("LoRA-separate-z0", "again-separate-z3", "Full-separate-z0", "Full-separate-z2"),
        *("again-shared-z0", "again-shared-z1", "LoRA-shared-z3"),
        *("idle-separate-z0", "idle-shared-z0", "resumed-separate-z0", "clipped-shared-z0", "clipped-shared-z3"),
        *("adopted-separate-z0", "adopted-shared-z0"),
    ],
    2: [
        *("LoRA-separate-z0", "LoRA-separate-z2", "Full-separate-z1", "Full-separate-z3"),
        *("LoRA-shared-z0", "LoRA-shared-z1", "LoRA-shared-z2", "again-shared-z2", "again-shared-z3"),
        *("idle-separate-z0", "idle-separate-z2", "idle-shared-z2", "idle-shared-z3"),
        *("resumed-separate-z2", "resumed-shared-z2", "resumed-shared-z3", "clipped-shared-z1"),
        *("adopted-separate-z2", "adopted-shared-z2", "adopted-shared-z3"),
    ],
}
"""By the number of ranks: each stage on both plans, and each property where it is at risk."""


def _cells(*kinds: str, plan: str = "") -> list[tuple[int, str]]:
    return [
        (ranks, name)
        for ranks, names in NAMES.items()
        for name in names
        if name.startswith(kinds) and f"-{plan}" in name
    ]


def _make(root: Path, name: str, case: Case, ranks: int) -> None:
    config = make_config(
        root / name,
        stage="RL",
        algorithm="PPO",
        tuning=case.tuning,
        **({"lora": LORA} if case.tuning == "LoRA" else {}),
        critic={"shared": case.plan == "shared"},
        topology__processes_per_node=ranks,
        rollout__temperature=0.7,
    )
    prepared = prepare(config, rows(8), model_dir=str(root / "model"))
    resolved = prepared.resolved.model_copy(update={"gradient_checkpointing": case.checkpointing})
    write_manifest(root / name / "prepared", prepared.model_copy(update={"resolved": resolved}))
    (root / name / "case.json").write_text(json.dumps(asdict(case)))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """By the number of ranks: all cases in one process group; each has left found.pt in its folder."""
    roots = {}
    torch.set_num_threads(1)  # the machine is shared with the ranks
    for ranks, names in NAMES.items():
        roots[ranks] = root = tmp_path_factory.mktemp("roles")
        make_model(root / "model")
        for name in names:
            _make(root, name, _case(name), ranks)
        run_ranks(train_roles, (str(root), names), ranks, root)
    return roots


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What plain torch finds, by tuning."""
    root = tmp_path_factory.mktemp("plain")
    make_model(root / "model")
    for tuning in ("LoRA", "Full"):
        _make(root, tuning, Case("separate", tuning=tuning), 1)
    return {tuning: plain_roles(root / tuning) for tuning in ("LoRA", "Full")}


def _found(root: Path, name: str) -> dict[str, Any]:
    return torch.load(root / name / "found.pt")


def _difference(ours: Any, theirs: Any, update: int, role: str) -> float:
    """‖difference of the updates‖ / ‖update‖ of a role, since the start."""
    assert ours["weights"][0].keys() == theirs["weights"][0].keys()
    names = [name for name in theirs["weights"][0] if name.startswith(role)]
    pairs = [(ours["weights"][update][name], theirs["weights"][update][name]) for name in names]
    moved = [theirs["weights"][update][name] - theirs["weights"][0][name] for name in names]
    squares = sum(float((a - b).double().square().sum()) for a, b in pairs)
    length = sum(float(each.double().square().sum()) for each in moved)
    return (squares / length) ** 0.5


@pytest.mark.parametrize(("ranks", "name"), _cells("LoRA", "again", "Full"))
def test_both_learn_what_plain_torch_says(
    trained: dict[int, Path], plain: dict[str, Any], ranks: int, name: str
) -> None:
    found, reference = _found(trained[ranks], name), plain[_case(name).tuning]
    for update in range(1, UPDATES + 1):
        for role in ("policy", "critic"):
            assert _difference(found, reference, update, role) <= 1e-5
            norms = [each["norms"][update - 1][role] for each in (found, reference)]
            assert norms[0] == pytest.approx(norms[1], rel=1e-6)


@pytest.mark.parametrize(("ranks", "name"), _cells("LoRA", "again", plan="shared"))
def test_a_shared_base_is_as_good_as_two(trained: dict[int, Path], ranks: int, name: str) -> None:
    """What policy, critic and reference say in the end; and nobody moved the base."""
    found, apart = _found(trained[ranks], name), _found(trained[ranks], "LoRA-separate-z0")
    assert found["frozen"][0] == found["frozen"][1] == apart["frozen"][0]
    for ours, theirs in zip(found["said"], apart["said"], strict=True):
        for what in ("logp", "value", "reference"):
            torch.testing.assert_close(ours[what], theirs[what], rtol=1e-5, atol=1e-5)
        assert float((ours["logp"] - ours["reference"]).abs().max()) > 0.1


@pytest.mark.parametrize(("ranks", "name"), _cells("idle", plan="shared"))
def test_a_policy_that_waits_is_as_if_it_had_not_been_there(trained: dict[int, Path], ranks: int, name: str) -> None:
    """With AdamW and decay: no step of its own is counted before its first gradient."""
    found, apart = _found(trained[ranks], name), _found(trained[ranks], "idle-separate-z0")
    for key, start in found["weights"][0].items():
        if key.startswith("policy"):
            assert torch.equal(found["weights"][IDLE][key], start)
    assert found["norms"][0]["policy"] == 0.0
    for role in ("policy", "critic"):
        assert _difference(found, apart, UPDATES, role) <= 1e-4  # Adam divides rounding errors by small numbers


@pytest.mark.parametrize(("ranks", "name"), _cells("clipped"))
def test_one_clip_covers_both(trained: dict[int, Path], plain: dict[str, Any], ranks: int, name: str) -> None:
    found, reference = _found(trained[ranks], name), plain["LoRA"]
    norms = reference["norms"][0]
    assert found["norms"][0] == pytest.approx(norms, rel=1e-6)
    whole = (norms["policy"] ** 2 + norms["critic"] ** 2) ** 0.5
    assert norms["policy"] < CLIP < whole
    for key, start in reference["weights"][0].items():
        expected = (reference["weights"][1][key] - start) * CLIP / whole
        torch.testing.assert_close(found["weights"][1][key] - start, expected, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(("ranks", "name"), _cells("resumed", "adopted"))
def test_resume_is_bit_exact(trained: dict[int, Path], ranks: int, name: str) -> None:
    """Both roles, in one checkpoint."""
    whole = _found(trained[ranks], name.replace("resumed", "idle").replace("adopted", "idle"))
    resumed = _found(trained[ranks], name)
    for key, value in whole["weights"][UPDATES].items():
        assert torch.equal(resumed["weights"][UPDATES][key], value), key
    assert whole["norms"] == resumed["norms"]
    folders = {path.name for path in (trained[ranks] / name / "checkpoints").glob(f"step-00000{SAVED_AFTER}/*")}
    assert "ds" in folders
    assert ("ds-critic" in folders) == ("separate" in name)


@pytest.mark.parametrize(("ranks", "name"), [(2, name) for name in EXPORTED])
def test_the_policy_alone_is_exported(trained: dict[int, Path], ranks: int, name: str) -> None:
    folder = trained[ranks] / name
    output = folder / "output"
    assert not [path for path in output.rglob("*") if "value" in path.name or "critic" in path.name]
    names: list[str] = []
    for path in output.glob("*.safetensors"):
        with safe_open(path, "pt") as tensors:
            names += tensors.keys()
    assert names
    assert not [each for each in names if "value" in each or "head" in each.replace("lm_head", "")]
    whole = "Full" in name
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(
        output if whole else folder.parent / "model", dtype=torch.float32
    )
    model = model if whole else peft.PeftModel.from_pretrained(model, output)
    tokens = TokenSet(folder / "prepared" / "train")
    first = [tokens[row] for row in range(0, 8, ranks)][: 4 // ranks]  # rank 0's first micro-batch
    logp = Scorer(model.eval(), 0.7)(*Scorer.inputs(collate(first)))[0]
    torch.testing.assert_close(logp.detach(), _found(folder.parent, name)["said"][0]["logp"], rtol=1e-5, atol=1e-5)
