"""Long forms of what `make test` proves in seconds: a thousand streams, clients that do not read, processes that die.

Each module runs one question at the size that it is given and returns numbers; a number out of bounds is an AssertionError.
The short forms are in tests/integration; `python -m tests.soak` runs the long ones and writes docs/soak.md.
"""
