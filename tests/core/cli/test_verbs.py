"""Every command on a real artifact of a tiny model."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

RECIPE = """\
name: {name}
model:
  hf: {{model: model}}
transforms:
  - quantize.rtn: {{bits: {bits}}}
batching:
  static: {{max_batch_size: 2}}
max_length: 96
evaluation: {{dataset: {{text_file: {{path: text.txt}}}}, tokens: 256, context_length: 64}}
benchmark: {{prompt_tokens: 16, output_tokens: 8, blocks: 3}}
gates: []
"""
DEQUANTIZED = "(not native; dequantized when opened, so only files shrink)"
METRICS = {
    "perplexity",
    "kl",
    "kl_p99",
    "top1_agreement",
    "decode_tokens_per_second",
    "prefill_tokens_per_second",
    "ttft_ms",
    "tpot_ms",
    "latency_s",
    "size_bytes",
    "peak_memory_bytes",
}
SPEED = METRICS - {"perplexity", "kl", "kl_p99", "top1_agreement"}


@pytest.fixture(scope="module")
def made(furnished):
    """The folder with `made/eight` and `made/four`, and what `apply` answered when it made them."""
    from optkit.cli import main

    answers = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(furnished)
        patch.setenv("OPTKIT_CACHE", str(furnished / "cache"))
        for name, bits in (("eight", 8), ("four", 4)):
            Path(f"{name}.yaml").write_text(RECIPE.format(name=name, bits=bits))
            patch.setattr(sys, "argv", ["optkit", "apply", f"{name}.yaml", "--output", f"made/{name}", "--json"])
            with Path(f"{name}.out").open("w") as out, patch.context() as inner:
                inner.setattr(sys, "stdout", out)
                with pytest.raises(SystemExit) as end:
                    main()
            assert end.value.code == 0
            answers[name] = json.loads(Path(f"{name}.out").read_text())
        measure_quickly(patch)
    return furnished, answers


def measure_quickly(patch):
    """Real ceilings of this machine, tried for so short a time that they may be far too low."""
    from optkit import hardware
    from optkit.hardware import ceilings

    patch.setattr(ceilings, "SECONDS", 0.01)
    patch.setattr(ceilings, "SIZES", (128,))
    hardware.measure(lambda *_: None)


@pytest.fixture
def here(made, monkeypatch):
    """The current directory is that of the artifacts, with its cache."""
    folder, _ = made
    monkeypatch.chdir(folder)
    monkeypatch.setenv("OPTKIT_CACHE", str(folder / "cache"))
    return folder


@pytest.fixture
def ran(optkit):
    """`ran("inspect", "made/eight")`: its standard output, if all went well."""

    def run(*arguments):
        said = optkit(*arguments)
        assert said.code == 0, said.err
        return said.out

    return run


def columns_line_up(text: str) -> bool:
    """Whether every table in the text has its columns where its line of dashes says."""
    lines = text.splitlines()
    for number, line in enumerate(lines):
        if line and set(line) == {"-", " "}:
            gaps = [at for at, sign in enumerate(line) if sign == " "]
            rows = [lines[number - 1], *lines[number + 1 :]]
            rows = rows[: rows.index("")] if "" in rows else rows
            if any(row[at : at + 1].strip() for row in rows for at in gaps):
                return False
    return True


# ---- recipes


def test_plan_says_what_will_be_done(here, ran):
    lines = ran("plan", "eight.yaml").splitlines()
    assert lines[:5] == [
        "model    model: 115.0 k parameters, arch:llama task:causal-lm weights:float",
        "step 1   quantize.rtn: weights:int8-channel",
        "backend  torch",
        "         weights:float -> torch.nn.functional.linear in float32 (native)",
        f"         weights:int8-channel -> torch.nn.functional.linear in float32 {DEQUANTIZED}",
    ]
    assert lines[5] == "batching static: 2 sequences of up to 96 tokens"
    assert lines[6].startswith("needs    about ")
    assert lines[-1] == "Next: optkit apply eight.yaml"


def test_plan_shows_the_gates_in_the_recipes_words(here, ran):
    recipe = Path("eight.yaml").read_text().replace("gates: []", "gates:\n  - {metric: perplexity, at_most: +3%}")
    Path("gated.yaml").write_text(recipe + "  - {metric: kl, at_most: 0.1}\n")
    lines = ran("plan", "gated.yaml").splitlines()
    assert "gate     perplexity at_most +3%" in lines
    assert "gate     kl at_most 0.1" in lines


def test_plan_for_scripts(here, ran, tiny_llama):
    plan = json.loads(ran("plan", "eight.yaml", "--json"))
    assert plan["model"]["parameters"] == sum(p.numel() for p in tiny_llama().module.parameters())
    assert [step["name"] for step in plan["steps"]] == ["quantize.rtn"]
    assert plan["limits"] == {"max_batch_size": 2, "max_length": 96, "kv_cache_tokens": None}
    assert plan["lowering"]["weights:int8-channel"]["native"] is False
    assert plan["recipe"]["transforms"][0]["quantize.rtn"]["symmetric"] is True
    assert all(value > 0 for value in plan["estimate"].values())


def test_no_is_a_name_and_not_false(here, ran):
    Path("country.yaml").write_text(RECIPE.format(name="no", bits=8))
    assert json.loads(ran("plan", "country.yaml", "--json"))["recipe"]["name"] == "no"


def test_apply_answers_with_its_report(made):
    _, answers = made
    answer = answers["eight"]
    assert answer["artifact"] == str(made[0] / "made/eight")
    assert answer["existed"] is False
    assert set(answer["report"]["metrics"]) == METRICS
    assert answer["report"]["parity"]["distance"] <= answer["report"]["parity"]["tolerance"]


def test_a_second_apply_says_that_all_is_there(here, optkit):
    before = Path("made/eight/manifest.json").read_bytes()
    said = optkit("apply", "eight.yaml", "--output", "made/eight")
    assert said.code == 0
    assert "Already there: made/eight" in said.out
    assert 'optkit generate made/eight "' in said.out.splitlines()[-1]
    assert columns_line_up(said.out)
    assert Path("made/eight/manifest.json").read_bytes() == before
    again = json.loads(optkit("apply", "eight.yaml", "--output", "made/eight", "--json").out)
    assert again["existed"] is True


def test_an_apply_elsewhere_finds_every_step_in_the_cache(here, optkit):
    said = optkit("apply", "eight.yaml", "--output", "made/copy")
    assert said.code == 0
    steps = [line for line in said.err.splitlines() if line.startswith("  ")]
    assert steps
    assert all(line.endswith(": cached") for line in steps)
    assert "Published: made/copy" in said.out


def test_a_missed_gate_is_exit_code_1_and_nothing_is_published(here, optkit):
    text = Path("eight.yaml").read_text().replace("gates: []", "gates: [{metric: size_bytes, at_most: 0.01x}]")
    Path("strict.yaml").write_text(text)
    said = optkit("apply", "strict.yaml", "--output", "made/strict")
    assert said.code == 1
    line = said.err.splitlines()[-1]
    assert line.startswith("optkit: ")
    assert "gate size_bytes at_most 0.01x: is 0." in line
    assert "kept aside at" in line
    assert not Path("made/strict").exists()
    assert Path("made/strict.rejected/manifest.json").exists()


def test_the_schema_knows_what_is_installed(here, ran):
    schema = json.loads(ran("schema"))
    assert schema["$schema"].endswith("2020-12/schema")
    text = ran("schema", "--output", "schema.json")
    assert text.splitlines()[0] == "wrote schema.json"
    assert json.loads(Path("schema.json").read_text()) == schema
    references = {part["$ref"] for part in parts_of(schema) if "$ref" in part}
    assert {reference.removeprefix("#/$defs/") for reference in references} <= schema["$defs"].keys()
    named = {key for variant in schema["$defs"]["plugin.transform"]["oneOf"] for key in variant.get("properties", {})}
    assert {"quantize.rtn", "prune.magnitude"} <= named
    assert schema["required"] == ["model"]
    assert schema["additionalProperties"] is False


def parts_of(node):
    """Every mapping in it."""
    if isinstance(node, dict):
        yield node
    for child in node.values() if isinstance(node, dict) else node if isinstance(node, list) else ():
        yield from parts_of(child)


# ---- artifacts


def test_inspect_says_what_is_in_it(here, ran):
    text = ran("inspect", "made/eight")
    lines = text.splitlines()
    assert lines[0] == "eight: every file is what the manifest says"
    assert "tags         arch:llama task:causal-lm weights:float weights:int8-channel" in lines
    assert "backend      torch" in lines
    assert "limits       2 sequences of up to 96 tokens" in lines
    assert any(line.startswith("1 quantize.rtn ") for line in lines)
    assert any(line.startswith("perplexity ") for line in lines)
    assert columns_line_up(text)
    found = json.loads(ran("inspect", "made/eight", "--json"))
    assert found["manifest"]["name"] == "eight"
    assert set(found["report"]["metrics"]) == METRICS


def test_explain_says_which_kernel_ran_each_layer(here, ran):
    text = ran("explain", "made/eight")
    assert "weights:int8-channel -> torch.nn.functional.linear in float32 " + DEQUANTIZED in text
    assert columns_line_up(text)
    found = json.loads(ran("explain", "made/eight", "--json", "--prompt-tokens", "8"))
    rows = {row["layers"]: row for row in found["rows"]}
    assert rows["model.layers.*.mlp.up_proj"]["kernel"] == "Linear"
    assert rows["model.layers.*.mlp.up_proj"]["calls"] == 2
    assert sum(row["share"] for row in found["rows"]) == pytest.approx(1)
    assert found["ceiling_gb_per_s"] > 0
    assert found["what"] == "decode step after 8 tokens"


@pytest.mark.parametrize("options", [[], ["--raw"], ["--temperature", "0.9", "--seed", "3"]])
def test_generate_streams_what_it_decodes(here, ran, options):
    told = ["generate", "made/eight", "What is the capital of France?", "--max-tokens", "24", *options]
    answer = json.loads(ran(*told, "--json"))
    assert ran(*told) == answer["text"] + "\n"
    assert 1 <= answer["output_tokens"] <= 24
    assert answer["finish_reason"] in {"length", "stop"}
    assert answer["text"] == reference(here / "made/eight/weights", told[2], options, answer["output_tokens"])


def reference(weights, prompt, options, count):
    """The same answer by the engine itself, decoded as a whole."""
    import optkit_backends.torch as backend
    from optkit.engine import Engine, Request, SamplingParams
    from optkit.engine.text import chat, encode, end_tokens, load_tokenizer
    from optkit.steps import Limits
    from optkit_batching.static import Static

    tokenizer = load_tokenizer(weights)
    sampled = "--temperature" in options
    params = SamplingParams(max_tokens=24, temperature=0.9 if sampled else 0.0, top_p=1.0, seed=3 if sampled else 0)
    tokens = encode(tokenizer, prompt if "--raw" in options else chat(prompt))
    with backend.Torch().open(weights.parent / "runtime", weights, Limits(2, 96)) as session:
        engine = Engine(session, Static(max_batch_size=2), end_tokens=end_tokens(weights, tokenizer))
        output = [event.token for event in engine.stream(Request(tokens, params))]
    assert len(output) == count
    return tokenizer.decode(output, skip_special_tokens=True)


def test_the_chat_template_is_used_unless_raw(here, ran):
    told = ["generate", "made/eight", "Paris", "--max-tokens", "1", "--json"]
    chat, raw = json.loads(ran(*told)), json.loads(ran(*told, "--raw"))
    assert chat["prompt_tokens"] > raw["prompt_tokens"]


@pytest.mark.parametrize("draft", ["lookup", "made/eight"])
def test_guesses_change_no_answer(here, ran, draft):
    told = ["generate", "made/eight", "Paris", "--max-tokens", "16"]
    assert ran(*told, "--draft", draft) == ran(*told)


def test_a_prompt_that_does_not_fit_is_refused(here, optkit):
    line = "optkit: generate: the artifact holds 96 tokens, the prompt takes {}; shorten the prompt{}\n"
    said = optkit("generate", "made/eight", "Z" * 96, "--raw")
    assert (said.code, said.out, said.err) == (2, "", line.format(96, ""))
    said = optkit("generate", "made/eight", "Z" * 40, "--raw", "--max-tokens", "57")
    assert (said.code, said.out, said.err) == (2, "", line.format(40, ", or lower --max-tokens to 56"))


def test_without_a_limit_an_answer_takes_what_room_there_is(here, ran):
    answer = json.loads(ran("generate", "made/eight", "Paris", "--raw", "--json"))
    assert answer["finish_reason"] == "stop" or answer["prompt_tokens"] + answer["output_tokens"] == 96


# ---- measuring


def test_bench_measures_and_keeps_its_samples(here, ran):
    told = ["bench", "made/eight", "--blocks", "3", "--output-tokens", "8", "--samples", "runs.jsonl"]
    found = json.loads(ran(*told, "--json"))
    assert found["reference"] == "baseline"
    assert set(found["figures"]["made/eight"]) == SPEED
    head, *runs = [json.loads(line) for line in Path("runs.jsonl").read_text().splitlines()]
    assert head["workload"] == {"prompt_tokens": 16, "output_tokens": 8, "blocks": 3, "seed": 0}
    assert len(runs) == 3 * 2 * 3
    assert {run["arm"] for run in runs} == {"baseline", "made/eight", "made/eight (again)"}


def test_eval_measures_quality_alone(here, ran):
    found = json.loads(ran("eval", "made/four", "--json"))
    assert set(found["figures"]["made/four"]) == METRICS - SPEED
    text = ran("eval", "made/four")
    assert text.startswith("made/four beside baseline\n\nmetric ")
    assert columns_line_up(text)


def test_eval_agrees_with_what_apply_measured(here, made, ran):
    found = json.loads(ran("eval", "made/four", "--json"))["figures"]["made/four"]
    reported = made[1]["four"]["report"]["metrics"]
    for name in METRICS - SPEED:
        assert found[name]["value"] == pytest.approx(reported[name]["value"], rel=1e-4)


def test_compare_measures_beside_the_first(here, ran):
    found = json.loads(ran("compare", "made/eight", "made/four", "--blocks", "3", "--json"))
    assert found["reference"] == "made/eight"
    assert list(found["figures"]) == ["made/four"]
    assert set(found["figures"]["made/four"]) == METRICS
    assert found["figures"]["made/four"]["size_bytes"]["ratio"]["value"] < 1


@pytest.mark.parametrize("command", ["bench made/four", "compare made/eight made/four"])
def test_lengths_that_do_not_fit_are_refused_before_the_work(here, optkit, command):
    said = optkit(*command.split(), "--prompt-tokens", "90")
    where = command.split()[1]
    line = f"optkit: {where}: holds 96 tokens, prompt and output need 98; lower --prompt-tokens or --output-tokens\n"
    assert (said.code, said.out, said.err) == (2, "", line)


def test_a_baseline_that_is_gone_is_named(here, optkit):
    Path("model").rename("elsewhere")
    try:
        said = optkit("eval", "made/four")
    finally:
        Path("elsewhere").rename("model")
    assert (said.code, said.out) == (4, "")
    assert said.err.startswith("optkit: model: neither a folder nor available from the hub")


def test_samples_that_cannot_be_written_are_refused_before_the_work(here, optkit):
    said = optkit("bench", "made/eight", "--samples", "text.txt/runs.jsonl")
    assert said.code == 5
    assert said.err.splitlines() == [
        "optkit: text.txt/runs.jsonl: cannot be written (Not a directory); choose another file"
    ]


# ---- the machine


def test_plugins_are_listed(here, ran):
    text = ran("plugins", "list")
    assert columns_line_up(text)
    rows = {tuple(line.split()[:2]): line.split() for line in text.splitlines()[2:]}
    assert rows["transform", "quantize.rtn"][-1] == "ready"
    found = json.loads(ran("plugins", "list", "--json"))
    assert {"backend", "transform"} < {plugin["kind"] for plugin in found["plugins"]}
    assert {"kind": "backend", "name": "torch"}.items() <= next(
        plugin.items() for plugin in found["plugins"] if plugin["name"] == "torch"
    )
    assert found["broken"] == found["blocked"] == []


def test_a_plugin_is_shown_with_its_options(here, ran):
    text = ran("plugins", "show", "quantize.rtn")
    assert text.startswith("transform quantize.rtn\n\nWeight-only quantization")
    assert any(line.startswith("bits ") and " 8 " in line for line in text.splitlines())
    assert any(line.startswith("symmetric ") and " true " in line for line in text.splitlines())
    found = json.loads(ran("plugins", "show", "quantize.rtn", "--json"))
    assert found["kind"] == "transform"
    assert set(found["schema"]["properties"]) >= {"bits", "targets"}
    assert "No options." in ran("plugins", "show", "torch_compile")


def test_a_plugin_can_be_left_out(here, ran):
    text = ran("--block", "quantize", "--block", "prune", "plugins", "list")
    assert "quantize.rtn" not in text
    assert text.splitlines()[-1] == "left out: prune, quantize"


GREETING = """
    from optkit.hookspecs import hookimpl

    @hookimpl
    def register_commands(app):
        @app.command("greet")
        def greet(name: str):
            "Say hello."
            print(f"hello {name}")

        @app.command("plan")
        def plan():
            "Take over."
            raise SystemExit(99)
