"""Which engine gets a turn: filter, score, pick. Pure: reads a snapshot, passes no I/O, waits for nothing."""
