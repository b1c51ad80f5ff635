"""A reward that is a user's function: f(prompts, completions, **columns) -> list[float | None], sync or async.

Loaded and called in the reward's own process only (child.py). Functions written for TRL work where they take text:
`completion_ids` is given as there, a function without `**kwargs` gets those of the arguments that it names. Prompts and
completions are always strings, also where the data holds messages. A call has one rank's completions, and a group may
lie on several ranks: a function that compares completions sees a part of them.
"""

from __future__ import annotations

import asyncio
import importlib.util
import inspect
import sys
import traceback
from collections.abc import Awaitable, Callable, Mapping
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import ModuleType
from typing import Any

from posttrain_trainer.rewards.calls import Batch, Reply
from posttrain_trainer.rewards.rules import Score, Unloadable
from posttrain_trainer.rewards.values import checked

OURS = ("prompts", "completions", "completion_ids")
"""What every function is given beside the columns."""
_MODULE = "posttrain_reward"


def load(path: Path, function: str) -> Score:
    """Runs the file and takes its function. Unloadable where either cannot be."""
    module = _run(path)
    found = getattr(module, function, None)
    if not callable(found):
        own = inspect.getmembers(module, lambda value: inspect.isfunction(value) and value.__module__ == _MODULE)
        names = [name for name, _ in own]
        raise Unloadable(
            f"{path.name} has no function {function!r}; it has {', '.join(names) or 'none'}. Correct python.function"
        )
    takes = _parameters(found)

    def score(batch: Batch, seconds: float) -> Reply:
        clash = sorted(set(OURS) & set(batch.columns))
        if clash:
            return Reply(failure=f"the data has a column {clash[0]!r}, which is an argument of ours. Rename the column")
        given = _arguments(batch)
        try:
            answer = _called(found, {name: given[name] for name in given if takes is None or name in takes})
        except BaseException as error:  # noqa: BLE001 - sys.exit too: an error of the reward, not the process's end
            return Reply(failure=f"{_raised(error, path)}{_hint(error, given)}")
        return checked(answer, batch, f"{function} returned")

    return score


def _arguments(batch: Batch) -> dict[str, Any]:
    ids = [list(each) for each in batch.completion_ids]
    ours = zip(OURS, (list(batch.prompts), list(batch.completions), ids), strict=True)
    return {**dict(ours), **{name: list(values) for name, values in batch.columns.items()}}


def _called(function: Callable[..., Any], arguments: Mapping[str, Any]) -> Any:
    answer = function(**arguments)
    return asyncio.run(_awaited(answer)) if inspect.isawaitable(answer) else answer


async def _awaited(answer: Awaitable[Any]) -> Any:
    return await answer


def _raised(error: BaseException, path: Path) -> str:
    """What happened, for the message; the whole traceback goes to the log."""
    traceback.print_exception(error)
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
    place = f" at line {lines[-1]} of {path.name}" if lines else ""
    return f"{path.name} raised {type(error).__name__}: {str(error)[:300]}{place}"


def _hint(error: BaseException, arguments: Mapping[str, Any]) -> str:
    text = str(error)
    if isinstance(error, TypeError) and "required" in text and "argument" in text:
        return f". It is given {', '.join(arguments)}"
    if isinstance(error, TypeError) and "indices must be" in text:
        return ". Prompts and completions are strings here, not lists of messages"
    return ""


def _parameters(function: Callable[..., Any]) -> frozenset[str] | None:
    """Names that it takes; None: any."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # written in C
        return None
    if any(each.kind is each.VAR_KEYWORD for each in parameters):
        return None
    return frozenset(each.name for each in parameters)


def _run(path: Path) -> ModuleType:
    if not path.is_file():
        raise Unloadable(f"{path}: no such file. Correct python.configMapRef")
    loader = SourceFileLoader(_MODULE, str(path))  # said: a ConfigMap's key need not end with .py
    spec = importlib.util.spec_from_file_location(_MODULE, path, loader=loader)
    assert spec is not None  # with a loader it never is
    module = importlib.util.module_from_spec(spec)
    sys.modules[_MODULE] = module  # dataclasses and pickle look there
    sys.path.append(str(path.parent))  # other files of the same ConfigMap
    try:
        loader.exec_module(module)
    except SyntaxError as error:
        line = f" at line {error.lineno}: {(error.text or '').strip()[:80]!r}" if error.lineno else ""
        raise Unloadable(f"{path.name} is no Python: {error.msg}{line}. Correct it") from error
    except BaseException as error:
        raise Unloadable(f"{_raised(error, path)} while it was loaded. Correct it") from error
    return module
