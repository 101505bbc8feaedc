"""The Typer app: global options, the commands, and the one place where errors become exit codes."""

from __future__ import annotations

import errno
import os
import sys
import traceback
from typing import Annotated, Any

import typer

from optkit.cli import artifacts, batch, measuring, recipes, serving, system
from optkit.cli.extensions import Commands
from optkit.cli.present import complain, say
from optkit.cli.usage import explained
from optkit.errors import MachineError, OptkitError, RecipeError

__all__ = ["app", "main"]

INTERRUPTED = 130
_REFUSED = {
    errno.EACCES,
    errno.EDQUOT,
    errno.EIO,
    errno.EMFILE,
    errno.ENOMEM,
    errno.ENOSPC,
    errno.EPERM,
    errno.EROFS,
}

app = typer.Typer(
    name="optkit",
    cls=Commands,
    invoke_without_command=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for module in (recipes, artifacts, serving, batch, measuring, system):
    module.add_to(app)


@app.callback()
def options(
    context: typer.Context,
    no_plugins: Annotated[bool, typer.Option("--no-plugins", help="Load no third-party plugins.")] = False,
    block: Annotated[
        list[str] | None, typer.Option("--block", metavar="NAME", help="Leave this plugin out; may be given again.")
    ] = None,
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    """Compose, measure and ship inference optimizations.

    A recipe names a model, what is done to its weights, and what runs it. Start with: optkit plan RECIPE
    """
    context.obj = {"third_party": not no_plugins, "block": block or []}
    if version:
        import optkit

        say(f"optkit {optkit.__version__}")
        raise typer.Exit
    if context.invoked_subcommand is None:
        say(context.get_help())


def main() -> None:
    """Run the command line and exit with the code of its outcome (table: `optkit.errors`)."""
    # Tokenizers warn when a child process is started after they were used.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TQDM_DISABLE", "1")  # bars of libraries; optkit draws its own
    sys.exit(_run(sys.argv[1:]))


def _run(arguments: list[str]) -> int:
    usage_error: Any = typer.BadParameter.__mro__[1]  # UsageError, which typer does not export
    try:
        # Not `app()`: it swallows interrupts and broken pipes.
        command = typer.main.get_command(app)
        with command.make_context("optkit", arguments) as context:
            command.invoke(context)
        sys.stdout.flush()
    except typer.Exit as end:
        return end.exit_code
    except OptkitError as error:
        complain(str(error))
        return error.exit_code
    except (KeyboardInterrupt, typer.Abort):
        kept = "; finished steps are kept, the same command goes on from there" if "apply" in arguments else ""
        complain(f"interrupted{kept}")
        return INTERRUPTED
    except usage_error as error:
        complain(explained(error))
        return RecipeError.exit_code
    except BrokenPipeError:
        # The reader went away, as `| head` does. Python would complain again when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:
        if error.errno not in _REFUSED:
            return _bug(error)
        complain(str(MachineError(f"the system says: {error.strerror}", where=str(error.filename or "optkit"))))
        return MachineError.exit_code
    except Exception as error:
        return _bug(error)
    return 0


def _bug(error: Exception) -> int:
    traceback.print_exception(error)
    complain("this is a bug in optkit or in a plugin; please report it with the lines above")
    return OptkitError.exit_code
