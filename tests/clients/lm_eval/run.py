"""Evaluates a model on the tasks beside this file: `run.py KIND ARGUMENTS BATCH`. Prints scores and outputs as JSON."""

import json
import os
import sys
from pathlib import Path

import datasets
import lm_eval
from lm_eval.tasks import TaskManager

TASKS = ["choice", "rolling", "generation"]


def main(kind: str, arguments: str, batch: str) -> None:
    place = Path(__file__).parent / "tasks"
    os.chdir(place)
    datasets.disable_progress_bars()
    found = lm_eval.simple_evaluate(
        model=kind,
        model_args=json.loads(arguments),
        tasks=TASKS,
        task_manager=TaskManager(include_path=str(place), include_defaults=False),
        batch_size=int(batch),
        # Intervals for scores that are compared to themselves are of no use, and take longer than the scores.
        bootstrap_iters=0,
    )
    scores = {
        f"{task}.{metric.partition(',')[0]}": value
        for task, values in found["results"].items()
        for metric, value in values.items()
        if isinstance(value, float) and "stderr" not in metric
    }
    outputs = {
        task: [one["resps"] for one in sorted(samples, key=lambda one: one["doc_id"])]
        for task, samples in found["samples"].items()
    }
    print(json.dumps({"scores": scores, "outputs": outputs}))


main(*sys.argv[1:])
