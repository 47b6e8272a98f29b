"""Rate limits while the database is silent, and how long their callers wait."""

from __future__ import annotations

import time

from latchgate.limiting import PATIENCE_S
from support.databases import fault_proxy
from support.keys import Tenant, make_tenant
from support.limited import ask, until_shared
from support.service import run_service


async def test_a_database_that_does_not_answer(database_url: str) -> None:
    """Calls that wait for a database that falls silent are answered within a fraction of a second, from what the worker
    may admit by itself; all others do not notice.
    """
    async with fault_proxy(database_url) as proxy, run_service(proxy.url) as service:
        tenant: Tenant = await make_tenant(service, "acme")
        tokens = [(await tenant.key(rate_limit_per_minute=30)).token for _ in range(2)]
        for token in tokens:
            await service.validate(token, required_permissions=["not:granted"])
        await until_shared(service)
        proxy.freeze()
        start_s = time.monotonic()
        assert {"VALID": 30} == await ask(service, tokens[0], 30)
        assert time.monotonic() - start_s < PATIENCE_S + 0.5
        await until_shared(service, is_local=True)
        start_s = time.monotonic()
        assert {"VALID": 30, "RATE_LIMITED": 1} == await ask(service, tokens[1], 31)
        assert time.monotonic() - start_s < 1.0
        proxy.thaw()
        await until_shared(service)
