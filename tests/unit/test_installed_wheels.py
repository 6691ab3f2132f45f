"""Wheels made from installed files: the same content, wherever they are installed; what does not fit is refused."""

from __future__ import annotations

import csv
import importlib.metadata
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import replace
from pathlib import Path

import pytest

from lazycluster.environments.installed_wheels import (
    RepackError,
    elf_requirements,
    installed_digest,
    make_wheel,
    read_installed,
)
from lazycluster.environments.plan import LockedPackage, Target

_SITE = Path(sysconfig.get_paths()["purelib"])
_HERE = Target(sys.version_info[:2], "linux", "x86_64", "glibc", "2.36")


def _info(name: str) -> Path:
    found = sorted(_SITE.glob(f"{name}-*.dist-info"))
    if not found or sys.platform != "linux":
        pytest.skip(f"{name} is not installed here, or this is no Linux")
    return found[0]


def _target() -> Target:
    return replace(_HERE, machine=sysconfig.get_platform().rpartition("-")[2])


def _copied(name: str, folder: Path) -> Path:
    """Copy an installed package; returns its directory of metadata."""
    info = _info(name)
    for path, *_ in csv.reader((info / "RECORD").read_text().splitlines()):
        if path.startswith("..") or path.endswith(".pyc"):
            continue
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(_SITE / path, folder / path)
    return folder / info.name


@pytest.mark.parametrize("name", ["charset_normalizer", "msgpack", "ipykernel", "cloudpickle"])
def test_what_is_installed_from_it_is_what_was_installed(tmp_path: Path, name: str) -> None:
    pytest.importorskip("uv")
    info = _info(name)
    locked = LockedPackage(name, importlib.metadata.version(name), installed=str(info))
    wheels = []
    for number in range(2):
        (tmp_path / str(number)).mkdir()
        wheels.append(make_wheel(locked, _target(), tmp_path / str(number)))
    assert wheels[0].name == wheels[1].name
    assert wheels[0].read_bytes() == wheels[1].read_bytes()
    prefix = tmp_path / "prefix"
    install = [sys.executable, "-m", "uv", "pip", "install", "-q", "--offline", "--no-deps", "--prefix", prefix]
    subprocess.run([*install, wheels[0]], check=True)
    site = prefix / _SITE.relative_to(sys.prefix)
    for path, *_ in csv.reader((info / "RECORD").read_text().splitlines()):
        if path.endswith((".pyc", "INSTALLER", "REQUESTED", "RECORD", "direct_url.json")):
            continue
        installed = (site / path).read_bytes()
        assert installed == (_SITE / path).read_bytes() or path.startswith("../../../bin/"), path
    again = read_installed(site / info.name, _target())
    assert installed_digest(again) == installed_digest(read_installed(info, _target()))


def test_what_a_compiled_file_needs(tmp_path: Path) -> None:
    compiled = next((_info("msgpack").parent / "msgpack").glob("_cmsgpack*.so"))
    needs = elf_requirements(compiled)
    assert needs is not None
    assert "libc.so.6" in needs.libraries
    assert (2, 2) <= needs.glibc < (3, 0)
    assert elf_requirements(Path(__file__)) is None
    for size in (5, 60, 300, 5000):
        damaged = tmp_path / f"damaged{size}.so"
        damaged.write_bytes(compiled.read_bytes()[:size])
        with pytest.raises(ValueError, match="is damaged"):
            elf_requirements(damaged)


def test_compiled_code_that_no_tag_vouches_for_is_looked_at(tmp_path: Path) -> None:
    """As what was built on this machine: its needs are in the files only."""
    info = _copied("msgpack", tmp_path)
    wheel, target = info / "WHEEL", _target()
    lines = [line for line in wheel.read_text().splitlines() if not line.startswith("Tag:")]
    tag = f"cp{sys.version_info[0]}{sys.version_info[1]}"
    wheel.write_text("\n".join([*lines, f"Tag: {tag}-{tag}-linux_{target.machine}"]) + "\n")
    assert read_installed(info, target).filename.endswith(f"{tag}-{tag}-linux_{target.machine}.whl")
    with pytest.raises(RepackError, match=r"needs glibc 2\.\d+, and the host has 2.1"):
        read_installed(info, replace(target, libc_version="2.1"))
    with pytest.raises(RepackError, match="is compiled for"):
        read_installed(info, replace(target, libc="musl"))
    with pytest.raises(RepackError, match="is compiled for linux_"):
        read_installed(info, replace(target, machine="riscv64"))
    with pytest.raises(RepackError, match=rf"it is for {tag}, and the host's Python is 3\.99"):
        read_installed(info, replace(target, python=(3, 99)))
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("there is no C compiler")
    (tmp_path / "own.c").write_text("int own(void) { return 1; }\n")
    library, user = tmp_path / "libown.so", next((tmp_path / "msgpack").glob("_cmsgpack*.so"))
    subprocess.run(
        [compiler, "-shared", "-fPIC", "-Wl,-soname,libown.so.3", "own.c", "-o", library], cwd=tmp_path, check=True
    )
    link = ["-Wl,--no-as-needed", "own.c", library]
    subprocess.run([compiler, "-shared", "-fPIC", *link, "-o", user], cwd=tmp_path, check=True)
    with pytest.raises(RepackError, match=r"is linked against libown\.so\.3, which is not part of it"):
        read_installed(info, target)


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        ("INSTALLER", "conda\n", "conda has installed it"),
        ("INSTALLER", "debian\n", "debian has installed it"),
        ("WHEEL", None, "no file WHEEL"),
        ("WHEEL", "Wheel-Version: 1.0\n", "does not say what it fits"),
        ("RECORD", None, "no RECORD"),
        ("RECORD", "/etc/hosts,sha256=x,1\n", "files in other places: /etc/hosts"),
        ("RECORD", "../../../../../../../../etc/hosts,sha256=x,1\n", "files in other places: "),
        ("RECORD", "msgpack/__init__.py,md5=x,1\n", "no hash of msgpack/__init__.py"),
        ("RECORD", "msgpack/__init__.py\n", "no hash of msgpack/__init__.py"),
        ("entry_points.txt", "no section\n", "entry_points.txt cannot be read"),
    ],
)
def test_what_is_refused(tmp_path: Path, file: str, content: str | None, words: str) -> None:
    site = tmp_path / "lib" / "python3" / "site-packages"
    info = _copied("msgpack", site)
    (info / file).unlink(missing_ok=True)
    if content is not None:
        (info / file).write_text(content)
    with pytest.raises(RepackError, match=words):
        read_installed(info, _target())


def test_what_the_system_has_installed_is_refused(tmp_path: Path) -> None:
    info = _copied("msgpack", tmp_path / "dist-packages")
    (info / "INSTALLER").unlink(missing_ok=True)
    with pytest.raises(RepackError, match="the system's package manager has installed it"):
        read_installed(info, _target())
