"""YAML text -> plain data with positions -> pydantic models, with errors that say file, line and column.

`reading` gets text from a file and events from text, `composing` makes plain data of events, `document` holds it, and
`validation` binds it to models.
"""

from optkit.binding.document import Document, from_data
from optkit.binding.reading import parse, read
from optkit.binding.validation import bind

__all__ = ["Document", "bind", "from_data", "parse", "read"]
