"""RefreshToken and RevokeToken: what follows an exchange, and what ends it."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Awaitable, Callable
from datetime import timedelta

import grpc
import pytest
from structlog.testing import capture_logs

from apikeys.v1 import key_pb2
from apikeys.v1 import token_service_pb2 as pb
from latchgate.domain.model import DELETED_KEPT
from latchgate.storage.postgres import Database
from latchgate.storage.purge import purge_keys
from latchgate.storage.tokens import forget_families
from support.databases import opened, until, until_waiting
from support.keys import Tenant, database_of, execute, hours_ahead, make_tenant
from support.service import RunningService, call_error, run_service
from support.tokens import REFRESH_TOKENS, exchange, refresh, refused_refresh, revoke, verified

pytestmark = pytest.mark.asyncio(loop_scope="session")

INVALID = "REFRESH_TOKEN_INVALID"
REUSED = "REFRESH_TOKEN_REUSED"


def reuses(service: RunningService) -> float:
    """Says how many refresh tokens were used twice."""
    return service.running.metrics.registry.get_sample_value("latchgate_refresh_tokens_reused_total") or 0.0


async def families(tenant: Tenant) -> int:
    """Counts the families of a tenant."""
    async with database_of(tenant.service) as connection:
        count: int = await connection.fetchval(
            "SELECT count(*) FROM token_family f JOIN key k ON k.id = f.key_id WHERE k.organization_id = $1", tenant.id
        )
    return count


async def test_chain(acme: Tenant) -> None:
    """Each refresh gives a new access token and a new refresh token, all the way to the same end."""
    created = await acme.key(permissions=["read"])
    grant = await exchange(acme.service, created.token)
    seen, ids = {grant.refresh_token}, {(await verified(acme.service, grant.access_token))["jti"]}
    following = await refresh(acme.service, grant.refresh_token)
    for _ in range(3):
        said = await verified(acme.service, following.access_token)
        assert (created.key.id, "read", "Bearer") == (said["sub"], said["scope"], following.token_type)
        assert grant.refresh_expire_time == following.refresh_expire_time
        assert 300 == said["exp"] - said["iat"]
        seen.add(following.refresh_token)
        ids.add(said["jti"])
        following = await refresh(acme.service, following.refresh_token)
    assert (4, 4) == (len(seen), len(ids))
    assert 1 == await families(acme)


@pytest.mark.parametrize("age", [0, 1, 3])
async def test_reuse_ends_all(acme: Tenant, age: int) -> None:
    """A token that was used up, be it the last or one long before, ends all that came of the exchange when it is used
    again: the newest too. It is counted and logged, with no token.
    """
    tokens = [(await exchange(acme.service, (await acme.key()).token)).refresh_token]
    other = await exchange(acme.service, (await acme.key()).token)
    for _ in range(4):
        tokens.append((await refresh(acme.service, tokens[-1])).refresh_token)
    before = reuses(acme.service)
    with capture_logs() as lines:
        assert REUSED == await refused_refresh(acme.service, tokens[-2 - age])
    assert before + 1 == reuses(acme.service)
    warning = lines[0]
    assert ("refresh_token_reused", "warning", "127.0.0.1") == (
        warning["event"],
        warning["log_level"],
        warning["peer"],
    )
    assert (warning["key"], warning["request_id"]) == (lines[1]["caller"], lines[1]["request_id"])
    assert not [token for token in tokens if token in str(lines)]
    for token in tokens:
        assert INVALID == await refused_refresh(acme.service, token)
    await refresh(acme.service, other.refresh_token)


async def test_two_at_once(acme: Tenant) -> None:
    """Of two who use the same token at once one is given the next, and the other ends all: one of them is a thief."""
    token = (await exchange(acme.service, (await acme.key()).token)).refresh_token
    calls = [refresh(acme.service, token) for _ in range(2)]
    done = await asyncio.gather(*calls, return_exceptions=True)
    (error,) = [call_error(each) for each in done if isinstance(each, grpc.aio.AioRpcError)]
    (grant,) = [each for each in done if isinstance(each, pb.RefreshTokenResponse)]
    assert REUSED == error.reason
    assert INVALID == await refused_refresh(acme.service, grant.refresh_token)


async def test_retry(acme: Tenant) -> None:
    """A lost answer is asked for again with the same request_id: it holds the same refresh token, however often, and a
    good access token. With another id, or none, it is a second use.
    """
    token = (await exchange(acme.service, (await acme.key()).token)).refresh_token
    request_id = str(uuid.uuid4())
    first = await refresh(acme.service, token, request_id)
    for again in await asyncio.gather(*(refresh(acme.service, token, request_id) for _ in range(3))):
        assert first.refresh_token == again.refresh_token
        assert (await verified(acme.service, again.access_token))["exp"] >= first.expire_time.seconds
    following = await refresh(acme.service, first.refresh_token, str(uuid.uuid4()))
    assert following.refresh_token != first.refresh_token
    for request in (str(uuid.uuid4()), ""):
        token = (await exchange(acme.service, (await acme.key()).token)).refresh_token
        await refresh(acme.service, token, request_id)
        assert REUSED == await refused_refresh(acme.service, token, request)


async def test_retries_at_once(acme: Tenant) -> None:
    """Two tries of one request that are under way at once are answered alike."""
    token = (await exchange(acme.service, (await acme.key()).token)).refresh_token
    request_id = str(uuid.uuid4())
    answers = await asyncio.gather(*(refresh(acme.service, token, request_id) for _ in range(4)))
    assert 1 == len({answer.refresh_token for answer in answers})
    await refresh(acme.service, answers[0].refresh_token)


async def test_retry_after_its_answer_was_used(acme: Tenant) -> None:
    """Whoever repeats a request whose answer was used since has not lost it: that is a second use, and ends all."""
    token = (await exchange(acme.service, (await acme.key()).token)).refresh_token
    request_id = str(uuid.uuid4())
    following = await refresh(acme.service, (await refresh(acme.service, token, request_id)).refresh_token)
    assert REUSED == await refused_refresh(acme.service, token, request_id)
    assert INVALID == await refused_refresh(acme.service, following.refresh_token)


async def test_late_retry(acme: Tenant) -> None:
    """After 10 minutes the answer is kept no more, and the retry is refused; it is not taken for theft."""
    created = await acme.key()
    token = (await exchange(acme.service, created.token)).refresh_token
    request_id = str(uuid.uuid4())
    following = await refresh(acme.service, token, request_id)
    statement = "UPDATE token_family SET use_time = now() - interval '10 minutes' WHERE key_id = $1"
    await execute(acme.service, statement, created.key.id)
    assert INVALID == await refused_refresh(acme.service, token, request_id)
    await refresh(acme.service, following.refresh_token)


async def test_request_ids_are_a_familys_own(acme: Tenant, rival: Tenant) -> None:
    """The same request_id for other refresh tokens says nothing of theirs."""
    request_id = str(uuid.uuid4())
    grants = [await exchange(tenant.service, (await tenant.key()).token) for tenant in (acme, acme, rival)]
    following = [await refresh(acme.service, grant.refresh_token, request_id) for grant in grants]
    assert 3 == len({grant.refresh_token for grant in following})
    for grant in following:
        assert grant.refresh_token != (await refresh(acme.service, grant.refresh_token, request_id)).refresh_token


async def test_what_is_no_refresh_token(acme: Tenant) -> None:
    """A key, an access token, one with a wrong tag, one of nobody's and any text are all the same: not accepted."""
    created = await acme.key()
    grant = await exchange(acme.service, created.token)
    wrong = grant.refresh_token[:-1] + ("a" if grant.refresh_token[-1] != "a" else "b")
    nobodys = REFRESH_TOKENS.mint().token
    texts = (created.token, wrong, nobodys, "x", "lk_rt_", "lk_rt_" + "0" * 40, grant.access_token[:512])
    messages = set()
    for text in texts:
        assert INVALID == await refused_refresh(acme.service, text)
        try:
            await refresh(acme.service, text)
        except grpc.aio.AioRpcError as error:
            messages.add(call_error(error).message)
        await revoke(acme.service, text)
    assert {"the refresh token is not accepted; exchange the key again"} == messages
    await refresh(acme.service, grant.refresh_token)


