"""Finds plugins: entry points of group `optkit`, ours and strangers'. One that is broken is named, never fatal."""

from __future__ import annotations

import difflib
import importlib
import os
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Literal, TypeVar, get_args

import pluggy

from optkit import hookspecs
from optkit.backends import Backend
from optkit.batching import Batcher
from optkit.datasets import Dataset
from optkit.errors import MissingError, OptkitError, RecipeError
from optkit.metrics import Metric
from optkit.options import Options
from optkit.sources import Source
from optkit.transforms import Transform

__all__ = ["INTERFACES", "Broken", "Kind", "Plugins", "Registered"]

GROUP = "optkit"
OURS = "optkit"

Kind = Literal["transform", "backend", "batcher", "source", "dataset", "metric"]
KINDS: tuple[Kind, ...] = get_args(Kind)
INTERFACES: dict[Kind, type[Options]] = {
    "transform": Transform,
    "backend": Backend,
    "batcher": Batcher,
    "source": Source,
    "dataset": Dataset,
    "metric": Metric,
}
T = TypeVar("T", bound=Options)


@dataclass(frozen=True, slots=True)
class Registered:
    """A name that a plugin offers to recipes."""

    kind: Kind
    name: str
    target: type | str
    plugin: str
    """The entry point's name."""
    distribution: str
    version: str


@dataclass(frozen=True, slots=True)
class Broken:
    """A plugin that could not be loaded, and why."""

    plugin: str
    distribution: str
    version: str
    reason: str


