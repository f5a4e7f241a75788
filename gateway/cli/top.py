"""Owns `poolgate top`: the pool in a terminal, again and again: nodes, engines, load, queue, tokens a second.

What it shows comes from a running gateway, by its admin route and its metrics; how it is drawn is rich's.
"""

import argparse
import json
import os
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from typing import Any

from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from gateway.cli.output import Refused, bar, print_json
from gateway.cli.parsing import Parser, add_command, json_option, settings_of, settings_options

KEY_VARIABLE = "POOLGATE_ADMIN_KEY"
TIMEOUT_S = 5.0
LINES_MAX = 40
"""Engines that are drawn, the busiest first: a terminal has so many lines."""

EXAMPLES = """\
  poolgate top                                   until Ctrl-C
  poolgate top --once                            one picture, for a log or a script
  poolgate top --url https://gw.example --every 5"""


def add(commands: "argparse._SubParsersAction[Parser]") -> None:
    parser = add_command(
        commands, "top", "show the pool live: nodes, engines, load, queue, tokens a second", run=run,
        examples=EXAMPLES, options=(settings_options(), json_option()),
        details=f"It asks a running gateway, with a key of scope admin (--key or {KEY_VARIABLE}):\n"
        "`poolgate key create --account NAME --scope admin` makes one.",
    )  # fmt: skip
    parser.add_argument("--url", help="the gateway (default: host and port of the settings)")
    parser.add_argument("--key", help=f"a key of scope admin (default: {KEY_VARIABLE})")
    parser.add_argument(
        "--every", type=_seconds, default=2.0, metavar="S", help="seconds between pictures (default: 2)"
    )
    parser.add_argument("--once", action="store_true", help="draw one picture and end")


def run(args: argparse.Namespace) -> int:
    settings = settings_of(args)
    key = args.key or os.environ.get(KEY_VARIABLE, "")
    if not key:
        raise Refused(
            f"set {KEY_VARIABLE} or --key: `poolgate key create --account NAME --scope admin` makes a key"
        )
    watch = Watch(args.url or f"http://{settings.host}:{settings.port}", key)
    before = watch.look()
    if args.once or args.json:
        time.sleep(min(1.0, args.every))
        now = watch.look()
        if args.json:
            print_json(now.pool | {"rates": now.rates(before)})
        else:
            # A pipe has no width: what was cut off would be worse than a long line.
            width = None if sys.stdout.isatty() else 1000
            Console(highlight=False, width=width).print(picture(now, before))
        return 0
    with Live(
        picture(before, before), screen=True, auto_refresh=False, console=Console(highlight=False)
    ) as live:
        while True:
            time.sleep(args.every)
            now = watch.look()
            live.update(picture(now, before), refresh=True)
            before = now


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0.1 <= seconds <= 3600:
        raise argparse.ArgumentTypeError("must be seconds from 0.1 to 3600")
    return seconds


class Seen:
    """One look: the admin route's answer, and counters of the metrics at that moment."""

    def __init__(self, pool: Mapping[str, Any], counters: Mapping[str, float], moment_s: float) -> None:
        self.pool = dict(pool)
        self.counters = counters
        self.moment_s = moment_s

    def rates(self, before: "Seen") -> dict[str, float]:
        """What was counted a second since `before`; a counter that began anew says nothing."""
        seconds = max(0.001, self.moment_s - before.moment_s)
        return {
            name: max(0.0, (value - before.counters.get(name, 0.0)) / seconds) if self is not before else 0.0
            for name, value in self.counters.items()
        }


class Watch:
    """Asks one gateway. Raises Refused with what to do."""

    def __init__(self, url: str, key: str) -> None:
        self.url = url.rstrip("/")
        self._key = key

    def look(self) -> Seen:
        """Now."""
        pool = json.loads(self._get("/api/admin/routing/pool"))
        return Seen(pool, counters_of(self._get("/metrics").decode()), time.monotonic())

    def _get(self, path: str) -> bytes:
        request = urllib.request.Request(  # noqa: S310 - the operator names the gateway
            self.url + path, headers={"authorization": f"Bearer {self._key}"}
        )
        try:
            with urllib.request.urlopen(request, timeout=TIMEOUT_S) as reply:  # noqa: S310
                body: bytes = reply.read()
                return body
        except urllib.error.HTTPError as error:
            if error.code in (401, 403):
                raise Refused(
                    f"the gateway at {self.url} refused the key ({error.code}): it must have the scope admin"
                ) from None
            raise Refused(f"the gateway at {self.url} answered {error.code} to {path}") from None
        except (OSError, ValueError) as error:
            raise Refused(f"the gateway at {self.url} can't be reached ({error}): is it running?") from None


