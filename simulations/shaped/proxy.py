"""A TCP proxy that is as slow as a given link: so many bits a second, and a delay, each way on its own.

Bytes pass in order and as they are. A piece of n bytes takes the link for 8 n / bandwidth seconds once those before it
have left, and arrives a delay later. All connections share the link, piece by piece. What is on its way is bounded: a
sender is read from only when the link is about to be free.
"""

import asyncio
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress

_PIECE = 4096  # bytes that pass before another connection has its turn
_AHEAD = 0.05  # seconds by which a piece is read before the link is free, so that the link never waits for this program
_WAITING = 1024  # pieces of a connection that are on their way, or that its receiver does not take
Way = asyncio.Queue[tuple[float, bytes]]


class Link:
    """One direction.

    Parameters
    ----------
    bandwidth : float
        Mbit/s (10^6 bit) of what TCP carries; its own headers are not counted.
    delay : float
        Seconds from one end to the other.
    """

    def __init__(self, bandwidth: float, delay: float) -> None:
        self.delay = delay
        self.bytes = 0
        self._seconds = 8e-6 / bandwidth
        self._free = 0.0

    def send(self, size: int, now: float) -> float:
        """Send some bytes as soon as the link is free; return when the last of them arrives."""
        self.bytes += size
        self._free = max(self._free, now) + size * self._seconds
        return self._free + self.delay

    def busy(self, now: float) -> float:
        """Return the seconds until the link is free."""
        return max(0.0, self._free - now)


@contextmanager
def shaped(host: str, port: int, up: Link, down: Link) -> Iterator[int]:
    """Start a proxy in a thread of its own, ``up`` towards a port and ``down`` back; give its own port on 127.0.0.1."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="shaping", daemon=True)
    thread.start()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(asyncio.CancelledError), closing(writer):
            await asyncio.sleep(up.delay + down.delay)  # TCP's own handshake
            with suppress(OSError):  # nobody is there
                there = await asyncio.open_connection(host, port, limit=2 * _PIECE)
                with closing(there[1]):
                    await _connect((reader, writer), there, up, down)

    async def start() -> asyncio.Server:
        return await asyncio.start_server(serve, "127.0.0.1", 0, limit=2 * _PIECE)

    async def stop() -> None:
        server.close()
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    server = asyncio.run_coroutine_threadsafe(start(), loop).result()
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        asyncio.run_coroutine_threadsafe(stop(), loop).result()
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


Ends = tuple[asyncio.StreamReader, asyncio.StreamWriter]


async def _connect(near: Ends, far: Ends, up: Link, down: Link) -> None:
    """Carry both directions to their ends, or until either side breaks off."""
    try:
        async with asyncio.TaskGroup() as group:
            for reader, writer, link in ((near[0], far[1], up), (far[0], near[1], down)):
                way: Way = asyncio.Queue(_WAITING)
                group.create_task(_depart(reader, way, link))
                group.create_task(_arrive(way, writer))
    except* OSError:
        pass


async def _depart(reader: asyncio.StreamReader, way: Way, link: Link) -> None:
    clock = asyncio.get_running_loop().time
    while True:
        data = await reader.read(_PIECE)
        while (busy := link.busy(clock())) > _AHEAD:  # again, since another connection may have been first
            await asyncio.sleep(busy - _AHEAD)
        await way.put((link.send(len(data), clock()), data))
        if not data:
            return


async def _arrive(way: Way, writer: asyncio.StreamWriter) -> None:
    clock = asyncio.get_running_loop().time
    while True:
        when, data = await way.get()
        await asyncio.sleep(max(0.0, when - clock()))
        if not data:
            writer.write_eof()
            return
        writer.write(data)
        await writer.drain()
