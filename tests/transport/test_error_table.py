"""Each way of being refused: its class, its reason, its code, and the words of the contract agree."""

from __future__ import annotations

import re
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Final

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from apikeys.v1.error_reason_pb2 import ErrorReason
from latchgate.domain import errors
from latchgate.rpc.status import REASON_PREFIX, code_and_reason, internal_status, is_listed, status_of

CONTRACT: Final = Path(__file__).parents[2] / "protos" / "apikeys" / "v1" / "error_reason.proto"
CLIENT_HEADER_BYTES: Final = 8192
"""What gRPC clients take by default; a header counts with its name, its value and 32 bytes (RFC 9113, 6.5.2)."""


def documented() -> dict[str, grpc.StatusCode]:
    """Reads which code the contract's comments give to each reason."""
    found = re.findall(r"// ([A-Z_]+)\. [^\n]*\n(?:  //[^\n]*\n)*  " + REASON_PREFIX + r"(\w+) =", CONTRACT.read_text())
    return {reason: grpc.StatusCode[code] for code, reason in found}


def _subclasses(error: type[errors.LatchgateError]) -> Iterator[type[errors.LatchgateError]]:
    for subclass in error.__subclasses__():
        yield subclass
        yield from _subclasses(subclass)


def example(error: type[errors.LatchgateError]) -> errors.LatchgateError:
    """Makes an error of a class."""
    if error is errors.InvalidFieldError:
        return errors.InvalidFieldError([("name", "must not be empty")])
    if error is errors.CallerRateLimitedError:
        return errors.CallerRateLimitedError("too often", retry_after_s=1.5)
    return error("what happened", key_id="key_1")


ERRORS: Final = [error for error in _subclasses(errors.LatchgateError) if not error.__subclasses__()]


def test_contract_gives_every_reason_a_code() -> None:
    """The comment on every reason of the contract begins with the code that goes with it."""
    names = {name.removeprefix(REASON_PREFIX) for name in ErrorReason.keys()}  # noqa: SIM118 - no mapping
    assert names - {"UNSPECIFIED"} == set(documented())


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: error.__name__)
def test_every_error_has_the_code_that_the_contract_gives(error: type[errors.LatchgateError]) -> None:
    """Every class of domain error has a reason of the contract, and the code which the contract states for it."""
    made = example(error)
    assert is_listed(made)
    code, reason = code_and_reason(made)
    assert documented()[reason] is code


def test_every_reason_can_come_about() -> None:
    """Every reason of the contract belongs to one class of error, but INTERNAL, which is for what nobody expected."""
    reasons = [code_and_reason(example(error))[1] for error in ERRORS]
    assert sorted({*documented()} - {"INTERNAL"}) == sorted(reasons)
    (detail,) = internal_status("0badcafe").details
    info = error_details_pb2.ErrorInfo()
    assert detail.Unpack(info)
    assert ("INTERNAL", {"incident": "0badcafe"}) == (info.reason, dict(info.metadata))


@pytest.mark.parametrize("error", [errors.LatchgateError, errors.UnavailableError, ValueError])
def test_error_without_a_place_is_not_listed(error: type[Exception]) -> None:
    """An error that has no place in the table is treated as a fault of the service: it must not be told as it is."""
    assert not is_listed(error("what happened"))


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: error.__name__)
def test_status_says_what_happened(error: type[errors.LatchgateError]) -> None:
    """A status carries the code, the message, and an ErrorInfo with reason, domain and the error's own details."""
    made = example(error)
    status = status_of(made)
    info = error_details_pb2.ErrorInfo()
    assert status.details[0].Unpack(info)
    code, reason = code_and_reason(made)
    assert (code.value[0], made.message) == (status.code, status.message)
    assert (reason, "latchgate", dict(made.details)) == (info.reason, info.domain, dict(info.metadata))


def test_rate_limited_caller_is_told_when_to_come_back() -> None:
    """CALLER_RATE_LIMITED carries a RetryInfo with the time to wait."""
    status = status_of(errors.CallerRateLimitedError("too often", retry_after_s=1.5))
    retry = error_details_pb2.RetryInfo()
    assert status.details[1].Unpack(retry)
    assert timedelta(seconds=1.5) == retry.retry_delay.ToTimedelta()


@pytest.mark.parametrize("character", ["a", "\u00e9", "\U0001f511", "\n"])
def test_status_never_outgrows_what_clients_take(character: str) -> None:
    """However much there is to say, the headers of a refusal stay below what clients take, in any script."""
    mistakes = [(character * 10_000, character * 10_000)] * 1000
    packed = rpc_status.to_status(status_of(errors.InvalidFieldError(mistakes)))

    # Bytes that are no printable ASCII travel as a percent sign and two digits, and binary values in base64.
    message = sum(1 if 0x20 <= byte < 0x7F else 3 for byte in packed.details.encode())
    details = sum(len(name) + len(value) * 4 / 3 for name, value in packed.trailing_metadata)
    headers = ("grpc-status", "grpc-message", "grpc-status-details-bin", "content-type", "application/grpc", "16")
    assert message + details + sum(len(header) + 32 for header in headers) < CLIENT_HEADER_BYTES


def test_the_first_violations_are_kept() -> None:
    """Of many mistakes the first are named whole, in their order."""
    mistakes = [(f"permissions[{number}]", "must be a permission") for number in range(1000)]
    bad_request = error_details_pb2.BadRequest()
    assert status_of(errors.InvalidFieldError(mistakes)).details[1].Unpack(bad_request)
    named = [(violation.field, violation.description) for violation in bad_request.field_violations]
    assert 20 < len(named) < 1000
    assert mistakes[: len(named)] == named
