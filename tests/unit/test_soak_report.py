"""The report of the soaks keeps what was not run anew."""

from pathlib import Path

from tests.soak.report import Result, write_section

ABOUT = {"date": "2027-01-01T00:00Z", "commit": "abc", "machine": "2 cores", "load before": "0.10 (1 min)"}


def test_a_section_is_replaced_where_it_stands_and_the_others_stay(tmp_path: Path) -> None:
    path, titles = tmp_path / "soak.md", ["First", "Second"]
    write_section(path, ABOUT, Result("Second", {"turns": 5000}, 2.0, ""), titles)
    write_section(path, ABOUT, Result("First", {}, 1.0, "AssertionError: no"), titles)
    write_section(path, ABOUT | {"commit": "def"}, Result("Second", {"turns": 7000}, 3.0, ""), titles)
    report = path.read_text()
    assert [line for line in report.splitlines() if line.startswith("## ")] == [
        "## First: FAILED (1 s)",
        "## Second: passed (3 s)",
    ]
    assert "7,000" in report
    assert "5,000" not in report
    assert ("commit abc" in report, "commit def" in report) == (True, True)
