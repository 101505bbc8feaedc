"""`optkit inspect`, `optkit explain` and `optkit generate`: what works on one artifact."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import typer

from optkit.cli.present import emit_json, lowered_as, plugins_of, say, table
from optkit.cli.recipes import JsonOption, show_report
from optkit.quantities import size

__all__ = ["ArtifactArgument", "DraftOption", "add_to", "speculation_of"]

ArtifactArgument = Annotated[Path, typer.Argument(metavar="ARTIFACT", help="The artifact's directory.")]
DraftOption = Annotated[
    str | None,
    typer.Option(
        "--draft",
        metavar="ARTIFACT",
        help="Guess tokens and check several at a time: with a smaller artifact, or 'lookup' from the text so far.",
    ),
]


def add_to(app: typer.Typer) -> None:
    """Register the commands."""
    app.command("inspect")(inspect_artifact)
    app.command("explain")(explain_artifact)
    app.command("generate")(generate)


def inspect_artifact(artifact: ArtifactArgument, as_json: JsonOption = False) -> None:
    """Verify an artifact, and say what is in it and how it was made."""
    from optkit.artifact import open_artifact
    from optkit.measure import task_of

    opened = open_artifact(artifact)
    manifest, report = opened.manifest, opened.report()
    if as_json:
        emit_json({"manifest": manifest.model_dump(), "report": report})
        return
    say(f"{manifest.name}: every file is what the manifest says")
    say(f"tags         {' '.join(manifest.tags)}")
    say(f"backend      {next(iter(manifest.recipe['backend']))}")
    task = task_of(manifest.tags)
    say(f"limits       {task.batch_in_words(manifest.max_batch_size, manifest.max_length)}")
    say(f"weights for  {', '.join(manifest.servable_by)}")
    for part in ("weights", "runtime"):
        bytes_of_part = sum(record.bytes for name, record in manifest.files.items() if name.startswith(f"{part}/"))
        say(f"{part + '/':12} {size(bytes_of_part)}")
    say()
    table(
        ("step", "plugin of", "seconds", "key"),
        [(s.step, f"{s.distribution} {s.version}", f"{s.seconds:.1f}", s.key[:12]) for s in manifest.steps],
        right=(2,),
    )
    say()
    show_report(report)


def explain_artifact(
    context: typer.Context,
    artifact: ArtifactArgument,
    prompt_tokens: Annotated[
        int | None,
        typer.Option(min=1, help="Tokens in the KV cache before the step, or of each sequence to encode; 64."),
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Sequences in the step, or images.")] = 1,
    as_json: JsonOption = False,
) -> None:
    """Say which kernel runs each layer, and how near to its ceiling.

    Profiles one decode step, or one batch of an encoder or image classifier. The ceiling is memory bandwidth, each
    weight read once, or matrix products in float32 or int8: what is nearer. `optkit sys` measures them.
    """
    from optkit.artifact import open_artifact
    from optkit.bench import explain
    from optkit.cli.system import peaks_of_machine

    opened, peaks = open_artifact(artifact), peaks_of_machine()
    found = explain(opened, plugins_of(context), peaks, prompt_tokens=prompt_tokens, batch_size=batch_size)
    if as_json:
        emit_json(found.to_dict())
        return
    for tag, lowered in found.lowering.items():
        say(lowered_as(tag, lowered["kernel"], lowered["native"], lowered["reason"]))
    say()
    table(
        ("layers", "kernel", "calls", "ms", "share of step", "GB/s", "GFLOP/s", "of ceiling"),
        [
            (
                row.layers,
                row.kernel,
                str(row.calls),
                f"{row.seconds * 1e3:.2f}",
                f"{row.share:.0%}",
                f"{row.gb_per_second:.1f}" if row.gb_per_second else "",
                f"{row.gflop_per_second:.0f}" if row.gflop_per_second else "",
                f"{row.of_ceiling:.0%}" if row.of_ceiling else "",
            )
            for row in found.rows
        ],
        right=(2, 3, 4, 5, 6, 7),
    )
    ceilings = f"{found.ceiling_gb_per_s:.1f} GB/s, {found.ceiling_gflop_per_s:.0f} GFLOP/s"
    if found.ceiling_integer_gop_per_s:
        ceilings += f", {found.ceiling_integer_gop_per_s:.0f} GOP/s of int8"
    say(f"\n{found.what} under the profiler: {found.seconds * 1e3:.1f} ms; ceilings {ceilings}")


def generate(
    context: typer.Context,
    artifact: ArtifactArgument,
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="What to say to the model.")],
    max_tokens: Annotated[
        int | None, typer.Option(min=1, help="Output tokens at most; 128 by default, or what there is room for.")
    ] = None,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 takes the most likely token.")] = 0.0,
    top_p: Annotated[float, typer.Option(min=0.01, max=1.0, help="Nucleus sampling.")] = 1.0,
    seed: Annotated[int, typer.Option(min=0, help="Fixes the draws.")] = 0,
    raw: Annotated[
        bool, typer.Option("--raw", help="Continue the prompt as it is, without the chat template.")
    ] = False,
    draft: DraftOption = None,
    as_json: JsonOption = False,
) -> None:
    """Answer one prompt, word by word.

    The prompt goes through the model's chat template, where it has one.
    """
    from optkit.engine import SamplingParams
    from optkit.engine.opened import open_engine
    from optkit.engine.outputs import Collector
    from optkit.engine.text import Prompt, chat, encode
    from optkit.errors import MachineError, RecipeError

    with open_engine(artifact, plugins_of(context), speculation_of(draft)) as opened:
        engine = opened.engine
        words: Prompt = prompt if raw or not engine.tokenizer.chat_template else chat(prompt)
        tokens = encode(engine.tokenizer, words)
        room = opened.max_length - len(tokens)
        if room < (max_tokens or 1):
            raise RecipeError(
                f"the artifact holds {opened.max_length} tokens, the prompt takes {len(tokens)}",
                where="generate",
                remedy="shorten the prompt" + (f", or lower --max-tokens to {room}" if room > 0 else ""),
            )
        params = SamplingParams(
            max_tokens=max_tokens or min(128, room), temperature=temperature, top_p=top_p, seed=seed
        )
        collector, completion = Collector(params, len(tokens)), None
        engine.add(tokens, params)
        while engine.busy:
            for delta in engine.step():
                completion = collector.add(delta)
                if not as_json:
                    typer.echo(delta.text, nl=False)
            if engine.wait:
                time.sleep(engine.wait)
    assert completion is not None
    if completion.error:
        raise MachineError(f"the model failed ({completion.error})", where=str(artifact))
    if as_json:
        emit_json(
            {
                "text": completion.text,
                "prompt_tokens": completion.prompt_tokens,
                "output_tokens": len(completion.samples[0].tokens),
                "finish_reason": completion.samples[0].finish_reason,
            }
        )
    else:
        say()


def speculation_of(draft: str | None) -> Any:
    """What `--draft` asks for."""
    from optkit.engine.opened import Speculation

    return None if draft is None else Speculation(draft=None if draft == "lookup" else draft)
