"""What a row is to a stage: a text, a prompt with or without its answer, a chat, or two answers of which one was
preferred.

The kind of a source is settled before (schema.py); every row must have its shape. A row that has not is refused with
a reason and a detail, and the caller's policy decides what that means.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from posttrain_trainer.data.messages import Message, RowRefused, messages, number, sharegpt, string
from posttrain_trainer.data.schema import COLUMNS, MARGIN, Kind, LossOn

ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:"
)
ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
    "response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:"
)
"""Stanford Alpaca's own two prompts (train.py of tatsu-lab/stanford_alpaca), letter by letter."""


@dataclass(frozen=True)
class Text:
    """A document."""

    text: str


@dataclass(frozen=True)
class Pair:
    """A prompt and what should follow it, as plain strings."""

    prompt: str
    completion: str


@dataclass(frozen=True)
class Chat:
    """Turns before the answer, and the answer; both go through the chat template. `answer` is None where there is no
    one answer: all turns count, or every assistant turn does.
    """

    prompt: tuple[Message, ...]
    answer: Message | None


@dataclass(frozen=True)
class Comparison:
    """Two answers to one prompt; `margin`: by how much the chosen one is better, None where the data do not say."""

    chosen: Pair | Chat
    rejected: Pair | Chat
    margin: float | None = None


@dataclass(frozen=True)
class Prompt:
    """What a policy is to answer: a string as it is, or turns that go through the chat template; `record`: JSON of the
    row's other columns."""

    content: str | tuple[Message, ...]
    record: str = "{}"


Parsed = Text | Pair | Chat | Comparison | Prompt


def parse_row(values: Mapping[str, Any], kind: Kind, mapping: Mapping[str, str], loss_on: LossOn) -> Parsed:
    """The row in the shape of its kind. RowRefused where it is not of that shape or has nothing to learn."""
    row = {ours: _column(values, ours, mapping) for ours in COLUMNS[kind]}
    match kind:
        case Kind.TEXT:
            return Text(string(row["text"], "text", empty="EmptyText"))
        case Kind.MESSAGES:
            return _chat(messages(row["messages"], "messages"), loss_on)
        case Kind.SHAREGPT:
            return _chat(sharegpt(row["conversations"], "conversations"), loss_on)
        case Kind.PAIR:
            return _pair(row["prompt"], row["completion"], loss_on)
        case Kind.ALPACA:
            return _alpaca(row, values.get(mapping.get("input", "input")))
        case Kind.COMPARISON | Kind.CONVERSATIONS:
            return _comparison(row, _margin(values, mapping))
        case Kind.PROMPT:
            return _prompt(row["prompt"])


def _column(values: Mapping[str, Any], ours: str, mapping: Mapping[str, str]) -> Any:
    name = mapping.get(ours, ours)
    if values.get(name) is None:
        shown = ours if name == ours else f"{ours} (the data's {name!r})"
        found = ", ".join(sorted(values)) or "none"
        raise RowRefused("MissingColumn", f"no {shown}; the row has: {found}")
    return values[name]


def _pair(prompt: Any, completion: Any, loss_on: LossOn) -> Pair | Chat:
    if isinstance(prompt, list) != isinstance(completion, list):
        raise RowRefused("WrongType", "prompt and completion must both be strings or both lists of messages")
    if not isinstance(prompt, list):
        return Pair(string(prompt, "prompt"), string(completion, "completion", empty="EmptyCompletion"))
    answer = messages(completion, "completion")
    if len(answer) != 1:
        raise RowRefused("WrongType", f"completion must be one assistant message, it has {len(answer)}")
    return _chat(messages(prompt, "prompt") + answer, loss_on)


def _prompt(value: Any) -> Prompt:
    """Answers at the end are left out, as data sets for SFT have them: the policy is to find its own."""
    if not isinstance(value, list):
        return Prompt(string(value, "prompt", empty="EmptyPrompt"))
    turns = messages(value, "prompt")
    while turns and turns[-1]["role"] == "assistant":
        turns = turns[:-1]
    if not turns:
        raise RowRefused("EmptyPrompt", "prompt has assistant messages only: there is nothing to answer")
    string(turns[-1]["content"], f"prompt[{len(turns) - 1}].content", empty="EmptyPrompt")
    return Prompt(turns)


