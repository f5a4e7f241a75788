"""The price book: which price holds, what a turn costs, and what is refused when it is read."""

import datetime as dt
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from billing.prices import BadPriceBook, NoJobPrice, Price, PriceBook, cost_nano

TOKENS = st.integers(0, 10**7)
NANO_PRICES = st.integers(0, 10**12)

BOOK = """
[default]
prompt = "0.40"
cached_prompt = "0.20"
completion = "1.20"

[models."org/m"]
prompt = "2"
cached_prompt = "1"
completion = "4.5"
context_length = 8192
vram_required_gb = 1.5
image_tokens = 1600

[[models."org/m".changes]]
effective_from = 2027-01-01
prompt = "3"
cached_prompt = "3"
completion = "0"

[[models."org/m".changes]]
effective_from = 2027-06-01T03:00:00+03:00
prompt = "1"
cached_prompt = "0"
completion = "1"

[jobs.training]
minute = "0.50"

[[jobs.training.changes]]
effective_from = 2027-01-01
minute = "0.60"
"""


def load(folder: Path, text: str) -> PriceBook:
    file = folder / "prices.toml"
    file.write_text(text, "utf-8")
    return PriceBook.load(file)


def moment(*parts: int) -> float:
    return dt.datetime(*parts, tzinfo=dt.UTC).timestamp()  # type: ignore[misc]


@given(NANO_PRICES, NANO_PRICES, NANO_PRICES, TOKENS, TOKENS, TOKENS)
def test_a_turn_never_costs_less_than_exact_and_less_than_a_nano_more(
    prompt_nano: int, cached_nano: int, completion_nano: int, prompt: int, cached: int, completion: int
) -> None:
    cached = min(cached, prompt)
    price = Price("m", prompt_nano, cached_nano, completion_nano)
    exact = Fraction(
        (prompt - cached) * prompt_nano + cached * cached_nano + completion * completion_nano, 10**6
    )
    cost = cost_nano(price, prompt, cached, completion)
    assert isinstance(cost, int)
    assert 0 <= cost - exact < 1


def test_nothing_used_costs_nothing_and_one_token_costs_something() -> None:
    price = Price("m", 1, 1, 1)
    assert cost_nano(price, 0, 0, 0) == 0
    assert cost_nano(price, 1, 0, 0) == 1


def test_an_engine_that_reports_more_cached_than_prompt_tokens_is_believed_up_to_all_of_them() -> None:
    assert cost_nano(Price("m", 10**9, 10**6, 0), 5, 9, 0) == 5


@given(NANO_PRICES, NANO_PRICES, TOKENS, TOKENS, st.integers(0, 100))
def test_a_percentage_of_a_price_is_rounded_up_once_too(
    prompt_nano: int, completion_nano: int, prompt: int, completion: int, percent: int
) -> None:
    price = Price("m", prompt_nano, 0, completion_nano)
    exact = Fraction((prompt * prompt_nano + completion * completion_nano) * percent, 100 * 10**6)
    assert 0 <= cost_nano(price, prompt, 0, completion, percent) - exact < 1


@pytest.mark.parametrize("counts", [(-1, 0, 0), (0, -1, 0), (0, 0, -1)])
def test_negative_counts_are_refused(counts: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match="negative"):
        cost_nano(Price("m", 1, 1, 1), *counts)


def test_the_price_is_the_one_that_held_when_the_turn_started(tmp_path: Path) -> None:
    book = load(tmp_path, BOOK)
    assert book.price("org/m", moment(2026, 12, 31, 23, 59, 59)).ref == "org/m@start"
    assert book.price("org/m", moment(2027, 1, 1)).ref == "org/m@2027-01-01T00:00:00Z"
    assert book.price("org/m", moment(2027, 5, 31, 23, 59, 59)).prompt_nano == 3 * 10**9
    assert book.price("org/m", moment(2027, 6, 1)).completion_nano == 10**9
    assert book.price("org/m", 0).prompt_nano == 2 * 10**9


def test_what_the_book_tells_of_a_model_goes_with_each_of_its_prices(tmp_path: Path) -> None:
    price = load(tmp_path, BOOK).price("org/m", moment(2027, 2, 1))
    assert (price.context_length, price.max_tokens, price.vram_required_gb) == (8192, None, 1.5)


