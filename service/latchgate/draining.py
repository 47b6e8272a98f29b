"""Stopping so that no call which has arrived is lost."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Final

from latchgate.domain.model import Verdict
from latchgate.domain.ports import KeyReader, Limiter, UsageRecorder
from latchgate.domain.token import TokenFormat
from latchgate.domain.validation import ForeignLookupBudget, Validator
from latchgate.rpc.pipeline import Backend, Pipeline
from latchgate.rpc.server import RpcServer

QUIET_S: Final = 0.02
MAX_HOLD_S: Final = 0.1


class HoldingValidator(Validator):
    """Judges like any other, but makes everyone wait until it is told to let go."""

    def __init__(
        self,
        *,
        tokens: TokenFormat,
        keys: KeyReader,
        limiter: Limiter,
        usage: UsageRecorder,
        foreign: ForeignLookupBudget,
    ) -> None:
        """Takes what a Validator takes."""
        super().__init__(tokens=tokens, keys=keys, limiter=limiter, usage=usage, foreign=foreign)
        self._released = asyncio.Event()
        self.held = 0

    def release(self) -> None:
        """Lets everyone go on."""
        self._released.set()

    async def validate(
        self,
        token: str,
        *,
        required_permissions: Sequence[str] = (),
        client_ip: str = "",
        cost: int = 1,
        min_revision: int = 0,
        only_organization_id: str = "",
    ) -> Verdict:
        """Waits, and then judges."""
        self.held += 1
        await self._released.wait()
        return await super().validate(
            token,
            required_permissions=required_permissions,
            client_ip=client_ip,
            cost=cost,
            min_revision=min_revision,
            only_organization_id=only_organization_id,
        )


class Drain:
    """Stops a server.

    When grpc is told to stop, it lets the calls finish that have reached their handlers, and kills those that have come
    and were not fetched yet: their clients see CANCELLED, which none repeats by itself. So all calls are fetched and
    held first, which takes a moment, because who waits for an answer asks for nothing more. Only then is the server
    told to stop, and then they are answered. What can still be lost is what a client sends on an open connection before
    it hears that the server stops.
    """

    def __init__(self, server: RpcServer, pipeline: Pipeline, grace_s: float) -> None:
        """Takes the server, and how long calls may take to finish."""
        self._server = server
        self._pipeline = pipeline
        self._grace_s = grace_s
        self._holding: tuple[Backend, HoldingValidator] | None = None

    def prepare(self, backend: Backend, validator: HoldingValidator) -> None:
        """Takes what is to answer the calls that come from the stop on."""
        self._holding = backend, validator

    async def stop(self) -> None:
        """Says NOT_SERVING, takes no new calls, and gives those that have come the time to finish."""
        await self._server.set_serving(is_serving=False)
        if self._holding is None:
            await self._server.stop(self._grace_s)
            return
        backend, validator = self._holding
        self._pipeline.connect(backend)
        await _quiet(validator)
        stopped = asyncio.create_task(self._server.stop(self._grace_s))
        # One turn of the loop, in which the stop reaches grpc.
        await asyncio.sleep(0)
        validator.release()
        await stopped


async def _quiet(validator: HoldingValidator) -> None:
    """Waits until no more calls come; not for long, because others may send without waiting for answers."""
    for _ in range(round(MAX_HOLD_S / QUIET_S)):
        before = validator.held
        await asyncio.sleep(QUIET_S)
        if validator.held == before:
            return
