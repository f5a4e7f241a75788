"""The command line teaches: every command has help with examples, and every mistake gets a way out."""

import argparse
import re
import shlex
from collections.abc import Iterator

import pytest

from gateway.__main__ import build_parser, main


def commands(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    """The parser of every command that can be run, groups left out."""
    groups = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    if not groups:
        yield parser
    for group in groups:
        for child in group.choices.values():
            yield from commands(child)


ALL = {parser.prog: parser for parser in commands(build_parser())}


def test_the_promised_commands_exist() -> None:
    assert set(ALL) == {
        "poolgate up", "poolgate serve", "poolgate agent", "poolgate migrate", "poolgate usage",
        "poolgate recover", "poolgate doctor", "poolgate version", "poolgate top",
        "poolgate account create", "poolgate account list", "poolgate account show", "poolgate account credit",
        "poolgate account zone", "poolgate account suspend", "poolgate account resume",
        "poolgate node list", "poolgate node approve", "poolgate node reject",
        "poolgate node show", "poolgate node suspend", "poolgate node release",
        "poolgate statement", "poolgate audit",
        "poolgate key create", "poolgate key list", "poolgate key revoke",
        "poolgate limit set", "poolgate limit show",
        "poolgate tier set", "poolgate tier list", "poolgate tier assign", "poolgate tier remove",
        "poolgate budget set", "poolgate budget list", "poolgate budget reset", "poolgate budget remove",
    }  # fmt: skip


@pytest.mark.parametrize("prog", ALL)
def test_help_says_what_it_does_and_shows_examples(prog: str) -> None:
    text = ALL[prog].format_help()
    assert "examples:\n" in text
    assert re.search(rf"^  (.*[ (])?{prog}\b", text.partition("examples:")[2], re.MULTILINE)
    options = [action for action in ALL[prog]._actions if action.dest != "help"]
    assert [action.dest for action in options if not action.help] == []


@pytest.mark.parametrize("prog", ALL)
def test_help_fits_a_terminal(prog: str) -> None:
    assert max(len(line) for line in ALL[prog].format_help().splitlines()) <= 110


@pytest.mark.parametrize(
    "prog", [prog for prog in ALL if prog not in ("poolgate up", "poolgate serve", "poolgate agent")]
)
def test_commands_that_print_results_print_json_too(prog: str) -> None:
    assert "--json" in ALL[prog].format_help()


@pytest.mark.parametrize("prog", ALL)
def test_examples_are_accepted_by_the_parser(prog: str) -> None:
    parser = build_parser()
    for line in ALL[prog].format_help().partition("examples:")[2].splitlines():
        if not line.startswith("  ") or "$(" in line:
            continue
        # What stands before the command are variables, what stands after several spaces is an explanation.
        typed = re.split(r"\s{3,}|\s\(|\s\|\s", re.split(r"(?:^|\s)poolgate ", line)[-1])[0]
        parser.parse_args(shlex.split(typed))


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        ("acount list", "there is no command `acount`; did you mean `account`?"),
        ("key craete", "there is no command `craete`; did you mean `create`?"),
        ("zzz", "there is no command `zzz`; there are: up, serve,"),
        ("", "say what to do: up, serve,"),
        ("key create", "missing: --account."),
        ("up --prot 9000", "unrecognized arguments: --prot 9000."),
        ("usage --by minute", "invalid choice: 'minute'"),
    ],
)
def test_a_mistyped_command_is_a_usage_error_with_a_way_out(
    typed: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_info:
        main(typed.split())
    assert exit_info.value.code == 2
    complaint = capsys.readouterr().err
    assert said in complaint
    assert "--help" in complaint
    assert len(complaint.splitlines()) == 1


@pytest.mark.parametrize(
    ("typed", "code", "said"),
    [
        ("up --engine-url 127.0.0.1:8000", 1, "write it as http://HOST:PORT"),
        ("up --engine-url http://127.0.0.1:99999", 1, "write it as http://HOST:PORT"),
        ("up --engine-url http://127.0.0.1:8000/v1", 1, "has a path: leave '/v1' away"),
        ("up --engine-url ftp://127.0.0.1:21", 1, "write it as http://HOST:PORT"),
        ("up --no-node --engine-url http://127.0.0.1:8000", 1, "--no-node starts no agent"),
        ("up --model /nowhere/at-all", 1, "is no folder"),
        ("up --key short", 1, "--key: a key has 8 to 512 printable ASCII characters without spaces"),
        ("up --key it's-a-key", 1, "leave quotes and backslashes out"),
        ("up --key long-enough-key --host 0.0.0.0", 1, "works on loopback only"),
        ("up --port 70000", 2, "port = 70000"),
        ("agent --gateway http://127.0.0.1:8080", 1, "a provider key is missing"),
        ("agent --gateway localhost --key dc1-provider-x", 1, "--gateway 'localhost' is not an address"),
        ("serve --data-dir /nowhere/at-all", 1, "start them with `poolgate up`"),
        ("recover /nowhere/at-all --abandon", 1, "names no single process"),
        ("usage --since yesterday", 1, "write a span such as 24h"),
        ("account create --name x --balance 1,50", 1, "write a plain decimal number"),
        ("doctor --config /nowhere/at-all.toml", 2, "/nowhere/at-all.toml"),
    ],
)
def test_a_wrong_value_is_refused_before_anything_starts(
    typed: str, code: int, said: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("DATABASE_URL", "REDIS_URL", "POOLGATE_AGENT_KEY", "POOLGATE_DEBUG"):
        monkeypatch.delenv(name, raising=False)
    # Shell quoting is not wanted here: one of the keys has an apostrophe.
    assert main(typed.split()) == code
    complaint = capsys.readouterr().err
    assert said in complaint
    assert "Traceback" not in complaint


def test_an_unforeseen_error_is_a_sentence_and_a_traceback_only_on_demand(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_args: argparse.Namespace) -> int:
        raise RuntimeError("the moon is in the way")

    monkeypatch.setattr("gateway.cli.version.print_json", fail)
    monkeypatch.delenv("POOLGATE_DEBUG", raising=False)
    assert main(["version", "--json"]) == 1
    told = capsys.readouterr().err
    assert "RuntimeError: the moon is in the way (POOLGATE_DEBUG=1 shows where)" in told
    assert "Traceback" not in told
    monkeypatch.setenv("POOLGATE_DEBUG", "1")
    assert main(["version", "--json"]) == 1
    assert "Traceback" in capsys.readouterr().err
