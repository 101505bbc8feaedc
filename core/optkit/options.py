"""What every plugin class and every section of a recipe is: a frozen, strict pydantic model."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict

__all__ = ["Options"]


class Options(BaseModel):
    """A set of options whose fields are at once recipe keys, keyword arguments, JSON Schema and documentation.

    Document a field with a string below it; the string is what users read in the schema and in the generated pages.
    Unknown keys, implicit conversions (`"4"` for 4) and infinite numbers are refused.
    """

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
        validate_default=True,
    )
