"""What stage RL learns from: rewards, each one of several kinds, and how their failures are taken.

A reward is said here and computed in the trainer's pods; the operator never calls one. Its numbers are weighted and
added up. What a kind needs of other fields is in rules/reward_rules.py.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from posttrain_api.spec.fields import ObjectName, SpecModel, optional, required
from posttrain_api.spec.objectives import MAX_COEFFICIENT, ColumnName
from posttrain_api.spec.references import MAX_URI, ModelJobRef, ObjectRef

MAX_REWARDS = 16
MAX_PATTERN = 1024
MAX_TOKENS = 1_048_576
REWARD_FILE = "reward.py"
"""The key of a Python reward's ConfigMap where none is said."""


class ColumnReward(SpecModel):
    """A reward that compares with a column of the data."""

    column: ColumnName = required("The data's column with the right answer, by the data's own name", example="answer")


class PatternReward(SpecModel):
    """A reward for completions of a form: 1 or 0."""

    pattern: str = required(
        "Regular expression in Python's syntax; a dot is any character, a line break too",
        example=r"<think>.*</think>\s*\\boxed\{.+\}",
        min_length=1,
        max_length=MAX_PATTERN,
    )


class LengthReward(SpecModel):
    """1 for a completion of minTokens to maxTokens tokens, otherwise 0. At least one of the two."""

    min_tokens: int | None = optional(
        "Fewest tokens", unit="tokens", default="no lower bound", example=16, ge=0, le=MAX_TOKENS
    )
    max_tokens: int | None = optional(
        "Most tokens", unit="tokens", default="no upper bound", example=400, ge=0, le=MAX_TOKENS
    )


class RewardModelRef(SpecModel):
    """A model that scores completions: exactly one of uri and fromJob."""

    uri: str | None = optional(
        "Where the model is: hf://org/name[@revision], s3://bucket/folder, gs://bucket/folder, pvc://claim/path or "
        "image:///absolute/path (baked into the image). A sequence classifier of transformers with one label and the "
        "policy's vocabulary",
        example="hf://Skywork/Skywork-Reward-V2-Qwen3-0.6B",
        min_length=1,
        max_length=MAX_URI,
    )
    from_job: ModelJobRef | None = optional(
        "The output of a job of stage RewardModel in this namespace; its claim is mounted read-only",
        example={"name": "judge"},
    )
    secret_ref: ObjectRef | None = optional(
        "Secret of the job's namespace that fetches the model, as model.secretRef; mounted in the first pod only",
        default="s3:// and gs://: the pod's own identity, else none",
        example={"name": "hf-token"},
    )


class HTTPReward(SpecModel):
    """A server that scores. Every pod calls it, with the pod's own network; the operator never does."""

    url: str = required(
        "Where completions are sent: http:// or https://, a host, no user or password in it",
        example="https://judge.example.com/score",
        min_length=1,
        max_length=MAX_URI,
    )
    secret_ref: ObjectRef | None = optional(
        "Secret of the job's namespace whose key `token` is sent as bearer token; mounted in every pod",
        default="none",
        example={"name": "judge-token"},
    )


class ScriptRef(SpecModel):
    """A key of a ConfigMap that holds a Python file."""

    name: ObjectName = required(
        "Name of a ConfigMap of the job's namespace; mounted read-only in every pod", example="my-reward"
    )
    key: str | None = optional(
        "The key that holds the Python file",
        default=REWARD_FILE,
        example="score.py",
        min_length=1,
        max_length=253,
        pattern=r"^[A-Za-z0-9_-][A-Za-z0-9._-]*$",
    )


class PythonReward(SpecModel):
    """A function of your own, run in worker processes of the trainer's pods."""

    config_map_ref: ScriptRef = required("The file that the function is in", example={"name": "my-reward"})
    function: str = required(
        "Name of the function f(prompts, completions, **columns): a list with a number, or None for no score, for each "
        "completion",
        example="score",
        min_length=1,
        max_length=128,
        pattern=r"^[A-Za-z_][A-Za-z0-9_]*$",
    )


class Reward(SpecModel):
    """One reward: exactly one of math, exactMatch, format, regex, length, model, http and python."""

    name: str | None = optional(
        "Its name in metrics (rewards/<name>/mean) and messages",
        default="its kind, with a number where that is taken",
        example="correct",
        min_length=1,
        max_length=32,
        pattern=r"^[A-Za-z][A-Za-z0-9_-]*$",
    )
    weight: float | None = optional(
        "Its factor in the sum of all rewards",
        default="1",
        example=0.5,
        ge=-MAX_COEFFICIENT,
        le=MAX_COEFFICIENT,
    )
    timeout_seconds: float | None = optional(
        "What one call may take, for one rank's completions of one rollout; not for model and length",
        unit="seconds",
        default="30",
        example=120,
        gt=0,
        le=3600,
    )
    on_error: Literal["Fail", "Zero", "Skip"] | None = optional(
        "What an exception, a deadline or a wrong answer means. Fail: the job ends with RewardError. Zero: the "
        "completion gets 0. Skip: it is left out of its group and has no gradient",
        default="Fail",
        example="Skip",
    )
    math: ColumnReward | None = optional(
        "1 where the completion's mathematical answer equals the column's, which may end in `#### 72`",
        example={"column": "answer"},
    )
    exact_match: ColumnReward | None = optional(
        "1 where the completion's answer is the column's, letter by letter, runs of blanks counted as one. The answer "
        "is what follows the last `####`; without one the column's whole text, of the completion the whole or its last "
        "line",
        example={"column": "label"},
    )
    format: PatternReward | None = optional(
        "1 where the whole completion matches", example={"pattern": "<think>.*</think>.*"}
    )
    regex: PatternReward | None = optional("1 where the pattern is found in it", example={"pattern": "Answer: [0-9]+"})
    length: LengthReward | None = optional("1 where the completion is so long", example={"maxTokens": 400})
    model: RewardModelRef | None = optional("A reward model's score", example={"fromJob": {"name": "judge"}})
    http: HTTPReward | None = optional(
        "What a server answers: it is sent {prompts, completions, columns} as JSON by POST and answers {rewards: "
        "[...]}, a number or null for each completion",
        example={"url": "https://judge.example.com/score"},
    )
    python: PythonReward | None = optional(
        "What a function of your own returns",
        example={"configMapRef": {"name": "my-reward"}, "function": "score"},
    )


KINDS = ("math", "exactMatch", "format", "regex", "length", "model", "http", "python")
"""Wire names of the kinds, in the order in which they are said."""

Rewards = Annotated[tuple[Reward, ...], Field(min_length=1, max_length=MAX_REWARDS)]
