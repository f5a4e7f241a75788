"""Owns the accounts and keys that `poolgate up` makes: one to try things with, one for its own node.

Accounts and keys in general are gateway/identity's.
"""

import os
from dataclasses import dataclass
from pathlib import Path

import asyncpg

from billing.money import NANO, format_amount
from config.defaults import Settings
from config.postgres import open_pool
from gateway.cli.output import Refused
from gateway.identity.accounts import Account, AccountExists, AccountStore
from gateway.identity.keys import KeyExists, KeyStore
from gateway.identity.secrets import check_secret, hash_secret, load_pepper

RENTER = "development"
PROVIDER = "this machine"
STARTING_BALANCE_NANO = 100 * NANO
KEY_FILE = "dev-key"
OWN_KEY, GIVEN_KEY, NODE_KEY = "poolgate up", "poolgate up --key", "poolgate up: agent"


@dataclass(frozen=True, slots=True)
class Identity:
    """Secrets for the person at the terminal and for our agent, and what the first may spend."""

    key: str
    node_key: str
    balance: str


def check_given_key(key: str) -> None:
    try:
        check_secret(key)
    except ValueError as error:
        raise Refused(f"--key: {error}") from None
    if "'" in key or '"' in key or "\\" in key:
        raise Refused("--key: leave quotes and backslashes out, so that the printed snippets can be pasted")


async def prepare_identity(url: str, settings: Settings, given_key: str | None) -> Identity:
    """Make what is missing, keep what works, and revoke what earlier runs left."""
    pepper = load_pepper(settings)
    pool = await open_pool(url, max_size=1, timeout_s=settings.database_timeout_s)
    try:
        accounts, keys = AccountStore(pool), KeyStore(pool, pepper)
        renter = await _account(accounts, RENTER)
        provider = await _account(accounts, PROVIDER)
        # A key that was given on loopback may be a weak one: it must not outlive its run.
        await _revoke(keys, renter, GIVEN_KEY)
        await _revoke(keys, provider, NODE_KEY)
        if given_key is not None:
            key = await _use_given(pool, keys, pepper, renter, given_key)
        else:
            key = await _own_key(keys, pepper, renter, settings)
        _, node_key = await keys.create(
            provider.id, name=NODE_KEY, scopes=("node",), prefix=settings.provider_key_prefix
        )
        return Identity(key, node_key, format_amount(renter.balance_nano, settings.currency))
    finally:
        await pool.close()


async def _account(accounts: AccountStore, name: str) -> Account:
    is_provider = name == PROVIDER
    try:
        return await accounts.create(
            name,
            balance_nano=0 if is_provider else STARTING_BALANCE_NANO,
            is_renter=not is_provider,
            is_provider=is_provider,
        )
    except AccountExists:
        return await accounts.show(name)


async def _revoke(keys: KeyStore, account: Account, name: str) -> None:
    for key in await keys.list(account.id):
        if key.name == name and key.revoked_at is None:
            await keys.revoke(key.id)


async def _own_key(keys: KeyStore, pepper: bytes, account: Account, settings: Settings) -> str:
    """The key of earlier runs while it works, else a new one."""
    file = Path(settings.data_dir) / KEY_FILE
    kept = file.read_text(errors="replace").strip() if file.is_file() else ""
    if kept:
        principal = await keys.find(hash_secret(pepper, kept))
        if principal is not None and principal.account_id == account.id:
            return kept
    _, secret = await keys.create(account.id, name=OWN_KEY, prefix=settings.inference_key_prefix)
    draft = file.with_name(f".{KEY_FILE}-{os.getpid()}")
    with os.fdopen(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as stream:
        stream.write(secret + "\n")
    draft.replace(file)
    return secret


async def _use_given(pool: asyncpg.Pool, keys: KeyStore, pepper: bytes, account: Account, secret: str) -> str:
    """Make `secret` valid for this run."""
    try:
        await keys.create(account.id, name=GIVEN_KEY, prefix="", secret=secret)
    except KeyExists:
        digest = hash_secret(pepper, secret)
        # Given to an earlier run and revoked since; a key that was revoked by hand has another name.
        revived = await pool.fetchval(
            "update api_keys set revoked_at = null where digest = $1 and account_id = $2 and name = $3"
            " returning id",
            digest, account.id, GIVEN_KEY,
        )  # fmt: skip
        found = await keys.find(digest)
        if revived is None and (found is None or found.account_id != account.id):
            raise Refused(
                "--key: it was revoked, or belongs to another account: choose another one"
            ) from None
    return secret
