"""Providers over HTTP: registered, approved, paused, described, listed, logged in by mail, and deleted."""

import asyncio
import email
import re
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import asyncpg
import pytest
from aiosmtpd.controller import Controller
from aiosmtpd.smtp import SMTP as SmtpServer

from billing.ledger import AccountRef, Ledger, Transfer
from billing.money import NANO
from config.ids import uuid7
from gateway.identity.accounts import AccountStore
from gateway.identity.keys import KeyStore
from gateway.identity.secrets import load_pepper
from gateway.mail import MailFailed, SmtpMailer
from nodes.events import trim_events
from tests.fakes.provider_client import GPU, REGISTRATION, ProviderClient, call, registered
from tests.fakes.up import free_port
from tests.gateways import MODEL, TestGateway, running_gateway
from tests.waiting import eventually

ADMIN = "the-admin-token-of-the-tests"
ASK = {"model": MODEL, "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 4}


@pytest.fixture
async def gw(settings, pool) -> AsyncIterator[TestGateway]:
    """One in developer mode: providers are approved at once, mail goes to a folder."""
    own = replace(settings, developer_mode=True, register_requests_hour=1000, admin_token=ADMIN)
    async with running_gateway(own, pool) as running:
        yield running


@pytest.fixture
async def strict(settings, pool) -> AsyncIterator[TestGateway]:
    """One as it is in production, where nobody is approved by himself and no mail server is set."""
    async with running_gateway(replace(settings, admin_token=ADMIN), pool) as running:
        yield running


# --- registration and approval ---------------------------------------------------------------------------------------


async def test_a_registration_gives_a_key_that_works_and_is_stored_hashed(gw):
    status, body = await call(
        gw, "POST", "/api/providers/register", REGISTRATION | {"email": "New@Example.SA"}
    )
    assert status == 200
    assert body["api_key"].startswith("dc1-provider-")
    assert body["installer_url"] == f"/api/providers/installer?key={body['api_key']}&os=linux"
    me = await ProviderClient(gw, body["provider_id"], body["api_key"]).me()
    assert (me["id"], me["name"], me["email"], me["status"]) == (
        body["provider_id"], "Ahmed", "new@example.sa", "registered",
    )  # fmt: skip
    rows = await gw.pool.fetch("select * from api_keys")
    assert body["api_key"] not in str([dict(row) for row in rows])


async def test_an_address_registers_once_in_whatever_letters(gw):
    await registered(gw)
    status, body = await call(
        gw, "POST", "/api/providers/register", REGISTRATION | {"email": "AHMED@example.sa"}
    )
    assert (status, body["error"]) == (409, "A provider with this email already exists")
    assert await gw.pool.fetchval("select count(*) from providers where email is not null") == 1


@pytest.mark.parametrize(
    "change",
    [{"name": None}, {"name": "  "}, {"email": "nobody"}, {"email": "a@b.c\r\nBcc: x@y.z"}, {"os": "beos"},
     {"gpu_model": 5}, {"name": "a\x00b"}, {"resource_spec": []}, {"resource_spec": {"a": "\x00"}}],
)  # fmt: skip
async def test_a_registration_that_makes_no_sense_is_a_400(gw, change):
    status, body = await call(gw, "POST", "/api/providers/register", REGISTRATION | change)
    assert (status, body.keys()) == (400, {"error", "request_id"})
    assert await gw.pool.fetchval("select count(*) from providers where email is not null") == 0


async def test_an_unapproved_node_is_refused_until_an_admin_approves_and_again_when_he_rejects(
    strict, engine
):
    node = await registered(strict)
    status, body = await node.beat(engine.url)
    assert (status, body["error"]) == (403, "Provider not approved yet.")
    path = f"/api/admin/providers/{node.id}"
    for wrong in (
        {},
        {"x_admin_token": "wrong"},
        {"x_provider_key": node.key},
        {"authorization": "Bearer x"},
    ):
        status, _ = await call(strict, "POST", f"{path}/approve", **wrong)
        assert status in (401, 403)
    assert (await node.beat(engine.url))[0] == 403
    status, body = await call(strict, "POST", f"{path}/approve", x_admin_token=ADMIN)
    assert (status, body["approval_status"]) == (200, "approved")
    assert (await node.beat(engine.url))[0] == 200
    await eventually(node.is_routed)
    assert (await call(strict, "POST", f"{path}/reject", authorization=f"Bearer {ADMIN}"))[0] == 200
    await eventually(lambda: not node.is_routed())
    assert (await node.beat(engine.url))[0] == 403


async def test_a_key_with_the_scope_admin_approves_as_well(strict):
    node = await registered(strict)
    admin = await AccountStore(strict.pool).create("boss", is_admin=True)
    keys = KeyStore(strict.pool, load_pepper(strict.gateway.settings))
    _, key = await keys.create(admin.id, prefix="sk-", scopes=("admin",))
    status, _ = await call(strict, "POST", f"/api/admin/providers/{node.id}/approve", x_api_key=key)
    assert (status, (await node.beat())[0]) == (200, 200)


@pytest.mark.parametrize("provider_id", ["999999", "x", "-1", "1" * 40])
async def test_approving_nobody_is_a_404(strict, provider_id):
    path = f"/api/admin/providers/{provider_id}/approve"
    assert (await call(strict, "POST", path, x_admin_token=ADMIN))[0] == 404


async def test_a_suspended_account_leaves_routing_at_once(gw, engine):
    node = await registered(gw)
    await node.beat(engine.url)
    await eventually(node.is_routed)
    await AccountStore(gw.pool).set_status(node.id, "suspended")
    await eventually(lambda: not node.is_routed())


# --- pause, preferences, profile -------------------------------------------------------------------------------------


async def test_a_pause_takes_nodes_out_of_routing_and_a_resume_brings_them_back(gw, engine):
    node = await registered(gw)
    await node.beat(engine.url)
    await eventually(node.is_routed)
    assert await node.post("pause") == (200, {"success": True, "status": "paused"})
    await eventually(lambda: not node.is_routed())
    status, reply = await node.beat(engine.url)
    assert (status, reply["state"], (await node.me())["status"]) == (200, "paused", "paused")
    assert await node.post("resume") == (200, {"success": True, "status": "online"})
    await eventually(node.is_routed)
    assert (await node.beat(engine.url))[1]["state"] == "online"


async def test_a_node_that_is_new_or_comes_back_while_its_provider_is_paused_is_paused(gw, engine):
    node = await registered(gw)
    assert await node.post("pause") == (200, {"success": True, "status": "paused"})
    assert (await node.beat(engine.url))[1]["state"] == "paused"
    await gw.pool.execute("update nodes set state = 'offline'")
    assert (await node.beat(engine.url))[1]["state"] == "paused"
    await gw.pool.execute("update nodes set last_heartbeat_at = last_heartbeat_at - interval '1 hour'")
    assert await node.post("resume") == (200, {"success": True, "status": "connected"})
    assert (await node.beat(engine.url))[1]["state"] == "online"


async def test_a_draining_node_renders_as_paused(gw):
    node = await registered(gw)
    await node.beat()
    await gw.pool.execute("update nodes set state = 'draining'")
    assert (await node.me())["status"] == "paused"


async def test_preferences_are_kept_and_told_to_agents(gw):
    node = await registered(gw)
    wanted = {
        "run_mode": "scheduled",
        "scheduled_start": "22:30",
        "gpu_usage_cap_pct": 80,
        "vram_reserve_gb": 1.5,
    }
    status, body = await node.post("preferences", **wanted)
    assert status == 200
    assert body["preferences"] == wanted | {
        "scheduled_end": "07:00", "temp_limit_c": 85, "time_zone": "UTC",
    }  # fmt: skip
    await node.post("preferences", temp_limit_c=70)
    _, reply = await node.beat()
    assert reply["preferences"] == body["preferences"] | {"temp_limit_c": 70}
    assert (await node.me())["vram_reserve_gb"] == 1.5


@pytest.mark.parametrize(
    "wrong",
    [{"run_mode": "never"}, {"scheduled_start": "25:00"}, {"gpu_usage_cap_pct": 101}, {"vram_reserve_gb": 17},
     {"temp_limit_c": 49}, {"temp_limit_c": "hot"}],
)  # fmt: skip
async def test_a_preference_out_of_bounds_is_a_400_and_changes_nothing(gw, wrong):
    node = await registered(gw)
    before = await gw.pool.fetchrow("select * from providers where account_id = $1", node.id)
    assert (await node.post("preferences", **({"temp_limit_c": 60} | wrong)))[0] == 400
    assert await gw.pool.fetchrow("select * from providers where account_id = $1", node.id) == before


async def test_a_node_s_own_gpu_stands_before_the_one_that_was_told(gw):
    node = await registered(gw)
    told = {"gpu_model": "H100", "vram_gb": 80, "gpu_count": 8, "location": "SA", "driver_version": "1"}
    status, body = await call(gw, "PATCH", "/api/providers/me/gpu-profile", told, x_provider_key=node.key)
    assert (status, set(body["updated_fields"])) == (200, set(told))
    me = await node.me()
    assert (me["gpu_model"], me["gpu_vram_mib"], me["gpu_count_reported"]) == ("H100", 81920, 8)
    await node.beat(gpu_status=GPU)
    me = await node.me()
    assert (me["gpu_model"], me["gpu_vram_mib"], me["gpu_count_reported"]) == ("NVIDIA RTX 4090", 24564, 1)
    assert me["gpu_metrics"] == {
        "utilization_pct": 41.0, "vram_used_mib": 12112, "vram_free_mib": 12452, "temperature_c": 68.0,
        "power_w": 310.5,
    }  # fmt: skip
    assert (me["location"], me["daemon_version"]) == ("SA", None)


# --- keys ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["header", "bearer", "query", "key", "api_key"])
async def test_a_key_is_taken_wherever_the_contract_puts_it(gw, place):
    node = await registered(gw)
    query = f"?key={node.key}" if place == "query" else ""
    body = {place: node.key} if place in ("key", "api_key") else {}
    headers = {"header": {"x_provider_key": node.key}, "bearer": {"authorization": f"Bearer {node.key}"}}
    status, _ = await call(gw, "POST", f"/api/providers/pause{query}", body, **headers.get(place, {}))
    assert status == 200


async def test_no_key_is_a_401_and_on_the_dashboard_what_the_contract_says(gw):
    for path in ("pause", "preferences", "readiness", "rotate-key"):
        status, body = await call(gw, "POST", f"/api/providers/{path}", {})
        assert (status, body.keys()) == (401, {"error", "request_id"}), path
    assert (await call(gw, "GET", "/api/providers/me"))[0] == 400
    status, body = await call(gw, "GET", "/api/providers/me?key=wrong-key")
    assert (status, body["error"]) == (404, "Provider not found.")
    assert (await call(gw, "GET", "/api/providers/status/wrong-key"))[0] == 401
    assert (await call(gw, "GET", "/api/providers/me", authorization=f"Bearer {gw.key}"))[0] == 403


async def test_a_rotation_revokes_every_key_before_it(gw):
    node = await registered(gw)
    old = [node.key, (await node.post("rotate-key"))[1]["api_key"]]
    await eventually(lambda: is_refused(gw, old[0]))
    node.key = old[1]
    status, body = await node.post("rotate-key")
    assert status == 200
    await eventually(lambda: is_refused(gw, old[1]))
    assert (await call(gw, "GET", f"/api/providers/status/{body['api_key']}"))[0] == 200


async def is_refused(gw: TestGateway, key: str) -> bool:
    return (await call(gw, "GET", f"/api/providers/status/{key}"))[0] == 401


async def test_a_key_in_a_path_reaches_no_log(gw, caplog, monkeypatch):
    node = await registered(gw)

    async def crash(*_: object) -> None:
        raise RuntimeError("crash")

    monkeypatch.setattr("nodes.providers.ProviderStore.show", crash)
    status, body = await call(gw, "GET", f"/api/providers/status/{node.key}?key={node.key}")
    assert (status, node.key in str(body)) == (500, False)
    (record,) = [each for each in caplog.records if getattr(each, "action", "") == "request_crashed"]
    assert record.path == "/api/providers/status/{api_key}"
    assert node.key not in str([each.__dict__ for each in caplog.records])


# --- login by e-mail -------------------------------------------------------------------------------------------------

LOGIN = "/api/providers/login-email"


async def code_of(gw: TestGateway, number: int = 1) -> str:
    """The code in the newest of `number` mails in the developer's folder."""
    folder = Path(gw.gateway.settings.data_dir) / "mail"
    await eventually(lambda: len(list(folder.glob("*.eml"))) == number)
    message = email.message_from_bytes(max(folder.glob("*.eml")).read_bytes())
    assert message["To"] == "ahmed@example.sa"
    match = re.search(r"Code: (\d{8})", str(message.get_payload(decode=True)))
    assert match is not None
    return match[1]


async def test_a_mailed_code_gives_an_additional_key_once(gw):
    node = await registered(gw)
    status, first = await call(gw, "POST", LOGIN, {"email": "Ahmed@example.sa"})
    assert (status, first.keys()) == (200, {"success", "message"})
    asked = {"email": "ahmed@example.sa", "code": await code_of(gw)}
    status, body = await call(gw, "POST", LOGIN, asked)
    assert (status, body["provider"]["id"], body["provider"]["email"]) == (200, node.id, "ahmed@example.sa")
    assert (await ProviderClient(gw, node.id, body["api_key"]).me())["id"] == node.id
    assert (await node.me())["id"] == node.id, "the key that was there stays valid"
    assert (await call(gw, "POST", LOGIN, asked))[0] == 401, "once"


async def test_nothing_tells_a_known_address_from_an_unknown_one(gw):
    await registered(gw)
    known = await call(gw, "POST", LOGIN, {"email": "ahmed@example.sa"})
    await code_of(gw)
    assert await call(gw, "POST", LOGIN, {"email": "nobody@example.sa"}) == known
    wrong = [
        await call(gw, "POST", LOGIN, {"email": address, "code": "00000000"})
        for address in ("ahmed@example.sa", "nobody@example.sa")
    ]
    assert wrong[0][0] == wrong[1][0] == 401
    assert wrong[0][1]["error"] == wrong[1][1]["error"]


async def test_a_code_bears_five_tries_and_expires(gw):
    await registered(gw)
    await call(gw, "POST", LOGIN, {"email": "ahmed@example.sa"})
    code = await code_of(gw)
    wrong = f"{(int(code) + 1) % 10**8:08}"
    for _ in range(5):
        assert (await call(gw, "POST", LOGIN, {"email": "ahmed@example.sa", "code": wrong}))[0] == 401
    assert (await call(gw, "POST", LOGIN, {"email": "ahmed@example.sa", "code": code}))[0] == 401
    await call(gw, "POST", LOGIN, {"email": "ahmed@example.sa"})
    late = await code_of(gw, 2)
    await gw.pool.execute("update login_codes set expires_at = clock_timestamp()")
    assert (await call(gw, "POST", LOGIN, {"email": "ahmed@example.sa", "code": late}))[0] == 401


async def test_a_mailbox_gets_five_codes_an_hour(gw):
    await registered(gw)
    for _ in range(8):
        await call(gw, "POST", LOGIN, {"email": "ahmed@example.sa"})
    await code_of(gw, 5)
    await eventually(lambda: gw.gateway.logins.waiting == 0)
    await gw.pool.execute("update login_codes set window_at = window_at - interval '61 minutes'")
    await call(gw, "POST", LOGIN, {"email": "ahmed@example.sa"})
    await code_of(gw, 6)


async def test_codes_are_stored_hashed(gw):
    await registered(gw)
    await call(gw, "POST", LOGIN, {"email": "ahmed@example.sa"})
    code = await code_of(gw)
    assert code not in str(dict(await gw.pool.fetchrow("select * from login_codes")))


async def test_without_mail_a_login_is_a_503_for_everybody(strict):
    await registered(strict)
    for address in ("ahmed@example.sa", "nobody@example.sa"):
        assert (await call(strict, "POST", LOGIN, {"email": address}))[0] == 503


class Mailbox:
    """What an SMTP server took."""

    def __init__(self) -> None:
        self.mails: list[Any] = []
        self.url = ""

    async def handle_DATA(self, server: SmtpServer, session: Any, envelope: Any) -> str:
        self.mails.append(envelope)
        return "250 taken"


@pytest.fixture
def smtp() -> Any:
    box = Mailbox()
    port = free_port()
    controller = Controller(box, hostname="127.0.0.1", port=port)
    controller.start()
    try:
        box.url = f"smtp://127.0.0.1:{port}"
        yield box
    finally:
        controller.stop()


async def test_mail_goes_by_smtp(smtp):
    await SmtpMailer(smtp.url, "gpu@example.com").send("ahmed@example.sa", "Your code", "Code: 12345678\n")
    (envelope,) = smtp.mails
    assert (envelope.mail_from, envelope.rcpt_tos) == ("gpu@example.com", ["ahmed@example.sa"])
    assert email.message_from_bytes(envelope.content).get_payload() == "Code: 12345678\r\n"


async def test_a_server_that_is_away_is_told_without_the_address():
    with pytest.raises(MailFailed) as raised:
        await SmtpMailer("smtp://127.0.0.1:9", "a@b.c").send("ahmed@example.sa", "S", "T")
    assert "ahmed" not in str(raised.value)


# --- deletion --------------------------------------------------------------------------------------------------------

WAITING = (
    "select count(*) from pg_stat_activity where datname = current_database() and wait_event_type = 'Lock'"
)
DELETION = {"confirm": "DELETE_MY_ACCOUNT", "reason": "moving on"}


async def delete(node: ProviderClient, body: Any = DELETION) -> tuple[int, Any]:
    return await call(node.gw, "DELETE", "/api/providers/me", body, x_provider_key=node.key)


async def earn(gw: TestGateway, account_id: int, nano: int) -> None:
    transfer = Transfer(
        uuid7(), AccountRef.platform("clearing"), AccountRef.earnings(account_id), nano, "grant"
    )
    async with gw.pool.acquire() as connection, connection.transaction():
        (result,) = await Ledger().apply(connection, [transfer])
        assert result.is_moved


async def test_a_deletion_leaves_earnings_in_the_book_and_no_name_anywhere(gw):
    node = await registered(gw, phone="+966500000000")
    await node.beat(provider_hostname="ahmeds-pc")
    await node.post("daemon-event", event_type="crash", details="ahmed's disk")
    await earn(gw, node.id, 5 * NANO)
    assert (await node.me())["total_earnings_halala"] == 500
    await gw.pool.execute("update nodes set state = 'offline'")
    status, body = await delete(node)
    assert (status, body["success"]) == (200, True)
    account = await AccountStore(gw.pool).show(node.id)
    assert (account.name, account.email, account.earnings_nano) == (f"[deleted] {node.id}", None, 5 * NANO)
    for table in ("accounts", "providers", "nodes", "daemon_events", "api_keys", "login_codes"):
        rows = [str(dict(row)) for row in await gw.pool.fetch(f"select * from {table}")]
        assert "ahmed" not in " ".join(rows).lower(), table
    await eventually(lambda: is_refused(gw, node.key))
    await registered(gw)  # the address is free again


@pytest.mark.parametrize("body", [{}, {"confirm": "yes"}, [], {"confirm": 5}])
async def test_a_deletion_without_its_words_is_a_400(gw, body):
    node = await registered(gw)
    assert (await delete(node, body))[0] == 400
    await node.me()


async def test_nobody_is_deleted_while_a_node_runs_or_a_withdrawal_is_pending(gw):
    node = await registered(gw)
    await node.beat()
    assert (await delete(node))[0] == 409
    await gw.pool.execute("update nodes set state = 'offline'")
    await earn(gw, node.id, NANO)
    pending = Transfer(
        uuid7(), AccountRef.earnings(node.id), AccountRef.platform("withdrawals"), NANO, "withdrawal", phase="pending"
    )  # fmt: skip
    async with gw.pool.acquire() as connection, connection.transaction():
        await Ledger().apply(connection, [pending])
    assert (await delete(node))[0] == 409
    async with gw.pool.acquire() as connection, connection.transaction():
        void = Transfer(uuid7(), None, None, 0, "", phase="void", pending_id=pending.id)
        await Ledger().apply(connection, [void])
    assert (await delete(node))[0] == 200


async def test_a_heartbeat_amid_a_deletion_leaves_no_node_behind(gw):
    node = await registered(gw)
    async with gw.pool.acquire() as connection:
        async with connection.transaction():
            await connection.execute("delete from providers where account_id = $1", node.id)
            beating = asyncio.create_task(node.beat(provider_hostname="ahmeds-pc"))
            await eventually(lambda: is_one(gw, WAITING))
        status, _ = await beating
    assert status == 503
    assert await gw.pool.fetchval("select count(*) from nodes") == 0
    assert (await node.beat())[0] == 403


async def test_a_deletion_that_meets_a_deadlock_is_tried_again(gw):
    """As with the chore that sums up nodes' time: it holds their facts when it asks for the provider's row."""
    node = await registered(gw)
    await node.beat()
    await gw.pool.execute("update nodes set state = 'offline'")
    with suppress(
        asyncpg.DeadlockDetectedError
    ):  # who asked last is the victim where a second went by between the two
        async with gw.pool.acquire() as connection, connection.transaction():
            await connection.execute("select from node_facts for update")
            deleting = asyncio.create_task(delete(node))
            await eventually(lambda: is_one(gw, WAITING))
            await connection.execute(
                "insert into provider_days (account_id, day) values ($1, current_date)", node.id
            )
    assert (await deleting)[0] == 200


async def is_one(gw: TestGateway, statement: str) -> bool:
    return bool(await gw.pool.fetchval(statement) == 1)


async def test_a_provider_that_is_a_renter_too_stays_one(gw):
    account = await AccountStore(gw.pool).create("both", balance_nano=NANO, is_provider=True)
    keys = KeyStore(gw.pool, load_pepper(gw.gateway.settings))
    _, node_key = await keys.create(account.id, prefix="dc1-provider-", scopes=("node",))
    _, key = await keys.create(account.id, prefix="sk-", scopes=("inference",))
    assert (await delete(ProviderClient(gw, account.id, node_key)))[0] == 200
    left = await AccountStore(gw.pool).show(account.id)
    assert (left.name, left.status, left.is_provider, left.balance_nano) == ("both", "active", False, NANO)
    await eventually(lambda: is_refused(gw, node_key))
    assert (await call(gw, "GET", "/v1/models", authorization=f"Bearer {key}"))[0] == 200


# --- what agents tell ------------------------------------------------------------------------------------------------


async def test_a_readiness_check_makes_a_node_that_is_connected_and_a_heartbeat_brings_it_online(gw):
    node = await registered(gw)
    checks = {"cuda": True, "pytorch": False, "vram_gb": 24, "driver": "550"}
    status, body = await node.post("readiness", checks=checks, node_id=node.node_id, daemon_version="0.1.0")
    assert (status, body["readiness_status"], body["checks"]) == (200, "failed", checks)
    assert (await node.me())["status"] == "connected"
    status, body = await node.post("readiness", node_id=node.node_id)
    assert (status, body["readiness_status"]) == (200, "ready")
    await node.beat()
    me = await node.me()
    assert (me["status"], me["readiness_status"], me["nodes"]) == ("online", "ready", {"online": 1})


async def test_a_node_of_another_provider_takes_no_readiness(gw):
    node, thief = await registered(gw), await registered(gw, email="thief@example.sa")
    await node.beat()
    status, body = await thief.post("readiness", node_id=node.node_id)
    assert (status, body["error"]) == (400, "node_id is not valid for this key.")
    assert await gw.pool.fetchval("select readiness from nodes") is None


async def test_events_are_kept_for_their_owner_alone(gw):
    node, other = await registered(gw), await registered(gw, email="other@example.sa")
    await node.beat()
    told = {
        "event_type": "crash",
        "severity": "error",
        "details": "x" * 5000,
        "timestamp": "2026-03-22T19:30:00",
    }
    status, body = await node.post("daemon-event", **told, node_id=node.node_id)
    assert (status, body) == (200, {"success": True, "event_type": "crash", "provider_id": node.id})
    await node.post("daemon-event", event_type="started")
    _, logs = await node.get("daemon-logs")
    assert [each["event_type"] for each in logs["events"]] == ["started", "crash"]
    assert logs["events"][1]["timestamp"] == "2026-03-22T19:30:00.000Z"
    assert logs["runtime"][0]["node_id"] == logs["events"][1]["node_id"] == node.node_id
    _, errors = await node.get("daemon-logs?severity=error&limit=1")
    assert errors["total"] == 1
    _, none = await other.get("daemon-logs")
    assert (none["events"], none["runtime"]) == ([], [])
    for query in ("limit=0", "limit=201", "limit=x", "severity=odd"):
        assert (await node.get(f"daemon-logs?{query}"))[0] == 400
    assert (await node.post("daemon-event", event_type="x", details="x" * 5001))[0] == 400


async def test_gpu_metrics_are_a_sample_a_minute_for_their_owner_and_admins(gw):
    node, other = await registered(gw), await registered(gw, email="other@example.sa")
    await node.beat(gpu_status=GPU)
    await gw.pool.execute("update gpu_samples set minute = minute - interval '1 minute'")
    await node.beat(gpu_status=GPU | {"gpu_util_pct": 50})
    await node.beat(gpu_status=GPU | {"gpu_util_pct": 60})
    for who in ("me", str(node.id)):
        status, body = await node.get(f"{who}/gpu-metrics")
        assert (status, [each["gpu_util_pct"] for each in body["samples"]]) == (200, [41, 60])
    assert (await node.get("me/gpu-metrics?limit=1"))[1]["samples"][0]["gpu_util_pct"] == 60
    assert (await node.get("me/gpu-metrics?since=2999-01-01T00:00:00Z"))[1]["total"] == 0
    assert (await node.get("me/gpu-metrics?since=never"))[0] == 400
    assert (await other.get(f"{node.id}/gpu-metrics"))[0] == 404
    path = f"/api/providers/{node.id}/gpu-metrics"
    status, body = await call(gw, "GET", path, x_admin_token=ADMIN)
    assert (status, body["total"]) == (200, 2)
    assert (await call(gw, "GET", path, x_admin_token="wrong"))[0] == 401


async def test_old_samples_and_events_are_deleted_and_of_the_others_the_newest_stay(gw):
    node = await registered(gw)
    await node.beat(gpu_status=GPU)
    await gw.pool.execute(
        "insert into gpu_samples (node_id, minute) select id, clock_timestamp() - interval '25 hours' from nodes"
    )
    await gw.pool.execute(
        "insert into daemon_events (account_id, event_type, severity, at) select $1, n::text, 'info',"
        " clock_timestamp() - case when n <= 10 then interval '31 days' else interval '0' end"
        " from generate_series(1, 1015) n",
        node.id,
    )
    await trim_events(gw.pool)
    assert await gw.pool.fetchval("select count(*) from gpu_samples") == 1
    kept = await gw.pool.fetchrow(
        "select count(*), min(event_type::int), max(event_type::int) from daemon_events"
    )
    assert tuple(kept) == (1000, 16, 1015)


async def test_a_host_without_a_gpu_has_no_samples(gw):
    node = await registered(gw)
    await node.beat(gpu_status={"gpu_util_pct": 0, "temp_c": 0, "gpu_count": 0, "all_gpus": []})
    assert (await node.get("me/gpu-metrics"))[1]["samples"] == []
    assert (await node.me())["gpu_metrics"] == {}


@pytest.mark.parametrize(
    ("version", "is_outdated"),
    [("0.0.9", True), ("0.1.0", False), ("9.0", False), ("", False), ("odd", False)],
)
async def test_an_agent_older_than_the_least_version_is_told_to_update(gw, version, is_outdated):
    node = await registered(gw)
    for told in ({"agent_version": version}, {"gpu_status": {"daemon_version": version}}):
        _, reply = await node.beat(**told)
        assert (reply["needs_update"], reply["update_available"]) == (is_outdated, is_outdated)


async def test_a_provider_has_a_bounded_number_of_nodes(settings, pool):
    own = replace(settings, developer_mode=True, provider_nodes_max=2)
    async with running_gateway(own, pool) as gw:
        node = await registered(gw)
        first = node.node_id
        assert (await node.beat())[0] == 200
        assert (await node.post("readiness"))[0] == 200
        node.node_id = "0197b0c4-5f0e-7c3e-9d5b-5a3f6f0c1a2b"
        assert (await node.beat())[0] == 400
        assert (await node.post("readiness", node_id=node.node_id))[0] == 400
        node.node_id = first
        assert (await node.beat())[0] == 200


# --- the public lists ------------------------------------------------------------------------------------------------

LISTS = ("/api/providers/available", "/api/providers/marketplace", "/api/providers/public",
         "/api/renters/available-providers")  # fmt: skip


async def listed(gw: TestGateway, path: str) -> list[dict[str, Any]]:
    status, body = await call(gw, "GET", path)
    assert status == 200
    return list(body if isinstance(body, list) else body["providers"])


@pytest.mark.parametrize("path", LISTS)
async def test_only_providers_that_are_there_are_listed(gw, path):
    node = await registered(gw)
    assert await listed(gw, path) == []
    await node.beat(gpu_status=GPU, cached_models=[MODEL])

    async def is_listed() -> bool:
        return [each["id"] for each in await listed(gw, path)] == [node.id]

    async def is_empty() -> bool:
        return await listed(gw, path) == []

    await eventually(is_listed)
    (card,) = await listed(gw, path)
    assert (card["gpu_model"], card["vram_gb"]) == ("NVIDIA RTX 4090", 24)
    assert "ahmed@" not in str(card)
    if path == "/api/providers/marketplace":
        assert card["price_per_min_halala"] == 40
    else:
        assert (card["is_live"], card["cached_models"]) == (True, [MODEL])
    await node.post("pause")
    await eventually(is_empty)


async def test_many_visitors_cost_one_look(gw, monkeypatch):
    looks = 0
    listed_of = gw.gateway.marketplace._store.listed

    async def counted() -> Any:
        nonlocal looks
        looks += 1
        return await listed_of()

    monkeypatch.setattr(gw.gateway.marketplace._store, "listed", counted)
    monkeypatch.setattr("gateway.marketplace.KEPT_S", 600.0)
    await asyncio.gather(*(listed(gw, "/api/providers/public") for _ in range(20)))
    assert looks == 1
