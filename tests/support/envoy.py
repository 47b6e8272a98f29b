"""The real Envoy, with the configuration of deploy/envoy as it is, but for addresses."""

from __future__ import annotations

import asyncio
import os
import shutil
import ssl
import sys
import tempfile
from collections import Counter
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import pytest
import trustme
from aiohttp import ClientConnectionError, ClientSession

from support.databases import until
from support.upstream import free_port

DEPLOY: Final = Path(__file__).parents[2] / "deploy" / "envoy"
ADDRESSES: Final = {
    "envoy.yaml": (
        ("address: latchgate, port_value: 50051", "latchgate"),
        ("address: upstream, port_value: 8080", "upstream"),
        ("address: 0.0.0.0, port_value: 8443", "any"),
        ("address: 0.0.0.0, port_value: 9902", "any"),
        # Where it listens, and where the metrics are taken from.
        ("address: 127.0.0.1, port_value: 9901", "admin"),
        ("address: 127.0.0.1, port_value: 9901", "admin"),
    ),
    "jwt.yaml": (
        ("address: latchgate, port_value: 8081", "latchgate"),
        ("address: upstream, port_value: 8080", "upstream"),
        ("address: 0.0.0.0, port_value: 8443", "any"),
        ("address: 127.0.0.1, port_value: 9901", "admin"),
    ),
}
"""The addresses in each configuration, as often as they stand there, and what is in their place."""
PROGRAM: Final = os.environ.get("LATCHGATE_TEST_ENVOY") or str(Path(sys.executable).parent / "envoy")
"""That of the package index, unless another is named."""

