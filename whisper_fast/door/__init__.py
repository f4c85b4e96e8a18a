"""The door: HTTP in the OpenAI protocol, and the chat page.

server   opens the engine, listens, stops in order        app      the routes
openai   the protocol's shapes, to and from ours          body     reading and decoding within limits
auth     API keys, and whose message it is                guard    web pages that must not come in
answers  answers under way, streamed or not               refusal  every error as the protocol shapes it
metrics  Prometheus                                       page     the pages in static/
ops      the operations page's data
"""
