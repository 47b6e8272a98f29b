"""A steady load of ordinary clients for hours, every answer of which is judged.

Callers ask Validate at moments of their own, give up some calls in flight, and take a new connection now and then.
Beside them keys are made, switched, rotated and revoked, and asked for after each change.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter, deque
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from random import Random
from typing import Any

import grpc

from apikeys.v1 import key_pb2
from apikeys.v1 import key_service_pb2 as pb
from apikeys.v1.key_service_pb2_grpc import KeyServiceStub
from bench import servers
from bench.database import TAG_KEY
from bench.servers import AS_ROOT, OWN_CONNECTION
from latchgate.domain.model import Environment, KeyType
from latchgate.domain.token import TokenFormat

ORGANIZATION = "bench-0000"
CALLERS = 8
CALL_TIMEOUT_S = 30.0
CANCELLED_SHARE = 0.01
# A call takes about a millisecond, one that is looked up some more: given up within that, it is mostly under way.
CANCELLED_WITHIN_S = 0.003
# Of those that are given up so many ask for a token that only the database can tell to be none.
LOOKED_UP_SHARE = 0.5
# Of revoked keys, of which the newest are remembered.
REVOKED_SHARE = 0.05
MAX_REVOKED = 1000
# How many calls, or lives of keys, a connection serves.
CALLS_A_CONNECTION = (500, 5000)
LIVES_A_CONNECTION = 30
# Over so many connections each change is asked for: that all lead to one of two workers is rare, and not for long.
WITNESSES = 6
LIFE_S = 1.0
MAX_TOLD = 20


@dataclass(slots=True, kw_only=True)
class Tally:
    """What the clients have seen. `pending` counts changes that were not EFFECTIVE, of which nothing is demanded."""

    answered: int = 0
    cancelled: int = 0
    changes: int = 0
    revoked: int = 0
    pending: int = 0
    connections: int = 0
    wrong: int = 0
    errors: Counter[str] = field(default_factory=Counter)
    told: list[str] = field(default_factory=list)
    """The first wrong answers and errors, a line each."""

    @property
    def is_clean(self) -> bool:
        """Whether there was neither a wrong answer nor an error."""
        return not self.wrong and not self.errors

    def judge(self, given: pb.ValidateResponse, due: pb.Outcome.ValueType, what: str) -> None:
        """Counts an answer, and tells of a wrong one."""
        self.answered += 1
        if given.outcome != due:
            self.wrong += 1
            self._tell(f"{what} was answered with {pb.Outcome.Name(given.outcome)}, not {pb.Outcome.Name(due)}")

    def failed(self, error: Exception, what: str) -> None:
        """Counts an error, and tells of it."""
        said = f"{error.code().name}: {error.details()}" if isinstance(error, grpc.aio.AioRpcError) else str(error)
        name = error.code().name if isinstance(error, grpc.aio.AioRpcError) else type(error).__name__
        self.errors[f"{name} ({what})"] += 1
        self._tell(f"{what} failed: {said}")

    def _tell(self, line: str) -> None:
        if len(self.told) < MAX_TOLD:
            self.told.append(f"{datetime.now(UTC):%H:%M:%S} {line}")


class SteadyLoad:
    """Loads a service with `per_s` calls of Validate a second until it is stopped."""

    def __init__(self, *, address: str, tokens: Sequence[str], per_s: float, rng: Random) -> None:
        """Takes tokens that are VALID throughout."""
        self.tally = Tally()
        self._address = address
        self._tokens = tokens
        self._pause_s = CALLERS / per_s
        self._rng = rng
        self._format = TokenFormat(TAG_KEY.encode())
        self._revoked: deque[str] = deque(maxlen=MAX_REVOKED)
        self._stopping = asyncio.Event()

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Loads until the block ends; calls that are under way then are finished."""
        async with asyncio.TaskGroup() as group:
            for _ in range(CALLERS):
                group.create_task(self._keep_asking())
            group.create_task(self._keep_living())
            try:
                yield
            finally:
                self._stopping.set()

    async def _keep_asking(self) -> None:
        at_s = time.monotonic()
        while not self._stopping.is_set():
            async with self._connected() as stub:
                for _ in range(self._rng.randint(*CALLS_A_CONNECTION)):
                    at_s = max(at_s + self._rng.expovariate(1 / self._pause_s), time.monotonic() - 1)
                    if await self._is_stopped_by(at_s):
                        break
                    await self._ask(stub)

    async def _ask(self, stub: Any) -> None:
        is_to_end = self._rng.random() < CANCELLED_SHARE
        if is_to_end and self._rng.random() < LOOKED_UP_SHARE:
            token = self._format.mint(KeyType.SECRET, Environment.LIVE).token
            due, what = pb.OUTCOME_NOT_FOUND, "a token that nobody has"
        elif self._revoked and self._rng.random() < REVOKED_SHARE:
            token, due, what = self._rng.choice(self._revoked), pb.OUTCOME_REVOKED, "a key revoked before"
        else:
            token, due, what = self._rng.choice(self._tokens), pb.OUTCOME_VALID, "a good key"
        call = stub.Validate(servers.request(token), timeout=CALL_TIMEOUT_S)
        is_given_up = False
        if is_to_end:
            await asyncio.sleep(self._rng.uniform(0, CANCELLED_WITHIN_S))
            is_given_up = call.cancel()
        try:
            self.tally.judge(await call, due, what)
        except grpc.aio.AioRpcError as error:
            self.tally.failed(error, "Validate")
        except asyncio.CancelledError:
            # Who is cancelled, the call or this task?
            if not is_given_up:
                raise
            self.tally.cancelled += 1

    async def _keep_living(self) -> None:
        at_s = time.monotonic()
        while not self._stopping.is_set():
            async with AsyncExitStack() as stack:
                stubs = [await stack.enter_async_context(self._connected()) for _ in range(WITNESSES)]
                for _ in range(LIVES_A_CONNECTION):
                    at_s = max(at_s + LIFE_S, time.monotonic() - LIFE_S)
                    if await self._is_stopped_by(at_s):
                        break
                    try:
                        await self._live(stubs)
                    except grpc.aio.AioRpcError as error:
                        self.tally.failed(error, "a key's life")

    async def _live(self, stubs: Sequence[Any]) -> None:
        """Makes a key, switches it off and on, rotates and revokes it; asks for it everywhere after each change."""
        changing = self._rng.choice(stubs)
        options = {"metadata": AS_ROOT, "timeout": CALL_TIMEOUT_S}
        created = await changing.CreateKey(
            pb.CreateKeyRequest(organization_id=ORGANIZATION, name="lives for a second", permissions=["read"]),
            **options,
        )
        self.tally.changes += 1
        key_id, token = created.key.id, created.token
        await self._demand(stubs, token, pb.OUTCOME_VALID, "a new key")
        for active, due in ((False, pb.OUTCOME_INACTIVE), (True, pb.OUTCOME_VALID)):
            toggled = await changing.ToggleKey(pb.ToggleKeyRequest(key_id=key_id, active=active), **options)
            if self._is_effective(toggled.effect):
                await self._demand(stubs, token, due, f"a key switched {'on' if active else 'off'}")
        rotated = await changing.RotateKey(pb.RotateKeyRequest(key_id=key_id), **options)
        if self._is_effective(rotated.effect):
            await self._demand(stubs, token, pb.OUTCOME_REVOKED, "a token that was rotated away")
        await self._demand(stubs, rotated.token, pb.OUTCOME_VALID, "a rotated token")
        revoked = await changing.RevokeKey(pb.RevokeKeyRequest(key_id=key_id), **options)
        if self._is_effective(revoked.effect):
            self.tally.revoked += 1
            await self._demand(stubs, rotated.token, pb.OUTCOME_REVOKED, "a key just revoked")
            self._revoked.extend((token, rotated.token))

    def _is_effective(self, effect: key_pb2.Effect) -> bool:
        self.tally.changes += 1
        if effect.state == key_pb2.EFFECT_STATE_EFFECTIVE:
            return True
        self.tally.pending += 1
        return False

    async def _demand(self, stubs: Sequence[Any], token: str, due: pb.Outcome.ValueType, what: str) -> None:
        asked = pb.ValidateRequest(token=token, required_permissions=["read"])
        for answer in await asyncio.gather(*(stub.Validate(asked, timeout=CALL_TIMEOUT_S) for stub in stubs)):
            self.tally.judge(answer, due, what)

    @asynccontextmanager
    async def _connected(self) -> AsyncIterator[Any]:
        """Opens a connection of its own, and closes it when no call is under way any more."""
        async with grpc.aio.insecure_channel(self._address, options=OWN_CONNECTION) as channel:
            self.tally.connections += 1
            yield KeyServiceStub(channel)

    async def _is_stopped_by(self, at_s: float) -> bool:
        """Waits until a time, or until the load is stopped; says whether it is."""
        await until_set(self._stopping, at_s - time.monotonic())
        return self._stopping.is_set()


async def until_set(event: asyncio.Event, timeout_s: float) -> bool:
    """Waits for an event, but not for longer; says whether it is set."""
    if timeout_s > 0 and not event.is_set():
        try:
            async with asyncio.timeout(timeout_s):
                await event.wait()
        except TimeoutError:
            return False
    return event.is_set()
