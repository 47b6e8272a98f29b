"""What the rules need from the outside, as narrow protocols."""

from __future__ import annotations

from collections.abc import Awaitable, Collection, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import NamedTuple, Protocol, TypeAlias
from uuid import UUID

from latchgate.domain.audit import AuditEntry
from latchgate.domain.cache import Entry
from latchgate.domain.imported import ImportRow, KnownToken
from latchgate.domain.model import (
    Caller,
    Effect,
    Environment,
    HeldPermission,
    Key,
    KeyFilter,
    KeyRecord,
    Lookup,
    NewKey,
    NewSecret,
    Organization,
    Outcome,
    Permits,
    Plan,
    RateState,
    Scope,
    Uses,
)
from latchgate.domain.outbox import Event


class KeyReader(Protocol):
    """Finds what validation needs to know of a token."""

    def find(self, digest: bytes) -> Awaitable[Lookup]:
        """Answers from a state no older than the call. Raises StorageUnavailableError, at once or when awaited."""


class KeyMemory(Protocol):
    """Knows without asking storage, while it may. It knows tokens by their fingerprints.

    What it knows lies open to Validator.recall, which looks at it in place at every call, by the rules of `find`: until
    `lease_until_s` of its clock it is as good as storage's, and holds all changes up to `applied_revision`. `entries`
    is always the same. The database's clock is `ahead_s` ahead of its own. Whoever answers from it counts that in
    `hits`.
    """

    lease_until_s: float
    applied_revision: int
    ahead_s: float
    hits: int

    @property
    def entries(self) -> Mapping[bytes, Entry]:
        """What it holds, and what it finds to be of the past: an entry's `until_s`, and its organization, say so."""

    def now_s(self) -> float:
        """Its clock, and that of `sent_s`, in seconds."""

    def find(self, fingerprint: bytes, min_revision: int) -> Lookup | None:
        """Answers from a state that is as good as storage's, and holds all changes up to `min_revision`; or not."""

    def keep(self, fingerprint: bytes, lookup: Lookup, *, sent_s: float) -> None:
        """Takes note of what storage said of a token when it was asked at `sent_s` of the clock or later."""

    def keep_unknown(self, fingerprint: bytes, lookup: Lookup, *, sent_s: float) -> None:
        """Takes note that a token of a foreign format is none, likewise."""


class Limiter(Protocol):
    """Keeps keys within their rate limits."""

    def take(self, key_id: str, limit: int, cost: int) -> RateState | None:
        """Charges `cost` if it fits within `limit` requests a minute; a refused cost is not charged.

        None, and nothing is charged, if memory can not say: then `wait` comes first.
        """

    def permits(self, key_id: str) -> Permits:
        """Gives what the key's requests can be counted in, once `take` has admitted one."""

    async def wait(self, key_id: str, limit: int, cost: int) -> None:
        """Waits until `take` may know more. Charges nothing, and never fails."""


class RateAsk(NamedTuple):
    """What a worker tells and asks of one key's window, whose cost may be `limit` in all.

    First `back` permits of `slot` are given back, then `charged` is charged, be it beyond the limit: it was admitted
    already. Then permits are asked for: `wanted` of them, nothing if there are less than `least`, and more than a part
    of what is left only if it is for the `needed` ones, for which there are requests.
    """

    key_id: str
    limit: int
    charged: int
    least: int
    needed: int
    wanted: int
    slot: int
    back: int


class RateTold(NamedTuple):
    """How many permits were granted, to which slot they were charged, and what the window holds with them.

    `leaves` says after how many seconds which cost leaves the window, the soonest first. It is empty where there is
    more left than was wanted.
    """

    granted: int
    slot: int
    used: int
    leaves: Sequence[tuple[float, int]]


class RateAnswer(NamedTuple):
    """What was told of each key, and how many workers there are."""

    workers: int
    told: Mapping[str, RateTold]


class RateStore(Protocol):
    """Holds the windows that all workers share."""

    async def exchange(self, asks: Sequence[RateAsk]) -> RateAnswer:
        """Does what is asked, for each key in one step; a key comes once. Raises StorageUnavailableError.

        If it raises, some of it or all of it may have been done.
        """


class UsageRecorder(Protocol):
    """Remembers when secrets were last used, and counts what was answered about them.

    Takes note without waiting for storage, at a time of the database's clock in seconds since 1970.
    """

    def used(self, record: KeyRecord, now_s: float) -> Uses:
        """Takes note of an answer of VALID. Gives what the next ones can be counted in."""

    def refused(self, record: KeyRecord, outcome: Outcome, now_s: float) -> None:
        """Takes note of any other answer: no use of the secret, but counted."""


