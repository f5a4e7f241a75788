"""Owns `poolgate account`: make, list, show, credit and suspend accounts.

What an account is, and its row, are gateway/identity/accounts.py's.
"""

import argparse
from typing import Any

import asyncpg

from billing.money import format_amount, parse_amount
from billing.recalls import Recalled
from config.defaults import Settings
from gateway.cli.output import Refused, print_json, print_table, when
from gateway.cli.parsing import Parser, add_command, add_group, json_option, settings_options
from gateway.cli.stores import with_database
from gateway.identity.accounts import (
    Account,
    AccountExists,
    AccountStore,
    TooLittleAvailable,
    UnknownAccount,
    UnknownTimeZone,
)

DETAILS = """\
An account is a person or an organisation with a wallet: a renter (buys inference), a provider (owns nodes),
an admin, or several of these. Amounts are in the configured currency."""


def add(commands: "argparse._SubParsersAction[Parser]") -> None:
    parser = add_command(
        commands, "account", "make, list, show, credit and suspend accounts", details=DETAILS,
        examples="  poolgate account create --name acme --balance 50.00\n  poolgate account list",
    )  # fmt: skip
    group = add_group(parser)
    shared = (settings_options(), json_option())

    create = add_command(
        group, "create", "make an account", run=run_create, options=shared,
        examples="  poolgate account create --name acme --balance 5.00\n"
        "  poolgate account create --name rack-1 --provider     its keys may then have the scope `node`",
    )  # fmt: skip
    create.add_argument("--name", metavar="NAME", required=True, help="what the account is called; unique")
    create.add_argument("--balance", metavar="AMOUNT", default="0", help="starting balance, such as 5.00")
    create.add_argument("--provider", action="store_true", help="it owns nodes: keys may have scope `node`")
    create.add_argument("--admin", action="store_true", help="its keys may have the scope `admin`")

    add_command(
        group, "list", "list the accounts", run=run_list, options=shared,
        examples="  poolgate account list\n  poolgate account list --json | jq '.[].name'",
    )  # fmt: skip

    show = add_command(
        group, "show", "show one account", run=run_show, options=shared,
        examples="  poolgate account show acme\n  poolgate account show 3 --json",
    )  # fmt: skip
    show.add_argument("account", metavar="NAME", help="name or id of the account")

    credit = add_command(
        group, "credit", "add to an account's balance", run=run_credit, options=shared,
        examples="  poolgate account credit acme 25.00\n"
        "  poolgate account credit acme -- -5     (`--` keeps the minus from being an option)",
    )  # fmt: skip
    credit.add_argument("account", metavar="NAME", help="name or id of the account")
    credit.add_argument("amount", metavar="AMOUNT", help="how much, such as 25.00; a negative one takes back")

    zone = add_command(
        group, "zone", "set whose midnight ends an account's days", run=run_zone, options=shared,
        details="Budget windows and statements go by it; a window that has begun ends when it was going to.",
        examples="  poolgate account zone acme Asia/Riyadh",
    )  # fmt: skip
    zone.add_argument("account", metavar="NAME", help="name or id of the account")
    zone.add_argument(
        "zone", metavar="ZONE", help="a name of the IANA time zone database, such as Asia/Riyadh"
    )

    suspend = add_command(
        group, "suspend", "refuse an account's keys", run=run_suspend, options=shared,
        details="What gateway processes have leased of its wallet is recalled; turns that run are not cut.",
        examples="  poolgate account suspend acme",
    )  # fmt: skip
    suspend.add_argument("account", metavar="NAME", help="name or id of the account")

    resume = add_command(
        group, "resume", "let a suspended account's keys work again", run=run_resume, options=shared,
        examples="  poolgate account resume acme",
    )  # fmt: skip
    resume.add_argument("account", metavar="NAME", help="name or id of the account")


def run_create(args: argparse.Namespace) -> int:
    balance_nano = amount_of(args.balance)
    if balance_nano < 0:
        raise Refused(f"--balance {args.balance}: a new account can't begin below zero")
    if not args.name.strip():
        raise Refused("the name is empty: give one with --name")

    async def work(pool: asyncpg.Pool, settings: Settings) -> tuple[Account, Settings]:
        store = AccountStore(pool)
        try:
            made = await store.create(
                args.name.strip(), balance_nano=balance_nano, is_provider=args.provider, is_admin=args.admin
            )
        except AccountExists as error:
            raise Refused(f"{error}: `poolgate account show {args.name}` shows it") from None
        return made, settings

    account, settings = with_database(args, work)
    if args.json:
        print_json(as_json(account, settings))
    else:
        show(account, settings)
        scope = " --scope node" if account.is_provider else ""
        print(f"\nnext: poolgate key create --account {account.name}{scope}")
    return 0


def run_list(args: argparse.Namespace) -> int:
    async def work(pool: asyncpg.Pool, settings: Settings) -> tuple[list[Account], Settings]:
        return await AccountStore(pool).list(), settings

    accounts, settings = with_database(args, work)
    if args.json:
        print_json([as_json(account, settings) for account in accounts])
    else:
        print_table(
            ("ID", "NAME", ">BALANCE", ">HELD", ">SPENT", "STATUS", "ROLES", "MADE"),
            [
                (
                    a.id,
                    a.name,
                    balance(a, settings),
                    amount(a.held_nano, settings),
                    amount(a.spent_nano, settings),
                    a.status,
                    ", ".join(roles(a)),
                    when(a.created_at),
                )
                for a in accounts
            ],
            empty="no accounts yet: make one with `poolgate account create --name NAME`",
        )
    return 0


