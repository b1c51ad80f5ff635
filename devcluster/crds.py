"""Installs custom resource definitions before the controllers start.

The garbage collector looks for new kinds only every 30 s: for that long the children of a new kind's objects outlive
their owners. A definition that is there first is collected at once.
"""

import asyncio
from collections.abc import Iterable
from pathlib import Path

import yaml

from devcluster.api import Client
from devcluster.errors import DevclusterError

PATH = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions"


def _names(text: str) -> list[tuple[str, str]]:
    """(name, document) of each definition in a YAML text."""
    found = []
    for document in text.split("\n---\n"):
        head = yaml.load(document, yaml.CSafeLoader)
        if head:
            found.append((str(head["metadata"]["name"]), document))
    return found


async def _until_established(admin: Client, name: str) -> None:
    for _ in range(400):
        conditions = (await admin.get(f"{PATH}/{name}")).get("status", {}).get("conditions") or []
        if any(each["type"] == "Established" and each["status"] == "True" for each in conditions):
            return
        await asyncio.sleep(0.05)
    raise DevclusterError(f"CRD {name} was not Established in 20 s; see `kubectl describe crd {name}`")


async def install(admin: Client, files: Iterable[Path]) -> None:
    """Apply every definition in these files and wait until each is served."""
    for path in files:
        for name, document in _names(path.read_text()):
            await admin.apply_text(f"{PATH}/{name}", document)
            await _until_established(admin, name)
