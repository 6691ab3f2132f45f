"""Directories that somebody else could put something into, or put others in their place: they are not used.

What lies in them is run, or read back as one's own: environments, packages, modules, the state of tasks. Users are
told apart by their numbers: trusted are root, this user, and whoever owns this user's home directory, which may have
another number where it is mounted from elsewhere.
"""

from __future__ import annotations

import errno
import os
import pwd
import stat

TYPE_CHECKING = False  # importing typing would cost more than the rest of the module
if TYPE_CHECKING:
    from typing import List

_MOST_LINKS = 40


class _Directory:
    """A directory on the way to another one; `closed`: nobody else gets into it, whatever is in it lets them do."""

    def __init__(self, path: str, inode: os.stat_result, closed: bool) -> None:
        self.path, self.inode, self.closed = path, inode, closed


def check(path: str, trust_group: bool = False) -> None:
    """Check that nobody else can replace a directory, or put something into it.

    On the way to it, through links as well, there may be directories of other users, but none that others may write to
    without a sticky bit; and in one with a sticky bit what leads on must be a trusted user's. Such a bit does not help
    the directory itself: others could not replace what is there, but add a module that is imported from there.

    Args:
        path: The directory; it exists.
        trust_group: Take the members of groups that may write to one for trusted.

    Raises:
        PermissionError: Somebody else could; `strerror` says how, and what to do.
        OSError: It cannot be found out.
    """
    users = Users(trust_group)
    way = [_Directory("/", os.stat("/"), False)]
    links, left = 0, _parts(os.path.abspath(path))
    while left:
        part, here = left.pop(), way[-1]
        if part == "..":  # of a link
            way = way[:-1] or way
            continue
        users.check_writers(here)
        entry = os.path.join(here.path, part)
        inode = os.lstat(entry)
        if here.inode.st_mode & stat.S_ISVTX and _writable(here.inode) and inode.st_uid not in users.trusted:
            raise _refusal("another user has made it, and could replace what is in it; choose another", entry)
        if stat.S_ISLNK(inode.st_mode):
            links += 1
            if links > _MOST_LINKS:
                raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), path)
            target = os.readlink(entry)
            left += _parts(target)
            way = way[:1] if target.startswith("/") else way
        elif stat.S_ISDIR(inode.st_mode):
            way.append(_Directory(entry, inode, here.closed or users.keep_out(inode)))
        else:
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), entry)
    users.check_owner(way[-1])
    users.check_writers(way[-1], is_used=True)


def make(path: str, mode: int, trust_group: bool = False) -> bool:
    """Make a directory, and those above it, with this mode whatever the umask lets through; check it as `check` does.

    Returns:
        Whether it was made.

    Raises:
        PermissionError: Somebody else could put something into it.
        OSError: It cannot be made.
    """
    path = os.path.abspath(path)
    made = _make(path, mode)
    check(path, trust_group)
    return made


def _make(path: str, mode: int) -> bool:
    if os.path.isdir(path):
        return False
    above = os.path.dirname(path)
    if above != path and not os.path.isdir(above):
        _make(above, mode)
    try:
        os.mkdir(path, mode)
    except FileExistsError:
        if not os.path.isdir(path):
            raise
        return False
    return True


def _parts(path: str) -> List[str]:
    return [part for part in reversed(path.split("/")) if part not in ("", ".")]


def _writable(inode: os.stat_result) -> bool:
    return bool(inode.st_mode & (stat.S_IWGRP | stat.S_IWOTH))


class Users:
    """The users who are trusted.

    Attributes:
        trusted: The numbers of users.
    """

    def __init__(self, trust_group: bool) -> None:
        self._user = os.geteuid()
        self._trust_group = trust_group
        self.trusted = {0, self._user}
        try:
            self.trusted.add(os.stat(pwd.getpwuid(self._user).pw_dir).st_uid)
        except (KeyError, OSError):
            pass  # it has no home directory

    def trusts(self, group: int) -> bool:
        """Return whether all members of a group are trusted, as where each user has a group of their own."""
        if self._trust_group:
            return True
        import grp

        try:
            known, found = pwd.getpwuid(self._user), grp.getgrgid(group)
        except KeyError:
            return False
        return known.pw_gid == group and found.gr_name == known.pw_name and set(found.gr_mem) <= {known.pw_name}

    def keep_out(self, inode: os.stat_result) -> bool:
        """Return whether only trusted users get into a directory."""
        if inode.st_uid not in self.trusted or inode.st_mode & stat.S_IXOTH:
            return False
        return not inode.st_mode & stat.S_IXGRP or self.trusts(inode.st_gid)

    def check_writers(self, directory: _Directory, is_used: bool = False) -> None:
        """Refuse a directory in which others can replace what is there, or, if it `is_used`, add something."""
        mode = directory.inode.st_mode
        sticky = bool(mode & stat.S_ISVTX)
        if directory.closed or (sticky and not is_used):
            return
        if mode & stat.S_IWOTH:
            who, change = "everybody", "chmod o-w forbids that"
        elif mode & stat.S_IWGRP and not self.trusts(directory.inode.st_gid):
            who, change = "its group", "chmod g-w forbids that; LAZYCLUSTER_TRUST_GROUP=1 on the manager allows it"
        else:
            return
        if sticky:
            why = "{} may write to it, and could put something into it; choose one of your own in it".format(who)
        else:
            why = "{} may write to it, and could replace what is in it ({})".format(who, change)
        raise _refusal(why, directory.path)

    def check_owner(self, directory: _Directory) -> None:
        """Refuse a directory of another user; the group that he shares it with may be trusted."""
        inode = directory.inode
        shared = self._trust_group and inode.st_mode & stat.S_IWGRP
        if inode.st_uid in self.trusted or (shared and inode.st_gid in (os.getegid(), *os.getgroups())):
            return
        raise _refusal("it is another user's, who could replace what is in it", directory.path)


def _refusal(why: str, path: str) -> PermissionError:
    return PermissionError(errno.EPERM, why, path)
