"""The server as an application of Ray Serve: each replica is a whole server, with a worker process for each model.

Ray's proxy takes the connections and hands each request to a replica, where the same middleware and endpoints answer
as in a server of one process. https://docs.ray.io/en/latest/serve
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field, ValidationError
from starlette.types import ASGIApp, Receive, Scope, Send

from optkit.artifact import open_artifact
from optkit.engine.opened import Speculation
from optkit.errors import MissingError, RecipeError
from optkit.options import Options
from optkit.plugins import Plugins
from optkit.serve.app import create_app
from optkit.serve.guard.keys import Keys
from optkit.serve.models import Models, named
from optkit.serve.observing.logs import configure
from optkit.serve.scaling.replicas import Replicas, target
from optkit.serve.serving import Serving
from optkit.serve.settings import Settings

if TYPE_CHECKING:
    from ray.serve import Application

__all__ = ["DEPLOYMENT", "Arguments", "application", "build"]

DEPLOYMENT = "server"
"""Name of the deployment, by which a configuration file of Ray changes its options."""
_BESIDES = 64
"""Requests of a replica that no model works on: `/health`, `/metrics`, refusals."""
_CLOSING = 15.0
"""Seconds for closing the models once no request is open."""
_STICKY = "ray.serve.experimental.consistent_hash_router.ConsistentHashRouter"


class Arguments(Options):
    """What `args` of a configuration file of Ray Serve may hold."""

    artifacts: list[str] = Field(min_length=1)
    """`PATH` or `NAME=PATH`; every node finds the same files there."""
    keys: str | None = None
    """File of API keys, read where the application is built; also from `OPTKIT_API_KEYS` there."""
    replicas: str = "1"
    """`N` or `MIN:MAX`."""
    session_affinity: bool = False
    """Requests with the same `x-session-id` go to the same replica, whose prefix cache knows their conversation."""
    max_queue: int = 256
    """See `optkit.serve.settings.Settings`, as for all below."""
    request_timeout: float = 600.0
    drain_timeout: float = 30.0
    otlp_endpoint: str | None = None
    draft: str | None = None
    """A draft artifact, or `lookup`."""


def build(args: Mapping[str, Any]) -> Application:
    """The application that a configuration file of Ray Serve imports: `optkit.serve.scaling.application:build`.

    Args:
        args: see `Arguments`.

    Raises:
        RecipeError: an argument is wrong, or there are no API keys: which address is bound cannot be seen here.
        OptkitError: as `application`.
    """
    try:
        # YAML has no floats where a whole number stands.
        given = Arguments.model_validate(dict(args), strict=False)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise RecipeError(f"{place}: {first['msg'].lower()}", where="args") from error
    keys = Keys.load(os.environ, None if given.keys is None else Path(given.keys))
    if keys is None:
        raise RecipeError(
            "an application that Ray Serve binds needs API keys",
            where="args",
            remedy="set OPTKIT_API_KEYS where it is built, or name a file with keys:",
        )
    settings = Settings(
        max_queue=given.max_queue,
        request_timeout=given.request_timeout,
        drain_timeout=given.drain_timeout,
        otlp_endpoint=given.otlp_endpoint,
    )
    speculation = None
    if given.draft is not None:
        speculation = Speculation(draft=None if given.draft == "lookup" else given.draft)
    return application(
        named(given.artifacts),
        settings,
        keys,
        replicas=Replicas.parse(given.replicas),
        session_affinity=given.session_affinity,
        speculation=speculation,
    )


def application(
    places: Mapping[str, Path],
    settings: Settings,
    keys: Keys | None,
    *,
    replicas: Replicas,
    cores: int = 1,
    session_affinity: bool = False,
    speculation: Speculation | None = None,
    block: tuple[str, ...] = (),
) -> Application:
    """Artifacts behind HTTP, to be run by `ray.serve.run`.

    Args:
        places: directory of each artifact, by name, on every node.
        settings: of each replica's server; `host` and `port` are Ray's matter.
        keys: that let in. Ray keeps their digests, and what is derived from them, as part of the application.
        replicas: how many.
        cores: for each; PyTorch starts as many threads.
        session_affinity: see `Arguments`.
        speculation: for all language models.
        block: plugins to leave out.

    Raises:
        RecipeError: a state directory is to be shared.
        MissingError: Ray is not installed, or there is no artifact.
        DamagedError: as `optkit.artifact.open_artifact`.
    """
    if settings.state is not None and replicas.most > 1:
        raise RecipeError(
            "a state directory has one owner, so files and batches need a server of one replica",
            where="--state",
            found=str(settings.state),
            remedy="leave out --state, or give --replicas 1",
        )
    try:
        from ray import serve
        from ray.serve.config import AutoscalingConfig, RequestRouterConfig
    except ImportError as error:
        raise MissingError("Ray Serve is not installed", where="ray", remedy="pip install 'optkit[ray]'") from error
    places = {name: path.resolve() for name, path in places.items()}
    if settings.state is not None:
        settings = settings.model_copy(update={"state": settings.state.resolve()})
    if speculation is not None and speculation.draft is not None:
        speculation = Speculation(draft=str(Path(speculation.draft).resolve()), tokens=speculation.tokens)
    seats = sum(open_artifact(path, verify=False).manifest.max_batch_size for path in places.values())
    limit = seats + len(places) * settings.max_queue

    def server() -> ASGIApp:
        return _server(places, settings, keys, speculation, block)

    options: dict[str, Any] = {"num_replicas": replicas.least}
    if not replicas.fixed:
        options = {
            "autoscaling_config": AutoscalingConfig(
                min_replicas=replicas.least,
                max_replicas=replicas.most,
                target_ongoing_requests=target(seats, len(places) * settings.max_queue),
                # A replica that is not needed costs little; one that is missing makes requests wait.
                upscale_delay_s=10.0,
                look_back_period_s=20.0,
                downscale_delay_s=300.0,
            )
        }
    if session_affinity:
        options["request_router_config"] = RequestRouterConfig(request_router_class=_STICKY)
    deployment = serve.deployment(
        name=DEPLOYMENT,
        ray_actor_options={"num_cpus": cores},
        # More than the models' queues hold: that they are full is said by a replica, with 429 and Retry-After.
        max_ongoing_requests=limit + _BESIDES,
        max_queued_requests=limit + _BESIDES,
        graceful_shutdown_timeout_s=settings.drain_timeout + _CLOSING,
        graceful_shutdown_wait_loop_s=0.5,
        health_check_period_s=5.0,
        max_constructor_retry_count=3,
        logging_config={"enable_access_log": False},
        **options,
    )
    made: Application = deployment(serve.ingress(server)(Replica)).bind()
    return made


class Replica:
    """What Ray asks of a replica besides answers."""

    app: _Server

    async def check_health(self) -> None:
        """Raises what makes Ray replace the replica. A worker process that died is replaced by the engine itself.

        Raises:
            RuntimeError: the engine of a model failed for good, or hangs.
        """
        for served in self.app.serving.models.loaded():
            health = await served.engine.health()
            if health.state == "failed" or health.hung:
                raise RuntimeError(
                    f"the engine of {served.name} {'hangs' if health.hung else 'failed'}: {health.reason}"
                )

    async def drain(self) -> int:
        """Refuse new requests from now on; how many are open."""
        self.app.serving.drain()
        return self.app.serving.open

    async def break_off(self) -> None:
        """End the open requests, each with an error."""
        await self.app.serving.break_off()


class _Server:
    """A server's ASGI application, which still knows what it serves."""

    def __init__(self, serving: Serving, app: ASGIApp) -> None:
        self.serving, self._app = serving, app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._app(scope, receive, send)


def _server(
    places: Mapping[str, Path],
    settings: Settings,
    keys: Keys | None,
    speculation: Speculation | None,
    block: tuple[str, ...],
) -> _Server:
    """In the replica's process; its lifespan loads the models."""
    configure()
    # `configure` took the handler that holds back a second line for each request.
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    plugins = Plugins.load(block=block)
    models = Models(places, queue=settings.max_queue, plugins=plugins, speculation=speculation)
    serving = Serving(settings, models, tuple(places))
    return _Server(serving, create_app(serving, keys))