class Plugins:
    """The plugins of this process, and what they offer by name.

    Attributes:
        hook: pluggy's relay, for the observers and `register_commands`.
        registered: everything offered, sorted by kind and name.
        broken: plugins that failed to load.
    """

    def __init__(self) -> None:
        self._manager = pluggy.PluginManager("optkit")
        self._manager.add_hookspecs(hookspecs)
        self._offers: dict[tuple[Kind, str], list[Registered]] = {}
        self.broken: list[Broken] = []
        self.blocked: list[str] = []

    @classmethod
    def load(cls, *, third_party: bool = True, block: Iterable[str] = (), only: Iterable[str] | None = None) -> Plugins:
        """Load every installed plugin.

        Args:
            third_party: False leaves out what does not come with optkit itself.
            block: entry point or distribution names to leave out, ours included.
            only: load these third-party plugins and no others. By default the names in the environment
                variable `OPTKIT_PLUGINS`, separated by commas, if it is set.

        Raises:
            RecipeError: `block` names nothing that is installed.
        """
        plugins = cls()
        if only is None and "OPTKIT_PLUGINS" in os.environ:
            only = [name.strip() for name in os.environ["OPTKIT_PLUGINS"].split(",") if name.strip()]
        blocked, allowed = set(block), None if only is None else set(only)
        points = sorted(entry_points(group=GROUP), key=_ours_first)
        known = sorted({name for point in points for name in (point.name, _distribution(point)[0])})
        for name in sorted(blocked - set(known)):
            near = difflib.get_close_matches(name, known, n=1)
            remedy = f"did you mean {near[0]!r}?" if near else f"installed are: {', '.join(known)}"
            raise RecipeError("no plugin to leave out", where="--block", found=name, remedy=remedy)
        for point in points:
            names = {point.name, _distribution(point)[0]}
            foreign = _distribution(point)[0] != OURS
            unwanted = foreign and (not third_party or (allowed is not None and not names & allowed))
            if names & blocked or unwanted:
                plugins.blocked.append(point.name)
            else:
                plugins._load(point)
        return plugins

    def register(self, plugin: object, name: str, distribution: str = "this process", version: str = "0") -> None:
        """Add a plugin object, a module or an instance with hook implementations. Entry points end here too.

        Raises:
            pluggy.PluginValidationError: a hook has arguments that its specification lacks.
            TypeError: a registration is not a mapping of names to classes.
        """
        self._manager.register(plugin, name)
        try:
            self._manager.check_pending()
            offers = [self._offered(plugin, kind, name, distribution, version) for kind in KINDS]
        except BaseException:
            self._manager.unregister(plugin)
            raise
        for offer in (offer for of_kind in offers for offer in of_kind):
            self._offers.setdefault((offer.kind, offer.name), []).append(offer)

    @property
    def hook(self) -> Any:
        return self._manager.hook

    @property
    def registered(self) -> list[Registered]:
        return [offer for key in sorted(self._offers) for offer in self._offers[key]]

    def names(self, kind: Kind) -> list[str]:
        """Names of one kind, sorted."""
        return sorted(name for of_kind, name in self._offers if of_kind == kind)

    def find(self, kind: Kind, name: str, *, where: str = "") -> Registered:
        """The one plugin class registered under `name`.

        Raises:
            RecipeError: nobody offers the name, or two plugins do.
        """
        offers = self._offers.get((kind, name), [])
        if not offers:
            raise RecipeError(f"unknown {kind}", where=where, found=name, remedy=self._remedy(kind, name))
        if len(offers) > 1:
            owners = " and ".join(f"{offer.plugin} ({offer.distribution})" for offer in offers)
            raise RecipeError(
                f"{kind} {name!r} is offered by two plugins, {owners}",
                where=where,
                remedy=f"leave one out with --block {offers[-1].plugin}",
            )
        return offers[0]

    def get(self, kind: Kind, name: str, *, where: str = "") -> type[Any]:
        """The class registered under `name`, imported now if it was registered by its path.

        Raises:
            RecipeError: see `find`.
            MissingError: its module cannot be imported, or is not of this kind.
        """
        offer = self.find(kind, name, where=where)
        owner = f"plugin {offer.plugin!r} of {offer.distribution} {offer.version}"
        try:
            target = _import(offer.target) if isinstance(offer.target, str) else offer.target
        except Exception as error:
            remedy = f"update {offer.distribution}, or leave it out with --block {offer.plugin}"
            raise MissingError(
                f"{owner} failed to load {offer.target!r}: {_reason(error)}", where=where, remedy=remedy
            ) from error
        interface = INTERFACES[kind]
        if not (isinstance(target, type) and issubclass(target, interface)):
            raise MissingError(f"{owner} offers {name!r} as a {kind}, but it is no {interface.__name__}", where=where)
        return target

    def state(self, offer: Registered) -> str | None:
        """Why this offer cannot be used here, or None."""
        try:
            target = self.get(offer.kind, offer.name)
            if not issubclass(target, Backend):
                return None
            backend = target()
            return backend.unavailable() or backend.uncompilable()
        except OptkitError as error:
            return str(error)

    def _remedy(self, kind: Kind, name: str) -> str:
        close = difflib.get_close_matches(name, self.names(kind), n=1)
        known = ", ".join(self.names(kind)) or "none"
        text = f"did you mean {close[0]!r}?" if close else f"installed are: {known}"
        if others := [other for other in KINDS if (other, name) in self._offers]:
            text = f"it is a {others[0]}, {text}"
        if self.broken:
            text += f" (not loaded: {', '.join(f'{b.plugin} of {b.distribution}' for b in self.broken)})"
        if self.blocked:
            text += f" (left out: {', '.join(self.blocked)})"
        return text

    def _load(self, point: EntryPoint) -> None:
        distribution, version = _distribution(point)
        try:
            self.register(point.load(), point.name, distribution, version)
        except Exception as error:
            self.broken.append(Broken(point.name, distribution, version, _reason(error)))

    def _offered(self, plugin: object, kind: Kind, name: str, distribution: str, version: str) -> list[Registered]:
        hook = f"register_{kind}s"
        implementation = next(
            (i for i in getattr(self._manager.hook, hook).get_hookimpls() if i.plugin is plugin), None
        )
        if implementation is None:
            return []
        offered = implementation.function()
        if not isinstance(offered, dict) or not all(
            isinstance(k, str) and isinstance(v, type | str) for k, v in offered.items()
        ):
            raise TypeError(f"{hook}() must return a dict of name -> class or 'module:Class'")
        return [Registered(kind, key, target, name, distribution, version) for key, target in offered.items()]


def _distribution(point: EntryPoint) -> tuple[str, str]:
    return (point.dist.name, point.dist.version) if point.dist else ("unknown", "0")


def _ours_first(point: EntryPoint) -> tuple[bool, str, str]:
    return _distribution(point)[0] != OURS, _distribution(point)[0], point.name


def _import(path: str) -> Any:
    module, _, name = path.partition(":")
    return getattr(importlib.import_module(module), name)


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
