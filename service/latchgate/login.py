"""Letting callers in with JWTs: put together here, where the deployment has an issuer."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from contextlib import AsyncExitStack
from typing import Final

from prometheus_client.core import GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from latchgate.background import Background
from latchgate.config import Settings
from latchgate.domain.logins import ClaimNames, Login, OrganizationStanding
from latchgate.domain.ports import SuspicionRecorder
from latchgate.observability import Metrics
from latchgate.oidc.fetching import Fetcher
from latchgate.oidc.keys import IssuerKeys
from latchgate.oidc.reader import JwtReader

# How often it is seen whether the keys are to be read again.
LOOK_INTERVAL_S: Final = 30.0


class IssuerFigures(Collector):
    """Tells how old the issuer's keys are, at any time."""

    def __init__(self, keys: IssuerKeys) -> None:
        """Takes the keys."""
        self._keys = keys

    def collect(self) -> Iterable[Metric]:
        """Reads it."""
        yield GaugeMetricFamily(
            "latchgate_issuer_keys_age_seconds",
            "How long ago the keys of the issuer of JWTs were read; +Inf if they never were.",
            self._keys.age_s,
        )


def open_login(  # noqa: PLR0913 - what a worker is made of, each by its name
    stack: AsyncExitStack,
    *,
    settings: Settings,
    background: Background,
    metrics: Metrics,
    organizations: OrganizationStanding,
    suspicion: SuspicionRecorder,
    clock: Callable[[], float],
) -> Login | None:
    """Begins to read the issuer's keys, until `stack` ends it; None where there is no issuer.

    Nothing waits for them: without them, JWTs are refused as UNAVAILABLE.
    """
    if settings.oidc_issuer is None or settings.oidc_audience is None:
        return None
    fetcher = Fetcher()
    stack.push_async_callback(fetcher.close)
    keys = IssuerKeys(settings.oidc_issuer, fetcher.get, clock)
    stack.push_async_callback(keys.close)
    metrics.watch(IssuerFigures(keys))
    now = asyncio.Event()
    now.set()
    background.repeat("reading of the issuer's keys", LOOK_INTERVAL_S, keys.renew, now)
    return Login(
        reader=JwtReader(
            issuer=settings.oidc_issuer,
            audience=settings.oidc_audience,
            skew_s=settings.oidc_clock_skew_seconds,
            keys=keys,
        ),
        organizations=organizations,
        names=ClaimNames(organization=settings.oidc_organization_claim, permissions=settings.oidc_permissions_claim),
        suspicion=suspicion,
    )
