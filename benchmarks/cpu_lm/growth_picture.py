"""The figures of `growth.py` as a picture: what was measured as lines, the ceilings dashed in the same colours."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullFormatter, NullLocator

__all__ = ["draw"]

COLOURS = ("#3b4cc0", "#d1495b", "#2a9d5c", "#e08e0b", "#7b4fa3", "#5c677d")
"""By format; the same in all plots."""
INK, FAINT = "#222831", "#c9ced6"
GAP = 0.075
"""Between labels at the end of lines, in heights of a plot."""


@dataclass(frozen=True)
class Plot:
    """One of those side by side.

    Args:
        title: above it.
        across: what grows.
        axis: of a step, its place: "rows" or "context".
        rows: sequences of the steps in it; None for any.
        tokens: new ones of a sequence.
        context: of the steps in it; None for any.
        speed: whether it shows tokens/s; or milliseconds.
    """

    title: str
    across: str
    axis: str
    rows: int | None
    tokens: int
    context: int | None
    speed: bool

    def takes(self, step: dict[str, Any]) -> bool:
        """Whether a step is in it."""
        return (
            step["tokens"] == self.tokens
            and self.rows in (None, step["rows"])
            and self.context in (None, step["context"])
            # The others of one sequence go up to long contexts, beside which this one is short.
            and (self.context is not None or step["context"] >= 512)
        )

    def height(self, step: dict[str, Any], ms: float) -> float:
        """Where a step that takes so long stands."""
        return 1e3 * step["rows"] * step["tokens"] / ms if self.speed else ms


PLOTS = (
    Plot("Decoding, 128 tokens of context", "sequences at once", "rows", None, 1, 129, speed=True),
    Plot("Decoding 1 sequence", "tokens of context", "context", 1, 1, None, speed=False),
    Plot("Decoding 16 sequences", "tokens of context each", "context", 16, 1, None, speed=False),
    Plot("The last 512 tokens of a prompt", "tokens of the prompt", "context", 1, 512, None, speed=True),
)


def draw(data: dict[str, Any], file: Path) -> None:
    """Write the picture of a report of `growth.py`, in the format that the file's suffix names."""
    models = list(dict.fromkeys(step["model"] for step in data["steps"]))
    formats = list(dict.fromkeys(step["format"] for step in data["steps"]))
    colours = dict(zip(formats, COLOURS, strict=False))
    settings = {"svg.hashsalt": "growth", "svg.fonttype": "none", "font.family": "sans-serif", "font.size": 9}
    settings |= {"text.color": INK}
    settings |= {"axes.labelcolor": INK, "xtick.color": INK, "ytick.color": INK, "axes.edgecolor": FAINT}
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=(4.4 * len(PLOTS), 3.6 * len(models) + 0.5), layout=ConstrainedLayoutEngine(w_pad=0.12))
        parts = figure.subfigures(len(models), 1, squeeze=False)[:, 0]
        figure.suptitle(_headline(data), fontsize=10)
        for part, model in zip(parts, models, strict=True):
            part.suptitle(model, fontsize=13, fontweight="bold", x=0.008, ha="left")
            for axes, plot in zip(part.subplots(1, len(PLOTS)), PLOTS, strict=True):
                steps = [step for step in data["steps"] if step["model"] == model and plot.takes(step)]
                _draw(axes, plot, steps, colours)
        figure.savefig(file, dpi=110, metadata={"Date": None} if file.suffix == ".svg" else None)


def _headline(data: dict[str, Any]) -> str:
    machine, peaks = data["machine"], data["ceilings"]
    integers = f", {peaks['int8_gops']:.0f} GOP/s in int8" if peaks["int8_gops"] else ""
    return (
        f"{machine['cores']} cores of {machine['cpu']}: {peaks['read_gb_per_s']:.1f} GB/s, "
        f"{peaks['fp32_gflops']:.0f} GFLOP/s in float32{integers}.   "
        "Lines: measured, with 95% intervals.   Dashed: the machine's ceiling."
    )


def _draw(axes: Axes, plot: Plot, steps: list[dict[str, Any]], colours: dict[str, str]) -> None:
    places = sorted({step[plot.axis] for step in steps})
    axes.set(xscale="log", yscale="log", xlabel=plot.across)
    axes.set_title(plot.title, fontsize=10, loc="left")
    axes.set_ylabel("tokens/s" if plot.speed else "ms for one token of each")
    ends, heights = {}, []
    for name in dict.fromkeys(step["format"] for step in steps):
        mine = sorted((step for step in steps if step["format"] == name), key=lambda step: step[plot.axis])
        across = [step[plot.axis] for step in mine]
        found = [plot.height(step, step["ms"]["value"]) for step in mine]
        edges = [sorted(plot.height(step, step["ms"][edge]) for edge in ("low", "high")) for step in mine]
        least = [plot.height(step, step["least_ms"]) for step in mine]
        axes.plot(across, least, color=colours[name], linestyle=(0, (4, 2)), linewidth=1.1, alpha=0.8)
        axes.vlines(across, *zip(*edges, strict=True), color=colours[name], linewidth=1, alpha=0.55)
        axes.plot(across, found, color=colours[name], marker="o", markersize=4, linewidth=1.9)
        ends[name] = found[-1]
        heights += [*np.ravel(edges), *least]
    axes.set_xlim(places[0] / 1.12, places[-1] * 1.12)
    axes.set_ylim(min(heights) / 1.2, max(heights) * 1.2)
    axes.xaxis.set_major_locator(FixedLocator(places))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_minor_formatter(NullFormatter())
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(FuncFormatter(lambda number, _: f"{number:g}"))
    axes.grid(which="major", color=FAINT, linewidth=0.5, alpha=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(which="both", length=0)
    for name, height in _apart(axes, ends).items():
        axes.annotate(name, (1.02, height), xycoords="axes fraction", color=colours[name], va="center", fontsize=8.5)


def _apart(axes: Axes, ends: dict[str, float]) -> dict[str, float]:
    """Where labels of the ends of lines go, as shares of the plot's height, so that none covers another."""
    low, high = np.log(axes.get_ylim())
    names = sorted(ends, key=lambda name: ends[name])
    wanted = [(float(np.log(ends[name])) - low) / (high - low) for name in names]
    # Each group of labels that touch is spread around its middle, and joined with the next that it comes to touch.
    groups: list[list[float]] = []
    for place in wanted:
        groups.append([place])
        while len(groups) > 1 and _reach(groups[-2], 1) + GAP > _reach(groups[-1], -1):
            groups[-2:] = [groups[-2] + groups[-1]]
    spread = [_reach(group, -1) + index * GAP for group in groups for index in range(len(group))]
    return dict(zip(names, spread, strict=True))


def _reach(group: list[float], side: int) -> float:
    """The lowest (-1) or highest (1) label of a group."""
    return float(np.mean(group)) + side * GAP * (len(group) - 1) / 2
