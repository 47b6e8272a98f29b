"""TLS of the gRPC port: certificates are read again when their files change."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from pathlib import Path

import grpc
import structlog
from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.types import PublicKeyTypes

_log = structlog.get_logger("latchgate.tls")


class CertificateError(Exception):
    """A certificate file can not be used. The message names the file."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TlsFiles:
    """PEM files: the server's chain and key, and the authority of clients that must show a certificate (mutual TLS)."""

    certificate: Path
    key: Path
    client_ca: Path | None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Pem:
    """What the files hold."""

    certificate: bytes
    key: bytes = field(repr=False)
    client_ca: bytes | None


class ReloadingCredentials:
    """Serves the newest certificates that can be used; a change takes hold with the next connection."""

    def __init__(self, files: TlsFiles) -> None:
        """Reads the files. Raises CertificateError."""
        self._files = files
        self._looked_at = self._usable = _read(files)
        _check(files, self._usable)
        self._problem = ""
        # Each of grpc's servers asks on threads of its own.
        self._looking = threading.Lock()

    def credentials(self) -> grpc.ServerCredentials:
        """Gives credentials for one server, which look for changes at each handshake."""
        given = self._usable

        def changed() -> grpc.ServerCertificateConfiguration | None:
            """Is called by grpc at each handshake, on a thread of its own."""
            nonlocal given
            with self._looking:
                newest = self._newest()
            if newest == given:
                return None
            given = newest
            return _configuration(newest)

        return grpc.dynamic_ssl_server_credentials(
            _configuration(given),
            changed,  # type: ignore[arg-type]  # None, for no change, is missing in the stubs
            require_client_authentication=self._files.client_ca is not None,
        )

    def _newest(self) -> _Pem:
        """Gives what the files hold, or held before, while they can not be used.

        What was looked at is not parsed again: to check a key of 4096 bits takes a quarter of a second, for which
        everything else would stand still. A problem is logged once.
        """
        try:
            found = _read(self._files)
            if found == self._looked_at:
                return self._usable
            self._looked_at = found
            _check(self._files, found)
        except CertificateError as error:
            if self._problem != str(error):
                self._problem = str(error)
                _log.error("certificate_not_reloaded", problem=self._problem)
            return self._usable
        self._problem = ""
        self._usable = found
        _log.info("certificate_reloaded", file=str(self._files.certificate))
        return found


def _configuration(pem: _Pem) -> grpc.ServerCertificateConfiguration:
    return grpc.ssl_server_certificate_configuration([(pem.key, pem.certificate)], root_certificates=pem.client_ca)


def _read(files: TlsFiles) -> _Pem:
    """Reads the files. Raises CertificateError."""
    return _Pem(
        certificate=_pem(files.certificate, b"CERTIFICATE"),
        key=_pem(files.key, b"PRIVATE KEY"),
        client_ca=_pem(files.client_ca, b"CERTIFICATE") if files.client_ca else None,
    )


def _pem(path: Path, kind: bytes) -> bytes:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise CertificateError(f"{path}: {error.strerror}") from None
    if b"-----BEGIN " not in content or kind not in content:
        raise CertificateError(f"{path}: holds no PEM {kind.decode()}")
    if content.count(b"-----BEGIN ") != content.count(b"-----END "):
        raise CertificateError(f"{path}: ends too early, or is still being written")
    return content


def _check(files: TlsFiles, pem: _Pem) -> None:
    """Demands files that can be used together: between two writes they may not match. Raises CertificateError."""
    public = _first_key(files.certificate, pem.certificate)
    try:
        private = serialization.load_pem_private_key(pem.key, password=None)
    except TypeError:
        raise CertificateError(f"{files.key}: has a password; it must have none") from None
    except (ValueError, UnsupportedAlgorithm):
        raise CertificateError(f"{files.key}: is no private key that can be read") from None
    if _spki(public) != _spki(private.public_key()):
        raise CertificateError(f"{files.key}: is not the key of {files.certificate}")
    if files.client_ca is not None and pem.client_ca is not None:
        _first_key(files.client_ca, pem.client_ca)


def _first_key(path: Path, content: bytes) -> PublicKeyTypes:
    """Gives the key of the first certificate, which in a server's chain is its own. Raises CertificateError."""
    try:
        return x509.load_pem_x509_certificates(content)[0].public_key()
    except (ValueError, UnsupportedAlgorithm, x509.InvalidVersion):
        raise CertificateError(f"{path}: holds a certificate that can not be read") from None


def _spki(key: PublicKeyTypes) -> bytes:
    return key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
