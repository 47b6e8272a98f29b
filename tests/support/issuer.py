"""An issuer of JWTs: a server that publishes its keys, and signs what a test wants to present."""

from __future__ import annotations

import asyncio
import json
import ssl
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, Final

import jwt
from aiohttp import web
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

from support.service import Metadata, bearer

AUDIENCE: Final = "latchgate-of-the-tests"
DISCOVERY: Final = "/.well-known/openid-configuration"
JWKS: Final = "/keys"

PrivateKey = rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey


def make_key(algorithm: str) -> PrivateKey:
    """Makes a key that fits an algorithm."""
    if algorithm.startswith(("RS", "PS")):
        return rsa.generate_private_key(public_exponent=65537, key_size=2048)
    curves = {"ES256": ec.SECP256R1(), "ES384": ec.SECP384R1(), "ES512": ec.SECP521R1()}
    return ec.generate_private_key(curves[algorithm]) if algorithm in curves else ed25519.Ed25519PrivateKey.generate()


def public_jwk(key: PrivateKey, algorithm: str, key_id: str, **fields: Any) -> dict[str, Any]:
    """Writes the public half of a key as an issuer publishes it."""
    form: Any = jwt.get_algorithm_by_name(algorithm)
    return dict(json.loads(form.to_jwk(key.public_key()))) | {"kid": key_id, "use": "sig", "alg": algorithm} | fields


@dataclass(slots=True, kw_only=True)
class Issuer:
    """What an issuer has. What it publishes is `keys`; `asked` counts what it was asked for, by path.

    `answers` are given instead of what it has, by path: a status, a document, or text.
    """

    port: int = 0
    scheme: str = "http"
    private: dict[str, tuple[PrivateKey, str]] = field(default_factory=dict)
    keys: list[dict[str, Any]] = field(default_factory=list)
    asked: Counter[str] = field(default_factory=Counter)
    answers: dict[str, int | str | dict[str, Any]] = field(default_factory=dict)
    held: asyncio.Event | None = None

    @property
    def url(self) -> str:
        """What it calls itself."""
        return f"{self.scheme}://127.0.0.1:{self.port}"

    def add_key(self, key_id: str, algorithm: str = "RS256", **fields: Any) -> None:
        """Makes a key and publishes it."""
        key = make_key(algorithm)
        self.private[key_id] = key, algorithm
        self.keys.append(public_jwk(key, algorithm, key_id, **fields))

    def remove_key(self, key_id: str) -> None:
        """Publishes a key no more."""
        self.keys = [key for key in self.keys if key["kid"] != key_id]

    def token(self, key_id: str = "first", headers: dict[str, Any] | None = None, **claims: Any) -> str:
        """Signs a JWT for the administrator of `acme`, with the claims changed as given; None takes one out."""
        now = int(time.time())
        said = {
            "iss": self.url,
            "aud": AUDIENCE,
            "sub": "alice",
            "iat": now,
            "exp": now + 300,
            "organization_id": "acme",
            "scope": "openid keys:read keys:write",
        } | claims
        key, algorithm = self.private[key_id]
        kept = {name: value for name, value in said.items() if value is not None}
        return jwt.encode(kept, key, algorithm, headers={"kid": key_id} | (headers or {}))

    def caller(self, key_id: str = "first", **claims: Any) -> Metadata:
        """Gives the metadata of a call with a JWT."""
        return bearer(self.token(key_id, **claims))

    async def answer(self, request: web.BaseRequest) -> web.StreamResponse:
        """Answers one request."""
        self.asked[request.path] += 1
        if self.held is not None:
            await self.held.wait()
        documents: dict[str, Any] = {
            DISCOVERY: {"issuer": self.url, "jwks_uri": f"{self.url}{JWKS}"},
            JWKS: {"keys": self.keys},
        }
        found = self.answers.get(request.path, documents.get(request.path, 404))
        if isinstance(found, int):
            return web.Response(status=found, headers={"location": f"{self.url}/elsewhere"})
        return web.Response(text=found) if isinstance(found, str) else web.json_response(found)


@asynccontextmanager
async def issuer(*, tls: ssl.SSLContext | None = None, port: int = 0) -> AsyncIterator[Issuer]:
    """Runs an issuer with one key, `first`, until the block ends."""
    running = Issuer(scheme="https" if tls else "http")
    running.add_key("first")
    runner = web.ServerRunner(web.Server(running.answer, access_log=None), shutdown_timeout=0.1)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", port, ssl_context=tls).start()
        running.port = runner.addresses[0][1]
        yield running
    finally:
        if running.held is not None:
            running.held.set()
        await runner.cleanup()


def login_settings(login: Issuer) -> dict[str, Any]:
    """Gives the settings of a service that lets callers in with an issuer's JWTs."""
    return {"oidc_issuer": login.url, "oidc_audience": AUDIENCE}
