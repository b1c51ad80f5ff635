"""Keeps the certificates in the Secret and in the running server: reads, renews, writes, reloads without a restart.

Used by the server, one per replica. Replicas share one Secret: who loses a race (409) reads what the winner wrote.
The private key never touches a disk here: the TLS library reads it from an anonymous file in memory.
"""

from __future__ import annotations

import asyncio
import logging
import os
import ssl
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime

from posttrain_operator.certificates import Lifetimes, Material, Pair, from_data, renewed
from posttrain_operator.statusserver.view import ObjectMissing, SecretCluster, WriteConflict
from posttrain_operator.statusserver.writer import utc_now

log = logging.getLogger(__name__)
_TRIES = 8


@dataclass(frozen=True)
class SecretPlace:
    """Which Secret holds the certificates, for which DNS names, and how long they live. `check_every`: seconds."""

    namespace: str
    name: str
    names: tuple[str, ...]
    lifetimes: Lifetimes = field(default_factory=Lifetimes)
    check_every: float = 3600.0


class CertificateKeeper:
    """Holds the server's TLS context. New connections get a renewed certificate; open ones go on."""

    def __init__(self, cluster: SecretCluster, place: SecretPlace, now: Callable[[], datetime] = utc_now) -> None:
        self._cluster = cluster
        self._place = place
        self._now = now
        self._material: Material | None = None
        self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.context.minimum_version = ssl.TLSVersion.TLSv1_2

    def bundle(self) -> str:
        """PEM that trainers verify against. RuntimeError before the first `refresh`."""
        if self._material is None:
            raise RuntimeError("the certificates are not loaded: call refresh first")
        return self._material.bundle()

    async def refresh(self) -> None:
        """Reads the Secret, writes what was due, loads it. RuntimeError: the Secret is missing or keeps changing."""
        for attempt in range(_TRIES):
            try:
                await self._refresh()
            except WriteConflict:
                await asyncio.sleep(0.02 * 2**attempt)
            else:
                return
        raise RuntimeError(f"{self._secret()}: another writer changes it all the time; only this operator may write it")

    async def run(self) -> None:
        """Refreshes for ever; a failure is logged and tried again, the loaded certificate stays."""
        while True:
            await asyncio.sleep(self._place.check_every)
            try:
                await self.refresh()
            except Exception as error:  # noqa: BLE001 - the API server may be away for hours; the certificate lives for weeks
                log.warning("the status server's certificates are not refreshed: %s", error)

    async def _refresh(self) -> None:
        try:
            version, data = await self._cluster.read_secret(self._place.namespace, self._place.name)
        except ObjectMissing:
            text = "is missing; the chart creates it (statusServer), or create an empty Secret of this name"
            raise RuntimeError(f"{self._secret()} {text}") from None
        found = from_data(data)
        material = renewed(found, self._place.names, self._now(), self._place.lifetimes)
        if material is not found:
            place = self._place
            await self._cluster.replace_secret(place.namespace, place.name, version, material.to_data())
            until = material.serving.cert.not_valid_after_utc
            log.info("%s: certificates renewed, serving until %s", self._secret(), until)
        self._load(material)

    def _load(self, material: Material) -> None:
        known = self._material
        if known is None or known.serving.cert != material.serving.cert:
            with _in_memory(material.serving) as path:
                self.context.load_cert_chain(path)
        self._material = material

    def _secret(self) -> str:
        return f"Secret {self._place.namespace}/{self._place.name}"


@contextmanager
def _in_memory(pair: Pair) -> Iterator[str]:
    """A path to certificate and key that exists in memory only (Linux)."""
    descriptor = os.memfd_create("posttrain-status-tls", os.MFD_CLOEXEC)
    try:
        os.write(descriptor, pair.pem() + pair.key_pem())
        yield f"/proc/self/fd/{descriptor}"
    finally:
        os.close(descriptor)
