"""The provider API against its contract: requests made from the contract's schemas, answers held against them.

A real gateway of two workers, real keys, and limits raised (they are tested in test_request_limits.py). For each
operation schemathesis makes requests as the contract has them, and others that break it.
"""

import asyncio
import itertools
import json
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import asyncpg
import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, Phase, given
from hypothesis import settings as hypothesis_settings
from schemathesis import Case, GenerationMode
from schemathesis.specs.openapi.checks import content_type_conformance, response_schema_conformance

from config.embedded import EmbeddedStores
from tests.conftest import database_named
from tests.fakes.provider_client import GPU, REGISTRATION
from tests.fakes.serving import Serving

FILE = Path(__file__).parents[1] / "contracts" / "gpu_marketplace_providers.json"

KEPT, BROKEN = 150, 100
"""Requests of each kind for one operation: all of them together take less than a minute."""

ERRORS = {400, 401, 403, 404, 405, 413, 415, 429, 503}
"""Counted as documented wherever they have the surface's shape."""

DECISIONS = {
    "nullable": (
        "the contract calls itself OpenAPI 3.1 and writes `nullable` as 3.0 did; it is read as it is meant (`as_meant`)"
    ),
    ("POST", "/api/providers/login-email", 404): (
        "decision 6: an unknown address gets the answer of a known one, so 404 is never given"
    ),
}
"""Where our answers are not what the contract's letter says, and why."""

ADMIN = "the-admin-token-of-the-tests"


