"""Python environments that the host keeps: listed, and removed when they are not in use."""

from __future__ import annotations

import fcntl
import os
import time

from .aside import aside
from .environments import damage, lock, read_manifest, remove_tree, remove_unfinished, root_of
from .envprogram import size_of

TYPE_CHECKING = False  # importing typing would cost more than the rest of the module
if TYPE_CHECKING:
    from typing import Any, Container, Dict, Iterator, List, Optional, Sequence, Tuple

    from .session import Channel


def handle(channel: Channel, action: str) -> None:
    """Handle the request `environment` where it is about all that there are: on some file systems it takes long."""
    params, root = channel.params, root_of(channel)
    if action == "list":
        aside(channel, lambda: list_environments(root))
    elif action == "remove":
        aside(channel, lambda: remove_environments(root, params["ids"]))
    elif action == "sift":
        aside(channel, lambda: {"removed": remove_damaged(root, params["folders"])})
    else:
        aside(channel, lambda: prune_environments(root, params.get("limit"), params.get("age")))


def kept(root: str) -> Iterator[Tuple[str, Dict[str, Any], float]]:
    """Yield (name, what is said of it, time of the last use) of each environment."""
    envs = os.path.join(root, "envs")
    for name in sorted(os.listdir(envs)) if os.path.isdir(envs) else ():
        prefix = os.path.join(envs, name)
        if name.startswith(".") or not os.path.isdir(prefix):
            continue
        try:
            last = os.stat(prefix + ".use").st_mtime
        except OSError:
            last = os.stat(prefix).st_mtime
        yield name, read_manifest(prefix) or {}, last


def list_environments(root: str) -> Dict[str, Any]:
    """Return what there is."""
    found = []
    for name, manifest, last in kept(root):
        prefix = os.path.join(root, "envs", name)
        found.append(
            {
                "id": name,
                "path": prefix,
                "size": manifest.get("size"),
                "made": manifest.get("made"),
                "last_used": last,
                "in_use": _is_used(prefix),
                "python": manifest.get("python"),
                "source": manifest.get("source"),
                "packages": manifest.get("packages", {}),
                "problem": damage(prefix),
            }
        )
    return {"root": root, "environments": found, "now": time.time(), "size": size_of(root)}


def _is_used(prefix: str) -> bool:
    fd = lock(prefix + ".use", fcntl.LOCK_EX)
    if fd is None:
        return True
    os.close(fd)
    return False


def remove_damaged(root: str, folders: Sequence[str]) -> List[str]:
    """Remove those of some packages that were sent whose content is not what it was; returns them."""
    removed = []
    for folder in folders:
        place = os.path.join(root, "wheels", os.path.basename(folder))
        if any(not _has_hash(os.path.join(place, name), folder) for name in _names_in(place)):
            remove_tree(place)
            removed.append(folder)
    return removed


def _names_in(place: str) -> List[str]:
    try:
        return os.listdir(place)
    except OSError:
        return []


def _has_hash(path: str, start: str) -> bool:
    import hashlib

    digest = hashlib.sha256()
    try:
        with open(path, "rb") as file:
            for part in iter(lambda: file.read(1024 * 1024), b""):
                digest.update(part)
    except OSError:
        return False
    return digest.hexdigest().startswith(start)


def remove(root: str, name: str) -> bool:
    """Remove an environment, unless it is in use; returns whether it has gone."""
    prefix = os.path.join(root, "envs", name)
    building = lock(prefix + ".build", fcntl.LOCK_EX)
    if building is None:
        return False
    try:
        using = lock(prefix + ".use", fcntl.LOCK_EX)
        if using is None:
            return False
        try:
            aside = os.path.join(root, "envs", ".{}-removed".format(name))
            remove_tree(aside)
            if os.path.isdir(prefix):
                os.rename(prefix, aside)  # what is half removed must not be found
            remove_unfinished(os.path.join(root, "envs"), name)
        finally:
            os.close(using)
    finally:
        os.close(building)
    return True


def remove_environments(root: str, ids: Sequence[str]) -> Dict[str, Any]:
    """Remove environments by their names."""
    known = {name for name, _, _ in kept(root)}
    removed, in_use, unknown = [], [], []
    for name in ids:
        if name not in known:
            unknown.append(name)
        elif remove(root, name):
            removed.append(name)
        else:
            in_use.append(name)
    return {"removed": removed, "in_use": in_use, "unknown": unknown}


def prune_environments(root: str, limit: Optional[int], age: Optional[float]) -> Dict[str, Any]:
    """Remove environments, those used longest ago first, until all together is small enough."""
    envs = os.path.join(root, "envs")
    before = size_of(root)
    if _is_building(envs):
        limit = None  # it uses packages that no environment has yet: whoever makes it looks at the size afterwards
    for entry in os.listdir(envs) if os.path.isdir(envs) else ():
        if entry.startswith("."):  # left by a build that was killed, unless one is under way
            name = entry[1:].rpartition("-")[0]
            fd = lock(os.path.join(envs, name + ".build"), fcntl.LOCK_EX)
            if fd is not None:
                remove_tree(os.path.join(envs, entry))
                os.close(fd)
    removed: List[str] = []
    in_use: List[str] = []
    now = time.time()
    for name, _, last in sorted(kept(root), key=lambda found: found[2]):
        old = age is not None and now - last > age
        if old or not _fits(root, limit):
            (removed if remove(root, name) else in_use).append(name)
    if not _fits(root, limit):
        _remove_oldest(os.path.join(root, "wheels"), (), root, limit)
    return {"removed": removed, "in_use": in_use, "before": before, "after": size_of(root)}


def _fits(root: str, limit: Optional[int]) -> bool:
    """Whether all together is small enough; if need be what no environment has goes first."""
    if limit is None or size_of(root) <= limit:
        return True
    # The cache of the installer does not count who uses what is in it, but the file system does.
    _remove_unshared(os.path.join(root, "cache", "archive-v0"))
    needed = {folder for _, manifest, _ in kept(root) for folder in manifest.get("wheels") or ()}
    return _remove_oldest(os.path.join(root, "wheels"), needed, root, limit)


def _is_building(envs: str) -> bool:
    """Whether an environment is being made, by this agent or another."""
    for name in os.listdir(envs) if os.path.isdir(envs) else ():
        if name.endswith(".build"):
            fd = lock(os.path.join(envs, name), fcntl.LOCK_EX)
            if fd is None:
                return True
            os.close(fd)
    return False


def _remove_unshared(place: str) -> None:
    for name in os.listdir(place) if os.path.isdir(place) else ():
        path = os.path.join(place, name)
        if all(os.lstat(os.path.join(folder, n)).st_nlink < 2 for folder, _, names in os.walk(path) for n in names):
            remove_tree(path)


def _remove_oldest(place: str, needed: Container[str], root: str, limit: Optional[int]) -> bool:
    """Remove what is in a directory, but what is needed, until all is small enough; returns whether it is."""
    left = size_of(root)
    names = [name for name in os.listdir(place) if name not in needed] if os.path.isdir(place) else []
    for path in sorted((os.path.join(place, name) for name in names), key=lambda path: os.stat(path).st_mtime):
        if limit is None or left <= limit:
            break
        left -= size_of(path)
        remove_tree(path)
    return limit is None or left <= limit
