"""The frozen base in 4 bits: the engine's updates against transformers, peft and bitsandbytes as anyone would combine
them, at every ZeRO stage that can; what is exported; DPO against the base that the adapter sits on; what is refused.
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import bitsandbytes
import peft
import pytest
import torch
import transformers
from plain_kit import (
    SGD,
    Run,
    assert_same,
    causal,
    check_unchanged,
    logp_of_rows,
    make_chain,
    merged_by_hand,
    on_chain,
    plain_sgd,
    train_all,
)
from safetensors import safe_open
from trainer_kit import Shape, make_config, make_model, pairs, prepare, rows, write_tokens

from posttrain_api.reasons import Reason
from posttrain_api.trainer import LoraConfig, TrainerConfig
from posttrain_trainer import nf4
from posttrain_trainer.adapters import adapter_files
from posttrain_trainer.engine_config import EngineSettings, deepspeed_config
from posttrain_trainer.errors import TrainerFailure
from posttrain_trainer.lora import adapter_size, add_adapter
from posttrain_trainer.model import count
from posttrain_trainer.model_files import CONFIG, digest_of
from posttrain_trainer.prepare import prepare as prepare_job
from posttrain_trainer.prepared import PreparedAdapter, read_manifest
from posttrain_trainer.reference_choice import Compared
from posttrain_trainer.sampler import Sampler
from posttrain_trainer.tokenset import TokenSet

LORA: dict[str, Any] = {"rank": 4, "alpha": 8.0, "dropout": 0.0, "target_modules": ["all-linear"]}
SOME: dict[str, Any] = {**LORA, "target_modules": ["q_proj", "up_proj"]}
CONTINUED: dict[str, Any] = {"alpha": 1.0, "dropout": 0.0, "target_modules": ["all-linear"], "continue_adapter": True}
DPO = {"stage": "Preference", "algorithm": "DPO", "preference__beta": 0.2, "training__learning_rate": 0.5}
EVALUATED = {"evaluation__every_steps": 1}
ADAM = {
    "training__learning_rate": 0.02,
    "training__max_steps": 16,
    "training__batch_size": 20,
    "training__tokens_per_micro_batch": 10**6,
}
# name: the number of ranks, the ZeRO stage, the adapter, and what else differs
CELLS: dict[str, tuple[int, int, dict[str, Any], dict[str, Any]]] = {
    "plain-1-z0": (1, 0, LORA, {}),
    "plain-1-z1": (1, 1, LORA, {}),
    "plain-1-z2": (1, 2, LORA, EVALUATED),
    "plain-2-z0": (2, 0, LORA, EVALUATED),
    "plain-2-z1": (2, 1, LORA, {}),
    "plain-2-z2": (2, 2, LORA, {"checkpoint__every_steps": 1}),
    "plain-padded": (1, 2, LORA, {}),
    "plain-offloaded": (1, 2, LORA, {"deepspeed__offload_optimizer": True}),
    "plain-recomputed": (2, 2, LORA, {}),
    "some-2": (2, 2, SOME, {}),
    "dora-1": (1, 1, {**LORA, "dora": True}, {}),
    "dora-merged": (2, 2, {**LORA, "dora": True}, {"merge_adapter": True}),
    "chain-2": (2, 2, LORA, {}),
    "chain-merged": (1, 0, LORA, {"merge_adapter": True}),
    "continued-2": (2, 1, CONTINUED, {}),
    "dpo-1": (1, 0, LORA, {**DPO, **EVALUATED}),
    "dpo-2": (2, 2, LORA, DPO),
    "dpo-cached": (2, 2, LORA, {**DPO, "preference__cache_reference": True}),
    "dpo-continued": (1, 2, CONTINUED, {**DPO, "training__precision": "BF16"}),
    "reward-2": (2, 2, LORA, {"stage": "RewardModel", "merge_adapter": True}),
    "bf16-2": (2, 2, LORA, {"training__precision": "BF16", "merge_adapter": True}),
    "adam-2": (2, 2, LORA, ADAM),
}
COMPARED = [name for name in CELLS if name.split("-")[0] in ("plain", "some", "dora", "chain", "continued")]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("nf4")
    make_model(root / "model")
    chain = make_chain(root)
    write_tokens(root / "probe", rows(3, seed=9))
    write_tokens(root / "pairs", pairs(3, seed=9))
    for name in CELLS:
        _make(root, name, chain)
    for paired in (False, True):
        for ranks in (1, 2):
            cells = [name for name, cell in CELLS.items() if cell[0] == ranks and _paired(name) == paired]
            train_all(root, cells, ranks, probe=not paired)
    return root


def _paired(name: str) -> bool:
    return name.startswith(("dpo", "reward"))


def _make(root: Path, name: str, chain: list[Path]) -> None:
    ranks, zero, lora, changes = CELLS[name]
    given: dict[str, Any] = {}
    if "chain" in name or "continued" in name:
        used = chain[::-1] if "continued" in name else chain  # the plain one is trained further
        changes = {**changes, "model": on_chain(root, used)}
        given["adapters"] = tuple(PreparedAdapter(dir=str(f), digest=digest_of(adapter_files(f))) for f in used)
    settings = {**SGD, "lora": {**lora, "quantization": "NF4"}, "topology__processes_per_node": ranks, **changes}
    config = make_config(root / name, tuning="LoRA", zero_stage=zero, **settings)
    train, held_out = (pairs(20), pairs(4, seed=2)) if _paired(name) else (rows(20), rows(4, seed=2))
    given["precision"] = config.training.precision
    prepared = prepare(config, train, held_out, model_dir=str(root / "model"), **given)
    if name.endswith("recomputed"):
        resolved = prepared.resolved.model_copy(update={"gradient_checkpointing": True})
        prepare(config, train, held_out, model_dir=str(root / "model"), resolved=resolved)
    if name.endswith("padded"):
        (root / name / "padded").touch()


def _config(root: Path, name: str) -> TrainerConfig:
    return TrainerConfig.model_validate_json((root / name / "config.json").read_text())


def in_4_bits(folder: Path) -> Any:
    """As transformers itself loads a model by bitsandbytes."""
    settings = transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    # In training mode: in evaluation mode bitsandbytes repacks the weights on some CPUs and computes in bf16.
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, quantization_config=settings
    ).train()


def _start(root: Path, name: str, tmp: Path) -> Any:
    """The adapted model before training: a chain is merged in fp32, then rounded."""
    config = _config(root, name)
    assert config.lora is not None
    if not name.startswith(("chain", "continued")):
        return add_adapter(in_4_bits(root / "model"), config.lora, config.training.seed)
    below = ["second"] if name.startswith("continued") else ["first", "second"]
    merged_by_hand(root, below).save_pretrained(tmp)
    if name.startswith("continued"):
        return peft.PeftModel.from_pretrained(in_4_bits(tmp), root / "first", is_trainable=True)
    return add_adapter(in_4_bits(tmp), config.lora, config.training.seed)


@pytest.fixture(scope="module")
def expected(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    found = {}
    for name in COMPARED:
        kind = name.split("-")[0]
        if kind not in found:
            start = _start(trained, name, tmp_path_factory.mktemp("merged"))
            found[kind] = plain_sgd(start, _config(trained, name))
    return found


def _did_not_fail(folder: Path) -> None:
    failed = folder / "failed.txt"
    assert not failed.exists(), failed.read_text()


@pytest.mark.parametrize("name", COMPARED)
def test_the_update_is_that_of_transformers_peft_and_bitsandbytes(
    trained: Path, expected: dict[str, Run], name: str
) -> None:
    _did_not_fail(trained / name)
    assert_same(trained / name, expected[name.split("-")[0]])


def test_it_is_another_training_than_without(trained: Path, expected: dict[str, Run]) -> None:
    """The comparison above would see a base that was never rounded."""
    lora = LoraConfig(**LORA)
    full = plain_sgd(add_adapter(causal(trained / "model"), lora, 7), _config(trained, "plain-1-z0"))
    assert full.lines[0]["loss"] != pytest.approx(expected["plain"].lines[0]["loss"], rel=1e-4)


@pytest.mark.parametrize("name", ["plain-1-z0", "plain-2-z2", "some-2", "dora-1", "bf16-2"])
def test_parameters_are_counted_as_weights_not_as_bytes(trained: Path, name: str) -> None:
    whole = sum(each.numel() for each in causal(trained / "model").parameters())
    counts = json.loads((trained / name / "counts.json").read_text())
    assert counts["parameters"] == whole + counts["trainable"]
    if name.startswith("plain"):
        assert counts["trainable"] == adapter_size(add_adapter(causal(trained / "model"), LoraConfig(**LORA), 0), 4)


@pytest.mark.parametrize("name", ["plain-2-z2", "some-2", "dora-1", "chain-2", "continued-2"])
@torch.no_grad()
def test_the_adapter_on_the_rounded_base_is_the_trained_model(trained: Path, name: str) -> None:
    """In plain peft, on the base in full with weights rounded by hand."""
    below = {"chain": ["first", "second"], "continued": ["second"]}.get(name.split("-")[0], [])
    base = merged_by_hand(trained, below)
    for module_name, module in base.named_modules():
        if isinstance(module, torch.nn.Linear) and module_name != "lm_head":
            bits, state = bitsandbytes.functional.quantize_4bit(
                module.weight.data, compress_statistics=True, quant_type="nf4"
            )
            module.weight.data = bitsandbytes.functional.dequantize_4bit(bits, state)
    adapted = peft.PeftModel.from_pretrained(base, trained / name / "output")
    found = logp_of_rows(adapted, trained / "probe")
    torch.testing.assert_close(found, torch.load(trained / name / "probe.pt"), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_the_adapter_on_the_base_as_transformers_rounds_it(trained: Path) -> None:
    output = trained / "plain-2-z2" / "output"
    adapted = peft.PeftModel.from_pretrained(in_4_bits(trained / "model"), output).train()  # see in_4_bits
    found = logp_of_rows(adapted, trained / "probe")
    torch.testing.assert_close(found, torch.load(trained / "plain-2-z2" / "probe.pt"), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["chain-merged", "dora-merged"])
@torch.no_grad()
def test_a_merged_model_is_the_trained_one(trained: Path, name: str) -> None:
    """Not base and adapter: the base's rounding, which the adapter was trained on, is in it."""
    output = trained / name / "output"
    said = torch.load(trained / name / "probe.pt")
    torch.testing.assert_close(logp_of_rows(causal(output), trained / "probe"), said, rtol=1e-5, atol=1e-5)
    assert "quantization_config" not in json.loads((output / CONFIG).read_text())
    base = merged_by_hand(trained, ["first", "second"] if name.startswith("chain") else [])
    on_full = logp_of_rows(peft.PeftModel.from_pretrained(base, output / "adapter"), trained / "probe")
    assert float((on_full - said).abs().max()) > 1e-3


