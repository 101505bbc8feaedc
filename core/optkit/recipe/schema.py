"""The JSON Schema of recipes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from typing import Any

from pydantic.errors import PydanticUserError
from pydantic.json_schema import models_json_schema

from optkit.errors import OptkitError
from optkit.options import Options
from optkit.plugins import Kind, Plugins
from optkit.recipe.keys import CalibrationKeys, EvaluationKeys, Gate, RecipeKeys

__all__ = ["recipe_schema"]

_SLOTS: tuple[Kind, ...] = ("source", "transform", "backend", "batcher", "dataset")


def recipe_schema(plugins: Plugins) -> dict[str, Any]:
    """JSON Schema, draft 2020-12, of recipes that use the installed plugins. Those that fail to import are left out."""
    installed = {kind: _classes(kind, plugins) for kind in _SLOTS}
    classes = dict.fromkeys(plugin for named in installed.values() for plugin in named.values())
    models: list[type[Options]] = [RecipeKeys, CalibrationKeys, EvaluationKeys, Gate, *classes]
    references, generated = models_json_schema([(model, "validation") for model in models])
    definitions: dict[str, Any] = generated["$defs"]
    keys = {model: reference["$ref"].rpartition("/")[2] for (model, _), reference in references.items()}
    for kind, named in installed.items():
        variants = [variant for name, plugin in named.items() for variant in _variants(name, plugin, keys[plugin])]
        definitions[f"plugin.{kind}"] = {"oneOf": variants} if variants else {"not": {}}
    definitions[keys[Gate]]["properties"]["metric"]["enum"] = plugins.names("metric")
    for section in (CalibrationKeys, EvaluationKeys):
        definitions[keys[section]]["properties"]["dataset"] |= _reference("plugin.dataset")
    recipe = definitions.pop(keys[RecipeKeys])
    recipe["properties"]["model"] |= _reference("plugin.source")
    recipe["properties"]["transforms"]["items"] = _reference("plugin.transform")
    recipe["properties"]["backend"] |= _reference("plugin.backend")
    recipe["properties"]["batching"] |= _reference("plugin.batcher")
    dialect = "https://json-schema.org/draft/2020-12/schema"
    return {"$schema": dialect, **recipe, "title": "optkit recipe", "$defs": definitions}


def _classes(kind: Kind, plugins: Plugins) -> dict[str, type[Options]]:
    found: dict[str, type[Options]] = {}
    for name in plugins.names(kind):
        with suppress(OptkitError, PydanticUserError):
            plugin: type[Options] = plugins.get(kind, name)
            plugin.model_json_schema()  # a plugin that has none must not take the others along
            found[name] = plugin
    return found


def _variants(name: str, plugin: type[Options], key: str) -> Iterator[dict[str, Any]]:
    yield {"type": "object", "properties": {name: _reference(key)}, "required": [name], "additionalProperties": False}
    if not any(option.is_required() for option in plugin.model_fields.values()):
        yield {"const": name}


def _reference(key: str) -> dict[str, str]:
    return {"$ref": f"#/$defs/{key}"}
