"""Asks a server through litellm: `run.py URL KEY`. Prints what came as JSON."""

import asyncio
import json
import sys

import litellm
from litellm import acompletion, completion, embedding

MESSAGES = [{"role": "user", "content": "What is the capital of France?"}]

# What it says about errors goes to standard output.
litellm.suppress_debug_info = True

TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"enum": ["Oslo", "Rome"]}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}


def main(url: str, key: str) -> dict:
    here = {"api_base": f"{url}/v1", "api_key": key, "max_retries": 0}
    chat = {"model": "openai/smollm2", "messages": MESSAGES, "max_tokens": 16, "temperature": 0, **here}
    found = {}
    whole = completion(**chat)
    found["whole"] = whole.choices[0].message.content
    found["usage"] = whole.usage.completion_tokens
    found["streamed"] = "".join(chunk.choices[0].delta.content or "" for chunk in completion(**chat, stream=True))

    async def asked() -> tuple[str, str]:
        answer, chunks = await asyncio.gather(acompletion(**chat), acompletion(**chat, stream=True))
        text = "".join([chunk.choices[0].delta.content or "" async for chunk in chunks])
        return answer.choices[0].message.content, text

    found["async"], found["async streamed"] = asyncio.run(asked())
    called = completion(
        **{**chat, "model": "openai/tiny", "max_tokens": 300},
        tools=[TOOL],
        tool_choice="required",
        parallel_tool_calls=False,
    )
    [call] = called.choices[0].message.tool_calls
    found["call"] = [call.function.name, json.loads(call.function.arguments)]
    vectors = embedding(model="openai/minilm", input=["a cat", "a kitten", "a bill"], encoding_format="float", **here)
    found["vectors"] = [one["embedding"] for one in vectors.data]
    found["errors"] = {}
    wrong = {"nobody": {"model": "openai/nobody"}, "stranger": {"api_key": "not-a-key-of-this-server"}}
    for name, fields in wrong.items():
        try:
            completion(**{**chat, **fields})
        except (litellm.NotFoundError, litellm.AuthenticationError) as error:
            found["errors"][name] = type(error).__name__
    return found


print(json.dumps(main(*sys.argv[1:])))