ENDS: dict[str, Callable[[Tenant, str], Awaitable[object]]] = {
    "revoked": lambda acme, key_id: acme.revoke(key_id),
    "deleted": lambda acme, key_id: acme.delete(key_id),
    "rotated": lambda acme, key_id: acme.rotate(key_id),
    "expired": lambda acme, key_id: acme.expire(key_id),
    "switched off": lambda acme, key_id: acme.toggle(key_id, active=False),
    "inactive organization": lambda acme, _: acme.set_active(active=False),
    "elsewhere": lambda acme, key_id: acme.update(key_pb2.Key(id=key_id, allowed_cidrs=["192.0.2.0/24"])),
}


@pytest.mark.parametrize("end", ENDS)
async def test_keys_that_are_not_good_refresh_nothing(acme: Tenant, end: str) -> None:
    """From the moment that the call has returned which ends a key, or makes it unusable, nothing is refreshed."""
    created = await acme.key()
    grant = await exchange(acme.service, created.token)
    await ENDS[end](acme, created.key.id)
    assert INVALID == await refused_refresh(acme.service, grant.refresh_token)


BACK: dict[str, Callable[[Tenant, str], Awaitable[object]]] = {
    "expired": lambda acme, key_id: acme.update(key_pb2.Key(id=key_id, expire_time=hours_ahead(1))),
    "switched off": lambda acme, key_id: acme.toggle(key_id, active=True),
    "inactive organization": lambda acme, _: acme.set_active(active=True),
    "elsewhere": lambda acme, key_id: acme.update(key_pb2.Key(id=key_id, allowed_cidrs=["127.0.0.0/8"])),
}


