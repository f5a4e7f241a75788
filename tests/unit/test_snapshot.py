"""The snapshot's index, and the registry that makes one from rows: what lives on, what is left out, what is told."""

import logging
import random
from collections.abc import Iterable
from typing import Any

import pytest

from config.defaults import Settings
from nodes.heartbeats import CachedRow, EngineRow, PoolRows
from nodes.networks import AllowedNetworks, EngineUrlRefused
from nodes.registry import Registry
from nodes.routing.prefixes import TOKENS_UNTOLD
from nodes.routing.router import Need, NoEngine, choose
from nodes.routing.snapshot import Engine, Snapshot

SETTINGS = Settings(breaker_failures=2)


def row(engine_id: str = "e0", node: str = "n1", port: int = 9001, **of: Any) -> EngineRow:
    models = tuple(
        {"id": name, "context_length": length, "kind": "generate", "parent": None}
        for name, length in of.pop("models", {"m": 2048}).items()
    )
    given = {"account_id": 1, "url": f"http://127.0.0.1:{port}", "restarts": 0} | of
    return EngineRow(node_id=node, engine_id=engine_id, models=models, **given)


@pytest.fixture
def registry(clock) -> Registry:
    return Registry(SETTINGS, AllowedNetworks("127.0.0.0/8,10.0.0.0/8", own_ports=(8080,)), clock)


def test_an_empty_snapshot_serves_nothing():
    assert (Snapshot().by_model.get("m"), Snapshot().models(), Snapshot().nodes_online) == (None, {}, 0)


def test_engines_are_found_by_each_model_that_they_serve(registry):
    registry.apply([row("a", models={"m": 1, "lora": 1}), row("b", port=9002)], 1)
    snapshot = registry.snapshot
    assert [engine.engine_id for engine in snapshot.by_model["m"]] == ["a", "b"]
    assert [engine.engine_id for engine in snapshot.by_model["lora"]] == ["a"]
    assert len(snapshot.engines) == 2


def test_a_model_has_the_largest_context_that_any_engine_gives_it(registry):
    registry.apply([row("a", models={"m": 2048}), row("b", models={"m": 8192}), row("c", models={"m": 0})], 1)
    assert registry.snapshot.models()["m"].context_length == 8192


class Store:
    """Answers with rows that a test names; away while there are none."""

    def __init__(self, *answers: PoolRows) -> None:
        self.answers = list(answers)
        self.asked: list[tuple[set[str], set[str]] | None] = []

    async def pool(self) -> PoolRows:
        self.asked.append(None)
        return self._answer()

    async def changed(self, nodes: Iterable[str], accounts: Iterable[str]) -> PoolRows:
        self.asked.append((set(nodes), set(accounts)))
        return self._answer()

    def _answer(self) -> PoolRows:
        if not self.answers:
            raise OSError("away")
        return self.answers.pop(0)


async def test_a_change_reads_its_node_alone_and_leaves_the_others_as_they_are(registry):
    all_rows = [
        row(node="n1"),
        row(node="n2", port=9002),
        row("e1", node="n2", port=9003),
        row(node="n3", port=9004),
    ]
    on_disk = [CachedRow("m", "n1"), CachedRow("m", "n2"), CachedRow("n", "n2")]
    changed = PoolRows(
        [row("e1", node="n2", models={"other": 1})], 2, [CachedRow("m", "n2")], frozenset(("n2", "n9"))
    )
    store = Store(PoolRows(all_rows, 3, on_disk), changed)
    await registry.reload(store)
    kept = registry.engine("n1/e0")
    registry.node_changed("n2")
    registry.node_changed("n9")
    registry.account_changed("5")
    await registry.reload(store)
    assert store.asked == [None, ({"n2", "n9"}, {"5"})], "the first time all"
    assert {engine.key for engine in registry.snapshot.engines} == {"n1/e0", "n2/e1", "n3/e0"}
    assert registry.engine("n1/e0") is kept
    assert set(registry.snapshot.by_model) == {"m", "other"}
    assert registry.snapshot.nodes_online == 2
    assert {model: set(nodes) for model, nodes in registry.snapshot.cached.items()} == {"m": {"n1", "n2"}}


