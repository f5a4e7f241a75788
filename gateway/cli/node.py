"""Owns `poolgate node`: who brought nodes, and whether they may take work.

Providers and nodes as such are nodes/providers.py's and nodes/heartbeats.py's.
"""

import argparse
import uuid
from typing import Any

import asyncpg

from config.defaults import Settings
from gateway.cli.account import find_account
from gateway.cli.output import Refused, print_json, print_table, when
from gateway.cli.parsing import Parser, add_command, add_group, json_option, settings_options
from gateway.cli.stores import with_database
from gateway.identity.accounts import AccountStore
from nodes.events import EventStore
from nodes.heartbeats import NodeStore
from nodes.providers import Provider, ProviderStore, UnknownProvider

DETAILS = """\
A provider registers itself, and its nodes take work when it is approved (unless the setting
provider_approval is `automatic`). What is changed here holds within a second."""


def add(commands: "argparse._SubParsersAction[Parser]") -> None:
    parser = add_command(
        commands, "node", "list providers and nodes, approve or refuse them", details=DETAILS,
        examples="  poolgate node list\n  poolgate node approve 42",
    )  # fmt: skip
    group = add_group(parser)
    shared = (settings_options(), json_option())

    add_command(
        group, "list", "list the providers and their nodes", run=run_list, options=shared,
        examples="  poolgate node list\n  poolgate node list --json | jq '.[] | select(.approval == \"pending\").id'",
    )  # fmt: skip

    for name, summary, approval in (
        ("approve", "let a provider's nodes take work", "approved"),
        ("reject", "refuse a provider's nodes, or take its approval back", "rejected"),
    ):
        decide = add_command(
            group, name, summary, run=run_decide, options=shared, examples=f"  poolgate node {name} 42"
        )
        decide.add_argument("provider", metavar="PROVIDER", help="id or account name of the provider")
        decide.set_defaults(approval=approval)

    show = add_command(
        group, "show", "list the nodes of a provider", run=run_show, options=shared,
        examples="  poolgate node show 42\n  poolgate node show rack-1 --json",
    )  # fmt: skip
    show.add_argument("provider", metavar="PROVIDER", help="id or account name of the provider")

    for name, summary, details in (
        (
            "suspend",
            "send no turns to a node until it is released",
            "Whatever it reports meanwhile; begun turns end.",
        ),
        ("release", "let turns go to a suspended node again", "Unless its provider is paused."),
    ):
        move = add_command(
            group, name, summary, run=run_move, options=shared, details=details,
            examples=f"  poolgate node {name} 0197b0c4-5f0e-7c3e-9d5b-5a3f6f0c1a2b",
        )  # fmt: skip
        move.add_argument("node", metavar="NODE", help="id of the node: `poolgate node show` tells it")
        move.set_defaults(is_release=name == "release")


def run_list(args: argparse.Namespace) -> int:
    async def work(pool: asyncpg.Pool, _settings: Settings) -> list[Provider]:
        return await ProviderStore(pool).all()

    providers = with_database(args, work)
    if args.json:
        print_json([as_json(provider) for provider in providers])
        return 0
    print_table(
        ("ID", "PROVIDER", "EMAIL", "APPROVAL", "STATUS", ">NODES", "GPU", ">UPTIME", ">SCORE", "LAST HEARD"),
        [
            (
                each.id, each.name, each.email or "", each.approval_status, each.status,
                sum(each.states.values()), each.gpu_model, percent(each.uptime_percent),
                percent(each.reliability_score),
                when(each.last_heartbeat_at) if each.last_heartbeat_at else "",
            )
            for each in providers
        ],
        empty="no providers yet: they register at /api/providers/register",
    )  # fmt: skip
    return 0


def run_show(args: argparse.Namespace) -> int:
    async def work(pool: asyncpg.Pool, _settings: Settings) -> list[dict[str, Any]]:
        account = await find_account(AccountStore(pool), args.provider)
        return await EventStore(pool).runtime(account.id)

    nodes = with_database(args, work)
    if args.json:
        print_json(
            [
                {
                    "node_id": node["node_id"], "hostname": node["hostname"], "state": node["state"],
                    "agent_version": node["agent_version"],
                    "last_heartbeat_at": node["last_heartbeat_at"] and node["last_heartbeat_at"].isoformat(),
                }
                for node in nodes
            ]
        )  # fmt: skip
        return 0
    print_table(
        ("NODE", "HOST", "STATE", "AGENT", "LAST HEARD"),
        [
            (
                node["node_id"], node["hostname"], node["state"], node["agent_version"],
                when(node["last_heartbeat_at"]) if node["last_heartbeat_at"] else "",
            )
            for node in nodes
        ],
        empty="no nodes yet: an agent with a key of this provider brings the first one",
    )  # fmt: skip
    return 0


def run_decide(args: argparse.Namespace) -> int:
    async def work(pool: asyncpg.Pool, _settings: Settings) -> Provider:
        accounts, providers = AccountStore(pool), ProviderStore(pool)
        account = await find_account(accounts, args.provider)
        try:
            await providers.standing(account.id)
        except UnknownProvider:
            raise Refused(f"{account.name} is no provider: `poolgate node list` shows them") from None
        await accounts.set_approval(account.id, args.approval)
        return await providers.show(account.id)

    provider = with_database(args, work)
    if args.json:
        print_json(as_json(provider))
    elif args.approval == "approved":
        print(f"{provider.name} (id {provider.id}) is approved: its nodes may take work")
    else:
        print(f"{provider.name} (id {provider.id}) is rejected: its nodes take no work")
    return 0


def run_move(args: argparse.Namespace) -> int:
    node_id = node_id_of(args.node)

    async def work(pool: asyncpg.Pool, settings: Settings) -> str | None:
        store = NodeStore(pool)
        if args.is_release:
            return await store.release(node_id, settings.heartbeat_grace_s)
        return await store.suspend(node_id)

    state = with_database(args, work)
    if state is None:
        raise Refused(f"there is no node {node_id}")
    if args.json:
        print_json({"node_id": node_id, "state": state})
    else:
        print(f"node {node_id} is {state}")
    return 0


def node_id_of(typed: str) -> str:
    try:
        return str(uuid.UUID(typed))
    except ValueError:
        raise Refused(f"{typed!r} is no node id: it is a UUID") from None


def percent(value: float | None) -> str:
    return "" if value is None else f"{value:.1f} %"


def as_json(provider: Provider) -> dict[str, Any]:
    heard = provider.last_heartbeat_at
    return {
        "id": provider.id,
        "name": provider.name,
        "email": provider.email,
        "approval": provider.approval_status,
        "status": provider.status,
        "nodes": dict(provider.states),
        "gpu_model": provider.gpu_model,
        "uptime_percent": provider.uptime_percent,
        "reliability_score": provider.reliability_score,
        "last_heartbeat_at": heard.isoformat() if heard else None,
    }
