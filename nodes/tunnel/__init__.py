"""The tunnel between an agent and the gateway: streams of bytes over one websocket that the agent opened.

`frames` is the format, pure; `streams` makes of frames what asyncio calls transports, each with a window of its own, so that
a reader who is slow stops nobody else; `carrier` moves frames over a websocket; `splice` ties a stream to a socket. Both
ends use the same code. It ships with the agent, so it imports nothing of the gateway's.

The gateway opens streams, each to one engine of the node, and what flows in it is HTTP/1.1 as on a connection of its own.
"""
