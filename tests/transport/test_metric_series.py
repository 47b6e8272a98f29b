"""What is counted, under which names, and how it is scraped."""

from __future__ import annotations

import asyncio
import re
import socket
import urllib.request
from pathlib import Path
from typing import Any, Final

import pytest
from prometheus_client.parser import text_string_to_metric_families

from apikeys.v1 import key_service_pb2 as pb
from latchgate.domain.coherence import Reading
from latchgate.login import IssuerFigures
from latchgate.oidc.keys import IssuerKeys
from latchgate.workers.metrics import FleetMetrics
from support.service import RunningService, bearer, refusal, run_service
from support.transport import METHODS, call, call_path, call_raw, calls, fresh_database, good_request, label_of, sample

pytestmark = pytest.mark.asyncio(loop_scope="module")

ALERTS: Final = Path(__file__).parents[2] / "deploy" / "prometheus" / "alerts.yml"
SUFFIXES: Final = ("_total", "_bucket", "_sum", "_count", "_created", "")


def series(service: RunningService) -> set[tuple[str, tuple[tuple[str, str], ...]]]:
    """Lists all series that there are, by name and labels."""
    families = service.running.metrics.registry.collect()
    return {(each.name, tuple(sorted(each.labels.items()))) for family in families for each in family.samples}


def no_keys() -> IssuerKeys:
    """The keys of an issuer that nobody has asked for them."""

    async def fetch(url: str) -> dict[str, Any]:
        raise AssertionError(url)

    return IssuerKeys("https://login.example.com", fetch, lambda: 0.0)


@pytest.mark.parametrize("method", METHODS)
async def test_calls_are_counted(shared_service: RunningService, method: str) -> None:
    """Each call counts once, by its method and how it ended; and its time is taken once."""
    created = await shared_service.create_key("acme")
    if method == "GetPublishableKey":
        await shared_service.create_key("acme", key_type=2)
    answered, timed = calls(shared_service, method, "OK"), _timed(shared_service, method)
    refused = calls(shared_service, method, "INVALID_ARGUMENT")

    await call(shared_service, method, good_request(method, key_id=created.key.id))
    await refusal(call_raw(shared_service.channel, method, b"\xff", metadata=shared_service.root))

    assert answered + 1 == calls(shared_service, method, "OK")
    assert refused + 1 == calls(shared_service, method, "INVALID_ARGUMENT")
    assert timed + 2 == _timed(shared_service, method)


def _timed(service: RunningService, method: str) -> float:
    return sample(service, "latchgate_call_seconds_count", method=label_of(method))


async def test_outcomes_are_counted(shared_service: RunningService) -> None:
    """Each answer of Validate counts once by its outcome, in a batch each of its answers; callers' tokens do not."""
    token = (await shared_service.create_key("acme")).token
    before = {name: sample(shared_service, "latchgate_outcomes_total", outcome=name) for name in ("VALID", "NOT_FOUND")}

    await shared_service.outcome(token)
    requests = [pb.ValidateRequest(token=each) for each in (token, "no token", "", token)]
    await shared_service.keys.BatchValidate(pb.BatchValidateRequest(requests=requests))
    await call(shared_service, "ListPlans", good_request("ListPlans", key_id=""))

    assert before["VALID"] + 3 == sample(shared_service, "latchgate_outcomes_total", outcome="VALID")
    assert before["NOT_FOUND"] + 2 == sample(shared_service, "latchgate_outcomes_total", outcome="NOT_FOUND")


async def test_lookups_are_counted_in_their_batches(shared_service: RunningService) -> None:
    """Digests that the database is asked for count one by one, and the statements that ask for them once."""
    tokens = [(await shared_service.create_key("acme")).token for _ in range(7)]
    names = ("latchgate_lookup_batch_size_count", "latchgate_lookup_batch_size_sum", "latchgate_lookup_seconds_count")
    before = [sample(shared_service, name) for name in names]
    answered = sample(shared_service, "latchgate_lookups_total", result="answered")

    requests = [pb.ValidateRequest(token=token) for token in tokens]
    await shared_service.keys.BatchValidate(pb.BatchValidateRequest(requests=requests))

    statements, digests, timed = (sample(shared_service, name) - old for name, old in zip(names, before, strict=True))
    assert 7 == digests
    assert 1 <= statements <= 2
    assert statements == timed
    assert answered + 7 == sample(shared_service, "latchgate_lookups_total", result="answered")


async def test_pool_is_shown(shared_service: RunningService) -> None:
    """The connections for management are shown as busy and idle, which together are all that can be had."""
    states = [sample(shared_service, "latchgate_pool_connections", state=state) for state in ("busy", "idle")]
    assert 10 == sum(states)
    assert 1 == sample(shared_service, "latchgate_database_up")


