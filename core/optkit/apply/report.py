"""The report of an apply as rows of text, and as one self-contained HTML file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from html import escape
from typing import Any

from optkit.quantities import size

__all__ = ["TableRow", "render_html", "table_rows"]


@dataclass(frozen=True, slots=True)
class TableRow:
    """One metric, ready to print."""

    metric: str
    baseline: str
    value: str
    change: str
    """Ratio to the baseline with its 95% interval, or the interval of the value itself where the baseline is fixed."""
    verdict: str


def table_rows(metrics: Mapping[str, Mapping[str, Any]]) -> list[TableRow]:
    """The rows of a report's `metrics`."""
    return [_row(name, figure) for name, figure in metrics.items()]


def render_html(report: Mapping[str, Any]) -> str:
    """The report as one HTML page without scripts or references."""
    machine = report["machine"]
    rows = "\n".join(
        "<tr>"
        + "".join(f"<td>{escape(cell)}</td>" for cell in (r.metric, r.baseline, r.value, r.change, r.verdict))
        + "</tr>"
        for r in table_rows(report["metrics"])
    )
    gates = "\n".join(
        f"<li>{'passed' if gate['passed'] else 'FAILED'}: {escape(gate['message'])}</li>" for gate in report["gates"]
    )
    kernels = "\n".join(
        f"<li>{escape(tag)}: {escape(lowered['kernel'])}{'' if lowered['native'] else ' (dequantized)'}</li>"
        for tag, lowered in report["lowering"].items()
    )
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>optkit: {escape(report["name"])}</title><style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem;
  color-scheme: light dark }}
table {{ border-collapse: collapse; width: 100% }}
td, th {{ padding: .3rem .6rem; border-bottom: 1px solid #8886; text-align: left }}
</style></head><body>
<h1>{escape(report["name"])}</h1>
<table><thead><tr>
<th>metric</th><th>baseline</th><th>optimized</th><th>change [95% interval]</th><th>verdict</th>
</tr></thead>
<tbody>
{rows}
</tbody></table>
<h2>Gates</h2><ul>
{gates}
</ul><h2>Kernels</h2><ul>
{kernels}
</ul><h2>Machine</h2><p>measured {escape(report["measured"])} on
{escape(str(machine["cpu"]))}, {escape(str(machine["cores"]))} cores;
{escape(", ".join(f"{name} {version}" for name, version in machine["libraries"].items()))}</p>
</body></html>
"""


def _row(name: str, figure: Mapping[str, Any]) -> TableRow:
    if figure.get("withheld"):
        return TableRow(name, "", "", figure["withheld"], "withheld")
    unit, ratio = figure["unit"], figure.get("ratio")
    value, baseline = _quantity(figure["value"], unit), _quantity(figure["baseline"], unit)
    if ratio is not None:
        change = f"{ratio['value']:.3g}x" if unit == "B" or unit.endswith("/s") else f"{ratio['value']:.4f}x"
        change += "" if ratio["low"] == ratio["high"] else f" [{ratio['low']:.4g}, {ratio['high']:.4g}]"
    else:
        interval = figure["interval"]
        change = f"[{interval['low']:.4g}, {interval['high']:.4g}]"
    return TableRow(name, baseline, value, change, figure.get("verdict") or "")


def _quantity(value: float, unit: str) -> str:
    if unit == "B":
        return size(value)
    return f"{value:.4g} {unit}".strip()
