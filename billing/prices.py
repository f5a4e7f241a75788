"""The price book: what a model's tokens, and a job's minutes, cost at a moment, and what a turn costs at those prices.

A TOML file is read and checked once; afterwards everything here is pure integer arithmetic. Whose wallet
pays, and when, is others' business; so is how much a turn can cost at most (`billing.holds`).
"""

import datetime as dt
import re
import tomllib
from bisect import bisect_right
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, TypeVar

import config
from billing.money import parse_amount

TOKENS_PER_PRICE: Final = 10**6
"""Prices are for a million tokens, as the trade quotes them."""

ONLINE_PERCENT: Final = 100
"""What a turn costs, as a percentage of its price, unless it is part of a batch (setting batch_price_percent)."""

PERCENT_TOKENS: Final = ONLINE_PERCENT * TOKENS_PER_PRICE

PACKAGED = Path(config.__file__).resolve().parent / "pricebook.toml"

DEFAULT: Final = "default"
PRICES = ("prompt", "cached_prompt", "completion")
SIZES = (
    "context_length", "max_tokens", "vram_required_gb", "image_tokens", "audio_tokens", "video_tokens",
)  # fmt: skip
Entry = TypeVar("Entry")
TEXT_OF_A_PRICE = re.compile(r"[0-9]{1,9}(\.[0-9]{1,9})?")


class BadPriceBook(ValueError):
    """The price book can't be used; the message names file, table, field and what is allowed."""


class NoJobPrice(LookupError):
    """The book has neither a price for this type of job nor a default one."""


