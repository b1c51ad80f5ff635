"""What one field of the spec says about another.

Each rule stands at the smallest node that sees all it needs, so that the message is near the fault and the API
server's cost is
small. Nothing here repeats a bound of a single field: those are the schema's.
"""

from __future__ import annotations

from typing import Any

from posttrain_api.rules.deepspeed_rules import DEEPSPEED_RULES
from posttrain_api.rules.guard_rules import GUARD_RULES
from posttrain_api.rules.online_rules import GRPO_RULES, ONLINE_RULES, PPO_RULES
from posttrain_api.rules.reward_rules import REWARD_RULES
from posttrain_api.rules.stage_rules import PREFERENCE_RULES, STAGE_RULES
from posttrain_api.rules.storage_rules import STORAGE_RULES
from posttrain_api.rules.tuning_rules import EVALUATION_RULES, TUNING_RULES
from posttrain_api.rules.types import Rule, cel_matches, count, get, has, matches, one_of, whole
from posttrain_api.rules.uris import PINNED
from posttrain_api.spec.fields import MAX_JOB_NAME

NAME_PATTERN = rf"[a-z](?:[-a-z0-9]{{0,{MAX_JOB_NAME - 2}}}[a-z0-9])?"
ENV_SECRETS = r"(?i)(?:.*_)?(?:token|secret|password|api_?key|access_?key)"
ENV_OWNED = r"PET_.*|MASTER_.*|POSTTRAIN_.*|KUBEFLOW_TRAINER_.*|RANK|WORLD_SIZE|LOCAL_RANK|LOCAL_WORLD_SIZE|GROUP_RANK"


def _own_name(path: str) -> Rule:
    guard = " && ".join(f"has(self.{part})" for part in _prefixes(path))
    return Rule(
        at=("",),
        cel=f"!({guard}) || self.{path}.name != self.metadata.name",
        must="must not name the job itself",
        instead="name the earlier job whose result is wanted",
        field=f".{path}.name",
        holds=lambda root: get(root, f"{path}.name") is None or get(root, f"{path}.name") != get(root, "metadata.name"),
    )


def _prefixes(path: str) -> list[str]:
    parts = path.split(".")
    return [".".join(parts[: index + 1]) for index in range(1, len(parts))]


def _code_is_pinned(model: Any) -> bool:
    if get(model, "trustRemoteCode") is not True:
        return True
    uri = get(model, "uri")
    hub = isinstance(uri, str) and uri.startswith("hf://")
    return not has(model, "scratch") and (not hub or matches(uri, PINNED))


def _heads_fit(scratch: Any) -> bool:
    heads, kv = whole(scratch, "heads", 0), whole(scratch, "kvHeads", 0)
    return not heads or not kv or kv < 1 or heads % kv == 0


def _head_width_fits(scratch: Any) -> bool:
    heads, hidden, width = (whole(scratch, key, 0) for key in ("heads", "hiddenSize", "headDim"))
    if width is None or (width and width > 0):
        return width is None or width % 2 == 0
    return not heads or not hidden or heads < 1 or hidden % (2 * heads) == 0


def _lengths_fit(spec: Any) -> bool:
    longest, made_for = whole(spec, "data.maxLength", 0), whole(spec, "model.scratch.maxLength", 0)
    return not longest or not made_for or longest <= made_for


def _prompt_fits(spec: Any) -> bool:
    prompt, longest = whole(spec, "data.maxPromptLength", 0), whole(spec, "data.maxLength", 0)
    return not prompt or not longest or prompt < longest