class AuditTrail(Protocol):
    """Keeps what calls leave behind that changed nothing."""

    async def record_audit(self, caller: Caller, entry: AuditEntry) -> None:
        """Records an entry by itself. Raises StorageUnavailableError and WriteUnknownError."""


class SuspicionRecorder(Protocol):
    """Counts tokens that are tried and should not be."""

    def suspect(self, client_ip: str, outcome: Outcome, record: KeyRecord | None) -> None:
        """Counts one that was judged so, without waiting, and its key if it has one. The address may be any text."""


class EffectWaiter(Protocol):
    """Knows when a change holds everywhere."""

    async def wait(self, revision: int, until_s: float) -> Effect:
        """Waits until no worker answers from before `revision`, which was committed before, or the clock is `until_s`.

        The clock is CLOCK_BOOTTIME, in seconds.
        """


class Sealer(Protocol):
    """Encrypts the tokens that are kept for a retry, under their request's own id."""

    def seal(self, request_id: UUID, token: str) -> bytes:
        """Encrypts a token."""

    def open(self, request_id: UUID, sealed: bytes) -> str:
        """Gives back what `seal` was given."""


class IdMaker(Protocol):
    """Makes ids that sort by the time they were made."""

    def __call__(self, prefix: str) -> str:
        """Gives a new id that begins with `prefix`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AnsweredRequest:
    """What is kept of a request that carried a request_id. `sealed_token` is None once it is too old."""

    body_digest: bytes
    key_id: str
    revision: int
    sealed_token: bytes | None


class Transaction(Protocol):
    """One transaction. Locks are taken in the order organization, key, so that no two wait for each other."""

    async def now(self) -> datetime:
        """The database's clock, fixed for the transaction."""

    async def lock_organization(self, organization_id: str) -> Organization | None:
        """Reads an organization and keeps others from changing it, or the number of its keys, until the end."""

    async def lock_key(self, key_id: str) -> Key | None:
        """Reads a key and keeps others from changing it, and its organization, until the end."""

    async def is_in_use(self, secret_id: int) -> bool:
        """Says whether a secret is good now, and keeps it as it is until the end. Only with what it acts on locked."""

    async def lasting_root_key_ids(self) -> Sequence[str]:
        """The root keys that are active and set to stay so. Only with the root organization locked."""

    async def insert_key(self, key: NewKey, secret: NewSecret) -> Key:
        """Stores a key with its first secret, and counts it."""

    async def import_keys(
        self, organization_id: str, created_by: str, keys: Mapping[str, ImportRow]
    ) -> Collection[str]:
        """Stores rows by the ids of their keys, and counts them; gives the ids of those whose digests were new.

        Only with the organization locked. No digest may come twice.
        """

    async def find_tokens(self, digests: Sequence[bytes]) -> Sequence[KnownToken]:
        """Reads whose the digests are that were ever stored, whatever became of them."""

    async def newest_revision(self) -> int:
        """Reads the revision of the newest change that is committed; 0 if there was none."""

    async def save_key(self, key: Key, revision: int) -> Key:
        """Stores a key that was locked with its changed fields; it counts as long as it is not revoked."""

    async def rotate_secret(self, key_id: str, secret: NewSecret, grace: timedelta) -> None:
        """Stores a further secret; ends the newest one after `grace`, and all before it now."""

    async def insert_organization(
        self, organization_id: str, name: str, plan_id: str, scopes: Sequence[Scope]
    ) -> Organization:
        """Stores an organization. Raises OrganizationExistsError and PlanNotFoundError."""

    async def save_organization(self, organization: Organization) -> Organization:
        """Stores the changed fields of an organization that was locked. Raises PlanNotFoundError."""

    async def permissions_held(self, organization_id: str, names: Sequence[str]) -> Sequence[str]:
        """The permissions, each once, of the keys of an organization that are neither revoked nor deleted.

        Only those that are one of `names`, or have a wildcard. Only with the organization locked.
        """

    async def keys_holding(
        self, organization_id: str, permissions: Sequence[str], count: int
    ) -> tuple[Sequence[str], int]:
        """The ids of the first `count` of these keys that hold one of some permissions, and how many there are."""

    async def lock_plan(self, plan_id: str) -> Plan | None:
        """Reads a plan and keeps others from changing it until the end."""

    async def insert_plan(self, plan_id: str, rate_limit_per_minute: int, max_keys: int) -> Plan:
        """Stores a plan. Raises PlanExistsError."""

    async def save_plan(self, plan: Plan) -> Plan:
        """Stores the changed fields of a plan that was locked."""

    async def record_change(self, entity: str, entity_id: str) -> int:
        """Enters a change that validation can see into the log, and gives its revision.

        From here to the end of the transaction no other change can take a number: revisions follow commits.
        """

    async def record_audit(self, caller: Caller | None, entry: AuditEntry) -> None:
        """Records in the audit trail what the transaction changes; without a caller, as the service's own work.

        From here to the end of the transaction nobody else can record anything of the same organization: it is to be
        the last thing that a transaction does, but for the answer to a request.
        """

    async def publish(self, *events: Event) -> None:
        """Has events sent out in their order if this transaction is committed. Only with what they are about locked."""

    async def claim_request(self, slot: bytes, body_digest: bytes) -> AnsweredRequest | None:
        """Reserves a request's slot, after waiting for a twin that is under way; gives what the twin answered."""

    async def answer_request(self, slot: bytes, key_id: str, revision: int, sealed_token: bytes) -> None:
        """Keeps the answer in a slot that was claimed."""


