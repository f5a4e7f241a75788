"""How many engines a choice looks at in a large pool: counted by what is looked at, so of the sources interpreted."""

import random
from collections.abc import Iterable
from typing import Any

import pytest

from config.defaults import Settings
from tests.interpreted import interpreted

with interpreted():
    from nodes.breaker import Breaker
    from nodes.routing.prefixes import Prefixes
    from nodes.routing.router import MISSES_MAX, Need, Router, choose
    from nodes.routing.scorers import Policy
    from nodes.routing.snapshot import Engine, Load, Model, Snapshot

SETTINGS = Settings()
M = "m"


class Watched(Breaker):
    """Notes each look at it."""

    looks: list[Breaker] = []  # noqa: RUF012 - all write into one

    def __init__(self, *, opened: bool = False) -> None:
        self.opened = opened
        super().__init__(SETTINGS)

    @property
    def is_open(self) -> bool:  # type: ignore[override]
        self.looks.append(self)
        return self.opened

    @is_open.setter
    def is_open(self, _value: bool) -> None: ...


class WatchedLoad(Load):
    """Likewise."""

    looks: list[Load] = []  # noqa: RUF012 - all write into one

    @property
    def in_tokens(self) -> float:
        self.looks.append(self)
        return 0.0


def engine(
    name: str, *, models: Iterable[str] = (M,), kind: str = "generate", context: int = 0, account: int = 1,
    is_open: bool = False, **load: Any,
) -> Engine:  # fmt: skip
    return Engine(
        key=name, node_id=name, engine_id="e0", account_id=account, host="127.0.0.1", port=1,
        models={model: Model(model, context, kind) for model in models},
        breaker=Watched(opened=is_open), load=Load(**load),
    )  # fmt: skip


def need(**of: Any) -> Need:
    return Need(**{"model": M, "kind": "generate", "tokens": 10} | of)


def chosen(engines: Iterable[Engine]) -> Engine:
    return choose(Snapshot.of(engines, 1), need(), sample=4, turns_max=100, rng=random.Random(1))


def test_a_sampled_choice_looks_at_no_more_engines_than_the_sample():
    engines = [engine(str(n)) for n in range(10_000)]
    Watched.looks.clear()
    chosen(engines)
    assert len(Watched.looks) == 4


@pytest.mark.parametrize(
    ("those", "others", "wanted"),
    [
        ({}, {"models": ["other"]}, {}),
        ({"account": 2}, {}, {"account_id": 2}),
        ({"kind": "pooling"}, {}, {"kind": "pooling"}),
        ({}, {"is_open": True}, {}),
        ({}, {"turns": 100}, {}),
        ({"context": 8192}, {"context": 2048}, {"context": 4000}),
    ],
)
def test_the_three_that_fit_are_found_among_ten_thousand_without_looking_at_the_others(those, others, wanted):
    pool = [engine(str(n), **others) for n in range(9_997)]
    fit = [engine(f"fit{n}", **{"tokens": n, "turns": 1} | those) for n in range(3)]
    snapshot, rng = Snapshot.of([*pool[:5000], *fit, *pool[5000:]], 1), random.Random(3)
    assert choose(snapshot, need(**wanted), sample=4, turns_max=100, rng=rng) is fit[0]
    Watched.looks.clear()
    for _ in range(10):
        assert choose(snapshot, need(**wanted), sample=4, turns_max=100, rng=rng) is fit[0]
    assert {id(seen) for seen in Watched.looks} == {id(one.breaker) for one in fit}
    assert len(Watched.looks) == 30


def test_a_choice_that_meets_many_unfit_engines_looks_at_each_once():
    everything = [engine(str(n), is_open=n != 5000) for n in range(10_000)]
    Watched.looks.clear()
    assert chosen(everything) is everything[5000]
    assert len(Watched.looks) <= 10_000 + MISSES_MAX + 2


def test_a_long_prompt_looks_at_a_few_engines_of_ten_thousand():
    engines = [engine(str(number)) for number in range(10_000)]
    for one in engines:
        one.load = WatchedLoad()
    snapshot = Snapshot.of(engines, 1)
    _ = snapshot.groups[M, "generate", None].ring
    router = Router(Policy.of(SETTINGS), Prefixes(10_000), sessions_max=3)
    WatchedLoad.looks.clear()
    for number in range(64):
        text = b"%02d" % number * 2000
        body = b'{"model":"m","messages":[{"role":"user","content":"%b"}]}' % text
        router.route(snapshot, need(tokens=len(body) // 4, body=body, client=1))
    assert len(WatchedLoad.looks) <= 8 * 64
