"""Why an attempt ended, from what its ranks left behind. Pure.

torchrun always ends with 1, so the verdict comes from the ranks' end records, from the signals that ended ranks
without a record, and from
whether we were told to stop. The first failure in time is the cause; a lost peer, and a stop that a broken group
brought
about, are consequences of something else.
"""

from __future__ import annotations

import signal as signals
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from posttrain_api.reasons import REASONS, Effect, Reason, exit_code_of
from posttrain_api.records import MAX_LOG_TAIL_BYTES, Success
from posttrain_trainer.record import End, utc_now
from posttrain_trainer.silence import Silence
from posttrain_trainer.stacks import Hang

_MAX_MESSAGE = 1000
_CONSEQUENCES = frozenset({Reason.PEER_LOST, Reason.PREEMPTED})


@dataclass(frozen=True)
class Seen:
    """What is known when torchrun has ended.

    `ends`: records by rank. `exits`: exit codes (negative: signals) of the ranks that torchrun saw fail, at
    `exits_time`.
    `code`: torchrun's own. `stopped`: we had SIGTERM. `memory_kills`: processes of the container killed for memory.
    `silence`: the node that the last save was given up for. `hang`: what the ranks were ended for.
    """

    ranks: Sequence[int]
    code: int
    ends: Mapping[int, End] = field(default_factory=dict)
    exits: Mapping[int, int] = field(default_factory=dict)
    exits_time: str | None = None
    stopped: bool = False
    memory_kills: int = 0
    silence: Silence | None = None
    hang: Hang | None = None


@dataclass(frozen=True)
class Verdict:
    """`reason` None is success; `success` is there on the node with rank 0. `tail`: says more than the log's end."""

    reason: Reason | None
    message: str = ""
    rank: int | None = None
    step: int | None = None
    signal: int | None = None
    time: str | None = None
    success: Success | None = None
    tail: str | None = None

    @property
    def exit_code(self) -> int:
        """What the launcher ends with."""
        return 0 if self.reason is None else exit_code_of(self.reason)


def judge(seen: Seen) -> Verdict:
    """The verdict over one node's ranks.

    Order: all ranks done → success, whatever came after; a permanent failure → that; suspended by a guard → that; told
    to stop → Preempted; given up because nothing got on → Hang; else the first cause in time; else the first
    consequence.
    """
    if all(rank in seen.ends and seen.ends[rank].reason is None for rank in seen.ranks):
        return _success(seen)
    failures = sorted([*_recorded(seen), *_unrecorded(seen)], key=lambda failure: failure.time or "~")
    for effect in (Effect.FAILED, Effect.SUSPENDED):
        own_end = next((failure for failure in failures if _has(failure.reason, effect)), None)
        if own_end is not None:
            return own_end
    if seen.stopped:
        return _preempted(failures, seen.silence)
    if seen.hang is not None:
        return _hang(seen.hang)
    cause = next((failure for failure in failures if failure.reason not in _CONSEQUENCES), None)
    if cause is not None:
        return cause
    return failures[0] if failures else _torchrun(seen)


def _success(seen: Seen) -> Verdict:
    if 0 not in seen.ranks:
        return Verdict(None, step=seen.ends[seen.ranks[0]].step)
    end = seen.ends[0]
    if end.success is None:
        return Verdict(
            Reason.TRAINER_ERROR, "Rank 0 ended without a success record.", rank=0, step=end.step, time=end.time
        )
    return Verdict(None, rank=0, step=end.step, time=end.time, success=end.success)


def _recorded(seen: Seen) -> list[Verdict]:
    return [
        Verdict(end.reason, end.message, rank, end.step, time=end.time)
        for rank, end in seen.ends.items()
        if end.reason is not None
    ]


def _unrecorded(seen: Seen) -> list[Verdict]:
    """Ranks that ended badly without a word: by a signal, or by something that no code of ours expects."""
    return [_silent(seen, rank, code) for rank, code in seen.exits.items() if rank not in seen.ends and code != 0]


def _silent(seen: Seen, rank: int, code: int) -> Verdict:
    if code > 0:
        message = f"Rank {rank} ended with exit code {code} and left no record; see the end of the log."
        return Verdict(Reason.TRAINER_ERROR, message, rank, time=seen.exits_time)
    number = -code
    if number == signals.SIGKILL and seen.memory_kills:
        message = (
            f"The kernel killed rank {rank} for memory. Raise resources.memory or lower training.tokensPerMicroBatch."
        )
        return Verdict(Reason.OUT_OF_MEMORY, message, rank, signal=number, time=seen.exits_time)
    message = f"Rank {rank} was ended by signal {number} ({_signal_name(number)})."
    return Verdict(Reason.PROCESS_KILLED, message, rank, signal=number, time=seen.exits_time)


def _preempted(failures: Sequence[Verdict], silence: Silence | None) -> Verdict:
    """After SIGTERM a rank that was killed or lost its peers is no failure of its own."""
    saved = next((failure for failure in failures if failure.reason is Reason.PREEMPTED), None)
    if saved is not None:
        return saved
    first = failures[0] if failures else None
    if silence is not None:
        message = (
            f"Stopped by SIGTERM, without a last save: node {silence.node} had not been heard for "
            f"{silence.seconds:.0f} s. The newest committed checkpoint is whole."
        )
        return Verdict(Reason.PREEMPTED, message, step=first.step if first else None)
    detail = f" before the last save was done: {first.message}" if first else " before training began"
    return Verdict(Reason.PREEMPTED, f"Stopped by SIGTERM{detail}.", step=first.step if first else None)


def _hang(hang: Hang) -> Verdict:
    """The ranks that cannot answer first: they are what the others wait for."""
    first, *_ = ordered = sorted(hang.stacks, key=lambda stack: stack.answered)
    kept = f"stacks: {hang.kept}" if hang.kept else "stacks: in the pod's log, storage did not take them"
    where = "; ".join(f"rank {stack.rank}: {stack.where}" for stack in ordered)
    head = f"Nothing got on for {hang.seconds:.0f} s (limit {hang.limit:.0f} s); {kept}. "
    # The innermost calls come first, so it is the end that is cut.
    tail = "\n\n".join(stack.text for stack in ordered).encode()[:MAX_LOG_TAIL_BYTES].decode(errors="ignore")
    return Verdict(Reason.HANG, (head + where)[:_MAX_MESSAGE], first.rank, hang.step, time=utc_now(), tail=tail)


def _torchrun(seen: Seen) -> Verdict:
    if seen.code < 0:
        name = _signal_name(-seen.code)
        return Verdict(Reason.PROCESS_KILLED, f"torchrun was ended by signal {-seen.code} ({name}).", signal=-seen.code)
    missing = ", ".join(str(rank) for rank in seen.ranks if rank not in seen.ends)
    message = f"torchrun ended with {seen.code}, and ranks {missing} left no record; see the end of the log."
    return Verdict(Reason.TRAINER_ERROR, message)


def _has(reason: Reason | None, effect: Effect) -> bool:
    return reason is not None and REASONS[reason].effect is effect


def _signal_name(number: int) -> str:
    return signals.Signals(number).name if number in {*signals.Signals} else "unknown"
