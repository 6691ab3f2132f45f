"""`environment="manager"` where no index can be reached: from what was fetched before, and what is installed."""

from __future__ import annotations

import csv
import logging
import shutil
import socket
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import pytest
from environment_hosts import ROOT, connect, environments, version_of

from lazycluster import RuntimeTask
from lazycluster.agent.environments import LOCK_FILE
from lazycluster.exceptions import EnvironmentBuildError
from lazycluster.tasks import pickling  # noqa: F401  (while what it needs can be found)
from wheelhouse import Index, make_project

pytest.importorskip("uv")


def _install(monkeypatch: pytest.MonkeyPatch, prefix: Path, *packages: object) -> Path:
    """Have only some packages installed for the interpreter of the manager; returns where."""
    install = [sys.executable, "-m", "uv", "pip", "install", "-q", "--no-deps", "--prefix", prefix]
    subprocess.run([*install, *packages], check=True)
    site = prefix / "lib" / f"python{sys.version_info[0]}.{sys.version_info[1]}" / "site-packages"
    library = [path for path in sys.path if "site-packages" not in path]
    monkeypatch.setattr(sys, "path", [str(site), *library])
    return site


def _copy_installed(name: str, site: Path) -> None:
    """Have a package installed as it is for the interpreter that runs this."""
    source = Path(sysconfig.get_paths()["purelib"])
    (info,) = source.glob(f"{name}-*.dist-info")
    for path, *_ in csv.reader((info / "RECORD").read_text().splitlines()):
        if not path.endswith(".pyc"):
            (site / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source / path, site / path)


def _disconnect(monkeypatch: pytest.MonkeyPatch, way: str = "refused") -> None:
    if way == "offline":
        monkeypatch.setenv("UV_OFFLINE", "1")
        return
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        monkeypatch.setenv("UV_DEFAULT_INDEX", f"http://127.0.0.1:{listener.getsockname()[1]}/simple/")


def _packed() -> Any:
    import msgpack

    return msgpack.unpackb(msgpack.packb([1, "two"])), msgpack.Packer.__module__


@pytest.mark.parametrize("way", ["refused", "offline"])
def test_packages_come_from_what_is_installed(
    make_hosts: Any,
    index: Index,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    way: str,
) -> None:
    index.add("alpha", scripts={"say-alpha": "alpha:main"})
    shown = "#!python\nimport sys\nprint(sys.executable)\n"
    index.add("beta", files={"beta.py": "VERSION = '1.0'\n", "beta-1.0.data/scripts/show-python": shown})
    project = make_project(tmp_path, "mine", "VERSION = 'edited'\n")
    host = make_hosts(1)[0]
    caplog.set_level(logging.INFO, "lazycluster")
    for number in range(2):  # the second time from other directories
        with monkeypatch.context() as changed:
            site = _install(changed, tmp_path / str(number), "alpha", "beta", "-e", project)
            _copy_installed("msgpack", site)
            _disconnect(changed, way)
            if number:
                changed.setenv("UV_HTTP_RETRIES", "0")
            shutil.rmtree(tmp_path / "uv-cache")  # what uv has kept is lost, too
            with connect(host, "manager") as runtime:
                assert [runtime.call(version_of, name) for name in ("alpha", "beta", "mine")] == [
                    "1.0",
                    "1.0",
                    "edited",
                ]
                assert runtime.call(_packed) == ([1, "two"], "msgpack._cmsgpack")
                task = RuntimeTask().run_command("say-alpha; show-python")
                runtime.execute_task(task, execute_async=False)
                assert task.execution_log[0].split() == ["1.0", f"{runtime.environment_path}/bin/python"]
    names = environments(host)
    locks = [host.path(f"{ROOT}/envs/{name}/{LOCK_FILE}").read_text() for name in names]
    assert len(names) == 1, "\n".join(locks)
    assert "the packages are taken from what is installed here" in caplog.text


