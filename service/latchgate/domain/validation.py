"""The hot path: from a token and what a request needs to a verdict, whatever the transport."""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence
from functools import lru_cache
from hashlib import blake2s
from typing import NamedTuple

from latchgate.domain.errors import InvalidFieldError, LookupBudgetError, RevisionUnknownError
from latchgate.domain.floods import ForeignLookupBudget, Patience
from latchgate.domain.model import Address, Judgement, KeyRecord, Lookup, Outcome, Rate, RateState, Verdict
from latchgate.domain.ports import KeyMemory, KeyReader, Limiter, SuspicionRecorder, UsageRecorder
from latchgate.domain.shares import WINDOW_SLOTS
from latchgate.domain.token import Form, TokenFormat, digest, may_be_token

MAX_COST = 1_000_000
MAX_REQUIRED_PERMISSIONS = 100

# Of what can not be a token no state has to be known.
_UNTOLD: Judgement = (Outcome.NOT_FOUND, 0, 0.0, None, None)
# By names of this module: an Enum's members take as long to be found as some calls.
_VALID = Outcome.VALID
_OWN, _FOREIGN = Form.OWN, Form.FOREIGN


class Need(NamedTuple):
    """What a request needs of a token, made once for all requests that need the same.

    `client_ip` is only looked at for keys that are bound to networks.
    """

    permissions: frozenset[str]
    client_ip: str
    cost: int
    min_revision: int

    @classmethod
    def of(cls, required_permissions: Sequence[str], client_ip: str, cost: int, min_revision: int) -> Need:
        """Checks and prepares. Raises InvalidFieldError for a request that makes no sense."""
        if len(required_permissions) > MAX_REQUIRED_PERMISSIONS:
            raise InvalidFieldError([("required_permissions", f"must hold at most {MAX_REQUIRED_PERMISSIONS} entries")])
        if not 0 <= cost <= MAX_COST:
            raise InvalidFieldError([("cost", f"must be from 0 to {MAX_COST}")])
        if min_revision < 0:
            raise InvalidFieldError([("min_revision", "must not be negative")])
        return cls(frozenset(required_permissions), client_ip, cost, min_revision)


Needed = tuple[frozenset[str], str, int, int]
"""A Need, with or without its names: a tuple without is taken apart sooner."""


def fingerprint(token: bytes) -> bytes:
    """Gives what a token is known by in memory: BLAKE2s (RFC 7693), which is there sooner than SHA-256 from OpenSSL."""
    return blake2s(token).digest()


def as_text(token: bytes) -> str:
    """Gives a token that came as bytes; what is not ASCII is no token, whatever it is."""
    return token.decode("latin-1")


