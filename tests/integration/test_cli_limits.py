"""`poolgate limit` and `poolgate tier` against the real stores."""

import asyncio
import json
from collections.abc import Callable
from typing import Any

import pytest

from billing.limits import Limits, Subject
from config.defaults import Settings
from gateway.__main__ import main
from tests.fakes.limits import limiters

Cli = Callable[..., Any]


@pytest.fixture
def cli(settings: Settings, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Cli:
    """Runs a command and gives its JSON; where `code` is not 0, what it complained of."""
    monkeypatch.setenv("DATABASE_URL", settings.database_url)
    monkeypatch.setenv("REDIS_URL", settings.redis_url)
    monkeypatch.setenv("POOLGATE_DATA_DIR", settings.data_dir)
    monkeypatch.setenv("POOLGATE_KEY_PEPPER", settings.key_pepper)

    def run(*typed: str, code: int = 0) -> Any:
        assert main((*typed, "--json")) == code
        printed = capsys.readouterr()
        return printed.err if code else json.loads(printed.out)

    return run


def test_limits_of_a_key_are_set_shown_and_cleared_one_by_one(cli: Cli) -> None:
    cli("account", "create", "--name", "acme")
    key = str(cli("key", "create", "--account", "acme")["id"])
    cli("limit", "set", "--key", key, "--requests-per-minute", "60", "--concurrency", "10")
    cli("limit", "set", "--key", key, "--tokens-per-day", "5000", "--concurrency", "none")
    shown = cli("limit", "show", "--key", key)
    assert shown["limits"] == {"requests_minute": 60, "tokens_day": 5000}
    assert shown["used"] == {"requests_minute": 0, "tokens_day": 0}


def test_an_accounts_own_limits_win_over_its_tiers(cli: Cli) -> None:
    cli("account", "create", "--name", "acme")
    cli("tier", "set", "free", "--requests-per-minute", "20", "--concurrency", "2")
    assert cli("tier", "assign", "acme", "free") == {"account": "acme", "tier": "free"}
    cli("limit", "set", "--account", "acme", "--concurrency", "5")
    shown = cli("limit", "show", "--account", "acme")
    assert shown["limits"] == {"requests_minute": 20, "concurrency": 5}
    assert (shown["own"], shown["tier"]) == ({"concurrency": 5}, "free")
    assert cli("tier", "list") == [
        {"name": "free", "limits": {"requests_minute": 20, "concurrency": 2}, "accounts": 1}
    ]


def test_a_tier_in_use_is_not_removed(cli: Cli) -> None:
    cli("account", "create", "--name", "acme")
    cli("tier", "set", "free")
    cli("tier", "assign", "acme", "free")
    assert "tier assign ACCOUNT none" in cli("tier", "remove", "free", code=1)
    cli("tier", "assign", "acme", "none")
    assert cli("tier", "remove", "free") == {"name": "free", "removed": True}
    assert "there is no tier 'free'" in cli("tier", "remove", "free", code=1)
    assert "there is no tier 'gold'" in cli("tier", "assign", "acme", "gold", code=1)


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        (("--key", "999", "--concurrency", "1"), "there is no key 999"),
        (("--account", "nobody", "--concurrency", "1"), "there is no account 'nobody'"),
        (("--key", "1"), "say which limit: --requests-per-minute"),
        (("--key", "1", "--requests-per-day", "many"), "a limit is a whole number"),
        (("--key", "1", "--requests-per-day", "0"), "requests_day is a whole number from 1"),
    ],
)
def test_mistakes_are_told_with_a_way_out(cli: Cli, typed: tuple[str, ...], said: str) -> None:
    assert said in cli("limit", "set", *typed, code=1)


def test_what_is_used_now_is_shown(cli: Cli, settings: Settings) -> None:
    cli("account", "create", "--name", "acme")
    key = cli("key", "create", "--account", "acme")["id"]
    cli(
        "limit", "set", "--key", str(key), "--requests-per-minute", "9", "--tokens-per-day", "500", "--concurrency", "4"
    )  # fmt: skip

    async def use() -> Any:
        async with limiters(settings, 1) as (limiter,):
            limits = Limits(requests_minute=9, tokens_day=500, concurrency=4)
            await limiter.admit((Subject("key", key, limits),), 70)
            return await asyncio.to_thread(cli, "limit", "show", "--key", str(key))

    assert asyncio.run(use())["used"] == {"requests_minute": 1, "tokens_day": 70, "concurrency": 1}


def test_limits_are_shown_without_valkey_too(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    cli("account", "create", "--name", "acme")
    cli("limit", "set", "--account", "acme", "--requests-per-day", "5")
    monkeypatch.setenv("REDIS_URL", "unix:///nowhere/valkey.sock")
    shown = cli("limit", "show", "--account", "acme")
    assert (shown["limits"], shown["used"]) == ({"requests_day": 5}, None)
