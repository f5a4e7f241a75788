"""How a turn fails on purpose: before its headers, right after them, or after some tokens.

Which request fails is decided in `knobs`; this module only knows what the wire then shows.
"""

import os
import re
from typing import TYPE_CHECKING

from bench.fake_engine.knobs import Fault
from bench.fake_engine.wire import DONE, END, canonical_error, chunk, error_event, refusal

if TYPE_CHECKING:
    from bench.fake_engine.turns import Turn

FLUSH_S = 0.02  # what was written must reach the wire before a reset or an exit
BLOCK = b"x" * 16384
GARBAGE = b"\x00\x01\xffnot http at all\r\n\r\n\x16\x03\x01" * 3
_HARMLESS = ("drip", "drip_wire", "huge")
_MIDWAY = ("error_mid", "no_finish", "stall", "close", "reset", "die", "truncated_chunk", "endless_event")


def is_harmless(fault: Fault) -> bool:
    """The answer is right, only its shape on the wire is unusual."""
    return fault.kind in _HARMLESS


def is_due(fault: Fault) -> bool:
    return fault.kind in _MIDWAY


def limit(fault: Fault | None, total: int) -> int:
    """How many tokens of a stream are written before the fault strikes; all of them if none does."""
    if fault is None or fault.kind not in _MIDWAY:
        return total
    return min(fault.after, max(total - 1, 1) if fault.kind == "no_finish" else total)


def at_arrival(turn: "Turn", fault: Fault) -> bool:
    """Fail before or instead of an answer; False if the turn goes on (and may fail later)."""
    if is_harmless(fault):
        return False
    if fault.kind == "garbage":
        turn.client.write(GARBAGE)
        turn.close(fault.kind)
        turn.client.drop()
        return True
    if fault.kind == "error_first" and turn.ask.stream:
        turn.client.write(turn.engine.stamp.stream_head(turn.client.last_headers))
        _end_with_error(turn, fault)
        return True
    if fault.kind in ("http_error", "error_first") or (fault.kind == "error_mid" and not turn.ask.stream):
        _answer_error(turn, fault)
        return True
    if turn.ask.stream and fault.after >= 0:
        if fault.after == 0:
            turn.client.write(turn.engine.stamp.stream_head(turn.client.last_headers))
            _break_now(turn, fault)
        return fault.after == 0
    if fault.kind == "no_finish":
        return False
    if not turn.ask.stream and fault.after >= 0:
        _half_answer(turn)
    _break_now(turn, fault)
    return True


def midway(turn: "Turn", fault: Fault) -> None:
    """Fail after the tokens that the fault allows."""
    if fault.kind == "error_mid":
        _end_with_error(turn, fault)
    elif fault.kind == "no_finish":
        turn.client.write(chunk(DONE) + END)
        turn.close(fault.kind)
        turn.client.done()
    elif fault.kind == "stall":
        pass
    elif fault.kind == "close":
        turn.close(fault.kind)
        turn.client.drop()
    elif fault.kind == "reset":
        turn.close(fault.kind)
        turn.engine.wheel.at(turn.engine.loop.time() + FLUSH_S, lambda _: turn.client.reset())
    elif fault.kind == "die":
        turn.engine.wheel.at(turn.engine.loop.time() + FLUSH_S, lambda _: os._exit(1))
    elif fault.kind == "truncated_chunk":
        turn.client.write(b'fff\r\ndata: {"id":"chatcmpl-cut","object":"chat.compl')
        turn.close(fault.kind)
        turn.client.drop()
    elif fault.kind == "endless_event":
        turn.client.write(chunk(b'data: {"id":"chatcmpl-endless","choices":[{"index":0,"delta":{"content":"'))
        _pour(turn, fault.size_bytes)


def without_finish(body: bytes) -> bytes:
    return re.sub(rb'"finish_reason":"\w+"', b'"finish_reason":null', body)


def _break_now(turn: "Turn", fault: Fault) -> None:
    turn.mark_broken()
    if fault.kind == "stall":
        turn.engine.running[turn] = None
    midway(turn, fault)


def _answer_error(turn: "Turn", fault: Fault) -> None:
    message, kind, param, status = canonical_error(fault.status, fault.message)
    body = refusal(status, message, kind, param).body
    turn.client.write(turn.engine.stamp.whole(status, body, last=turn.client.last_headers))
    turn.close(fault.kind)
    turn.client.done()


def _end_with_error(turn: "Turn", fault: Fault) -> None:
    turn.client.write(chunk(error_event(fault.status, fault.message)) + chunk(DONE) + END)
    turn.close(fault.kind)
    turn.client.done()


def _half_answer(turn: "Turn") -> None:
    """Headers that promise a whole body, and half of it."""
    data = turn.engine.stamp.whole(200, turn.surface.whole(turn.timing), last=turn.client.last_headers)
    turn.client.write(data[: -(len(data) // 3)])


def _pour(turn: "Turn", left: int) -> None:
    """Keep one event growing for as long as the client takes it; `left` 0 means for ever."""

    def more(now: float, sent: int = 0) -> None:
        if turn.is_over:
            return
        while not turn.client.is_paused and (not left or sent < left) and sent < 64 * len(BLOCK):
            turn.client.write(chunk(BLOCK))
            sent += len(BLOCK)
        if not left:
            turn.engine.wheel.at(now + 0.001, more)
        elif sent < left:
            turn.engine.wheel.at(now + 0.001, lambda later: more(later, sent))

    turn.engine.running[turn] = None
    more(turn.engine.loop.time())
