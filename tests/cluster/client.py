"""The one client of a trial: it makes the calls, and writes down when each began, ended, and what it was told."""

from __future__ import annotations

import time
import uuid
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, Final

import grpc
from google.protobuf import field_mask_pb2

from apikeys.v1 import key_pb2
from apikeys.v1 import key_service_pb2 as keys_pb
from apikeys.v1 import organization_service_pb2 as organizations_pb
from cluster.history import INACTIVE, ORGANIZATION_INACTIVE, REVOKED, VALID, Answer, Change, History, Reading, Subject
from cluster.nodes import Worker
from support.keys import outcome_of, state_of
from support.service import ROOT_TOKEN, bearer

ROOT: Final = bearer(ROOT_TOKEN)
VALIDATE_S: Final = 1.0
# After these the service has decided, and nothing was changed.
_DECIDED: Final = frozenset(
    {
        grpc.StatusCode.FAILED_PRECONDITION,
        grpc.StatusCode.NOT_FOUND,
        grpc.StatusCode.INVALID_ARGUMENT,
        grpc.StatusCode.ALREADY_EXISTS,
        grpc.StatusCode.UNAUTHENTICATED,
        grpc.StatusCode.PERMISSION_DENIED,
        grpc.StatusCode.RESOURCE_EXHAUSTED,
    }
)
_STATES: Final = {"ACTIVE": VALID, "INACTIVE": INACTIVE, "REVOKED": REVOKED, "DELETED": REVOKED}

Call = Callable[[Worker, float], Awaitable[Any]]


def _switched_off(organization_id: str) -> str:
    return f"{organization_id} off"


@dataclass(eq=False, kw_only=True)
class Token:
    """A token that was given out, and what can be said of it."""

    text: str = field(repr=False)
    subject: Subject


@dataclass(eq=False, kw_only=True)
class HeldKey:
    """A key that was made, with all the tokens that it had; the last one is the newest."""

    id: str
    name: str
    organization_id: str
    tokens: list[Token] = field(default_factory=list)

    @property
    def subject(self) -> Subject:
        """What GetKey says of it."""
        return Subject(name=self.name, facts=((f"{self.name} revoked", REVOKED), (f"{self.name} off", INACTIVE)))

    def take(self, text: str) -> Token:
        """Adds a token."""
        name = f"{self.name}.{len(self.tokens) + 1}"
        facts = (
            (f"{self.name} revoked", REVOKED),
            (f"{name} ended", REVOKED),
            (f"{self.name} off", INACTIVE),
            (_switched_off(self.organization_id), ORGANIZATION_INACTIVE),
        )
        self.tokens.append(Token(text=text, subject=Subject(name=name, facts=facts)))
        return self.tokens[-1]


