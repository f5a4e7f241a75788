"""Amounts read and written exactly."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from billing.money import NANO, format_amount, parse_amount, to_minor_up

AMOUNTS = st.integers(-(10**18) + 1, 10**18 - 1)


@given(AMOUNTS)
def test_what_is_formatted_reads_back_to_the_same_amount(nano: int) -> None:
    text, currency = format_amount(nano, "SAR").split(" ")
    assert (parse_amount(text), currency) == (nano, "SAR")


@pytest.mark.parametrize(
    ("text", "nano"),
    [
        ("0.40", 400_000_000), ("12", 12 * NANO), ("-3.5", -3_500_000_000), ("0.000000001", 1), (" 7 ", 7 * NANO),
        ("999999999.999999999", 10**18 - 1),
    ],
)  # fmt: skip
def test_amounts_are_read_exactly(text: str, nano: int) -> None:
    assert parse_amount(text) == nano


@pytest.mark.parametrize(
    "text",
    ["", "1,5", ".5", "5.", "1e3", "nan", "inf", "0x1", "٣", "1_000", "0.0000000001", "1000000000", "--1"],
)
def test_what_is_no_plain_decimal_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="plain decimal"):
        parse_amount(text)


def test_a_float_never_becomes_an_amount() -> None:
    with pytest.raises(ValueError, match="plain decimal"):
        parse_amount(0.1)  # type: ignore[arg-type]


def test_people_see_two_decimals_or_as_many_as_it_takes() -> None:
    assert format_amount(400_000_000, "SAR") == "0.40 SAR"
    assert format_amount(-12 * NANO, "SAR") == "-12.00 SAR"
    assert format_amount(120, "SAR") == "0.00000012 SAR"


@given(AMOUNTS, st.sampled_from([1, 100, 1000]))
def test_minor_units_are_never_below_the_amount_and_less_than_one_above(nano: int, minor: int) -> None:
    assert 0 <= to_minor_up(nano, minor) * NANO - nano * minor < NANO