async def test_what_changed_while_rows_could_not_be_read_is_read_afterwards(registry):
    store = Store(PoolRows([row()], 1, []))
    await registry.reload(store)
    registry.node_changed("n1")
    assert not await registry.reload(store)
    registry.account_changed("7")
    store.answers.append(PoolRows([], 0, [], frozenset(("n1",))))
    assert await registry.reload(store)
    assert store.asked[-1] == ({"n1"}, {"7"})
    assert registry.snapshot.engines == ()


async def test_an_account_that_owns_no_node_makes_no_new_snapshot(registry):
    store = Store(PoolRows([row()], 1, []), PoolRows([], 1, [], frozenset()))
    await registry.reload(store)
    before = registry.snapshot
    registry.account_changed("7")
    assert await registry.reload(store)
    assert registry.snapshot is before


def test_the_index_can_not_be_written(registry):
    registry.apply([row()], 1)
    with pytest.raises(TypeError):
        registry.snapshot.by_model["other"] = ()


def test_an_engine_keeps_its_load_and_breaker_from_one_snapshot_to_the_next(registry):
    registry.apply([row()], 1)
    engine = registry.engine("n1/e0")
    engine.load.turns = 7
    registry.engine_failed(engine)
    before = registry.snapshot
    registry.apply([row(models={"m": 4096, "new": 1})], 1)
    assert registry.engine("n1/e0") is engine
    assert (engine.load.turns, engine.breaker.failures) == (7, 1)
    assert set(engine.models) == {"m", "new"}
    assert registry.snapshot is not before
    assert set(before.by_model) == {"m"}, "a choice under way goes on with its own picture"


def test_a_group_is_found_by_model_kind_and_provider(registry):
    registry.apply([row("a", models={"m": 2048, "n": 4096}), row("b", models={"m": 8192})], 1)
    snapshot = registry.snapshot
    asked = [
        (model, kind, who)
        for model in ("m", "n", "o")
        for kind in ("generate", "embed")
        for who in (None, 1, 2)
    ]
    assert [snapshot.group(*of) for of in asked] == [snapshot.groups.get(of) for of in asked]
    assert [of for of in asked if snapshot.group(*of) is not None] == [
        ("m", "generate", None), ("m", "generate", 1), ("n", "generate", None), ("n", "generate", 1),
    ]  # fmt: skip
    assert Snapshot().group("m", "generate", None) is None


def test_a_group_tells_the_largest_and_the_smallest_context_of_its_engines(registry):
    registry.apply([row("a", models={"m": 2048, "n": 4096}), row("b", models={"m": 8192, "n": 0})], 1)
    groups = registry.snapshot.groups
    assert [(group.context_max, group.context_min) for group in (groups["m", "generate", None],)] == [
        (8192, 2048)
    ]
    assert (groups["n", "generate", 1].context_max, groups["n", "generate", 1].context_min) == (None, 4096)
    assert [engine.engine_id for engine in groups["n", "generate", None].engines] == ["b", "a"], (
        "roomiest first"
    )


async def test_an_engine_that_answers_its_probes_gets_turns_again(registry, clock):
    registry.apply([row()], 1)
    engine, rng, need = registry.engine("n1/e0"), random.Random(1), Need("m", "generate", 1)
    for _ in range(2):
        registry.engine_failed(engine)
    with pytest.raises(NoEngine):
        choose(registry.snapshot, need, sample=4, turns_max=9, rng=rng)

    async def probe(_engine: Engine) -> bool:
        return True

    for _ in range(SETTINGS.breaker_successes):
        await registry._probe(engine, probe)
    assert choose(registry.snapshot, need, sample=4, turns_max=9, rng=rng) is engine


@pytest.mark.parametrize("change", [{"port": 9009}, {"restarts": 1}])
def test_an_engine_that_was_started_anew_has_a_closed_breaker(registry, change):
    registry.apply([row()], 1)
    engine = registry.engine("n1/e0")
    for _ in range(2):
        registry.engine_failed(engine)
    assert engine.breaker.is_open
    registry.apply([row()], 1)
    assert engine.breaker.is_open, "nothing changed"
    registry.apply([row(**change)], 1)
    assert not engine.breaker.is_open
    assert engine.port == change.get("port", 9001)


