"""Measures the quickstart artifact beside its baseline and writes `benchmarks/quickstart.json`.

Usage: python benchmarks/quickstart.py [ARTIFACT] [BLOCKS]
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path

from optkit import hardware
from optkit.cli.present import Steps
from optkit.measure import baseline_of, contest, contestant
from optkit.plugins import Plugins
from optkit.recipe import Benchmark


def main() -> None:
    """Measure and write."""
    path = Path(sys.argv[1] if len(sys.argv) > 1 else "artifacts/quickstart")
    blocks = int(sys.argv[2]) if len(sys.argv) > 2 else 20
    plugins = Plugins.load(third_party=False)
    optimized, artifact = contestant(path)
    recipe = artifact.manifest.recipe
    settings = Benchmark(**{**recipe["benchmark"], "blocks": blocks})
    contestants = [baseline_of(artifact, plugins), optimized]
    with Steps() as steps:
        figures, samples = contest(contestants, artifact, settings, plugins, steps, with_quality=True)
    data = {
        "measured": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": asdict(hardware.machine()),
        "recipe": recipe,
        "benchmark": settings.model_dump(),
        "figures": figures[optimized.name],
        "samples": [json.loads(line) for line in samples],
    }
    target = Path(__file__).with_suffix(".json")
    target.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    for name, figure in data["figures"].items():
        ratio = figure.get("ratio")
        change = f"{ratio['value']:.4g}x [{ratio['low']:.4g}, {ratio['high']:.4g}]" if ratio else ""
        print(f"{name:28} {figure['baseline']:>12.5g} {figure['value']:>12.5g}  {change}")
    print(f"wrote {target}")


if __name__ == "__main__":
    main()
