"""What happens around every call: parsing, the caller's identity, errors, one log line, metrics.

The handlers are bound without grpc's interceptor chain, which costs every call some microseconds and would hand the
caller over through a context: here a handler is given its request and its caller, and nothing else.
"""

from __future__ import annotations

import asyncio
import math
import secrets
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable, Generator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter
from typing import Any, NoReturn

import grpc
import structlog
from google.protobuf.descriptor import MethodDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from google.rpc import status_pb2
from grpc_status import rpc_status

from latchgate.domain.callers import caller_of
from latchgate.domain.errors import (
    CredentialsInvalidError,
    CredentialsMissingError,
    StorageUnavailableError,
)
from latchgate.domain.logins import Login
from latchgate.domain.model import Call, Caller, Visitor
from latchgate.domain.ports import AuditTrail
from latchgate.domain.validation import Validator
from latchgate.observers import CallObserver, Tally
from latchgate.rpc.audited import call_of, entry_of
from latchgate.rpc.peers import peer_address
from latchgate.rpc.requests import check_rules, parse
from latchgate.rpc.status import code_and_reason, internal_status, is_listed, status_of

Context = grpc.aio.ServicerContext[Any, Any]
ManagementHandler = Callable[[Any, Any, Caller], Awaitable[Message]]
VisitedHandler = Callable[[Any, Any, Visitor], Awaitable[Message]]
StreamHandler = Callable[[Any], Callable[[Any, Caller], Awaitable[Message]]]
"""Begins a call of a service, and gives what answers its requests, one after the other."""
ValidationHandler = Callable[[Any, Any, Caller | None], Awaitable[Message | bytes]]
Behaviour = Callable[[bytes, Context], Awaitable[Message | bytes]]
StreamBehaviour = Callable[[AsyncIterator[bytes], Context], Awaitable[None]]
FromMemory = Callable[[bytes], bytes | None]
"""Gives the answer to a request, both in bytes, from memory; None, or an error, if that takes more."""
Refuse = Callable[[status_pb2.Status, bytes, Context], bytes | None]
"""Gives the answer to a request that says an error in the words of a protocol; None where the call ends with it."""

# What is left of a caller's time for the answer, when something was waited for: a quarter of it, or this.
ANSWER_RESERVE_S = 0.2
ANSWER_RESERVE_PART = 0.25

_BEARER = "bearer"
_PACKAGE = str(Path(__file__).parents[1])
_log = structlog.get_logger("latchgate.rpc")


@dataclass(frozen=True, slots=True, kw_only=True)
class Backend:
    """What stands behind the handlers: who judges the callers' tokens, and the services by their full names.

    `recalls` answer from memory, where they can, by the full names of their methods; `boottime` is the clock by which
    callers wait. Every call of management leaves something in the `trail`. A `login` judges JWTs, where there is an
    issuer.
    """

    validator: Validator
    trail: AuditTrail
    recalls: Mapping[str, FromMemory]
    boottime: Callable[[], float]
    services: Mapping[str, object]
    login: Login | None = None


