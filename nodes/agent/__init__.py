"""The program on a GPU host: starts and watches engines, and reports them to the gateway. It ships alone.

`main` builds the parts. `supervisor` keeps an `engine` (ours) or an `attached` one (somebody else's) in each
slot, in `seats` that `plan` decides on; `command` decides how vLLM is started, `probe` and `metrics` ask it how it is,
`slot` holds what is known, `orders` what it is to do. `conduct` turns `preferences`, heat and the `lease` into
orders, `deeds` does what commands ask. `reporter` and `control` talk with the gateway, `events` tells it what
happened. `package` makes the zipapp, which `launcher` runs and `update` replaces. No process of an engine
outlives the agent: `tied` starts it under `watchdog`. `build` makes the CPU engine's environment, `environment`
says whether it is complete. The gateway's side is `nodes.heartbeats`.

`reach` opens the ways that a gateway elsewhere takes to the engines: `listener` (TLS) and `tunnel`, both into
`doorway`, which ties them to engines as far as `gate` lets requests pass.

An engine: starting → ready → draining → stopped; or → failed (died, hung, not ready in time) → starting, with
growing pauses. What is not to serve is draining (held) or stopped (asleep or ended), with the reason. A drain
is told to the gateway first and lasts until the engine is idle, because a stopped vLLM leaves the streams of
turns in flight open for ever.
"""