COUNTED = {
    ("poolgate_turns_total", None): "turns",
    ("poolgate_tokens_total", "prompt"): "prompt_tokens",
    ("poolgate_tokens_total", "cached_prompt"): "cached_tokens",
    ("poolgate_tokens_total", "completion"): "output_tokens",
    ("poolgate_refusals_total", None): "refusals",
    ("poolgate_queue_turns_total", None): "queued",
}


def counters_of(metrics: str) -> dict[str, float]:
    """The sums that are shown as rates."""
    sums = dict.fromkeys(COUNTED.values(), 0.0)
    for family in text_string_to_metric_families(metrics):
        for sample in family.samples:
            name = COUNTED.get((sample.name, sample.labels.get("kind")))
            if name is not None:
                sums[name] += sample.value
    return sums


# --- the picture ------------------------------------------------------------------------------------------------------


def picture(now: Seen, before: Seen) -> RenderableType:
    """All of it, for a terminal of any width."""
    engines = now.pool["engines"]
    parts: list[RenderableType] = [headline(now, before), _engines(engines[:LINES_MAX])]
    if len(engines) > LINES_MAX:
        parts.append(Text(f"and {len(engines) - LINES_MAX:,} engines with less load", style="dim"))
    away = [node for node in now.pool["nodes"] if node["state"] != "online"]
    if away:
        parts.append(_away(away[:LINES_MAX]))
    if now.pool["queue"]["lines"]:
        parts.append(_lines(now.pool["queue"]["lines"]))
    return Group(*parts)


def headline(now: Seen, before: Seen) -> Text:
    """Sums and rates."""
    pool, rates = now.pool, now.rates(before)
    queue = pool["queue"]
    turns = sum(engine["load"]["turns"] + engine["load"]["others_turns"] for engine in pool["engines"])
    waiting = queue["waiting"] + queue["others"]
    return Text.assemble(
        (f"{pool['nodes_online']:,} nodes  {len(pool['engines']):,} engines  ", "bold"),
        f"{turns:,} turns in flight  ", (f"{waiting:,} waiting  ", "yellow" if waiting else ""),
        f"{rates['turns']:,.1f} turns/s  {rates['prompt_tokens'] + rates['cached_tokens']:,.0f} prompt tokens/s "
        f"({_percent(rates['cached_tokens'], rates['prompt_tokens'])} cached)  "
        f"{rates['output_tokens']:,.0f} output tokens/s  {rates['refusals']:,.1f} refused/s",
    )  # fmt: skip


def _percent(part: float, rest: float) -> str:
    return f"{part / (part + rest):.0%}" if part + rest else "0%"


def _engines(engines: list[dict[str, Any]]) -> Table:
    table = Table(box=None, header_style="bold", pad_edge=False, expand=False)
    for column in ("ENGINE", "MODEL", "STATE"):
        table.add_column(column, no_wrap=True)
    for column in ("TURNS", "TOKENS", "RUNNING", "WAITING", "CACHED"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("KV", no_wrap=True)
    for engine in engines:
        load = engine["load"]
        state = "broken" if engine["is_open"] else "full" if engine["cap"] is not None else "ready"
        style = {"broken": "red", "full": "yellow", "ready": "green"}[state]
        table.add_row(
            escape(_short(engine["engine"])), escape(", ".join(engine["models"])[:40]), Text(state, style=style),
            f"{load['turns'] + load['others_turns']:,}", f"{load['tokens'] + load['others_tokens']:,}",
            f"{load['running']:,}", f"{load['waiting']:,}", f"{engine['held_tokens']:,}",
            f"{bar(load['kv_usage'], 10):<10} {load['kv_usage']:.0%}",
        )  # fmt: skip
    return table


def _short(engine: str) -> str:
    """A node's id by its first eight characters."""
    node, _, rest = engine.partition("/")
    return f"{node[:8]}/{rest}"


def _away(nodes: list[dict[str, Any]]) -> Table:
    table = Table(box=None, header_style="bold", pad_edge=False)
    for column in ("NODE", "HOST", "STATE", "LAST HEARD OF"):
        table.add_column(column, no_wrap=True)
    for node in nodes:
        age = node["heartbeat_age_s"]
        table.add_row(
            node["node_id"][:8], escape(node["hostname"]), node["state"],
            "never" if age is None else f"{age:,.0f} s ago",
        )  # fmt: skip
    return table


def _lines(lines: list[dict[str, Any]]) -> Table:
    table = Table(box=None, header_style="bold", pad_edge=False)
    for column in ("WAITING FOR", "TURNS"):
        table.add_column(column, no_wrap=True)
    for line in lines:
        provider = "" if line["provider_id"] is None else f" of provider {line['provider_id']}"
        table.add_row(escape(line["model"] + provider), f"{line['waiting']:,}")
    return table
