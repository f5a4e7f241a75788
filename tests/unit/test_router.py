"""`choose` over tables of engines: who is fit, and who is picked."""

import random
from collections import Counter
from collections.abc import Iterable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from config.defaults import Settings
from nodes.breaker import Breaker
from nodes.routing.router import Need, NoEngine, choose
from nodes.routing.snapshot import Engine, Load, Model, Snapshot

SETTINGS = Settings()
M = "m"


def engine(
    name: str = "e",
    *,
    models: Iterable[str] = (M,),
    kind: str = "generate",
    context: int = 0,
    account: int = 1,
    is_open: bool = False,
    says: tuple[int, int, float] = (0, 0, 0.0),
    **load: Any,
) -> Engine:
    """`says`: turns that run in it and wait there, and its cache's usage, as it told once the rest was so."""
    made = Engine(
        key=name, node_id=name, engine_id="e0", account_id=account, host="127.0.0.1", port=1,
        models={model: Model(model, context, kind) for model in models},
        breaker=Breaker(SETTINGS, is_open=is_open), load=Load(**load),
    )  # fmt: skip
    made.load.hear(*says)
    return made


def need(**of: Any) -> Need:
    return Need(**{"model": M, "kind": "generate", "tokens": 10} | of)


def chosen(engines: Iterable[Engine], wanted: Need | None = None, **options: Any) -> Engine:
    given = {"sample": 4, "turns_max": 100, "rng": random.Random(1)} | options
    return choose(Snapshot.of(engines, 1), wanted or need(), **given)


def test_the_least_loaded_gets_the_turn():
    light = engine("light", tokens=10)
    assert chosen([engine("heavy", tokens=500), light, engine("middle", tokens=200)]) is light


@pytest.mark.parametrize(
    ("more", "less"),
    [
        ({"tokens": 1000}, {"tokens": 999}),
        ({"others_tokens": 1000}, {"tokens": 999}),
        ({"says": (3, 0, 0.0)}, {"says": (2, 0, 0.0)}),
        ({"says": (0, 3, 0.0)}, {"says": (2, 0, 0.0)}),
        ({"tokens": 100, "says": (0, 0, 0.9)}, {"tokens": 100, "says": (0, 0, 0.1)}),
        # Its report counts the turns that we sent it ourselves: they are not counted twice.
        ({"tokens": 600}, {"tokens": 500, "turns": 4, "says": (4, 0, 0.0)}),
        ({"tokens": 600}, {"others_tokens": 500, "others_turns": 4, "says": (4, 0, 0.0)}),
        # Turns that a stranger put on it are worth a common answer each.
        ({"tokens": 500, "turns": 1, "says": (2, 3, 0.0)}, {"tokens": 1500, "turns": 1, "says": (1, 0, 0.0)}),
    ],
)
def test_load_is_ours_and_others_and_what_the_engine_says(more, less):
    better = engine("less", **less)
    assert chosen([engine("more", **more), better]) is better


def test_a_stale_low_report_never_makes_load_negative():
    assert engine(turns=5, tokens=100, says=(0, 0, 0.0)).load.in_tokens == 100


def test_our_turns_that_end_after_a_report_are_no_strangers_in_it():
    busy = engine(turns=5, tokens=100, says=(5, 0, 0.0))
    for _ in range(5):
        busy.ended(20)
    assert busy.load.in_tokens == 0


def test_equal_engines_share_turns_evenly():
    engines, rng = [engine(str(n)) for n in range(4)], random.Random(7)
    counts = Counter(chosen(engines, rng=rng).key for _ in range(4000))
    assert set(counts) == {"0", "1", "2", "3"}
    assert max(counts.values()) < 1200


def test_equal_engines_beyond_the_sample_share_turns_evenly_too():
    engines, rng = [engine(str(n)) for n in range(20)], random.Random(7)
    counts = Counter(chosen(engines, rng=rng).key for _ in range(10_000))
    assert len(counts) == 20
    assert max(counts.values()) < 700


def test_engines_that_were_tried_are_not_asked_again():
    first, second = engine("1"), engine("2", tokens=10**6)
    assert chosen([first, second], need(tried=[first])) is second
    with pytest.raises(NoEngine):
        chosen([first, second], need(tried=[first, second]))


def test_a_pinned_provider_gets_its_turns_however_loaded():
    own = engine("own", account=2, tokens=10**6)
    assert chosen([engine("other"), own], need(account_id=2)) is own
    with pytest.raises(NoEngine) as missing:
        chosen([engine("other"), own], need(account_id=3))
    assert missing.value.is_known


def test_a_model_that_is_in_no_engine_is_told_apart_from_one_that_none_can_take():
    with pytest.raises(NoEngine) as unknown:
        chosen([engine()], need(model="nope"))
    assert not unknown.value.is_known
    with pytest.raises(NoEngine) as busy:
        chosen([engine(is_open=True)])
    assert busy.value.is_known


