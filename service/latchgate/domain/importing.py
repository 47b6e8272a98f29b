"""Taking over keys from other systems by the digests of their tokens."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import datetime
from hashlib import sha256
from typing import Final

from latchgate.domain import access
from latchgate.domain.audit import AuditEntry
from latchgate.domain.errors import (
    ImportTooLongError,
    InvalidFieldError,
    KeyLimitReachedError,
    RootOrganizationError,
)
from latchgate.domain.imported import ImportedBatch, ImportRow, KnownToken, RowOutcome, RowResult
from latchgate.domain.model import ROOT_ORGANIZATION_ID, Caller, Organization, Scope
from latchgate.domain.permissions import WILDCARD, is_known
from latchgate.domain.ports import EffectWaiter, IdMaker, KeyStore, Transaction
from latchgate.domain.rules import check_email, check_expiry, check_metadata, merge_catalogue, normal_cidrs
from latchgate.domain.token import FOREIGN_MIN_LENGTH, TokenFormat

Rows = Sequence[ImportRow | RowResult]
"""Rows, and in their places the results of those that are known to be wrong already."""

MAX_ROWS: Final = 1_000_000
# Judging one takes some 20 us.
ROWS_A_TURN: Final = 50
# Of one row: who has more to mend than this is helped by the first ones.
MAX_VIOLATIONS: Final = 10
# Shorter than any token.
MAX_HINT_LENGTH: Final = FOREIGN_MIN_LENGTH - 1
_PRINTABLE: Final = frozenset(range(0x20, 0x7F))


class KeyImporter:
    """Begins imports."""

    def __init__(
        self,
        *,
        store: KeyStore,
        tokens: TokenFormat,
        effects: EffectWaiter,
        make_id: IdMaker,
        deployment_scopes: Sequence[Scope] = (),
    ) -> None:
        """Takes where keys are kept, what own tokens look like, and the scopes that the deployment adds."""
        self._store = store
        self._tokens = tokens
        self._effects = effects
        self._make_id = make_id
        self._deployment_scopes = tuple(deployment_scopes)

    def begin(self) -> KeyImport:
        """Begins an import, which takes up to MAX_ROWS rows."""
        return KeyImport(self)

    async def store(self, caller: Caller, organization_id: str, rows: Rows) -> ImportedBatch:
        """Stores rows in one transaction. Those that have a result already, because they can not be read, keep it.

        Of what is stored one change is logged, whatever the number of keys: any change of a key makes workers forget
        which foreign tokens they have found to be none.
        """
        access.require(caller, access.WRITE_KEYS)
        organization_id = access.organization_for(caller, organization_id)
        if organization_id == ROOT_ORGANIZATION_ID:
            raise RootOrganizationError("keys of the service's own organization are not imported; see CreateKey")
        async with self._store.transaction() as transaction:
            organization = await transaction.lock_organization(organization_id)
            if organization is None:
                raise access.organization_not_found(organization_id)
            await access.require_still_in_use(caller, transaction)
            rules = _RowRules(
                caller=caller,
                tokens=self._tokens,
                catalogue=merge_catalogue(self._deployment_scopes, organization.scopes),
                now=await transaction.now(),
            )
            judged = await _judged(rules, rows)
            created, known = await self._insert(transaction, caller, organization, judged)
            if created:
                revision = await transaction.record_change("key", created[-1])
                await transaction.record_audit(caller, _entry(organization_id, created, revision))
            else:
                # A row that is there may be one of a call whose answer was lost: its change is waited for again.
                revision = await transaction.newest_revision() if known else 0
        results = _results(organization_id, judged, set(created), known)
        return ImportedBatch(results=results, effect=await self._effects.wait(revision, caller.answer_by_s))

    async def _insert(
        self,
        transaction: Transaction,
        caller: Caller,
        organization: Organization,
        judged: Rows,
    ) -> tuple[Sequence[str], dict[bytes, KnownToken]]:
        """Stores those of the rows whose digests are new; gives the ids of their keys, and whose each digest is now."""
        firsts: dict[bytes, ImportRow] = {}
        for row in judged:
            if isinstance(row, ImportRow):
                firsts.setdefault(row.digest, row)
        if not firsts:
            return (), {}
        ids = sorted(self._make_id("key_") for _ in firsts)
        keys = dict(zip(ids, firsts.values(), strict=True))
        stored = await transaction.import_keys(organization.id, caller.id, keys)
        if organization.key_count + len(stored) > organization.max_keys:
            raise KeyLimitReachedError(
                f"organization {organization.id} has {organization.key_count} keys, plan {organization.plan_id} allows "
                f"{organization.max_keys}, and this request has {len(stored)} more; nothing of it was stored: raise "
                "the plan, or revoke keys that are not used, and send it again",
                max_keys=str(organization.max_keys),
            )
        known = {
            row.digest: KnownToken(
                digest=row.digest,
                key_id=key_id,
                organization_id=organization.id,
                hint=row.hint,
                active=row.active,
                is_ended=False,
                draft=row.draft,
            )
            for key_id, row in keys.items()
            if key_id in stored
        }
        others = [digest for digest in firsts if digest not in known]
        if others:
            known |= {token.digest: token for token in await transaction.find_tokens(others)}
        return [key_id for key_id in keys if key_id in stored], known


class KeyImport:
    """One import: its rows, so many in all and no more."""

    def __init__(self, importer: KeyImporter) -> None:
        self._importer = importer
        self._rows = 0

    async def take(self, caller: Caller, organization_id: str, rows: Rows) -> ImportedBatch:
        """Stores rows as KeyImporter.store does. Raises ImportTooLongError."""
        self._rows += len(rows)
        if self._rows > MAX_ROWS:
            raise ImportTooLongError(
                f"a call takes at most {MAX_ROWS} rows; what was answered is stored: send the rest in another call"
            )
        return await self._importer.store(caller, organization_id, rows)


class _RowRules:
    """What a row must keep to, for one caller and one organization, at one time of the database's clock."""

    def __init__(self, *, caller: Caller, tokens: TokenFormat, catalogue: Sequence[Scope], now: datetime) -> None:
        self._caller = caller
        self._tokens = tokens
        self._scopes = [scope.name for scope in catalogue]
        self._now = now
        # Rows of one file mostly have the same few.
        self._faults: dict[str, str] = {}

    def judge(self, row: ImportRow) -> ImportRow | RowResult:
        """Gives the row in its normal form, or as a result what is wrong with it."""
        violations: list[tuple[str, str]] = []
        draft = row.draft
        with _gathered(violations):
            check_email(draft.user_email)
        with _gathered(violations):
            check_metadata(draft.metadata)
        with _gathered(violations):
            check_expiry(draft.expire_time, self._now)
        with _gathered(violations):
            draft = replace(draft, allowed_cidrs=normal_cidrs(draft.allowed_cidrs))
        for index, permission in enumerate(draft.permissions):
            if fault := self._fault(permission):
                violations.append((f"permissions[{index}]", fault))
        if wrong := self._fault_of_token(row):
            violations.append(wrong)
        if violations:
            return invalid(row.number, violations)
        return replace(row, draft=draft)

    def _fault(self, permission: str) -> str:
        """Says what is wrong with a permission, without naming it: columns that are mixed up may hold anything."""
        known = self._faults.get(permission)
        if known is None:
            known = ""
            if permission != WILDCARD and not is_known(permission, self._scopes):
                known = "must match a scope of the organization's catalogue; see ListScopes"
            elif not self._caller.grants.cover(permission):
                known = "must be a permission that the calling key has itself"
            self._faults[permission] = known
        return known

    def _fault_of_token(self, row: ImportRow) -> tuple[str, str] | None:
        """Says what is wrong with what is given of the token."""
        # Of 32 random bytes not once in 10^13 times.
        if _PRINTABLE.issuperset(row.digest):
            return "digest", "must be the 32 bytes of a SHA-256; this is text, and may be the token itself"
        if len(row.hint) > MAX_HINT_LENGTH or not all("!" <= character <= "~" for character in row.hint):
            return "hint", f"must be at most {MAX_HINT_LENGTH} printable ASCII characters without spaces"
        if self._tokens.begins_like_own(row.hint):
            return "hint", (
                "must not begin with a prefix of this service's own tokens: one that was not minted here is refused "
                "without being looked up"
            )
        if row.hint and sha256(row.hint.encode()).digest() == row.digest:
            return "hint", "must be the beginning of the token, and not all of it"
        return None


