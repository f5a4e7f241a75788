"""Who is next in the queue, whatever accounts send."""

from collections import Counter
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.waiting.rounds import DEBTORS_MAX, Rounds


@dataclass(eq=False)
class Turn:
    account: str
    tokens: int = 100


def take(rounds: Rounds[Turn]) -> Turn | None:
    if (turn := rounds.first()) is not None:
        rounds.take(turn)
    return turn


def served(rounds: Rounds[Turn], count: int) -> list[Turn]:
    return [turn for _ in range(count) if (turn := take(rounds)) is not None]


def test_nobody_waits():
    assert Rounds[Turn](100).first() is None


def test_an_accounts_turns_go_in_the_order_they_came():
    rounds, turns = Rounds[Turn](10), [Turn("a"), Turn("a", 5), Turn("a", 500)]
    for turn in turns:
        rounds.add(turn)
    assert served(rounds, 4) == turns


def test_a_greedy_account_gets_as_many_tokens_as_a_modest_one_while_both_wait():
    rounds = Rounds[Turn](50)
    for _ in range(300):
        rounds.add(Turn("greedy", 200))
    for _ in range(40):
        rounds.add(Turn("modest", 100))
    got = Counter[str]()
    for turn in served(rounds, 45):
        got[turn.account] += turn.tokens
    assert abs(got["greedy"] - got["modest"]) <= 400


def test_a_newcomer_waits_for_one_turn_of_each_account_and_not_for_all_that_came_before_it():
    rounds = Rounds[Turn](100)
    for _ in range(500):
        rounds.add(Turn("greedy"))
    served(rounds, 100)
    modest = Turn("modest")
    rounds.add(modest)
    assert modest in served(rounds, 2)


def test_credit_is_not_saved_up_by_not_waiting():
    rounds = Rounds[Turn](10_000)
    rounds.add(Turn("a", 1))
    served(rounds, 1)
    for _ in range(20):
        rounds.add(Turn("a"))
        rounds.add(Turn("b"))
    assert Counter(turn.account for turn in served(rounds, 20))["a"] <= 20
    assert len(rounds) == 20


def test_what_another_worker_gave_counts():
    rounds = Rounds[Turn](100)
    for _ in range(20):
        rounds.add(Turn("a"))
        rounds.add(Turn("b"))
    rounds.charge("a", 1000)
    assert [turn.account for turn in served(rounds, 9)] == ["b"] * 9
    assert Counter(turn.account for turn in served(rounds, 8)) == {"a": 4, "b": 4}


def test_a_debt_of_millions_takes_no_longer_to_get_over():
    rounds = Rounds[Turn](1)
    rounds.add(Turn("a"))
    rounds.charge("a", 10**15)
    assert take(rounds) is not None


def test_a_debt_is_paid_by_the_rounds_that_others_get_while_its_account_does_not_wait():
    rounds, back = Rounds[Turn](100), Turn("a")
    for _ in range(30):
        rounds.add(Turn("b"))
    rounds.charge("a", 1000)
    served(rounds, 5)
    rounds.add(back)
    assert [turn.account for turn in served(rounds, 7)] == ["b"] * 6 + ["a"]


def test_paid_debts_leave_no_credit():
    rounds = Rounds[Turn](100)
    for _ in range(30):
        rounds.add(Turn("b"))
    rounds.charge("a", 200)
    served(rounds, 20)
    for _ in range(5):
        rounds.add(Turn("a"))
    assert Counter(turn.account for turn in served(rounds, 6)) == {"a": 3, "b": 3}


def test_debtors_are_remembered_up_to_a_bound():
    rounds = Rounds[Turn](100)
    rounds.add(Turn("a"))
    for number in range(DEBTORS_MAX + 10):
        rounds.charge(f"debtor {number}", 100)
    assert len(rounds._credit) == DEBTORS_MAX + 1
    served(rounds, 1)
    assert not rounds._credit


def test_who_is_first_stays_so_however_often_it_is_asked_before_it_can_go():
    """An account's only turn must not lose its place to one with many, whenever no engine is free."""
    rounds, only = Rounds[Turn](64), Turn("modest", 79)
    for _ in range(50):
        rounds.add(Turn("greedy", 58))
    rounds.add(only)
    while rounds.first() is not only:
        served(rounds, 1)
    assert [rounds.first() for _ in range(10)] == [only] * 10
    assert take(rounds) is only


def test_a_turn_that_could_not_go_is_next_again_and_pays_once():
    rounds, first, second = Rounds[Turn](100), Turn("a"), Turn("a")
    rounds.add(first)
    rounds.add(second)
    assert take(rounds) is first
    rounds.put_first(first)
    assert rounds._credit["a"] >= 100
    assert served(rounds, 2) == [first, second]


def test_a_turn_that_could_not_go_goes_before_other_accounts():
    rounds, tried = Rounds[Turn](100), Turn("a")
    rounds.add(tried)
    for _ in range(5):
        rounds.add(Turn("b"))
    assert take(rounds) is tried
    rounds.first()
    rounds.put_first(tried)
    assert take(rounds) is tried


def test_who_leaves_makes_room():
    rounds, turns = Rounds[Turn](100), [Turn("a"), Turn("a"), Turn("b")]
    for turn in turns:
        rounds.add(turn)
    assert rounds.remove(turns[0])
    assert not rounds.remove(turns[0])
    assert len(rounds) == 2
    assert set(served(rounds, 3)) == set(turns[1:])


def test_the_newest_of_the_account_with_the_most_turns_has_to_leave():
    rounds, last = Rounds[Turn](100), Turn("greedy")
    for turn in [Turn("greedy"), Turn("modest"), last]:
        rounds.add(turn)
    assert rounds.newest_of_the_greediest() is last
    assert (rounds.waiting_of("greedy"), rounds.waiting_of("nobody")) == (2, 0)


@pytest.mark.parametrize(
    ("account", "place", "position"), [("a", 0, 2), ("a", 1, 4), ("a", 2, 5), ("b", 0, 2), ("b", 1, 4)]
)
def test_a_position_counts_who_goes_before(account, place, position):
    rounds = Rounds[Turn](100)
    turns = {"a": [Turn("a") for _ in range(3)], "b": [Turn("b") for _ in range(2)]}
    for turn in [*turns["a"], *turns["b"]]:
        rounds.add(turn)
    assert rounds.position(turns[account][place]) == position


STEPS = st.lists(
    st.tuples(st.sampled_from(["add", "next", "remove", "charge", "back"]), st.integers(0, 3), st.integers(0, 900)),
    max_size=80,
)  # fmt: skip


@given(STEPS)
def test_whatever_happens_every_turn_goes_once_and_none_is_lost(steps):
    rounds, waiting, last = Rounds[Turn](50), [], None
    for step, who, tokens in steps:
        if step == "add":
            waiting.append(Turn(str(who), tokens))
            rounds.add(waiting[-1])
        elif step == "next":
            last = take(rounds)
            assert (last is None) == (not waiting)
            if last is not None:
                assert next(turn for turn in waiting if turn.account == last.account) is last
                waiting.remove(last)
        elif step == "remove" and waiting:
            rounds.remove(waiting.pop(who % len(waiting)))
        elif step == "charge":
            rounds.charge(str(who), tokens)
        elif step == "back" and last is not None and last not in waiting:
            rounds.put_first(last)
            waiting.insert(0, last)
        assert sorted(map(id, rounds)) == sorted(map(id, waiting))
        assert len(rounds) == len(waiting)
    assert {id(turn) for turn in served(rounds, 100)} == {id(turn) for turn in waiting}
