"""Owns `poolgate limit`: set and show the rate limits of a key or an account.

What limits are is billing/limits/rules.py's; tiers, which give accounts their defaults, are gateway/cli/tier.py's.
"""

import argparse
import json
from dataclasses import dataclass
from pathlib import Path

import asyncpg

from billing.limits.rules import NAMES, WORDS, BadLimits, Limits, Subject, as_json, limits_of, plan_of
from billing.limits.shared import VALKEY_AWAY, read_use
from config.defaults import Settings
from config.embedded import EmbeddedNotRunning, embedded_urls
from config.valkey import open_valkey
from gateway.cli.account import find_account
from gateway.cli.output import Refused, print_json, print_table
from gateway.cli.parsing import Parser, add_command, add_group, json_option, settings_options
from gateway.cli.stores import with_database
from gateway.identity.accounts import AccountStore

DETAILS = """\
Limits hold over all gateway processes together, in rolling windows: a request is admitted if all windows of
its key and of its account have room. A change holds within a second. Requests over a limit get 429."""

# Statements of a kind of subject: read the row, and change it by merging what is set and dropping what is cleared.
READ = {
    "key": "select id, limits, '{}'::jsonb as tier_limits, null as tier from api_keys where id = $1",
    "account": "select a.id, a.limits, coalesce(t.limits, '{}') as tier_limits, a.tier"
    " from accounts a left join tiers t on t.name = a.tier where a.id = $1",
}
CHANGE = {
    "key": "update api_keys set limits = (limits || $2::text::jsonb) - $3::text[] where id = $1",
    "account": "update accounts set limits = (limits || $2::text::jsonb) - $3::text[] where id = $1",
}


@dataclass(frozen=True, slots=True)
class Standing:
    """The limits of one key or account, where each comes from, and what is used."""

    subject: Subject  # with the limits that hold
    own: Limits
    tier: str | None
    used: dict[str, int] | None  # None: Valkey is away


def add(commands: "argparse._SubParsersAction[Parser]") -> None:
    parser = add_command(
        commands, "limit", "set and show rate limits of keys and accounts", details=DETAILS,
        examples="  poolgate limit set --key 7 --requests-per-minute 60\n  poolgate limit show --account acme",
    )  # fmt: skip
    group = add_group(parser)
    shared = (settings_options(), json_option())

    add_command(
        group, "set", "set or clear limits of a key or an account", run=run_set,
        options=(*shared, whose(), amounts()), details="What is not named stays as it is.",
        examples="  poolgate limit set --key 7 --requests-per-minute 60 --tokens-per-minute 100000\n"
        "  poolgate limit set --account acme --requests-per-day 10000 --concurrency 10\n"
        "  poolgate limit set --key 7 --requests-per-minute none     takes that limit away",
    )  # fmt: skip

    add_command(
        group, "show", "show limits and what is used of them now", run=run_show, options=(*shared, whose()),
        details="An account's own limits win over those of its tier.",
        examples="  poolgate limit show --key 7\n  poolgate limit show --account acme --json",
    )  # fmt: skip


def whose() -> Parser:
    """Options that name one key or one account."""
    parser = Parser(add_help=False)
    group = parser.add_argument_group("whose").add_mutually_exclusive_group(required=True)
    group.add_argument("--key", metavar="ID", type=int, help="id of a key, as `poolgate key list` shows it")
    group.add_argument("--account", metavar="NAME", help="name or id of an account: all its keys together")
    return parser


def amounts() -> Parser:
    """Options that set limits."""
    parser = Parser(add_help=False)
    group = parser.add_argument_group("limits")
    for name in NAMES:
        group.add_argument(
            option_of(name), dest=name, metavar="N", help=f"most {WORDS[name]}; `none` takes the limit away"
        )
    return parser


def option_of(name: str) -> str:
    return "--" + name.replace("_", "-per-")


def changes_of(args: argparse.Namespace) -> tuple[dict[str, int], list[str]]:
    """What is set, and what is cleared."""
    said = {name: value for name in NAMES if (value := getattr(args, name)) is not None}
    try:
        wanted = {name: int(value) for name, value in said.items() if value != "none"}
    except ValueError:
        raise Refused("a limit is a whole number, or `none`: such as --requests-per-minute 60") from None
    try:
        limits_of(wanted)
    except BadLimits as error:
        raise Refused(f"{error}: correct it") from None
    return wanted, [name for name, value in said.items() if value == "none"]


def run_set(args: argparse.Namespace) -> int:
    wanted, cleared = changes_of(args)
    if not wanted and not cleared:
        raise Refused(f"say which limit: {', '.join(option_of(name) for name in NAMES)}")

    async def work(pool: asyncpg.Pool, settings: Settings) -> Standing:
        kind, number = await find_subject(pool, args)
        await pool.execute(CHANGE[kind], number, json.dumps(wanted), cleared)
        return await read_standing(pool, settings, kind, number)

    tell(args, with_database(args, work))
    return 0


def run_show(args: argparse.Namespace) -> int:
    async def work(pool: asyncpg.Pool, settings: Settings) -> Standing:
        return await read_standing(pool, settings, *await find_subject(pool, args))

    tell(args, with_database(args, work))
    return 0


async def find_subject(pool: asyncpg.Pool, args: argparse.Namespace) -> tuple[str, int]:
    if args.account is not None:
        return "account", (await find_account(AccountStore(pool), args.account)).id
    number: int | None = await pool.fetchval("select id from api_keys where id = $1", args.key)
    if number is None:
        raise Refused(f"there is no key {args.key}: `poolgate key list` shows the ids")
    return "key", number


async def read_standing(pool: asyncpg.Pool, settings: Settings, kind: str, number: int) -> Standing:
    row = await pool.fetchrow(READ[kind], number)
    if row is None:
        raise Refused(f"the {kind} {number} has just been removed")
    own = limits_of(row["limits"])
    subject = Subject("key" if kind == "key" else "account", number, own.over(limits_of(row["tier_limits"])))
    return Standing(subject, own, row["tier"], await used_of(subject, settings))


async def used_of(subject: Subject, settings: Settings) -> dict[str, int] | None:
    """What Valkey has counted; None if it can't be asked."""
    try:
        url = settings.redis_url or embedded_urls(Path(settings.data_dir))[1]
        async with open_valkey(url, timeout_s=settings.valkey_timeout_s) as valkey:
            return await read_use(
                valkey, subject.name, plan_of(subject.limits, settings.exact_requests_minute_max),
                late_us=round(settings.limit_block_s * 1e6), timeout_s=settings.valkey_timeout_s,
            )  # fmt: skip
    except (*VALKEY_AWAY, EmbeddedNotRunning):
        return None


def tell(args: argparse.Namespace, found: Standing) -> None:
    limits = as_json(found.subject.limits)
    if args.json:
        print_json(
            {"kind": found.subject.kind, "id": found.subject.id, "tier": found.tier, "limits": limits,
             "own": as_json(found.own), "used": found.used}
        )  # fmt: skip
        return
    own = as_json(found.own)
    print_table(
        ("LIMIT", ">MOST", ">USED NOW", "FROM"),
        [
            (
                WORDS[name], most, "unknown" if found.used is None else found.used.get(name, 0),
                found.subject.kind if name in own else f"tier {found.tier}",
            )
            for name, most in limits.items()
        ],
        empty=f"{found.subject.kind} {found.subject.id} has no limits: `poolgate limit set` sets some",
    )  # fmt: skip
