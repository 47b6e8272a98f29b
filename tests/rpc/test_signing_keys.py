"""The keys that sign access tokens: shared by all workers, published, changed in time, replaced at once."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import aiohttp
import grpc
import pytest
from joserfc.errors import JoseError
from joserfc.jwk import ECKey
from structlog.testing import capture_logs

from apikeys.v1 import audit_service_pb2 as audit_pb
from apikeys.v1 import token_service_pb2 as pb
from latchgate.domain.keyring import Keyring
from latchgate.storage.signing import JoseSigner
from latchgate.storage.tokens import PostgresTokenStore
from support.databases import opened, until_waiting
from support.keys import Tenant, database_of, execute, make_tenant
from support.service import TAG_KEY, RunningService, refusal, run_service
from support.tokens import exchange, published, refresh, verified

pytestmark = pytest.mark.asyncio(loop_scope="session")


def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Has published keys read each time."""
    monkeypatch.setattr("latchgate.domain.keyring.PUBLISHED_KEPT_S", 0.0)


async def kids(service: RunningService) -> Sequence[str]:
    """Gives the ids of the published keys, in the order in which they sign."""
    return [key["kid"] for key in await published(service)]


async def keep(service: RunningService, tag_key: str = TAG_KEY, lost: list[Any] | None = None) -> None:
    """Does what is to be done about the keys now."""
    async with opened(service.database_url) as database:
        signer = JoseSigner(tag_key.encode())
        told = [] if lost is None else lost
        await Keyring(PostgresTokenStore(database), signer, lambda: 0.0, told.append).keep()


async def age(service: RunningService, by: timedelta) -> None:
    """Has all keys be older."""
    await execute(service, "UPDATE signing_key SET sign_time = sign_time - $1::interval", by)


async def replace(service: RunningService) -> pb.RotateSigningKeysResponse:
    """Calls RotateSigningKeys as root."""
    answer: pb.RotateSigningKeysResponse = await service.tokens.RotateSigningKeys(
        pb.RotateSigningKeysRequest(), metadata=service.root
    )
    return answer


async def test_what_is_published(alone: RunningService) -> None:
    """Anyone can read the public half of the key, named by its thumbprint, and nothing of the other half."""
    (key,) = await published(alone)
    assert {"kty", "crv", "x", "y", "kid", "alg", "use"} == key.keys()
    assert ("EC", "P-256", "ES256", "sig") == (key["kty"], key["crv"], key["alg"], key["use"])
    shape: Any = {"kty": "EC", "crv": "P-256", "x": key["x"], "y": key["y"]}
    assert key["kid"] == ECKey.import_key(shape).thumbprint()


async def test_over_http(database_url: str) -> None:
    """The HTTP endpoint serves the same keys, as a document that may be kept for five minutes."""
    async with run_service(database_url, http_listen="127.0.0.1:0") as service, aiohttp.ClientSession() as http:
        url = f"http://{service.running.http_listen}/.well-known/jwks.json"
        async with http.get(url) as answer:
            assert (200, "application/json") == (answer.status, answer.content_type)
            assert "public, max-age=300" == answer.headers["cache-control"]
            assert {"keys": list(await published(service))} == await answer.json()
        async with http.post(url, data=b"{}") as answer:
            assert (405, "GET, HEAD") == (answer.status, answer.headers["allow"])
        counted = service.running.metrics.registry.get_sample_value(
            "latchgate_calls_total", {"method": "HTTP/jwks", "code": "OK"}
        )
        assert 1 == counted


async def test_workers_and_restarts_share_keys(database_url: str) -> None:
    """Services on one database that start at once have one key; it is the same after a restart, and each refreshes what
    the other has given.
    """
    async with run_service(database_url) as one, run_service(database_url) as two:
        first, second = await asyncio.gather(kids(one), kids(two))
        assert first == second
        assert 1 == len(first)
        tenant = await make_tenant(one, "acme")
        grant = await exchange(one, (await tenant.key()).token)
        following = await refresh(two, grant.refresh_token)
        await verified(one, following.access_token)
    async with run_service(database_url) as again:
        assert first == await kids(again)
        await verified(again, following.access_token)
        await refresh(again, following.refresh_token)


async def test_one_key_however_many_need_it(alone: RunningService) -> None:
    """Where there is none, whoever comes first makes one, and all others wait for that."""
    tokens = [(await (await make_tenant(alone, "acme")).key()).token for _ in range(4)]
    await execute(alone, "DELETE FROM signing_key")
    async with database_of(alone) as holder, database_of(alone) as observer:
        async with holder.transaction():
            # What was read is nothing, and nobody can store anything yet.
            await holder.execute("LOCK TABLE signing_key IN SHARE MODE")
            exchanging = asyncio.gather(*(exchange(alone, token) for token in tokens))
            await until_waiting(observer, len(tokens))
        grants = await exchanging
    await keep(alone)
    async with opened(alone.database_url) as database, PostgresTokenStore(database).transaction() as transaction:
        (key,) = await transaction.signing_keys()
    assert 4 == len({grant.access_token for grant in grants})
    assert all(key.kid in _header(grant.access_token) for grant in grants)


def _header(token: str) -> str:
    head = token.split(".", maxsplit=1)[0]
    return base64.urlsafe_b64decode(head + "=" * (-len(head) % 4)).decode()


