"""Certificates of one cluster or one copy: made in memory, for that only."""

from __future__ import annotations

import datetime
import ipaddress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

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


def make_identities(*roles: str) -> tuple[str, dict[str, Identity]]:
    """Make identities of one cluster or copy, signed by an authority of its own, whose key is forgotten then.

    Args:
        roles: What the identities are for.

    Returns:
        The certificate of the authority, and the identities.

    Raises:
        ModuleNotFoundError: If the package `cryptography` is not installed.
    """
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = _name("lazycluster authority")
    certificate = (
        _builder(name, name, key)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_signs_certificates(), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )
    return _pem(certificate), {role: _identity(role, certificate, key) for role in roles}


def valid_until(certificate: str) -> float:
    """Return when a certificate expires, in seconds since 1970."""
    from cryptography import x509

    return x509.load_pem_x509_certificate(certificate.encode()).not_valid_after_utc.timestamp()


def _identity(role: str, issuer: x509.Certificate, issuer_key: ec.EllipticCurvePrivateKey) -> Identity:
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    names = x509.SubjectAlternativeName([x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
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
