"""Reading the published keys: once for all who ask, and never from before they were replaced."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from typing import Any

import pytest

from latchgate.domain.errors import StorageUnavailableError
from latchgate.domain.keyring import PUBLISHED_KEPT_S, Keyring
from latchgate.domain.model import ROOT_ORGANIZATION_ID, Caller
from latchgate.domain.permissions import Grants
from latchgate.domain.signing import KeyPair, SigningKey

NOW = datetime(2026, 11, 28, tzinfo=UTC)
ROOT = Caller(key_id="key_1", secret_id=1, organization_id=ROOT_ORGANIZATION_ID, grants=Grants(("*",)))


class Store:
    """Keys in memory. A reading goes on when `gate` is set, and fails if `error` is."""

    def __init__(self) -> None:
        self.keys = [SigningKey(kid="first", x="x", y="y", sealed=b"", sign_time=NOW)]
        self.gate = asyncio.Event()
        self.gate.set()
        self.error: Exception | None = None
        self.readings = 0

    @asynccontextmanager
    async def transaction(self) -> AsyncIterator[Any]:
        """Gives itself."""
        yield self

    async def signing_keys(self) -> Sequence[SigningKey]:
        """Gives the keys that there were when it was asked."""
        self.readings += 1
        keys = tuple(self.keys)
        await self.gate.wait()
        if self.error is not None:
            raise self.error
        return keys

    async def lock_signing_keys(self) -> Sequence[SigningKey]:
        """Gives the keys."""
        return tuple(self.keys)

    async def delete_signing_keys(self, kids: Sequence[str]) -> None:
        """Removes keys."""
        self.keys = [key for key in self.keys if key.kid not in kids]

    async def insert_signing_key(self, pair: KeyPair, sign_time: datetime) -> SigningKey:
        """Adds a key."""
        self.keys.append(SigningKey(kid=pair.kid, x=pair.x, y=pair.y, sealed=b"", sign_time=sign_time))
        return self.keys[-1]

    async def now(self) -> datetime:
        """The time."""
        return NOW

    async def is_in_use(self, _secret_id: int) -> bool:
        """Finds that the caller's key is."""
        return True

    async def record_audit(self, _caller: Caller, _entry: object) -> None:
        """Records nothing."""


class Signer:
    """Makes keys that sign nothing."""

    def make(self) -> KeyPair:
        """Makes the second key."""
        return KeyPair(kid="second", x="x", y="y", sealed=b"")

    def can_use(self, _key: SigningKey) -> bool:
        """Can read all of them."""
        return True


class Clock:
    """A clock that is set by hand."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        """The time."""
        return self.now_s


@pytest.fixture
def store() -> Store:
    """Where keys are."""
    return Store()


@pytest.fixture
def clock() -> Clock:
    """By which what was read is old."""
    return Clock()


@pytest.fixture
def keyring(store: Store, clock: Clock) -> Keyring:
    """The keyring over both."""
    over: Any = store
    signer: Any = Signer()
    return Keyring(over, signer, clock)


async def kids(keyring: Keyring) -> list[str]:
    """Gives the ids of what is published."""
    return [key.kid for key in await keyring.published()]


async def test_read_again_when_old(keyring: Keyring, store: Store, clock: Clock) -> None:
    """What was read is given for 10 seconds from when it was asked for, and then read anew."""
    assert ["first"] == await kids(keyring)
    clock.now_s += PUBLISHED_KEPT_S - 0.001
    await kids(keyring)
    assert 1 == store.readings
    clock.now_s += 0.001
    await kids(keyring)
    assert 2 == store.readings


async def test_one_reading_for_all(keyring: Keyring, store: Store) -> None:
    """Those who ask together share a reading, also when who has begun it gives up."""
    store.gate.clear()
    asking = [asyncio.ensure_future(kids(keyring)) for _ in range(5)]
    await asyncio.sleep(0)
    asking[0].cancel()
    await asyncio.sleep(0)
    store.gate.set()
    done = await asyncio.gather(*asking, return_exceptions=True)
    assert isinstance(done[0], asyncio.CancelledError)
    assert [["first"]] * 4 == done[1:]
    assert 1 == store.readings


async def test_a_failure_is_shared_and_not_kept(keyring: Keyring, store: Store) -> None:
    """A reading that fails does so for all who wait for it, at once; the next one tries again."""
    store.error = StorageUnavailableError("away")
    done = await asyncio.gather(*(kids(keyring) for _ in range(5)), return_exceptions=True)
    assert [StorageUnavailableError] * 5 == [type(each) for each in done]
    assert 1 == store.readings
    store.error = None
    assert ["first"] == await kids(keyring)


async def test_nobody_waits_for_a_failure(keyring: Keyring, store: Store) -> None:
    """A failure of which nobody hears any more is no fault of the service."""
    store.error = StorageUnavailableError("away")
    store.gate.clear()
    asking = asyncio.ensure_future(kids(keyring))
    await asyncio.sleep(0)
    asking.cancel()
    store.gate.set()
    with pytest.raises(asyncio.CancelledError):
        await asking
    store.error = None
    assert ["first"] == await kids(keyring)


async def test_nothing_from_before_a_replacement(keyring: Keyring, store: Store) -> None:
    """Whoever asks after the keys were replaced is given the new one, though a reading from before ends after it."""
    store.gate.clear()
    before = asyncio.ensure_future(kids(keyring))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert 1 == store.readings
    await keyring.replace(ROOT)
    after = asyncio.ensure_future(kids(keyring))
    await asyncio.sleep(0)
    store.gate.set()
    assert (["first"], ["second"]) == (await before, await after)
    assert ["second"] == await kids(keyring)
