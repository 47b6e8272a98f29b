"""Ways to get the protocol wrong, and ways to build it differently that are just as right.

Each value says what is done; `protocol.py` does it where it is asked for.
"""

from __future__ import annotations

from enum import Enum


class Mutant(Enum):
    """A mistake: the search must find a stale answer in a protocol that makes it."""

    LEASE_FROM_REPLY = "the lease is counted from the reply, not from before the renewal was sent"
    NO_REVISION_GUARD = "a row is cached whatever its revision"
    JOINS_SENT_LOOKUP = "a call joins a lookup statement that was already sent"
    READS_STANDBY = "a lookup reads a standby that is behind"
    REGISTRY_BEFORE_COMMIT = "the registry is read before the change commits"
    JOIN_IN_ONE_TRANSACTION = "a worker reads the log in the transaction that registers it"
    RENEWAL_WITHOUT_LOG = "a renewal extends the lease and applies nothing"
    ACKNOWLEDGED_BEFORE_APPLYING = "a worker acknowledges what it has read of the log, then applies it"
    ACKNOWLEDGED_LATER_HEAD = "a worker acknowledges the head at that time, not the one up to which it applied"
    DRIFT_IGNORED = "the wait (or the lease) is L long on its own clock, without the bound on clock rates"
    EVICTION_WITHOUT_COMPARISON = "rows are deleted at the end of the wait though they were renewed meanwhile"
    EVICTION_BY_LAST_READING = "rows are deleted if not renewed since the last reading, not since the wait began"
    WAIT_BEGINS_BEFORE_READING = "the wait begins at the commit, and rows are compared with a reading after that"
    EVICTION_IGNORED = "a worker whose row is gone takes the answer to its renewal as a lease all the same"
    CACHE_KEPT_AT_REJOIN = "a worker that was evicted joins again with the cache it had"
    CACHED_BEFORE_JOINED = "rows are cached between the registration and the first renewal's answer"
    LEASE_CHECK_REUSED = "the check of the lease made for one call serves a call that comes later"
    LEAVES_ROW_FIRST = "a worker that leaves deletes its row, then drops the lease"
    LEAVES_WHILE_RENEWING = "a worker that leaves drops its lease, and takes a renewal's answer after that"


class Variant(Enum):
    """No mistake: the search finds the protocol as good with it."""

    CHECK_THEN_READ = "a call checks the lease when it comes, and reads the cache later"
    EVICTION_BY_COMMIT = "the wait begins at the commit; rows are deleted if not renewed since the commit"
    REJOIN_FROM_APPLIED = (
        "an evicted worker keeps lease and cache, and goes on in the log where it was, under a new row"
    )