@pytest.mark.parametrize("end", BACK)
async def test_keys_that_come_back(acme: Tenant, end: str) -> None:
    """What makes a key unusable for a while ends nothing: once it is good again, the same refresh token is."""
    created = await acme.key()
    grant = await exchange(acme.service, created.token)
    await ENDS[end](acme, created.key.id)
    assert INVALID == await refused_refresh(acme.service, grant.refresh_token)
    await BACK[end](acme, created.key.id)
    await refresh(acme.service, grant.refresh_token)


@pytest.mark.parametrize("end", ["revoke", "delete"])
async def test_an_end_is_final(acme: Tenant, end: str) -> None:
    """Revoking or deleting a key ends its families with it: nothing of them is left, also if the key is undeleted."""
    created, other = await acme.key(), await acme.key()
    grant, kept = await exchange(acme.service, created.token), await exchange(acme.service, other.token)
    await getattr(acme, end)(created.key.id)
    assert 1 == await families(acme)
    if end == "delete":
        await acme.undelete(created.key.id)
        assert INVALID == await refused_refresh(acme.service, grant.refresh_token)
        await exchange(acme.service, created.token)
    await refresh(acme.service, kept.refresh_token)


async def test_rotation_with_grace(acme: Tenant) -> None:
    """While the old token of a key has its grace, what it was exchanged for is refreshed, and never beyond it."""
    created = await acme.key()
    grant = await exchange(acme.service, created.token)
    rotated = await acme.rotate(created.key.id, grace=timedelta(minutes=2))
    following = await refresh(acme.service, grant.refresh_token)
    assert rotated.key.secrets[1].expire_time.seconds == following.expire_time.seconds
    await acme.end_grace(created.key.id)
    assert INVALID == await refused_refresh(acme.service, following.refresh_token)
    await refresh(acme.service, (await exchange(acme.service, rotated.token)).refresh_token)


