"""Whatever the model prefers, its output fits the structure."""

from __future__ import annotations

import json
import re
from typing import Any

import numpy as np
import pytest

from optkit.engine import SamplingParams
from optkit.engine.request import Structure
from optkit.engine.sampler import Sampler
from optkit.engine.structure import Matcher, Structures, allowed_tokens
from optkit.errors import RequestError

VOCAB = 330
"""Of the model: its last tokens are none of the tokenizer's."""
OTHER_END = 5

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["red", "green"]}, "maxItems": 3},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def structures(tiny_tokenizer: Any) -> Structures:
    return Structures(tiny_tokenizer, VOCAB, {tiny_tokenizer.eos_token_id, OTHER_END})


def random_logits(rows: int, seed: int) -> np.ndarray:
    return (np.random.default_rng(seed).normal(size=(rows, VOCAB)) * 3).astype(np.float32)


def generate(structures: Structures, structure: Structure, seed: int, **params: Any) -> list[int]:
    """What a model that has random preferences and none for an end says, without its end token."""
    sampler, matcher = Sampler(VOCAB, frozenset({2, OTHER_END})), structures.matcher(structure)
    wish = SamplingParams(**{"temperature": 1.0, "structure": structure} | params)
    handle = sampler.open(wish, [1], seed=seed, matcher=matcher)
    output: list[int] = []
    while not matcher.finished:
        assert len(output) < 500
        (token,) = sampler.sample(random_logits(1, 1000 * seed + len(output)), [handle], [1 + len(output)]).tokens
        sampler.accept([handle], [token])
        output.append(token)
    assert matcher.error == ""
    return output[:-1] if output[-1] in {2, OTHER_END} else output


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_json_fits_its_schema(structures, tiny_tokenizer, temperature):
    texts = set()
    for seed in range(15):
        output = generate(structures, Structure(json_schema=PERSON), seed, temperature=temperature)
        texts.add(tiny_tokenizer.decode(output))
        found = json.loads(tiny_tokenizer.decode(output))
        assert list(found) == ["name", "age", "tags"]
        assert len(found["name"]) <= 8
        assert 0 <= found["age"] <= 150
        assert isinstance(found["age"], int)
        assert len(found["tags"]) <= 3
        assert set(found["tags"]) <= {"red", "green"}
    assert len(texts) == 15


def test_json_does_not_go_on_with_spaces_for_ever(structures, tiny_tokenizer):
    matcher = structures.matcher(Structure(json_schema=PERSON))
    matcher.accept(tiny_tokenizer.convert_tokens_to_ids("{"))
    space = tiny_tokenizer.convert_tokens_to_ids("Ġ")
    spaces = 0
    while allowed_tokens([matcher], VOCAB)[0, space]:
        matcher.accept(space)
        spaces += 1
    assert 0 < spaces < 100


@pytest.mark.parametrize(
    "regex", [r"[a-f]{3,9}", r"([0-9]+)(,[a-z]\w?)*;", r'a/b "[^"\n]{0,30}"\n', r"^(yes|no)$", r"[äöü]{2,5}€"]
)
def test_text_matches_its_regex(structures, tiny_tokenizer, regex):
    for seed in range(15):
        text = tiny_tokenizer.decode(generate(structures, Structure(regex=regex), seed))
        assert re.fullmatch(regex, text), text


CHOICES = ("yes", "yes, of course", 'a "quoted"\nline \\ of / text', "naïve 😀", "no")


def test_a_choice_is_one_of_those_given_and_each_can_be(structures, tiny_tokenizer):
    found = {tiny_tokenizer.decode(generate(structures, Structure(choice=CHOICES), seed)) for seed in range(80)}
    assert found == set(CHOICES)


def test_text_follows_its_grammar(structures, tiny_tokenizer):
    grammar = 'start: "<" item ("," item){0,3} ">"\nitem: %json {"enum": [1, "a", null]}'
    for seed in range(5):
        text = tiny_tokenizer.decode(generate(structures, Structure(grammar=grammar), seed))
        assert re.fullmatch(r'<(1|"a"|null)(,(1|"a"|null)){0,3}>', text), text


def test_a_structure_is_one_thing():
    for given in ({}, {"regex": "a", "grammar": "start: /a/"}):
        with pytest.raises(ValueError, match="give exactly one of json_schema, regex, choice and grammar"):
            Structure(**given)


def test_what_must_be_nothing_is_nothing(structures):
    for structure in (Structure(regex=""), Structure(choice=("",))):
        assert generate(structures, structure, 0) == []
        assert generate(structures, structure, 0, min_tokens=3) == []


def test_every_end_token_is_allowed_where_the_structure_can_end_and_nowhere_else(structures, tiny_tokenizer):
    matcher = structures.matcher(Structure(choice=("ab", "abc")))
    a, b, c = tiny_tokenizer.convert_tokens_to_ids(["a", "b", "c"])
    assert np.flatnonzero(allowed_tokens([matcher], VOCAB)[0]).tolist() == [a]
    matcher.accept(a)
    matcher.accept(b)
    assert np.flatnonzero(allowed_tokens([matcher], VOCAB)[0]).tolist() == sorted([2, OTHER_END, c])
    assert not matcher.finished
    matcher.accept(OTHER_END)
    assert matcher.finished
    assert matcher.error == ""


