"""The command line, one module a command; `gateway.__main__` puts their parsers together.

`parsing` declares options and settings, `output` prints, `stores` reaches PostgreSQL. `poolgate up` is `up` (the steps),
`plan` (what is checked before anything starts), `parts` and `restarts` (what runs, and what happens when it dies),
`stopping`, `folder`, `development` (its accounts and keys), `engine`, `logfiles`, `probes`, `steps` and `snippets`.
A command raises `Refused` with one sentence that says what to do; nothing else is shown without POOLGATE_DEBUG=1.
"""
