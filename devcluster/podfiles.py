"""A pod's files and variables: volumes brought to disk, mounts and environments for its containers.

The asynchronous half of `volumes` and `env`: it fetches what the pure functions need, writes the folders, and keeps
ConfigMaps, Secrets and tokens fresh while the pod lives.
"""

import asyncio
import time
from dataclasses import dataclass
from pathlib import Path

from devcluster import env, fields, volumes
from devcluster.api import Obj
from devcluster.containers import Mount
from devcluster.env import ConfigError, Sources
from devcluster.images import Image
from devcluster.nodeapi import NodeApi, now

REFRESH = 20.0  # seconds between looks at ConfigMaps, Secrets and tokens; a kubelet takes about a minute
TOKEN_SHARE = 0.8  # of a token's life, after which a new one is made


class VolumeError(Exception):
    """A volume cannot be had (yet): FailedMount."""


@dataclass(frozen=True)
class Prepared:
    """A volume on disk."""

    path: str
    read_only: bool


class PodFiles:
    """The files of one pod, under the state folder's pods/<uid>."""

    def __init__(self, api: NodeApi, pod: Obj, folder: Path) -> None:
        self._api, self.pod, self.folder = api, pod, folder
        self.addresses: dict[str, str] = {}
        self.ready: dict[str, Prepared] = {}
        self._minted: dict[tuple[str, str], tuple[str, float]] = {}

    @property
    def _namespace(self) -> str:
        return str(self.pod["metadata"]["namespace"])

    def _path(self, volume: Obj) -> Path:
        return self.folder / "volumes" / str(volume["name"])

    async def prepare(self) -> None:
        """Bring all volumes to disk; raises VolumeError with a kubelet's words for the first that is not to be had."""
        for volume in self.pod["spec"].get("volumes") or []:
            if volume["name"] not in self.ready:
                try:
                    self.ready[volume["name"]] = await self._prepare_one(volume)
                except (ConfigError, OSError) as error:
                    raise VolumeError(f'MountVolume.SetUp failed for volume "{volume["name"]}" : {error}') from error

    async def _prepare_one(self, volume: Obj) -> Prepared:
        path = self._path(volume)
        if "emptyDir" in volume:
            return _empty_dir(path, volume["emptyDir"])
        if "persistentVolumeClaim" in volume:
            return await self._claim(volume["persistentVolumeClaim"])
        if "hostPath" in volume:
            return _host_path(volume["hostPath"])
        if volumes.is_written(volume):
            await self._write(volume)
            return Prepared(str(path), True)
        kinds = sorted(set(volume) - {"name"})
        raise ConfigError(f"volume kind {kinds} is not supported by devcluster")

    async def _claim(self, source: Obj) -> Prepared:
        claim = await self._api.fetch("claim", self._namespace, source["claimName"])
        name = (claim or {}).get("spec", {}).get("volumeName")
        if not claim or not name:
            raise ConfigError(f'persistentvolumeclaim "{source["claimName"]}" is not bound')
        volume = await self._api.fetch("volume", "", name)
        path = ((volume or {}).get("spec", {}).get("hostPath") or {}).get("path")
        if not path or not Path(path).is_dir():  # noqa: ASYNC240 - a local folder
            raise ConfigError(f'persistentvolume "{name}" has no folder on this machine ({path or "no hostPath"})')
        return Prepared(path, bool(source.get("readOnly")))

    async def _write(self, volume: Obj) -> None:
        objects = await self._api.fetch_all(self._namespace, volumes.references(volume))
        minted = {}
        for token in volumes.tokens(volume):
            minted[token.path] = await self._token(volume["name"], token)
        sources = Sources(self.pod, self.addresses, objects)
        content = volumes.files(volume, sources, minted)
        self._path(volume).mkdir(parents=True, exist_ok=True)
        volumes.write(self._path(volume), content, now())

    async def _token(self, volume: str, token: volumes.Token) -> str:
        known = self._minted.get((volume, token.path))
        if known and time.monotonic() < known[1]:
            return known[0]
        text = await self._api.token(self.pod, token)
        self._minted[(volume, token.path)] = (text, time.monotonic() + TOKEN_SHARE * token.seconds)
        return text

    async def keep_fresh(self) -> None:
        """Refresh written volumes for ever. An object that has gone meanwhile leaves the last content in place."""
        while True:
            await asyncio.sleep(REFRESH)
            for volume in self.pod["spec"].get("volumes") or []:
                if volumes.is_written(volume):
                    await self._refresh(volume)

    async def _refresh(self, volume: Obj) -> None:
        try:
            await self._write(volume)
        except ConfigError as error:
            await self._api.event(self.pod, "Warning", "FailedMount", f'volume "{volume["name"]}" : {error}')

    def mounts(self, container: Obj, values: dict[str, str]) -> tuple[Mount, ...]:
        """The container's bind mounts; `values` are its variables, for subPathExpr. Missing sub-paths are made."""
        found = []
        for mount in container.get("volumeMounts") or []:
            volume = self.ready[mount["name"]]
            sub = fields.expand(mount.get("subPathExpr") or "", values) or mount.get("subPath") or ""
            source = Path(volume.path)
            if sub:
                source = _sub_path(source, sub)
            read_only = volume.read_only or bool(mount.get("readOnly"))
            found.append(Mount(str(source), str(Path(mount["mountPath"])), read_only))
        return tuple(found)

    async def environment(self, container: Obj, image: Image, service: dict[str, str]) -> dict[str, str]:
        """The container's variables; raises ConfigError for a missing object or key."""
        objects = await self._api.fetch_all(self._namespace, env.references(container))
        base = {**image.environment, **service, "HOSTNAME": _hostname(self.pod)}
        return env.build(container, Sources(self.pod, self.addresses, objects), base)

    def remove(self) -> None:
        """Take the volumes away, the memory ones first. Logs stay until the state folder goes."""
        for volume in self.pod["spec"].get("volumes") or []:
            if "persistentVolumeClaim" not in volume and "hostPath" not in volume:
                volumes.remove(self._path(volume))


def _hostname(pod: Obj) -> str:
    return str(pod["spec"].get("hostname") or pod["metadata"]["name"])[:63]


def _empty_dir(path: Path, source: Obj) -> Prepared:
    if source.get("medium") == "Memory":
        volumes.mount_tmpfs(path, source.get("sizeLimit"))
    else:
        path.mkdir(parents=True, exist_ok=True)
        path.chmod(0o777)
    return Prepared(str(path), False)


def _host_path(source: Obj) -> Prepared:
    path, kind = Path(source["path"]), source.get("type") or ""
    if kind == "DirectoryOrCreate":
        path.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        raise ConfigError(f"hostPath {path} does not exist")
    return Prepared(str(path), False)


def _sub_path(volume: Path, sub: str) -> Path:
    target = (volume / sub).resolve()
    if not target.is_relative_to(volume.resolve()):
        raise ConfigError(f"subPath {sub!r} leads out of its volume")
    if not target.exists():
        target.mkdir(parents=True)
    return target
