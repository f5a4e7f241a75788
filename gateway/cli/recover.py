"""Owns `poolgate recover`: the journals of dead processes brought into the book, or given up, by hand.

What is done with a journal is billing/recovery.py's; workers do the same by themselves, for the journals that they see.
"""

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias
from uuid import UUID

import asyncpg
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from billing.money import format_amount
from billing.recovery import ProcessLives, Recovered, abandon, journal_folders, recover
from billing.shipment import UnknownIncarnation
from config.defaults import Settings
from gateway.cli.output import Refused, print_json, print_table, stderr
from gateway.cli.parsing import Parser, add_command, json_option, settings_options
from gateway.cli.stores import with_database

DETAILS = """\
Running workers ship the journals of dead ones by themselves. This is for a disk that was brought from another
host, and for the time when no worker runs. It ships what can be read, returns what is left of the leases, and
removes the folder. Again is harmless: every turn is charged once.

--abandon gives up a process whose journal is lost or can't be read, without waiting for the grace
(lease_grace_s): what it had leased returns to the wallets at once. What its journal holds, if it ever
turns up, is then paid by the platform and never by a wallet."""

EXAMPLES = """\
  poolgate recover ./data/journal                every journal in there whose process is dead
  poolgate recover /mnt/old/journal/0199c2a4-7c1e-7d7c-b7b1-8a1c9f4f2a11
  poolgate recover --abandon 0199c2a4-7c1e-7d7c-b7b1-8a1c9f4f2a11"""


@dataclass(frozen=True, slots=True)
class Left:
    """A journal that was left as it is."""

    name: str
    reason: str


Found: TypeAlias = Recovered | Left


def add(commands: "argparse._SubParsersAction[Parser]") -> None:
    parser = add_command(
        commands, "recover", "bring journals of dead processes into the book", run=run, details=DETAILS,
        examples=EXAMPLES, options=(settings_options(), json_option()),
    )  # fmt: skip
    parser.add_argument(
        "dir",
        metavar="DIR",
        help="a folder of journals, or one journal; with --abandon also an incarnation's id",
    )
    parser.add_argument("--abandon", action="store_true", help="give up one process whose journal is lost")


def run(args: argparse.Namespace) -> int:
    # What was typed is looked at first: stores of a data folder take seconds to start.
    folders = [] if args.abandon else _folders(Path(args.dir))
    incarnation_id = _named(args.dir) if args.abandon else None

    async def work(pool: asyncpg.Pool, settings: Settings) -> tuple[list[Found], dict[int, str], Settings]:
        done: list[Found]
        if incarnation_id is not None:
            done = [await _abandon(args.dir, incarnation_id, pool, settings)]
        else:
            done = await _recover(folders, pool, settings)
        return done, await _names(pool, done), settings

    done, names, settings = with_database(args, work)
    if args.json:
        print_json([_as_json(one) for one in done])
    else:
        _show(done, names, settings)
    return 0


async def _recover(folders: list[Path], pool: asyncpg.Pool, settings: Settings) -> list[Found]:
    done: list[Found] = []
    with _progress() as progress:
        for folder in folders:
            task = progress.add_task(folder.name, total=None)
            try:
                found = await recover(
                    folder, pool, settings,
                    progress=lambda so_far, task=task: progress.update(task, completed=so_far.records),  # type: ignore[misc]
                )  # fmt: skip
                done.append(found)
            except ProcessLives:
                done.append(Left(folder.name, "its process lives"))
            except UnknownIncarnation:
                done.append(Left(folder.name, "not of this database"))
            except PermissionError as error:
                raise Refused(
                    f"{error.filename}: {error.strerror}: run this as the gateway's user"
                ) from error
            progress.remove_task(task)
    return done


def _folders(place: Path) -> list[Path]:
    if not place.is_dir():
        raise Refused(f"{place} is no folder: name the journals' folder, or one journal in it")
    if _id_of(place.resolve().name) is not None:
        return [place.resolve()]
    return journal_folders(place)


