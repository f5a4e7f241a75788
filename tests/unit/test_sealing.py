"""Kept answers: readable with the pepper, for their account and key, and not otherwise."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from billing.sealing import Sealer, Unreadable

PEPPER = b"pepper-of-the-tests"
SEALER = Sealer(PEPPER)


@given(st.integers(0, 2**63 - 1), st.text("abc-09", min_size=1), st.binary())
def test_what_was_sealed_opens_again_for_its_account_and_key(account: int, key: str, answer: bytes) -> None:
    assert Sealer(PEPPER).open(account, key, SEALER.seal(account, key, answer)) == answer


@pytest.mark.parametrize(
    ("sealer", "account", "key"),
    [(SEALER, 2, "k"), (SEALER, 1, "K"), (Sealer(b"another pepper"), 1, "k")],
)
def test_nobody_else_can_open_it(sealer: Sealer, account: int, key: str) -> None:
    sealed = SEALER.seal(1, "k", b"an answer")
    with pytest.raises(Unreadable):
        sealer.open(account, key, sealed)


def test_a_changed_or_short_text_is_refused() -> None:
    sealed = bytearray(SEALER.seal(1, "k", b"an answer"))
    sealed[-1] ^= 1
    for broken in (bytes(sealed), bytes(sealed[:20]), sealed[:5], b""):
        with pytest.raises(Unreadable):
            SEALER.open(1, "k", bytes(broken))


def test_an_answer_is_not_found_in_what_is_kept_and_no_two_are_sealed_alike() -> None:
    first, second = (SEALER.seal(1, "k", b"an answer") for _ in range(2))
    assert b"answer" not in first
    assert first != second


def test_a_mark_tells_requests_apart_by_each_of_their_parts() -> None:
    assert SEALER.mark(b"POST", b"/a", b"body") == Sealer(PEPPER).mark(b"POST", b"/a", b"body")
    marks = {
        SEALER.mark(b"POST", b"/a", b"body"),
        SEALER.mark(b"POST", b"/ab", b"ody"),
        SEALER.mark(b"POST/a", b"", b"body"),
        SEALER.mark(b"POST", b"/a", b"Body"),
        Sealer(b"another pepper").mark(b"POST", b"/a", b"body"),
    }
    assert len(marks) == 5
