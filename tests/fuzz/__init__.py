"""Seeded nonsense for the edge: `edge` is the world that it meets, `inputs` what is sent.

Short in tests/unit/test_fuzz_edge.py, ten million in `make soak ARGS=fuzz`.
"""