async def test_families_end(acme: Tenant) -> None:
    """A family ends at its time, and no access token outlives it; then it is removed."""
    created = await acme.key()
    grant = await exchange(acme.service, created.token)
    statement = "UPDATE token_family SET expire_time = now() + interval '1 minute' WHERE key_id = $1"
    await execute(acme.service, statement, created.key.id)
    following = await refresh(acme.service, grant.refresh_token)
    assert following.refresh_expire_time.seconds == following.expire_time.seconds
    await execute(acme.service, "UPDATE token_family SET expire_time = now() WHERE key_id = $1", created.key.id)
    assert INVALID == await refused_refresh(acme.service, following.refresh_token)
    kept = await exchange(acme.service, created.token)
    async with opened(acme.service.database_url) as database:
        await forget_families(database)
    assert 1 == await families(acme)
    await refresh(acme.service, kept.refresh_token)


async def test_what_is_kept_for_retries_is_forgotten(acme: Tenant) -> None:
    """Of the token that is kept for a retry nothing is left after 10 minutes, and it is there until then."""
    for minutes, left in ((9, 1), (10, 0)):
        created = await acme.key()
        grant = await exchange(acme.service, created.token)
        await refresh(acme.service, grant.refresh_token, str(uuid.uuid4()))
        statement = "UPDATE token_family SET use_time = now() - $2::interval WHERE key_id = $1"
        await execute(acme.service, statement, created.key.id, timedelta(minutes=minutes))
        async with opened(acme.service.database_url) as database:
            await forget_families(database)
        async with database_of(acme.service) as connection:
            assert left == await connection.fetchval(
                "SELECT count(sealed_token) FROM token_family WHERE key_id = $1", created.key.id
            )


async def test_much_to_forget(acme: Tenant, monkeypatch: pytest.MonkeyPatch) -> None:
    """However much has expired, all of it goes, a part at a time."""
    monkeypatch.setattr("latchgate.storage.tokens.FORGET_ROWS", 2)
    created = await acme.key()
    for _ in range(5):
        await exchange(acme.service, created.token)
    await execute(acme.service, "UPDATE token_family SET expire_time = now() WHERE key_id = $1", created.key.id)
    async with opened(acme.service.database_url) as database:
        await forget_families(database)
    assert 0 == await families(acme)


async def test_purge(acme: Tenant) -> None:
    """A key that is removed for good takes what is left of its families along."""
    created = await acme.key()
    grant = await exchange(acme.service, created.token)
    await acme.delete(created.key.id)
    await acme.age_deletion(created.key.id, DELETED_KEPT)
    # As a worker of the release before would have left it.
    await execute(
        acme.service,
        """
        INSERT INTO token_family (id, key_id, secret_id, handle, token_digest, audience, permissions, expire_time)
        SELECT 'fam_' || s.id, s.key_id, s.id, digest, digest, '', '{}', now() + interval '1 day'
        FROM secret s WHERE s.key_id = $1
        """,
        created.key.id,
    )
    async with opened(acme.service.database_url) as database:
        await _purged(database)
    assert 0 == await families(acme)
    assert INVALID == await refused_refresh(acme.service, grant.refresh_token)


async def _purged(database: Database) -> None:
    await purge_keys(database)


async def test_permissions_that_the_key_still_has(acme: Tenant) -> None:
    """A refresh gives what was asked for as far as the key still has it, and never what it was given since."""
    created = await acme.key(permissions=["read", "write"])
    every = await exchange(acme.service, created.token)
    one = await exchange(acme.service, created.token, permissions=["read"])
    await acme.update(key_pb2.Key(id=created.key.id, permissions=["write", "keys:read"]))
    following = await refresh(acme.service, every.refresh_token)
    assert "write" == (await verified(acme.service, following.access_token))["scope"]
    assert "" == (await verified(acme.service, (await refresh(acme.service, one.refresh_token)).access_token))["scope"]
    await acme.update(key_pb2.Key(id=created.key.id, permissions=["read", "keys:read", "write"]))
    following = await refresh(acme.service, following.refresh_token)
    assert "read write" == (await verified(acme.service, following.access_token))["scope"]