class Pipeline:
    """Wraps handlers into behaviours that grpc can call with bytes.

    The server listens before its database is there; until `connect` is called every call is UNAVAILABLE.
    """

    def __init__(self, observer: CallObserver, *, is_validate_open: bool) -> None:
        """Takes who is told of calls, and whether Validate may be called by anyone."""
        self._observer = observer
        self._is_validate_open = is_validate_open
        self._backend: Backend | None = None
        # What is answered from memory, by method.
        self._memories: dict[str, _Memory] = {}
        self._gate: asyncio.Event | None = None
        # How many calls have come since `hold`.
        self.held = 0

    def connect(self, backend: Backend) -> None:
        """Lets calls through."""
        self._backend = backend
        if self._is_validate_open and self._gate is None:
            for method, memory in self._memories.items():
                memory.recall = backend.recalls[method]

    def hold(self) -> None:
        """Makes all calls that come from now on wait until `release`."""
        for memory in self._memories.values():
            memory.recall = _never
        self._gate = asyncio.Event()

    def release(self) -> None:
        """Lets the calls go on that wait, and those that come."""
        if self._gate is not None:
            self._gate.set()

    async def _admitted(self) -> Backend:
        """Gives what answers a call. Raises StorageUnavailableError."""
        if self._gate is not None:
            self.held += 1
            await self._gate.wait()
        if self._backend is None:
            raise StorageUnavailableError("the service is starting and waits for its database")
        return self._backend

    def management(self, method: MethodDescriptor, handler: ManagementHandler) -> Behaviour:
        """Wraps a handler whose callers must be known and whose calls are logged."""
        name, service, request_type = _described(method)

        async def behave(raw: bytes, context: Context) -> Message:
            call = _Call(name, context, perf_counter())
            request = None
            try:
                backend = await self._admitted()
                call.caller = await _identify(backend, context, call_of(name, context))
                request = parse(request_type, raw)
                check_rules(request)
                answer = await handler(backend.services[service], request, call.caller)
                if not call.caller.call.is_recorded:
                    # Nobody is told anything that leaves no trace.
                    await backend.trail.record_audit(call.caller, entry_of(call.caller, request, answer))
            except BaseException as error:
                status = call.refuse(error)
                if status is None:
                    raise
                if call.caller is not None:
                    await self._record_refusal(backend.trail, call, request)
            else:
                return answer
            finally:
                # Before the caller is told: who reads of an incident finds it in the log.
                call.log()
                self._observer.finished(name, call.code.name, call.seconds())
            return await _abort(context, status)

        return behave

    def visited(self, method: MethodDescriptor, handler: VisitedHandler) -> Behaviour:
        """Wraps a handler that finds out by the request who calls, if anyone in particular.

        As soon as it knows, the call is the caller's in the log and the audit trail; one of nobody leaves no trace in
        these.
        """
        name, service, request_type = _described(method)

        async def behave(raw: bytes, context: Context) -> Message:
            call = _Call(name, context, perf_counter())
            visitor, request = None, None
            try:
                backend = await self._admitted()
                visitor = Visitor(
                    client_ip=peer_address(context.peer()),
                    answer_by_s=_answer_by_s(context, backend.boottime()),
                    call=call_of(name, context),
                )
                request = parse(request_type, raw)
                check_rules(request)
                answer = await handler(backend.services[service], request, visitor)
                call.caller = visitor.caller
                if call.caller is not None and not visitor.call.is_recorded:
                    await backend.trail.record_audit(call.caller, entry_of(call.caller, request, answer))
            except BaseException as error:
                call.caller = visitor.caller if visitor else None
                status = call.refuse(error)
                if status is None:
                    raise
                if call.caller is not None:
                    await self._record_refusal(backend.trail, call, request)
            else:
                return answer
            finally:
                call.log()
                self._observer.finished(name, call.code.name, call.seconds())
            return await _abort(context, status)

        return behave

    async def _record_refusal(self, trail: AuditTrail, call: _Call, request: Message | None) -> None:
        """Records a refused call, as far as the trail can be written: the call ends as it would have."""
        caller = call.caller
        if caller is None:
            return
        try:
            await trail.record_audit(caller, entry_of(caller, request, code=call.code.name, reason=call.reason))
        except Exception as error:  # noqa: BLE001 - whatever it is, the caller is told of the first one
            self._observer.unrecorded()
            _log.warning("refusal_not_recorded", request_id=caller.call.request_id, error=type(error).__name__)

    def _check_going_on(self, gate: asyncio.Event | None) -> None:
        """Demands that no stop has begun since the gate was this one. Raises StorageUnavailableError."""
        if self._gate is not gate:
            raise StorageUnavailableError("the service stops; send what was not answered in another call")

    def streaming(self, method: MethodDescriptor, handler: StreamHandler) -> StreamBehaviour:
        """Wraps a handler whose callers send requests one after the other, and are sent a response to each.

        A request is not read before the one ahead of it is answered, so that there is never more than one at hand. Each
        is for its caller what a call of its own would be: who has lost a permission meanwhile, or its key, is refused
        at the next one. Only the first counts in the caller's rate limit. A server that stops takes no further ones.
        """
        name, service, request_type = _described(method)

        async def behave(requests: AsyncIterator[bytes], context: Context) -> None:
            call = _Call(name, context, perf_counter())
            request = None
            try:
                backend = await self._admitted()
                came = call_of(name, context)
                call.caller = await _identify(backend, context, came)
                answer, gate = handler(backend.services[service]), self._gate
                async for raw in requests:
                    self._check_going_on(gate)
                    call.count_request()
                    # Each leaves a trace of its own, under the one id of the call.
                    call.caller = await _identify(backend, context, replace(came, is_recorded=False), cost=0)
                    request = parse(request_type, raw)
                    check_rules(request)
                    response = await answer(request, call.caller)
                    if not call.caller.call.is_recorded:
                        await backend.trail.record_audit(call.caller, entry_of(call.caller, request, response))
                    await context.write(response)
                # The requests of a call that was given up end like those of one that is complete; the difference is
                # told a moment later.
                await asyncio.sleep(0)
                if request is None:
                    await backend.trail.record_audit(call.caller, entry_of(call.caller, None))
            except BaseException as error:
                status = call.refuse(error)
                if status is None:
                    raise
                if call.caller is not None:
                    await self._record_refusal(backend.trail, call, request)
            else:
                return
            finally:
                call.log()
                self._observer.finished(name, call.code.name, call.seconds())
            await _abort(context, status)

        return behave

    def validation(
        self, method: MethodDescriptor, handler: ValidationHandler, refuse: Refuse | None = None
    ) -> Behaviour:
        """Wraps a handler of the hot path: no rules but its own, no log line for an answer.

        One that can `refuse` in its own words is given what came as bytes, to read it in its own way.
        """
        name, service, request_type = _described(method)

        async def behave(raw: bytes, context: Context) -> Message | bytes:
            start_s = perf_counter()
            code = grpc.StatusCode.OK
            try:
                backend = await self._admitted()
                caller = None if self._is_validate_open else await _key_holder(backend, context, Call(), cost=0)
                request = raw if refuse else parse(request_type, raw)
                return await handler(backend.services[service], request, caller)
            except BaseException as error:
                call = _Call(name, context, start_s)
                status = call.refuse(error)
                code = call.code
                if code is grpc.StatusCode.INTERNAL:
                    call.log()
                if status is None:
                    raise
                answer = refuse(status, raw, context) if refuse else None
                if answer is not None:
                    return answer
            finally:
                self._observer.finished(name, code.name, perf_counter() - start_s)
            return await _abort(context, status)

        return behave

    def recalling(self, method: MethodDescriptor, behave: Behaviour) -> Behaviour:
        """Has a method of the hot path answered from memory, and by `behave` only where that takes more."""
        memory = self._memories[method.full_name] = _Memory()
        return _Recalling(memory, self._observer.tally(method_name(method)), behave)


