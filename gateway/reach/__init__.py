"""Getting to engines: straight, by their agent's listener, or by the tunnel that the agent opened to some worker.

`ways` opens connections for the relay and for probes, whichever way an engine has (`nodes.reach`); to whoever uses them
they are all alike: an asyncio transport that carries HTTP/1.1. `pinned` is TLS to a known certificate, `tunnels` the tunnels
that end in this worker, `hop` the way to those of other workers. `check` finds out whether a listener is what its agent says
before anything is sent there, `ask` puts one small question to an engine.
"""
