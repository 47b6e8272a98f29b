"""What `latchgate run` adds to serving: a root token in a file, and one key's life, shown through its own port."""

from __future__ import annotations

import os
import secrets
import shlex
import shutil
import sys
import time
import uuid
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Final, Protocol

import grpc

from apikeys.v1 import key_service_pb2 as keys
from apikeys.v1 import organization_service_pb2 as organizations
from apikeys.v1.key_service_pb2_grpc import KeyServiceStub
from apikeys.v1.organization_service_pb2_grpc import OrganizationServiceStub
from latchgate import config
from latchgate.config import Settings, SettingsError
from latchgate.health import reached_from_here

ORGANIZATION: Final = "demo"
TOKEN_FILE: Final = "root-token"  # noqa: S105 - a file's name
CALL_TIMEOUT_S: Final = 10.0


class Serving(Protocol):
    """Where a service is reached."""

    @property
    def listen(self) -> str:
        """The address of its port."""

    @property
    def metrics_listen(self) -> str:
        """The address of its metrics."""

    @property
    def http_listen(self) -> str | None:
        """Where gateways may ask over HTTP; None for nowhere."""


def settings() -> Settings:
    """Reads the settings, and fills in what a try needs: quiet logs, and a root token kept in the data directory."""
    overrides: dict[str, object] = {}
    if not os.environ.get("LATCHGATE_LOG_LEVEL"):
        overrides["log_level"] = "warning"
    found = config.load(**overrides)
    if found.root_token is None:
        overrides["root_token"] = _kept_token(found.data_dir / TOKEN_FILE)
        found = config.load(**overrides)
    return found


def _kept_token(path: Path) -> str:
    """Gives the root token of the data directory; makes it the first time, readable by its owner alone."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
                file.write("root_" + secrets.token_urlsafe(32))
        except FileExistsError:
            pass
        return path.read_text().strip()
    except OSError as error:
        raise SettingsError(f"LATCHGATE_DATA_DIR: {path}: {error.strerror}") from None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Client:
    keys: KeyServiceStub
    organizations: OrganizationServiceStub
    metadata: tuple[tuple[str, str], ...]

    async def validate(self, token: str) -> str:
        answer = await self.keys.Validate(keys.ValidateRequest(token=token), timeout=CALL_TIMEOUT_S)
        return keys.Outcome.Name(answer.outcome).removeprefix("OUTCOME_")


def say_beginning(found: Settings) -> None:
    """Says what takes the time, when the embedded database is not there yet."""
    if found.database_url is None and not (found.data_dir / "postgres" / "PG_VERSION").exists():
        print(f"Making a PostgreSQL in {found.data_dir} (some seconds, this once) ...", flush=True)


async def show(found: Settings, running: Serving, *, is_new: bool) -> None:
    """Says where the service is, shows a key's life, and gives lines to copy."""
    database = "the database of LATCHGATE_DATABASE_URL" if found.database_url else f"PostgreSQL in {found.data_dir}"
    print(
        f"latchgate {version('latchgate')} serves {running.listen} (metrics: http://{running.metrics_listen}/metrics)"
    )
    if running.http_listen:
        print(f"Gateways that ask over HTTP: http://{running.http_listen}/auth")
    print(f"Data: {database}, {'new' if is_new else 'with all that was there before'}.")
    if found.tls_cert is not None:
        print("The port speaks TLS; a key's life is shown on a plain one only. Press Ctrl-C to stop.", flush=True)
        return
    address = reached_from_here(running.listen)
    # Straight to the own port, whatever proxy is set for the way out.
    async with grpc.aio.insecure_channel(address, options=[("grpc.enable_http_proxy", 0)]) as channel:
        token = found.root_token.get_secret_value() if found.root_token else ""
        client = _Client(
            keys=KeyServiceStub(channel),
            organizations=OrganizationServiceStub(channel),
            metadata=(("authorization", f"Bearer {token}"),),
        )
        try:
            await _prepare(client)
            await _show_life(client)
        except grpc.aio.AioRpcError as error:
            print(f"A key's life can not be shown to its end: {error.details()}", file=sys.stderr)
    _print_hint(found, address)


async def _prepare(client: _Client) -> None:
    """Makes the organization of the demonstration, unless it is there from before."""
    request = organizations.CreateOrganizationRequest(organization_id=ORGANIZATION, name="Demonstration")
    try:
        await client.organizations.CreateOrganization(request, metadata=client.metadata, timeout=CALL_TIMEOUT_S)
    except grpc.aio.AioRpcError as error:
        if error.code() is not grpc.StatusCode.ALREADY_EXISTS:
            raise