async def test_revoke_token(acme: Tenant) -> None:
    """Whoever has a refresh token, also a used one, ends it with all that follows; doing so again changes nothing."""
    created = await acme.key()
    for use in (0, 1):
        grant = await exchange(acme.service, created.token)
        other = await exchange(acme.service, created.token)
        following = await refresh(acme.service, grant.refresh_token)
        await revoke(acme.service, (following, grant)[use].refresh_token)
        for each in (following, grant):
            assert INVALID == await refused_refresh(acme.service, each.refresh_token)
            await revoke(acme.service, each.refresh_token)
        await refresh(acme.service, other.refresh_token)
    await exchange(acme.service, created.token)


async def test_a_revocation_that_is_under_way(acme: Tenant) -> None:
    """A refresh that comes while its key is being revoked waits, and is refused; so the call that revokes waits for a
    refresh that came first.
    """
    created = await acme.key()
    grant = await exchange(acme.service, created.token)
    async with database_of(acme.service) as holder, database_of(acme.service) as observer:
        async with holder.transaction():
            # Where every change of the organization's keys begins.
            await holder.execute("SELECT 1 FROM organization WHERE id = $1 FOR NO KEY UPDATE", acme.id)
            revoking = asyncio.ensure_future(acme.revoke(created.key.id))
            await until_waiting(observer)
            refreshing = asyncio.ensure_future(refused_refresh(acme.service, grant.refresh_token))
            await until_waiting(observer, 2)
        assert INVALID == await refreshing
        await revoking


@pytest.mark.parametrize("end", ["UPDATE secret SET end_time", "UPDATE key SET expire_time"])
async def test_an_end_that_came_while_it_waited(acme: Tenant, end: str) -> None:
    """A refresh goes by the moment at which it has its locks, and not by that at which it began to wait for them."""
    created = await acme.key()
    grant = await exchange(acme.service, created.token)
    column = "key_id" if "secret" in end else "id"
    async with database_of(acme.service) as holder, database_of(acme.service) as observer:
        async with holder.transaction():
            await holder.execute("SELECT 1 FROM organization WHERE id = $1 FOR NO KEY UPDATE", acme.id)
            refreshing = asyncio.ensure_future(refused_refresh(acme.service, grant.refresh_token))
            await until_waiting(observer)
            await holder.execute(f"{end} = clock_timestamp() WHERE {column} = $1", created.key.id)
        assert INVALID == await refreshing


async def test_a_refresh_is_a_use(database_url: str) -> None:
    """A refresh moves the key's last use, some moments later."""
    async with run_service(database_url, usage_flush_seconds=0.02) as service:
        tenant = await make_tenant(service, "acme")
        created = await tenant.key()
        grant = await exchange(service, created.token)

        async def is_used() -> bool:
            return (await tenant.get(created.key.id)).HasField("last_used_time")

        await until(is_used)
        await execute(service, "UPDATE last_used SET used_time = '2020-01-01'")
        await refresh(service, grant.refresh_token)

        async def is_used_again() -> bool:
            return (await tenant.get(created.key.id)).last_used_time.ToDatetime().year > 2020

        await until(is_used_again)


async def test_nothing_of_it_is_stored(acme: Tenant) -> None:
    """The database holds no refresh token, none of the keys' private halves, and no request's id, in any plain form."""
    request_id = uuid.uuid4()
    grant = await exchange(acme.service, (await acme.key()).token)
    following = await refresh(acme.service, grant.refresh_token, str(request_id))
    async with database_of(acme.service) as connection:
        rows = await connection.fetch("SELECT t::text FROM token_family t UNION ALL SELECT t::text FROM signing_key t")
        events = await connection.fetch("SELECT t::text FROM audit_event t")
    stored = "\n".join(row[0] for row in (*rows, *events))
    for token in (grant.refresh_token, following.refresh_token, grant.access_token, following.access_token):
        for part in (token, token[6:22], token[22:35]):
            assert part not in stored
            assert part.encode().hex() not in stored
    for form in (str(request_id), request_id.hex):
        assert form not in stored
        assert form.encode().hex() not in stored