async def _judged(rules: _RowRules, rows: Rows) -> Rows:
    """Judges rows, some at a time: whoever else is waiting for an answer is not to wait for all of them."""
    judged = []
    for number, row in enumerate(rows):
        if number % ROWS_A_TURN == 0:
            await asyncio.sleep(0)
        judged.append(row if isinstance(row, RowResult) else rules.judge(row))
    return judged


def _entry(organization_id: str, created: Sequence[str], revision: int) -> AuditEntry:
    """Gives what is recorded of a batch: of its keys, whose ids lie from the first to the last, how many there are."""
    after = {"keys": len(created), "first_key_id": created[0], "last_key_id": created[-1]}
    return AuditEntry(
        organization_id=organization_id, entity="key_import", entity_id=created[0], after=after, revision=revision
    )


def invalid(number: int, violations: Sequence[tuple[str, str]]) -> RowResult:
    """Gives the result of a row that breaks rules."""
    return RowResult(number=number, outcome=RowOutcome.INVALID, violations=tuple(violations[:MAX_VIOLATIONS]))


@contextmanager
def _gathered(violations: list[tuple[str, str]]) -> Iterator[None]:
    """Adds what is wrong to a list, and goes on.

    Only what a value must be, and not what it is: that may be a token in the wrong column, and makes each row's fault
    one of its own.
    """
    try:
        yield
    except InvalidFieldError as error:
        violations.extend((field, advice.partition(";")[0]) for field, advice in error.violations)


def _results(
    organization_id: str,
    judged: Rows,
    created: set[str],
    known: dict[bytes, KnownToken],
) -> list[RowResult]:
    """Says what became of each row. The first row of a digest has made its key, if one was made."""
    results = []
    for row in judged:
        if isinstance(row, RowResult):
            results.append(row)
            continue
        token = known.get(row.digest)
        if token is None or token.organization_id != organization_id:
            results.append(RowResult(number=row.number, outcome=RowOutcome.DUPLICATE))
        elif token.key_id in created:
            created.discard(token.key_id)
            results.append(RowResult(number=row.number, outcome=RowOutcome.CREATED, key_id=token.key_id))
        else:
            results.append(
                RowResult(
                    number=row.number,
                    outcome=RowOutcome.DUPLICATE,
                    key_id=token.key_id,
                    differences=token.differences(row),
                )
            )
    return results
