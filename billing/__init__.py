"""What a turn costs, who pays, and the record of it.

`money` counts in integers of nano, `prices` reads the price book and computes a turn's amount, `usage` writes
each settled turn to PostgreSQL and charges its account exactly once, `retention` keeps the day partitions.
Nothing here knows of HTTP, nodes or the text of a turn.

How exactly once comes about: a usage row's key is the turn's start and id; a batch is one statement that
inserts what is not there yet and charges only what it inserted. So a batch may be sent again whenever its
fate is unknown.
"""
