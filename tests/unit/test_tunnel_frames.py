"""The tunnel's format: whatever frames go in come out, and whatever else comes is refused or read as frames."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nodes.tunnel.frames import (
    CREDIT,
    DATA,
    DRAIN,
    KINDS,
    OPEN,
    PAYLOAD_MAX,
    STREAMS_END,
    BadFrame,
    Frame,
    credit,
    credited,
    decode,
    encode,
    text,
)

streams = st.integers(1, STREAMS_END - 1)
frames = st.one_of(
    st.builds(Frame, st.sampled_from(sorted(KINDS - {DRAIN})), streams, st.binary(max_size=300)),
    st.just(Frame(DRAIN, 0)),
)


@given(st.lists(frames, max_size=20))
def test_frames_come_out_as_they_went_in(given_frames: list[Frame]) -> None:
    assert decode(b"".join(encode(*frame) for frame in given_frames)) == given_frames


@given(st.binary(max_size=400))
def test_any_bytes_are_frames_or_refused(data: bytes) -> None:
    try:
        found = decode(data)
    except BadFrame:
        return
    assert b"".join(encode(*frame) for frame in found) == data


@given(st.lists(frames, min_size=1, max_size=5), st.data())
def test_a_message_that_is_cut_off_is_refused_or_has_fewer_frames(
    given_frames: list[Frame], data: st.DataObject
) -> None:
    whole = b"".join(encode(*frame) for frame in given_frames)
    cut = whole[: data.draw(st.integers(0, len(whole) - 1))]
    try:
        found = decode(cut)
    except BadFrame:
        return
    assert len(found) < len(given_frames)
    assert found == given_frames[: len(found)]


@given(streams, st.integers(1, STREAMS_END - 1))
def test_a_credit_is_read_as_it_was_given(stream: int, count: int) -> None:
    (frame,) = decode(credit(stream, count))
    assert (frame.kind, frame.stream, credited(frame)) == (CREDIT, stream, count)


@pytest.mark.parametrize(
    "message",
    [
        encode(0, 1), encode(7, 1), encode(255, 1),  # no such kinds
        encode(DATA, 0, b"x"), encode(OPEN, 0, b"e0"), encode(DRAIN, 1),  # of a stream that can't have it
        encode(DATA, 1, b"x" * (PAYLOAD_MAX + 1)),
        encode(DATA, 1, b"xy")[:-1], encode(DATA, 1)[:5],
        b"\x02\x00\x00\x00\x01\xff\xff\xff\xff",  # four gigabytes to come
    ],
    ids=range(10),
)  # fmt: skip
def test_what_breaks_the_format_is_refused(message: bytes) -> None:
    with pytest.raises(BadFrame):
        decode(message)


@pytest.mark.parametrize("payload", [b"", b"\x00\x00\x00", b"\x00" * 5, b"\x00" * 4])
def test_a_credit_of_nothing_or_of_another_size_is_refused(payload: bytes) -> None:
    with pytest.raises(BadFrame):
        credited(Frame(CREDIT, 1, payload))


@pytest.mark.parametrize("payload", [b"x" * 11, b"\xff\xfe"])
def test_a_text_that_is_none_is_refused(payload: bytes) -> None:
    with pytest.raises(BadFrame):
        text(payload, 10)
