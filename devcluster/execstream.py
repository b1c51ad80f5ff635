"""One `kubectl exec`: a command inside a container, its streams over a WebSocket.

Protocol `v5.channel.k8s.io` (and v4): each binary message begins with a channel number. 0 is stdin, 1 stdout, 2 stderr,
3 the final status, 4 a terminal's size, and in v5 255 closes the channel that its second byte names.
"""

import asyncio
import contextlib
import fcntl
import json
import os
import signal
import struct
import termios

from aiohttp import WSMsgType, web

from devcluster.containers import Container

PROTOCOLS = ("v5.channel.k8s.io", "v4.channel.k8s.io")
STDIN, STDOUT, STDERR, STATUS, RESIZE, CLOSE = 0, 1, 2, 3, 4, 255


def status_message(code: int) -> bytes:
    """The end of an exec as the remote-command protocol says it (channel 3). Pure."""
    if code == 0:
        return json.dumps({"metadata": {}, "status": "Success"}).encode()
    cause = {"reason": "ExitCode", "message": str(code)}
    body = {"metadata": {}, "status": "Failure", "reason": "NonZeroExitCode", "code": 500}
    message = f"command terminated with non-zero exit code: exit status {code}"
    return json.dumps({**body, "message": message, "details": {"causes": [cause]}}).encode()


async def _reader(descriptor: int) -> asyncio.StreamReader:
    stream = asyncio.StreamReader()
    loop = asyncio.get_running_loop()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(stream), os.fdopen(descriptor, "rb", 0))
    return stream


async def _send(socket: web.WebSocketResponse, channel: int, stream: asyncio.StreamReader) -> None:
    # EIO is how a terminal's master end says that the other end is closed; a lost client ends the copy as well.
    with contextlib.suppress(OSError):
        while data := await stream.read(1 << 15):
            await socket.send_bytes(bytes([channel]) + data)


def _resize(descriptor: int, payload: bytes) -> None:
    size = json.loads(payload)
    fcntl.ioctl(descriptor, termios.TIOCSWINSZ, struct.pack("HHHH", size["Height"], size["Width"], 0, 0))


class _Session:
    """The process and the descriptors that we hold of it: `stdin` is -1 when closed."""

    def __init__(self, process: asyncio.subprocess.Process, stdin: int, terminal: bool) -> None:
        self.process, self.stdin, self.terminal = process, stdin, terminal

    def close_stdin(self) -> None:
        if self.stdin >= 0:
            os.close(self.stdin)
            self.stdin = -1

    async def receive(self, socket: web.WebSocketResponse) -> None:
        """Feed stdin until the client goes."""
        async for message in socket:
            if message.type != WSMsgType.BINARY or not message.data:
                continue
            channel, payload = message.data[0], message.data[1:]
            if channel == STDIN and self.stdin >= 0:
                with contextlib.suppress(BrokenPipeError):  # the command has ended or does not read
                    await asyncio.to_thread(os.write, self.stdin, payload)
            elif channel == RESIZE and self.terminal:
                _resize(self.stdin, payload)
            elif channel == CLOSE and payload[:1] == bytes([STDIN]) and not self.terminal:
                self.close_stdin()
        self.kill()

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):  # it has ended
            os.killpg(self.process.pid, signal.SIGKILL)


async def _start(
    argv: list[str], stdin: bool, terminal: bool
) -> tuple[_Session, list[tuple[int, asyncio.StreamReader]]]:
    if terminal:
        master, slave = os.openpty()
        process = await asyncio.create_subprocess_exec(
            *argv, stdin=slave, stdout=slave, stderr=slave, start_new_session=True, preexec_fn=_controlling_terminal
        )
        os.close(slave)
        return _Session(process, master, True), [(STDOUT, await _reader(os.dup(master)))]
    reader, writer = os.pipe()
    process = await asyncio.create_subprocess_exec(
        *argv, stdin=reader, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE, start_new_session=True
    )
    os.close(reader)
    session = _Session(process, writer, False)
    if not stdin:
        session.close_stdin()
    assert process.stdout is not None
    assert process.stderr is not None
    return session, [(STDOUT, process.stdout), (STDERR, process.stderr)]


def _controlling_terminal() -> None:
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


async def run_exec(request: web.Request, container: Container) -> web.StreamResponse:
    """Serve one exec request to its end."""
    socket = web.WebSocketResponse(protocols=PROTOCOLS)
    if not socket.can_prepare(request):
        return web.Response(status=400, text="exec needs a WebSocket (protocol v5 or v4), SPDY is not served\n")
    await socket.prepare(request)
    query = request.query
    terminal = query.get("tty") in ("1", "true")
    argv = container.exec_command(query.getall("command"))
    session, streams = await _start(argv, query.get("input") in ("1", "true"), terminal)
    receiving = asyncio.create_task(session.receive(socket))
    try:
        await asyncio.gather(*(_send(socket, channel, stream) for channel, stream in streams))
        code = await session.process.wait()
        with contextlib.suppress(OSError):  # the client may have gone before the end
            await socket.send_bytes(bytes([STATUS]) + status_message(128 - code if code < 0 else code))
    finally:
        receiving.cancel()
        session.kill()
        session.close_stdin()
        await socket.close()
    return socket
