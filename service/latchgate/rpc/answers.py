"""Verdicts as they are sent: what was written of the key when it was loaded, and what is new in each answer.

The parts of a protobuf message, one after the other, are the message: so what many answers have in common is written
once. How protobuf writes numbers and lengths: https://protobuf.dev/programming-guides/encoding/
"""

from __future__ import annotations

from functools import lru_cache
from typing import Final

from google.protobuf import timestamp_pb2

from apikeys.v1 import key_service_pb2 as pb
from latchgate.domain.model import Judgement, KeyRecord, Outcome, Rate
from latchgate.rpc.convert import OUTCOME

_VALID: Final = Outcome.VALID
# Of how many limits the common parts are kept; most keys share those of a few plans.
MAX_LIMITS: Final = 1000
_MAX_VARINT_LENGTH: Final = 10
# Tags: the number of a field, and how it is written, with or without a length before it.
_RATE_LIMIT: Final = bytes((pb.ValidateResponse.RATE_LIMIT_FIELD_NUMBER << 3 | 2,))
_REMAINING: Final = bytes((pb.RateLimit.REMAINING_FIELD_NUMBER << 3,))


_Limited = tuple[int, int, float, float, list[bytes], bytes]
"""What the answers of VALID for one limit have in common within a second and a revision.

These are the revision; after how many seconds the limit is reset; from when on and until when that is the same second,
in seconds since 1970; what comes before the number of requests that are left, by the length of that number; and what
comes after it. Without names, because such a tuple is taken apart sooner.
"""


class AnswerWriter:
    """Writes ValidateResponses."""

    def __init__(self, ttl_s: float) -> None:
        """Takes for how long a VALID answer may be used again, if its key has no limit to be counted against."""
        self._ttl_s = ttl_s
        # What an answer of VALID ends with where there is no limit.
        self._valid, self._revision = b"", -1
        self.limits: dict[int, _Limited] = {}
        # Varints of two bytes at most, and the two bytes of a longer one that others follow.
        self._last = [_varint(number) for number in range(1 << 14)]
        self._more = [_varint(number | 1 << 14)[:2] for number in range(1 << 14)]

    def write(self, judgement: Judgement) -> bytes:
        """Writes a verdict."""
        outcome, revision, now_s, record, rate = judgement
        # Most are these, so they come first; and times are compared, which is done sooner than they are rounded.
        if rate is not None and outcome is _VALID and record is not None:
            _, limit, remaining, reset_after_s = rate
            prepared = self.limits.get(limit)
            if prepared is None:
                prepared = self._prepare(revision, limit, now_s, reset_after_s)
            of_revision, of_reset_after_s, begin_s, end_s, before, after = prepared
            if not (begin_s <= now_s < end_s and of_revision == revision and of_reset_after_s == reset_after_s):
                _, _, _, _, before, after = self._prepare(revision, limit, now_s, reset_after_s)
            left = self._last[remaining] if remaining < 1 << 14 else self._long(remaining)
            return record.shown + (before[len(left)] + left + after)
        if record is None:
            return _told(outcome, revision, 0)
        if rate is None:
            if outcome is _VALID and not self._ttl_s:
                if revision != self._revision:
                    self._valid, self._revision = _told(_VALID, revision, 0), revision
                return record.shown + self._valid
            return record.shown + _told(outcome, revision, self._ttl_ms(outcome, record, now_s))
        return record.shown + _told(outcome, revision, 0) + _refused(rate, now_s)

    def _prepare(self, revision: int, limit: int, now_s: float, reset_after_s: int) -> _Limited:
        """Writes what is the same for all keys of a limit."""
        reset_s, begin_s = _reset_s(now_s, reset_after_s), float(int(now_s))
        told, of_limit = _told(_VALID, revision, 0), pb.RateLimit(limit=limit).SerializeToString()
        after = pb.RateLimit(reset_time=timestamp_pb2.Timestamp(seconds=reset_s)).SerializeToString()
        length = len(of_limit) + len(_REMAINING) + len(after)
        before = [
            told + _RATE_LIMIT + bytes((length + digits,)) + of_limit + _REMAINING
            for digits in range(_MAX_VARINT_LENGTH + 1)
        ]
        if len(self.limits) >= MAX_LIMITS:
            self.limits.clear()
        prepared = self.limits[limit] = (revision, reset_after_s, begin_s, begin_s + 1.0, before, after)
        return prepared

    def _long(self, number: int) -> bytes:
        """Writes a number of more than two bytes."""
        written = b""
        while number >= 1 << 14:
            written += self._more[number & (1 << 14) - 1]
            number >>= 14
        return written + self._last[number]

    def _ttl_ms(self, outcome: Outcome, record: KeyRecord, now_s: float) -> int:
        if not self._ttl_s or outcome is not _VALID:
            return 0
        return int(min(self._ttl_s, record.expire_s - now_s, record.secret_end_s - now_s) * 1000)


def _reset_s(now_s: float, reset_after_s: int) -> int:
    """Gives the next whole second: not before the time has come."""
    return int(now_s) + reset_after_s + 1


def _refused(rate: Rate, now_s: float) -> bytes:
    """Writes where a key stands that is over its limit."""
    _, limit, remaining, reset_after_s = rate
    told = pb.RateLimit(limit=limit, remaining=remaining)
    told.reset_time.seconds = _reset_s(now_s, reset_after_s)
    return pb.ValidateResponse(rate_limit=told).SerializeToString()


@lru_cache(maxsize=1024)
def _told(outcome: Outcome, revision: int, ttl_ms: int) -> bytes:
    """Writes what many answers have in common."""
    message = pb.ValidateResponse(outcome=OUTCOME[outcome], revision=revision)
    if ttl_ms:
        message.cache_ttl.FromMilliseconds(ttl_ms)
    return message.SerializeToString()


def _varint(number: int) -> bytes:
    """Writes a number seven bits at a time, the lowest first; all bytes but the last have the eighth bit set."""
    written = bytearray()
    while number >= 1 << 7:
        written.append(number & (1 << 7) - 1 | 1 << 7)
        number >>= 7
    written.append(number)
    return bytes(written)
