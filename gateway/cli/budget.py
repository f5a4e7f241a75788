"""Owns `poolgate budget`: set, list, reset and remove what a key or an account may spend in a window of time.

How budgets are kept and shared between processes is billing's.
"""

import argparse
from typing import Any

import asyncpg

from billing.budgets import PERIODS, SOFT_PERCENT, BudgetState, BudgetStore, UnknownBudget
from billing.money import format_amount
from config.defaults import Settings
from gateway.cli.account import amount_of, find_account
from gateway.cli.key import matching
from gateway.cli.output import Refused, bar, print_json, print_table, when
from gateway.cli.parsing import Parser, add_command, add_group, json_option, settings_options
from gateway.cli.stores import with_database
from gateway.identity.accounts import AccountStore
from gateway.identity.keys import KeyStore
from gateway.identity.secrets import load_pepper

DETAILS = """\
A budget is how much a key, or all keys of an account together, may spend in a window: an hour, day, week or
month by the calendar of the account's time zone, or in total. A key may have several at once. At the soft
threshold an event is written; a turn that does not fit gets 402. Changes apply at once, without a restart."""


def add(commands: "argparse._SubParsersAction[Parser]") -> None:
    parser = add_command(
        commands, "budget", "set, list, reset and remove budgets of keys and accounts", details=DETAILS,
        examples="  poolgate budget set --account acme --period month --limit 100.00\n  poolgate budget list",
    )  # fmt: skip
    group = add_group(parser)
    shared = (settings_options(), json_option())

    setting = add_command(
        group, "set", "set a budget, or change the limit of one", run=run_set, options=shared,
        details="One budget for each period: setting it again raises or lowers its limit, for the window of now, too.",
        examples="  poolgate budget set --account acme --period day --limit 10.00\n"
        "  poolgate budget set --key 7 --period hour --limit 0.50 --soft 90",
    )  # fmt: skip
    whose = setting.add_mutually_exclusive_group(required=True)
    whose.add_argument("--account", metavar="NAME", help="all keys of this account together, name or id")
    whose.add_argument("--key", metavar="ID", help="this key, as `poolgate key list` shows it")
    setting.add_argument(
        "--period", required=True, choices=PERIODS, metavar="PERIOD", help=f"one of {', '.join(PERIODS)}"
    )
    setting.add_argument("--limit", required=True, metavar="AMOUNT", help="how much, such as 10.00")
    setting.add_argument(
        "--soft", type=int, default=SOFT_PERCENT, metavar="PERCENT",
        help=f"share of the limit at which an event is written (default: {SOFT_PERCENT})",
    )  # fmt: skip

    listing = add_command(
        group, "list", "list budgets and what is left of them", run=run_list, options=shared,
        examples="  poolgate budget list\n  poolgate budget list --account acme --json",
    )  # fmt: skip
    listing.add_argument("--account", metavar="NAME", help="only those of this account and its keys")

    reset = add_command(
        group, "reset", "forgive what was spent in the window of now", run=run_reset, options=shared,
        examples="  poolgate budget reset 3",
    )  # fmt: skip
    reset.add_argument("budget", metavar="ID", type=int, help="id, as `poolgate budget list` shows it")

    remove = add_command(
        group, "remove", "remove a budget: it holds nothing back any more", run=run_remove, options=shared,
        examples="  poolgate budget remove 3",
    )  # fmt: skip
    remove.add_argument("budget", metavar="ID", type=int, help="id, as `poolgate budget list` shows it")


def run_set(args: argparse.Namespace) -> int:
    limit_nano = amount_of(args.limit)

    async def work(pool: asyncpg.Pool, settings: Settings) -> tuple[BudgetState, Settings]:
        account_id, key_id = await _whose(pool, settings, args)
        try:
            made = await BudgetStore(pool).set(account_id, key_id, args.period, limit_nano, args.soft)
        except ValueError as error:
            raise Refused(str(error)) from None
        return made, settings

    state, settings = with_database(args, work)
    return _show(
        args, state, settings, f"budget {state.id}: {_amount(state.limit_nano, settings)} a {state.period}"
    )


def run_list(args: argparse.Namespace) -> int:
    async def work(
        pool: asyncpg.Pool, settings: Settings
    ) -> tuple[list[BudgetState], dict[int, str], Settings]:
        accounts = AccountStore(pool)
        only = (await find_account(accounts, args.account)).id if args.account else None
        names = {account.id: account.name for account in await accounts.list()}
        return await BudgetStore(pool).list(only), names, settings

    states, names, settings = with_database(args, work)
    if args.json:
        print_json([as_json(state, settings) for state in states])
        return 0
    print_table(
        ("ID", "ACCOUNT", ">KEY", "PERIOD", ">LIMIT", ">SPENT", ">LEFT", "USED", "ENDS"),
        [
            (
                state.id, names.get(state.account_id, ""), state.key_id, state.period,
                _amount(state.limit_nano, settings), _amount(state.spent_nano, settings),
                _amount(state.left_nano, settings),
                bar(state.spent_nano / state.limit_nano if state.limit_nano else 1.0, 10), when(state.ends_at),
            )
            for state in states
        ],
        empty="no budgets yet: set one with `poolgate budget set --account NAME --period day --limit 10.00`",
    )  # fmt: skip
    return 0


def run_reset(args: argparse.Namespace) -> int:
    async def work(pool: asyncpg.Pool, settings: Settings) -> tuple[BudgetState, Settings]:
        try:
            return await BudgetStore(pool).reset(args.budget), settings
        except UnknownBudget:
            raise _no_budget(args.budget) from None

    state, settings = with_database(args, work)
    return _show(
        args, state, settings, f"budget {state.id} is reset: {_amount(state.left_nano, settings)} are left"
    )


def run_remove(args: argparse.Namespace) -> int:
    async def work(pool: asyncpg.Pool, _settings: Settings) -> None:
        try:
            await BudgetStore(pool).remove(args.budget)
        except UnknownBudget:
            raise _no_budget(args.budget) from None

    with_database(args, work)
    if args.json:
        print_json({"id": args.budget, "removed": True})
    else:
        print(f"budget {args.budget} is removed")
    return 0


async def _whose(pool: asyncpg.Pool, settings: Settings, args: argparse.Namespace) -> tuple[int, int | None]:
    if args.account is not None:
        return (await find_account(AccountStore(pool), args.account)).id, None
    key = matching(await KeyStore(pool, load_pepper(settings)).list(), args.key)
    return key.account_id, key.id


def _no_budget(budget_id: int) -> Refused:
    return Refused(f"there is no budget {budget_id}: `poolgate budget list` shows them")


def _amount(nano: int, settings: Settings) -> str:
    return format_amount(nano, settings.currency)


def _show(args: argparse.Namespace, state: BudgetState, settings: Settings, said: str) -> int:
    if args.json:
        print_json(as_json(state, settings))
    else:
        print(said)
    return 0


def as_json(state: BudgetState, settings: Settings) -> dict[str, Any]:
    return {
        "id": state.id,
        "account_id": state.account_id,
        "key_id": state.key_id,
        "period": state.period,
        "limit_nano": state.limit_nano,
        "soft_percent": state.soft_percent,
        "spent_nano": state.spent_nano,
        "leased_nano": state.leased_nano,
        "left_nano": state.left_nano,
        "starts_at": state.starts_at.isoformat() if state.starts_at else None,
        "ends_at": state.ends_at.isoformat() if state.ends_at else None,
        "currency": settings.currency,
    }
