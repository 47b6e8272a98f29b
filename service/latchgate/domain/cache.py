"""What a worker holds of keys: so many and no more, to be dropped by key, by organization and by plan."""

from __future__ import annotations

from collections.abc import Iterator

from latchgate.domain.model import KeyRecord

# How many entries get a second chance before one has to go, however much in use all are: an insertion stays short.
MAX_CHANCES = 64


class _Organization:
    """What all entries of one organization share, so that they are dropped at once; `entries` counts them."""

    __slots__ = ("entries", "id", "is_current", "plan_id")

    def __init__(self, id_: str, plan_id: str) -> None:
        self.id = id_
        self.plan_id = plan_id
        self.is_current = True
        self.entries = 0


class Entry:
    """One secret's record, and until when it may be answered from at most. To be used, it has to be marked as used.

    `sibling` is another entry of the same key, of which a rotation leaves two.
    """

    __slots__ = ("digest", "is_used", "organization", "record", "sibling", "slot", "until_s")

    def __init__(
        self,
        digest: bytes,
        record: KeyRecord,
        organization: _Organization,
        until_s: float,
        slot: int,
        sibling: Entry | None,
    ) -> None:
        self.digest = digest
        self.record = record
        self.organization = organization
        self.until_s = until_s
        self.slot = slot
        self.sibling = sibling
        self.is_used = False


class KeyCache:
    """Records by digest, at most `max_keys` of them.

    Which one goes when a new one comes is decided by the CLOCK algorithm (Corbató, 1968): a hand goes round over all of
    them and takes the first that was not used since it last came by. A use costs one flag, and keys that are used once
    do not drive out those that are used again.
    """

    def __init__(self, max_keys: int) -> None:
        """Takes how many records to hold."""
        self._max_keys = max_keys
        # How many records were driven out by others.
        self.evicted = 0
        # What is held, and what is found to be of the past when it is asked for. Always the same dictionary.
        self.entries: dict[bytes, Entry] = {}
        self.clear()

    def __len__(self) -> int:
        return len(self.entries)

    def get(self, digest: bytes, now_s: float) -> KeyRecord | None:
        """Gives a record that is not older than it may become."""
        entry = self.entries.get(digest)
        if entry is None:
            return None
        if entry.until_s > now_s and entry.organization.is_current:
            entry.is_used = True
            return entry.record
        self._remove(entry)
        return None

    def put(self, digest: bytes, record: KeyRecord, until_s: float) -> None:
        """Holds a record until a time of the caller's clock, in seconds."""
        known = self.entries.get(digest)
        if known is not None:
            self._remove(known)
        # Before the organization is looked for: whoever makes place may be the last that it is known by.
        slot = self._slot()
        organization, key_id = self._organization(record), record.key_id
        entry = Entry(digest, record, organization, until_s, slot, self._by_key.get(key_id))
        self._ring[slot] = self._by_key[key_id] = self.entries[digest] = entry
        organization.entries += 1

    def drop_key(self, key_id: str) -> None:
        """Forgets all secrets of a key."""
        for entry in tuple(self._of_key(key_id)):
            self._remove(entry)

    def drop_organization(self, organization_id: str) -> None:
        """Forgets all keys of an organization, in a time that does not depend on how many they are."""
        organization = self._organizations.get(organization_id)
        if organization is not None:
            self._forget(organization)

    def drop_plan(self, plan_id: str) -> None:
        """Forgets all keys of all organizations of a plan, in a time that depends on the number of organizations."""
        for organization in tuple(self._plans.get(plan_id, ())):
            self._forget(organization)

    def clear(self) -> None:
        """Forgets everything."""
        self.entries.clear()
        self._by_key: dict[str, Entry] = {}
        self._organizations: dict[str, _Organization] = {}
        self._plans: dict[str, set[_Organization]] = {}
        self._ring: list[Entry | None] = []
        self._free: list[int] = []
        self._hand = 0

    def _organization(self, record: KeyRecord) -> _Organization:
        known = self._organizations.get(record.organization_id)
        if known is not None:
            if known.plan_id == record.plan_id:
                return known
            # It has another plan by now: what was read under the former one is of the past.
            self._forget(known)
        organization = _Organization(record.organization_id, record.plan_id)
        self._organizations[organization.id] = organization
        self._plans.setdefault(organization.plan_id, set()).add(organization)
        return organization

    def _forget(self, organization: _Organization) -> None:
        """Lets go of an organization; its entries are found to be of the past when they are asked for."""
        organization.is_current = False
        del self._organizations[organization.id]
        siblings = self._plans[organization.plan_id]
        siblings.discard(organization)
        if not siblings:
            del self._plans[organization.plan_id]

    def _slot(self) -> int:
        """Gives a free place in the ring; makes one if there is none."""
        if self._free:
            return self._free.pop()
        ring = self._ring
        size = len(ring)
        if size < self._max_keys:
            ring.append(None)
            return size
        hand, chances = self._hand, MAX_CHANCES
        while True:
            if hand >= size:
                hand = 0
            entry = ring[hand]
            if entry is None:
                raise LookupError("a place of the ring is free, and is not known to be")
            if not entry.is_used or not chances:
                break
            entry.is_used = False
            chances -= 1
            hand += 1
        self._remove(entry)
        # On beyond the one that comes in its place: a new one is the last to go, not the next.
        self._hand = hand + 1
        self.evicted += 1
        return self._free.pop()

    def _of_key(self, key_id: str) -> Iterator[Entry]:
        entry = self._by_key.get(key_id)
        while entry is not None:
            yield entry
            entry = entry.sibling

    def _remove(self, entry: Entry) -> None:
        del self.entries[entry.digest]
        self._ring[entry.slot] = None
        self._free.append(entry.slot)
        key_id, sibling = entry.record.key_id, entry.sibling
        if self._by_key[key_id] is not entry:
            next(each for each in self._of_key(key_id) if each.sibling is entry).sibling = sibling
        elif sibling is None:
            del self._by_key[key_id]
        else:
            self._by_key[key_id] = sibling
        organization = entry.organization
        organization.entries -= 1
        if not organization.entries and organization.is_current:
            self._forget(organization)