@dataclass(frozen=True, slots=True)
class Price:
    """One entry of the book: nano for a million tokens of each sort, and what /v1/models tells of it."""

    model: str  # "default" for every model that the book does not name
    prompt_nano: int
    cached_nano: int
    completion_nano: int
    effective_from: float = 0.0  # unix seconds; 0: ever since
    context_length: int | None = None
    max_tokens: int | None = None
    vram_required_gb: float | None = None
    image_tokens: int | None = (
        None  # what one image, sound or film in a prompt costs at most; None: not told,
    )
    audio_tokens: int | None = None  # so that no turn with one can be held
    video_tokens: int | None = None
    ref: str = field(init=False, repr=False, compare=False)
    """Names this entry in a usage record, for ever: "model@2027-01-01T00:00:00Z", or "model@start"."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "ref", _ref(self.model, self.effective_from))


@dataclass(frozen=True, slots=True)
class JobPrice:
    """One entry of the book for a type of job: nano a minute."""

    type: str  # "default" for every type that the book does not name
    minute_nano: int
    effective_from: float = 0.0  # unix seconds; 0: ever since

    @property
    def ref(self) -> str:
        """Names this entry in a record, for ever: "jobs.training@2027-01-01T00:00:00Z", or "jobs.training@start"."""
        return _ref(f"jobs.{self.type}", self.effective_from)


def _ref(name: str, effective_from: float) -> str:
    if not effective_from:
        return f"{name}@start"
    return f"{name}@{dt.datetime.fromtimestamp(effective_from, dt.UTC):%Y-%m-%dT%H:%M:%SZ}"


def cost_nano(price: Price, prompt: int, cached: int, completion: int, percent: int = ONLINE_PERCENT) -> int:
    """What a turn costs: exact, `percent` of it, then rounded up once.

    `prompt` includes the `cached` tokens, as OpenAI and vLLM count; an engine that reports more cached than
    prompt tokens is believed up to all of them. ValueError for a negative count or percentage.
    """
    if prompt < 0 or cached < 0 or completion < 0 or percent < 0:
        raise ValueError(
            f"no count can be negative: prompt {prompt}, cached {cached}, completion {completion}, "
            f"percent {percent}"
        )
    if cached > prompt:
        cached = prompt
    exact = (
        (prompt - cached) * price.prompt_nano
        + cached * price.cached_nano
        + completion * price.completion_nano
    )
    return -(-exact * percent // PERCENT_TOKENS)


class PriceBook:
    """Every entry, by model or type of job, and moment."""

    def __init__(
        self, entries: Mapping[str, tuple[Price, ...]], jobs: Mapping[str, tuple[JobPrice, ...]] | None = None
    ) -> None:
        """`entries`: for each model, and for "default", its prices in the order of `effective_from`; `jobs` likewise."""
        self._entries = dict(entries)
        self._starts = {
            model: [price.effective_from for price in prices] for model, prices in entries.items()
        }
        self._jobs = dict(jobs or {})

    @classmethod
    def load(cls, path: Path | None = None) -> "PriceBook":
        """Read and check a file (None: the packaged one); raises BadPriceBook."""
        file = path or PACKAGED
        try:
            with file.open("rb") as stream:
                tables = tomllib.load(stream)
        except OSError as error:
            raise BadPriceBook(f"{file}: can't be read: {error.strerror}") from error
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise BadPriceBook(f"{file}: not TOML: {error}") from error
        reader = _Reader(file)
        return cls(reader.entries(tables), reader.jobs(tables))

    def price(self, model: str, at: float) -> Price:
        """The one entry for a turn of `model` that starts `at` (unix seconds)."""
        name = model if model in self._entries else DEFAULT
        entries = self._entries[name]
        if len(entries) == 1:
            return entries[0]
        return entries[max(0, bisect_right(self._starts[name], at) - 1)]

    def models(self) -> tuple[str, ...]:
        """The models that the book names."""
        return tuple(model for model in self._entries if model != DEFAULT)

    def job_price(self, type: str, at: float) -> JobPrice:  # noqa: A002 - the contract's word for it
        """The one entry for a job of `type` that starts `at` (unix seconds); raises NoJobPrice."""
        entries = self._jobs.get(type) or self._jobs.get(DEFAULT)
        if entries is None:
            raise NoJobPrice(f"jobs of type {type!r} have no price: the price book needs [jobs.{type}]")
        starts = [entry.effective_from for entry in entries]  # jobs are few: no index of starts
        return entries[max(0, bisect_right(starts, at) - 1)]


class _Reader:
    """Turns TOML tables into entries; every complaint says where."""

    def __init__(self, file: Path) -> None:
        self._file = file

    def entries(self, tables: dict[str, Any]) -> dict[str, tuple[Price, ...]]:
        self._know("the top level", tables, (DEFAULT, "models", "jobs"))
        if DEFAULT not in tables:
            raise BadPriceBook(f"{self._file}: [default] is missing: the prices of models that have no table")
        models = tables.get("models", {})
        if not isinstance(models, dict) or DEFAULT in models:
            raise BadPriceBook(
                f'{self._file}: [models."NAME"] tables are expected, and no model named {DEFAULT!r}'
            )
        found = {DEFAULT: self._model(DEFAULT, "[default]", tables[DEFAULT])}
        for name, table in models.items():
            found[name] = self._model(name, f'[models."{name}"]', table)
        return found

    def jobs(self, tables: dict[str, Any]) -> dict[str, tuple[JobPrice, ...]]:
        jobs = tables.get("jobs", {})
        if not isinstance(jobs, dict):
            raise BadPriceBook(f"{self._file}: [jobs.TYPE] tables are expected")
        return {name: self._job(name, f"[jobs.{name}]", table) for name, table in jobs.items()}

    def _job(self, name: str, where: str, table: Any) -> tuple[JobPrice, ...]:
        def entry(inside: str, fields: dict[str, Any], start: float) -> JobPrice:
            return JobPrice(name, self._price(inside, "minute", fields.get("minute"), "a minute"), start)

        self._know(where, table, ("minute", "changes"))
        return self._dated(where, table, ("minute",), entry)

    def _model(self, model: str, where: str, table: Any) -> tuple[Price, ...]:
        self._know(where, table, (*PRICES, *SIZES, "changes"))
        sizes = {name: self._size(where, name, table[name]) for name in SIZES if name in table}

        def entry(inside: str, fields: dict[str, Any], start: float) -> Price:
            return Price(model, *self._prices(inside, fields), start, **sizes)

        return self._dated(where, table, PRICES, entry)

    def _dated(
        self,
        where: str,
        table: dict[str, Any],
        names: tuple[str, ...],
        entry: Callable[[str, dict[str, Any], float], Entry],
    ) -> tuple[Entry, ...]:
        """A table holds the first prices; each `changes` entry holds the next ones and when they begin."""
        entries, last = [entry(where, table, 0.0)], 0.0
        changes = table.get("changes", [])
        if not isinstance(changes, list):
            raise self._bad(where, "changes", changes, f"an array of tables, [[{where.strip('[]')}.changes]]")
        for number, change in enumerate(changes, 1):
            inside = f"{where} changes entry {number}"
            self._know(inside, change, (*names, "effective_from"))
            start = self._moment(inside, change)
            if start <= last:
                raise self._bad(
                    inside, "effective_from", change["effective_from"], "later than the entry before it"
                )
            entries.append(entry(inside, change, start))
            last = start
        return tuple(entries)

    def _prices(self, where: str, table: dict[str, Any]) -> tuple[int, int, int]:
        prompt, cached, completion = (self._price(where, name, table.get(name)) for name in PRICES)
        if cached > prompt:
            raise self._bad(where, "cached_prompt", table["cached_prompt"], "at most the price of `prompt`")
        return prompt, cached, completion

    def _price(self, where: str, name: str, value: Any, unit: str = "for a million tokens") -> int:
        allowed = f'a text of major units {unit} such as "0.40", 0 or more, at most 9 decimals'
        if not isinstance(value, str) or TEXT_OF_A_PRICE.fullmatch(value) is None:
            raise self._bad(where, name, value, allowed)
        return parse_amount(value)

    def _size(self, where: str, name: str, value: Any) -> Any:
        is_gb = name == "vram_required_gb"
        allowed = "a number above 0" if is_gb else "a whole number, 1 or more"
        is_number = isinstance(value, int) or (is_gb and isinstance(value, float))
        if isinstance(value, bool) or not is_number or not 0 < value < 10**9:
            raise self._bad(where, name, value, allowed)
        return value

    def _moment(self, where: str, table: dict[str, Any]) -> float:
        value = table.get("effective_from")
        if isinstance(value, dt.datetime) and value.tzinfo is not None:
            return value.timestamp()
        if isinstance(value, dt.date) and not isinstance(value, dt.datetime):
            return dt.datetime(value.year, value.month, value.day, tzinfo=dt.UTC).timestamp()
        raise self._bad(
            where,
            "effective_from",
            value,
            "a date (from 00:00 UTC) or a time with its offset, such as 2027-01-01",
        )

    def _know(self, where: str, table: Any, names: tuple[str, ...]) -> None:
        if not isinstance(table, dict):
            raise BadPriceBook(f"{self._file}: {where}: a table is expected, not {table!r}")
        for name in table:
            if name not in names:
                raise self._bad(where, name, table[name], f"one of the fields {', '.join(names)}")

    def _bad(self, where: str, name: str, value: Any, allowed: str) -> BadPriceBook:
        found = "missing" if value is None else repr(value)
        return BadPriceBook(f"{self._file}: {where} {name}: {found}; allowed: {allowed}")