class KeyStore(Protocol):
    """Keys at rest. Every method raises StorageUnavailableError when the database does not answer."""

    def transaction(self) -> AbstractAsyncContextManager[Transaction]:
        """Opens a transaction that is committed at the end of the block, and undone if the block raises.

        Raises WriteUnknownError if the connection is lost during the commit.
        """

    async def get_key(self, key_id: str) -> Key | None:
        """Reads a key."""

    async def list_keys(self, key_filter: KeyFilter, after: str, count: int) -> Sequence[Key]:
        """Lists up to `count` keys, newest first, beyond the id `after` (empty: from the newest)."""

    async def publishable_key(self, organization_id: str, environment: Environment) -> tuple[Key, str] | None:
        """Reads the newest active publishable key, and its token."""

    async def scopes(self, organization_id: str) -> Sequence[Scope] | None:
        """Reads an organization's own scopes; None if there is no such organization."""

    async def permissions_beyond(self, names: Sequence[str]) -> Sequence[HeldPermission]:
        """What keys of all organizations hold that is neither one of `names` nor a scope of their organization's own.

        Wildcards are there with the organization's own scopes, among which they may stand for some.
        """


class OrganizationStore(Protocol):
    """Organizations and plans at rest. Every method raises StorageUnavailableError as KeyStore's do."""

    def transaction(self) -> AbstractAsyncContextManager[Transaction]:
        """Opens a transaction; see KeyStore."""

    async def get_organization(self, organization_id: str) -> Organization | None:
        """Reads an organization."""

    async def list_organizations(self, after: str, count: int) -> Sequence[Organization]:
        """Lists up to `count` organizations by id, beyond the id `after`."""

    async def list_plans(self, after: str, count: int) -> Sequence[Plan]:
        """Lists up to `count` plans by id, beyond the id `after`."""


StepCounts: TypeAlias = Mapping[int, Mapping[Outcome, int]]
"""Counts by step, numbered from 0 on, and outcome; only those that are not 0."""


class UsageStore(Protocol):
    """Counts of what was answered, and keys, at rest. Every method raises StorageUnavailableError as KeyStore's do.

    Hours are numbered from 1970 on (UTC).
    """

    async def now(self) -> datetime:
        """The database's clock."""

    async def get_key(self, key_id: str) -> Key | None:
        """Reads a key."""

    async def scopes(self, organization_id: str) -> Sequence[Scope] | None:
        """Reads an organization's own scopes; None if there is no such organization."""

    async def usage_of_key(self, key_id: str, start_hour: int, end_hour: int, step_hours: int) -> StepCounts:
        """Counts for a key in the hours from the start up to the end, without it, by steps."""

    async def usage_of_organization(
        self, organization_id: str, start_hour: int, end_hour: int, step_hours: int
    ) -> StepCounts:
        """Counts the same for all keys of an organization."""

    async def reach(self, organization_id: str, after: str, count: int) -> tuple[datetime, str]:
        """Gives the database's clock, and the id of the `count`th key beyond the id `after` that is not revoked.

        Oldest first; empty if there are not so many.
        """

    async def unused_keys(
        self, organization_id: str, after: str, until: str, since: datetime, count: int
    ) -> Sequence[Key]:
        """Lists up to `count` keys that are not revoked, oldest first, that were made before `since` and not used then.

        Those beyond the id `after`, and up to the id `until` unless that is empty.
        """
