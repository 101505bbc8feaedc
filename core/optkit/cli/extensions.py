"""Commands that third-party plugins add: found only when somebody asks for a command that is not ours, or for help."""

from __future__ import annotations

from collections.abc import Collection
from importlib.metadata import entry_points
from typing import Any

import typer
from typer.core import TyperGroup

from optkit.cli.present import complain, plugins_of

__all__ = ["Commands"]


class Commands(TyperGroup):
    """Our commands, then those of plugins. A plugin cannot replace one of ours, nor take them down."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        # Not left to the callback: --help answers, and a command is looked up, before that runs.
        given, _, _ = self.make_parser(ctx).parse_args(list(args))
        ctx.obj = {"third_party": not given.get("no_plugins", False), "block": given.get("block", [])}
        return super().parse_args(ctx, args)

    def list_commands(self, ctx: Any) -> list[str]:
        return [*super().list_commands(ctx), *self._added(ctx)]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        return super().get_command(ctx, cmd_name) or self._added(ctx).get(cmd_name)

    def _added(self, context: Any) -> dict[str, Any]:
        """Commands of plugins by name, loaded once for a command line; none where nobody typed one, as in the docs."""
        if context.obj is None:
            return {}
        if __name__ not in context.meta:
            context.meta[__name__] = _registered(context, taken=self.commands)
        added: dict[str, Any] = context.meta[__name__]
        return added


def _registered(context: Any, taken: Collection[str]) -> dict[str, Any]:
    # The plugins need pydantic and numpy; where there are none but ours, --help does not wait for them.
    if all(point.dist is not None and point.dist.name == "optkit" for point in entry_points(group="optkit")):
        return {}
    added: dict[str, Any] = {}
    for implementation in plugins_of(context).hook.register_commands.get_hookimpls():
        owner = f"plugin {implementation.plugin_name!r}"
        app = typer.Typer(rich_markup_mode=None)  # of its own, so that a failure leaves nothing half-registered
        try:
            implementation.function(app)
            commands = typer.main.get_group(app).commands
        except Exception as error:
            reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
            complain(f"the commands of {owner} are left out: {reason}")
            continue
        for name in sorted(commands):
            if name in taken or name in added:
                complain(f"the command {name!r} of {owner} is left out: there is another of that name")
            else:
                added[name] = commands[name]
    return added