class Validator:
    """Judges tokens. One function for every transport, so that each gives the same answer."""

    def __init__(  # noqa: PLR0913 - the ports of the hot path, each by its name
        self,
        *,
        tokens: TokenFormat,
        keys: KeyReader,
        memory: KeyMemory,
        limiter: Limiter,
        usage: UsageRecorder,
        foreign: ForeignLookupBudget,
        patience: Patience,
        suspicion: SuspicionRecorder,
    ) -> None:
        """Takes the token format, where keys are found and remembered, who counts, and who waits."""
        self._tokens = tokens
        self._keys = keys
        self._memory = memory
        # By which `recall` is told when a request came.
        self.clock = memory.now_s
        self._entry = memory.entries.get
        self._limiter = limiter
        self._usage = usage
        self._foreign = foreign
        self._patience = patience
        self._suspicion = suspicion

    def recall(self, token: bytes, need: Needed, local_s: float) -> Judgement | None:
        """Judges a token from memory, without waiting; None if memory can not say, and `decide` has to be asked.

        The judgement is that of `local_s`, a time by `clock` at which the request was there. Raises InvalidFieldError.

        This is what nearly all calls are answered by, so it is written for speed: under load each step costs several
        times what it costs in a loop of its own. It is found in one piece, as KeyMemory.find would; a key against which
        there is nothing to say but for its limit is judged so as well, by the rules of `_judge`, and counted as
        Limiter.take and UsageRecorder.used would, or by these where it can not be in place.
        """
        permissions, _, cost, min_revision = need
        memory = self._memory
        revision = memory.applied_revision
        if local_s >= memory.lease_until_s or revision < min_revision:
            return None
        entry = self._entry(blake2s(token).digest())
        if entry is None or entry.until_s <= local_s or not entry.organization.is_current:
            return None
        entry.is_used = True
        memory.hits += 1
        record, now_s = entry.record, local_s + memory.ahead_s
        if record.good_until_s <= now_s or record.networks or not permissions <= record.grants.exact:
            return self._judge(record, now_s, revision, need)
        rate: Rate | None = None
        limit = record.rate_limit_per_minute
        if limit:
            permits = record.permits
            used = permits.used + cost
            if permits.left < cost or used > limit or permits.until_s <= local_s:
                rate = self._limiter.take(record.key_id, limit, cost)
                if rate is None:
                    return None
                record.permits = self._limiter.permits(record.key_id)
                if not rate[0]:
                    self._usage.refused(record, Outcome.RATE_LIMITED, now_s)
                    return Outcome.RATE_LIMITED, revision, now_s, record, rate
            else:
                permits.used = used
                permits.left -= cost
                rate = (True, limit, limit - used, WINDOW_SLOTS)
        uses = record.uses
        if uses.until_s > now_s:
            uses.valid += 1
            if uses.used_s < now_s:  # noqa: PLR1730 - a call of max takes as long as all the rest
                uses.used_s = now_s
        else:
            record.uses = self._usage.used(record, now_s)
        return _VALID, revision, now_s, record, rate

    async def validate(
        self,
        token: str,
        *,
        required_permissions: Sequence[str] = (),
        client_ip: str = "",
        cost: int = 1,
        min_revision: int = 0,
        only_organization_id: str = "",
    ) -> Verdict:
        """Judges a token for a request, as `decide` does. Raises InvalidFieldError for one that makes no sense."""
        need = Need.of(required_permissions, client_ip, cost, min_revision)
        outcome, revision, now_s, record, rate = await self.decide(
            token, need, only_organization_id=only_organization_id
        )
        return Verdict(outcome, revision, now_s, record, RateState(*rate) if rate else None)

    async def decide(self, token: str, need: Needed, *, only_organization_id: str = "") -> Judgement:
        """Judges a token for what a request needs, and asks storage where memory can not say.

        With `only_organization_id`, tokens of others are as if they were not there. Raises InvalidFieldError for an
        address that is none where one is needed, RevisionUnknownError for a min_revision that was never given out, and
        UnavailableError when it can not be decided.
        """
        _, client_ip, cost, min_revision = need
        known_by = fingerprint(token.encode()) if may_be_token(token) else None
        while known_by is not None:
            # What is in memory had a right tag when it came there.
            lookup = self._memory.find(known_by, min_revision)
            if lookup is None:
                form = self._tokens.recognise(token)
                if form is _OWN:
                    sent_s = self.clock()
                    lookup = await self._keys.find(digest(token))
                    self._memory.keep(known_by, lookup, sent_s=sent_s)
                elif form is _FOREIGN:
                    lookup = await self._look_up_foreign(token, known_by, client_ip)
                else:
                    break
            record, now_s, revision = lookup
            if revision < min_revision:
                raise RevisionUnknownError(
                    f"min_revision {min_revision} was never given out: the newest change is {revision}"
                )
            if record is None or (only_organization_id and record.organization_id != only_organization_id):
                await self._unknown(client_ip)
                return Outcome.NOT_FOUND, revision, 0.0, None, None
            judgement = self._judge(record, now_s, revision, need)
            if judgement is not None:
                return judgement
            # Nothing is charged yet, and meanwhile the key may change: all is judged anew.
            await self._limiter.wait(record.key_id, record.rate_limit_per_minute, cost)
        await self._unknown(client_ip)
        return _UNTOLD

    async def _unknown(self, client_ip: str) -> None:
        """Takes note of a token that nobody knows, and has its sender wait if there are many such."""
        self._suspicion.suspect(client_ip, Outcome.NOT_FOUND, None)
        await self._patience.wait()

    async def _look_up_foreign(self, token: str, known_by: bytes, client_ip: str) -> Lookup:
        """Asks storage, if there is budget for it, and keeps what it says."""
        token_digest = digest(token)
        if not self._foreign.spend(token_digest):
            await self._unknown(client_ip)
            raise LookupBudgetError("too many unknown tokens of foreign formats at once; try again in a second")
        sent_s = self._memory.now_s()
        lookup = await self._keys.find(token_digest)
        self._foreign.remember(token_digest, found=lookup.record is not None)
        if lookup.record is None:
            self._memory.keep_unknown(known_by, lookup, sent_s=sent_s)
        else:
            self._memory.keep(known_by, lookup, sent_s=sent_s)
        return lookup

    def _judge(self, record: KeyRecord, now_s: float, revision: int, need: Needed) -> Judgement | None:
        """Judges what is known of a token; None if the limiter has to be waited for."""
        permissions, client_ip, cost, _ = need
        if record.good_until_s <= now_s:
            ailment = _ailment(record, now_s)
            if ailment is Outcome.REVOKED:
                self._suspicion.suspect(client_ip, ailment, record)
            self._usage.refused(record, ailment, now_s)
            return ailment, revision, 0.0, None, None
        outcome, rate = _VALID, None
        if record.networks and not _is_within(record, client_ip):
            outcome = Outcome.ADDRESS_DENIED
            self._suspicion.suspect(client_ip, outcome, record)
        elif not permissions <= record.grants.exact and record.grants.lacking(permissions) is not None:
            outcome = Outcome.PERMISSION_DENIED
        elif record.rate_limit_per_minute:
            rate = self._limiter.take(record.key_id, record.rate_limit_per_minute, cost)
            if rate is None:
                return None
            if not rate.allowed:
                outcome = Outcome.RATE_LIMITED
            record.permits = self._limiter.permits(record.key_id)
        if outcome is _VALID:
            record.uses = self._usage.used(record, now_s)
        else:
            self._usage.refused(record, outcome, now_s)
        return outcome, revision, now_s, record, rate


def _ailment(record: KeyRecord, now_s: float) -> Outcome:
    """Says what is wrong with a key that is not good."""
    if record.revoked or record.secret_end_s <= now_s:
        return Outcome.REVOKED
    if record.expire_s <= now_s:
        return Outcome.EXPIRED
    return Outcome.INACTIVE if not record.active else Outcome.ORGANIZATION_INACTIVE


@lru_cache(maxsize=8192)
def _address(client_ip: str) -> Address:
    """Reads an address. An IPv4 address mapped into IPv6 is taken as IPv4. Raises InvalidFieldError."""
    try:
        address = ipaddress.ip_address(client_ip)
    except ValueError:
        raise InvalidFieldError([("client_ip", "must be an IPv4 or IPv6 address, without port or network")]) from None
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped is not None:
        return address.ipv4_mapped
    return address


def _is_within(record: KeyRecord, client_ip: str) -> bool:
    """Says whether an address is in one of the key's networks. Raises InvalidFieldError if it is none."""
    if not client_ip:
        return False
    address = _address(client_ip)
    return any(address in network for network in record.networks)
