"""Requests that nobody thought of: from the schema that the server publishes, and of any text."""

import json

import httpx
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from tests.conftest import PLAIN

CASES = 25  # of each operation; docs/reliability.md says how to run thousands
CHECKS = (not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance)
SHARED = (HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.filter_too_much)


def test_every_answer_is_one_that_the_schema_declares(server):
    schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    for operation in schema.get_all_operations():

        @given(case=operation.ok().as_strategy())
        @settings(max_examples=CASES, deadline=None, suppress_health_check=SHARED, database=None)
        def ask(case):
            if isinstance(case.body, dict) and case.body.get("n"):
                case.body["n"] = 1  # what more of them cost is measured elsewhere
            case.validate_response(case.call(timeout=60), checks=CHECKS)

        ask()


@given(prompt=st.text(max_size=2000), negative=st.none() | st.text(max_size=100))
@settings(max_examples=40, deadline=None, suppress_health_check=SHARED)
def test_any_text_is_drawn_or_refused_by_its_field(server, prompt, negative):
    body = json.dumps({"prompt": prompt, "negative_prompt": negative, "steps": 1})
    response = httpx.post(
        f"{server.url}/generate",
        content=body,
        headers={"content-type": "application/json"},
        timeout=60,
        verify=PLAIN,
    )
    told = response.json()
    if response.status_code == 200:
        assert told["prompt_truncated"] in (True, False)
    else:
        assert (response.status_code, told["field"] in ("prompt", "negative_prompt")) == (422, True)