async def test_series_can_not_be_made_by_callers(shared_service: RunningService) -> None:
    """Nothing that a caller sends becomes a label: neither methods that are not there, nor tokens, keys or
    organizations.
    """
    created = await shared_service.create_key("acme", permissions=["keys:read"])
    for method in METHODS:
        await asyncio.gather(
            call_raw(shared_service.channel, method, b"\xff", metadata=shared_service.root),
            call_raw(shared_service.channel, method, b"\xff", metadata=bearer("another-systems-token")),
            call_raw(shared_service.channel, method, b"", metadata=bearer(created.token)),
            return_exceptions=True,
        )
    for number in range(20):
        await refusal(call_path(shared_service.channel, f"/apikeys.v1.KeyService/Method{number}", b""))
        await refusal(call_path(shared_service.channel, f"/service{number}/Validate", b""))
        await shared_service.outcome(f"another-systems-token-{number}")
        await refusal(call(shared_service, "GetKey", pb.GetKeyRequest(key_id=f"key_{number:026}")))

    allowed = {
        "method": {label_of(method) for method in METHODS},
        "code": re.compile(r"[A-Z_]+"),
        "outcome": set(pb.Outcome.keys()),
        "result": {"answered", "error", "delivered", "pending", "dead", *(each.value for each in Reading)},
        "kind": {"delivery", "mail"},
        "link": {"log", "listen"},
        "problem": {"missing", "conflict"},
        "state": {"busy", "idle"},
        "le": re.compile(r"[0-9.+Inf]+"),
        "work": re.compile(r"[a-z_]+"),
    }
    for name, labels in series(shared_service):
        for label, value in labels:
            known: Any = allowed[label]
            if isinstance(known, set):
                assert value in known or f"OUTCOME_{value}" in known, (name, label, value)
            else:
                assert known.fullmatch(value), (name, label, value)


async def test_alerts_ask_for_what_there_is(shared_service: RunningService) -> None:
    """Every metric that the alerts name is there, with the labels by which they choose."""
    await call(shared_service, "ListPlans", good_request("ListPlans", key_id=""))
    await shared_service.outcome("another-systems-token")
    text = ALERTS.read_text()
    labels_of: dict[str, set[str]] = {}
    for name, labels in series(shared_service):
        labels_of.setdefault(name, set()).update(label for label, _ in labels)
    # What a supervisor has to say of its own, and a service that takes JWTs.
    for family in (*FleetMetrics().of_workers(), *IssuerFigures(no_keys()).collect()):
        for each in family.samples:
            labels_of.setdefault(each.name, set()).update(each.labels)

    named = set(re.findall(r"\blatchgate_[a-z_]+", text))
    assert named
    for name in named:
        assert any(name + suffix in labels_of for suffix in SUFFIXES), name
    chosen = re.findall(r"\b(latchgate_[a-z_]+)\{([^}]*)\}", text)
    assert chosen
    for name, matchers in chosen:
        for label in re.findall(r'(\w+)\s*[=!]~?\s*"', matchers):
            # `job` and `instance` are Prometheus's own.
            assert label in {"job", "instance"} | labels_of[name], (name, label)


@pytest.mark.parametrize("method", ["Validate", "BatchValidate"])
async def test_alerts_find_the_hot_path(method: str) -> None:
    """The expression by which the alerts choose Validate matches the name under which it is counted, and no other."""
    (pattern,) = set(re.findall(r'method=~"([^"]+)"', ALERTS.read_text()))
    assert ("Validate" == method) == bool(re.fullmatch(pattern, label_of(method)))


async def test_scrape_over_http(postgres_url: str, template_url: str) -> None:
    """The metrics port answers /metrics in Prometheus's text format with what was counted until then."""
    with socket.create_server(("127.0.0.1", 0)) as found:
        port: int = found.getsockname()[1]
    async with (
        fresh_database(postgres_url, template_url) as url,
        run_service(url, metrics_listen=f"127.0.0.1:{port}") as service,
    ):
        assert "NOT_FOUND" == await service.outcome("another-systems-token")
        text = await asyncio.to_thread(_scraped, port)

    families = {family.name: family for family in text_string_to_metric_families(text)}
    expected = {
        "latchgate_calls": "counter",
        "latchgate_call_seconds": "histogram",
        "latchgate_outcomes": "counter",
        "latchgate_lookups": "counter",
        "latchgate_lookup_batch_size": "histogram",
        "latchgate_lookup_seconds": "histogram",
        "latchgate_pool_connections": "gauge",
        "latchgate_database_up": "gauge",
        "latchgate_last_used_pending": "gauge",
        "latchgate_foreign_lookups_refused": "counter",
        "latchgate_memory_hits": "counter",
        "latchgate_memory_keys": "gauge",
        "latchgate_memory_evictions": "counter",
        "latchgate_lease_left_seconds": "gauge",
        "latchgate_tasks": "gauge",
        "latchgate_applied_revision": "gauge",
        "latchgate_log_readings": "counter",
        "latchgate_changes_applied": "counter",
        "process_resident_memory_bytes": "gauge",
        "process_open_fds": "gauge",
    }
    assert expected == {name: families[name].type for name in expected}
    assert all(family.documentation for family in families.values())
    counted = {
        each.name: each.value for each in families["latchgate_lookups"].samples if each.labels["result"] != "error"
    }
    assert 1 == counted["latchgate_lookups_total"]


def _scraped(port: int) -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        assert answer.headers["Content-Type"].startswith("text/plain")
        content: bytes = answer.read()
    return content.decode()