async def _show_life(client: _Client) -> None:
    """Creates, toggles, rotates and revokes a key, asking Validate each time."""
    start_s = time.perf_counter()
    created = await client.keys.CreateKey(
        keys.CreateKeyRequest(
            organization_id=ORGANIZATION, name="first key", permissions=["read"], request_id=str(uuid.uuid4())
        ),
        metadata=client.metadata,
        timeout=CALL_TIMEOUT_S,
    )
    print(f"\n{'A key of organization ' + ORGANIZATION:<44}{'call':>10}   {'Validate then says':<22}{'in':>8}")
    try:
        await _show_steps(client, created, start_s)
    finally:
        # Also when a step has failed: a key that is left takes one of the places that the organization has.
        await _revoke(client, created.key.id)


async def _show_steps(client: _Client, created: keys.CreateKeyResponse, start_s: float) -> None:
    key_id, token = created.key.id, created.token
    await _row(client, f"CreateKey   its token is {created.key.prefix}...", start_s, token)
    for active in (False, True):
        start_s = time.perf_counter()
        await client.keys.ToggleKey(
            keys.ToggleKeyRequest(key_id=key_id, active=active), metadata=client.metadata, timeout=CALL_TIMEOUT_S
        )
        await _row(client, f"ToggleKey   {'on' if active else 'off'}", start_s, token)
    start_s = time.perf_counter()
    rotated = await client.keys.RotateKey(
        keys.RotateKeyRequest(key_id=key_id, request_id=str(uuid.uuid4())),
        metadata=client.metadata,
        timeout=CALL_TIMEOUT_S,
    )
    await _row(client, f"RotateKey   a new token, {rotated.key.prefix}...", start_s, rotated.token)
    await _row(client, "            and the old one", None, token)
    start_s = time.perf_counter()
    await _revoke(client, key_id)
    await _row(client, "RevokeKey", start_s, rotated.token)


async def _revoke(client: _Client, key_id: str) -> None:
    await client.keys.RevokeKey(
        keys.RevokeKeyRequest(key_id=key_id, reason="shown"), metadata=client.metadata, timeout=CALL_TIMEOUT_S
    )


async def _row(client: _Client, what: str, start_s: float | None, token: str) -> None:
    """Prints a step, how long it took, and what Validate says of a token after it."""
    took = "" if start_s is None else f"{(time.perf_counter() - start_s) * 1000:.1f} ms"
    start_s = time.perf_counter()
    outcome = await client.validate(token)
    print(f"  {what:<42}{took:>10}   {outcome:<22}{(time.perf_counter() - start_s) * 1000:>5.1f} ms", flush=True)


def _print_hint(found: Settings, address: str) -> None:
    """Prints grpcurl lines that work as they stand."""
    program = grpcurl()
    if program is None:
        print("\n(grpcurl is not installed here; any build of it will do.)")
    if os.environ.get("LATCHGATE_ROOT_TOKEN"):
        token, place = "$LATCHGATE_ROOT_TOKEN", ", where LATCHGATE_ROOT_TOKEN is set"
    else:
        # Double quotes do not keep apart what stands between the parentheses.
        token = f"$(cat {shlex.quote(str(found.data_dir / TOKEN_FILE))})"
        place = "" if found.data_dir.is_absolute() else ", in this folder"
    call = f"{program or 'grpcurl'} -plaintext"
    print(f"\nTry it from another terminal{place}:")
    print(f'  {call} -H "authorization: Bearer {token}" \\')
    print(f"""    -d '{{"organization_id": "{ORGANIZATION}", "name": "my key", "permissions": ["read"]}}' \\""")
    print(f"    {address} apikeys.v1.KeyService/CreateKey")
    print("Then ask about the token that it answers with:")
    print(f"""  {call} -d '{{"token": "lk_..."}}' {address} apikeys.v1.KeyService/Validate""")
    print("Press Ctrl-C to stop.", flush=True)


def grpcurl() -> str | None:
    """Gives the way to call grpcurl from another terminal in this folder, or None if it is not installed."""
    beside = Path(sys.executable).parent / "grpcurl"
    found = shutil.which("grpcurl")
    # One that is found because this environment is active may not be found where it is not.
    if found is not None and Path(found) != beside:
        return "grpcurl"
    if not beside.exists():
        return None
    relative = os.path.relpath(beside)
    return shlex.quote(str(beside) if relative.startswith(os.pardir) else relative)
