"""Lines go to a real worker process, and its deaths are those of the line that causes them."""

from __future__ import annotations

import asyncio
import json

import pytest

from optkit.serve.errors import DIED
from optkit.serve.models import Models
from optkit.serve.serving import Serving
from optkit.serve.settings import Settings

from .conftest import ALICE, contents, create, ended, line

ABORT = 310
"""The token that ends the process of the scripted backend."""


@pytest.mark.slow  # three processes are started
def test_a_line_that_ends_the_worker_fails_and_the_lines_beside_it_are_answered(scripted, tmp_path):
    bodies = [{"prompt": [7, 8, place], "max_tokens": 5, "temperature": 0} for place in range(9, 21)]
    bodies[5]["prompt"] = [ABORT]
    bodies[6]["max_tokens"] = -1
    serving = Serving(Settings(state=tmp_path / "state"), Models({"tiny": scripted()}), ("tiny",))

    async def main():
        async with serving:
            batches = serving.batches
            lines = [line(place, {"model": "tiny", **body}) for place, body in enumerate(bodies)]
            batch = await ended(batches, ALICE, await create(batches, ALICE, lines))
            output = await contents(batches, ALICE, batch["output_file_id"])
            errors = await contents(batches, ALICE, batch["error_file_id"])
            alone = await serving.answering.answer("/v1/completions", bodies[0], tenant=ALICE)
            return batch, output, errors, alone

    batch, output, errors, alone = asyncio.run(main())
    assert batch["request_counts"] == {"total": 12, "completed": 10, "failed": 2}
    assert batch["usage"]["output_tokens"] == 50
    [died, wrong] = errors
    assert (died["custom_id"], died["response"]["status_code"]) == ("5", 500)
    assert died["response"]["body"]["error"]["code"] == DIED
    assert (wrong["custom_id"], wrong["response"]["status_code"]) == ("6", 400)
    # An answer is the very one that a request over HTTP gets.
    assert output[0]["response"]["body"]["choices"] == json.loads(json.dumps(alone["choices"]))