"""


def test_a_strangers_command_stands_beside_ours(here, site, ran, optkit):
    site("optkit_greet", GREETING)
    assert ran("greet", "world") == "hello world\n"
    help_text = ran("--help")
    assert "greet     Say hello." in help_text
    assert "Take over" not in help_text
    assert "Next: optkit apply" in ran("plan", "eight.yaml")
    assert optkit("--no-plugins", "greet", "world").code == 2
    assert optkit("--block", "optkit_greet", "greet", "world").code == 2


def test_a_broken_plugin_is_named_and_takes_nothing_down(here, site, optkit):
    site("optkit_bad", "import a_library_that_is_not_there")
    site(
        "optkit_rude", "from optkit.hookspecs import hookimpl\n@hookimpl\ndef register_commands(app): raise OSError(5)"
    )
    said = optkit("plugins", "list", "--json")
    assert said.code == 0
    reason = "ModuleNotFoundError: No module named 'a_library_that_is_not_there'"
    assert said.err == f"optkit: plugin 'optkit_bad' of optkit_bad 1.2 is left out: {reason}\n"
    (broken,) = json.loads(said.out)["broken"]
    assert broken["plugin"] == "optkit_bad"
    said = optkit("--help")
    assert said.code == 0
    assert "optkit_rude" in said.err
    assert "Traceback" not in said.err
    assert optkit("--no-plugins", "plugins", "list").err == ""


def test_sys_describes_this_machine(here, ran):
    from optkit import hardware

    found = json.loads(ran("sys", "--json"))
    assert found["machine"]["cores"] == hardware.usable_cores()
    assert found["peaks"] == hardware.peaks().model_dump()
    text = ran("sys")
    labels = [line[:11] for line in text.splitlines()]
    assert all(label.endswith(" ") and label.strip() for label in labels)
    assert f"{found['peaks']['read_gb_per_s']:.1f} GB/s" in text


def test_sys_measures_what_is_not_kept(here, optkit, tmp_path, monkeypatch):
    from optkit.hardware import ceilings

    monkeypatch.setenv("OPTKIT_CACHE", str(tmp_path / "fresh"))
    monkeypatch.setattr(ceilings, "SECONDS", 0.01)
    monkeypatch.setattr(ceilings, "SIZES", (128,))
    said = optkit("sys", "--refresh")
    assert said.code == 0
    assert said.err == "  measure ceilings: done\n"
    assert list((tmp_path / "fresh/peaks").glob("*.json"))


def test_the_cache_is_listed_and_cleared(here, ran, optkit, tmp_path, monkeypatch):
    monkeypatch.setenv("OPTKIT_CACHE", str(tmp_path / "fresh"))
    assert ran("cache", "list") == f"nothing is kept in {tmp_path}/fresh/steps\n"
    assert json.loads(ran("cache", "list", "--json")) == []
    from optkit.apply.cache import StepCache, key_of

    key = key_of(step="one")
    StepCache().run(key, "1 quantize.rtn", lambda folder: {"bytes": (folder / "a").write_bytes(bytes(2_000_000))})
    (entry,) = json.loads(ran("cache", "list", "--json"))
    assert (entry["step"], entry["key"]) == ("1 quantize.rtn", key)
    text = ran("cache", "list")
    assert columns_line_up(text)
    assert "1 quantize.rtn  2.0 MB  " in text
    assert ran("cache", "clear", "--unused-for", "1") == "freed 0 B\n"
    assert ran("cache", "clear") == "freed 2.0 MB\n"
    assert json.loads(ran("cache", "list", "--json")) == []


def test_every_command_says_in_one_line_what_it_does(ran):
    import typer

    from optkit.cli.app import app

    pages = ["--help", "plugins --help", "cache --help"]
    for page in pages:
        text = ran(*page.split())
        assert "..." not in text.partition("Commands:")[2]
        assert max(map(len, text.splitlines())) <= 80
    group = typer.main.get_command(app)
    commands = [*group.commands.values(), *group.commands["plugins"].commands.values()]
    for command in [*commands, *group.commands["cache"].commands.values()]:
        assert command.get_short_help_str(64).endswith(".")
        for parameter in command.params:
            assert parameter.help or parameter.name == "help"


def test_optkit_alone_helps(ran):
    assert ran() == ran("--help")
    assert ran("plugins") == ran("plugins", "--help")
    import optkit

    assert ran("--version") == f"optkit {optkit.__version__}\n"


def test_a_bug_keeps_its_traceback(here, optkit, monkeypatch):
    monkeypatch.setattr("optkit.artifact.open_artifact", lambda _: 1 / 0)
    said = optkit("inspect", "made/eight")
    assert said.code == 70
    assert "Traceback" in said.err
    assert "ZeroDivisionError" in said.err
    assert said.err.splitlines()[-1].startswith("optkit: this is a bug")


def test_a_full_disk_is_the_machines_refusal(here, optkit, monkeypatch):
    def full(_):
        raise OSError(28, os.strerror(28), "made/eight/x")

    monkeypatch.setattr("optkit.artifact.open_artifact", full)
    said = optkit("inspect", "made/eight")
    assert (said.code, said.err) == (5, "optkit: made/eight/x: the system says: No space left on device\n")