def as_meant(schema: Any) -> Any:
    """A schema with `nullable` in OpenAPI 3.1's own words."""
    if isinstance(schema, list):
        return [as_meant(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    found = {name: as_meant(value) for name, value in schema.items() if name != "nullable"}
    return {"anyOf": [found, {"type": "null"}]} if schema.get("nullable") is True else found


CONTRACT = as_meant(json.loads(FILE.read_text()))
OPERATIONS = [
    (method.upper(), path)
    for path, item in CONTRACT["paths"].items()
    for method in item
    if method != "parameters"
]


@dataclass
class Served:
    """A running gateway and a provider of it."""

    url: str
    schema: Any
    numbers: Iterator[int] = field(default_factory=itertools.count)
    session: requests.Session = field(default_factory=requests.Session)
    key: str = ""
    provider_id: int = 0

    def register(self) -> tuple[int, str]:
        body = REGISTRATION | {"email": f"tested-{next(self.numbers)}@example.sa"}
        answer = self.session.post(f"{self.url}/api/providers/register", json=body, timeout=30)
        assert answer.status_code == 200, answer.text
        return answer.json()["provider_id"], answer.json()["api_key"]


@pytest.fixture(scope="module")
def tested(
    stores: EmbeddedStores, migrated_template: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Served]:
    name = f"contract_{os.getpid()}"
    asyncio.run(admin(stores, f"create database {name} template {migrated_template} strategy file_copy"))
    raised = dict.fromkeys(
        ("register_requests_hour", "marketplace_requests_minute", "admin_requests_minute", "api_requests_minute",
         "heartbeat_requests_minute"),
        100_000,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("contract")
    windows = folder / "agent.exe"
    windows.write_bytes(b"MZ")
    url = database_named(stores.database_url, name)
    with Serving(
        folder,
        url,
        stores.redis_url,
        developer_mode="true",
        admin_token=ADMIN,
        agent_exe=str(windows),
        **raised,
    ) as serving:
        schema = schemathesis.openapi.from_dict(CONTRACT)
        found = Served(f"http://127.0.0.1:{serving.port}", schema)
        found.provider_id, found.key = found.register()
        beat = {"api_key": found.key, "gpu_status": GPU, "cached_models": ["m"]}
        assert (
            found.session.post(f"{found.url}/api/providers/heartbeat", json=beat, timeout=30).status_code
            == 200
        )
        yield found
        found.session.close()
    asyncio.run(admin(stores, f"drop database {name} with (force)"))


async def admin(stores: EmbeddedStores, statement: str) -> None:
    connection = await asyncpg.connect(stores.database_url)
    try:
        await connection.execute(statement)
    finally:
        await connection.close()


@pytest.mark.parametrize(("method", "path"), OPERATIONS, ids=[f"{m} {p}" for m, p in OPERATIONS])
def test_answers_are_the_contracts(tested: Served, method: str, path: str) -> None:
    seen: Counter[int] = Counter()
    operation = tested.schema[path][method]
    for mode, examples in ((GenerationMode.POSITIVE, KEPT), (GenerationMode.NEGATIVE, BROKEN)):
        if mode is GenerationMode.NEGATIVE and not can_be_broken(operation):
            continue

        @hypothesis_settings(
            max_examples=examples, derandomize=True, database=None, deadline=None, phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )  # fmt: skip
        @given(case=operation.as_strategy(generation_mode=mode))
        def ask(case: Case) -> None:
            if case.meta is None or case.meta.generation.mode is GenerationMode.POSITIVE:
                with_credentials(tested, case)
            else:
                case.headers = {**(case.headers or {}), "x-provider-key": key_for(tested, method, path)}
            seen[held_against_contract(tested, case)] += 1

        ask()
    assert any(200 <= status < 300 for status in seen), f"only refusals: {dict(seen)}"


def can_be_broken(operation: Any) -> bool:
    """Whether it has anything that a request could have wrong: any text may stand in a path."""
    return bool(operation.body) or bool(operation.query)


def with_credentials(tested: Served, case: Case) -> None:
    """A real key wherever the contract wants one: in the path, the query, the body and the header."""
    key = key_for(tested, case.method, case.operation.path)
    case.headers = {**(case.headers or {}), "x-provider-key": key}
    if "api_key" in (case.path_parameters or {}):
        case.path_parameters["api_key"] = key
    if "id" in (case.path_parameters or {}):
        case.path_parameters["id"] = "me"
    if "key" in (case.query or {}):
        case.query["key"] = key
    if isinstance(case.body, dict):
        case.body.update({name: key for name in ("api_key", "key") if name in case.body})
        if "email" in case.body and case.operation.path.endswith("/register"):
            case.body["email"] = f"{next(tested.numbers)}.{case.body['email']}"[-254:]


def key_for(tested: Served, method: str, path: str) -> str:
    """The tested provider's; another one's where the request ends it."""
    ends = (method.upper(), path) in (("DELETE", "/api/providers/me"), ("POST", "/api/providers/rotate-key"))
    return tested.register()[1] if ends else tested.key


def held_against_contract(tested: Served, case: Case) -> int:
    """Send it; the answer's status, once the answer is known to be right."""
    answer = case.call(base_url=tested.url, session=tested.session, timeout=30)
    status, text = answer.status_code, answer.content.decode(errors="replace")
    assert status < 500 or status == 503, f"{case.as_curl_command()}\n{status} {text}"
    assert answer.headers["x-request-id"][0].startswith("req_")
    documented = CONTRACT["paths"][case.operation.path][case.method.lower()]["responses"]
    if status >= 400:
        assert status in ERRORS or str(status) in documented, f"{case.as_curl_command()}\n{status} {text}"
        assert answer.headers["content-type"] == ["application/json"]
        body = json.loads(text)
        assert body.keys() == {"error", "request_id"}, text
        assert all(isinstance(value, str) and value for value in body.values()), text
    else:
        assert str(status) in documented, f"{case.as_curl_command()}\n{status} {text}"
        case.validate_response(answer, checks=[content_type_conformance, response_schema_conformance])
    return status


def test_every_operation_is_in_the_gateways_own_document(tested: Served) -> None:
    answer = tested.session.get(f"{tested.url}/api/docs?format=json", timeout=30)
    served = {(method.upper(), path) for path, item in answer.json()["paths"].items() for method in item}
    assert set(OPERATIONS) <= served


def test_each_decision_is_about_something_that_the_contract_says() -> None:
    """A decision without its reason in the contract explains nothing."""
    assert '"nullable": true' in FILE.read_text()
    for key in DECISIONS:
        if isinstance(key, tuple):
            method, path, status = key
            assert str(status) in CONTRACT["paths"][path][method.lower()]["responses"]


@pytest.mark.parametrize("method", ["PUT", "PATCH", "POST", "DELETE"])
def test_another_method_is_a_405_that_names_those_there_are(tested: Served, method: str) -> None:
    answer = tested.session.request(method, f"{tested.url}/api/providers/public", timeout=30)
    assert (answer.status_code, answer.json().keys()) == (405, {"error", "request_id"})
    assert set(answer.headers["allow"].split(",")) == {"GET", "HEAD"}


def test_a_body_of_another_type_or_too_large_is_refused(tested: Served) -> None:
    url, headers = f"{tested.url}/api/providers/pause", {"x-provider-key": tested.key}
    form = tested.session.post(url, data={"key": tested.key}, headers=headers, timeout=30)
    assert form.status_code == 400
    large = tested.session.post(url, json={"key": "x" * 2**17}, headers=headers, timeout=30)
    assert (large.status_code, large.json().keys()) == (413, {"error", "request_id"})
