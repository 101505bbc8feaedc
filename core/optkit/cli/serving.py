"""`optkit serve`: artifacts behind HTTP."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Literal

import typer

from optkit.cli.artifacts import DraftOption, speculation_of
from optkit.cli.present import plugins_of, say
from optkit.errors import MissingError, RecipeError

__all__ = ["add_to"]


def add_to(app: typer.Typer) -> None:
    """Register the command."""
    app.command("serve")(serve)


def serve(
    context: typer.Context,
    artifacts: Annotated[
        list[str], typer.Argument(metavar="[NAME=]ARTIFACT", help="Served under the artifact's own name, or NAME.")
    ],
    available: Annotated[
        list[str] | None,
        typer.Option("--available", metavar="[NAME=]ARTIFACT", help="Known, and loaded when an admin asks for it."),
    ] = None,
    host: Annotated[str, typer.Option(help="Any but a loopback address needs API keys.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8000,
    keys: Annotated[
        Path | None,
        typer.Option("--keys", metavar="FILE", help="API keys, one a line; also in OPTKIT_API_KEYS."),
    ] = None,
    state: Annotated[
        Path | None,
        typer.Option("--state", metavar="DIRECTORY", help="Keep uploaded files and batches here; none without it."),
    ] = None,
    max_queue: Annotated[
        int, typer.Option(min=0, help="Requests of one model that may wait; more are refused with 429.")
    ] = 256,
    request_timeout: Annotated[float, typer.Option(min=0.001, help="Seconds that a request may take.")] = 600.0,
    drain_timeout: Annotated[
        float, typer.Option(min=0.0, help="Seconds that open requests may go on after SIGTERM.")
    ] = 30.0,
    otlp_endpoint: Annotated[
        str | None, typer.Option(metavar="URL", help="Send OpenTelemetry traces there; needs the extra otel.")
    ] = None,
    changes: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME=VALUE", help="Another setting of the server; may be given again."),
    ] = None,
    draft: DraftOption = None,
    engine: Annotated[
        Literal["local", "ray"], typer.Option(help="What runs the server: this process, or replicas on Ray Serve.")
    ] = "local",
    replicas: Annotated[
        str, typer.Option(metavar="N|MIN:MAX", help="Servers behind one address; MIN:MAX as many as the load needs.")
    ] = "1",
    session_affinity: Annotated[
        bool, typer.Option("--session-affinity", help="Requests with the same x-session-id go to the same replica.")
    ] = False,
) -> None:
    """Serve artifacts over HTTP.

    With OpenAI's API for language models and encoders, and the Open Inference Protocol for tensors. SIGTERM or Ctrl-C
    answers what is open and then ends; a second one ends at once.
    """
    try:
        import fastapi  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise MissingError(
            "the server's libraries are not installed", where="serve", remedy="pip install 'optkit[serve]'"
        ) from error
    from optkit.serve.guard.keys import Keys, check_address
    from optkit.serve.models import Models, named
    from optkit.serve.observing.logs import configure
    from optkit.serve.server import serve as run
    from optkit.serve.serving import Serving
    from optkit.serve.settings import Settings, with_changes

    if engine == "local" and (replicas != "1" or session_affinity):
        option = "--session-affinity" if session_affinity else "--replicas"
        raise RecipeError("is for several replicas", where=option, remedy="add --engine ray")
    settings = Settings(
        host=host,
        port=port,
        max_queue=max_queue,
        request_timeout=request_timeout,
        drain_timeout=drain_timeout,
        state=state,
        otlp_endpoint=otlp_endpoint,
    )
    settings = with_changes(settings, changes or ())
    known = Keys.load(os.environ, keys)
    check_address(settings.host, known)
    load = named(artifacts)
    places = named([*artifacts, *(available or ())])
    configure()
    started = f"serving {', '.join(load)} at"
    if engine == "ray":
        from optkit.serve.scaling.cluster import run as run_on_ray
        from optkit.serve.scaling.replicas import Replicas

        if available:
            raise RecipeError("one replica would load it and the others not", where="--available", found=available[0])
        run_on_ray(
            load,
            settings,
            known,
            lambda url: say(f"{started} {url}"),
            replicas=Replicas.parse(replicas),
            session_affinity=session_affinity,
            speculation=speculation_of(draft),
            block=tuple(plugins_of(context).blocked),
        )
        return
    models = Models(places, queue=settings.max_queue, plugins=plugins_of(context), speculation=speculation_of(draft))
    run(Serving(settings, models, tuple(load)), known, lambda url: say(f"{started} {url}"))