def test_the_end_is_all_that_follows_a_complete_structure(structures, tiny_tokenizer):
    matcher = structures.matcher(Structure(choice=("ab",)))
    for token in tiny_tokenizer.convert_tokens_to_ids(["a", "b"]):
        assert not matcher.finished
        matcher.accept(token)
    assert matcher.finished
    assert np.flatnonzero(allowed_tokens([matcher], VOCAB)[0]).tolist() == [2, OTHER_END]


def test_tokens_that_the_tokenizer_does_not_know_are_never_allowed(structures, tiny_tokenizer):
    allowed = allowed_tokens([structures.matcher(Structure(regex=r"(.|\n)*"))], VOCAB)[0]
    assert allowed.sum() > 200
    assert not allowed[len(tiny_tokenizer) :].any()


@pytest.mark.parametrize("vocab", [250, 300, 320, 321, 4000])
def test_the_models_vocabulary_may_have_any_size(tiny_tokenizer, vocab):
    matcher = Structures(tiny_tokenizer, vocab).matcher(Structure(choice=("ab",)))
    allowed = allowed_tokens([matcher], vocab)
    assert allowed.shape == (1, vocab)
    assert np.flatnonzero(allowed).tolist() == [tiny_tokenizer.convert_tokens_to_ids("a")]


def test_samples_of_one_structure_go_their_own_ways(structures, tiny_tokenizer):
    structure = Structure(choice=("ab", "cd"))
    first, second = structures.matcher(structure), structures.matcher(structure)
    a, b, c, d = tiny_tokenizer.convert_tokens_to_ids(["a", "b", "c", "d"])
    first.accept(a)
    second.accept(c)
    third = structures.matcher(structure)
    allowed = allowed_tokens([first, third, second], VOCAB)
    assert [np.flatnonzero(row).tolist() for row in allowed] == [[b], [a, c], [d]]


def test_constrained_and_free_rows_share_a_batch(structures, tiny_tokenizer):
    sampler = Sampler(VOCAB)
    wishes = [Structure(choice=("ab",)), None, Structure(choice=("cd",))]
    matchers = [None if wish is None else structures.matcher(wish) for wish in wishes]
    handles = [sampler.open(SamplingParams(), [1], seed=0, matcher=matcher) for matcher in matchers]
    logits = random_logits(3, 0)
    found = sampler.sample(logits, handles, [1, 1, 1]).tokens
    a, b, c, d = tiny_tokenizer.convert_tokens_to_ids(["a", "b", "c", "d"])
    assert found == [a, int(logits[1].argmax()), c]
    sampler.accept(handles, found)
    assert sampler.sample(logits, handles, [2, 2, 2]).tokens == [b, found[1], d]
    sampler.close(handles[0])
    assert sampler.sample(logits[1:], handles[1:], [2, 2]).tokens == [found[1], d]


def test_a_structure_holds_even_where_the_model_thinks_it_impossible(structures, tiny_tokenizer):
    sampler = Sampler(VOCAB)
    logits = np.full((1, VOCAB), -np.inf, dtype=np.float32)
    logits[0, 7] = 1.0
    a = tiny_tokenizer.convert_tokens_to_ids("a")
    for temperature in (0.0, 1.0):
        matcher = structures.matcher(Structure(choice=("ab",)))
        handle = sampler.open(SamplingParams(temperature=temperature), [1], seed=0, matcher=matcher)
        assert sampler.sample(logits, [handle], [1]).tokens == [a]


def test_a_matcher_that_gives_up_says_why(tiny_tokenizer):
    from llguidance import LLMatcher, LLParserLimits
    from llguidance.hf import from_tokenizer

    grammar = LLMatcher.grammar_from_json_schema(PERSON)
    limits = LLParserLimits(max_lexer_states=5)
    matcher = Matcher(LLMatcher(from_tokenizer(tiny_tokenizer), grammar, log_level=0, limits=limits), 320)
    matcher.accept(tiny_tokenizer.convert_tokens_to_ids("{"))
    assert np.flatnonzero(allowed_tokens([matcher], 320)[0]).tolist() == [2]
    assert matcher.finished
    assert re.fullmatch(r"lexer error: too many states.*", matcher.error)


@pytest.mark.parametrize(
    ("structure", "reason"),
    [
        ({"json_schema": {"type": "nonsense"}}, "this json_schema cannot be followed: Invalid type: nonsense, found"),
        ({"json_schema": {"type": "object", "if": {}}}, 'Unimplemented keys: ["if"]'),
        ({"json_schema": {"type": "integer", "minimum": 3, "maximum": 1}}, "Unsatisfiable schema"),
        ({"regex": "a(b"}, "this regex cannot be followed: unclosed group, found 'a(b'; see https://"),
        ({"regex": "a(?=b)"}, "look-ahead"),
        ({"grammar": "start: nothing"}, "this grammar cannot be followed: at 1(8): unknown name"),
    ],
    ids=str,
)
def test_what_cannot_be_followed_is_refused_in_one_line(structures, structure, reason):
    with pytest.raises(RequestError) as refused:
        structures.matcher(Structure(**structure))
    assert str(refused.value).startswith("structure: this ")
    assert reason in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_tokenizer_of_another_kind_is_refused():
    with pytest.raises(RequestError, match="structure: this model's tokenizer cannot follow a structure: Only fast"):
        Structures([], 10).matcher(Structure(choice=("ab",)))
