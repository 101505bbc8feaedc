"""Many prompts in, as many completions out: `optkit.LLM` on a real, tiny model."""

from __future__ import annotations

import json

import pytest

import optkit
from optkit import LLM, SamplingParams, Speculation, Structure
from optkit.artifact import open_artifact, publish, staging
from optkit.errors import MissingError, RecipeError, RequestError
from optkit.weights import save_folder

PROMPTS = ["The quick brown fox", "What is the capital of France?", (7, 42, 99), [{"role": "user", "content": "0 1 2"}]]


@pytest.fixture
def llm(real):
    with LLM(real) as opened:
        yield opened


def test_completions_come_in_the_order_of_their_prompts(llm):
    params = [SamplingParams(max_tokens=count, ignore_eos=True) for count in (20, 3, 11, 6)]
    together = llm.generate(PROMPTS, params)
    assert [len(one.samples[0].tokens) for one in together] == [20, 3, 11, 6]
    apart = [llm.generate(prompt, wish)[0] for prompt, wish in zip(PROMPTS, params, strict=True)]
    assert [one.samples for one in together] == [one.samples for one in apart]
    assert llm.stats.used_blocks == 0


def test_text_is_what_the_tokens_are(llm):
    (completion,) = llm.generate("The quick brown fox", SamplingParams(max_tokens=30, ignore_eos=True))
    tokenizer = llm._engine.tokenizer
    (sample,) = completion.samples
    assert completion.text == sample.text == tokenizer.decode(sample.tokens, skip_special_tokens=True)
    assert (completion.prompt_tokens, completion.error, sample.finish_reason) == (
        len(tokenizer("The quick brown fox").input_ids),
        "",
        "length",
    )


def test_progress_counts_completions(llm):
    seen = []
    llm.generate(PROMPTS, SamplingParams(max_tokens=4), progress=lambda done, total: seen.append((done, total)))
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_the_same_seed_gives_the_same_text_whatever_else_runs(llm):
    params = SamplingParams(max_tokens=12, temperature=3.0, seed=7, ignore_eos=True)
    alone = llm.generate(PROMPTS[0], params)[0].samples
    crowd = llm.generate([*PROMPTS[1:], PROMPTS[0]], [SamplingParams(max_tokens=9, temperature=1.0)] * 3 + [params])
    assert crowd[-1].samples == alone
    assert llm.generate(PROMPTS[0], params.model_copy(update={"seed": 8}))[0].samples != alone
    free = params.model_copy(update={"seed": None})
    assert llm.generate(PROMPTS[0], free)[0].text != llm.generate(PROMPTS[0], free)[0].text


def test_the_best_of_several_samples_have_the_highest_mean_log_probability(llm):
    drawn = SamplingParams(max_tokens=5, temperature=2.0, seed=3, n=4, logprobs=0, ignore_eos=True)
    every = llm.generate(PROMPTS[0], drawn)[0].samples
    best = llm.generate(PROMPTS[0], drawn.model_copy(update={"n": 2, "best_of": 4, "logprobs": None}))[0].samples
    expected = sorted(every, key=lambda one: one.cumulative_logprob, reverse=True)[:2]
    assert len({one.tokens for one in every}) == 4
    assert [one.tokens for one in best] == [one.tokens for one in expected]
    assert [one.index for one in best] == [0, 1]
    assert best[0].cumulative_logprob == expected[0].cumulative_logprob
    assert best[0].logprobs is None


def test_text_stops_before_a_stop_string(llm):
    params = SamplingParams(max_tokens=30, ignore_eos=True)
    whole = llm.generate(PROMPTS[0], params)[0].text
    stop = whole[9:12]
    (sample,) = llm.generate(PROMPTS[0], params.model_copy(update={"stop": (stop,)}))[0].samples
    assert sample.text == whole[: whole.index(stop)]
    assert sample.finish_reason == "stop"
    assert len(sample.tokens) < 30
    late = params.model_copy(update={"stop": (stop,), "min_tokens": 30})
    assert llm.generate(PROMPTS[0], late)[0].text == whole
    assert llm.stats.used_blocks == 0


def test_a_structure_is_kept(llm):
    schema = {"type": "object", "properties": {"a": {"type": "integer", "maximum": 9}}, "required": ["a"]}
    wishes = [Structure(json_schema=schema | {"additionalProperties": False}), Structure(regex="[ab]{5}c")]
    wishes.append(Structure(choice=("yes", "no")))
    one, two, three = (
        llm.generate(PROMPTS[0], SamplingParams(max_tokens=40, temperature=2.0, seed=1, structure=wish))[0].samples[0]
        for wish in wishes
    )
    assert isinstance(json.loads(one.text)["a"], int)
    assert (two.text[-1], set(two.text[:-1]) <= set("ab"), len(two.text)) == ("c", True, 6)
    assert three.text in ("yes", "no")
    assert {one.finish_reason, two.finish_reason, three.finish_reason} == {"stop"}


