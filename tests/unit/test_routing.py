"""What the router weighs: caches, homes, sessions, regions, caps and shares."""

import random
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from config.defaults import Settings
from nodes.routing.explain import explain
from nodes.routing.filters import Wishes
from nodes.routing.prefixes import HOME_PLACES, Prefixes
from nodes.routing.router import Need, NoEngine, Router, hashes_of
from nodes.routing.scorers import Policy
from nodes.routing.snapshot import Engine, Snapshot
from tests.unit.test_router import M, engine

SYSTEM = [b"%02d" % number * 2000 for number in range(64)]
"""64 system prompts of 4,000 bytes, about 1,000 tokens."""


def router(**of: Any) -> Router:
    made = Router(Policy.of(Settings(**of)), Prefixes(10_000), sessions_max=3)
    made._rng = random.Random(5)
    return made


def need(prompt: bytes = b"hi", **of: Any) -> Need:
    body = b'{"model":"m","messages":[{"role":"user","content":"%b"}]}' % prompt
    return Need(**{"model": M, "kind": "generate", "tokens": len(body) // 4, "body": body, "client": 1} | of)


def test_a_long_prompt_goes_where_its_beginning_is():
    engines = [engine(str(number)) for number in range(8)]
    snapshot, of = Snapshot.of(engines, 1), router()
    first = [of.route(snapshot, need(system)) for system in SYSTEM]
    for _ in range(5):
        again = [of.route(snapshot, need(system + b"Another question.")) for system in SYSTEM]
        assert sum(one is other for one, other in zip(first, again, strict=True)) >= 60


def test_another_accounts_prompt_is_not_drawn_there():
    """Caches are kept apart by salts, so there is nothing for it."""
    engines = [engine(str(number)) for number in range(8)]
    snapshot, of = Snapshot.of(engines, 1), router()
    of.route(snapshot, need(SYSTEM[0]))
    group = snapshot.groups[M, "generate", None]
    wanted = need(SYSTEM[0], client=2)
    assert of.ties_of(group, wanted, hashes_of(wanted)).matched == {}
    wanted = need(SYSTEM[0])
    assert of.ties_of(group, wanted, hashes_of(wanted)).matched != {}


def test_an_engine_that_is_much_busier_is_left_for_an_idle_one():
    engines = [engine("a"), engine("b")]
    snapshot, of = Snapshot.of(engines, 1), router(routing_load_weight=0.25)
    holder = of.route(snapshot, need(SYSTEM[0]))
    holder.load.tokens = 3_000
    assert of.route(snapshot, need(SYSTEM[0])) is holder, "what it has in flight weighs less than a prefill"
    holder.load.tokens = 6_000
    assert of.route(snapshot, need(SYSTEM[0])) is not holder


@pytest.mark.parametrize("caches", [22_000, 11_000], ids=["all fit", "half fit"])
def test_caches_fill_evenly_so_no_prompt_is_given_up_while_there_is_room_elsewhere(caches):
    """64 prompts of 1,000 tokens on four engines: by hashes alone one of them would get some 22."""
    engines = [engine(str(number)) for number in range(4)]
    for one in engines:
        one.held.tokens_max = caches
    snapshot, of = Snapshot.of(engines, 1), router()
    for system in SYSTEM:
        of.route(snapshot, need(system))
    held = [one.held.tokens for one in engines]
    assert min(held) >= min(caches, 16_000) - 2_000, held
    before = len(of._prefixes.news)
    for system in SYSTEM:
        of.route(snapshot, need(system))
    assert (len(of._prefixes.news) == before) is (caches == 22_000), "what all hold goes where it is"


def test_a_prompt_stays_at_its_second_home_when_the_first_has_room_again():
    engines = [engine(str(number)) for number in range(2)]
    snapshot, of = Snapshot.of(engines, 1), router()
    hashes = hashes_of(need(SYSTEM[0]))
    first, second = snapshot.groups[M, "generate", None].ring.homes(hashes[HOME_PLACES[len(hashes)]])
    first.held.tokens_max = second.held.tokens_max = 4_000
    for number in (1, 2, 3):
        of._prefixes.note(first, hashes_of(need(SYSTEM[number])), 1000)
    assert of.route(snapshot, need(SYSTEM[0])) is second
    of._prefixes.forget(first)
    assert of.route(snapshot, need(SYSTEM[0])) is second


def test_a_prompt_that_was_given_up_stays_where_it_was_while_all_caches_are_full():
    """More prompts than caches hold: those that move displace others, and find nothing."""
    engines = [engine(str(number)) for number in range(2)]
    for one in engines:
        one.held.tokens_max = 10_500
    snapshot, of = Snapshot.of(engines, 1), router()
    first = {system: of.route(snapshot, need(system)) for system in SYSTEM}
    for _ in range(3):
        for system in SYSTEM:
            assert not of._prefixes.trail(hashes_of(need(system))).depth, "64 are three times what is held"
            assert of.route(snapshot, need(system)) is first[system]


def test_what_an_engine_was_sent_before_it_was_started_anew_draws_nothing_there():
    one = engine("a")
    of = router()
    of.route(Snapshot.of([one, engine("b")], 1), need(SYSTEM[0]))
    hashes = hashes_of(need(SYSTEM[0]))
    holder = of._prefixes.trail(hashes).last
    assert holder is not None
    of._prefixes.forget(holder)
    holder.incarnation += 1
    assert of._prefixes.trail(hashes).last is None


def test_where_prompts_were_is_remembered_within_a_bound():
    of = Prefixes(50)
    one = engine("a")
    for system in SYSTEM:
        of.note(one, hashes_of(need(system)), 1000)
    assert of.homes == 50


@pytest.mark.parametrize("state", ["full", "open", "tried", "other provider", "small"])
def test_affinity_never_overrides_a_filter(state):
    engines = [engine(str(number), context=8192) for number in range(4)]
    snapshot, of = Snapshot.of(engines, 1), router()
    holder = of.route(snapshot, need(SYSTEM[0]))
    wanted = need(SYSTEM[0])
    if state == "full":
        holder.load.turns, holder.load.cap = 1, 1
    elif state == "open":
        holder.breaker.is_open = True
    elif state == "tried":
        wanted.tried = [holder]
    elif state == "other provider":
        engines.append(engine("theirs", account=2))
        snapshot, wanted.account_id = Snapshot.of(engines, 1), 2
    else:
        holder.models = {M: type(holder.models[M])(M, 512)}
        snapshot, wanted.context = Snapshot.of(engines, 1), 1000
    assert of.route(snapshot, wanted) is not holder


def test_nobody_gets_much_more_than_its_share_however_popular_a_prompt_is():
    engines = [engine(str(number)) for number in range(4)]
    snapshot, of = Snapshot.of(engines, 1), router(routing_share_max=1.2)
    for one in engines:
        one.began(1000)
    counts = Counter(of.route(snapshot, need(SYSTEM[0])).key for _ in range(4000))
    assert max(counts.values()) <= 1.3 * 1000
    assert min(counts.values()) > 500


def test_somebody_who_talks_to_an_idle_pool_alone_stays_with_one_engine():
    engines = [engine(str(number)) for number in range(8)]
    snapshot, of = Snapshot.of(engines, 1), router()
    assert len({of.route(snapshot, need(SYSTEM[0] + b"x" * 500 * turn)) for turn in range(40)}) == 1


def test_prompts_that_are_nowhere_yet_go_to_engines_at_work_in_turn():
    """Each computes one prompt after the other, so who got the last one is still at it."""
    engines = [engine(str(number)) for number in range(4)]
    snapshot, of = Snapshot.of(engines, 1), router()
    for one in engines:
        one.began(1000)
    found = [of.route(snapshot, need(system)).key for system in SYSTEM]
    assert all(len(set(found[start : start + 4])) == 4 for start in range(0, 64, 4))


def test_a_prompt_that_is_nowhere_yet_goes_to_the_least_loaded_and_not_to_a_home_that_is_busier():
    engines = [engine(str(number)) for number in range(4)]
    snapshot, of = Snapshot.of(engines, 1), router()
    for number, one in enumerate(engines):
        one.load.tokens = 10_000 * (number > 0)
    assert {of.route(snapshot, need(system)).key for system in SYSTEM} == {"0"}


def test_an_idle_engine_computes_nothing_however_lately_it_got_a_prompt():
    engines = [engine("1"), engine("2")]
    group = Snapshot.of(engines, 1).groups[M, "generate", None]
    for one in engines:
        one.began(1000)
    group.place_cold(engines[0], 900)
    assert (group.computing(engines[0]), group.computing(engines[1])) == (900.0, 0.0)
    group.place_cold(engines[1], 300)
    assert (group.computing(engines[0]), group.computing(engines[1])) == (450.0, 300.0)
    group.place_cold(engines[0], 100)
    assert (group.computing(engines[0]), group.computing(engines[1])) == (550.0, 150.0)
    engines[0].ended(1000)
    assert (group.computing(engines[0]), group.computing(engines[1])) == (0.0, 150.0)


def test_shares_live_on_in_the_next_snapshot_and_in_ever_larger_numbers():
    engines = [engine(str(number)) for number in range(2)]
    snapshot = Snapshot.of(engines, 1)
    group = snapshot.groups[M, "generate", None]
    for _ in range(60_000):
        group.place(engines[0])
    assert group.unit < 1e101
    group.place(engines[1])
    after = Snapshot.of(engines[:1], 1, before=snapshot).groups[M, "generate", None]
    assert after.placed == {engines[0]: group.placed[engines[0]]}
    assert after.total == pytest.approx(group.total - group.placed[engines[1]])


def run(
    router_: Router, snapshot: Snapshot, turns: int, capacity: int, rng: random.Random
) -> tuple[float, Counter[str]]:
    """The share of turns whose system prompt was in the cache of their engine, which holds the last `capacity` of them."""
    caches: dict[str, dict[int, None]] = {}
    hits, counts = 0, Counter[str]()
    flying: list[tuple[Engine, int]] = []
    for turn in range(turns):
        number = rng.randrange(len(SYSTEM))
        wanted = need(SYSTEM[number] + b"%08d" % turn)
        one = router_.route(snapshot, wanted)
        one.began(wanted.tokens)
        flying.append((one, wanted.tokens))
        if len(flying) > 8:
            over, tokens = flying.pop(rng.randrange(8))
            over.ended(tokens)
        cache = caches.setdefault(one.key, {})
        hits += number in cache
        cache.pop(number, None)
        cache[number] = None
        if len(cache) > capacity:
            del cache[next(iter(cache))]
        counts[one.key] += 1
    return hits / turns, counts


@pytest.mark.parametrize(("nodes", "gain"), [(2, 1.6), (4, 2.2)])
def test_caches_are_hit_far_more_often_than_at_random_and_the_load_stays_even(nodes, gain):
    def pool() -> Snapshot:
        engines = [engine(f"node-{number}/e0") for number in range(nodes)]
        for one in engines:
            one.held.tokens_max = 21 * 1020
        return Snapshot.of(engines, nodes)

    hits, counts = run(router(), pool(), 4000, 21, random.Random(1))
    at_random, _ = run(router(routing_policy="load", choice_sample=1), pool(), 4000, 21, random.Random(1))
    assert hits >= gain * at_random
    assert max(counts.values()) <= 1.3 * 4000 / nodes


def test_two_workers_that_do_not_talk_send_a_prompt_to_the_same_engine():
    snapshots = [Snapshot.of([engine(f"node-{number}/e0") for number in range(6)], 1) for _ in range(2)]
    routers = [router(), router()]
    same = sum(
        len({of.route(snapshot, need(system)).key for of, snapshot in zip(routers, snapshots, strict=True)})
        == 1
        for system in SYSTEM
    )
    assert same >= 0.8 * len(SYSTEM)


STATES = st.tuples(
    st.integers(0, 60), st.integers(0, 2), st.sampled_from([2, 2**62, 2**62]), st.booleans(),
    st.sampled_from([0, 600, 9000]), st.integers(0, 90),
)  # fmt: skip


@settings(deadline=None)
@given(
    st.lists(STATES, min_size=2, max_size=4),
    st.lists(st.integers(0, 5), min_size=1, max_size=12),
    st.booleans(),
)
def test_what_is_chosen_in_one_go_is_what_costs_least_as_told_part_by_part(states, prompts, is_large):
    """In pools so small that every engine is looked at: however full, broken, small and often chosen they are."""
    engines = []
    for number, (tokens, turns, cap, is_open, context, _) in enumerate(states):
        one = engine(
            str(number),
            context=context,
            tokens=100 * tokens,
            others_turns=turns,
            is_open=is_open and not turns,
        )
        one.load.turns, one.load.cap = turns, cap
        one.held.tokens_max = 2500
        engines.append(one)
    snapshot, of = Snapshot.of(engines, 1), router(choice_sample=8)
    group = snapshot.groups[M, "generate", None]
    for one, state in zip(engines, states, strict=True):
        for _ in range(state[-1]):
            group.place(one)
    for prompt in prompts:
        wanted = need(SYSTEM[prompt] + b"x" * 700 * (prompt % 3), context=1000 if is_large else 0)
        rows = [row for row in explain(snapshot, wanted, of)["candidates"] if not row["failed"]]
        rows = [row for row in rows if row["is_roomy"]] or rows
        if not rows:
            with pytest.raises(NoEngine):
                of.route(snapshot, wanted)
            continue
        found = of.route(snapshot, wanted)
        # Nothing draws a prompt to an engine that is too small for it.
        totals = {
            row["engine"]: row["scores"]["total"] + (0 if row["is_roomy"] else row["drawn_tokens"])
            for row in rows
        }
        assert totals[found.key] <= min(totals.values()) + 1.1, "hints are told in whole tokens"


# --- wishes --------------------------------------------------------------------------------------------------------


def chosen(engines: Sequence[Engine], wishes: Wishes, times: int = 20, of: Router | None = None) -> set[str]:
    snapshot, of = Snapshot.of(engines, 1), of or router()
    return {of.route(snapshot, need(wishes=wishes)).key for _ in range(times)}


def marked(name: str, **facts: Any) -> Engine:
    one = engine(name)
    for field, value in facts.items():
        setattr(one, field, value)
    return one


def test_a_session_goes_back_to_its_engine_while_that_is_not_much_busier():
    engines = [engine(str(number)) for number in range(8)]
    snapshot, of = Snapshot.of(engines, 1), router()
    wanted = need(wishes=Wishes(session="s"))
    first = of.route(snapshot, wanted)
    assert {of.route(snapshot, wanted) for _ in range(5)} == {first}
    first.load.tokens = 100_000
    assert of.route(snapshot, wanted) is not first, "a hint, not a pin"


def test_sessions_of_different_accounts_have_nothing_to_do_with_each_other_and_are_few():
    engines = [engine(str(number)) for number in range(8)]
    snapshot, of = Snapshot.of(engines, 1), router()
    for client in range(10):
        of.route(snapshot, need(wishes=Wishes(session="s"), client=client))
    assert list(of._sessions) == [(client, "s") for client in (7, 8, 9)]


def test_a_region_is_preferred_and_left_where_it_is_overrun():
    near, far = marked("near", region="ruh-1"), marked("far", region="jed-1")
    wishes = Wishes(region="ruh-1")
    assert chosen([near, far], wishes, times=5) == {"near"}
    near.load.tokens = 100_000
    assert chosen([near, far], wishes) == {"far"}


def test_caps_hold():
    engines = [
        marked("cheap", price_percent=80, tier=1), marked("good", price_percent=150, tier=3), marked("plain"),
    ]  # fmt: skip
    assert chosen(engines, Wishes(price_percent_max=80)) == {"cheap"}
    assert chosen(engines, Wishes(tier_min=2)) == {"good"}
    with pytest.raises(NoEngine) as nobody:
        chosen(engines, Wishes(tier_min=2, price_percent_max=100))
    assert not nobody.value.is_full
    engines[1].load.turns = engines[1].load.cap = 1
    with pytest.raises(NoEngine) as full:
        chosen(engines, Wishes(tier_min=2))
    assert full.value.is_full


def test_reputation_counts_where_the_operator_wants_it():
    engines = [marked("good"), marked("bad", reputation=0.2)]
    engines[0].load.tokens = 800
    assert chosen(engines, Wishes(session="x"), times=1, of=router()) == {"bad"}
    assert chosen(engines, Wishes(session="x"), times=1, of=router(routing_reputation_tokens=5000)) == {
        "good"
    }
