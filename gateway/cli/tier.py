"""Owns `poolgate tier`: named sets of limits that accounts are put into.

Limits of single keys and accounts are gateway/cli/limit.py's, and how they are typed too.
"""

import argparse
import json
from typing import Any

import asyncpg

from billing.limits.rules import WORDS, as_json, limits_of
from config.defaults import Settings
from gateway.cli.account import find_account
from gateway.cli.limit import amounts, changes_of
from gateway.cli.output import Refused, print_json, print_table
from gateway.cli.parsing import Parser, add_command, add_group, json_option, settings_options
from gateway.cli.stores import with_database
from gateway.identity.accounts import AccountStore

DETAILS = """\
A tier gives its accounts their limits. What an account has of its own (`poolgate limit set --account`) wins,
limit by limit. A change of a tier holds for all its accounts within a second."""

SET = """
insert into tiers (name, limits) values ($1, $2::text::jsonb)
on conflict (name) do update set limits = (tiers.limits || $2::text::jsonb) - $3::text[]
returning name, limits
"""
LIST = """
select t.name, t.limits, count(a.id) as accounts from tiers t left join accounts a on a.tier = t.name
group by t.name order by t.name
"""


def add(commands: "argparse._SubParsersAction[Parser]") -> None:
    parser = add_command(
        commands, "tier", "named sets of limits for accounts", details=DETAILS,
        examples="  poolgate tier set free --requests-per-minute 20 --tokens-per-day 100000\n"
        "  poolgate tier assign acme free",
    )  # fmt: skip
    group = add_group(parser)
    shared = (settings_options(), json_option())

    change = add_command(
        group, "set", "make a tier, or change its limits", run=run_set, options=(*shared, amounts()),
        details="What is not named stays as it is.",
        examples="  poolgate tier set free --requests-per-minute 20 --concurrency 2\n"
        "  poolgate tier set free --concurrency none",
    )  # fmt: skip
    change.add_argument("name", metavar="NAME", help="what the tier is called")

    add_command(
        group, "list", "list the tiers", run=run_list, options=shared,
        examples="  poolgate tier list\n  poolgate tier list --json",
    )  # fmt: skip

    assign = add_command(
        group, "assign", "put an account into a tier, or out of it", run=run_assign, options=shared,
        examples="  poolgate tier assign acme free\n  poolgate tier assign acme none",
    )  # fmt: skip
    assign.add_argument("account", metavar="ACCOUNT", help="name or id of the account")
    assign.add_argument("name", metavar="NAME", help="the tier, or `none`")

    remove = add_command(
        group, "remove", "remove a tier that no account is in", run=run_remove, options=shared,
        examples="  poolgate tier remove free",
    )  # fmt: skip
    remove.add_argument("name", metavar="NAME", help="the tier")


def run_set(args: argparse.Namespace) -> int:
    wanted, cleared = changes_of(args)
    if not args.name.strip() or args.name == "none":
        raise Refused("a tier has a name, and `none` means no tier: choose another")

    async def work(pool: asyncpg.Pool, _settings: Settings) -> asyncpg.Record:
        row = await pool.fetchrow(SET, args.name, json.dumps(wanted), cleared)
        assert row is not None  # an upsert that returns, returns
        return row

    row = with_database(args, work)
    if args.json:
        print_json(described(row))
    else:
        print(f"tier {row['name']}: {in_words(row)}")
    return 0


def run_list(args: argparse.Namespace) -> int:
    async def work(pool: asyncpg.Pool, _settings: Settings) -> list[asyncpg.Record]:
        return list(await pool.fetch(LIST))

    rows = with_database(args, work)
    if args.json:
        print_json([{**described(row), "accounts": row["accounts"]} for row in rows])
    else:
        print_table(
            ("TIER", ">ACCOUNTS", "LIMITS"),
            [(row["name"], row["accounts"], in_words(row)) for row in rows],
            empty="no tiers yet: make one with `poolgate tier set NAME --requests-per-minute 60`",
        )
    return 0


def run_assign(args: argparse.Namespace) -> int:
    tier = None if args.name == "none" else args.name

    async def work(pool: asyncpg.Pool, _settings: Settings) -> str:
        account = await find_account(AccountStore(pool), args.account)
        try:
            await pool.execute("update accounts set tier = $2 where id = $1", account.id, tier)
        except asyncpg.ForeignKeyViolationError:
            raise no_such_tier(args.name) from None
        return account.name

    name = with_database(args, work)
    if args.json:
        print_json({"account": name, "tier": tier})
    else:
        print(f"{name} is in no tier" if tier is None else f"{name} is in tier {tier}")
    return 0


def run_remove(args: argparse.Namespace) -> int:
    async def work(pool: asyncpg.Pool, _settings: Settings) -> str:
        try:
            return str(await pool.execute("delete from tiers where name = $1", args.name))
        except asyncpg.ForeignKeyViolationError:
            raise Refused(
                f"accounts are in tier {args.name!r}: put them out with `poolgate tier assign ACCOUNT none`"
            ) from None

    if with_database(args, work) == "DELETE 0":
        raise no_such_tier(args.name)
    if args.json:
        print_json({"name": args.name, "removed": True})
    else:
        print(f"tier {args.name} is removed")
    return 0


def no_such_tier(name: str) -> Refused:
    return Refused(f"there is no tier {name!r}: `poolgate tier list` shows them")


def in_words(row: asyncpg.Record) -> str:
    limits = as_json(limits_of(row["limits"]))
    return ", ".join(f"{most} {WORDS[name]}" for name, most in limits.items()) or "no limits"


def described(row: asyncpg.Record) -> dict[str, Any]:
    return {"name": row["name"], "limits": as_json(limits_of(row["limits"]))}