@pytest.mark.parametrize("name", ["plain-2-z2", "chain-merged", "reward-2", "bf16-2"])
def test_the_manifest_says_it(trained: Path, name: str) -> None:
    manifest = json.loads((trained / name / "output" / "manifest.json").read_text())
    assert manifest["quantization"] == "NF4"
    assert manifest["base"]["uri"] == "pvc://models/tiny"


def test_base_and_parents_are_not_changed(trained: Path, tmp_path: Path) -> None:
    check_unchanged(trained, tmp_path)


def test_a_checkpoint_holds_the_adapter_only(trained: Path) -> None:
    """Neither the bits nor the scales that they are read with."""
    (file, *_) = sorted((trained / "plain-2-z2" / "checkpoints").glob("*/ds/*model_states.pt"))
    kept = torch.load(file, weights_only=False)["module"]
    assert kept
    assert all("lora_" in name for name in kept)


def test_bf16_computes_in_bf16_and_keeps_the_bits(trained: Path) -> None:
    """Loss and update stay near fp32's: bits that had been cast would be noise."""
    _did_not_fail(trained / "bf16-2")
    lines, fp32 = (json.loads((trained / name / "lines.json").read_text()) for name in ("bf16-2", "plain-2-z2"))
    for ours, theirs in zip(lines, fp32, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-3)
        assert ours["loss"] != theirs["loss"]
    (file,) = (trained / "bf16-2" / "output").glob("*.safetensors")
    with safe_open(file, "pt") as tensors:
        assert {tensors.get_tensor(name).dtype for name in tensors.keys()} == {torch.bfloat16}  # noqa: SIM118


