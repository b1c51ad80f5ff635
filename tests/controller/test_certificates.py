"""Certificates: what is made, when it is replaced, and that an old bundle still verifies a new certificate."""

import ssl
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from posttrain_operator.certificates import Lifetimes, Material, from_data, renewed, server_names
from posttrain_operator.statusserver.keeper import CertificateKeeper, SecretPlace
from posttrain_operator.statusserver.view import ObjectMissing, WriteConflict

NOW = datetime.now(UTC)
NAMES = server_names("posttrain.ops.svc")
LIVES = Lifetimes()
DAY = timedelta(days=1)


class Secrets:
    """One Secret with a resourceVersion, as the API server keeps it; `rivals` write before the next replacement."""

    def __init__(self, data: dict[str, bytes] | None = None) -> None:
        self.data = data or {}
        self.version = 1
        self.writes = 0
        self.rivals: list[dict[str, bytes]] = []

    async def read_secret(self, namespace: str, name: str) -> tuple[str, dict[str, bytes]]:
        if (namespace, name) != ("ops", "status"):
            raise ObjectMissing(name)
        return str(self.version), dict(self.data)

    async def replace_secret(self, namespace: str, name: str, version: str, data: dict[str, bytes]) -> None:
        if self.rivals:
            self.data, self.version = self.rivals.pop(), self.version + 1
        if version != str(self.version):
            raise WriteConflict("changed")
        self.data, self.version, self.writes = dict(data), self.version + 1, self.writes + 1


PLACE = SecretPlace("ops", "status", NAMES)


def handshake(material: Material, bundle: str, host: str, folder: Path) -> None:
    """A TLS handshake in memory, verified strictly. ssl.SSLError where it fails."""
    chain = folder / "serving.pem"
    chain.write_bytes(material.serving.pem() + material.serving.key_pem())
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(chain)
    client = ssl.create_default_context(cadata=bundle)
    client.verify_flags |= ssl.VERIFY_X509_STRICT
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = [
        client.wrap_bio(to_client, to_server, server_hostname=host),
        server.wrap_bio(to_server, to_client, server_side=True),
    ]
    for _ in range(4):
        for end in ends:
            try:
                end.do_handshake()
            except ssl.SSLWantReadError:
                continue
    assert ends[0].getpeercert() is not None


def test_a_services_names() -> None:
    assert set(NAMES) == {"posttrain", "posttrain.ops", "posttrain.ops.svc", "posttrain.ops.svc.cluster.local"}
    assert server_names("127.0.0.1") == ("127.0.0.1",)


@pytest.mark.parametrize("host", [*NAMES])
def test_every_name_verifies_strictly(host: str, tmp_path: Path) -> None:
    material = renewed(None, NAMES, NOW, LIVES)
    handshake(material, material.bundle(), host, tmp_path)


def test_another_name_and_another_authority_do_not(tmp_path: Path) -> None:
    material = renewed(None, NAMES, NOW, LIVES)
    with pytest.raises(ssl.SSLError, match="Hostname mismatch"):
        handshake(material, material.bundle(), "other.ops.svc", tmp_path)
    with pytest.raises(ssl.SSLError, match="verify failed"):
        handshake(material, renewed(None, NAMES, NOW, LIVES).bundle(), NAMES[0], tmp_path)


def test_an_address_verifies_too(tmp_path: Path) -> None:
    material = renewed(None, ("127.0.0.1",), NOW, LIVES)
    handshake(material, material.bundle(), "127.0.0.1", tmp_path)


def test_the_secret_holds_everything_and_nothing_is_due_next_day() -> None:
    material = renewed(None, NAMES, NOW, LIVES)
    read = from_data(material.to_data())
    assert read is not None
    assert renewed(read, NAMES, NOW + DAY, LIVES) is read
    assert read.to_data() == material.to_data()


def test_the_serving_certificate_is_replaced_alone() -> None:
    material = renewed(None, NAMES, NOW, LIVES)
    assert renewed(material, NAMES, NOW + 59 * DAY, LIVES) is material
    later = renewed(material, NAMES, NOW + 61 * DAY, LIVES)
    assert later.serving.cert != material.serving.cert
    assert later.bundle() == material.bundle()