def test_a_minute_of_a_job_costs_what_held_when_it_started(tmp_path: Path) -> None:
    book = load(tmp_path, BOOK)
    first, second = (book.job_price("training", moment(year, 6, 1)) for year in (2026, 2027))
    assert (first.minute_nano, first.ref) == (500_000_000, "jobs.training@start")
    assert (second.minute_nano, second.ref) == (600_000_000, "jobs.training@2027-01-01T00:00:00Z")


def test_a_type_of_job_without_a_table_has_the_default_price_or_none(tmp_path: Path) -> None:
    with pytest.raises(NoJobPrice, match=r"needs \[jobs.rendering\]"):
        load(tmp_path, BOOK).job_price("rendering", 0)
    book = load(tmp_path, BOOK + '\n[jobs.default]\nminute = "0.10"\n')
    assert book.job_price("rendering", 0).ref == "jobs.default@start"
    assert book.job_price("training", 0).minute_nano == 500_000_000


def test_a_model_without_a_table_has_the_default_price(tmp_path: Path) -> None:
    book = load(tmp_path, BOOK)
    assert book.price("unheard/of", 0).ref == "default@start"
    assert book.models() == ("org/m",)


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("image_tokens = 1600", "image_tokens = 0", "image_tokens: 0; allowed: a whole number, 1 or more"),
        ("image_tokens = 1600", 'video_tokens = "9"', "video_tokens: '9'; allowed"),
        ('minute = "0.50"', "minute = 0.5", r"\[jobs.training\] minute: 0.5; allowed: a text of .* a minute"),
        ('minute = "0.50"', "", "minute: missing; allowed"),
        ('minute = "0.50"', 'hour = "0.50"', "hour: '0.50'; allowed: one of the fields minute, changes"),
        ('minute = "0.60"', 'prompt = "0.60"', "changes entry 1 prompt: '0.60'; allowed: one of the fields"),
        ("[jobs.training]", "[[jobs]]", r"\[jobs.TYPE\] tables are expected|not TOML"),
        ('prompt = "2"', "prompt = 2.0", r'prices\.toml: \[models\."org/m"\] prompt: 2\.0; allowed: a text'),
        ('prompt = "2"', 'prompt = "-2"', r"prompt: '-2'; allowed"),
        ('prompt = "2"', 'prompt = "0.0000000001"', "at most 9 decimals"),
        ('prompt = "2"', "", "prompt: missing; allowed"),
        ('completion = "4.5"', 'completion = "cheap"', r"completion: 'cheap'"),
        ('cached_prompt = "1"', 'cached_prompt = "2.1"', "at most the price of `prompt`"),
        ("context_length = 8192", "context_length = 0", "context_length: 0; allowed: a whole number"),
        ("context_length = 8192", "context_length = true", "context_length: True"),
        ("context_length = 8192", "context = 8192", "context: 8192; allowed: one of the fields prompt"),
        ("vram_required_gb = 1.5", 'vram_required_gb = "1"', "a number above 0"),
        ("2027-01-01", '"soon"', r"changes entry 1 effective_from: 'soon'; allowed: a date"),
        ("2027-01-01", "2027-01-01T00:00:00", "a time with its offset"),
        ("2027-01-01", "2027-07-01", r"changes entry 2 effective_from: .*later than the entry before"),
        ("[default]", "[defaults]", "the top level defaults"),
        ('[models."org/m"]', "[models.default]", "no model named 'default'"),
        ("[default]", "[default", "not TOML"),
    ],
)
def test_a_bad_value_is_refused_with_its_place_and_what_is_allowed(
    tmp_path: Path, old: str, new: str, said: str
) -> None:
    assert old in BOOK
    with pytest.raises(BadPriceBook, match=said):
        load(tmp_path, BOOK.replace(old, new, 1))


def test_a_book_without_default_prices_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadPriceBook, match=r"\[default\] is missing"):
        load(tmp_path, "")


def test_a_book_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadPriceBook, match="can't be read"):
        PriceBook.load(tmp_path / "none.toml")


def test_the_packaged_book_prices_every_model_it_names() -> None:
    book = PriceBook.load()
    assert "smollm2-135m" in book.models()
    for model in book.models():
        assert book.price(model, 0.0).model == model
        assert book.price(model, 0.0).prompt_nano > 0
