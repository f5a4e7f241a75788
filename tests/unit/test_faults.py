"""What an engine's failure means, row by row: the client's error, whether another engine may try, the breaker."""

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.errors import ApiError
from gateway.relay.faults import (
    ENGINE_MESSAGE_MAX,
    EngineFault,
    broken,
    fault_of_answer,
    fault_of_event,
    silent,
    unreachable,
)
from tests import captures_of


def verdict(fault: EngineFault) -> tuple[int, str | None, bool, bool]:
    return fault.error.status, fault.error.wire_code, fault.may_retry, fault.is_broken


@pytest.mark.parametrize(
    ("status", "expected"),
    [
        (400, (400, None, False, False)),
        (413, (400, None, False, False)),
        (422, (400, None, False, False)),
        (404, (404, "model_not_found", False, False)),
        (429, (503, "no_node_available", True, False)),
        (503, (503, "no_node_available", True, False)),
        (500, (502, "engine_failed", True, True)),
        (502, (502, "engine_failed", True, True)),
        (599, (502, "engine_failed", True, True)),
        (301, (502, "engine_failed", True, False)),
        (401, (502, "engine_failed", True, False)),  # the engine wants a key of its own: the client's is fine
        (403, (502, "engine_failed", True, False)),
        (405, (502, "engine_failed", True, False)),
    ],
)
def test_what_a_status_means(status, expected):
    body = orjson.dumps({"error": {"message": "words", "type": "t", "param": None, "code": status}})
    assert verdict(fault_of_answer(status, body)) == expected
    if status >= 400:
        assert verdict(fault_of_event({"message": "words", "code": status})) == expected


@pytest.mark.parametrize("code", [None, "x", 0, 200, 1000, True, [503]])
def test_an_error_event_without_a_sensible_code_is_a_broken_engine(code):
    assert verdict(fault_of_event({"message": "m", "code": code})) == (502, "engine_failed", True, True)


@pytest.mark.parametrize(
    ("fault", "expected"),
    [
        (broken("x"), (502, "engine_failed", True, True)),
        (silent("x"), (504, "engine_timeout", True, True)),
        (unreachable("x"), (503, "no_node_available", True, True)),
    ],
)
def test_what_no_answer_means(fault, expected):
    assert verdict(fault) == expected


@pytest.mark.parametrize(
    ("name", "param"),
    [
        ("err_prompt_too_long", "messages"),
        ("err_max_tokens_too_large", None),
        ("err_max_tokens_too_large_stream", None),
    ],
)
def test_a_context_that_is_too_long_has_openais_code(name, param):
    exchange = captures_of.load(name)
    fault = fault_of_answer(exchange.status, exchange.body)
    assert verdict(fault) == (400, "context_length_exceeded", False, False)
    if param is not None:
        assert fault.error.param == param


def test_the_clients_own_mistakes_are_told_in_the_engines_words():
    exchange = captures_of.load("err_bad_schema")
    fault = fault_of_answer(exchange.status, exchange.body)
    assert fault.error.message == orjson.loads(exchange.body)["error"]["message"][:ENGINE_MESSAGE_MAX]
    assert fault.error.type == "invalid_request_error"


def test_a_dump_instead_of_a_message_is_cut():
    fault = fault_of_answer(400, orjson.dumps({"error": {"message": "x" * 10**6}}))
    assert len(fault.error.message) == ENGINE_MESSAGE_MAX


@pytest.mark.parametrize("status", [404, 429, 500, 502, 503, 401])
def test_an_engines_words_are_kept_back_when_they_are_not_about_the_request(status):
    secret = "http://10.0.0.7:8000 /root/models Traceback"
    fault = fault_of_answer(status, orjson.dumps({"error": {"message": secret, "param": secret}}))
    assert secret not in fault.error.message + str(fault.error.param) + fault.cause


@pytest.mark.parametrize("status", [429, 503])
def test_a_full_engine_says_when_to_come_again(status):
    assert fault_of_answer(status, b"").error.retry_after_s == 1


@given(
    st.integers(300, 599),
    st.binary() | st.sampled_from([b"[]", b"1", b"null", b'{"error":1}', b'{"detail":"x"}']),
)
def test_any_answer_becomes_an_error_that_clients_know(status, body):
    fault = fault_of_answer(status, body)
    assert isinstance(fault.error, ApiError)
    assert fault.error.status in (400, 404, 502, 503)
    assert fault.is_broken is (status >= 500 and status != 503)