def run_show(args: argparse.Namespace) -> int:
    async def work(pool: asyncpg.Pool, settings: Settings) -> tuple[Account, Settings]:
        return await find_account(AccountStore(pool), args.account), settings

    account, settings = with_database(args, work)
    if args.json:
        print_json(as_json(account, settings))
    else:
        show(account, settings)
    return 0


def run_credit(args: argparse.Namespace) -> int:
    amount_nano = amount_of(args.amount)

    async def work(pool: asyncpg.Pool, settings: Settings) -> tuple[Account, Settings]:
        store = AccountStore(pool)
        account = await find_account(store, args.account)
        try:
            return await store.credit(account.id, amount_nano, cause="poolgate account credit"), settings
        except TooLittleAvailable:
            raise Refused(
                f"only what is available can be taken back: {account.name} has {balance(account, settings)}, and "
                f"{amount(account.held_nano, settings)} is held. Take back less, or wait for its running turns"
            ) from None

    account, settings = with_database(args, work)
    if args.json:
        print_json(as_json(account, settings))
    else:
        print(f"{account.name}: the balance is now {balance(account, settings)}")
    return 0


def run_zone(args: argparse.Namespace) -> int:
    async def work(pool: asyncpg.Pool, settings: Settings) -> tuple[Account, Settings]:
        store = AccountStore(pool)
        account = await find_account(store, args.account)
        try:
            return await store.set_time_zone(account.id, args.zone), settings
        except UnknownTimeZone as error:
            raise Refused(f"{error}: write one such as Asia/Riyadh or UTC") from None

    account, settings = with_database(args, work)
    if args.json:
        print_json(as_json(account, settings))
    else:
        print(f"{account.name}: days now begin at midnight of {account.time_zone}")
    return 0


def run_suspend(args: argparse.Namespace) -> int:
    async def work(pool: asyncpg.Pool, settings: Settings) -> tuple[Account, Recalled, Settings]:
        store = AccountStore(pool)
        account = await find_account(store, args.account)
        return *await store.suspend(account.id), settings

    account, left, settings = with_database(args, work)
    if args.json:
        print_json(
            as_json(account, settings)
            | {"leased_free_nano": left.free_nano, "leased_held_nano": left.held_nano}
        )
        return 0
    print(f"{account.name} is suspended: its keys are refused")
    print(f"held by turns that still run: {amount(left.held_nano, settings)}")
    if left.free_nano:
        print(
            f"not returned yet by a gateway process that does not answer: {amount(left.free_nano, settings)}"
        )
    return 0


def run_resume(args: argparse.Namespace) -> int:
    async def work(pool: asyncpg.Pool, settings: Settings) -> tuple[Account, Settings]:
        store = AccountStore(pool)
        account = await find_account(store, args.account)
        return await store.set_status(account.id, "active"), settings

    account, settings = with_database(args, work)
    if args.json:
        print_json(as_json(account, settings))
    else:
        print(f"{account.name} is active: its keys work again")
    return 0


async def find_account(store: AccountStore, name_or_id: str) -> Account:
    try:
        return await store.show(name_or_id)
    except UnknownAccount:
        raise Refused(f"there is no account {name_or_id!r}: `poolgate account list` shows them") from None


def amount_of(text: str) -> int:
    try:
        return parse_amount(text)
    except ValueError as error:
        raise Refused(str(error)) from None


def show(account: Account, settings: Settings) -> None:
    facts = {
        "account": f"{account.name} (id {account.id})",
        "balance": f"{balance(account, settings)} (at most {settings.lease_report_s:g} s old)",
        "held": amount(account.held_nano, settings),
        "spent": f"{amount(account.spent_nano, settings)} in {account.turns:,} turns",
        "tokens": f"{account.prompt_tokens:,} of prompts, {account.completion_tokens:,} of answers",
        "earned": amount(account.earnings_nano, settings) if account.is_provider else "",
        "status": account.status,
        "roles": ", ".join(roles(account)),
        "tier": account.tier or "",
        "time zone": account.time_zone,
        "made": when(account.created_at),
    }
    for name, value in facts.items():
        if value:
            print(f"{name:<9} {value}")


def balance(account: Account, settings: Settings) -> str:
    return amount(account.balance_nano, settings)


def amount(nano: int, settings: Settings) -> str:
    return format_amount(nano, settings.currency)


def roles(account: Account) -> list[str]:
    flags = {"renter": account.is_renter, "provider": account.is_provider, "admin": account.is_admin}
    return [role for role, is_set in flags.items() if is_set]


def as_json(account: Account, settings: Settings) -> dict[str, Any]:
    return {
        "id": account.id,
        "name": account.name,
        "balance": format_amount(account.balance_nano, "").strip(),
        "balance_nano": account.balance_nano,
        "held_nano": account.held_nano,
        "spent_nano": account.spent_nano,
        "earnings_nano": account.earnings_nano,
        "turns": account.turns,
        "prompt_tokens": account.prompt_tokens,
        "completion_tokens": account.completion_tokens,
        "as_of_s": settings.lease_report_s,  # the amounts are at most this old
        "currency": settings.currency,
        "status": account.status,
        "roles": roles(account),
        "tier": account.tier,
        "time_zone": account.time_zone,
        "created_at": account.created_at.isoformat(),
    }