def test_it_learns(trained: Path) -> None:
    _did_not_fail(trained / "adam-2")
    losses = [line["loss"] for line in json.loads((trained / "adam-2" / "lines.json").read_text())]
    assert losses[-1] < losses[0] - 0.25, "of random rows"


@pytest.mark.parametrize("name", ["dpo-1", "dpo-2", "dpo-cached"])
def test_dpo_starts_at_its_own_base(trained: Path, name: str) -> None:
    """The reference is the base that the adapter sits on, rounded; so the first loss is log 2, then plain DPO's."""
    _did_not_fail(trained / name)
    config = _config(trained, name)
    model = add_adapter(in_4_bits(trained / "model"), LoraConfig(**LORA), config.training.seed)
    lines = json.loads((trained / name / "lines.json").read_text())
    assert lines[0]["loss"] == pytest.approx(math.log(2), rel=1e-6)
    assert [line["loss"] for line in lines] == pytest.approx(_plain_dpo(model, config), rel=1e-6)


def test_a_second_model_keeps_its_bits_in_bf16(trained: Path) -> None:
    """Below a continued adapter the reference is the starting policy once more, rounded as it is."""
    _did_not_fail(trained / "dpo-continued")
    lines = json.loads((trained / "dpo-continued" / "lines.json").read_text())
    assert lines[0]["loss"] == pytest.approx(math.log(2), abs=1e-3)


