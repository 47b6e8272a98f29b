"""TLS of the gRPC port: certificates are read again when their files change."""

from __future__ import annotations

from dataclasses import dataclass
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


class ReloadingCredentials:
    """Serves the newest certificates that can be read; a change takes hold with the next connection."""

    def __init__(self, files: TlsFiles) -> None:
        """Reads the files. Raises CertificateError."""
        self._files = files
        self._seen = self._read()

    def credentials(self) -> grpc.ServerCredentials:
        """Gives credentials that look for changes at each handshake."""
        return grpc.dynamic_ssl_server_credentials(
            self._configuration(self._seen),
            self._changed,  # type: ignore[arg-type]  # None, for no change, is missing in the stubs
            require_client_authentication=self._files.client_ca is not None,
        )

    def _changed(self) -> grpc.ServerCertificateConfiguration | None:
        """Gives the new configuration if the files have changed since; keeps the old one while they can not be used.

        Called by grpc at each handshake, on a thread of its own.
        """
        try:
            found = self._read()
        except CertificateError as error:
            _log.error("certificate_not_reloaded", problem=str(error))
            return None
        if found == self._seen:
            return None
        self._seen = found
        _log.info("certificate_reloaded", file=str(self._files.certificate))
        return self._configuration(found)

    def _read(self) -> tuple[bytes, bytes, bytes | None]:
        files = self._files
        certificate, key = _pem(files.certificate, b"CERTIFICATE"), _pem(files.key, b"PRIVATE KEY")
        _check_pair(files, certificate, key)
        return certificate, key, _pem(files.client_ca, b"CERTIFICATE") if files.client_ca else None

    @staticmethod
    def _configuration(seen: tuple[bytes, bytes, bytes | None]) -> grpc.ServerCertificateConfiguration:
        certificate, key, client_ca = seen
        return grpc.ssl_server_certificate_configuration([(key, certificate)], root_certificates=client_ca)


def _pem(path: Path, kind: bytes) -> bytes:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise CertificateError(f"{path}: {error.strerror}") from None
    if b"-----BEGIN " not in content or kind not in content:
        raise CertificateError(f"{path}: holds no PEM {kind.decode()}")
    return content


def _check_pair(files: TlsFiles, certificate: bytes, key: bytes) -> None:
    """Demands that a key is the certificate's: between two writes they may not match. Raises CertificateError."""
    try:
        public = x509.load_pem_x509_certificate(certificate).public_key()
        private = serialization.load_pem_private_key(key, password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        raise CertificateError(
            f"{files.certificate} and {files.key}: can not be read, or the key has a password"
        ) from None
    if _spki(public) != _spki(private.public_key()):
        raise CertificateError(f"{files.key}: is not the key of {files.certificate}")


def _spki(key: PublicKeyTypes) -> bytes:
    return key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