def test_an_engine_that_returns_is_another_one(registry):
    registry.apply([row()], 1)
    first = registry.engine("n1/e0")
    registry.apply([], 0)
    assert registry.engine("n1/e0") is None
    registry.apply([row()], 1)
    assert registry.engine("n1/e0") is not first


def test_slots_of_two_nodes_with_the_same_name_are_two_engines(registry):
    registry.apply([row(node="n1"), row(node="n2", port=9002)], 2)
    assert {engine.key for engine in registry.snapshot.engines} == {"n1/e0", "n2/e0"}


def test_whoever_listens_is_told_of_each_snapshot(registry):
    told: list[int] = []
    registry.on_change.append(lambda snapshot: told.append(len(snapshot.engines)))
    registry.apply([row()], 1)
    registry.apply([], 0)
    assert told == [1, 0]


def test_an_engine_outside_of_the_networks_is_left_out_and_the_others_stay(registry, caplog):
    with caplog.at_level(logging.WARNING):
        registry.apply([row("good"), row("bad", url="http://192.0.2.1:9001")], 1)
    assert [engine.engine_id for engine in registry.snapshot.engines] == ["good"]
    assert [record.action for record in caplog.records] == ["engine_refused"]


@pytest.mark.parametrize(
    ("url", "address"),
    [
        ("http://127.0.0.1:9001", ("127.0.0.1", 9001)),
        ("http://localhost:9001/", ("127.0.0.1", 9001)),
        ("http://10.1.2.3", ("10.1.2.3", 80)),
        ("http://10.1.2.3:8080", ("10.1.2.3", 8080)),  # our port, but another machine's
    ],
)
def test_addresses_that_may_be_called(url, address):
    found = AllowedNetworks("127.0.0.0/8,10.0.0.0/8", own_ports=(8080,)).address(url)
    assert (found.host, found.port) == address


@pytest.mark.parametrize(
    "url",
    [
        "http://192.0.2.1:9001",
        "http://169.254.169.254/",  # clouds' metadata service
        "http://[::1]:9001",  # not listed here
        "http://[::ffff:192.0.2.1]:9001",
        "http://[::ffff:127.0.0.1]:8080",
        "http://[::1%25lo]:9001",
        "http://127.0.0.1:8080",  # the gateway itself
        "http://localhost:8080",
        "http://127.9.9.9:8080",
        "https://127.0.0.1:9001",
        "http://engine.example:9001",  # a name may point elsewhere tomorrow
        "http://127.0.0.1:9001/v1",
        "http://127.0.0.1:9001/?x=1",
        "http://user@127.0.0.1:9001",
        "http://user:pw@127.0.0.1:9001",
        "http://127.0.0.1:99999",
        "http://127.1:9001",
        "http://2130706433:9001",
        "http://0x7f000001:9001",
        "http://127.0.0.1:9001#x",
        "http://",
        "127.0.0.1:9001",
        "",
    ],
)
def test_addresses_that_may_not(url):
    with pytest.raises(EngineUrlRefused):
        AllowedNetworks("127.0.0.0/8,10.0.0.0/8", own_ports=(8080,)).address(url)


@pytest.mark.parametrize("url", ["http://0.0.0.0:8080", "http://[::]:8080", "http://[::1]:8080"])
def test_every_name_of_this_host_with_the_gateways_port_is_the_gateway(url):
    with pytest.raises(EngineUrlRefused):
        AllowedNetworks("0.0.0.0/0,::/0", own_ports=(8080,)).address(url)


def test_engines_on_ipv6_loopback_may_be_called_where_it_is_listed():
    found = AllowedNetworks("::1/128").address("http://[::1]:9001")
    assert (found.host, found.port) == ("::1", 9001)


def test_an_engine_is_taken_to_keep_most_of_its_cache_for_prompts_or_a_common_ones_if_it_does_not_tell(
    registry,
):
    registry.apply([row("told", kv_tokens=10_000), row("untold", port=9002)], 1)
    held = {each.engine_id: each.held.tokens_max for each in registry.snapshot.engines}
    assert held == {"told": 8500, "untold": int(0.85 * TOKENS_UNTOLD)}
