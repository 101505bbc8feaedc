"""An HTTP server over engines: OpenAI's endpoints, the Open Inference Protocol, and what operating them needs.

A request passes `guard` (key, host, size, time), an endpoint in `routes` that speaks HTTP and nothing else, and
`answering`, which turns bodies into engine requests and what comes back into answers. Batch jobs enter at `answering`.
"""