needs_envoy: Final = pytest.mark.skipif(
    not Path(PROGRAM).exists(), reason="there is no Envoy for this machine; LATCHGATE_TEST_ENVOY can name one"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Envoy:
    """A running Envoy: where it serves, what its certificate is of, and what it says of itself."""

    port: int
    metrics_port: int
    admin: str
    folder: Path
    authority: trustme.CA

    @property
    def url(self) -> str:
        """Its base URL."""
        return f"https://localhost:{self.port}"

    @property
    def ca_file(self) -> Path:
        """The authority's certificate."""
        return self.folder / "ca.pem"

    @property
    def access_log(self) -> str:
        """All that is in the access log so far."""
        return (self.folder / "access.log").read_text()

    def trust(self) -> ssl.SSLContext:
        """Makes what a client needs to trust it."""
        return ssl.create_default_context(cafile=str(self.ca_file))

    def renew(self) -> None:
        """Puts another certificate in place, and its key, in one step: behind a link, as Kubernetes does."""
        issued = self.authority.issue_cert("localhost", "127.0.0.1")
        tls = self.folder / "tls"
        content = Path(tempfile.mkdtemp(dir=tls))
        (content / "tls.key").write_bytes(issued.private_key_pem.bytes())
        (content / "tls.crt").write_bytes(b"".join(pem.bytes() for pem in issued.cert_chain_pems))
        (tls / "..fresh").symlink_to(content.name)
        (tls / "..fresh").rename(tls / "..data")
        for name in ("tls.key", "tls.crt"):
            if not (tls / name).is_symlink():
                (tls / name).symlink_to(f"..data/{name}")

    async def stats(self, prefix: str) -> Mapping[str, float]:
        """Reads its own counters and gauges whose names begin so."""
        async with ClientSession() as http, http.get(f"{self.admin}/stats?filter=^{prefix}") as answer:
            lines = [line.rpartition(": ") for line in (await answer.text()).splitlines()]
        return {name: float(value) for name, _, value in lines if value.replace(".", "").isdigit()}


def prepare(
    folder: Path,
    *,
    latchgate: str,
    upstream: str,
    admin_port: int,
    latchgate_ca: trustme.CA | None = None,
    changes: Mapping[str, str] | None = None,
    file_name: str = "envoy.yaml",
) -> trustme.CA:
    """Puts the files of deploy/envoy into a folder, with other addresses. Gives the authority for its certificate.

    With an authority of latchgate's, what the configuration says of TLS to latchgate is taken out of its comments.
    `changes` are lines that stand there once, and those to take their place. `file_name` is the configuration to run,
    which is envoy.yaml there.
    """
    for file in DEPLOY.iterdir():
        if file.is_file():
            shutil.copy(file, folder)
    configuration = (DEPLOY / file_name).read_text()
    real = {
        "latchgate": _address(latchgate),
        "upstream": _address(upstream),
        "any": "address: 127.0.0.1, port_value: 0",
        "admin": f"address: 127.0.0.1, port_value: {admin_port}",
    }
    for (address, name), times in Counter(ADDRESSES[file_name]).items():
        assert configuration.count(address) == times, address
        configuration = configuration.replace(address, real[name])
    for written, changed in (changes or {}).items():
        assert configuration.count(written) == 1, written
        configuration = configuration.replace(written, changed)
    (folder / "tls").mkdir()
    if latchgate_ca:
        configuration = configuration.replace("    #tls ", "    ")
        latchgate_ca.cert_pem.write_to_path(folder / "tls" / "latchgate-ca.crt")
    (folder / "envoy.yaml").write_text(configuration)
    authority = trustme.CA()
    authority.cert_pem.write_to_path(folder / "ca.pem")
    return authority


@asynccontextmanager
async def envoy(
    folder: Path, *, latchgate: str, upstream: str, threads: int = 2, **options: Any
) -> AsyncIterator[Envoy]:
    """Runs Envoy until the block ends, with options as `prepare` takes them. Its access log is access.log there."""
    admin_port = free_port()
    authority = prepare(folder, latchgate=latchgate, upstream=upstream, admin_port=admin_port, **options)
    running = Envoy(port=0, metrics_port=0, admin=f"http://127.0.0.1:{admin_port}", folder=folder, authority=authority)
    running.renew()
    with (folder / "access.log").open("wb") as access_log:
        process = await asyncio.create_subprocess_exec(
            *(PROGRAM, "--config-path", "envoy.yaml", "--concurrency", str(threads)),
            *("--disable-hot-restart", "--log-level", "warning", "--file-flush-interval-msec", "50"),
            cwd=folder,
            stdout=access_log,
            stderr=asyncio.subprocess.PIPE,
        )
    said = asyncio.create_task(_read(process))
    try:
        async with ClientSession() as http:

            async def is_ready() -> bool:
                if process.returncode is not None:
                    raise AssertionError(await said)
                try:
                    async with http.get(f"{running.admin}/ready") as answer:
                        return answer.status == 200
                except ClientConnectionError:
                    return False

            await until(is_ready)
            async with http.get(f"{running.admin}/listeners?format=json") as answer:
                ports = _ports(await answer.json())
        yield Envoy(
            port=ports["public"],
            metrics_port=ports.get("metrics", 0),
            admin=running.admin,
            folder=folder,
            authority=authority,
        )
    finally:
        if process.returncode is None:
            process.terminate()
        await process.wait()
        await said


async def check_configuration(folder: Path, file_name: str = "envoy.yaml") -> str:
    """Has Envoy read a configuration of deploy/envoy, and gives what it says against it."""
    prepare(folder, latchgate="127.0.0.1:1", upstream="127.0.0.1:1", admin_port=1, file_name=file_name)
    process = await asyncio.create_subprocess_exec(
        *(PROGRAM, "--mode", "validate", "--config-path", "envoy.yaml", "--log-level", "warning"),
        cwd=folder,
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.PIPE,
    )
    said = await _read(process)
    return said if await process.wait() == 0 else f"failed: {said}"


async def _read(process: asyncio.subprocess.Process) -> str:
    assert process.stderr is not None
    return (await process.stderr.read()).decode()


def _address(address: str) -> str:
    host, _, port = address.rpartition(":")
    return f"address: {host}, port_value: {port}"


def _ports(listeners: Any) -> dict[str, int]:
    return {
        each["name"]: each["local_address"]["socket_address"]["port_value"] for each in listeners["listener_statuses"]
    }
