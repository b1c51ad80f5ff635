"""Adapters of earlier jobs: chains merged in memory, an adapter trained further, and what is refused by name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import peft
import prepare_kit
import pytest
import torch
import transformers
from plain_kit import SGD, Run, assert_same, causal, make_adapter, plain_sgd, train_all
from safetensors.torch import load_file, save_file
from trainer_kit import Shape, make_config, make_model, make_reward_model, prepare, rows, write_tokens

from posttrain_api.reasons import Reason
from posttrain_api.trainer import JobIdentity, LoraConfig, ModelConfig, ReferenceConfig, Source, TrainerConfig
from posttrain_trainer import prepare as prepare_module
from posttrain_trainer.adapters import adapter_files, check_use
from posttrain_trainer.errors import TrainerFailure
from posttrain_trainer.fetch import Fetcher
from posttrain_trainer.loading import ModelFolder, load_causal, load_reward
from posttrain_trainer.lora import add_adapter, continue_adapter
from posttrain_trainer.model import check_unchanged
from posttrain_trainer.model_files import CONFIG, digest_of, weight_files
from posttrain_trainer.model_start import given_model, reference_model
from posttrain_trainer.output_manifest import Base, OutputManifest, Parent
from posttrain_trainer.prepared import PreparedAdapter
from posttrain_trainer.tokenset import TokenSet

LORA: dict[str, Any] = {"rank": 4, "alpha": 8.0, "dropout": 0.0, "target_modules": ["all-linear"]}
CONTINUED: dict[str, Any] = {"alpha": 1.0, "dropout": 0.0, "target_modules": ["all-linear"], "continue_adapter": True}
CELLS: dict[str, dict[str, Any]] = {
    "chain": {"tuning": "LoRA", "lora": LORA, "zero_stage": 2},
    "chain-z3": {"tuning": "LoRA", "lora": LORA, "zero_stage": 3},
    "merged": {"tuning": "LoRA", "lora": LORA, "zero_stage": 2, "merge_adapter": True},
    "continued": {"tuning": "LoRA", "lora": CONTINUED, "zero_stage": 2},
    "continued-z3": {"tuning": "LoRA", "lora": CONTINUED, "zero_stage": 3},
    "full": {"tuning": "Full", "zero_stage": 2},
}


def _adapters(root: Path) -> list[Path]:
    """Two of different kinds; the second was trained on top of the first."""
    make_adapter(root / "first", root / "model", seed=5, use_rslora=True)
    make_adapter(root / "second", root / "model", seed=6, r=2, target_modules="all-linear", use_dora=True)
    return [root / "first", root / "second"]


def _model(root: Path, chain: list[Path]) -> dict[str, Any]:
    sources = [{"uri": f"pvc://runs/{folder.name}", "path": str(folder)} for folder in chain]
    return {"source": {"uri": "pvc://models/tiny", "path": str(root / "model")}, "adapters": sources}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("chains")
    make_model(root / "model")
    chain = _adapters(root)
    for cell, changes in CELLS.items():
        used = chain[::-1] if cell.startswith("continued") else chain  # the plain one is trained further
        config = make_config(root / cell, model=_model(root, used), **{**SGD, **changes})
        prepared = [PreparedAdapter(dir=str(each), digest=digest_of(adapter_files(each))) for each in used]
        prepare(config, rows(20), model_dir=str(root / "model"), adapters=tuple(prepared))
    write_tokens(root / "probe", rows(3, seed=9))
    train_all(root, CELLS, 2, probe=True)
    return root


def _by_hand(root: Path, order: list[str]) -> Any:
    """peft's own merge of one adapter after the other, which leaves the model frozen."""
    model = causal(root / "model")
    for name in order:
        model = peft.PeftModel.from_pretrained(model, root / name).merge_and_unload()
    return model.requires_grad_(True)


def _config(root: Path, cell: str) -> TrainerConfig:
    return TrainerConfig.model_validate_json((root / cell / "config.json").read_text())


