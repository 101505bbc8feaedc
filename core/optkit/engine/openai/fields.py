"""The bounded pieces that requests are made of. Every text, list and nesting has an end: none may cost without one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints, model_validator

from optkit.engine.request import Structure

__all__ = [
    "MAX_PROMPTS",
    "Label",
    "Metadata",
    "Name",
    "ResponseFormat",
    "Schema",
    "Small",
    "Stop",
    "StreamOptions",
    "Strict",
    "Text",
    "Tokens",
]

MAX_PROMPTS = 2048
"""Prompts, or texts to embed, of one request."""
_MAX_TOKENS = 1 << 20
_MAX_CHARACTERS = 4 << 20
_MAX_NODES = 10_000
_MAX_DEPTH = 32


class Strict(BaseModel):
    """A part of a request: unknown fields and implicit conversions are refused."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


def _bounded(value: Any, depth: int, nodes: int) -> Any:
    level, count = [value], 0
    for _ in range(depth):
        count += len(level)
        if count > nodes:
            raise ValueError(f"holds more than {nodes} values")
        for one in level:
            if isinstance(one, str) and not _is_text(one):
                raise ValueError("holds half of a surrogate pair, which is no character")
        level = [
            child
            for one in level
            if isinstance(one, list | Mapping)
            for child in ((*one.keys(), *one.values()) if isinstance(one, Mapping) else one)
        ]
        if not level:
            return value
    raise ValueError(f"is nested more than {depth} levels deep")


def _is_text(given: str) -> bool:
    try:
        given.encode()
    except UnicodeEncodeError:
        return False
    return True


def _schema(value: dict[str, Any]) -> dict[str, Any]:
    _bounded(value, _MAX_DEPTH, _MAX_NODES)
    return value


def _small(value: Any) -> Any:
    return _bounded(value, 8, 1000)


Text = Annotated[str, StringConstraints(max_length=_MAX_CHARACTERS)]
"""A prompt or a part of it."""
Label = Annotated[str, StringConstraints(max_length=512)]
"""What says nothing to the model."""
Name = Annotated[str, StringConstraints(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]
"""Of a function or a schema."""
Stop = Annotated[str, StringConstraints(max_length=1024)]
Token = Annotated[int, Field(ge=0, lt=1 << 31)]
Tokens = Annotated[list[Token], Field(max_length=_MAX_TOKENS)]
Schema = Annotated[dict[str, Any], AfterValidator(_schema)]
"""A JSON Schema."""
Small = Annotated[Any, AfterValidator(_small)]
"""Any JSON, and little of it."""
Metadata = Annotated[
    dict[Annotated[str, StringConstraints(max_length=64)], Annotated[str, StringConstraints(max_length=512)]],
    Field(max_length=16),
]


class JsonSchema(Strict):
    """The schema of `response_format`."""

    name: Name
    schema_: Schema = Field(alias="schema")
    description: Label | None = None
    strict: bool | None = None


class ResponseFormat(Strict):
    """What the output must be."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _with_its_schema(self) -> ResponseFormat:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("type json_schema and the field json_schema go together")
        return self

    def structure(self) -> Structure | None:
        """For the engine; None if anything may come."""
        if self.json_schema is not None:
            return Structure(json_schema=self.json_schema.schema_)
        return Structure(json_schema={"type": "object"}) if self.type == "json_object" else None


class StreamOptions(Strict):
    """Of streamed answers."""

    include_usage: bool = False
    """A last chunk without choices says how many tokens there were."""
    continuous_usage_stats: bool = False
    """Every chunk says how many there were so far. Not OpenAI's, but benchmarks ask for it."""
    include_obfuscation: bool | None = None
    """Padding against those who measure the sizes of packets; there is none."""
