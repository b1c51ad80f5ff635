"""What a rank and the process that scores for it say to each other, and how it is written on their socket.

Both ends import it, so it imports next to nothing: a reward's process must start in a fraction of a second, without
torch. The rank's end never blocks: a process that neither reads nor writes must not hold a rank.
"""

from __future__ import annotations

import pickle
import socket
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

_SIZE = struct.Struct("<Q")
_CHUNK = 1 << 18


@dataclass(frozen=True)
class Task:
    """What a process is started for. kind: the field of the API, such as `math`; arguments: plain values of it."""

    kind: str
    arguments: Mapping[str, Any]


@dataclass(frozen=True)
class Batch:
    """n completions as rewards see them: text without special tokens, tokens as sampled, every other column of the
    data as a list (None where a row has no such column), rows: numbers in the prompt set."""

    prompts: Sequence[str]
    completions: Sequence[str]
    completion_ids: Sequence[Sequence[int]]
    columns: Mapping[str, Sequence[Any]]
    rows: Sequence[int]

    def __len__(self) -> int:
        return len(self.completions)


@dataclass(frozen=True)
class Call:
    """One batch and the seconds that scoring it may take."""

    batch: Batch
    seconds: float


@dataclass(frozen=True)
class Ready:
    """The process has loaded what it scores with."""


@dataclass(frozen=True)
class Unusable:
    """It cannot: no batch will ever be scored. why: what was found and what to do."""

    why: str


@dataclass(frozen=True)
class Reply:
    """values [n], None: the reward does not apply. errors: by place in the batch, what is wrong with the value there;
    failure: what is wrong with the whole call; notes: what the log should say once."""

    values: Sequence[float | None] = ()
    errors: Mapping[int, str] = field(default_factory=dict)
    failure: str | None = None
    notes: Sequence[str] = ()


def framed(message: object) -> bytes:
    """The message as it goes over the socket."""
    data = pickle.dumps(message)
    return _SIZE.pack(len(data)) + data


def send(channel: socket.socket, message: object) -> None:
    """Blocks until all is written: the scoring process's way."""
    channel.sendall(framed(message))


def receive(channel: socket.socket) -> Any:
    """Blocks until a message is there; None: the other end is gone."""
    head = _exactly(channel, _SIZE.size)
    data = None if head is None else _exactly(channel, *_SIZE.unpack(head))
    return None if data is None else pickle.loads(data)


def _exactly(channel: socket.socket, size: int) -> bytes | None:
    parts = bytearray()
    while len(parts) < size:
        part = channel.recv(min(size - len(parts), _CHUNK))
        if not part:
            return None
        parts += part
    return bytes(parts)


class Line:
    """The rank's end of the socket, which never blocks."""

    def __init__(self, channel: socket.socket) -> None:
        channel.setblocking(False)
        self._channel = channel
        self._out = bytearray()
        self._in = bytearray()

    def fileno(self) -> int:
        """For select."""
        return self._channel.fileno()

    @property
    def writing(self) -> bool:
        """Something still has to go out."""
        return bool(self._out)

    def put(self, message: object) -> None:
        """Goes out with the next looks."""
        self._out += framed(message)

    def look(self) -> list[Any]:
        """Writes and reads what can be at once; the messages that are complete. ConnectionError where the other end is
        gone; what it had said before came with an earlier look or comes with this one."""
        self._write()
        closed = not self._read()
        messages = list(self._complete())
        if closed and not messages:
            raise ConnectionResetError("the other end of the socket is closed")
        return messages

    def close(self) -> None:
        """The other end reads an end of file."""
        self._channel.close()

    def _write(self) -> None:
        while self._out:
            try:
                del self._out[: self._channel.send(self._out[:_CHUNK])]
            except BlockingIOError:
                return
            except ConnectionError:  # the read tells, after what the other end said last
                self._out.clear()

    def _read(self) -> bool:
        while True:
            try:
                part = self._channel.recv(_CHUNK)
            except BlockingIOError:
                return True
            except ConnectionError:  # killed with something unread; what it sent before is here already
                return False
            if not part:
                return False
            self._in += part

    def _complete(self) -> Any:
        while len(self._in) >= _SIZE.size:
            (size,) = _SIZE.unpack_from(self._in)
            end = _SIZE.size + size
            if len(self._in) < end:
                return
            yield pickle.loads(self._in[_SIZE.size : end])
            del self._in[:end]