def _expected(root: Path, cell: str) -> Run:
    config = _config(root, cell)
    if cell.startswith("continued"):
        start = _by_hand(root, ["second"])
        return plain_sgd(peft.PeftModel.from_pretrained(start, root / "first", is_trainable=True), config)
    start = _by_hand(root, ["first", "second"])
    return plain_sgd(add_adapter(start, LoraConfig(**LORA), 7) if config.lora else start, config)


@pytest.mark.parametrize("cell", CELLS)
def test_training_starts_from_the_merged_chain(trained: Path, cell: str) -> None:
    assert_same(trained / cell, _expected(trained, cell))


def _logp(model: Any, probe: Path) -> torch.Tensor:
    """Of the counted tokens of all rows."""
    found = []
    for example in [row.examples[0] for row in TokenSet(probe)]:
        ids = torch.tensor(example.tokens.astype("int64"))[None]
        logp = model(input_ids=ids, use_cache=False).logits[0, :-1].log_softmax(-1)
        found.append(logp.gather(1, ids[0, 1:, None])[:, 0][torch.tensor(example.mask[1:].astype(bool))])
    return torch.cat(found)


@pytest.mark.parametrize("cell", CELLS)
@torch.no_grad()
def test_the_export_is_the_trained_model(trained: Path, cell: str) -> None:
    """An adapter on base and parents; a merged model, and a full one, alone."""
    output = trained / cell / "output"
    if (output / CONFIG).exists():
        model = causal(output)
    else:
        below = ["second"] if cell.startswith("continued") else ["first", "second"]
        model = peft.PeftModel.from_pretrained(_by_hand(trained, below), output)
    torch.testing.assert_close(
        _logp(model, trained / "probe"), torch.load(trained / cell / "probe.pt"), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("cell", CELLS)
def test_the_manifest_carries_base_and_chain(trained: Path, cell: str) -> None:
    manifest = json.loads((trained / cell / "output" / "manifest.json").read_text())
    assert manifest["base"]["sha256"] == _digest(trained / "model")
    below = ["second"] if cell.startswith("continued") else ["first", "second"]
    assert [each["uri"] for each in manifest["adapters"]] == [f"pvc://runs/{name}" for name in below]
    digests = [digest_of(adapter_files(trained / name)) for name in below]
    assert [each["sha256"] for each in manifest["adapters"]] == digests


def test_the_adapter_alone_is_put_on_no_bare_base(trained: Path) -> None:
    """It would load and say nonsense."""
    settings = json.loads((trained / "chain" / "output" / "adapter_config.json").read_text())
    assert "2 adapters merged" in settings["base_model_name_or_path"]
    with pytest.raises((OSError, ValueError)):
        peft.AutoPeftModelForCausalLM.from_pretrained(trained / "chain" / "output")


def test_base_and_parents_are_not_changed(trained: Path, tmp_path: Path) -> None:
    make_model(tmp_path / "model")
    _adapters(tmp_path)
    for name in ("model", "first", "second"):
        for file in (trained / name).glob("*.safetensors"):
            assert file.read_bytes() == (tmp_path / name / file.name).read_bytes()


def test_the_continued_adapter_keeps_its_own_settings(trained: Path) -> None:
    before, after = (
        json.loads((trained / name / "adapter_config.json").read_text()) for name in ("first", "continued/output")
    )
    for name in ("r", "lora_alpha", "use_rslora", "use_dora"):
        assert after[name] == before[name]
    counts = json.loads((trained / "continued" / "counts.json").read_text())
    assert counts["trainable"] == 2 * 3 * (32 + 32 + 64 + 32)


def _digest(folder: Path) -> str:
    return digest_of([folder / CONFIG, *weight_files(folder, "model")])


def _start(root: Path, chain: list[Path]) -> Any:
    return given_model(ModelConfig.model_validate(_model(root, chain)), Fetcher(root / "hub"))


def _write_manifest(adapter: Path, base: str, parents: list[Path]) -> None:
    manifest = OutputManifest(
        format="peft",
        stage="SFT",
        tuning="LoRA",
        step=1,
        job=JobIdentity(namespace="n", name="parent", uid="u"),
        base=Base(uri="hf://org/base", sha256=base),
        adapters=tuple(Parent(uri=f"pvc://{each.name}", sha256=digest_of(adapter_files(each))) for each in parents),
        files={},
        sha256="sha256:0",
    )
    (adapter / "manifest.json").write_text(manifest.to_json())


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model and a chain of two with their manifests; tests copy it."""
    root = tmp_path_factory.mktemp("kept")
    make_model(root / "model")
    first, second = _adapters(root)
    _write_manifest(first, _digest(root / "model"), [])
    _write_manifest(second, _digest(root / "model"), [first])
    return root


@pytest.fixture
def root(kept: Path, tmp_path: Path) -> Path:
    shutil.copytree(kept, tmp_path / "root")
    return tmp_path / "root"


def test_a_chain_is_read_in_order(root: Path) -> None:
    start = _start(root, [root / "first", root / "second"])
    assert [Path(each.dir).name for each in start.adapters] == ["first", "second"]


def _refused(root: Path, chain: list[str], *parts: str, reason: Reason = Reason.MODEL_INCOMPATIBLE) -> None:
    with pytest.raises(TrainerFailure) as caught:
        _start(root, [root / name for name in chain])
    assert caught.value.reason is reason
    for part in parts:
        assert part in caught.value.message


def test_another_base_is_refused(root: Path) -> None:
    _write_manifest(root / "first", "sha256:other", [])
    _refused(root, ["first"], "pvc://runs/first", "another base", "hf://org/base", "sha256:other")


def test_an_adapter_without_the_one_below_it_is_refused(root: Path) -> None:
    _refused(root, ["second"], "with these adapters merged: ['pvc://first']", "none")


def test_a_chain_in_another_order_is_refused(root: Path) -> None:
    _refused(root, ["second", "first"], "pvc://runs/second")


def test_an_adapter_that_is_no_output_of_a_job_is_taken(root: Path) -> None:
    (root / "first" / "manifest.json").unlink()
    assert len(_start(root, [root / "first"]).adapters) == 1


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_missing_file_is_named(root: Path, name: str) -> None:
    (root / "first" / name).unlink()
    _refused(root, ["first"], f"no {name}", "manifest.json", reason=Reason.MODEL_NOT_FOUND)


def test_no_folder(root: Path) -> None:
    _refused(root, ["none"], "is no folder", reason=Reason.MODEL_NOT_FOUND)


def test_a_torn_file_is_refused(root: Path) -> None:
    file = root / "first" / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    _refused(root, ["first"], "no safetensors file")


def _edit(root: Path, **changes: Any) -> None:
    file = root / "first" / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def test_a_rank_that_the_tensors_do_not_have_is_refused(root: Path) -> None:
    _edit(root, r=5)
    _refused(root, ["first"], "says rank 5", "has rank 3")


def test_another_kind_of_adapter_is_refused(root: Path) -> None:
    _edit(root, peft_type="IA3")
    _refused(root, ["first"], "IA3")


def test_layers_that_this_model_has_not_are_refused(root: Path) -> None:
    make_model(root / "model", Shape(layers=1))
    (root / "first" / "manifest.json").unlink()
    _refused(root, ["first"], "no module 'model.layers.1.")


def test_layers_of_another_size_are_refused(root: Path) -> None:
    make_model(root / "model", Shape(hidden=64))
    (root / "first" / "manifest.json").unlink()
    _refused(root, ["first"], "is [3, 64]", "has 128")


def test_a_tensor_left_over_is_refused(root: Path) -> None:
    """peft only warns."""
    file = root / "first" / "adapter_model.safetensors"
    tensors = load_file(file)
    dropped = tensors.pop(min(tensors))
    save_file(tensors, file)
    with pytest.raises(TrainerFailure, match="1 of its tensors do not fit"):
        load_causal(ModelFolder(root / "model", (root / "first",)))
    assert dropped.numel()


def _use(root: Path, name: str, stage: str, **lora: Any) -> None:
    config = make_config(root / "run", stage=stage, tuning="LoRA", lora={**LORA, **lora})
    check_use([(root / name, f"pvc://runs/{name}")] if name else [], config)


def test_the_rank_of_a_continued_adapter_is_its_own(root: Path) -> None:
    _use(root, "first", "SFT", rank=None, continue_adapter=True)
    _use(root, "first", "SFT", rank=3, continue_adapter=True)
    with pytest.raises(TrainerFailure, match="it is 4, and the adapter to go on with, pvc://runs/first, has rank 3"):
        _use(root, "first", "SFT", rank=4, continue_adapter=True)


def test_nothing_to_continue(root: Path) -> None:
    with pytest.raises(TrainerFailure, match=r"continueAdapter: the model has no adapter"):
        _use(root, "", "SFT", continue_adapter=True)


def test_adapters_of_policies_and_reward_models_differ(root: Path) -> None:
    make_reward_model(root / "reward")
    make_adapter(root / "judge", root / "reward", task_type="SEQ_CLS")
    _use(root, "judge", "RewardModel", rank=None, continue_adapter=True)
    _use(root, "first", "RewardModel")
    with pytest.raises(TrainerFailure, match="reward model's, and SFT trains a policy"):
        _use(root, "judge", "SFT")
    with pytest.raises(TrainerFailure, match="RewardModel cannot go on with it"):
        _use(root, "first", "RewardModel", rank=None, continue_adapter=True)


def test_a_reward_model_starts_from_merged_adapters(root: Path) -> None:
    """A policy's changes its body, a reward model's its head too."""
    make_adapter(root / "judge", root / "model", task_type="SEQ_CLS")
    start = load_reward(ModelFolder(root / "model", (root / "first", root / "judge")), root / "model", 7)
    body = _by_hand(root, ["first"])
    base = transformers.AutoModelForSequenceClassification.from_pretrained(root / "model", num_labels=1)
    base.model.load_state_dict(body.model.state_dict())
    judge = peft.PeftModel.from_pretrained(base, root / "judge")
    ids = torch.arange(3, 9)[None]
    torch.testing.assert_close(start(input_ids=ids).logits, judge(input_ids=ids).logits, rtol=1e-5, atol=1e-5)


def test_a_continued_adapter_takes_the_jobs_dropout(root: Path) -> None:
    lora = LoraConfig(**{**CONTINUED, "dropout": 0.25})
    adapted = continue_adapter(causal(root / "model"), lora, root / "first")
    layer = adapted.base_model.model.model.layers[0].self_attn.q_proj
    assert layer.lora_dropout["default"].p == 0.25


def test_prepare_says_where_adapters_and_reference_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("POSTTRAIN_ATTEMPT", raising=False)
    model = prepare_kit.model_folder(tmp_path / "model")
    make_adapter(tmp_path / "first", model)
    given = ModelConfig.model_validate(_model(tmp_path, [tmp_path / "first"]))
    assert given.source is not None
    reference = ReferenceConfig(source=given.source, adapters=given.adapters)
    train = prepare_kit.write_jsonl(tmp_path / "data" / "train.jsonl", prepare_kit.pairs(8))
    config = prepare_kit.job(tmp_path, train, stage="SFT", model=given, reference=reference)
    prepared = prepare_module.prepare(config)
    digest = digest_of(adapter_files(tmp_path / "first"))
    assert prepared.adapters == prepared.reference_adapters
    assert [(each.dir, each.digest) for each in prepared.adapters] == [(str(tmp_path / "first"), digest)]
    assert (prepared.reference_dir, prepared.reference_digest) == (str(model), prepared.model_digest)
    check_unchanged(config, prepared)
    make_adapter(tmp_path / "first", model, seed=8)
    with pytest.raises(TrainerFailure, match="pvc://runs/first: its files changed"):
        check_unchanged(config, prepared)


def test_a_reference_of_another_vocabulary_is_refused(tmp_path: Path, root: Path) -> None:
    model = prepare_kit.model_folder(tmp_path / "other")
    reference = ReferenceConfig(source=Source(uri="pvc://other", path=str(model)))
    config = make_config(root / "run", model=_model(root, []), reference=reference.to_wire())
    with pytest.raises(TrainerFailure, match=r"pvc://other: the reference's tokenizer has another vocabulary"):
        reference_model(config, Fetcher(root / "hub"), _start(root, []))
