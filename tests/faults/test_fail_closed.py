"""A worker that can not reach the database answers from memory while its lease lasts, and then not at all."""

from __future__ import annotations

import asyncio
import time

import grpc
import pytest

from apikeys.v1 import key_service_pb2 as pb
from support.databases import fault_proxy, until
from support.service import RunningService, run_service

LEASE_S = 2.0
# Half of what a lookup waits for an answer of the database: who is answered sooner has not waited for it.
AT_ONCE_S = 0.5
BACK_WITHIN_S = 5.0


async def _answer(service: RunningService, token: str) -> tuple[str, float]:
    """Asks once; gives the outcome or the status, and how long it took in seconds."""
    start_s = time.monotonic()
    try:
        outcome = pb.Outcome.Name((await service.validate(token)).outcome).removeprefix("OUTCOME_")
    except grpc.aio.AioRpcError as error:
        outcome = error.code().name
    return outcome, time.monotonic() - start_s


@pytest.mark.parametrize("failure", ["freeze", "refuse"])
async def test_memory_answers_until_the_lease_ends(database_url: str, failure: str) -> None:
    """With the database away, silent or refusing, a token in memory is answered with VALID until the lease ends, and
    from then on with UNAVAILABLE, at once. Nothing is answered from memory later than a lease after the database went.
    Once it is back, so is the service, within seconds.
    """
    async with fault_proxy(database_url) as proxy, run_service(proxy.url, lease_seconds=LEASE_S) as service:
        await service.create_organization()
        known, unknown = await service.create_key(), await service.create_key()
        assert "VALID" == await service.outcome(known.token)
        getattr(proxy, failure)()
        start_s = time.monotonic()

        outcomes: list[tuple[str, float]] = []
        last_valid_s = start_s
        while not outcomes or outcomes[-1][0] == "VALID":
            outcomes.append(await _answer(service, known.token))
            if outcomes[-1][0] == "VALID":
                last_valid_s = time.monotonic()
            await asyncio.sleep(0.01)

        assert "UNAVAILABLE" == outcomes[-1][0]
        assert len(outcomes) > 10, "memory answered for a while"
        assert last_valid_s - start_s < LEASE_S
        after = [await _answer(service, each.token) for each in (known, unknown) * 3]
        assert {"UNAVAILABLE"} == {outcome for outcome, _ in after}
        assert max(seconds for _, seconds in after) < AT_ONCE_S

        proxy.thaw()
        proxy.accept()
        back_s = time.monotonic()

        async def is_back() -> bool:
            return {"VALID"} == {(await _answer(service, each.token))[0] for each in (known, unknown)}

        await until(is_back)
        assert time.monotonic() - back_s < BACK_WITHIN_S


async def test_what_is_not_in_memory_is_refused_at_once(database_url: str) -> None:
    """Once a lookup has found the database silent, further ones are refused without waiting for it, while tokens in
    memory go on being answered.
    """
    async with fault_proxy(database_url) as proxy, run_service(proxy.url, lease_seconds=30) as service:
        await service.create_organization()
        known, unknown = await service.create_key(), await service.create_key()
        assert "VALID" == await service.outcome(known.token)
        proxy.freeze()
        assert "UNAVAILABLE" == (await _answer(service, unknown.token))[0]

        answers = [await _answer(service, unknown.token) for _ in range(5)]

        assert {"UNAVAILABLE"} == {outcome for outcome, _ in answers}
        assert max(seconds for _, seconds in answers) < AT_ONCE_S
        assert "VALID" == await service.outcome(known.token)
        proxy.thaw()
