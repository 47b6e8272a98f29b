"""Workers are replaced while clients are at work: a matter of moments, and so of what else the machine does."""

from __future__ import annotations

import signal
from pathlib import Path

from support.databases import until
from support.fleets import DEADLINE_S, Samples, clients, fleet, gone_back, total, value
from support.processes import until_gone

WORKERS = (1, 2)
CLIENTS = 6


async def test_workers_are_renewed(database_url: str, tmp_path: Path) -> None:
    """At SIGHUP every worker is replaced, and no call fails of clients that move to another connection when they are
    told to. No counter goes back meanwhile, and in the end the figures are all there.
    """
    async with fleet(database_url, tmp_path) as service:
        start = await service.counters()
        async with clients(service.address, CLIENTS) as load:
            await load.until_answered(20 * CLIENTS)
            seen: list[Samples] = [await service.counters()]
            service.process.tell(signal.SIGHUP)

            async def scraped_until_renewed() -> bool:
                seen.append(await service.counters())
                return bool(service.events("workers_renewed"))

            await until(scraped_until_renewed, DEADLINE_S)
            await load.until_answered(20 * CLIENTS)
        assert {} == load.failed
        end = await service.counters()
        assert [] == [
            went for before, after in zip(seen, [*seen[1:], end], strict=True) if (went := gone_back(before, after))
        ]
        assert load.answered == total(end, "latchgate_calls_total") - total(start, "latchgate_calls_total")
        assert 0 == value(end, "latchgate_worker_deaths_total")
        assert [2, 2] == [len(set(service.pids(worker))) for worker in WORKERS]
        for worker in WORKERS:
            await until_gone(service.pids(worker)[0])
        await service.stop()