MODEL_RULES: tuple[Rule, ...] = (
    Rule(
        at=("spec.data",),
        cel="!has(self.maxPromptLength) || !has(self.maxLength) || self.maxPromptLength < self.maxLength",
        must="must be less than maxLength",
        instead="choose less, or leave it out: the answer needs room",
        field=".maxPromptLength",
        holds=lambda data: _prompt_fits({"data": data}),
    ),
    Rule(
        at=("spec",),
        cel="!has(self.model.scratch) || !has(self.model.scratch.maxLength) || !has(self.data.maxLength) || "
        "self.data.maxLength <= self.model.scratch.maxLength",
        must="must not be more than model.scratch.maxLength",
        instead="choose less, or make the model for longer sequences",
        field=".data.maxLength",
        holds=_lengths_fit,
    ),
    one_of("spec.model", ("uri", "fromJob", "scratch"), "keep the one that training starts from"),
    one_of("spec.reference", ("uri", "fromJob"), "keep the one that the policy is compared with"),
    one_of("spec.critic.model", ("uri", "fromJob"), "keep the one that the critic begins as"),
    Rule(
        at=("spec.model",),
        cel="!has(self.trustRemoteCode) || !self.trustRemoteCode || (!has(self.scratch) && "
        f"(!has(self.uri) || !self.uri.startsWith('hf://') || {cel_matches('self.uri', PINNED)}))",
        must="needs a model whose code is pinned",
        instead="write uri: hf://org/name@<40-character commit>",
        field=".trustRemoteCode",
        holds=_code_is_pinned,
    ),
    Rule(
        at=("spec.model.scratch",),
        cel="!has(self.kvHeads) || self.heads % self.kvHeads == 0",
        must="must divide heads",
        instead="choose a divisor of heads, or leave it out",
        field=".kvHeads",
        holds=_heads_fit,
    ),
    Rule(
        at=("spec.model.scratch",),
        cel="has(self.headDim) ? self.headDim % 2 == 0 : self.hiddenSize % (2 * self.heads) == 0",
        must="must be even, and where it is left out hiddenSize / heads must be an even whole number",
        instead="choose hiddenSize as an even multiple of heads, or set headDim",
        field=".headDim",
        holds=_head_width_fits,
    ),
)


def _processes_said(resources: Any) -> bool:
    gpus = whole(resources, "gpusPerNode", 1)
    return gpus is None or (gpus == 0) == has(resources, "processesPerNode")


def _warms_up_in_time(training: Any) -> bool:
    warmup, steps = whole(training, "warmupSteps", 0), whole(training, "maxSteps", 0)
    return not warmup or not steps or warmup <= steps


def _name_fits(root: Any) -> bool:
    name = get(root, "metadata.name")
    return name is None or matches(name, NAME_PATTERN)


OTHER_RULES: tuple[Rule, ...] = (
    Rule(
        at=("",),
        cel=cel_matches("self.metadata.name", NAME_PATTERN),
        must=f"must be a DNS-1035 label of at most {MAX_JOB_NAME} characters",
        instead="use lower-case letters, digits and dashes, starting with a letter; pods are called <name>-worker-<i>",
        field=".metadata.name",
        holds=_name_fits,
    ),
    _own_name("spec.model.fromJob"),
    _own_name("spec.reference.fromJob"),
    _own_name("spec.critic.model.fromJob"),
    _own_name("spec.checkpoint.from.fromJob"),
    Rule(
        at=("spec.training",),
        cel="!has(self.epochs) || !has(self.maxSteps)",
        must="excludes epochs",
        instead="keep the one that should end the training",
        field=".maxSteps",
        forbidden=True,
        holds=lambda training: count(training, "epochs", "maxSteps") < 2,
    ),
    Rule(
        at=("spec.training",),
        cel="!has(self.warmupSteps) || !has(self.maxSteps) || self.warmupSteps <= self.maxSteps",
        must="must not be more than maxSteps",
        instead="choose less: the learning rate would never be reached",
        field=".warmupSteps",
        holds=_warms_up_in_time,
    ),
    one_of("spec.checkpoint.from", ("fromJob", "uri"), "keep the one that names the checkpoint"),
    *STORAGE_RULES,
    Rule(
        at=("spec.resources",),
        cel="(has(self.gpusPerNode) && self.gpusPerNode == 0) == has(self.processesPerNode)",
        must="goes with gpusPerNode: 0 and only with it",
        instead=(
            "for a run on the CPU write gpusPerNode: 0 and processesPerNode; with GPUs there is one process for each"
        ),
        field=".processesPerNode",
        holds=_processes_said,
    ),
    Rule(
        at=("spec.env[].name",),
        cel=f"!{cel_matches('self', ENV_SECRETS)}",
        must="must not name a secret",
        instead="a literal is readable by everyone who may read the job: use secretRef of the model or data source",
        forbidden=True,
        holds=lambda name: not isinstance(name, str) or not matches(name, ENV_SECRETS),
    ),
    Rule(
        at=("spec.env[].name",),
        cel=f"!{cel_matches('self', ENV_OWNED)}",
        must="is set by the job itself",
        instead="remove it; nodes and processes are said in resources",
        forbidden=True,
        holds=lambda name: not isinstance(name, str) or not matches(name, ENV_OWNED),
    ),
)

SPEC_RULES: tuple[Rule, ...] = (
    *STAGE_RULES,
    *PREFERENCE_RULES,
    *ONLINE_RULES,
    *GRPO_RULES,
    *PPO_RULES,
    *REWARD_RULES,
    *TUNING_RULES,
    *EVALUATION_RULES,
    *GUARD_RULES,
    *MODEL_RULES,
    *OTHER_RULES,
    *DEEPSPEED_RULES,
)
