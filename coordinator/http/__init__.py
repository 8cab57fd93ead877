"""The HTTP door: OpenAI-compatible requests in, server-sent events or JSON out.

    protocol   bytes <-> requests, per connection: limits, keep-alive, pipelining, backpressure
    exchange   one request and its answer          router     path and method -> handler
    completions, chat, service                     the handlers
    openai_schema, sampling_rules, tool_calls      what a body may say, and what it means
    answer, streamed, whole                        joins the sequences of one request
    sse, choices, logprobs                         how an answer is written

A hand-written protocol on httptools rather than an ASGI server: an ASGI server costs 66 us of CPU
a request and a framework 300, this about 30, and tokens go from the core's callback to the socket
without a task or a queue in between.
"""

from coordinator.http.door import HttpDoor
from coordinator.http.limits import HttpSettings

__all__ = ["HttpDoor", "HttpSettings"]
