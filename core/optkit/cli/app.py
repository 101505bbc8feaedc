"""The Typer app: global options, the commands, and the one place where errors become exit codes."""

from __future__ import annotations

import os
import sys
from typing import Annotated, Any

import typer

from optkit.cli import artifacts, measuring, recipes, system
from optkit.cli.present import complain
from optkit.errors import OptkitError

__all__ = ["app", "main"]

INTERRUPTED = 130

app = typer.Typer(
    name="optkit",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for module in (recipes, measuring, artifacts, system):
    module.add_to(app)


@app.callback()
def options(
    context: typer.Context,
    no_plugins: Annotated[bool, typer.Option("--no-plugins", help="Load no third-party plugins.")] = False,
    block: Annotated[list[str] | None, typer.Option(help="Leave this plugin out; may be given again.")] = None,
) -> None:
    """Compose, measure and ship inference optimizations."""
    context.obj = {"third_party": not no_plugins, "block": block or []}


def main() -> None:
    """Run the command line and exit with the code of its outcome (table: `optkit.errors`)."""
    # transformers would look for newer files on the hub, and tokenizers warn when a child process is started.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    usage_error: Any = typer.BadParameter.__mro__[1]  # UsageError, which typer does not export
    try:
        app(standalone_mode=False)
    except OptkitError as error:
        complain(str(error))
        sys.exit(error.exit_code)
    except (KeyboardInterrupt, typer.Abort):
        complain("interrupted; what was finished is kept, the same command goes on from there")
        sys.exit(INTERRUPTED)
    except usage_error as error:
        command = error.ctx.command_path if error.ctx is not None else "optkit"
        complain(f"{command}: {' '.join(error.format_message().split())}; see {command} --help")
        sys.exit(2)
    except BrokenPipeError:
        # The reader went away, as `| head` does. Python would complain again when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