def _alpaca(row: Mapping[str, Any], context: Any) -> Pair:
    instruction = string(row["instruction"], "instruction", empty="EmptyPrompt")
    given = "" if context is None else string(context, "input")
    prompt = ALPACA_WITH_INPUT.format(instruction=instruction, input=given) if given else None
    completion = string(row["output"], "output", empty="EmptyCompletion")
    return Pair(prompt or ALPACA.format(instruction=instruction), completion)


def _chat(turns: tuple[Message, ...], loss_on: LossOn) -> Chat:
    if loss_on == "All":
        return Chat(turns, None)
    last = turns[-1]
    if last["role"] != "assistant":
        raise RowRefused("NoAssistantTurn", f"the last message must be the assistant's, its role is {last['role']!r}")
    if not last["content"].strip():
        raise RowRefused("EmptyCompletion", "the last assistant message is empty: there is nothing to learn")
    return Chat(turns, None) if loss_on == "Assistant" else Chat(turns[:-1], last)


def _margin(values: Mapping[str, Any], mapping: Mapping[str, str]) -> float | None:
    if MARGIN not in mapping:
        return None
    return number(_column(values, MARGIN, mapping), f"{MARGIN} (the data's {mapping[MARGIN]!r})")


def _comparison(row: Mapping[str, Any], margin: float | None) -> Comparison:
    """Strings after a prompt, one answer each after a list of messages, or two whole conversations."""
    prompt, chosen, rejected = row.get("prompt"), row["chosen"], row["rejected"]
    if isinstance(chosen, list) != isinstance(rejected, list):
        raise RowRefused("WrongType", "chosen and rejected must both be strings or both lists of messages")
    if isinstance(chosen, list):
        good, bad = messages(chosen, "chosen"), messages(rejected, "rejected")
        before = _before(prompt, good)
        return _conversations(before + good, before + bad, margin)
    if prompt is None:
        raise RowRefused("NoCommonPrompt", "chosen and rejected are strings and there is no prompt: give the prompt")
    text = string(prompt, "prompt", empty="NoCommonPrompt")
    chosen, rejected = (string(row[name], name, empty="EmptyCompletion") for name in ("chosen", "rejected"))
    return Comparison(Pair(text, chosen), Pair(text, rejected), margin)


def _before(prompt: Any, turns: tuple[Message, ...]) -> tuple[Message, ...]:
    """What comes before message lists. A string is the user's; before whole conversations it is a copy of their
    beginning, as in UltraFeedback."""
    if isinstance(prompt, list):
        return messages(prompt, "prompt")
    roles = [turn["role"] for turn in turns]
    if prompt is None or (roles[0] != "assistant" and "user" in roles):
        return ()
    if roles[0] != "assistant":
        raise RowRefused(
            "NoCommonPrompt",
            f"prompt is a string, and chosen begins with the role {roles[0]!r} and has no user message: give the "
            "prompt as a list of messages",
        )
    return ({"role": "user", "content": string(prompt, "prompt", empty="NoCommonPrompt")},)


def _conversations(chosen: tuple[Message, ...], rejected: tuple[Message, ...], margin: float | None) -> Comparison:
    """The prompt is the longest common prefix that leaves both an answer."""
    longest = min(len(chosen), len(rejected)) - 1
    common = next((i for i in range(longest) if chosen[i] != rejected[i]), longest)
    if common == 0 or "assistant" not in (chosen[common]["role"], rejected[common]["role"]):
        raise RowRefused(
            "NoCommonPrompt",
            f"chosen and rejected part at message {common + 1}, which is no answer: both need one prompt, and then an "
            "assistant message each",
        )
    return Comparison(_answer(chosen, common, "chosen"), _answer(rejected, common, "rejected"), margin)


def _answer(turns: tuple[Message, ...], common: int, name: str) -> Chat:
    if len(turns) != common + 1:
        raise RowRefused(
            "NotOneAnswer",
            f"{name} has {len(turns) - common} messages after the common prompt: one assistant message is compared",
        )
    return _chat(turns, "Completion")
