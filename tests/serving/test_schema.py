"""The server keeps to its own OpenAPI, whatever schemathesis makes of it."""

from __future__ import annotations

from collections import Counter

import pytest

schemathesis = pytest.importorskip("schemathesis")

from hypothesis import HealthCheck, given, settings  # noqa: E402
from schemathesis import checks  # noqa: E402

from adaptkit.serving.app import create_app  # noqa: E402
from adaptkit.serving.limits import Limits  # noqa: E402

EXAMPLES = 30
TOKEN = "a-token-of-some-length"
CHECKED = [
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_headers_conformance",
    "response_schema_conformance",
    "ignored_auth",
    "unsupported_method",
]


@pytest.fixture(scope="module")
def api(shelf):
    return schemathesis.openapi.from_asgi("/openapi.json", create_app(shelf, Limits(seconds=20), token=TOKEN))


@pytest.mark.filterwarnings("ignore")
def test_the_server_keeps_to_its_description(api):
    checks.load_all_checks()
    chosen = [checks.CHECKS.get_one(name) for name in CHECKED]
    tried: Counter[str] = Counter()
    for found in api.get_all_operations():
        operation = found.ok()

        @settings(max_examples=EXAMPLES, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
        @given(case=operation.as_strategy())
        def keeps(case):
            tried[case.operation.label] += 1
            case.call_and_validate(headers={"Authorization": f"Bearer {TOKEN}"}, checks=chosen)

        keeps()
    assert set(tried) == {"GET /health", "GET /metrics", "GET /adapters", "GET /adapters/{name}", "POST /predict"}
    assert tried["POST /predict"] >= EXAMPLES