def test_other_names_give_another_certificate() -> None:
    material = renewed(None, NAMES, NOW, LIVES)
    other = renewed(material, server_names("posttrain.prod.svc"), NOW, LIVES)
    assert other.serving.cert != material.serving.cert
    assert other.current.cert == material.current.cert


def test_a_bundle_read_half_a_year_before_still_verifies_after_a_change_of_authority(tmp_path: Path) -> None:
    """Day by day through five years: the bundle of 180 days ago always verifies today's certificate."""
    lives = Lifetimes(authority=timedelta(days=1095), serving=timedelta(days=90))
    material: Material | None = None
    bundles: list[str] = []
    signers = set()
    start = NOW - 5 * 365 * DAY
    for day in range(0, 5 * 365, 10):
        material = renewed(material, NAMES, start + day * DAY, lives)
        signers.add(material.current.cert.serial_number)
        bundles.append(material.bundle())
        assert material.serving.cert.not_valid_after_utc > start + (day + 20) * DAY
        assert material.serving.cert.not_valid_after_utc < material.current.cert.not_valid_after_utc
        trusted = bundles[max(0, len(bundles) - 19)]
        assert material.current.pem().decode() in trusted, f"day {day}"
        assert trusted.count("BEGIN") <= 4
    assert len(signers) >= 3
    assert material is not None
    handshake(renewed(material, NAMES, NOW, lives), bundles[-19], NAMES[0], tmp_path)


@pytest.mark.parametrize("damage", ["ca.key", "next-ca.key", "tls.crt", "tls.key", "ca.crt"])
def test_a_damaged_secret_is_made_anew(damage: str) -> None:
    data = renewed(None, NAMES, NOW, LIVES).to_data()
    foreign = renewed(None, NAMES, NOW, LIVES).to_data()
    assert from_data({**data, damage: b"-----BEGIN nonsense"}) is None
    assert from_data({**data, damage: foreign[damage]}) is None
    assert from_data({key: value for key, value in data.items() if key != damage}) is None


async def test_the_keeper_fills_an_empty_secret_once() -> None:
    secrets = Secrets()
    first, second = (CertificateKeeper(secrets, PLACE) for _ in range(2))
    await first.refresh()
    await second.refresh()
    await first.refresh()
    assert secrets.writes == 1
    assert first.bundle() == second.bundle()


async def test_the_loser_of_a_race_takes_the_winners_certificates() -> None:
    secrets = Secrets()
    winner = renewed(None, NAMES, NOW, LIVES)
    secrets.rivals = [winner.to_data()]
    keeper = CertificateKeeper(secrets, PLACE)
    await keeper.refresh()
    assert keeper.bundle() == winner.bundle()
    assert secrets.writes == 0


async def test_a_missing_secret_is_named() -> None:
    keeper = CertificateKeeper(Secrets(), SecretPlace("ops", "nothing", NAMES))
    with pytest.raises(RuntimeError, match="ops/nothing is missing; the chart creates it"):
        await keeper.refresh()


async def test_renewal_reaches_new_connections_of_the_same_context(tmp_path: Path) -> None:
    """The context is shared with the listening socket: after a refresh it serves the new certificate."""
    clock = [NOW]
    keeper = CertificateKeeper(Secrets(), PLACE, now=lambda: clock[0])
    await keeper.refresh()
    seen = []
    for later in (timedelta(0), 61 * DAY):
        clock[0] = NOW + later
        await keeper.refresh()
        seen.append(served(keeper.context))
    assert seen[0] != seen[1]


def served(context: ssl.SSLContext) -> bytes:
    client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    client.check_hostname = False
    client.verify_mode = ssl.CERT_NONE
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    left = client.wrap_bio(to_client, to_server)
    right = context.wrap_bio(to_server, to_client, server_side=True)
    for _ in range(3):
        for end in (left, right):
            try:
                end.do_handshake()
            except ssl.SSLWantReadError:
                continue
    found = left.getpeercert(binary_form=True)
    assert found is not None
    return found