async def test_change_in_time(alone: RunningService, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two days before its 30 are over a key gets a successor, published and not signing; after them that one signs, and
    the first is published for two hours more. What it has signed is good all the while.
    """
    at_once(monkeypatch)
    tenant = await make_tenant(alone, "acme")
    token = (await tenant.key()).token
    grant = await exchange(alone, token)
    (first,) = await kids(alone)
    await age(alone, timedelta(days=27, hours=23))
    await keep(alone)
    assert [first] == await kids(alone)
    await age(alone, timedelta(hours=2))
    await keep(alone)
    await keep(alone)
    (_, second) = await kids(alone)
    assert first in _header((await exchange(alone, token)).access_token)
    await age(alone, timedelta(days=2))
    following = await exchange(alone, token)
    assert second in _header(following.access_token)
    await keep(alone)
    assert [first, second] == await kids(alone)
    await verified(alone, grant.access_token)
    await age(alone, timedelta(minutes=30))
    await keep(alone)
    assert [first, second] == await kids(alone)
    await age(alone, timedelta(hours=1))
    await keep(alone)
    assert [second] == await kids(alone)
    await verified(alone, following.access_token)


async def test_late_change(alone: RunningService, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where nobody was there to make a successor in time, the next one is published for a day before it signs."""
    at_once(monkeypatch)
    tenant = await make_tenant(alone, "acme")
    token = (await tenant.key()).token
    (first,) = await kids(alone)
    await age(alone, timedelta(days=90))
    await keep(alone)
    (_, second) = await kids(alone)
    await age(alone, timedelta(hours=23))
    assert first in _header((await exchange(alone, token)).access_token)
    await age(alone, timedelta(hours=2))
    assert second in _header((await exchange(alone, token)).access_token)


async def test_replaced_at_once(alone: RunningService) -> None:
    """RotateSigningKeys ends all keys: none of them is published or signs any more. Refresh tokens go on. It stands in
    the audit trail.
    """
    tenant = await make_tenant(alone, "acme")
    grant = await exchange(alone, (await tenant.key()).token)
    before = await kids(alone)
    answer = await replace(alone)
    assert [answer.key.kid] == await kids(alone)
    assert answer.key.kid not in before
    with pytest.raises(JoseError):
        await verified(alone, grant.access_token)
    following = await refresh(alone, grant.refresh_token)
    await verified(alone, following.access_token)
    events = await alone.audit.ListAuditEvents(
        audit_pb.ListAuditEventsRequest(organization_id="org_root", entity="signing_key"), metadata=alone.root
    )
    (event,) = events.events
    assert ("TokenService/RotateSigningKeys", answer.key.kid, "OK") == (event.method, event.entity_id, event.code)
    assert (before, [answer.key.kid]) == (list(event.before["kids"]), list(event.after["kids"]))


async def test_root_alone_replaces(acme: Tenant) -> None:
    """No other key, whatever it may do, ends the keys that sign."""
    before = await kids(acme.service)
    error = await refusal(acme.service.tokens.RotateSigningKeys(pb.RotateSigningKeysRequest(), metadata=acme.admin))
    assert (grpc.StatusCode.PERMISSION_DENIED, "ROOT_REQUIRED") == (error.code, error.reason)
    assert before == await kids(acme.service)


async def test_keys_of_another_tag_key(alone: RunningService, monkeypatch: pytest.MonkeyPatch) -> None:
    """A key whose private half can not be read is followed by a new one at once, which is said; it stays published for
    what it has signed. One that was to sign later is gone.
    """
    at_once(monkeypatch)
    tenant = await make_tenant(alone, "acme")
    token = (await tenant.key()).token
    (first,) = await kids(alone)
    await age(alone, timedelta(days=29))
    await execute(alone, "UPDATE signing_key SET sealed = $1", JoseSigner(b"another-key").make().sealed)
    await execute(
        alone,
        "INSERT INTO signing_key SELECT 'later', x, y, sealed, now() + interval '1 day' FROM signing_key",
    )
    with capture_logs() as lines:
        grant = await exchange(alone, token)
    assert ["signing_keys_unreadable", "call"] == [line["event"] for line in lines]
    assert [first, "later"] == lines[0]["kids"]
    (kept, made) = await kids(alone)
    assert first == kept
    assert made in _header(grant.access_token)
    await verified(alone, grant.access_token)
    with capture_logs() as lines:
        await exchange(alone, token)
    assert ["call"] == [line["event"] for line in lines]
    lost: list[Any] = []
    await keep(alone, lost=lost)
    assert [] == lost


async def test_published_from_memory(alone: RunningService) -> None:
    """Whoever asks for the keys without end does not ask the database each time."""
    before = await kids(alone)
    await execute(alone, "DELETE FROM signing_key")
    assert [before] * 20 == [await kids(alone) for _ in range(20)]


async def test_nobody_is_recorded_who_reads_them(alone: RunningService) -> None:
    """GetJwks leaves no event in any trail."""
    await published(alone)
    events = await alone.audit.ListAuditEvents(
        audit_pb.ListAuditEventsRequest(organization_id="org_root", method="TokenService/GetJwks"), metadata=alone.root
    )
    assert [] == list(events.events)
