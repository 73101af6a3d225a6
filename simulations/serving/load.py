"""Clients that keep a service saturated.

Bare streams, so that as little as possible of a latency is the client's own: from before a request is written until all
of its answer is read. Connections are made before.
"""

import asyncio
import ssl
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import cycle, islice
from pathlib import Path

from fedsplit.common.certs import CA

_PATIENCE = 60.0  # seconds for an answer
Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]


@dataclass
class Load:
    """Requests to a service, and what became of them.

    Parameters
    ----------
    port : int
        On this machine.
    path : str
        What is asked.
    folder : Path
        With the certificates and the token.
    payloads : sequence of bytes
        Sent again and again.

    Attributes
    ----------
    done : list of (float, int)
        Seconds and status of each request; status 0: there was no answer.
    """

    port: int
    path: str
    folder: Path
    payloads: Sequence[bytes]
    done: list[tuple[float, int]] = field(default_factory=list)

    def run(self, clients: int, seconds: float) -> None:
        """Keep ``clients`` requests going, each on a connection of its own."""
        asyncio.run(self._run(clients, seconds))

    async def _run(self, clients: int, seconds: float) -> None:
        connections = [await self._connect() for _ in range(clients)]
        deadline = time.monotonic() + seconds
        each = [islice(cycle(self._requests()), number, None, clients) for number in range(clients)]
        await asyncio.gather(*(self._ask(*mine, deadline) for mine in zip(connections, each, strict=True)))

    def _requests(self) -> list[bytes]:
        token = (self.folder / "token").read_text()
        head = f"POST {self.path} HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer {token}\r\n"
        return [f"{head}Content-Length: {len(payload)}\r\n\r\n".encode() + payload for payload in self.payloads]

    @cached_property
    def _context(self) -> ssl.SSLContext:
        return ssl.create_default_context(cafile=str(self.folder / "certs" / CA))

    async def _connect(self) -> Streams:
        return await asyncio.open_connection("127.0.0.1", self.port, ssl=self._context)

    async def _ask(self, streams: Streams, requests: Iterator[bytes], deadline: float) -> None:
        """Send requests one after the other until it is time; after an error the clock goes on."""
        while (began := time.monotonic()) < deadline:
            status = await _answered(streams, next(requests))
            self.done.append((time.monotonic() - began, status))
            if not status:
                streams[1].close()
                streams = await self._connect()
        streams[1].close()


async def _answered(streams: Streams, request: bytes) -> int:
    """Send a request and read all of its answer; return its status, or 0 where something went wrong."""
    reader, writer = streams
    writer.write(request)
    try:
        answer = (await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), _PATIENCE)).lower()
        length = int(answer.partition(b"content-length:")[2].split(b"\r\n", 1)[0])
        await asyncio.wait_for(reader.readexactly(length), _PATIENCE)
        return int(answer.split(b" ", 2)[1])
    except (OSError, EOFError, ValueError, asyncio.LimitOverrunError):
        return 0
