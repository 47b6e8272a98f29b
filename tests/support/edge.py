"""Envoy in front of a service and of a sample upstream, and a client of it."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import grpc
from aiohttp import ClientSession, TCPConnector
from yarl import URL

from support.envoy import Envoy, envoy
from support.service import ROOT_TOKEN
from support.upstream import Upstream, sample_upstream


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What a client was told over HTTP."""

    status: int
    headers: Mapping[str, str]
    text: str

    @property
    def json(self) -> Any:
        """The body, which must say that it is JSON, and be it."""
        assert "application/json" == self.headers["content-type"].partition(";")[0], self
        return json.loads(self.text)

    @property
    def reason(self) -> str:
        """The reason of an error of latchgate's API."""
        return str(self.json["details"][0]["reason"])


@dataclass(frozen=True, slots=True, kw_only=True)
class Edge:
    """A gateway, what stands behind it, and a client that speaks HTTP/1.1 over TLS."""

    envoy: Envoy
    upstream: Upstream
    http: ClientSession

    async def call(
        self, method: str, path: str, body: Any = None, *, token: str = ROOT_TOKEN, **options: Any
    ) -> Answer:
        """Sends a request, with a body as JSON and as the holder of a token; as root unless told otherwise.

        The path is sent as it stands here.
        """
        headers = {"authorization": f"Bearer {token}"} if token else {}
        if body is not None:
            headers["content-type"] = "application/json"
        headers |= options.pop("headers", {})
        data = None if body is None else BytesIO(body if isinstance(body, bytes) else json.dumps(body).encode())
        async with self.http.request(
            method,
            URL(self.envoy.url + path, encoded=True),
            headers=headers,
            data=data,
            allow_redirects=False,
            **options,
        ) as answer:
            return Answer(status=answer.status, headers=answer.headers.copy(), text=await answer.text())

    def channel(self) -> grpc.aio.Channel:
        """Makes a channel of gRPC through the gateway."""
        credentials = grpc.ssl_channel_credentials(self.envoy.ca_file.read_bytes())
        return grpc.aio.secure_channel(f"localhost:{self.envoy.port}", credentials)


@asynccontextmanager
async def edge(folder: Path, latchgate: str, **options: Any) -> AsyncIterator[Edge]:
    """Runs Envoy, with options as `envoy` takes them, and a sample upstream until the block ends."""
    async with (
        sample_upstream() as upstream,
        envoy(folder, latchgate=latchgate, **({"upstream": f"127.0.0.1:{upstream.port}"} | options)) as running,
        ClientSession(connector=TCPConnector(ssl=running.trust(), limit=0), auto_decompress=False) as http,
    ):
        yield Edge(envoy=running, upstream=upstream, http=http)
