"""A process that answers with the bytes of a real vLLM 0.32.0 (tests/captures) and misbehaves on demand.

It holds no model: what it says, how fast and how it fails are knobs (`knobs.py`, `faults.py`), settable at
run time through `POST /_fake/knobs`; what it saw is read back from `GET /_fake/record`. Start it with
`python -m bench.fake_engine --port 0`; tests use `tests.fakes.engine.FakeEngine`.

Reading order: `protocol` (HTTP on a socket) → `routes` (which path is what) → `checks` (what vLLM refuses)
→ `engine` (queue, slots, counters) → `turns` (one request in flight) → `chat`, `completion`, `responses`,
`messages` (the JSON of each surface).
"""
