"""The server process: a socket, uvicorn on it, and how it ends."""

from __future__ import annotations

import asyncio
import contextlib
import resource
import socket
import time
from collections.abc import Callable, Iterator
from types import FrameType

import uvicorn

from optkit.errors import MachineError
from optkit.serve.app import create_app
from optkit.serve.guard.keys import Keys
from optkit.serve.guard.protocol import protocol_class
from optkit.serve.serving import Serving

__all__ = ["serve"]

_OTHER_FILES = 512
_LAST_SECONDS = 2
"""What answers that were broken off may take to reach their clients."""


def serve(serving: Serving, keys: Keys | None, ready: Callable[[str], None]) -> None:
    """Serve until SIGTERM or SIGINT, then answer what is open; a second signal breaks it off.

    Args:
        serving: what is served.
        keys: that let in.
        ready: called with the URL once requests are answered.

    Raises:
        MachineError: the address cannot be bound.
        OptkitError: as entering `serving`.
    """
    config = uvicorn.Config(
        create_app(serving, keys),
        lifespan="off",
        http=protocol_class(serving.settings),
        ws="none",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=int(serving.settings.keep_alive_timeout),
        timeout_graceful_shutdown=_LAST_SECONDS,
        backlog=2048,
    )

    _allow_files(serving.settings.max_connections)

    async def run() -> None:
        # Before the models are loaded, which may take minutes: an address in use is known at once.
        with _bound(serving.settings.host, serving.settings.port) as listener:
            async with serving:
                await _Server(config, serving, ready).serve([listener])

    factory = config.get_loop_factory()
    with asyncio.Runner(loop_factory=factory) as runner:
        runner.run(run())


class _Server(uvicorn.Server):
    """uvicorn, but that it goes on answering `503` while open requests come to their ends."""

    def __init__(self, config: uvicorn.Config, serving: Serving, ready: Callable[[str], None]) -> None:
        super().__init__(config)
        self._serving, self._ready = serving, ready
        self._until: float | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        assert sockets is not None
        host, port = sockets[0].getsockname()[:2]
        self._ready(f"http://{f'[{host}]' if ':' in host else host}:{port}")

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self._until is None:
            self._until = time.monotonic() + self._serving.settings.drain_timeout
        else:
            self.should_exit = self.force_exit = True

    async def on_tick(self, counter: int) -> bool:
        if self._until is not None and not self.should_exit:
            self._serving.drain()
            if not self._serving.open:
                self.should_exit = True
            elif time.monotonic() > self._until:
                await self._serving.break_off()
                self.should_exit = True
        return await super().on_tick(counter)


def _allow_files(connections: int) -> None:
    """Connections are files, and so are the pipes and the models of workers; the usual limit of 1024 is a soft one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = connections + _OTHER_FILES
    if soft != resource.RLIM_INFINITY and soft < wanted:
        most = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


@contextlib.contextmanager
def _bound(host: str, port: int) -> Iterator[socket.socket]:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        raise MachineError(
            f"the address cannot be bound ({error.strerror})",
            where=f"{host}:{port}",
            remedy="choose another --host or --port",
        ) from error
    with listener:
        yield listener
