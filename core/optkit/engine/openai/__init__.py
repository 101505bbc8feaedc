"""OpenAI's words for requests and answers, for batch files and the server.

https://platform.openai.com/docs/api-reference/chat, https://platform.openai.com/docs/api-reference/completions
"""

from optkit.engine.openai.answers import chat_answer, completion_answer, token_text, usage
from optkit.engine.openai.requests import BODIES, Body, ChatBody, CompletionBody, error_body, invalid

__all__ = [
    "BODIES",
    "Body",
    "ChatBody",
    "CompletionBody",
    "chat_answer",
    "completion_answer",
    "error_body",
    "invalid",
    "token_text",
    "usage",
]
