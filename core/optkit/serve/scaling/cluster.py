"""Runs the application on Ray, on this machine or on the cluster that RAY_ADDRESS names, until a signal ends it."""

from __future__ import annotations

import logging
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optkit.engine.opened import Speculation
from optkit.errors import MachineError, RecipeError
from optkit.hardware import usable_cores
from optkit.serve.guard.keys import Keys, check_address
from optkit.serve.scaling.replicas import Replicas, cores_for_each
from optkit.serve.settings import Settings

if TYPE_CHECKING:
    from ray.serve import Application
    from ray.serve.handle import DeploymentHandle

__all__ = ["NAME", "run"]

NAME = "optkit"
"""Of the application on the cluster."""

_log = logging.getLogger(__name__)

_ENVIRONMENT = {
    # Nothing is reported to anybody.
    "RAY_USAGE_STATS_ENABLED": "0",
    # Each line of the replicas' logs is a fact of its own.
    "RAY_DEDUP_LOGS": "0",
    "RAY_COLOR_PREFIX": "0",
}
_LOCAL = {
    # Ray's own ports listen on all interfaces, and let whoever has the token run code.
    "RAY_AUTH_MODE": "token",
    # Replicas are no background work.
    "RAY_worker_niceness": "0",
}
_OBJECT_STORE_BYTES = 256 << 20
"""Nothing but large requests on their way is in it."""
_MARGIN = 30.0
"""Seconds after which something else than a request hangs."""
_TICK = 0.2


def run(
    places: Mapping[str, Path],
    settings: Settings,
    keys: Keys | None,
    ready: Callable[[str], None],
    *,
    replicas: Replicas,
    session_affinity: bool = False,
    speculation: Speculation | None = None,
    block: tuple[str, ...] = (),
) -> None:
    """Serve until SIGTERM or SIGINT, then let open requests come to their ends; a second signal breaks them off.

    Args:
        places: directory of each artifact, by name.
        settings: of each replica's server, and the address that Ray's proxy binds.
        keys: that let in.
        ready: called with the URL once requests are answered.
        replicas: how many.
        session_affinity: requests with the same `x-session-id` go to the same replica.
        speculation: for all language models.
        block: plugins to leave out.

    Raises:
        MissingError: Ray is not installed.
        RecipeError: other machines could connect without a key, the machine has fewer cores than replicas are to run,
            or as `optkit.serve.scaling.application.application`.
        MachineError: Ray or the replicas do not start.
    """
    check_address(settings.host, keys)
    joined = os.environ.get("RAY_ADDRESS", "local") != "local"
    if not joined and replicas.most > usable_cores():
        raise RecipeError(
            "more replicas than cores would wait for each other",
            where="--replicas",
            found=replicas.most,
            remedy=f"give at most {usable_cores()}, or name a cluster with RAY_ADDRESS",
        )
    if joined and not settings.port:
        raise RecipeError("on a cluster no free port can be chosen", where="--port", found=0, remedy="give one")
    # Read when Ray is imported.
    os.environ.update(_ENVIRONMENT)
    if not joined:
        for name, value in _LOCAL.items():
            os.environ.setdefault(name, value)
    from optkit.serve.scaling.application import application

    options: dict[str, Any] = {
        "replicas": replicas,
        "session_affinity": session_affinity,
        "speculation": speculation,
        "block": block,
    }
    # What is wrong with it is known before Ray starts.
    application(places, settings, keys, **options)
    # On a cluster the proxies may be on other machines, or have the address already.
    port = settings.port if joined else _bindable(settings.host, settings.port)
    with _interruptible(), _ray(joined=joined) as nodes:
        _start(settings, port)
        cores = cores_for_each(nodes, replicas.most) or 1
        with _deployed(application(places, settings, keys, cores=cores, **options)) as handle:
            host = f"[{settings.host}]" if ":" in settings.host else settings.host
            with suppress(KeyboardInterrupt):
                ready(f"http://{host}:{port}")
                while True:
                    signal.pause()
            _drain(handle, settings.drain_timeout)


