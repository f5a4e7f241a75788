"""What the oracle lets pass and what it finds: one question, what its engine did, what its client saw, what was charged."""

from dataclasses import replace

import pytest

from tests.fakes.clients import Ask, Ending, Sighting
from tests.fakes.witness import Work
from tests.simulation.oracle import Charge, Oracle, Prices

PRICES = {"m": Prices(prompt=3_000_000, cached=1_000_000, completion=500_000)}
ID = "req_1"
WORK = Work(
    "node", ID, 7, "m", prompt_tokens=10, cached_tokens=4, tokens_max=9, tokens_written=5, how="finished"
)
FINISHED = 18 + 4 + 3  # 2.5 nano for five tokens, rounded up once
CHARGE = Charge(ID, 1, "node", None, "p", "finished", FINISHED, 0)


def seen(
    ending: Ending, *, status: int = 200, tokens: int = 5, stream: bool = True, key: str | None = None
) -> Sighting:
    ask = Ask(7, 1, "sk", {"model": "m", "stream": stream}, idempotency_key=key)
    return Sighting(ask, 100.0, 101.0, status, ending, tokens, stream and tokens > 0, {"x-request-id": ID})


def wrong(
    work: list[Work], sighting: Sighting | None, charges: list[Charge], kills: tuple[float, ...] = ()
) -> list[str]:
    oracle = Oracle(PRICES, work, [sighting] if sighting else [], {}, kills)
    return oracle.weigh(charges).wrong


CUT = replace(WORK, how="client_closed")
PARTIAL = replace(CHARGE, outcome="client_gone", amount_nano=30 + 2)  # a whole prompt and three tokens


@pytest.mark.parametrize(
    ("work", "sighting", "charges", "kills"),
    [
        ([WORK], seen("whole"), [CHARGE], ()),
        ([WORK], seen("whole", stream=False, tokens=0), [CHARGE], ()),
        ([CUT], seen("left", tokens=3), [PARTIAL], ()),
        ([CUT], seen("left", tokens=1), [PARTIAL], ()),
        ([CUT], seen("error_event", tokens=3), [PARTIAL], ()),
        ([WORK], seen("left", tokens=0, stream=False), [], (100.5,)),
        ([WORK], seen("cut", tokens=2), [], (100.5,)),
        ([WORK], seen("refused", status=402, tokens=0), [], ()),
        ([WORK], seen("refused", status=502, tokens=0), [replace(CHARGE, amount_nano=0)], ()),
        ([WORK], seen("left", key="k"), [CHARGE], ()),
        ([WORK, replace(WORK, node_id="other", how=None)], seen("whole"), [CHARGE], ()),
    ],
)  # fmt: skip
def test_what_is_right_passes(work, sighting, charges, kills):
    assert wrong(work, sighting, charges, kills) == []


@pytest.mark.parametrize(
    ("work", "sighting", "charges", "kills", "words"),
    [
        ([WORK], seen("whole"), [replace(CHARGE, amount_nano=FINISHED + 1)], (), "received whole"),
        ([WORK], seen("whole"), [replace(CHARGE, amount_nano=FINISHED - 1)], (), "received whole"),
        ([WORK], seen("whole"), [], (100.5,), "received whole and not charged"),
        ([WORK], seen("whole"), [CHARGE, CHARGE], (), "in the book twice"),
        ([WORK, replace(WORK, request_id="req_2")], seen("whole"), [CHARGE, replace(CHARGE, turn_id="req_2")], (),
         "charged 2 times"),
        ([CUT], seen("error_event", tokens=2), [PARTIAL], (), "received 2 tokens"),
        ([CUT], seen("left", tokens=5), [PARTIAL], (), "received for"),
        ([CUT], seen("left", tokens=3), [], (), "nobody was killed"),
        ([CUT], seen("cut", tokens=2), [PARTIAL], (100.5,), "received 2 tokens"),
        ([WORK], seen("refused", status=402, tokens=0), [CHARGE], (), "refused and charged"),
        ([WORK], seen("left", tokens=0, stream=False), [PARTIAL], (), "neither 0 nor"),
        ([], None, [CHARGE], (), "no such engine saw it"),
        ([replace(WORK, node_id="other")], None, [CHARGE], (), "no such engine saw it"),
        ([WORK], None, [replace(CHARGE, amount_nano=99)], (), "more than the engine sent"),
        ([WORK], seen("whole"), [replace(CHARGE, loss_nano=1)], (), "its hold was no bound"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_found(work, sighting, charges, kills, words):
    found = wrong(work, sighting, charges, kills)
    assert any(words in each for each in found), found
