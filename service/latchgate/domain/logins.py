"""Callers that present a JWT of the deployment's issuer instead of a key: what its claims make of them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final, Protocol

from latchgate.domain.errors import CredentialsInvalidError, OrganizationInactiveError
from latchgate.domain.model import ROOT_ORGANIZATION_ID, Call, Caller, Outcome
from latchgate.domain.permissions import Grants
from latchgate.domain.ports import SuspicionRecorder

# As in OpenID Connect Core 1.0, section 2.
MAX_SUBJECT_LENGTH: Final = 255
# As for keys: see Key.permissions in the contract.
_PERMISSION: Final = re.compile(r"([a-z0-9][a-z0-9_.-]*|\*)(:([a-z0-9][a-z0-9_.-]*|\*))*")
_ORGANIZATION: Final = re.compile(r"[a-z0-9][a-z0-9_-]{2,63}")


class JwtReader(Protocol):
    """Tells what the issuer says in a JWT."""

    def is_issued(self, token: str) -> bool:
        """Says whether a token says of itself that it is a JWT of the issuer. Nothing is verified."""

    async def read(self, token: str) -> Mapping[str, Any]:
        """Gives the claims of a token that the issuer has signed. Raises CredentialsInvalidError, UnavailableError."""

    def check(self, claims: Mapping[str, Any], now_s: float) -> None:
        """Demands that a token is for this service, and good at a time in seconds since 1970.

        Raises CredentialsInvalidError.
        """


class OrganizationStanding(Protocol):
    """Knows whether organizations may call."""

    async def standing(self, organization_id: str) -> tuple[datetime, bool | None]:
        """Gives the database's clock, and whether an organization is active; None if there is none.

        Raises StorageUnavailableError.
        """


@dataclass(frozen=True, slots=True, kw_only=True)
class ClaimNames:
    """Where a JWT names the organization and the permissions: a claim's name, or those that lead to it, with dots."""

    organization: str
    permissions: str


class Login:
    """Tells who calls with a JWT."""

    def __init__(
        self,
        *,
        reader: JwtReader,
        organizations: OrganizationStanding,
        names: ClaimNames,
        suspicion: SuspicionRecorder,
    ) -> None:
        """Takes what reads JWTs, the organizations, where to look, and who is told of JWTs that nobody has signed."""
        self._reader = reader
        self._organizations = organizations
        self._names = names
        self._suspicion = suspicion

    def takes(self, token: str) -> bool:
        """Says whether a token is one to be judged here, and not a key's."""
        return self._reader.is_issued(token)

    async def caller(self, token: str, *, client_ip: str, answer_by_s: float, call: Call) -> Caller:
        """Gives who calls.

        Raises CredentialsInvalidError, OrganizationInactiveError, IssuerUnavailableError and StorageUnavailableError.
        """
        try:
            claims = await self._reader.read(token)
        except CredentialsInvalidError:
            self._suspicion.suspect(client_ip, Outcome.NOT_FOUND, None)
            raise
        organization_id = organization_of(claims, self._names.organization)
        now, is_active = await self._organizations.standing(organization_id)
        self._reader.check(claims, now.timestamp())
        subject = subject_of(claims)
        if is_active is None:
            raise CredentialsInvalidError(
                f"the claim {self._names.organization} of the calling JWT names no organization that there is"
            )
        if not is_active:
            raise OrganizationInactiveError("the organization that the calling JWT names is inactive")
        return Caller(
            organization_id=organization_id,
            grants=Grants(permissions_of(claims, self._names.permissions)),
            subject=subject,
            answer_by_s=answer_by_s,
            call=call,
        )


def claim(claims: Mapping[str, Any], name: str) -> object:
    """Gives a claim by its name, or by the names that lead to it, joined by dots; None if it is not there."""
    if name in claims:
        return claims[name]
    found: object = claims
    for part in name.split("."):
        found = found.get(part) if isinstance(found, Mapping) else None
    return found


def organization_of(claims: Mapping[str, Any], name: str) -> str:
    """Gives the one organization that a JWT names, as a text or as a list of one. Raises CredentialsInvalidError.

    The service's own is none of them: root's powers come with a root key alone.
    """
    found = claim(claims, name)
    if isinstance(found, list) and len(found) == 1:
        found = found[0]
    if not isinstance(found, str) or not _ORGANIZATION.fullmatch(found):
        raise CredentialsInvalidError(f"the claim {name} of the calling JWT must name the caller's organization")
    if found == ROOT_ORGANIZATION_ID:
        raise CredentialsInvalidError("a JWT gives nobody the powers of root; present a root key")
    return found


def permissions_of(claims: Mapping[str, Any], name: str) -> list[str]:
    """Gives the permissions that a JWT lists, as texts or in one text with spaces between; none where it has none.

    What can be no permission is let pass: issuers put scopes of others into the same claim.
    """
    found = claim(claims, name)
    if isinstance(found, str):
        found = found.split()
    if not isinstance(found, list):
        return []
    return [each for each in found if isinstance(each, str) and _PERMISSION.fullmatch(each)]


def subject_of(claims: Mapping[str, Any]) -> str:
    """Gives whom a JWT is about, with its issuer: subjects of two issuers are two. Raises CredentialsInvalidError."""
    subject = claims["sub"]
    if not (0 < len(subject) <= MAX_SUBJECT_LENGTH and subject.isascii() and subject.isprintable()):
        raise CredentialsInvalidError(
            f"the subject of the calling JWT must be 1 to {MAX_SUBJECT_LENGTH} ASCII characters"
        )
    return f"{claims['iss']}#{subject}"
