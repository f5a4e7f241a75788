"""Owns `poolgate statement`: what moved on an account in a period, as a table.

The lines are billing/statements.py's.
"""

import argparse
import datetime as dt
from typing import Any, Literal

import asyncpg

from billing.money import format_amount
from billing.statements import Statement, read_statement
from config.defaults import Settings
from gateway.cli.account import find_account
from gateway.cli.output import Refused, print_json, print_table
from gateway.cli.parsing import Parser, add_command, json_option, settings_options
from gateway.cli.stores import with_database
from gateway.identity.accounts import Account, AccountStore

EXAMPLES = """\
  poolgate statement acme                                   this month so far
  poolgate statement acme --month 2026-11
  poolgate statement acme --since 2026-11-01 --until 2026-11-15 --json
  poolgate statement rack-1 --earnings                      what a provider earned and withdrew"""

TITLES = {
    "turn": "turns", "topup": "top-ups", "takeback": "taken back", "opening": "balance from before the ledger",
    "loss": "turns that the platform paid",
}  # fmt: skip


def add(commands: "argparse._SubParsersAction[Parser]") -> None:
    parser = add_command(
        commands, "statement", "show what moved on an account, day by day", run=run, examples=EXAMPLES,
        details="Days are those of the account's time zone. Turns are listed by when they were posted, a second or\n"
        "so after they ended; what is held, and not charged yet, is no part of it.",
        options=(settings_options(), json_option()),
    )  # fmt: skip
    parser.add_argument("account", metavar="ACCOUNT", help="name or id of the account")
    parser.add_argument("--month", metavar="MONTH", help="a whole month, such as 2026-11")
    parser.add_argument(
        "--since", metavar="DAY", help="first day, such as 2026-11-01 (default: of this month)"
    )
    parser.add_argument("--until", metavar="DAY", help="last day, which is included (default: today)")
    parser.add_argument(
        "--earnings", action="store_true", help="of what a provider earned, not of the wallet"
    )


def run(args: argparse.Namespace) -> int:
    first, last = period_of(args.month, args.since, args.until)

    async def work(pool: asyncpg.Pool, settings: Settings) -> tuple[Account, Statement, Settings]:
        account = await find_account(AccountStore(pool), args.account)
        of: Literal["wallet", "earnings"] = "earnings" if args.earnings else "wallet"
        return account, await read_statement(pool, account.id, first, last, of=of), settings

    account, statement, settings = with_database(args, work)
    if args.json:
        print_json(as_json(account, statement, settings))
    else:
        show(account, statement, settings)
    return 0


def period_of(
    month: str | None, since: str | None, until: str | None
) -> tuple[dt.date | None, dt.date | None]:
    """First and last day; None where it was not said."""
    if month is None:
        first, last = day_of("--since", since), day_of("--until", until)
        if first and last and last < first:
            raise Refused(f"--until {until} is before --since {since}: exchange them")
        return first, last
    if since or until:
        raise Refused("--month says it all: leave --since and --until away")
    first = day_of("--month", f"{month}-01", f"a month such as 2026-11, not {month!r}")
    assert first is not None  # it was said
    return first, (first + dt.timedelta(days=31)).replace(day=1) - dt.timedelta(days=1)


def day_of(option: str, text: str | None, wanted: str = "") -> dt.date | None:
    if text is None:
        return None
    try:
        return dt.date.fromisoformat(text)
    except ValueError:
        raise Refused(f"{option}: write {wanted or f'a day such as 2026-11-01, not {text!r}'}") from None


def show(account: Account, statement: Statement, settings: Settings) -> None:
    def amount(nano: int) -> str:
        return format_amount(nano, settings.currency)

    print(f"{account.name}, {statement.first} to {statement.last} ({statement.time_zone})\n")
    print_table(
        ("DAY", "WHAT", ">POSTINGS", ">AMOUNT"),
        [
            ("", "opening balance", "", amount(statement.opening_nano)),
            *(
                (line.day, TITLES.get(line.kind, line.kind), f"{line.transfers:,}", amount(line.amount_nano))
                for line in statement.lines
            ),
            ("", "closing balance", "", amount(statement.closing_nano)),
        ],
        empty="",
    )


def as_json(account: Account, statement: Statement, settings: Settings) -> dict[str, Any]:
    return {
        "account": account.name,
        "account_id": account.id,
        "currency": settings.currency,
        "first_day": statement.first.isoformat(),
        "last_day": statement.last.isoformat(),
        "time_zone": statement.time_zone,
        "opening_nano": statement.opening_nano,
        "lines": [
            {
                "day": line.day.isoformat(), "kind": line.kind, "postings": line.transfers,
                "amount_nano": line.amount_nano,
            }
            for line in statement.lines
        ],
        "closing_nano": statement.closing_nano,
    }  # fmt: skip
