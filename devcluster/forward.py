"""Forwards TCP connections: from a listening socket to an address that is chosen anew for each connection.

Two callers: the supervisor (sockets on 127.0.0.1 made *before* it entered its namespace, so that kubectl reaches the
API server from outside) and the services module (ClusterIPs on `lo`). All in one event loop, no threads.
"""

import asyncio
import contextlib
import socket
from collections.abc import Callable

Target = Callable[[], tuple[str, int] | None]


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    # A reset on either side (also "not connected" from the half-close) ends this direction; the close tells the other.
    with contextlib.suppress(OSError):
        while data := await reader.read(1 << 16):
            writer.write(data)
            await writer.drain()
        if writer.can_write_eof():
            writer.write_eof()
            return
    writer.close()


async def _join(left: tuple[asyncio.StreamReader, asyncio.StreamWriter], target: tuple[str, int]) -> None:
    reader, writer = left
    try:
        far_reader, far_writer = await asyncio.open_connection(*target)
    except OSError:  # nobody listens there: what a client sees is a closed connection, as with a real service
        writer.close()
        return
    try:
        await asyncio.gather(_pump(reader, far_writer), _pump(far_reader, writer))
    finally:
        writer.close()
        far_writer.close()


async def serve(listener: socket.socket, target: Target) -> asyncio.Server:
    """Accept on `listener`; each connection goes to what `target()` names at that moment, or is closed for None."""

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        where = target()
        if where is None:
            writer.close()
            return
        await _join((reader, writer), where)

    return await asyncio.start_server(accept, sock=listener)


def listen(address: str, port: int) -> socket.socket:
    """A listening socket in the calling thread's network namespace."""
    listener = socket.create_server((address, port), backlog=512)
    listener.setblocking(False)
    return listener
