"""Owns `poolgate audit`: proves the book and prints what breaks it.

What must hold is billing/audit's.
"""

import argparse
from typing import Any

import asyncpg

from billing.audit import Finding
from billing.audit import run as run_checks
from config.defaults import Settings
from gateway.cli.output import print_json, print_table
from gateway.cli.parsing import Parser, add_command, json_option, settings_options
from gateway.cli.stores import with_database

DETAILS = """\
Reads the whole book in one snapshot, while everything runs on: entries, balances, postings, leases, budgets
and usage must agree to the nano. Exit code 1 if anything is broken; warnings alone are 0."""

BROKEN = """\
The book is never edited: what is wrong is put right by further transfers (`poolgate account credit`). Keep this output
and a dump of the database, look at what was done about the time of the oldest row, and stop the gateways if more
rows come with each run."""

WARNED = "Look at the rows of usage_quarantine: those turns are recorded there and nobody was charged."


def add(commands: "argparse._SubParsersAction[Parser]") -> None:
    add_command(
        commands, "audit", "prove that the book is right, to the nano", run=run, details=DETAILS,
        examples="  poolgate audit\n  poolgate audit --json | jq .is_clean",
        options=(settings_options(), json_option()),
    )  # fmt: skip


def run(args: argparse.Namespace) -> int:
    async def work(pool: asyncpg.Pool, settings: Settings) -> list[Finding]:
        return await run_checks(pool, settings)

    findings = with_database(args, work)
    is_clean = all(finding.state != "broken" for finding in findings)
    if args.json:
        print_json({"is_clean": is_clean, "checks": [as_json(finding) for finding in findings]})
    else:
        show(findings, is_clean=is_clean)
    return 0 if is_clean else 1


def show(findings: list[Finding], *, is_clean: bool) -> None:
    print_table(
        ("CHECK", "STATE", ">ROWS", "WHAT MUST HOLD"),
        [(f.check.name, f.state, f.count or "", f.check.description) for f in findings],
        empty="",
    )
    for finding in findings:
        if finding.count:
            print(f"\n{finding.check.name}: {finding.count:,} rows, the first {len(finding.rows)}:")
            for row in finding.rows:
                print("  " + ", ".join(f"{name}={value}" for name, value in row.items()))
    print(f"\n{'The book is right.' if is_clean else BROKEN}")
    if any(finding.state == "warning" for finding in findings):
        print(WARNED)


def as_json(finding: Finding) -> dict[str, Any]:
    return {
        "name": finding.check.name,
        "description": finding.check.description,
        "state": finding.state,
        "count": finding.count,
        "rows": list(finding.rows),
    }
