"""Owns `poolgate key`: make, list and revoke API keys.

How keys are hashed, found and forgotten is gateway/identity's.
"""

import argparse
from typing import Any

import asyncpg

from config.defaults import Settings
from gateway.cli.account import find_account
from gateway.cli.output import Refused, print_json, print_table, stderr, when
from gateway.cli.parsing import Parser, add_command, add_group, json_option, settings_options
from gateway.cli.stores import with_database
from gateway.identity.accounts import Account, AccountStore
from gateway.identity.keys import ApiKey, KeyStore
from gateway.identity.secrets import load_pepper

SCOPES = {
    "inference": "send requests under /v1",
    "node": "let an agent report nodes (the account must be a provider)",
    "admin": "administer (the account must be an admin)",
}

DETAILS = """\
A key acts for an account. Only its hash is stored, so the key itself is shown once, when it is made.
A revoked key is refused by every gateway process within a second."""


def add(commands: "argparse._SubParsersAction[Parser]") -> None:
    parser = add_command(
        commands, "key", "make, list and revoke API keys", details=DETAILS,
        examples="  poolgate key create --account acme\n  poolgate key list\n  poolgate key revoke 7",
    )  # fmt: skip
    group = add_group(parser)
    shared = (settings_options(), json_option())

    create = add_command(
        group, "create", "make a key and show it once", run=run_create, options=shared,
        details="scopes:\n" + "\n".join(f"  {scope:<10} {words}" for scope, words in SCOPES.items()),
        examples="  poolgate key create --account acme --name ci --model smollm2-135m\n"
        "  poolgate key create --account rack-1 --scope node\n"
        "  KEY=$(poolgate key create --account acme --json | jq -r .key)",
    )  # fmt: skip
    create.add_argument("--account", metavar="NAME", required=True, help="account it acts for, name or id")
    create.add_argument("--name", default="", help="what it is for, to be told from others in lists")
    create.add_argument(
        "--scope", dest="scopes", action="append", choices=list(SCOPES), metavar="SCOPE",
        help=f"what it may do: {', '.join(SCOPES)} (repeatable; default: inference)",
    )  # fmt: skip
    create.add_argument(
        "--model",
        dest="models",
        action="append",
        metavar="ID",
        help="model it may use (repeatable; default: all)",
    )

    listing = add_command(
        group, "list", "list keys, by their first characters", run=run_list, options=shared,
        examples="  poolgate key list\n  poolgate key list --account acme --json",
    )  # fmt: skip
    listing.add_argument("--account", metavar="NAME", help="only those of this account")

    revoke = add_command(
        group, "revoke", "make a key invalid", run=run_revoke, options=shared,
        examples="  poolgate key revoke 7\n  poolgate key revoke sk-pg-1a2b3c",
    )  # fmt: skip
    revoke.add_argument("key", metavar="ID", help="id or first characters, as `poolgate key list` shows them")


def run_create(args: argparse.Namespace) -> int:
    scopes = args.scopes or ["inference"]

    async def work(pool: asyncpg.Pool, settings: Settings) -> tuple[Account, ApiKey, str]:
        account = await find_account(AccountStore(pool), args.account)
        check_scopes(account, scopes)
        prefix = settings.provider_key_prefix if "node" in scopes else settings.inference_key_prefix
        key, secret = await KeyStore(pool, load_pepper(settings)).create(
            account.id, name=args.name, scopes=scopes, models=args.models, prefix=prefix
        )
        return account, key, secret

    account, key, secret = with_database(args, work)
    if args.json:
        print_json({"key": secret, **as_json(key, account.name)})
    else:
        print(secret)
        stderr().print(
            f"key {key.id} of account {account.name}, for {', '.join(key.scopes)}. "
            "It is shown only now: keep it somewhere safe.",
            style="dim", markup=False,
        )  # fmt: skip
    return 0


def run_list(args: argparse.Namespace) -> int:
    async def work(pool: asyncpg.Pool, settings: Settings) -> tuple[list[ApiKey], dict[int, str]]:
        accounts = AccountStore(pool)
        only = (await find_account(accounts, args.account)).id if args.account else None
        keys = await KeyStore(pool, load_pepper(settings)).list(only)
        return keys, {account.id: account.name for account in await accounts.list()}

    keys, names = with_database(args, work)
    if args.json:
        print_json([as_json(key, names.get(key.account_id, "")) for key in keys])
    else:
        print_table(
            ("ID", "KEY", "ACCOUNT", "NAME", "SCOPES", "MODELS", "MADE", "LAST USED", "STATUS"),
            [
                (
                    key.id, f"{key.prefix}…", names.get(key.account_id, ""), key.name, ", ".join(key.scopes),
                    "all" if key.models is None else ", ".join(key.models), when(key.created_at),
                    when(key.last_used_at), state(key),
                )
                for key in keys
            ],
            empty="no keys yet: make one with `poolgate key create --account NAME`",
        )  # fmt: skip
    return 0


def run_revoke(args: argparse.Namespace) -> int:
    async def work(pool: asyncpg.Pool, settings: Settings) -> ApiKey:
        store = KeyStore(pool, load_pepper(settings))
        found = matching(await store.list(), args.key)
        return await store.revoke(found.id)

    key = with_database(args, work)
    if args.json:
        print_json(as_json(key, None))
    else:
        print(f"key {key.id} ({key.prefix}…) is revoked")
    return 0


def matching(keys: list[ApiKey], asked: str) -> ApiKey:
    """The one key with this id, or that lists show so."""
    asked = asked.rstrip("…")
    found = [key for key in keys if str(key.id) == asked] or [key for key in keys if key.prefix == asked]
    if not found:
        raise Refused("there is no such key: `poolgate key list` shows the ids")
    if len(found) > 1:
        ids = ", ".join(str(key.id) for key in found)
        raise Refused(f"several keys begin so: name one by its id ({ids})")
    return found[0]


def check_scopes(account: Account, scopes: list[str]) -> None:
    if "node" in scopes and not account.is_provider:
        raise Refused(
            f"account {account.name!r} is no provider, so its keys can't have the scope `node`: "
            "make one with `poolgate account create --name NAME --provider`"
        )
    if "admin" in scopes and not account.is_admin:
        raise Refused(
            f"account {account.name!r} is no admin, so its keys can't have the scope `admin`: "
            "make one with `poolgate account create --name NAME --admin`"
        )


def state(key: ApiKey) -> str:
    return "valid" if key.revoked_at is None else f"revoked {when(key.revoked_at)}"


def as_json(key: ApiKey, account: str | None) -> dict[str, Any]:
    return {
        "id": key.id,
        "prefix": key.prefix,
        "account_id": key.account_id,
        **({} if account is None else {"account": account}),
        "name": key.name,
        "scopes": list(key.scopes),
        "models": None if key.models is None else list(key.models),
        "created_at": key.created_at.isoformat(),
        "last_used_at": key.last_used_at.isoformat() if key.last_used_at else None,
        "revoked_at": key.revoked_at.isoformat() if key.revoked_at else None,
    }