def test_a_cached_reference_is_of_the_same_base(trained: Path) -> None:
    config, prepared = _config(trained, "dpo-cached"), read_manifest(trained / "dpo-cached" / "prepared")
    assert prepared is not None
    assert config.lora is not None
    given: Any = (prepared, None, None, None)
    full = config.model_copy(update={"lora": config.lora.model_copy(update={"quantization": None})})
    assert Compared(config, *given)._facts() != Compared(full, *given)._facts()


def _plain_dpo(model: Any, config: TrainerConfig) -> list[float]:
    tokens = TokenSet(Path(config.run_dir) / "prepared" / "train")
    steps, batch = config.training.max_steps or 0, config.training.batch_size
    sampler = Sampler(len(tokens), batch, steps * batch, config.training.seed)
    losses = []
    for step in range(steps):
        deltas = []
        for row in sampler.rows(step):
            chosen, rejected = tokens[int(row)].examples
            with torch.no_grad(), model.disable_adapter():
                reference = _sum(model, chosen) - _sum(model, rejected)
            deltas.append(config.preference.beta * (_sum(model, chosen) - _sum(model, rejected) - reference))
        loss = -torch.nn.functional.logsigmoid(torch.stack(deltas)).mean()
        model.zero_grad()
        loss.backward()
        losses.append(float(loss.detach()))
        for each in (each for each in model.parameters() if each.requires_grad):
            each.data -= config.training.learning_rate * each.grad
    return losses


def _sum(model: Any, example: Any) -> torch.Tensor:
    ids = torch.tensor(example.tokens.astype("int64"))[None]
    logp = model(input_ids=ids, use_cache=False).logits[0, :-1].log_softmax(-1)
    return (logp.gather(1, ids[0, 1:, None])[:, 0].double() * torch.tensor(example.mask[1:])).sum()


def test_a_reward_models_head_stays_whole(trained: Path) -> None:
    _did_not_fail(trained / "reward-2")
    reloaded = transformers.AutoModelForSequenceClassification.from_pretrained(trained / "reward-2" / "output")
    assert reloaded.score.weight.shape == (1, 32)


def _model(hidden: int = 32) -> Any:
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(Shape(hidden=hidden).config(), dtype=torch.float32)


def test_only_the_bodys_linear_layers_are_stored_in_4_bits() -> None:
    model, before = _model(), torch.get_rng_state()
    whole = count(model)
    nf4.quantize(model, torch.float32)
    assert torch.equal(torch.get_rng_state(), before), "dropout of a resumed training begins with the same numbers"
    assert count(model).parameters == whole.parameters
    small = {name for name, each in model.named_parameters() if each.dtype == torch.uint8}
    assert len(small) == 2 * 7
    assert all(".layers." in name and name.endswith("_proj.weight") for name in small)
    assert not any(each.requires_grad for name, each in model.named_parameters() if name in small)


