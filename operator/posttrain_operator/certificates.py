"""Certificate authority and serving certificate of the status server: made here, kept in one Secret, replaced in time.

Pure functions over `Material`; statusserver.keeper reads and writes the Secret. Trainers verify against a bundle
that holds the signing authority, the *next* one, and earlier ones until they expire: the next is published long
before it signs, so a process that read the bundle once at its start still verifies after a change of authority.
Elliptic-curve keys (P-256): milliseconds to make.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

_BACKDATED = timedelta(minutes=5)
"""Clocks of nodes differ a little."""


@dataclass(frozen=True)
class Lifetimes:
    """An authority signs until a third of its life is left; a serving certificate is replaced when a third is left."""

    authority: timedelta = timedelta(days=1095)
    serving: timedelta = timedelta(days=90)


@dataclass(frozen=True)
class Pair:
    """A certificate and its key."""

    cert: x509.Certificate
    key: ec.EllipticCurvePrivateKey

    def pem(self) -> bytes:
        """The certificate."""
        return self.cert.public_bytes(serialization.Encoding.PEM)

    def key_pem(self) -> bytes:
        """The key, PKCS 8, not encrypted."""
        encryption = serialization.NoEncryption()
        return self.key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, encryption)


@dataclass(frozen=True)
class Material:
    """What the Secret holds. `older`: authorities that signed before and have not expired."""

    current: Pair
    following: Pair
    serving: Pair
    older: tuple[x509.Certificate, ...] = ()

    def bundle(self) -> str:
        """PEM of every authority to trust, the signing one first."""
        trusted = (self.current.cert, self.following.cert, *self.older)
        return "".join(cert.public_bytes(serialization.Encoding.PEM).decode() for cert in trusted)

    def to_data(self) -> dict[str, bytes]:
        """The Secret's data, keys as in a kubernetes.io/tls Secret where they have the same meaning."""
        return {
            "ca.crt": self.bundle().encode(),
            "ca.key": self.current.key_pem(),
            "next-ca.key": self.following.key_pem(),
            "tls.crt": self.serving.pem(),
            "tls.key": self.serving.key_pem(),
        }


def server_names(host: str, cluster_domain: str = "cluster.local") -> tuple[str, ...]:
    """Every name by which a pod can reach this host: all of a Service's for `name.namespace.svc`, else itself."""
    parts = host.split(".")
    if len(parts) < 3 or parts[2] != "svc":
        return (host,)
    base = f"{parts[0]}.{parts[1]}"
    return (f"{base}.svc", parts[0], base, f"{base}.svc.{cluster_domain}")


def from_data(data: Mapping[str, bytes]) -> Material | None:
    """Reads the Secret. None where it is empty, incomplete or damaged: then everything is made anew."""
    try:
        trusted = x509.load_pem_x509_certificates(data["ca.crt"])
        current = Pair(trusted[0], _load_key(data["ca.key"]))
        following = Pair(trusted[1], _load_key(data["next-ca.key"]))
        serving = Pair(x509.load_pem_x509_certificate(data["tls.crt"]), _load_key(data["tls.key"]))
    except (KeyError, IndexError, ValueError, TypeError):
        return None
    pairs = (current, following, serving)
    whole = all(pair.cert.public_key() == pair.key.public_key() for pair in pairs)
    return Material(current, following, serving, tuple(trusted[2:])) if whole else None


def renewed(material: Material | None, names: Sequence[str], now: datetime, lifetimes: Lifetimes) -> Material:
    """The material to use now: `material` itself where nothing is due, else with whatever had to be replaced.

    `names` are the serving certificate's DNS names or IP addresses, the first its common name. `now` has a time zone.
    """
    if material is None or _left(material.current.cert, now) <= timedelta(0):
        current, following = _authority(now, lifetimes), _authority(now, lifetimes)
        return Material(current, following, _serving(current, names, now, lifetimes))
    current, following, older = material.current, material.following, _unexpired(material.older, now)
    if _left(following.cert, now) < lifetimes.authority * 2 / 3 and _left(current.cert, now) > lifetimes.authority / 2:
        following = _authority(now, lifetimes)  # of use only if it is published for long before it signs
    if _left(current.cert, now) < lifetimes.authority / 3:
        older = (current.cert, *older)
        current, following = following, _authority(now, lifetimes)
    serving = material.serving
    if not _serves(serving, current, names) or _left(serving.cert, now) < lifetimes.serving / 3:
        serving = _serving(current, names, now, lifetimes)
    fresh = Material(current, following, serving, older)
    return material if fresh == material else fresh


def _serves(serving: Pair, authority: Pair, names: Sequence[str]) -> bool:
    """Whether the authority signed this certificate and it has exactly these names."""
    try:
        serving.cert.verify_directly_issued_by(authority.cert)
        extension = serving.cert.extensions.get_extension_for_class(x509.SubjectAlternativeName)
    except (ValueError, TypeError, InvalidSignature, x509.ExtensionNotFound):
        return False
    return set(extension.value) == {_general_name(name) for name in names}


def _left(cert: x509.Certificate, now: datetime) -> timedelta:
    return cert.not_valid_after_utc - now


def _unexpired(certs: Sequence[x509.Certificate], now: datetime) -> tuple[x509.Certificate, ...]:
    return tuple(cert for cert in certs if _left(cert, now) > timedelta(0))


def _load_key(pem: bytes) -> ec.EllipticCurvePrivateKey:
    key = serialization.load_pem_private_key(pem, None)
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise ValueError(f"the key must be an elliptic-curve key, found {type(key).__name__}")
    return key


def _authority(now: datetime, lifetimes: Lifetimes) -> Pair:
    """A self-signed authority; its serial number is in its name, so that two in one bundle are told apart."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = _name(f"posttrain-status-ca-{x509.random_serial_number() % 16**8:08x}")
    identifier = x509.SubjectKeyIdentifier.from_public_key(key.public_key())
    builder = _builder(name, name, key, (now, lifetimes.authority))
    builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
    builder = builder.add_extension(_usage(key_cert_sign=True), critical=True)
    builder = builder.add_extension(identifier, critical=False)
    return Pair(builder.sign(key, hashes.SHA256()), key)


def _serving(authority: Pair, names: Sequence[str], now: datetime, lifetimes: Lifetimes) -> Pair:
    key = ec.generate_private_key(ec.SECP256R1())
    alternatives = x509.SubjectAlternativeName([_general_name(name) for name in names])
    issuer = authority.cert.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
    builder = _builder(_name(names[0][:64]), authority.cert.subject, key, (now, lifetimes.serving))
    builder = builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
    builder = builder.add_extension(_usage(key_cert_sign=False), critical=True)
    builder = builder.add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
    builder = builder.add_extension(alternatives, critical=False)
    identifier = x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(issuer)
    builder = builder.add_extension(identifier, critical=False)
    return Pair(builder.sign(authority.key, hashes.SHA256()), key)


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePrivateKey, span: tuple[datetime, timedelta]
) -> x509.CertificateBuilder:
    start, lifetime = span
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(start - _BACKDATED)
        .not_valid_after(start + lifetime)
    )


def _name(common: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common)])


def _general_name(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)


def _usage(key_cert_sign: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not key_cert_sign,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=key_cert_sign,
        crl_sign=key_cert_sign,
        encipher_only=False,
        decipher_only=False,
    )
