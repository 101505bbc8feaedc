"""Files of requests and batches over them, in OpenAI's words, on a queue that survives `kill -9` of everything.

A request enters at `routes` and goes through `service` to `store`, the one place that says what is so. `runner` moves
batches on: `checking` their inputs, having lines answered in `seats`, keeping answers in `commits`, writing `files`.
"""

from optkit.serve.batches.quota import Quota
from optkit.serve.batches.service import Batches

__all__ = ["Batches", "Quota"]