def _named(named: str) -> UUID:
    """`named`: an incarnation's id, or a folder of that name."""
    incarnation_id = _id_of(Path(named).name)
    if incarnation_id is None:
        raise Refused(f"{named!r} names no single process: give its journal's folder, or that folder's name")
    return incarnation_id


async def _abandon(named: str, incarnation_id: UUID, pool: asyncpg.Pool, settings: Settings) -> Recovered:
    folder = Path(named) if Path(named).is_dir() else None  # noqa: ASYNC240 - nothing else runs here
    if folder is None:
        written = await pool.fetchval("select journal from incarnations where id = $1", incarnation_id)
        folder = Path(written) if written else None
    if folder is not None and folder.name != str(incarnation_id):
        folder = folder / str(incarnation_id)
    try:
        return await abandon(incarnation_id, folder, pool, settings)
    except ProcessLives:
        raise Refused(
            f"the process of {incarnation_id} lives and ships its journal itself: stop it first"
        ) from None
    except UnknownIncarnation:
        raise Refused(
            f"this database knows no process {incarnation_id}: correct the id, or DATABASE_URL"
        ) from None


def _id_of(name: str) -> UUID | None:
    try:
        return UUID(name)
    except ValueError:
        return None


async def _names(pool: asyncpg.Pool, done: list[Found]) -> dict[int, str]:
    charged = {id_ for one in done if isinstance(one, Recovered) for id_ in one.accounts}
    rows = await pool.fetch("select id, name from accounts where id = any($1::bigint[])", sorted(charged))
    return {row["id"]: row["name"] for row in rows}


@contextmanager
def _progress() -> Iterator[Progress]:
    columns = (
        SpinnerColumn(), TextColumn("{task.description}"), TextColumn("{task.completed:,} turns"), TimeElapsedColumn(),
    )  # fmt: skip
    with Progress(*columns, console=stderr(), transient=True) as progress:
        yield progress


def _show(done: list[Found], names: dict[int, str], settings: Settings) -> None:
    def cells(one: Found) -> tuple[Any, ...]:
        if isinstance(one, Left):
            return (one.name, f"left: {one.reason}", "", "", "", "", "")
        charged, lost = (format_amount(nano, settings.currency) for nano in (one.amount_nano, one.lost_nano))
        return (
            one.incarnation_id,
            one.state,
            f"{one.records:,}",
            f"{one.turns:,}",
            charged,
            lost,
            one.quarantined,
        )

    print_table(
        ("INCARNATION", "STATE", ">RECORDS", ">NEW", ">CHARGED", ">PLATFORM LOSS", ">QUARANTINED"),
        map(cells, done),
        empty="there is no journal in this folder",
    )
    sums: dict[int, int] = {}
    for one in done:
        if isinstance(one, Recovered):
            for account_id, amount_nano in one.accounts.items():
                sums[account_id] = sums.get(account_id, 0) + amount_nano
    if sums:
        print()
        rows = [
            (names.get(id_, f"#{id_}"), format_amount(sums[id_], settings.currency)) for id_ in sorted(sums)
        ]
        print_table(("ACCOUNT", ">CHARGED"), rows, empty="")
    if any(isinstance(one, Recovered) and one.state == "abandoned" and not one.records for one in done):
        print("its leases are back in the wallets; turns of it that are found later are the platform's loss")


def _as_json(one: Found) -> dict[str, Any]:
    if isinstance(one, Left):
        return {"incarnation": one.name, "state": "left", "reason": one.reason}
    return {
        "incarnation": str(one.incarnation_id),
        "state": one.state,
        "records": one.records,
        "turns": one.turns,
        "quarantined": one.quarantined,
        "amount_nano": one.amount_nano,
        "loss_nano": one.lost_nano,
        "accounts": {str(id_): amount_nano for id_, amount_nano in sorted(one.accounts.items())},
    }