@pytest.mark.parametrize("hidden", [32, 24, 40])
def test_sizes_that_are_no_blocks(hidden: int) -> None:
    model, rounded = _model(hidden), _model(hidden)
    nf4.quantize(model, torch.float32)
    nf4.round_weights(rounded)
    ids = torch.arange(9)[None]
    assert torch.equal(model(ids).logits, rounded(ids).logits)
    assert not torch.equal(model(ids).logits, _model(hidden)(ids).logits)


def test_bf16_multiplies_with_the_rounded_weights_in_bf16() -> None:
    model, rounded = _model(), _model()
    nf4.quantize(model, torch.bfloat16)
    nf4.round_weights(rounded)
    for each in (*model.parameters(), *rounded.parameters()):
        if each.is_floating_point():  # as DeepSpeed casts
            each.data = each.data.bfloat16()
    ids = torch.arange(9)[None]
    assert torch.equal(model(ids).logits, rounded(ids).logits)


def test_an_evaluation_changes_no_weights() -> None:
    """bitsandbytes repacks them for a bf16 kernel where the CPU has one, and cannot train with them after that."""
    model, rounded = _model(), _model()
    nf4.quantize(model, torch.float32)
    nf4.round_weights(rounded)
    layers = [each for each in model.modules() if isinstance(each, bitsandbytes.nn.Linear4bit)]
    assert layers
    assert not any(each.support_avx512bf16_for_cpu for each in layers)
    ids = torch.arange(9)[None]
    with torch.no_grad():
        assert torch.equal(model.eval()(ids).logits, rounded(ids).logits)
    hidden = torch.randn(1, 9, 32, requires_grad=True)
    model.train()(inputs_embeds=hidden).logits.sum().backward()
    assert hidden.grad is not None


def test_a_model_without_linear_layers() -> None:
    config = transformers.GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=64)
    with pytest.raises(TrainerFailure, match=r"spec.lora.quantization: GPT2LMHeadModel has no linear layers") as caught:
        nf4.quantize(transformers.GPT2LMHeadModel(config), torch.float32)
    assert caught.value.reason is Reason.MODEL_INCOMPATIBLE


def test_this_machine_can_do_it() -> None:
    nf4.check("cpu")


def test_without_bitsandbytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(TrainerFailure, match=r"spec.lora.quantization: bitsandbytes cannot be imported.*trainer image"):
        nf4.check("cpu")
    with pytest.raises(TrainerFailure) as caught:
        nf4.quantize(_model(), torch.float32)
    assert caught.value.reason is Reason.IMAGE_INCOMPATIBLE


def test_a_library_that_does_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise RuntimeError("native library functionality is not available")

    monkeypatch.setattr(bitsandbytes.functional, "quantize_4bit", fail)
    with pytest.raises(TrainerFailure, match=r"cannot quantize.*native library") as caught:
        nf4.check("cpu")
    assert caught.value.reason is Reason.IMAGE_INCOMPATIBLE


def test_prepare_asks_first(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Before a model is fetched, and for jobs that want it only."""
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    wanted = make_config(tmp_path, tuning="LoRA", lora={**LORA, "quantization": "NF4"})
    with pytest.raises(TrainerFailure, match="cannot be imported") as caught:
        prepare_job(wanted)
    assert caught.value.reason is Reason.IMAGE_INCOMPATIBLE
    with pytest.raises(TrainerFailure) as caught:
        prepare_job(make_config(tmp_path, tuning="LoRA", lora=LORA))
    assert caught.value.reason is not Reason.IMAGE_INCOMPATIBLE


def test_a_library_with_wrong_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bitsandbytes.nn.Linear4bit, "forward", lambda layer, x: torch.zeros(64, 2))
    with pytest.raises(TrainerFailure, match="gives wrong numbers on cpu"):
        nf4.check("cpu")


def test_zero_3_is_refused() -> None:
    """Whatever an operator of another release writes."""
    with pytest.raises(TrainerFailure, match=r"lora\.quantization needs ZeRO 0, 1 or 2"):
        deepspeed_config(EngineSettings(zero_stage=3, max_grad_norm=0.0, adapter=True, quantized=True), 0)