def _never(_raw: bytes) -> bytes | None:
    """Remembers nothing: before there is anything to answer from, and once calls are held."""
    return None


class _Memory:
    """What is answered from memory now."""

    def __init__(self) -> None:
        self.recall: FromMemory = _never


class _Recalling:
    """The behaviour of a method of the hot path.

    grpc asks at every call whether what it was given is a function whose calls are to be awaited; the answer is there
    soonest if it can be awaited itself. This one can not: it only looks as if it could.
    """

    def __init__(self, memory: _Memory, tally: Tally, behave: Behaviour) -> None:
        self._memory = memory
        self._tally = tally
        self._behave = behave

    async def __call__(self, raw: bytes, context: Context) -> Message | bytes:
        start_s = perf_counter()
        try:
            answer = self._memory.recall(raw)
        except Exception:  # noqa: BLE001 - what it is, is found out and told below
            answer = None
        if answer is None:
            return await self._behave(raw, context)
        seconds = perf_counter() - start_s
        tally = self._tally
        if seconds < tally.quick_s:
            tally.quick += 1
            tally.seconds += seconds
        else:
            tally.slow(seconds)
        return answer

    def __await__(self) -> Generator[None]:
        raise TypeError("a behaviour is called, and what that gives is awaited")


def method_name(method: MethodDescriptor) -> str:
    """Gives the name of a method for people, in logs and metrics."""
    return f"{method.containing_service.name}/{method.name}"


def _described(method: MethodDescriptor) -> tuple[str, str, type[Message]]:
    """Gives the name of a method for people, the full name of its service, and the class of its requests."""
    return method_name(method), method.containing_service.full_name, GetMessageClass(method.input_type)


async def _identify(backend: Backend, context: Context, call: Call, cost: int = 1) -> Caller:
    """Finds out who calls, with a key or with a JWT of the issuer."""
    if backend.login is None or not backend.login.takes(token := _bearer_token(context)):
        return await _key_holder(backend, context, call, cost)
    answer_by_s = _answer_by_s(context, backend.boottime())
    return await backend.login.caller(token, client_ip=call.peer, answer_by_s=answer_by_s, call=call)


