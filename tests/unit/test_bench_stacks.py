"""A profiler's stacks become readable ones, and each sample has one owner."""

from collections import Counter

import pytest

from bench.stacks import LOOP, PREFIXES, by_owner, flame, owner, parse, readable
from config.compiled import MODULES, path_of

START = "thread (7): MainThread;0x7f (libc.so.6);_run_code (<frozen runpy>:88);run (uvloop/__init__.py:92)"
ORJSON = "orjson/orjson.cpython-311-x86_64-linux-gnu.so"
SAMPLES = f"""\
{START};Handle__run (loop.c:70959);Lifecycle.run (gateway/lifecycle.py:65);dumps ({ORJSON}) 3
{START};Handle__run (loop.c:70959);Lifecycle.run (gateway/lifecycle.py:65);write (loop.c:110189);write (libc.so.6) 2
{START};uv__io_poll (linux.c:9);epoll_wait (libc.so.6) 4
{START};Handle__run (loop.c:1);start (aiohttp/web_protocol.py:5);_PyEval (ceval.c:3) 1
thread (9): journal_0;wait (concurrent/futures/thread.py:81);0x7f (libc.so.6) 99
"""


def test_only_the_main_thread_counts_and_start_up_is_left_out():
    stacks = parse(SAMPLES)
    assert stacks == Counter({
        ("Lifecycle.run gateway/lifecycle.py", "[orjson]"): 3,
        ("Lifecycle.run gateway/lifecycle.py", "write [libc]"): 2,
        (LOOP, "epoll_wait [libc]"): 4,
        ("start aiohttp/web_protocol.py", "[python]"): 1,
    })  # fmt: skip


def test_each_sample_has_one_owner():
    assert by_owner(parse(SAMPLES)) == {"gateway/lifecycle.py": 5, LOOP: 4, "aiohttp": 1}


@pytest.mark.parametrize(
    ("stack", "whose"),
    [
        (
            ("handle aiohttp/web.py", "run gateway/a.py", "add billing/b.py", "dumps json/__init__.py"),
            "billing/b.py",
        ),
        (("emit logging/__init__.py",), "logging"),
        ((LOOP, "[uvloop]"), LOOP),
    ],
)
def test_time_in_a_library_is_its_caller_s(stack, whose):
    assert owner(stack) == whose


LIBRARY = "(poolgate__mypyc.cpython-311-x86_64-linux-gnu.so)"


@pytest.mark.parametrize(
    ("symbol", "read"),
    [
        (
            "CPyDef_connection___EdgeConnection___data_received",
            "EdgeConnection.data_received gateway/edge/connection.py",
        ),
        ("CPyPy_lifecycle___Lifecycle____settle", "Lifecycle._settle gateway/lifecycle.py"),
        ("CPyDef_holds____media.isra.0", "_media billing/holds.py"),
        ("CPyDef_gateway___records___TurnRecords___flush", "TurnRecords.flush gateway/records.py"),
        ("CPyDef_billing___records___encode", "encode billing/records.py"),
        ("CPyDef_turns___EdgeTurn_____init__", "EdgeTurn.__init__ gateway/edge/turns.py"),
        ("CPyDunder_am_sendjournal___run_Journal_gen", "run_Journal_gen billing/journal.py"),
        ("turn___Turn_dealloc", "Turn_dealloc gateway/turn.py"),
        ("CPyDef_headers___Told___with_more", "Told.with_more billing/limits/headers.py"),
    ],
)
def test_a_compiled_function_reads_as_the_python_that_it_was(symbol, read):
    assert readable(["Handle__run (loop.c:1)", f"{symbol} {LIBRARY}", "0x7f (libc.so.6)"]) == (read, "[libc]")


def test_a_compiled_function_and_what_python_calls_for_it_are_one():
    frames = [f"CPyPy_turn___Turn___delivered {LIBRARY}", f"CPyDef_turn___Turn___delivered {LIBRARY}"]
    assert readable(frames) == ("Turn.delivered gateway/turn.py",)


@pytest.mark.parametrize("name", ["CPyDict_GetItem", "vgetargskeywordsfast_impl.constprop.0", "0x7f00"])
def test_what_a_compiled_function_calls_of_mypyc_s_is_python_s(name):
    frames = [f"CPyDef_turn___Turn___delivered {LIBRARY}", f"{name} {LIBRARY}"]
    assert readable(frames) == ("Turn.delivered gateway/turn.py", "[python]")


def test_every_compiled_module_s_file_is_known():
    assert sorted(PREFIXES.values()) == sorted(path_of(module, ".py") for module in MODULES)


def test_a_stack_of_nothing_but_c_is_the_event_loop():
    assert readable(["uv_run (core.c:452)"]) == (LOOP, "[python]")


def test_a_flame_is_as_wide_as_its_share():
    svg = flame(parse(SAMPLES), "a title")
    assert "Lifecycle.run gateway/lifecycle.py: 50.0%" in svg
    assert 'width="599.6"' in svg
