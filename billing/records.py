"""How a turn's record is written in the journal: one JSON list, the fields of UsageRecord in their order.

PostgreSQL reads the same text (billing/shipment.py), so between the turn and its row nobody decodes it. Framing and
files are journal_files.py's.
"""

import json
import math
from typing import Any, Final
from uuid import UUID

import orjson

from billing.usage import UsageRecord

VERSION = 1
"""First element of each list; a record with another layout gets another one."""

UNENCODABLE: Final = 0
"""Version of a record that JSON or its length refuse: [0, turn id, what it was as text]. It goes to quarantine."""

OF_VERSION = b"[%d," % VERSION
"""How each record begins that this version of poolgate can read."""

RECORD_BYTES_MAX: Final = 32 * 2**10
"""Longest record: a usual one has 350 bytes, the longest text that may not be cut (an Idempotency-Key) fits a header."""

TEXT_MAX = 1000
"""Characters that are left of each text of a record that is too long: enough to know it by."""

_TURN_ID, _STARTED_AT, _BUDGETS = (
    1 + UsageRecord._fields.index(name) for name in ("turn_id", "started_at", "budgets")
)
_TEXTS = ("surface", "model", "node_id", "engine_id", "outcome", "price_ref")


def encode(record: UsageRecord) -> bytes:
    """At most RECORD_BYTES_MAX bytes, whatever the record holds; it never raises: the turn has happened."""
    try:
        payload = _dump(record)
        if len(payload) <= RECORD_BYTES_MAX:
            return payload
        payload = _dump(_clipped(record))
        if len(payload) <= RECORD_BYTES_MAX:
            return payload
    except (TypeError, ValueError, AttributeError):  # a lone surrogate, a number beyond 64 bits, another type
        pass
    fields: tuple[Any, ...] = record  # of whatever types they are
    return orjson.dumps((UNENCODABLE, ascii(fields[0])[:100], ascii(record)[: RECORD_BYTES_MAX // 4]))


def decode(payload: bytes) -> UsageRecord:
    """The record exactly as it was. ValueError for a payload that `encode` did not make, or could not."""
    try:
        fields: list[Any] = orjson.loads(payload)
        if fields[0] != VERSION:
            raise ValueError(f"a record of version {fields[0]!r}")
        fields[_TURN_ID] = UUID(fields[_TURN_ID]).hex  # with hyphens in journals of earlier versions
        fields[_STARTED_AT] = _float(fields[_STARTED_AT], math.nan)
        fields[_BUDGETS] = tuple((budget, _float(start, -math.inf)) for budget, start in fields[_BUDGETS])
        return UsageRecord(*fields[1:])
    except (TypeError, AttributeError, LookupError) as error:
        raise ValueError(f"not a record: {error}") from error


def readable(payload: bytes) -> tuple[str, str]:
    """Turn id and the whole record as JSON text, in ASCII, for quarantine; of any payload."""
    try:
        fields = orjson.loads(payload)
        if fields[0] == VERSION:
            return ascii(fields[1])[1:-1], json.dumps(
                dict(zip(UsageRecord._fields, fields[1:], strict=False))
            )
        return ascii(fields[1]), json.dumps(fields)
    except (ValueError, TypeError, LookupError):
        return payload.hex()[:64], json.dumps(payload.hex())


def _dump(record: UsageRecord) -> bytes:
    return orjson.dumps((VERSION,) + record)  # noqa: RUF005 - compiled, it takes a tenth of the time


def _clipped(record: UsageRecord) -> UsageRecord:
    texts: dict[str, Any] = {name: getattr(record, name) for name in _TEXTS}
    return record._replace(**{name: text and text[:TEXT_MAX] for name, text in texts.items()})


def _float(value: float | None, absent: float) -> float:
    """JSON has no infinity and no NaN: null stands for the one that may come."""
    return absent if value is None else float(value)
