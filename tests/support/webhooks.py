"""Receivers of webhooks, and what tests do with webhooks."""

from __future__ import annotations

import asyncio
import itertools
import json
import ssl
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, Final

import asyncpg
from aiohttp import web
from standardwebhooks import Webhook as Verifier

from apikeys.v1 import webhook_service_pb2 as pb
from latchgate.storage.webhooks import FernetWebhookSealer
from support.databases import until
from support.keys import Tenant, execute, make_tenant
from support.service import TAG_KEY, Metadata, RunningService

LOOPBACK: Final = "127.0.0.0/8"
"""What a service is to allow so that it sends to the receivers of tests."""
PLANTED: Final = "whk_" + "0" * 26
"""A webhook of `org_root` that `plant_webhooks` makes."""
_PLANTED_COUNT: Final = 2000
_next_deletable: Final = itertools.count(1)

Answer = Callable[[web.BaseRequest], Awaitable[web.StreamResponse]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Received:
    """A request that a receiver got; `headers` by their names in lower case."""

    path: str
    headers: dict[str, str]
    body: str

    @property
    def event(self) -> Any:
        """What the body says."""
        return json.loads(self.body)

    @property
    def type(self) -> str:
        """The event's type."""
        return str(self.event["type"])

    def verified(self, secret: str) -> Any:
        """Gives what the body says, if the signature is good: as the specification's own library judges."""
        return Verifier(secret).verify(self.body, self.headers)


@dataclass(slots=True, kw_only=True)
class Receiver:
    """A server that remembers what it is sent. It answers with the next of `answers`, or with 204 when there is none.

    An answer is a status, or what makes a response.
    """

    port: int = 0
    scheme: str = "http"
    received: list[Received] = field(default_factory=list)
    answers: deque[int | Answer] = field(default_factory=deque)
    default: int | Answer = 204

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"{self.scheme}://127.0.0.1:{self.port}/hooks"

    @property
    def types(self) -> list[str]:
        """The types of all events that have come, in their order."""
        return [each.type for each in self.received]

    async def until(self, count: int) -> list[Received]:
        """Waits until so many requests have come, and gives them."""

        async def have_come() -> bool:
            return len(self.received) >= count

        await until(have_come)
        return self.received[:count]

    async def handle(self, request: web.BaseRequest) -> web.StreamResponse:
        """Takes a request down, and answers."""
        headers = {name.lower(): value for name, value in request.headers.items()}
        self.received.append(Received(path=request.path, headers=headers, body=(await request.read()).decode()))
        answer = self.answers.popleft() if self.answers else self.default
        return web.Response(status=answer) if isinstance(answer, int) else await answer(request)


@asynccontextmanager
async def receiver(tls: ssl.SSLContext | None = None) -> AsyncIterator[Receiver]:
    """Runs a receiver until the block ends."""
    running = Receiver(scheme="https" if tls else "http")
    runner = web.ServerRunner(web.Server(running.handle, access_log=None), shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0, ssl_context=tls).start()
    running.port = runner.addresses[0][1]
    try:
        yield running
    finally:
        await runner.cleanup()


@asynccontextmanager
async def raw_receiver(answer: bytes) -> AsyncIterator[str]:
    """Runs a server that answers whatever it gets with these bytes, and closes; gives its URL."""

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(1 << 16)
        writer.write(answer)
        await asyncio.gather(writer.drain(), return_exceptions=True)
        writer.close()

    server = await asyncio.start_server(handle, "127.0.0.1", 0)
    async with server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/"


@dataclass(frozen=True, slots=True, kw_only=True)
class Hooks:
    """The webhooks of a tenant. Unless a caller is given, calls are made with its admin's key."""

    tenant: Tenant

    async def create(self, url: str, *event_types: str, caller: Metadata | None = None) -> pb.CreateWebhookResponse:
        """Calls CreateWebhook."""
        answer: pb.CreateWebhookResponse = await self.call(
            "CreateWebhook", pb.CreateWebhookRequest(url=url, event_types=event_types), caller
        )
        return answer

    async def get(self, webhook_id: str) -> pb.Webhook:
        """Calls GetWebhook."""
        answer: pb.GetWebhookResponse = await self.call("GetWebhook", pb.GetWebhookRequest(webhook_id=webhook_id))
        return answer.webhook

    async def deliveries(self, **fields: Any) -> list[pb.WebhookDelivery]:
        """Calls ListWebhookDeliveries, and gives the first page, the newest first."""
        answer: pb.ListWebhookDeliveriesResponse = await self.call(
            "ListWebhookDeliveries", pb.ListWebhookDeliveriesRequest(**fields)
        )
        return list(answer.deliveries)

    async def settled(self, count: int = 1, **fields: Any) -> list[pb.WebhookDelivery]:
        """Waits until so many deliveries are done, and gives all, the newest first."""

        async def are_done() -> bool:
            return count <= sum(each.HasField("done_time") for each in await self.deliveries(**fields))

        await until(are_done)
        return await self.deliveries(**fields)

    def call(self, method: str, request: Any, caller: Metadata | None = None) -> Awaitable[Any]:
        """Calls a method of the service."""
        stub = self.tenant.service.webhooks
        made: Awaitable[Any] = getattr(stub, method)(request, metadata=caller or self.tenant.admin)
        return made


async def make_hooks(service: RunningService, name: str) -> Hooks:
    """Makes a tenant whose admin's key counts as told of and as used before: webhooks that come hear of neither."""
    tenant = await make_tenant(service, name)
    await execute(
        service,
        "UPDATE event SET dispatch_time = now() WHERE organization_id = $1 AND dispatch_time IS NULL",
        tenant.id,
    )
    await execute(
        service,
        "INSERT INTO key_notice (key_id, kind, expire_time, publish_time) VALUES ($1, 'first_used', 'epoch', now())",
        tenant.admin_key_id,
    )
    return Hooks(tenant=tenant)


async def make_due(service: RunningService) -> None:
    """Has all that waits for another try, or is under way, be due now."""
    await execute(service, "UPDATE delivery SET next_time = now() WHERE state = 'pending'")
    await execute(service, "UPDATE mail SET next_time = now() WHERE state = 'pending'")


async def plant_webhooks(database_url: str) -> None:
    """Makes webhooks of `org_root` with ids that are known, that get no event: PLANTED, and some to be deleted.

    PLANTED has a delivery that is dead.
    """
    _, sealed = FernetWebhookSealer(TAG_KEY.encode()).make(PLANTED)
    connection = await asyncpg.connect(database_url)
    try:
        await connection.execute(
            """
            INSERT INTO webhook (id, organization_id, url, event_types, created_by, sealed_secret)
            SELECT 'whk_' || lpad(number::text, 26, '0'), 'org_root', 'https://hooks.invalid/', '{none}', '', $1
            FROM generate_series(0, $2::int4) AS number
            """,
            sealed,
            _PLANTED_COUNT,
        )
        await connection.execute(
            """
            WITH planted AS (
                INSERT INTO event (id, organization_id, type, subject, body, dispatch_time)
                VALUES ('evt_planted', 'org_root', 'api_key.created', '', '{}', now())
                RETURNING number
            )
            INSERT INTO delivery (id, webhook_id, organization_id, event_number, event_type, subject, state, next_time,
                                  done_time)
            SELECT 'dlv_' || lpad('0', 26, '0'), $1, 'org_root', number, 'api_key.created', '', 'dead', NULL, now()
            FROM planted
            """,
            PLANTED,
        )
    finally:
        await connection.close()


def next_deletable() -> str:
    """Gives the id of a planted webhook that nobody was given before."""
    return f"whk_{next(_next_deletable) % _PLANTED_COUNT + 1:026}"
