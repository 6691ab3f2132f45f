"""The file systems of a throw-away host, as its first process sets them up."""

import ctypes
import os

MS_RDONLY, MS_NOSUID, MS_NODEV, MS_REMOUNT, MS_BIND, MS_REC, MS_PRIVATE = 1, 2, 4, 32, 4096, 16384, 1 << 18

libc = ctypes.CDLL(None, use_errno=True)


def check(result, what):
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")


def mount(source, target, kind=None, flags=0, data=None):
    arguments = [value.encode() if isinstance(value, str) else value for value in (source, target, kind, data)]
    check(libc.mount(arguments[0], arguments[1], arguments[2], ctypes.c_ulong(flags), arguments[3]), f"mount {target}")


def write(path, text, mode=0o644):
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode), "w") as file:
        file.write(text)


def furnish(spec):
    """Give the host file systems of its own: /tmp, /run, homes, accounts; the rest is the machine's, read only."""
    mount("none", "/", flags=MS_REC | MS_PRIVATE)
    masked = [path for path in spec["tmpfs"] if os.path.isdir(path)]
    kept = [path for path in spec["visible"] if is_below(path, masked) and os.path.isdir(path)]
    # Opened before they are hidden, and before anything is read only.
    descriptors = {path: os.open(path, os.O_PATH) for path in [*kept, *filter(None, [spec["shared_home"]])]}
    mount("none", "/", flags=MS_REMOUNT | MS_BIND | MS_RDONLY)
    for path in masked:
        mount("tmpfs", path, "tmpfs", MS_NOSUID | MS_NODEV, spec["tmpfs"][path])
    for path in kept:
        os.makedirs(path, exist_ok=True)
        mount(f"/proc/self/fd/{descriptors[path]}", path, flags=MS_BIND)
    for path in filter(os.path.isdir, spec["hidden"]):
        mount("tmpfs", path, "tmpfs", MS_RDONLY, "mode=0755")
    mount("proc", "/proc", "proc")
    os.makedirs("/run/sshd", 0o755)
    os.makedirs("/run/host", 0o755)
    for name, (mode, text) in spec["files"].items():
        write(f"/run/host/{name}", text, mode)
    for name in ("passwd", "group", "shadow", "hosts"):
        if os.path.exists(f"/etc/{name}"):
            mount(f"/run/host/{name}", f"/etc/{name}", flags=MS_BIND)
    if spec["tools"]:
        link_tools("/run/host/bin")
        hide_interpreters("/usr/bin", "/usr/local/bin")
    for user in spec["users"]:
        make_home(user, descriptors.get(spec["shared_home"]) if user["shares"] else None)


def is_below(path, folders):
    return any(path == folder or path.startswith(folder + "/") for folder in folders)


def make_home(user, shared):
    """Make a home directory: a file system of its own, or the one that hosts share (a file descriptor)."""
    home, owner = user["home"], (user["uid"], user["gid"])
    os.makedirs(home, 0o700, exist_ok=True)
    if shared is not None:
        mount(f"/proc/self/fd/{shared}", home, flags=MS_BIND)
        mount("none", home, flags=MS_REMOUNT | MS_BIND)
    elif user["home_options"]:
        mount("tmpfs", home, "tmpfs", MS_NOSUID | MS_NODEV, user["home_options"])
    os.chown(home, *owner)
    for name, text in user["files"].items():
        path = os.path.join(home, name)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        write(path, text)
    for folder, _, names in os.walk(home) if user["files"] else ():
        for path in [folder, *(os.path.join(folder, name) for name in names)]:
            os.chown(path, *owner, follow_symlinks=False)


def hide_interpreters(*folders):
    """Make what the machine has of Python unusable, for a host that has none at all."""
    for entry in [entry for folder in folders for entry in os.scandir(folder)]:
        if entry.name.startswith("python") and entry.is_file(follow_symlinks=False):
            mount("/dev/null", entry.path, flags=MS_BIND)


def link_tools(folder):
    """A directory of links to the machine's programs, without any Python, for a host that has none on its PATH."""
    os.makedirs(folder)
    for source in ("/bin", "/usr/bin"):
        for entry in os.scandir(source):
            if not entry.name.startswith(("python", "pypy", "pydoc")) and not os.path.lexists(f"{folder}/{entry.name}"):
                os.symlink(entry.path, f"{folder}/{entry.name}")