def test_what_was_fetched_before_is_taken_first(
    make_hosts: Any, index: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("alpha", "beta"):
        index.add(name)
    host = make_hosts(1)[0]
    with index.at("127.0.0.2"):  # until the end of the block
        monkeypatch.setenv("NO_PROXY", "127.0.0.2")
        monkeypatch.setenv("UV_DEFAULT_INDEX", index.url)
        site = _install(monkeypatch, tmp_path / "prefix", "alpha", "beta")
        with connect(host, "manager") as runtime:
            runtime.prepare()
    with connect(host, "manager") as runtime:  # all is there
        assert runtime.call(version_of, "alpha") == "1.0"
    assert len(environments(host)) == 1
    host.run("rm -rf ~/.cache", user=host.user)
    for path in (tmp_path / "state").rglob("beta-*.whl"):  # as if the host had fetched it by itself
        shutil.rmtree(path.parent)
    (site / "alpha.py").write_text("VERSION = 'changed, and not to be taken'\n")
    with connect(host, "manager") as runtime:
        assert [runtime.call(version_of, name) for name in ("alpha", "beta")] == ["1.0", "1.0"]


def test_all_that_cannot_be_taken_is_named_with_the_reason(
    make_hosts: Any, index: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ["alpha", "from-conda", "without-record", "without-hash", "for-others"]
    for name in names:
        index.add(name)
    host = make_hosts(1)[0]
    site = _install(monkeypatch, tmp_path / "prefix", *names)

    def info(name: str) -> Path:
        return site / f"{name}-1.0.dist-info"

    (info("from_conda") / "INSTALLER").write_text("conda\n")
    (info("without_record") / "RECORD").unlink()
    record = info("without_hash") / "RECORD"
    record.write_text(record.read_text() + "without_hash.txt,,\n")
    wheel = info("for_others") / "WHEEL"
    wheel.write_text(wheel.read_text().replace("py3-none-any", "py3-none-manylinux_2_17_s390x"))
    _disconnect(monkeypatch)
    with connect(host, "manager") as runtime, pytest.raises(EnvironmentBuildError, match="index cannot be") as caught:
        runtime.prepare()
    text = str(caught.value)
    assert "from_conda: conda has installed it" in text
    assert "without_record: it has no RECORD" in text
    assert "without_hash: its RECORD has no hash of without_hash.txt" in text
    assert "for_others: it is compiled for manylinux_2_17_s390x, and the host is" in text
    assert "alpha" not in text
    assert "exclude=['for_others', 'from_conda', 'without_hash', 'without_record']" in text
    # Those that are left are taken, unless they are not what was installed.
    for name in names[1:]:
        shutil.rmtree(info(name.replace("-", "_")))
    (site / "alpha.py").write_text("VERSION = 'changed'\n")
    with connect(host, "manager") as runtime, pytest.raises(EnvironmentBuildError) as caught:
        runtime.prepare()
    assert f"its file {site}/alpha.py was changed after the installation" in str(caught.value)
    assert caught.value.package == "alpha"
    assert environments(host) == []


def test_an_editable_package_whose_build_needs_the_index(
    make_hosts: Any, index: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    project = make_project(tmp_path, "mine", "VERSION = 'first'\n")
    _install(monkeypatch, tmp_path / "prefix", "-e", project)
    file = project / "pyproject.toml"
    file.write_text(file.read_text().replace("requires = []", 'requires = ["backend-of-the-index"]'))
    _disconnect(monkeypatch)
    monkeypatch.setenv("UV_HTTP_RETRIES", "0")
    host = make_hosts(1)[0]
    with connect(host, "manager") as runtime:  # what it needs is here, as it happens
        assert runtime.call(version_of, "mine") == "first"
    file.write_text(file.read_text().replace('build-backend = "backend"', 'build-backend = "backend_of_the_index"'))
    with (
        connect(host, "manager") as runtime,
        pytest.raises(EnvironmentBuildError, match="what building it needs is not installed here") as caught,
    ):
        runtime.prepare()
    assert caught.value.package == "mine"
    assert "install what the build-system of mine requires" in caught.value.hint


def test_requirements_still_need_it(make_hosts: Any, index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    _disconnect(monkeypatch)
    monkeypatch.setenv("UV_HTTP_RETRIES", "0")
    with (
        connect(make_hosts(1)[0], ["alpha"]) as runtime,
        pytest.raises(EnvironmentBuildError, match="the index cannot be reached"),
    ):
        runtime.prepare()
