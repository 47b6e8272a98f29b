"""The real Envoy as it is measured: by itself, with its own filter for keys, and with the service behind ext_authz."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from bench.machine import BenchError, free_port, pinned
from bench.servers import NEEDED_PERMISSION, START_DEADLINE_S, Service, end

PROGRAM = Path(sys.executable).parent / "envoy"
ANSWER = "good\n"

_TYPES = "type.googleapis.com/envoy.extensions"
_FILTERS = f"{_TYPES}.filters"


class Guard(Enum):
    """Who says whether a request is good."""

    NOBODY = "Envoy alone"
    BUILT_IN = "Envoy's own api_key_auth"
    OVER_GRPC = "latchgate, ext_authz over gRPC"
    OVER_HTTP = "latchgate, ext_authz over HTTP"


@dataclass(frozen=True, slots=True, kw_only=True)
class Gateway:
    """Envoy, with a port for each guard."""

    pid: int
    ports: dict[Guard, int]

    def url(self, guard: Guard) -> str:
        """The address that a guard watches over."""
        return f"http://127.0.0.1:{self.ports[guard]}/orders"


@asynccontextmanager
async def gateway(service: Service, http_port: int, core: int, folder: Path) -> AsyncIterator[Gateway]:
    """Runs Envoy with one thread on a core until the block ends. Its own filter knows the tokens of the service."""
    ports = {guard: free_port() for guard in Guard}
    admin = free_port()
    file, log = folder / "envoy.json", folder / "envoy.log"
    file.write_text(json.dumps(_configuration(ports, admin, service, http_port)))
    with log.open("wb") as output, pinned([core]):
        process = await asyncio.create_subprocess_exec(
            str(PROGRAM),
            *("--config-path", str(file), "--concurrency", "1", "--log-level", "warn", "--use-dynamic-base-id"),
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        deadline_s = time.monotonic() + START_DEADLINE_S
        while not await _is_listening(ports[Guard.OVER_HTTP]):
            if process.returncode is not None or time.monotonic() > deadline_s:
                raise BenchError(f"Envoy does not start: {log.read_text().strip().rpartition(chr(10))[2]}")
            await asyncio.sleep(0.1)
        yield Gateway(pid=process.pid, ports=ports)
    finally:
        await asyncio.shield(end(process))


async def _is_listening(port: int) -> bool:
    try:
        _, writer = await asyncio.open_connection("127.0.0.1", port)
    except OSError:
        return False
    writer.close()
    return True


def _configuration(ports: dict[Guard, int], admin: int, service: Service, http_port: int) -> dict[str, Any]:
    filters: dict[Guard, list[dict[str, Any]]] = {
        Guard.NOBODY: [],
        Guard.BUILT_IN: [_built_in(service.seeded.tokens)],
        Guard.OVER_GRPC: [_ext_authz({"grpc_service": _GRPC, "transport_api_version": "V3"})],
        Guard.OVER_HTTP: [_ext_authz({"http_service": _HTTP})],
    }
    return {
        "admin": {"address": _address(admin)},
        "static_resources": {
            "listeners": [_listener(guard, port, filters[guard]) for guard, port in ports.items()],
            "clusters": [
                _cluster("latchgate", service.port, {"http2_protocol_options": {}}),
                _cluster("latchgate-http", http_port, {"http_protocol_options": {}}),
            ],
        },
    }


def _address(port: int) -> dict[str, Any]:
    return {"socket_address": {"address": "127.0.0.1", "port_value": port}}


def _listener(guard: Guard, port: int, filters: list[dict[str, Any]]) -> dict[str, Any]:
    """A port on which a good request is answered by Envoy itself, so that nothing but the guard is measured."""
    route = {
        "match": {"prefix": "/"},
        "direct_response": {"status": 200, "body": {"inline_string": ANSWER}},
        "typed_per_filter_config": {},
    }
    if guard is Guard.OVER_GRPC:
        route["typed_per_filter_config"] = {
            "envoy.filters.http.ext_authz": {
                "@type": f"{_FILTERS}.http.ext_authz.v3.ExtAuthzPerRoute",
                "check_settings": {"context_extensions": {"required_permissions": NEEDED_PERMISSION}},
            }
        }
    manager = {
        "@type": f"{_FILTERS}.network.http_connection_manager.v3.HttpConnectionManager",
        "stat_prefix": guard.name.lower(),
        "use_remote_address": True,
        "route_config": {"virtual_hosts": [{"name": "all", "domains": ["*"], "routes": [route]}]},
        "http_filters": [
            *filters,
            {
                "name": "envoy.filters.http.router",
                "typed_config": {"@type": f"{_FILTERS}.http.router.v3.Router"},
            },
        ],
    }
    chain = {"filters": [{"name": "envoy.filters.network.http_connection_manager", "typed_config": manager}]}
    return {"address": _address(port), "filter_chains": [chain]}


def _built_in(tokens: Sequence[str]) -> dict[str, Any]:
    return {
        "name": "envoy.filters.http.api_key_auth",
        "typed_config": {
            "@type": f"{_FILTERS}.http.api_key_auth.v3.ApiKeyAuth",
            "credentials": [{"key": token, "client": f"client-{number}"} for number, token in enumerate(tokens)],
            "key_sources": [{"header": "Authorization"}],
        },
    }


def _ext_authz(asks: dict[str, Any]) -> dict[str, Any]:
    return {
        "name": "envoy.filters.http.ext_authz",
        "typed_config": {
            "@type": f"{_FILTERS}.http.ext_authz.v3.ExtAuthz",
            # Every header that is sent is written, sent and read.
            "allowed_headers": {
                "patterns": [*_exactly("authorization", "x-api-key", "content-type"), {"prefix": "x-latchgate-"}]
            },
            **asks,
        },
    }


def _exactly(*names: str) -> list[dict[str, str]]:
    return [{"exact": name} for name in names]


def _cluster(name: str, port: int, protocol: dict[str, Any]) -> dict[str, Any]:
    return {
        "name": name,
        "typed_extension_protocol_options": {
            "envoy.extensions.upstreams.http.v3.HttpProtocolOptions": {
                "@type": f"{_TYPES}.upstreams.http.v3.HttpProtocolOptions",
                "explicit_http_config": protocol,
            }
        },
        "load_assignment": {
            "cluster_name": name,
            "endpoints": [{"lb_endpoints": [{"endpoint": {"address": _address(port)}}]}],
        },
    }


_GRPC = {"envoy_grpc": {"cluster_name": "latchgate"}, "timeout": "1s"}
_HTTP = {
    "server_uri": {"uri": "http://latchgate", "cluster": "latchgate-http", "timeout": "1s"},
    "path_override": f"/auth?required_permissions={NEEDED_PERMISSION}",
    "authorization_response": {
        "allowed_upstream_headers": {"patterns": [{"prefix": "x-latchgate-"}]},
        "allowed_client_headers": {
            "patterns": _exactly("www-authenticate", "content-type", "retry-after", "ratelimit", "ratelimit-policy")
        },
    },
}