class Client:
    """Calls workers, and keeps the history."""

    def __init__(self) -> None:
        """Begins a history."""
        self.history = History()
        self._keys = 0

    async def validate(self, worker: Worker, token: Token, *, is_final: bool = False) -> Reading:
        """Calls Validate."""
        request = keys_pb.ValidateRequest(token=token.text)
        invoked_ns = time.monotonic_ns()
        outcome, revision, error = "", None, ""
        try:
            answer = await worker.keys.Validate(request, timeout=VALIDATE_S)
        except grpc.aio.AioRpcError as failed:
            error = failed.code().name
        else:
            outcome, revision = outcome_of(answer), answer.revision
        return self._note(token.subject, worker, invoked_ns, outcome, revision, error, is_final=is_final)

    async def get(self, worker: Worker, key: HeldKey) -> Reading:
        """Calls GetKey, with all healthy."""
        invoked_ns = time.monotonic_ns()
        outcome, error = "", ""
        try:
            answer = await worker.keys.GetKey(keys_pb.GetKeyRequest(key_id=key.id), metadata=ROOT, timeout=5)
        except grpc.aio.AioRpcError as failed:
            error = failed.code().name
        else:
            outcome = _STATES[state_of(answer.key)]
        return self._note(key.subject, worker, invoked_ns, outcome, None, error, is_final=True)

    def _note(
        self,
        subject: Subject,
        worker: Worker,
        invoked_ns: int,
        outcome: str,
        revision: int | None,
        error: str,
        *,
        is_final: bool,
    ) -> Reading:
        reading = Reading(
            subject=subject,
            worker=worker.name,
            invoked_ns=invoked_ns,
            returned_ns=time.monotonic_ns(),
            outcome=outcome,
            revision=revision,
            error=error,
            is_final=is_final,
        )
        self.history.readings.append(reading)
        return reading

    async def make_organization(self, worker: Worker, organization_id: str) -> str:
        """Makes an organization."""
        request = organizations_pb.CreateOrganizationRequest(organization_id=organization_id, name=organization_id)
        await worker.organizations.CreateOrganization(request, metadata=ROOT, timeout=10)
        return organization_id

    async def make_key(
        self, worker: Worker, organization_id: str, request_id: str = "", deadline_s: float = 10.0
    ) -> HeldKey:
        """Makes a key. Raises grpc.aio.AioRpcError; to be repeated with the same request_id then."""
        request = keys_pb.CreateKeyRequest(
            organization_id=organization_id, name="a key", request_id=request_id or str(uuid.uuid4())
        )
        answer = await worker.keys.CreateKey(request, metadata=ROOT, timeout=deadline_s)
        self._keys += 1
        key = HeldKey(id=answer.key.id, name=f"key {self._keys}", organization_id=organization_id)
        key.take(answer.token)
        return key

    async def toggle(self, worker: Worker, key: HeldKey, *, active: bool, deadline_s: float = 10.0) -> Change:
        """Calls ToggleKey."""
        request = keys_pb.ToggleKeyRequest(key_id=key.id, active=active)
        call = worker.keys.ToggleKey(request, metadata=ROOT, timeout=deadline_s)
        what = f"toggle {key.name} {'on' if active else 'off'}"
        change, _ = await self._change(worker, call, what, f"{key.name} off", value=not active)
        return change

    async def revoke(
        self, worker: Worker, key: HeldKey, *, deadline_s: float = 10.0, by_deletion: bool = False
    ) -> Change:
        """Calls RevokeKey, or DeleteKey."""
        if by_deletion:
            call = worker.keys.DeleteKey(keys_pb.DeleteKeyRequest(key_id=key.id), metadata=ROOT, timeout=deadline_s)
        else:
            call = worker.keys.RevokeKey(keys_pb.RevokeKeyRequest(key_id=key.id), metadata=ROOT, timeout=deadline_s)
        what = f"{'delete' if by_deletion else 'revoke'} {key.name}"
        change, _ = await self._change(worker, call, what, f"{key.name} revoked", value=True)
        return change

    async def rotate(
        self, worker: Worker, key: HeldKey, request_id: str, *, deadline_s: float = 10.0
    ) -> tuple[Change, Token | None]:
        """Calls RotateKey without a grace period; gives the new token if there was an answer."""
        old = key.tokens[-1].subject.name
        request = keys_pb.RotateKeyRequest(key_id=key.id, request_id=request_id)
        call = worker.keys.RotateKey(request, metadata=ROOT, timeout=deadline_s)
        change, answer = await self._change(worker, call, f"rotate {old}", f"{old} ended", value=True)
        return change, None if answer is None else key.take(answer.token)

    async def switch(self, worker: Worker, organization_id: str, *, active: bool, deadline_s: float = 10.0) -> Change:
        """Calls UpdateOrganization."""
        request = organizations_pb.UpdateOrganizationRequest(
            organization=organizations_pb.Organization(id=organization_id, active=active),
            update_mask=field_mask_pb2.FieldMask(paths=["active"]),
        )
        call = worker.organizations.UpdateOrganization(request, metadata=ROOT, timeout=deadline_s)
        what = f"switch {organization_id} {'on' if active else 'off'}"
        change, _ = await self._change(worker, call, what, _switched_off(organization_id), value=not active)
        return change

    async def _change(
        self, worker: Worker, call: Awaitable[Any], what: str, fact: str, *, value: bool
    ) -> tuple[Change, Any]:
        invoked_ns = time.monotonic_ns()
        answer, error = None, ""
        result, revision, holds_from_ns = Answer.UNKNOWN, 0, None
        try:
            answer = await call
            returned_ns = time.monotonic_ns()
        except grpc.aio.AioRpcError as failed:
            returned_ns = time.monotonic_ns()
            error = failed.code().name
            if failed.code() in _DECIDED or failed.code() is grpc.StatusCode.INTERNAL:
                result = Answer.REFUSED if failed.code() in _DECIDED else Answer.UNKNOWN
        else:
            effect: key_pb2.Effect = answer.effect
            is_effective = effect.state == key_pb2.EFFECT_STATE_EFFECTIVE
            result = Answer.EFFECTIVE if is_effective else Answer.PENDING
            revision = effect.revision
            holds_from_ns = returned_ns + (0 if is_effective else effect.max_remaining.ToNanoseconds())
        change = Change(
            what=what,
            fact=fact,
            value=value,
            worker=worker.name,
            invoked_ns=invoked_ns,
            returned_ns=returned_ns,
            answer=result,
            revision=revision,
            holds_from_ns=holds_from_ns,
            error=error,
        )
        self.history.changes.append(change)
        return change, answer
