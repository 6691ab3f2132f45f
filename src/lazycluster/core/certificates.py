"""Certificates of one cluster or one copy: made in memory, for that only."""

from __future__ import annotations

import datetime
import ipaddress
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from cryptography import x509
    from cryptography.hazmat.primitives.asymmetric import ec

_LIFETIME = datetime.timedelta(days=365)
_CLOCKS_DIFFER = datetime.timedelta(days=1)


@dataclass(frozen=True)
class Identity:
    """A certificate and its key, as PEM text. The key is in no `repr`."""

    certificate: str
    key: str = field(repr=False)


class Authority:
    """An authority of one cluster or copy, whose key is in this process's memory and nowhere else.

    Keep it where hosts may join later, whose certificates name their addresses; else use `make_identities`.

    Attributes:
        certificate: Its certificate, as PEM text.

    Raises:
        ModuleNotFoundError: If the package `cryptography` is not installed.

    Examples:
        >>> authority = Authority()
        >>> authority.identity("worker", ["10.0.0.7"]).certificate.splitlines()[0]
        '-----BEGIN CERTIFICATE-----'
    """

    def __init__(self) -> None:
        from cryptography import x509
        from cryptography.hazmat.primitives import hashes
        from cryptography.hazmat.primitives.asymmetric import ec

        self._key = ec.generate_private_key(ec.SECP256R1())
        name = _name("lazycluster authority")
        self._made = (
            _builder(name, name, self._key)
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(_signs_certificates(), critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(self._key.public_key()), critical=False)
            .sign(self._key, hashes.SHA256())
        )
        self.certificate = _pem(self._made)

    def identity(self, role: str, addresses: Iterable[str] = ()) -> Identity:
        """Make an identity that it has signed.

        Args:
            role: What it is for.
            addresses: IP addresses that the certificate names, beside loopback.
        """
        return _identity(role, addresses, self._made, self._key)

    def __reduce__(self) -> NoReturn:
        raise TypeError("the key of an authority does not leave this process")


def make_identities(*roles: str) -> tuple[str, dict[str, Identity]]:
    """Make identities of one cluster or copy, signed by an authority of its own, whose key is forgotten then.

    Args:
        roles: What the identities are for.

    Returns:
        The certificate of the authority, and the identities.

    Raises:
        ModuleNotFoundError: If the package `cryptography` is not installed.
    """
    authority = Authority()
    return authority.certificate, {role: authority.identity(role) for role in roles}


def valid_until(certificate: str) -> float:
    """Return when a certificate expires, in seconds since 1970."""
    from cryptography import x509

    return x509.load_pem_x509_certificate(certificate.encode()).not_valid_after_utc.timestamp()


def _identity(
    role: str, addresses: Iterable[str], issuer: x509.Certificate, issuer_key: ec.EllipticCurvePrivateKey
) -> Identity:
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    named = [x509.IPAddress(ipaddress.ip_address(address)) for address in dict.fromkeys(["127.0.0.1", *addresses])]
    names = x509.SubjectAlternativeName([x509.DNSName("localhost"), *named])
    certificate = (
        _builder(_name(f"lazycluster {role}"), issuer.subject, key)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(names, critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key.public_key()), critical=False)
        .sign(issuer_key, hashes.SHA256())
    )
    text = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    ).decode()
    return Identity(_pem(certificate), text)


def _signs_certificates() -> x509.KeyUsage:
    # Python 3.13 wants it to be said; only newer versions of distributed turn that off.
    from cryptography import x509

    others = ("digital_signature", "content_commitment", "key_encipherment", "data_encipherment", "key_agreement",
              "encipher_only", "decipher_only", "crl_sign")  # fmt: skip
    return x509.KeyUsage(key_cert_sign=True, **dict.fromkeys(others, False))


def _name(text: str) -> x509.Name:
    from cryptography import x509
    from cryptography.x509.oid import NameOID

    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


def _builder(subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePrivateKey) -> x509.CertificateBuilder:
    from cryptography import x509

    now = datetime.datetime.now(datetime.timezone.utc)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _CLOCKS_DIFFER)
        .not_valid_after(now + _LIFETIME)
    )


def _pem(certificate: x509.Certificate) -> str:
    from cryptography.hazmat.primitives import serialization

    return certificate.public_bytes(serialization.Encoding.PEM).decode()