async def _key_holder(backend: Backend, context: Context, call: Call, cost: int) -> Caller:
    """Finds out who calls with a key. Who asks about others' tokens is not charged: it would be a limit on them all."""
    client_ip = peer_address(context.peer())
    verdict = await backend.validator.validate(_bearer_token(context), client_ip=client_ip, cost=cost)
    return caller_of(verdict, _answer_by_s(context, backend.boottime()), call)


def _answer_by_s(context: Context, now_s: float) -> float:
    """Gives until when an answer must be on its way to reach a caller that has a deadline."""
    remaining_s: float | None = context.time_remaining()
    if remaining_s is None:
        return math.inf
    return now_s + remaining_s - min(ANSWER_RESERVE_S, remaining_s * ANSWER_RESERVE_PART)


class _Call:
    """What the log line of one call says."""

    def __init__(self, method: str, context: Context, start_s: float) -> None:
        self._method = method
        self._context = context
        self._start_s = start_s
        self._facts: dict[str, object] = {}
        self.caller: Caller | None = None
        self.reason = ""
        self.code = grpc.StatusCode.OK
        self._requests = 0

    def seconds(self) -> float:
        return perf_counter() - self._start_s

    def count_request(self) -> None:
        """Counts the requests of a stream."""
        self._requests += 1
        self._facts["requests"] = self._requests

    def refuse(self, error: BaseException) -> status_pb2.Status | None:
        """Gives the status that an error ends the call with; None for a call that is ended from outside."""
        if isinstance(error, asyncio.CancelledError):
            is_late = self._is_at_deadline()
            self.code = grpc.StatusCode.DEADLINE_EXCEEDED if is_late else grpc.StatusCode.CANCELLED
            return None
        if not isinstance(error, Exception):
            self.code = grpc.StatusCode.UNKNOWN
            return None
        if is_listed(error):
            self.code, self.reason = code_and_reason(error)
            self._facts["reason"] = self.reason
            return status_of(error)
        self.code = grpc.StatusCode.INTERNAL
        incident = secrets.token_hex(4)
        # Not the error's text: it may hold what was sent, or what a row holds.
        self._facts |= {"incident": incident, "error": type(error).__name__, "where": _where(error)}
        return internal_status(incident)

    def _is_at_deadline(self) -> bool:
        """Says whether the caller's deadline is why the call is cancelled: grpc does not tell.

        The caller gives up at its own deadline; the one that has reached the server is rounded up by about 1 %.
        """
        remaining_s: float | None = self._context.time_remaining()
        return remaining_s is not None and remaining_s <= 0.005 + 0.02 * self.seconds()

    def log(self) -> None:
        """Writes the one line of the call."""
        caller = self.caller
        level = _log.error if self.code is grpc.StatusCode.INTERNAL else _log.info
        level(
            "call",
            method=self._method,
            code=self.code.name,
            duration_ms=round(self.seconds() * 1000, 2),
            peer=peer_address(self._context.peer()),
            caller=caller.id if caller else None,
            organization=caller.organization_id if caller else None,
            request_id=caller.call.request_id if caller else None,
            **self._facts,
        )


async def _abort(context: Context, status: status_pb2.Status) -> NoReturn:
    """Ends a call with a status, by raising."""
    # grpc.aio has no abort_with_status; the details travel in the trailer that it would have filled.
    packed = rpc_status.to_status(status)
    await context.abort(packed.code, packed.details, packed.trailing_metadata)
    raise AssertionError("a call that is aborted does not go on")


def _where(error: BaseException) -> list[str]:
    """Gives the places in this package that an error came through, and the one where it was raised, innermost last."""
    frames = traceback.extract_tb(error.__traceback__)
    places = [frame for frame in frames[:-1] if frame.filename.startswith(_PACKAGE)][-6:] + frames[-1:]
    return [f"{frame.filename.rpartition('/')[2]}:{frame.lineno} {frame.name}" for frame in places]


def _bearer_token(context: Context) -> str:
    """Gives the token of the `authorization` header (RFC 6750). Raises an UnauthenticatedError."""
    values = [value for name, value in context.invocation_metadata() or () if name == "authorization"]
    if not values:
        raise CredentialsMissingError("this method needs the metadata `authorization: Bearer <token>`")
    scheme, _, token = str(values[0]).partition(" ")
    if len(values) > 1 or scheme.lower() != _BEARER or not token.strip():
        raise CredentialsInvalidError("the metadata must hold `authorization: Bearer <token>`, once")
    return token.strip()
