"""Nothing that was published is lost: whoever dies, and whatever is away."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path
from typing import Any

import grpc
from aiohttp import web

from apikeys.v1 import key_service_pb2 as keys_pb
from apikeys.v1 import webhook_service_pb2 as pb
from apikeys.v1.key_service_pb2_grpc import KeyServiceStub
from apikeys.v1.webhook_service_pb2_grpc import WebhookServiceStub
from latchgate.storage.postgres import Connection
from support.databases import connected, until
from support.faults import FaultyWire
from support.fleets import fleet
from support.service import ROOT_TOKEN, bearer, run_service
from support.webhooks import LOOPBACK, make_hooks, receiver

ROOT = bearer(ROOT_TOKEN)
DUE = "UPDATE delivery SET next_time = now() WHERE state = 'pending'"


async def state(connection: Connection) -> tuple[str, int]:
    """Gives what has become of the one delivery there is, and how often it was tried."""
    row = await connection.fetchrow("SELECT state, attempts FROM delivery")
    return (row["state"], row["attempts"]) if row else ("", 0)


async def nothing_is_sent() -> bool:
    """Says whether nothing is under way to any webhook."""
    return "Deliverer._deliver" not in [getattr(task.get_coro(), "__qualname__", "") for task in asyncio.all_tasks()]


async def test_worker_is_killed_while_it_sends(database_url: str, tmp_path: Path) -> None:
    """A worker that is killed in the middle of a sending loses nothing: its successor sends the same event again, and
    once that is taken it is sent no more.
    """
    async with (
        receiver() as listener,
        fleet(
            database_url, tmp_path, WORKERS="1", WEBHOOK_PRIVATE_NETWORKS=LOOPBACK, OUTBOX_POLL_SECONDS="0.05"
        ) as service,
        grpc.aio.insecure_channel(service.address) as channel,
        connected(database_url) as observer,
    ):
        is_over = asyncio.Event()

        async def keep_waiting(_: web.BaseRequest) -> web.Response:
            await is_over.wait()
            return web.Response()

        listener.answers.append(keep_waiting)
        webhook = pb.CreateWebhookRequest(organization_id="org_root", url=listener.url, event_types=["api_key.created"])
        created = await WebhookServiceStub(channel).CreateWebhook(webhook, metadata=ROOT)
        key = keys_pb.CreateKeyRequest(organization_id="org_root", name="another")
        await KeyServiceStub(channel).CreateKey(key, metadata=ROOT)
        await listener.until(1)
        (killed,) = service.pids(1)
        os.kill(killed, signal.SIGKILL)
        await service.until_ready(1, 2)
        assert ("pending", 1) == await state(observer)
        # As if the time had passed that a worker has for it.
        await observer.execute(DUE)
        first, second = await listener.until(2)
        is_over.set()

        async def is_delivered() -> bool:
            return ("delivered", 2) == await state(observer)

        await until(is_delivered)
        assert (first.body, first.headers["webhook-id"]) == (second.body, second.headers["webhook-id"])
        second.verified(created.secret)
        assert 2 == len(listener.received)


async def test_database_goes_away_while_it_is_sent(wire: FaultyWire, database_url: str) -> None:
    """What was sent while the database went away is sent again when it is back, and the work goes on by itself."""
    settings: dict[str, Any] = {"webhook_private_networks": LOOPBACK, "outbox_poll_seconds": 0.05}
    async with (
        receiver() as listener,
        connected(database_url) as observer,
        run_service(wire.url(database_url), **settings) as service,
    ):
        hooks = await make_hooks(service, "acme")
        await hooks.create(listener.url, "api_key.created")
        has_gone = asyncio.Event()

        async def answer_late(_: web.BaseRequest) -> web.Response:
            await has_gone.wait()
            return web.Response()

        listener.answers.append(answer_late)
        await hooks.tenant.key()
        await listener.until(1)
        wire.refuse()
        has_gone.set()
        await until(nothing_is_sent)
        assert ("pending", 1) == await state(observer)
        await observer.execute(DUE)
        await wire.listen()
        first, second = await listener.until(2)
        assert first.headers["webhook-id"] == second.headers["webhook-id"]
        delivered = await hooks.settled()
        assert [(pb.WEBHOOK_DELIVERY_STATE_DELIVERED, 2)] == [(each.state, each.attempts) for each in delivered]


async def test_stop_waits_for_what_is_being_sent(database_url: str) -> None:
    """A service that stops in order lets what it sends finish, and takes note of it."""
    async with receiver() as listener, connected(database_url) as observer:
        is_stopping = asyncio.Event()

        async def answer_late(_: web.BaseRequest) -> web.Response:
            await is_stopping.wait()
            return web.Response()

        async with run_service(database_url, webhook_private_networks=LOOPBACK) as service:
            hooks = await make_hooks(service, "acme")
            await hooks.create(listener.url, "api_key.created")
            listener.answers.append(answer_late)
            await hooks.tenant.key()
            await listener.until(1)
            asyncio.get_running_loop().call_later(0.2, is_stopping.set)
        assert ("delivered", 1) == await state(observer)
