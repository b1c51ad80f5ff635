"""Persistent volumes: a default StorageClass whose provisioner makes a folder for each claim.

Runs in the supervisor as an administrator. A claim of the class gets a hostPath volume under the state folder, good
for ReadWriteMany. The annotation `devcluster/size-limit: 64Mi` on the claim gives a tmpfs of that size instead: it can
be filled up or made read-only. A tmpfs lies in the supervisor's own mount namespace, so it is seen from outside only
through /proc/<supervisor>/root.
"""

import asyncio
import logging
from pathlib import Path

from devcluster import volumes
from devcluster.api import ApiError, Client, Informer, Obj

log = logging.getLogger(__name__)
CLASS = "devcluster"
PROVISIONER = "devcluster/hostpath"
SIZE_LIMIT = "devcluster/size-limit"


def storage_class() -> Obj:
    """The default StorageClass."""
    annotations = {"storageclass.kubernetes.io/is-default-class": "true"}
    return {
        "apiVersion": "storage.k8s.io/v1",
        "kind": "StorageClass",
        "metadata": {"name": CLASS, "annotations": annotations},
        "provisioner": PROVISIONER,
        "reclaimPolicy": "Delete",
        "volumeBindingMode": "Immediate",
    }


def volume_for(claim: Obj, folder: Path) -> Obj:
    """The PersistentVolume of a claim. Pure."""
    meta, spec = claim["metadata"], claim["spec"]
    ref = {"apiVersion": "v1", "kind": "PersistentVolumeClaim", "namespace": meta["namespace"]}
    ref |= {"name": meta["name"], "uid": meta["uid"]}
    return {
        "apiVersion": "v1",
        "kind": "PersistentVolume",
        "metadata": {
            "name": f"pvc-{meta['uid']}",
            "annotations": {"pv.kubernetes.io/provisioned-by": PROVISIONER},
        },
        "spec": {
            "capacity": {"storage": spec["resources"]["requests"]["storage"]},
            "accessModes": spec["accessModes"],
            "persistentVolumeReclaimPolicy": "Delete",
            "storageClassName": CLASS,
            "claimRef": ref,
            "hostPath": {"path": str(folder), "type": "Directory"},
        },
    }


class Storage:
    """The provisioner of one cluster."""

    def __init__(self, client: Client, root: Path) -> None:
        self._client, self._root = client, root
        self._queue: asyncio.Queue[Obj] = asyncio.Queue()
        self._claims = Informer(client, "/api/v1/persistentvolumeclaims", {}, self._claim)
        self._volumes = Informer(client, "/api/v1/persistentvolumes", {}, self._volume)

    def _claim(self, kind: str, claim: Obj) -> None:
        waits = not claim["spec"].get("volumeName") and claim["status"].get("phase") in (None, "Pending")
        if kind != "DELETED" and waits and claim["spec"].get("storageClassName") == CLASS:
            self._queue.put_nowait(claim)

    def _volume(self, kind: str, volume: Obj) -> None:
        ours = (volume["metadata"].get("annotations") or {}).get("pv.kubernetes.io/provisioned-by") == PROVISIONER
        if kind != "DELETED" and ours and volume.get("status", {}).get("phase") == "Released":
            self._queue.put_nowait(volume)

    def folder(self, namespace: str, name: str) -> Path | None:
        """The folder behind a bound claim."""
        claim = self._claims.store.get(f"{namespace}/{name}")
        volume = self._volumes.store.get(f"/{claim['spec'].get('volumeName', '')}") if claim else None
        path = volume["spec"].get("hostPath", {}).get("path") if volume else None
        return Path(path) if path else None

    def table(self) -> dict[str, str]:
        """namespace/claim -> folder of all bound claims."""
        found = {key: self.folder(*key.split("/", 1)) for key in self._claims.store}
        return {key: str(path) for key, path in found.items() if path}

    async def start(self) -> None:
        """Make the StorageClass."""
        self._root.mkdir(parents=True, exist_ok=True)
        await self._client.apply(f"/apis/storage.k8s.io/v1/storageclasses/{CLASS}", storage_class())

    async def run(self) -> None:
        """Provision and reclaim for ever."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._claims.run())
            group.create_task(self._volumes.run())
            while True:
                await self._handle(await self._queue.get())

    async def _handle(self, obj: Obj) -> None:
        try:
            if "accessModes" in obj["spec"] and "resources" in obj["spec"]:
                await self._provision(obj)
            else:
                await self._reclaim(obj)
        except (ApiError, OSError, ValueError) as error:
            log.error("storage: %s: %s", obj["metadata"]["name"], error)

    async def _provision(self, claim: Obj) -> None:
        meta = claim["metadata"]
        folder = self._root / f"{meta['namespace']}-{meta['name']}-{meta['uid'][:8]}"
        folder.mkdir(parents=True, exist_ok=True)
        folder.chmod(0o777)
        limit = (meta.get("annotations") or {}).get(SIZE_LIMIT)
        if limit and not folder.is_mount():
            volumes.mount_tmpfs(folder, limit)
        try:
            await self._client.post("/api/v1/persistentvolumes", volume_for(claim, folder))
        except ApiError as error:
            if error.code != 409:
                raise

    async def _reclaim(self, volume: Obj) -> None:
        await asyncio.to_thread(volumes.remove, Path(volume["spec"]["hostPath"]["path"]))
        try:
            await self._client.delete(f"/api/v1/persistentvolumes/{volume['metadata']['name']}")
        except ApiError as error:
            if error.code != 404:
                raise
