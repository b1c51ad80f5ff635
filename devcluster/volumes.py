"""A pod's volumes as folders on this machine. The contents are computed purely; this module also writes them.

ConfigMap, Secret, downward API and projected volumes are written as a kubelet does: a dated folder behind a `..data`
link that is swapped whole, so a reader never sees half of an update. A memory volume is a tmpfs in the supervisor's
own mount namespace and goes with it.
"""

import ctypes
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from devcluster.env import ConfigError, Sources, object_data
from devcluster.fields import field_value, quantity, resource_value
from devcluster.processes import LIBC

Obj = dict[str, Any]
MNT_DETACH = 2
MS_REMOUNT, MS_RDONLY = 32, 1
Files = dict[str, tuple[bytes, int]]


@dataclass(frozen=True)
class Token:
    """A service-account token that a projected volume asks for."""

    path: str
    audience: str
    seconds: int


def mount_tmpfs(path: Path, size: str | int | None) -> None:
    """Mount a tmpfs of this size (a quantity; None: the kernel's default, half of the memory)."""
    path.mkdir(parents=True, exist_ok=True)
    options = "mode=0777" + (f",size={int(quantity(size))}" if size else "")
    if LIBC.mount(b"tmpfs", str(path).encode(), b"tmpfs", 0, options.encode()) != 0:
        code = ctypes.get_errno()
        raise OSError(code, f"mounting a tmpfs at {path}: {os.strerror(code)}")


def remount_tmpfs(path: Path, read_only: bool) -> None:
    """Make a mounted tmpfs read-only or writable again, for everybody. EBUSY while a file is open for writing."""
    flags = MS_REMOUNT | (MS_RDONLY if read_only else 0)
    if LIBC.mount(b"tmpfs", str(path).encode(), b"tmpfs", flags, None) != 0:
        code = ctypes.get_errno()
        raise OSError(code, f"remounting {path}: {os.strerror(code)}")


def remove(path: Path) -> None:
    """Unmount and remove a volume's folder."""
    if os.path.ismount(path):
        LIBC.umount2(str(path).encode(), MNT_DETACH)
    shutil.rmtree(path, ignore_errors=True)


def references(volume: Obj) -> set[tuple[str, str]]:
    """The ConfigMaps and Secrets that a volume names."""
    found: set[tuple[str, str]] = set()
    for source in _sources(volume):
        if "configMap" in source:
            found.add(("configmap", source["configMap"]["name"]))
        if "secret" in source:
            found.add(("secret", source["secret"].get("secretName") or source["secret"]["name"]))
    return found


def _sources(volume: Obj) -> list[Obj]:
    if "projected" in volume:
        return list(volume["projected"].get("sources") or [])
    return [{key: volume[key]} for key in ("configMap", "secret", "downwardAPI") if key in volume]


def is_written(volume: Obj) -> bool:
    """Whether the volume's files are written by us (and refreshed)."""
    return any(key in volume for key in ("configMap", "secret", "downwardAPI", "projected"))


def tokens(volume: Obj) -> list[Token]:
    """The tokens of a projected volume."""
    asked = [each["serviceAccountToken"] for each in _sources(volume) if "serviceAccountToken" in each]
    return [Token(each["path"], each.get("audience") or "", each.get("expirationSeconds") or 3600) for each in asked]


def _default_mode(volume: Obj) -> int:
    for key in ("projected", "configMap", "secret", "downwardAPI"):
        if key in volume:
            mode = volume[key].get("defaultMode")
            return 0o644 if mode is None else int(mode)
    return 0o644


def _object_files(kind: str, source: Obj, sources: Sources, mode: int) -> Files:
    name = source.get("secretName") or source["name"]
    obj = sources.objects.get((kind, name))
    if obj is None:
        if source.get("optional"):
            return {}
        raise ConfigError(f'{kind} "{name}" not found')
    data = object_data(kind, obj)
    if not source.get("items"):
        return {key: (value, mode) for key, value in data.items()}
    chosen: Files = {}
    for item in source["items"]:
        if item["key"] in data:
            chosen[item["path"]] = (data[item["key"]], item.get("mode") or mode)
        elif not source.get("optional"):
            raise ConfigError(f"references non-existent {kind} key: {item['key']}")
    return chosen


def _downward_files(source: Obj, sources: Sources, mode: int) -> Files:
    chosen: Files = {}
    for item in source.get("items") or []:
        if "fieldRef" in item:
            text = field_value(sources.pod, item["fieldRef"]["fieldPath"], sources.addresses)
        else:
            text = resource_value(sources.pod, item["resourceFieldRef"], "")
        chosen[item["path"]] = (text.encode(), item.get("mode") or mode)
    return chosen


def files(volume: Obj, sources: Sources, minted: Mapping[str, str]) -> Files:
    """Path -> (content, mode) of a written volume; `minted` maps token paths to tokens. Raises ConfigError."""
    mode = _default_mode(volume)
    content: Files = {path: (token.encode(), mode) for path, token in minted.items()}
    for source in _sources(volume):
        if "configMap" in source:
            content |= _object_files("configmap", source["configMap"], sources, mode)
        elif "secret" in source:
            content |= _object_files("secret", source["secret"], sources, mode)
        elif "downwardAPI" in source:
            content |= _downward_files(source["downwardAPI"], sources, mode)
    return content


def _unchanged(folder: Path, content: Files) -> bool:
    current = folder / "..data"
    if not current.exists():
        return False
    present = {str(path.relative_to(current)) for path in current.rglob("*") if path.is_file()}
    return present == set(content) and all((current / name).read_bytes() == body for name, (body, _) in content.items())


def write(folder: Path, content: Files, now: datetime) -> bool:
    """Bring the folder to this content by one atomic swap; returns whether anything changed."""
    if _unchanged(folder, content):
        return False
    dated = folder / f"..{now.strftime('%Y_%m_%d_%H_%M_%S.%f')}"
    dated.mkdir(parents=True)
    for name, (body, mode) in content.items():
        path = dated / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(body)
        path.chmod(mode)
    before = (folder / "..data").resolve() if (folder / "..data").exists() else None
    swap = folder / "..data_tmp"
    swap.symlink_to(dated.name)
    swap.rename(folder / "..data")
    _link_top(folder, content)
    if before is not None:
        shutil.rmtree(before)
    return True


def _link_top(folder: Path, content: Files) -> None:
    wanted = {name.split("/")[0] for name in content}
    for name in wanted:
        if not (folder / name).is_symlink():
            (folder / name).symlink_to(f"..data/{name}")
    for entry in folder.iterdir():
        if entry.is_symlink() and entry.name != "..data" and entry.name not in wanted:
            entry.unlink()
