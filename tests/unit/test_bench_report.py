"""RESULTS.md says what the samples say: verdicts, losses, ratios, pictures."""

from collections.abc import Mapping

import pytest

from bench import request
from bench.__main__ import QUESTIONS, load, write
from bench.machine import machine
from bench.question import Finding
from bench.report import losses, pictures, results, section, targets
from bench.samples import Sample, Samples, Spread
from bench.svg import Group, bars
from bench.targets import Target
from config import compiled

ABOUT = {"commit": "abc", "machine": "2 cores"}
CPU = {"poolgate": 40.0, "vllm-router": 64.0, "nginx": 25.0, "litellm": 8800.0}


def finding(values: Mapping[str, float] = CPU, case: str = "200 B", rounds: int = 5) -> Finding:
    samples = [
        Sample(request.CPU, case, arm, "µs", number, value * (1 + number / 100))
        for number in range(1, rounds + 1)
        for arm, value in values.items()
    ]
    return Finding(ABOUT, rounds, Samples(samples))


@pytest.mark.parametrize(
    ("against", "at_most", "verdict", "shown"),
    [
        ("vllm-router", 0.75, "met", "0.62 (0.62-0.62)"),
        ("vllm-router", 0.6, "not met", "0.62 (0.62-0.62)"),
        ("litellm", 1 / 200, "met", "1/220"),
        ("litellm", 1 / 300, "not met", "1/220"),
        ("sglang-router", 0.75, "not measured", "-"),
    ],
)
def test_a_target_is_held_against_the_median_ratio(against, at_most, verdict, shown):
    target = Target("request", request.CPU, "200 B", at_most, against)
    spread = target.measured({"request": finding()})
    assert (target.verdict(spread), target.shown(spread)) == (verdict, shown)


def test_a_target_of_a_question_that_was_not_asked_is_not_measured():
    assert Target("chunk", "CPU a chunk", "burst", 1.0).measured({}) is None


def test_targets_are_counted_and_too_few_rounds_are_said():
    text = targets({"request": finding(rounds=2)})
    assert text.count("| met |") == 3
    assert "3 of " in text
    assert "request had fewer" in text
    assert "had fewer" not in targets({"request": finding()})


def test_every_peer_that_does_better_is_told():
    text = losses([request.QUESTION], {"request": finding()})
    assert "- CPU a request, 200 B: poolgate 41.2 µs; nginx 25.8." in text
    assert "vllm-router" not in text
    cheap = finding(CPU | {"poolgate": 20.0})
    assert "Nowhere" in losses([request.QUESTION], {"request": cheap})


def test_a_section_has_method_machine_numbers_and_ratios():
    text = section(request.QUESTION, finding())
    assert request.METHOD in text
    assert "- machine: 2 cores" in text
    assert "| 200 B | 41.2 (40.4-42.0) |" in text
    assert "| poolgate, 200 B | 0.62 (0.62-0.62) | 1.60 (1.60-1.60) | 1/220 |" in text


def test_the_machine_s_facts_say_whether_poolgate_ran_compiled(monkeypatch: pytest.MonkeyPatch):
    assert machine()["poolgate"].startswith(compiled.how())
    monkeypatch.setattr(compiled, "is_used", lambda: True)
    assert machine()["poolgate"].startswith("compiled by mypyc")
    monkeypatch.setattr(compiled, "is_used", lambda: False)
    assert machine()["poolgate"] == "interpreted"


def test_what_was_found_is_kept_and_only_what_is_new_replaced(tmp_path):
    write(tmp_path, {"request": finding()})
    kept = load(tmp_path)
    assert kept["request"].samples.all == finding().samples.all
    assert (tmp_path / "RESULTS.md").read_text() == results(QUESTIONS, {"request": finding()})
    assert (tmp_path / "pictures" / "request-cpu-a-request.svg").exists()


def test_pictures_that_results_shows_are_drawn():
    drawn = pictures(request.QUESTION, finding())
    assert all(f"pictures/{name}" in section(request.QUESTION, finding()) for name in drawn)
    assert len(drawn) == 1


def test_a_bar_that_dwarfs_ours_is_cut_and_says_so():
    rows = [(arm, Spread(value, value, value, 1)) for arm, value in CPU.items()]
    svg = bars("CPU", "µs", [Group("4 KB", rows)])
    assert "8,800 (cut)" in svg
    assert "64.0<" in svg
    assert svg.count("<rect") == 1 + len(rows)


def test_nothing_measured_is_no_error():
    assert "not measured" in results(QUESTIONS, {})
