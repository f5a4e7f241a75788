"""The commands that read and write the stores, against a real PostgreSQL."""

import asyncio
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import asyncpg
import pytest

from billing.usage import UsageSum
from config.defaults import Settings
from config.embedded import EmbeddedStores
from config.postgres import open_pool
from gateway.__main__ import main
from gateway.cli.usage import CHART_COLUMNS, chart
from gateway.identity.keys import KeyStore
from gateway.identity.secrets import hash_secret, load_pepper
from nodes.heartbeats import NodeStore
from nodes.protocol import Heartbeat
from tests.conftest import database_named
from tests.journals import ship_everything, turn

Cli = Callable[..., str]


@pytest.fixture
def cli(settings: Settings, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Cli:
    """Runs a command against the test's stores and gives what it printed; `code` is the expected exit code."""
    monkeypatch.setenv("DATABASE_URL", settings.database_url)
    monkeypatch.setenv("REDIS_URL", settings.redis_url)
    monkeypatch.setenv("POOLGATE_DATA_DIR", settings.data_dir)
    monkeypatch.setenv("POOLGATE_KEY_PEPPER", settings.key_pepper)
    monkeypatch.delenv("POOLGATE_DEBUG", raising=False)

    def run(*typed: str, code: int = 0) -> str:
        assert main(typed) == code
        printed = capsys.readouterr()
        assert "Traceback" not in printed.err
        return printed.err if code else printed.out

    return run


def as_json(text: str) -> Any:
    return json.loads(text)


def test_an_account_is_made_listed_shown_and_credited(cli: Cli) -> None:
    made = as_json(cli("account", "create", "--name", "acme", "--balance", "5.00", "--json"))
    assert (made["name"], made["balance"], made["balance_nano"]) == ("acme", "5.00", 5 * 10**9)
    assert made["currency"] == "SAR"
    assert made["roles"] == ["renter"]
    assert as_json(cli("account", "credit", "acme", "0.25", "--json"))["balance"] == "5.25"
    assert as_json(cli("account", "credit", "acme", "--json", "--", "-1"))["balance"] == "4.25"
    assert as_json(cli("account", "show", str(made["id"]), "--json"))["balance"] == "4.25"
    assert [account["name"] for account in as_json(cli("account", "list", "--json"))] == ["acme"]
    assert "4.25 SAR" in cli("account", "list")
    assert "4.25 SAR (at most 1 s old)" in cli("account", "show", "acme")


def test_an_account_shows_what_it_has_and_did(cli: Cli) -> None:
    cli("account", "create", "--name", "acme", "--balance", "5.00")
    shown = as_json(cli("account", "show", "acme", "--json"))
    assert {name: shown[name] for name in ("balance_nano", "held_nano", "spent_nano", "earnings_nano")} == {
        "balance_nano": 5 * 10**9, "held_nano": 0, "spent_nano": 0, "earnings_nano": 0,
    }  # fmt: skip
    assert (shown["turns"], shown["prompt_tokens"], shown["completion_tokens"], shown["as_of_s"]) == (
        0,
        0,
        0,
        1.0,
    )
    assert (shown["tier"], shown["time_zone"]) == (None, "UTC")


def test_more_than_is_there_is_not_taken_back(cli: Cli) -> None:
    cli("account", "create", "--name", "acme", "--balance", "5.00")
    assert "acme has 5.00 SAR" in cli("account", "credit", "acme", "--", "-5.01", code=1)
    assert as_json(cli("account", "credit", "acme", "--json", "--", "-5"))["balance_nano"] == 0
    assert "can't begin below zero" in cli("account", "create", "--name", "b", "--balance=-1", code=1)


def test_an_account_is_suspended_and_resumed(cli: Cli, settings: Settings) -> None:
    cli("account", "create", "--name", "acme")
    key = as_json(cli("key", "create", "--account", "acme", "--json"))
    assert "held by turns that still run: 0.00 SAR" in cli("account", "suspend", "acme")
    assert find(settings, key["key"]) is None
    assert as_json(cli("account", "suspend", "acme", "--json"))["leased_held_nano"] == 0
    assert as_json(cli("account", "resume", "acme", "--json"))["status"] == "active"
    assert find(settings, key["key"]) is not None


def test_an_accounts_days_are_its_time_zones(cli: Cli) -> None:
    cli("account", "create", "--name", "acme")
    assert as_json(cli("account", "zone", "acme", "Asia/Riyadh", "--json"))["time_zone"] == "Asia/Riyadh"
    assert "no time zone 'Asia/Atlantis'" in cli("account", "zone", "acme", "Asia/Atlantis", code=1)


def test_an_account_name_is_taken_once(cli: Cli) -> None:
    cli("account", "create", "--name", "acme")
    assert "`poolgate account show acme` shows it" in cli("account", "create", "--name", "acme", code=1)


def test_an_unknown_account_is_told_with_a_way_out(cli: Cli) -> None:
    for typed in (
        ["account", "show", "nobody"],
        ["key", "create", "--account", "nobody"],
        ["usage", "--account", "nobody"],
    ):
        assert "there is no account 'nobody': `poolgate account list` shows them" in cli(*typed, code=1)


def test_empty_lists_say_what_to_do(cli: Cli) -> None:
    assert "poolgate account create" in cli("account", "list")
    assert "poolgate key create" in cli("key", "list")
    assert "nothing was used" in cli("usage")
    assert as_json(cli("key", "list", "--json")) == []


def test_a_key_is_shown_once_and_works_until_it_is_revoked(cli: Cli, settings: Settings) -> None:
    cli("account", "create", "--name", "acme")
    made = as_json(
        cli("key", "create", "--account", "acme", "--name", "ci", "--model", "a", "--model", "b", "--json")
    )
    assert made["key"].startswith(settings.inference_key_prefix)
    assert made["models"] == ["a", "b"]
    principal = find(settings, made["key"])
    assert principal is not None
    assert principal.models == {"a", "b"}
    listed = cli("key", "list", "--json")
    assert made["key"] not in listed
    assert as_json(listed)[0]["account"] == "acme"
    assert f"{made['prefix']}…" in cli("key", "list", "--account", "acme")
    assert as_json(cli("key", "revoke", str(made["id"]), "--json"))["revoked_at"] is not None
    assert find(settings, made["key"]) is None
    assert "revoked" in cli("key", "list")


def test_a_key_is_revoked_by_the_characters_that_lists_show(cli: Cli, settings: Settings) -> None:
    cli("account", "create", "--name", "acme")
    made = as_json(cli("key", "create", "--account", "acme", "--json"))
    other = as_json(cli("key", "create", "--account", "acme", "--json"))
    cli("key", "revoke", made["prefix"])
    assert find(settings, made["key"]) is None
    assert find(settings, other["key"]) is not None
    assert "there is no such key" in cli("key", "revoke", "sk-pg-", code=1)
    assert "there is no such key" in cli("key", "revoke", "999", code=1)


def test_a_node_key_is_for_providers_only(cli: Cli, settings: Settings) -> None:
    cli("account", "create", "--name", "acme")
    refused = cli("key", "create", "--account", "acme", "--scope", "node", code=1)
    assert "--provider" in refused
    cli("account", "create", "--name", "rack-1", "--provider")
    key = as_json(cli("key", "create", "--account", "rack-1", "--scope", "node", "--json"))
    assert key["key"].startswith(settings.provider_key_prefix)
    assert "--admin" in cli("key", "create", "--account", "acme", "--scope", "admin", code=1)


def test_usage_is_summed_by_model_day_key_and_account(cli: Cli, settings: Settings) -> None:
    account = as_json(cli("account", "create", "--name", "acme", "--balance", "1", "--json"))
    key = as_json(cli("key", "create", "--account", "acme", "--name", "ci", "--json"))
    use(settings, account["id"], key["id"], "small", amount_nano=250_000_000)
    use(settings, account["id"], key["id"], "large", amount_nano=500_000_000)
    use(settings, account["id"], key["id"], "large", amount_nano=0)
    summed = as_json(cli("usage", "--since", "1h", "--json"))
    assert summed["total"]["turns"] == 3
    assert summed["total"]["amount"] == "0.75"
    assert [(group["model"], group["turns"]) for group in summed["groups"]] == [("large", 2), ("small", 1)]
    for by in ("day", "hour", "key", "account"):
        assert as_json(cli("usage", "--by", by, "--json"))["groups"][0]["turns"] == 3
    assert as_json(cli("usage", "--account", "acme", "--json"))["total"]["turns"] == 3
    table = cli("usage")
    assert "0.75 SAR" in table
    assert "█" in table


def test_a_chart_shows_days_without_a_turn_and_sees_the_smallest() -> None:
    sums = [UsageSum(f"2026-03-0{day}", 1, 0, 0, 0, amount) for day, amount in ((1, 800), (2, 1), (4, 400))]
    lines = chart(sums, "day")
    assert lines[1] == "cost by day"
    assert lines[2] == " ███         "
    assert lines[7] == " ███▁▁▁   ███"
    assert lines[-1] == " 2026-03-01 … 2026-03-04"
    assert chart(sums[:1], "day") == chart(sums, "model") == []


def test_a_chart_is_of_the_last_that_fit_and_of_turns_where_nothing_costs() -> None:
    sums = [UsageSum(f"2026-0{month}-01", month, 0, 0, 0, 0) for month in (1, 6)]
    lines = chart(sums, "day")
    assert lines[1] == "turns by day"
    assert {len(line) for line in lines[2:-1]} == {CHART_COLUMNS + 1}
    assert lines[-1].endswith(" … 2026-06-01")


def test_migrate_brings_an_empty_database_up_and_then_has_nothing_to_do(
    cli: Cli, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = database_named(settings.database_url, "cli_migrate")
    asyncio.run(execute(settings.database_url, "create database cli_migrate"))
    try:
        monkeypatch.setenv("DATABASE_URL", url)
        assert "run `poolgate migrate` first" in cli("account", "list", code=1)
        applied = as_json(cli("migrate", "--json"))["applied"]
        assert applied[0] == "0001_accounts"
        assert "up to date" in cli("migrate")
        assert as_json(cli("account", "list", "--json")) == []
    finally:
        asyncio.run(execute(settings.database_url, "drop database cli_migrate with (force)"))


def test_a_database_that_can_not_be_reached_is_told_without_its_password(
    cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DATABASE_URL", "postgresql://someone:hunter2@127.0.0.1:1/poolgate")
    told = cli("account", "list", code=1)
    assert "PostgreSQL at 127.0.0.1:1 can't be reached" in told
    assert "hunter2" not in told


def test_commands_use_the_running_stores_of_a_data_folder(
    cli: Cli, private_stores: EmbeddedStores, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("DATABASE_URL")
    monkeypatch.delenv("REDIS_URL")
    folder = str(private_stores.data_dir)
    cli("migrate", "--data-dir", folder)
    cli("account", "create", "--name", "acme", "--data-dir", folder)
    assert [one["name"] for one in as_json(cli("account", "list", "--data-dir", folder, "--json"))] == [
        "acme"
    ]


def test_commands_start_the_stores_of_a_data_folder_that_nothing_runs(
    cli: Cli, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("DATABASE_URL")
    monkeypatch.delenv("REDIS_URL")
    folder = str(tmp_path / "own")
    cli("account", "create", "--name", "acme", "--data-dir", folder)
    assert [one["name"] for one in as_json(cli("account", "list", "--data-dir", folder, "--json"))] == [
        "acme"
    ]


def test_doctor_looks_at_everything_and_fails_nothing_on_a_sound_machine(
    cli: Cli, unused_tcp_port: int
) -> None:
    checks = {
        check["name"]: check for check in as_json(cli("doctor", "--port", str(unused_tcp_port), "--json"))
    }
    assert {"python", "postgresql", "valkey", "port", "engine", "model", "gpu", "disk"} <= set(checks)
    assert checks["postgresql"]["state"] == "ok"
    assert checks["valkey"]["state"] == "ok"
    assert all(check["advice"] for check in checks.values() if check["state"] != "ok")


def test_doctor_says_what_to_do_about_a_dead_store_without_its_password(
    settings: Settings,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    unused_tcp_port: int,
) -> None:
    monkeypatch.setenv("DATABASE_URL", "postgresql://someone:hunter2@127.0.0.1:1/poolgate")
    monkeypatch.setenv("REDIS_URL", "redis://:hunter2@127.0.0.1:1/0")
    monkeypatch.setenv("POOLGATE_DATA_DIR", settings.data_dir)
    assert main(["doctor", "--port", str(unused_tcp_port), "--json"]) == 1
    told = capsys.readouterr().out
    checks = {check["name"]: check for check in as_json(told)}
    assert "DATABASE_URL" in checks["postgresql"]["advice"]
    assert "REDIS_URL" in checks["valkey"]["advice"]
    assert "hunter2" not in told


def find(settings: Settings, secret: str) -> Any:
    async def ask() -> Any:
        async with await open_pool(settings.database_url, max_size=1, timeout_s=10) as pool:
            pepper = load_pepper(settings)
            return await KeyStore(pool, pepper).find(hash_secret(pepper, secret))

    return asyncio.run(ask())


def use(settings: Settings, account_id: int, key_id: int, model: str, *, amount_nano: int) -> None:
    record = turn(
        account_id=account_id, key_id=key_id, started_at=time.time(), model=model, amount_nano=amount_nano
    )

    async def write() -> None:
        async with await open_pool(settings.database_url, max_size=2, timeout_s=10) as pool:
            await ship_everything(pool, settings, Path(settings.data_dir), record, lease_nano=amount_nano)

    asyncio.run(write())


async def execute(url: str, statement: str) -> None:
    connection = await asyncpg.connect(url)
    try:
        await connection.execute(statement)
    finally:
        await connection.close()


def test_a_provider_is_listed_rejected_and_approved(cli: Cli) -> None:
    cli("account", "create", "--name", "acme")
    made = as_json(cli("account", "create", "--name", "rack-1", "--provider", "--json"))
    (listed,) = as_json(cli("node", "list", "--json"))
    assert (listed["id"], listed["name"], listed["approval"], listed["status"]) == (
        made["id"], "rack-1", "approved", "registered",
    )  # fmt: skip
    assert as_json(cli("node", "reject", "rack-1", "--json"))["approval"] == "rejected"
    assert "rejected" in cli("node", "list")
    assert "its nodes may take work" in cli("node", "approve", str(made["id"]))
    assert "acme is no provider" in cli("node", "approve", "acme", code=1)
    assert "no account 'nobody'" in cli("node", "approve", "nobody", code=1)


def test_a_node_is_suspended_and_released(cli: Cli, settings: Settings) -> None:
    made = as_json(cli("account", "create", "--name", "rack-1", "--provider", "--json"))
    node_id = "0197b0c4-5f0e-7c3e-9d5b-5a3f6f0c1a2b"

    async def beat() -> str:
        async with await open_pool(settings.database_url, max_size=1, timeout_s=5.0) as pool:
            await NodeStore(pool).record(made["id"], Heartbeat(api_key="-", node_id=node_id), ())
            return str(await pool.fetchval("select state from nodes"))

    assert cli("node", "show", "rack-1").startswith("no nodes yet")
    asyncio.run(beat())
    assert as_json(cli("node", "suspend", node_id, "--json"))["state"] == "suspended"
    assert asyncio.run(beat()) == "suspended"
    (shown,) = as_json(cli("node", "show", "rack-1", "--json"))
    assert (shown["node_id"], shown["state"]) == (node_id, "suspended")
    assert as_json(cli("node", "release", node_id, "--json"))["state"] == "online"
    assert "is online" in cli("node", "release", node_id)
    assert "no node id" in cli("node", "suspend", "rack-1", code=1)
    assert "there is no node" in cli("node", "suspend", "00000000-0000-7000-8000-000000000000", code=1)
