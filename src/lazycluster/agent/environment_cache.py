"""Requests about Python environments; those about all that the host keeps (list, remove, prune) are handled here."""

from __future__ import annotations

import fcntl
import os
import time

from . import environments
from .deletion import remove_tree
from .environment_program import size_of
from .environments import (
    NotOursError,
    claim,
    damage,
    is_exclusive,
    is_lock,
    is_ours,
    lock,
    read_manifest,
    remove_unfinished,
    root_of,
    unfinished,
    wheels,
)
from .offload import offload

TYPE_CHECKING = False  # importing typing would cost more than the rest of the module
if TYPE_CHECKING:
    from typing import Any, Container, Dict, Iterator, List, Optional, Sequence, Tuple

    from .session import RequestChannel


def environment(channel: RequestChannel) -> None:
    """Handle the request `environment`; `action` says what."""
    action = str(channel.params.get("action"))
    if action not in ("list", "remove", "prune", "sift"):
        environments.environment(channel)
        return
    params, root = channel.params, root_of(channel)
    try:
        claim(root)
    except NotOursError as error:
        channel.fail("value", str(error))
        return
    if action == "list":  # on some file systems it takes long
        offload(channel, lambda: list_environments(root))
    elif action == "remove":
        offload(channel, lambda: remove_environments(root, params["ids"]))
    elif action == "sift":
        offload(channel, lambda: {"removed": remove_damaged(root, params["folders"])})
    else:
        offload(channel, lambda: prune_environments(root, params.get("limit"), params.get("age")))


def kept(root: str) -> Iterator[Tuple[str, Dict[str, Any], float]]:
    """Yield (name, what is said of it, time of the last use) of each environment."""
    envs = os.path.join(root, "envs")
    for name in sorted(os.listdir(envs)) if os.path.isdir(envs) else ():
        prefix = os.path.join(envs, name)
        manifest = read_manifest(prefix) if is_ours(prefix) else None
        if manifest is not None:
            yield name, manifest, _modified(prefix + ".use") or _modified(prefix)


def _modified(path: str) -> float:
    try:
        return os.lstat(path).st_mtime
    except OSError:
        return 0.0  # there is none, or somebody else has removed it just now


def size_of_all(root: str) -> int:
    """Return the bytes of all that is ours in a root."""
    envs = os.path.join(root, "envs")
    paths = [os.path.join(envs, name) for name, _, _ in kept(root)] + [path for _, path in unfinished(envs)]
    paths += [path for _, path in wheels(root)]
    if is_exclusive(root):
        paths += [os.path.join(root, name) for name in ("cache", "python", "uv")]
    return size_of(*paths)


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
    return {"root": root, "environments": found, "now": time.time(), "size": size_of_all(root)}


def _is_used(prefix: str) -> bool:
    if not os.path.lexists(prefix + ".use"):
        return False
    fd = lock(prefix + ".use", fcntl.LOCK_EX)
    if fd is None:
        return True
    os.close(fd)
    return False


def remove_damaged(root: str, folders: Sequence[str]) -> List[str]:
    """Remove those of some packages that were sent whose content is not what it was; returns them."""
    removed = []
    for folder, path in list(wheels(root)):
        if folder in folders and any(not _has_hash(os.path.join(path, name), folder) for name in os.listdir(path)):
            remove_tree(path)
            removed.append(folder)
    return removed


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
    """Remove an environment of ours, unless it is in use; returns whether it is removed."""
    prefix = os.path.join(root, "envs", name)
    building = lock(prefix + ".build", fcntl.LOCK_EX)
    if building is None:
        return False
    try:
        using = lock(prefix + ".use", fcntl.LOCK_EX)
        if using is None:
            return False
        try:
            if is_ours(prefix):  # still: it was looked at before it was locked
                # What is half removed must not be found.
                os.rename(prefix, os.path.join(root, "envs", ".{}-removed{}".format(name, os.urandom(4).hex())))
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
    before = size_of_all(root)
    if _is_building(envs):
        limit = None  # it uses packages that no environment has yet: whoever makes it looks at the size afterwards
    for name, path in list(unfinished(envs)):  # left by a build that was killed, unless one is under way
        fd = lock(os.path.join(envs, name + ".build"), fcntl.LOCK_EX)
        if fd is not None:
            remove_tree(path)
            os.close(fd)
    removed: List[str] = []
    in_use: List[str] = []
    now = time.time()
    for name, _, last in sorted(kept(root), key=lambda found: found[2]):
        old = age is not None and now - last > age
        if old or not _fits(root, limit):
            (removed if remove(root, name) else in_use).append(name)
    if not _fits(root, limit):
        _remove_oldest_packages((), root, limit)
    return {"removed": removed, "in_use": in_use, "before": before, "after": size_of_all(root)}


def _fits(root: str, limit: Optional[int]) -> bool:
    """Return whether all together is small enough; if need be what no environment has goes first."""
    if limit is None or size_of_all(root) <= limit:
        return True
    # The cache of the installer does not count who uses what is in it, but the file system does.
    if is_exclusive(root):
        _remove_unshared(os.path.join(root, "cache", "archive-v0"))
    needed = {folder for _, manifest, _ in kept(root) for folder in manifest.get("wheels") or ()}
    return _remove_oldest_packages(needed, root, limit)


def _is_building(envs: str) -> bool:
    """Return whether an environment is being made, by this agent or another."""
    for name in os.listdir(envs) if os.path.isdir(envs) else ():
        if name.endswith(".build") and is_lock(os.path.join(envs, name)):
            fd = lock(os.path.join(envs, name), fcntl.LOCK_EX)
            if fd is None:
                return True
            os.close(fd)
    return False


def _remove_unshared(directory: str) -> None:
    for name in os.listdir(directory) if os.path.isdir(directory) else ():
        path = os.path.join(directory, name)
        if all(os.lstat(os.path.join(folder, n)).st_nlink < 2 for folder, _, names in os.walk(path) for n in names):
            remove_tree(path)


def _remove_oldest_packages(needed: Container[str], root: str, limit: Optional[int]) -> bool:
    """Remove packages that were sent, but those needed, until all is small enough; returns whether it is."""
    left = size_of_all(root)
    for path in sorted((path for folder, path in wheels(root) if folder not in needed), key=_modified):
        if limit is None or left <= limit:
            break
        left -= size_of(path)
        remove_tree(path)
    return limit is None or left <= limit
