"""Validate answered from memory where it can be: from the bytes of a request to those of its answer.

Written for speed: nearly all calls are answered here, on a processor whose caches and predictions were left behind by
grpc and the kernel, so that each line costs several times what it costs in a loop of its own (docs/settings.md).
"""

from __future__ import annotations

from collections.abc import Coroutine
from typing import Any, Final

from apikeys.v1 import key_service_pb2 as pb
from latchgate.domain.model import Outcome
from latchgate.domain.validation import Need, Needed, Validator, as_text
from latchgate.observers import OutcomeObserver, Tally
from latchgate.rpc.answers import AnswerWriter

_VALID: Final = Outcome.VALID

# ValidateRequest.token comes first in its message, as serializers write it: its tag, and a length of one byte.
_TOKEN_TAG: Final = pb.ValidateRequest.TOKEN_FIELD_NUMBER << 3 | 2
_MAX_LENGTH: Final = 0x7F
_HEAD: Final = 2

# Of how many kinds of requests is known what they need, and how long what is kept of each may be. They differ by
# permissions, client address, cost and revision.
MAX_NEEDS: Final = 8192
MAX_NEED_BYTES: Final = 512


class Recall:
    """Answers a request whose token is in memory, and has all others decided that are written as usual.

    What follows after the token is the same in many requests: it is read once for all of them. It holds no secret.
    """

    def __init__(self, validator: Validator, answers: AnswerWriter, tally: Tally, outcomes: OutcomeObserver) -> None:
        """Takes who judges, who writes, and who is told of outcomes: the tally of VALID, the observer of the others."""
        self._recall = validator.recall
        self._decide = validator.decide
        self._write = answers.write
        self._tally = tally
        self._outcomes = outcomes
        # By the bytes that say it.
        self.needs: dict[bytes, Needed] = {}

    def answer(self, raw: bytes, came_s: float) -> bytes | Coroutine[Any, Any, bytes] | None:
        """Gives the answer to a request that was there at `came_s` by the validator's clock.

        Where memory does not have it, what gives it is to be awaited; None for one that has to be gone into. Raises
        IndexError for one without a token, and InvalidFieldError.
        """
        length = raw[1]
        if raw[0] != _TOKEN_TAG or length > _MAX_LENGTH:
            return None
        end = length + _HEAD
        rest = raw[end:]
        need = self.needs.get(rest) or self._learn(rest)
        if need is None:
            return None
        token = raw[_HEAD:end]
        # Not cut off: a token that is whole makes no request that is.
        if len(token) != length:
            return None
        judgement = self._recall(token, need, came_s)
        if judgement is None:
            return self._ask(token, need)
        if judgement[0] is _VALID:
            self._tally.valid += 1
        else:
            self._outcomes.outcome(judgement[0])
        return self._write(judgement)

    async def _ask(self, token: bytes, need: Needed) -> bytes:
        """Has it decided with all that it takes."""
        judgement = await self._decide(as_text(token), need)
        if judgement[0] is _VALID:
            self._tally.valid += 1
        else:
            self._outcomes.outcome(judgement[0])
        return self._write(judgement)

    def _learn(self, rest: bytes) -> Needed | None:
        """Reads what follows after the token; None if that is not plain, as where another token follows."""
        if len(rest) > MAX_NEED_BYTES:
            return None
        request = pb.ValidateRequest.FromString(rest)
        if request.token or request.SerializeToString() != rest:
            return None
        cost = request.cost if request.HasField("cost") else 1
        checked = Need.of(request.required_permissions, request.client_ip, cost, request.min_revision)
        need = (checked.permissions, checked.client_ip, checked.cost, checked.min_revision)
        if len(self.needs) >= MAX_NEEDS:
            self.needs.clear()
        self.needs[rest] = need
        return need
