"""Adapters of earlier jobs: what is read, what is refused by name, what a reward model and a reference take of them."""

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
from plain_kit import (
    causal,
    make_adapter,
    make_chain,
    merged_by_hand,
    model_digest,
    on_chain,
)
from safetensors.torch import load_file, save_file
from trainer_kit import Shape, make_config, make_model, make_reward_model

from posttrain_api.places import Source
from posttrain_api.reasons import Reason
from posttrain_api.trainer import JobIdentity, LoraConfig, ModelConfig, ReferenceConfig
from posttrain_trainer import prepare as prepare_module
from posttrain_trainer.adapters import adapter_files, check_use
from posttrain_trainer.errors import TrainerFailure
from posttrain_trainer.fetch import Fetcher
from posttrain_trainer.loading import ModelFolder, load_causal, load_reward
from posttrain_trainer.lora import continue_adapter
from posttrain_trainer.model import check_unchanged
from posttrain_trainer.model_files import digest_of
from posttrain_trainer.model_start import given_model, reference_model
from posttrain_trainer.output_manifest import Base, OutputManifest, Parent

LORA: dict[str, Any] = {"rank": 4, "alpha": 8.0, "dropout": 0.0, "target_modules": ["all-linear"]}
CONTINUED: dict[str, Any] = {"alpha": 1.0, "dropout": 0.0, "target_modules": ["all-linear"], "continue_adapter": True}


def _start(root: Path, chain: list[Path]) -> Any:
    return given_model(ModelConfig.model_validate(on_chain(root, chain)), Fetcher(root / "hub"))


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
    first, second = make_chain(root)
    _write_manifest(first, model_digest(root / "model"), [])
    _write_manifest(second, model_digest(root / "model"), [first])
    return root


@pytest.fixture
def root(kept: Path, tmp_path: Path) -> Path:
    shutil.copytree(kept, tmp_path / "root")
    return tmp_path / "root"


def test_a_chain_is_read_in_order(root: Path) -> None:
    start = _start(root, [root / "first", root / "second"])
    assert [Path(each.dir).name for each in start.adapters] == ["first", "second"]


def test_the_chat_template_of_the_last_adapter_comes_along(root: Path) -> None:
    """As it does with a merged model: the next stage must not speak to the policy in the base's own template."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(root / "model")
    chain = [root / "first", root / "second"]
    assert _start(root, chain).tokenizer.chat_template is None
    for folder in chain:
        tokenizer.chat_template = folder.name
        tokenizer.save_pretrained(folder)
    assert _start(root, chain).tokenizer.chat_template == "second"
    (root / "second" / "tokenizer_config.json").unlink()
    assert _start(root, chain).tokenizer.chat_template == "first"
    given = ModelConfig.model_validate({**on_chain(root, chain), "chat_template": "own"})
    assert given_model(given, Fetcher(root / "hub")).tokenizer.chat_template == "own"


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
    body = merged_by_hand(root, ["first"])
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
    given = ModelConfig.model_validate(on_chain(tmp_path, [tmp_path / "first"]))
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
    config = make_config(root / "run", model=on_chain(root, []), reference=reference.to_wire())
    with pytest.raises(TrainerFailure, match=r"pvc://other: the reference's tokenizer has another vocabulary"):
        reference_model(config, Fetcher(root / "hub"), _start(root, []))
