"""OpenAI's words for requests and answers, for batch files and the server.

https://platform.openai.com/docs/api-reference/chat, https://platform.openai.com/docs/api-reference/completions,
https://platform.openai.com/docs/api-reference/responses, https://platform.openai.com/docs/api-reference/embeddings
"""

from optkit.engine.openai.answers import BODIES, LanguageBody, answer
from optkit.engine.openai.bodies import Body
from optkit.engine.openai.chat import ChatBody, chat_answer
from optkit.engine.openai.completion import CompletionBody, completion_answer
from optkit.engine.openai.embeddings import EmbeddingBody, embedding_answer
from optkit.engine.openai.faults import error_body, invalid
from optkit.engine.openai.response_stream import ResponsesStream
from optkit.engine.openai.responses import ResponsesBody, responses_answer
from optkit.engine.openai.streams import ChatStream, CompletionStream

__all__ = [
    "BODIES",
    "Body",
    "ChatBody",
    "ChatStream",
    "CompletionBody",
    "CompletionStream",
    "EmbeddingBody",
    "LanguageBody",
    "ResponsesBody",
    "ResponsesStream",
    "answer",
    "chat_answer",
    "completion_answer",
    "embedding_answer",
    "error_body",
    "invalid",
    "responses_answer",
]