@pytest.mark.parametrize(
    ("of", "wanted", "fits"),
    [
        ({}, {}, True),
        ({"is_open": True}, {}, False),
        ({"turns": 99}, {}, True),
        ({"turns": 100}, {}, False),
        ({"kind": "pooling"}, {}, False),
        ({"kind": "pooling"}, {"kind": "pooling"}, True),
        ({"account": 2}, {"account_id": 2}, True),
        ({"account": 2}, {"account_id": 1}, False),
    ],
)
def test_who_is_fit(of, wanted, fits):
    one = engine(**of)
    if fits:
        assert chosen([one], need(**wanted)) is one
    else:
        with pytest.raises(NoEngine):
            chosen([one], need(**wanted))


def test_an_engine_with_room_for_the_context_comes_before_an_idle_small_one():
    large = engine("large", context=8192, tokens=10**6)
    assert chosen([engine("small", context=2048), large], need(context=4000)) is large


def test_the_estimate_only_orders_so_a_small_engine_still_gets_what_no_other_can_take():
    small = engine("small", context=2048)
    assert chosen([small, engine("large", context=8192, is_open=True)], need(context=4000)) is small


def test_an_engine_that_tells_no_context_length_counts_as_roomy():
    unknown = engine("unknown", context=0)
    assert chosen([unknown, engine("small", context=10)], need(context=4000)) is unknown


def test_an_engine_that_was_full_gets_turns_again_when_one_ends():
    first, second = engine("1"), engine("2", tokens=10**6)
    snapshot, rng = Snapshot.of([first, second], 1), random.Random(1)
    first.began(10)
    assert choose(snapshot, need(), sample=4, turns_max=1, rng=rng) is second
    first.ended(10)
    assert (first.load.turns, first.load.tokens) == (0, 0)
    assert choose(snapshot, need(), sample=4, turns_max=1, rng=rng) is first


def test_an_engine_belongs_to_the_groups_of_the_newest_snapshot_alone():
    one, rng = engine(turns=1), random.Random(1)
    for _ in range(2):
        snapshot = Snapshot.of([one], 1)
        with pytest.raises(NoEngine):
            choose(snapshot, need(), sample=4, turns_max=1, rng=rng)
    assert [group in snapshot.groups.values() for group in one.absent] == [True]
    one.ended(0)
    assert choose(snapshot, need(), sample=4, turns_max=1, rng=rng) is one


STEPS = st.tuples(
    st.sampled_from(["begin", "end", "fail", "good", "probe", "snapshot", "choose"]), st.integers(0, 5)
)


@given(st.lists(STEPS, max_size=80), st.integers(0, 3))
def test_whatever_happens_every_fit_engine_can_be_chosen_and_no_other(steps, sample_less):
    settings = Settings(breaker_failures=2, breaker_successes=1)
    engines = [engine(str(n), context=(0, 2048, 8192)[n % 3], account=n % 2) for n in range(6)]
    for one in engines:
        one.breaker = Breaker(settings)
    snapshot, rng, sample = Snapshot.of(engines, 1), random.Random(1), 4 - sample_less
    for step, which in steps:
        one = engines[which]
        if step == "begin":
            one.began(10)
        elif step == "end" and one.load.turns:
            one.ended(10)
        elif step == "fail":
            one.breaker.failed(1.0)
        elif step == "good" and one.load.turns:
            one.breaker.succeeded()
            one.ended(10)
        elif step == "probe" and one.breaker.is_open and one.breaker.probed(True, 2.0):
            one.comes_back()
        elif step == "snapshot":
            snapshot = Snapshot.of(engines, 1)
        for account in (None, 0, 1):
            fit = {one for one in engines if one.is_fit(2) and account in (None, one.account_id)}
            wanted = need(account_id=account, context=3000)
            group = snapshot.groups[M, "generate", account]
            if fit:
                found = choose(snapshot, wanted, sample=sample, turns_max=2, rng=rng)
                roomy = {one for one in fit if one.models[M].context_length != 2048}
                assert found in (roomy or fit)
            else:
                with pytest.raises(NoEngine):
                    choose(snapshot, wanted, sample=sample, turns_max=2, rng=rng)
            assert fit <= set(group.fit)
            assert len(set(group.fit)) == len(group.fit)


def test_it_changes_nothing():
    engines = [engine("a", tokens=5), engine("b", tokens=5)]
    before = [(one.load.turns, one.load.tokens, one.breaker.failures) for one in engines]
    chosen(engines)
    assert before == [(one.load.turns, one.load.tokens, one.breaker.failures) for one in engines]
