"""Owns `poolgate usage`: what was used, by whom, and what it cost, as a table with bars and a chart of the time.

The sums are billing/usage.py's.
"""

import argparse
import re
import time
from datetime import UTC, datetime, timedelta
from typing import Any

import asyncpg

from billing.money import format_amount
from billing.usage import UsageStore, UsageSum
from config.defaults import Settings
from gateway.cli.account import find_account
from gateway.cli.output import Refused, bar, print_json, print_table
from gateway.cli.parsing import Parser, add_command, json_option, settings_options
from gateway.cli.stores import with_database
from gateway.identity.accounts import AccountStore

GROUPS = ("model", "day", "hour", "key", "account")
STEPS = {"day": timedelta(days=1), "hour": timedelta(hours=1)}
FORMS = {"day": "%Y-%m-%d", "hour": "%Y-%m-%d %H:%M"}
CHART_COLUMNS = 60
CHART_LINES = 6
UNIT_S = {"m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}

EXAMPLES = """\
  poolgate usage                                 the last 7 days by model
  poolgate usage --since 30d --by day
  poolgate usage --since 24h --by hour
  poolgate usage --account acme --by key --json"""


def add(commands: "argparse._SubParsersAction[Parser]") -> None:
    parser = add_command(
        commands, "usage", "show what was used and what it cost", run=run, examples=EXAMPLES,
        details="Turns count from their start, whole hours of it (days, where usage by hour is not kept any more); days\n"
        "are UTC's. Finished turns show up within a second.",
        options=(settings_options(), json_option()),
    )  # fmt: skip
    parser.add_argument("--account", metavar="NAME", help="only this account (name or id)")
    parser.add_argument(
        "--since",
        metavar="WHEN",
        default="7d",
        help="30m, 24h, 7d, 2w, or a UTC date such as 2026-01-31 (default: 7d)",
    )
    parser.add_argument("--by", choices=GROUPS, default="model", help="what the rows are (default: model)")


def run(args: argparse.Namespace) -> int:
    now = time.time()
    since = since_of(args.since, now)

    async def work(pool: asyncpg.Pool, settings: Settings) -> tuple[list[UsageSum], Settings]:
        account = (await find_account(AccountStore(pool), args.account)).id if args.account else None
        # A second later than now: what another host's clock has just ended belongs to it too.
        return await UsageStore(pool).summary(since, now + 1, account, args.by), settings

    sums, settings = with_database(args, work)
    if args.json:
        print_json(as_json(sums, since, args.by, settings))
    else:
        show(sums, args.by, settings)
        for line in chart(sums, args.by):
            print(line)
    return 0


def since_of(text: str, now: float) -> float:
    """Unix time of `7d`-like spans before `now`, or of a date."""
    if match := re.fullmatch(r"([0-9]{1,6})([mhdw])", text):
        return max(0.0, now - int(match[1]) * UNIT_S[match[2]])
    try:
        return datetime.strptime(text, "%Y-%m-%d").replace(tzinfo=UTC).timestamp()
    except ValueError:
        raise Refused(f"--since {text!r}: write a span such as 24h, or a date such as 2026-01-31") from None


def show(sums: list[UsageSum], by: str, settings: Settings) -> None:
    # Where nothing costs anything the bars show turns instead.
    is_free = not any(row.amount_nano for row in sums)
    sizes = [row.turns if is_free else row.amount_nano for row in sums]
    largest = max(sizes, default=0) or 1
    total = total_of(sums)
    rows = [(*cells(row, settings), bar(size / largest)) for row, size in zip(sums, sizes, strict=True)]
    if len(sums) > 1:
        rows.append((*cells(total, settings), ""))
    print_table(
        (by.upper(), ">TURNS", ">PROMPT", ">CACHED", ">OUTPUT", ">COST", "TURNS" if is_free else "COST"),
        rows,
        empty="nothing was used in this time",
    )


def chart(sums: list[UsageSum], by: str) -> list[str]:
    """Cost, or turns where nothing costs, over days or hours: the last ones that fit, those without a turn too."""
    if by not in STEPS or len(sums) < 2:
        return []
    form, step = FORMS[by], STEPS[by]
    is_free = not any(row.amount_nano for row in sums)
    sizes = {row.group: row.turns if is_free else row.amount_nano for row in sums}
    last = datetime.strptime(sums[-1].group, form).replace(tzinfo=UTC)
    first = max(datetime.strptime(sums[0].group, form).replace(tzinfo=UTC), last - (CHART_COLUMNS - 1) * step)
    moments = [first + n * step for n in range((last - first) // step + 1)]
    values = [sizes.get(moment.strftime(form), 0) for moment in moments]
    width = max(1, min(3, CHART_COLUMNS // len(values)))
    lines = ["", f"{'turns' if is_free else 'cost'} by {by}"]
    lines += [" " + "".join(mark * width for mark in line) for line in columns(values, CHART_LINES)]
    start, end = moments[0].strftime(form), moments[-1].strftime(form)
    return [*lines, " " + "─" * (len(values) * width), f" {start} … {end}"]


def columns(values: list[int], height: int) -> list[str]:
    """`values` as columns of `height` lines, from the top; the largest fills it, and what is not zero is seen."""
    largest = max(values, default=0) or 1
    eighths = [max(1, round(8 * height * value / largest)) if value else 0 for value in values]
    marks = " ▁▂▃▄▅▆▇█"
    return [
        "".join(marks[max(0, min(8, of - 8 * line))] for of in eighths) for line in reversed(range(height))
    ]


def cells(row: UsageSum, settings: Settings) -> tuple[str, ...]:
    counts = (row.turns, row.prompt_tokens, row.cached_tokens, row.completion_tokens)
    return (row.group, *(f"{count:,}" for count in counts), format_amount(row.amount_nano, settings.currency))


def total_of(sums: list[UsageSum]) -> UsageSum:
    return UsageSum(
        group="total",
        turns=sum(row.turns for row in sums),
        prompt_tokens=sum(row.prompt_tokens for row in sums),
        cached_tokens=sum(row.cached_tokens for row in sums),
        completion_tokens=sum(row.completion_tokens for row in sums),
        amount_nano=sum(row.amount_nano for row in sums),
    )


def as_json(sums: list[UsageSum], since: float, by: str, settings: Settings) -> dict[str, Any]:
    def row(of: UsageSum) -> dict[str, Any]:
        return {
            "turns": of.turns,
            "prompt_tokens": of.prompt_tokens,
            "cached_tokens": of.cached_tokens,
            "completion_tokens": of.completion_tokens,
            "amount": format_amount(of.amount_nano, "").strip(),
            "amount_nano": of.amount_nano,
        }

    return {
        "since": datetime.fromtimestamp(since, UTC).isoformat(),
        "by": by,
        "currency": settings.currency,
        "total": row(total_of(sums)),
        "groups": [{by: of.group, **row(of)} for of in sums],
    }