def test_log_probabilities_of_a_prompt_are_those_of_the_model(llm, tiny_llama):
    import torch

    prompt = (7, 42, 99, 5, 120, 33)
    (completion,) = llm.generate(prompt, SamplingParams(max_tokens=1, prompt_logprobs=1))
    with torch.inference_mode():
        logits = tiny_llama().module(torch.tensor([prompt])).logits[0].log_softmax(-1)
    expected = [float(logits[place, token]) for place, token in enumerate(prompt[1:])]
    assert [one.token for one in completion.prompt_logprobs] == list(prompt[1:])
    assert [one.logprob for one in completion.prompt_logprobs] == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("draft", ["lookup", "itself"])
def test_guessing_changes_nothing_but_the_number_of_steps(real, llm, draft):
    speculation = Speculation(draft=str(real) if draft == "itself" else None, tokens=3)
    with LLM(real, speculation=speculation) as guessing:
        for temperature in (0.0, 1.0):
            params = SamplingParams(max_tokens=24, ignore_eos=True, temperature=temperature, seed=5)
            plain = llm.generate(PROMPTS, params)
            assert [one.samples for one in guessing.generate(PROMPTS, params)] == [one.samples for one in plain]
            if temperature == 0:
                assert guessing.stats.accepted > 0
                assert draft == "lookup" or guessing.stats.steps < llm.stats.steps / 3, "a model knows what it says"


def test_a_prompt_that_can_never_be_served_is_named_and_nothing_is_left_behind(llm):
    with pytest.raises(
        RequestError, match=r"^prompt 1: a prompt of 60 tokens and 10 output tokens make 70, a sequence"
    ):
        llm.generate([(1, 2), (1,) * 60], SamplingParams(max_tokens=10))
    assert not llm._engine.busy
    assert llm.stats.used_blocks == 0
    with pytest.raises(ValueError, match="2 params for 1 prompts"):
        llm.generate("a", [SamplingParams()] * 2)


def test_an_interrupt_leaves_nothing_behind(llm):
    def interrupt(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        llm.generate(
            PROMPTS, [SamplingParams(max_tokens=n, ignore_eos=True) for n in (20, 2, 20, 20)], progress=interrupt
        )
    assert not llm._engine.busy
    assert llm.stats.used_blocks == 0
    assert llm.generate(PROMPTS[0], SamplingParams(max_tokens=3))[0].text


def test_what_is_no_artifact_or_no_fitting_draft_is_refused(real, tmp_path, tiny_llama):
    with pytest.raises(MissingError, match="no artifact here"):
        LLM(tmp_path / "nothing")
    manifest = open_artifact(real).manifest
    with staging(tmp_path / "other") as staged:
        (staged / "runtime").mkdir()
        save_folder(tiny_llama(vocab_size=400), staged / "weights")
        facts = {key: getattr(manifest, key) for key in type(manifest).model_fields}
        publish(staged, tmp_path / "other", {k: v for k, v in facts.items() if k not in ("format", "digest", "files")})
    with pytest.raises(RecipeError, match="the draft has a vocabulary of 400 tokens, the model one of"):
        LLM(real, speculation=Speculation(draft=str(tmp_path / "other")))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"max_tokens": 0}, "greater than or equal to 1"),
        ({"temperature": -1.0}, "greater than or equal to 0"),
        ({"top_p": 0.0}, "greater than 0"),
        ({"top_p": 1.1}, "less than or equal to 1"),
        ({"n": 3, "best_of": 2}, "best_of draws 2 samples and n gives 3 back"),
        ({"min_tokens": 9, "max_tokens": 8}, "min_tokens is 9 and max_tokens 8"),
        ({"stop": ["a", ""]}, "an empty string would stop at once"),
        ({"structure": {"regex": "a", "choice": ["b"]}}, "exactly one of json_schema, regex, choice and grammar"),
        ({"top_q": 1}, "Extra inputs are not permitted"),
    ],
)
def test_impossible_parameters_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        SamplingParams(**fields)


def test_the_package_gives_its_names_when_they_are_asked_for():
    for name in optkit.__all__:
        assert getattr(optkit, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        optkit.Nothing  # noqa: B018