@contextmanager
def _interruptible() -> Iterator[None]:
    """SIGTERM does what Ctrl-C does, also where Ray has set a handler of its own."""
    before = [signal.signal(number, signal.default_int_handler) for number in (signal.SIGTERM, signal.SIGINT)]
    try:
        yield
    except KeyboardInterrupt:
        _log.info("interrupted")
    finally:
        for number, handler in zip((signal.SIGTERM, signal.SIGINT), before, strict=True):
            signal.signal(number, handler)


@contextmanager
def _ray(*, joined: bool) -> Iterator[list[int]]:
    """Connected to a cluster; the cores of each of its nodes."""
    import ray

    options: dict[str, Any] = {"address": "auto"}
    if not joined:
        options = {
            # Without it Ray would join whatever cluster was last started here.
            "address": "local",
            "num_cpus": usable_cores(),
            "include_dashboard": False,
            "object_store_memory": _OBJECT_STORE_BYTES,
        }
    term = signal.getsignal(signal.SIGTERM)
    try:
        try:
            ray.init(**options, logging_level=logging.ERROR)
        except (ConnectionError, OSError, RuntimeError, ValueError) as error:
            raise MachineError("Ray does not start or cannot be reached", where="ray", found=str(error)) from error
        # Ray's own handler would end the process without a drain.
        signal.signal(signal.SIGTERM, term)
        yield [int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"]]
    finally:
        ray.shutdown()


def _start(settings: Settings, port: int) -> None:
    from ray import serve
    from ray.serve.config import HTTPOptions
    from ray.serve.context import _get_global_client

    wanted = HTTPOptions(
        host=settings.host,
        port=port,
        keep_alive_timeout_s=int(settings.keep_alive_timeout),
        # The replica ends a request in time; this is for one that does not answer at all.
        request_timeout_s=settings.request_timeout + _MARGIN,
    )
    serve.start(http_options=wanted)
    # A cluster on which Ray Serve runs already keeps its address, and another one could be open to everybody.
    found = _get_global_client().http_config
    if (found.host, found.port) != (wanted.host, wanted.port):
        raise MachineError(
            "Ray Serve runs on this cluster already and binds another address",
            where=f"{wanted.host}:{wanted.port}",
            found=f"{found.host}:{found.port}",
            remedy="give --host and --port as it has them",
        )


@contextmanager
def _deployed(made: Application) -> Iterator[DeploymentHandle]:
    """The application on the cluster, once it takes requests; nothing of it stays there."""
    from ray import serve

    try:
        try:
            handle = serve.run(made, name=NAME)
        except RuntimeError as error:
            raise MachineError("the replicas did not start, their lines above say why", where="ray") from error
        yield handle
    finally:
        serve.delete(NAME, _blocking=False)
        end = time.monotonic() + _MARGIN
        while NAME in serve.status().applications and time.monotonic() < end:
            time.sleep(_TICK)


def _drain(handle: DeploymentHandle, patience: float) -> None:
    """Refuse new requests, and wait for open ones; what is left after `patience` seconds or a signal is broken off.

    Ray alone would answer 404 from the first moment on, which no client takes for something that passes.
    """
    _log.info("draining")
    end = time.monotonic() + patience
    with suppress(KeyboardInterrupt):
        while any(_ask(handle, "drain")) and time.monotonic() < end:
            time.sleep(_TICK)
    if any(_ask(handle, "drain")):
        _ask(handle, "break_off")


def _ask(handle: DeploymentHandle, method: str) -> list[int]:
    """What the replicas that answer say."""
    answers = handle.broadcast(method).results(timeout_s=_MARGIN, return_exceptions=True)
    return [answer for answer in answers if isinstance(answer, int)]


def _bindable(host: str, port: int) -> int:
    """`port`, or a free one for 0: Ray's proxy says neither which one it got nor why it got none."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
            return int(probe.getsockname()[1])
    except OSError as error:
        raise MachineError(
            f"the address cannot be bound ({error.strerror})",
            where=f"{host}:{port}",
            remedy="choose another --host or --port",
        ) from error
