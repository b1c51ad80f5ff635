"""The servers of stores_rig.py as the tests see them."""

from __future__ import annotations

import json
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PYTHON = Path(__file__).parents[2] / ".build" / "stores" / "bin" / "python"
RIG = Path(__file__).with_name("stores_rig.py")


@dataclass(frozen=True)
class Stores:
    """Addresses and credentials of the two servers, and folders as Secrets are mounted."""

    facts: dict[str, Any]
    secrets: Path

    def url(self, scheme: str) -> str:
        return str(self.facts[scheme]["url"])

    def control(self, scheme: str, path: str) -> list[str]:
        with urllib.request.urlopen(f"{self.url(scheme)}/{path}") as answer:
            return answer.read().decode().splitlines()

    def secret(self, name: str, keys: dict[str, str]) -> str:
        folder = self.secrets / name
        folder.mkdir(exist_ok=True)
        for key, value in keys.items():
            (folder / key).write_text(value)
        return str(folder)

    def s3_secret(self, user: str, **changed: str) -> str:
        keys = {**self.facts["s3"]["users"][user], "AWS_ENDPOINT_URL": self.url("s3") + "/\n", **changed}
        return self.secret(f"s3-{user}-{len(changed)}", keys)

    def gs_secret(self) -> str:
        credentials = json.dumps(self.facts["gs"]["credentials"])
        return self.secret("gs", {"credentials.json": credentials, "GCS_ENDPOINT_URL": self.url("gs")})

    def good(self, scheme: str) -> str:
        return self.s3_secret("all") if scheme == "s3" else self.gs_secret()

    def tls_secret(self, scheme: str) -> str:
        """As `good`, at the door that speaks TLS."""
        name = "AWS_ENDPOINT_URL" if scheme == "s3" else "GCS_ENDPOINT_URL"
        good = Path(self.good(scheme))
        keys = {file.name: file.read_text() for file in good.iterdir()}
        return self.secret(f"{good.name}-tls", {**keys, name: self.facts[scheme]["tls"]})
