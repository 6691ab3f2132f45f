"""Where environments come from, what they leave out, where packages come from, and what is done with them later."""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from environment_hosts import ROOT, connect, environments, everything, prefix, version_of

from lazycluster import EnvironmentSpec, RuntimeGroup, RuntimeTask
from lazycluster.core import event_loop
from lazycluster.environments import installed_packages
from lazycluster.environments.activation import HostEnvironment
from lazycluster.environments.cache import HostCache, list_on
from lazycluster.exceptions import EnvironmentBuildError, TaskExecutionError
from patience import until
from wheelhouse import Index, make_project

pytest.importorskip("uv")


def _git(folder: Path, *arguments: str) -> str:
    who = ["-c", "user.name=test", "-c", "user.email=test@example.invalid"]
    return subprocess.run(["git", *who, *arguments], cwd=folder, check=True, capture_output=True, text=True).stdout


def _repository(tmp_path: Path) -> tuple[Path, str]:
    """A repository with a package, and its first commit; the second has other code."""
    if shutil.which("git") is None:
        pytest.skip("git is not installed")
    project = make_project(tmp_path, "mine", "VERSION = 'first'\n")
    _git(project, "init", "--quiet")
    _git(project, "add", ".")
    _git(project, "commit", "--quiet", "-m", "first")
    commit = _git(project, "rev-parse", "HEAD").strip()
    (project / "src/mine/__init__.py").write_text("VERSION = 'second'\n")
    _git(project, "commit", "--quiet", "-a", "-m", "second")
    return project, commit


def _installed_only(monkeypatch: pytest.MonkeyPatch, folder: Path, *packages: object) -> None:
    """Have only some packages installed for the interpreter of the manager."""
    site = folder / "site-packages"
    install = [sys.executable, "-m", "uv", "pip", "install", "-q", "--no-deps", "--target", site]
    subprocess.run([*install, *packages], check=True)
    library = [path for path in sys.path if "site-packages" not in path]
    monkeypatch.setattr(sys, "path", [str(site), *library])


# --- what it is made of ---------------------------------------------------------------------------
def test_a_package_from_a_repository(
    make_hosts: Any, index: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    project, commit = _repository(tmp_path)
    host = make_hosts(1)[0]
    with connect(host, [f"mine @ git+file://{project}"]) as runtime:
        assert runtime.call(version_of, "mine") == "second"
    _installed_only(monkeypatch, tmp_path, f"mine @ git+file://{project}@{commit}")
    with connect(host, "manager") as runtime:  # the commit that is installed, not the newest
        assert runtime.call(version_of, "mine") == "first"


def test_a_token_in_the_address_of_a_repository_is_in_no_command_line(
    make_hosts: Any, index: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    project, _ = _repository(tmp_path)
    served = index.folder / "repositories/mine.git"
    _git(project, "branch", "released")
    _git(project, "clone", "--quiet", "--bare", str(project), str(served))
    _git(served, "update-server-info")
    index.login = "me:s3cret-token"
    log = tmp_path / "commands"
    for name, value in {
        "UV_DEFAULT_INDEX": index.url,
        "GIT_TRACE2_EVENT": str(log),  # git's own commands, and those that it starts, as they are
        "GIT_TRACE2_REDACT": "0",
        "TOKEN": "s3cret-token",
    }.items():
        monkeypatch.setenv(name, value)
    address = f"git+http://me:${{TOKEN}}@127.0.0.1:{index.port}/repositories/mine.git"
    requirements = tmp_path / "requirements.txt"
    requirements.write_text(f"mine @ {address}@released\n")
    host = make_hosts(1)[0]
    for environment in ([f"mine @ {address}"], requirements):
        with connect(host, environment) as runtime:
            assert runtime.call(version_of, "mine") == "second"
    commands = log.read_text()
    assert "remote-http" in commands
    assert "s3cret" not in commands
    assert "s3cret" not in everything(host)
    kept = [path for path in [*tmp_path.glob("uv-cache/**/*"), *tmp_path.glob("state/**/*")] if path.is_file()]
    assert kept
    assert not [path for path in kept if b"s3cret" in path.read_bytes()]


def test_an_environment_of_conda_on_the_host(make_hosts: Any) -> None:
    """Not made by conda, which is not here: an interpreter that knows its prefix by where it lies, and conda's mark."""
    host = make_hosts(1)[0]
    host.run(
        f"mkdir -p ~/conda/bin ~/conda/conda-meta && cp -r {sys.base_prefix}/bin/python3* ~/conda/bin/ && "
        f"ln -s {sys.base_prefix}/lib ~/conda/lib && ln -sf python3 ~/conda/bin/python && "
        "printf '#!/bin/sh\necho tool of $CONDA_PREFIX\n' > ~/conda/bin/tool && chmod +x ~/conda/bin/tool",
        user=host.user,
    )
    with connect(host, "~/conda") as runtime:
        assert runtime.call(lambda: sys.prefix) == f"{host.home}/conda"
        task = RuntimeTask().run_command("tool; echo ${VIRTUAL_ENV-none}; command -v python")
        runtime.execute_task(task, execute_async=False)
        expected = [f"tool of {host.home}/conda", "none", f"{host.home}/conda/bin/python"]
        assert task.execution_log[0].splitlines() == expected
    assert not host.path(ROOT).exists()


def test_what_is_left_out_is_said(
    make_hosts: Any, index: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    index.add("alpha", requires=("shared",))
    index.add("ruff", requires=("only-for-ruff", "shared"))
    index.add("huge", requires=("only-for-huge",))
    for name in ("only-for-ruff", "only-for-huge", "shared"):
        index.add(name)
    everything_there = ["alpha", "ruff", "huge", "only-for-ruff", "only-for-huge", "shared"]
    host = make_hosts(1)[0]
    expected = {
        None: (["ruff", "only-for-ruff"], "only_for_ruff, ruff"),
        ("huge",): (["ruff", "only-for-ruff", "huge", "only-for-huge"], "huge, only_for_huge, only_for_ruff, ruff"),
        (): ([], ""),
    }
    caplog.set_level(logging.INFO, "lazycluster")
    for number, (exclude, (without, said)) in enumerate(expected.items()):
        caplog.clear()
        installed_packages._log_once.cache_clear()
        with connect(host, EnvironmentSpec("manager", exclude)) as runtime:
            with monkeypatch.context() as changed:
                _installed_only(changed, tmp_path / str(number), *everything_there)
                runtime.prepare()
            (store,) = (one for one in _store(runtime).environments if one.in_use)
            assert set(store.packages) == set(everything_there) - set(without)
            for name in without:
                with pytest.raises(TaskExecutionError, match=r"No module named .*\n  Next step.*exclude=\[\]"):
                    runtime.call(version_of, name.replace("-", "_"))
        told = [line for line in caplog.messages if "leaves out" in line]
        assert told == ([f'environment="manager" leaves out: {said} (exclude=[] leaves out nothing)'] if said else [])


def _store(runtime: Any) -> HostCache:
    return event_loop.run(list_on(runtime._connection))


# --- where packages come from ---------------------------------------------------------------------
def test_hosts_that_reach_the_index_use_it(
    make_hosts: Any, index: Index, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    index.add("alpha")
    index.login = "me:s3cret-token"
    host = make_hosts(1)[0]
    address = host._pool.manager_address
    monkeypatch.setenv("NO_PROXY", address)
    with index.at(address):
        monkeypatch.setenv("UV_DEFAULT_INDEX", index.url)
        with connect(host, ["alpha"]) as runtime:
            runtime.prepare()  # so that the manager knows all, and asks the index for nothing
        host.run(f"rm -rf {host.home}/.cache")
        index.gate.clear()
        index.asked_by.clear()
        with connect(host, ["alpha"]) as runtime, ThreadPoolExecutor(1) as thread:
            prepared = thread.submit(runtime.prepare)
            try:
                until(lambda: f"/files/alpha-1.0-py3-none-any.whl@{host.address}" in index.asked_by, "the download")
                lines = [process.command for process in host.processes()]
                assert any(" pip install " in line for line in lines)
                assert not any("s3cret" in line for line in lines)
            finally:
                index.gate.set()
            prepared.result(60)
            assert runtime.call(version_of, "alpha") == "1.0"
        assert not host.path(f"{ROOT}/wheels").exists()
        assert "s3cret" not in everything(host)


@pytest.mark.soak
def test_hosts_that_reach_the_index_in_vain_are_sent_packages(
    make_hosts: Any, index: Index, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    index.add("alpha")
    host = make_hosts(1)[0]
    address = host._pool.manager_address
    monkeypatch.setenv("NO_PROXY", address)
    with index.at(address):
        monkeypatch.setenv("UV_DEFAULT_INDEX", index.url)
        index.refused.add(host.address)
        with caplog.at_level(logging.INFO, "lazycluster"), connect(host, ["alpha"]) as runtime:
            assert runtime.call(version_of, "alpha") == "1.0"
    assert "the manager sends them" in caplog.text
    assert host.path(f"{ROOT}/wheels").exists()


# --- how far it is --------------------------------------------------------------------------------
def test_how_far_it_is_is_told_for_each_host(hosts: Any, index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    index.add("alpha")
    stages: dict[str, list[str]] = {}
    report = HostEnvironment._report

    def note(environment: HostEnvironment, stage: str) -> None:
        report(environment, stage)
        (shown,) = environment._shown()
        stages.setdefault(environment._host.name, []).append(shown)

    monkeypatch.setattr(HostEnvironment, "_report", note)
    settings = {"config_file": hosts.config_file}
    spec = EnvironmentSpec(["alpha"], cache_dir="~/.cache/progress")
    with RuntimeGroup(hosts=list(hosts.names), connection_kwargs=settings, environment=spec) as group:
        group.prepare()
    assert set(stages) == set(hosts.names)
    for host, told in stages.items():
        assert told[0] == f"{host} (finding versions of packages)"
        assert told[-2:] == [f"{host} (installing 1 package)", f"{host} (checking)"]
        assert any(line.startswith(f"{host} (1 of 1 packages, ") for line in told)


# --- afterwards -----------------------------------------------------------------------------------
def _compiled(host: Any) -> list[Path]:
    return sorted(prefix(host).glob("lib/*/site-packages/**/*.pyc"))


def test_its_modules_are_compiled_afterwards(make_hosts: Any, index: Index) -> None:
    code = "".join(f"def function_{number}(): return {number}\n" for number in range(300))
    files = {
        "alpha/__init__.py": "VERSION = '1.0'\n" + code,
        "alpha/odd.py": "no python !\n",
        "alpha/inner/deep.py": code,
    }
    files["alpha/tests/test_alpha.py"] = code
    index.add("alpha", files=files)
    host = make_hosts(1)[0]
    with connect(host, ["alpha"]) as runtime:
        runtime.prepare()
        until(lambda: json.loads((prefix(host) / "lazycluster.json").read_text()).get("compiled"), "compiled modules")
        names = {f"{path.parent.parent.name}/{path.name.partition('.')[0]}" for path in _compiled(host)}
        assert {"alpha/__init__", "inner/deep"} <= names
        assert not {"alpha/odd", "tests/test_alpha"} & names
        size = sum(path.lstat().st_blocks * 512 for path in prefix(host).rglob("*") if not path.is_dir())
        (one,) = _store(runtime).environments
        assert abs(one.size - size) <= 8192  # the manifest itself is written after that
        assert runtime.call(version_of, "alpha") == "1.0"
    # As if it had not come to its end, since the manager may go at any time: the next one that uses it goes on.
    first, *others = _compiled(host)
    unfinished = first.rename(f"{first}.140131")
    manifest = prefix(host) / "lazycluster.json"
    told = json.loads(manifest.read_text())
    del told["compiled"]
    manifest.write_text(json.dumps(told))
    before = {path: path.stat().st_mtime_ns for path in others}
    with connect(host, ["alpha"]) as runtime:
        runtime.prepare()
        until(lambda: json.loads(manifest.read_text()).get("compiled"), "compiled modules")
        assert runtime.call(version_of, "alpha") == "1.0"
    assert first.exists()
    assert not unfinished.exists()
    assert {path: path.stat().st_mtime_ns for path in others} == before


def test_one_that_may_only_be_read_is_used(make_hosts: Any, index: Index) -> None:
    index.add("alpha")
    host = make_hosts(1)[0]
    spec = EnvironmentSpec(["alpha"], cache_dir="~/shared")
    with connect(host, spec) as runtime:
        runtime.prepare()
    host.run("cd /home/lazy && chown -R root:root shared && chmod -R go+rX,go-w shared && rm -f shared/envs/*.use")
    before = host.run("find /home/lazy/shared | sort").stdout
    with connect(host, spec) as runtime:
        assert runtime.call(version_of, "alpha") == "1.0"
        assert str(runtime.environment_path).startswith("/home/lazy/shared/envs/")
    assert host.run("find /home/lazy/shared | sort").stdout == before


def test_one_that_others_may_have_changed_is_not_used(make_hosts: Any, index: Index) -> None:
    index.add("alpha")
    host = make_hosts(1)[0]
    host.run("chmod 711 /home/lazy && mkdir -p -m 1777 /home/lazy/all")
    for mode in (0o777, 0o775):
        host.run(f"cd /home/lazy && mkdir -p {mode:o} && chown lazy:users {mode:o} && chmod {mode:o} {mode:o}")
        with (
            connect(host, EnvironmentSpec(["alpha"], cache_dir=f"/home/lazy/{mode:o}")) as runtime,
            pytest.raises(
                EnvironmentBuildError, match=rf"may write to it(.|\n)*/home/lazy/{mode:o}(.|\n)*cache_dir="
            ) as caught,
        ):
            runtime.prepare()
        assert caught.value.host == host.name
    spec = EnvironmentSpec(["alpha"], cache_dir="/home/lazy/all/mine")
    with connect(host, spec) as runtime:
        assert runtime.call(version_of, "alpha") == "1.0"
    for owner, mode in (("4242", "755"), ("lazy", "777")):
        host.run(f"chown -R {owner} /home/lazy/all/mine/envs && chmod {mode} /home/lazy/all/mine/envs")
        host.run("chmod 711 /home/lazy/all/mine")
        with connect(host, spec) as runtime, pytest.raises(EnvironmentBuildError, match="/home/lazy/all/mine/envs"):
            runtime.prepare()


@pytest.mark.soak
def test_beyond_the_size_limit_those_go_that_were_used_longest_ago(make_hosts: Any, index: Index) -> None:
    for name in ("alpha", "beta", "gamma", "delta"):
        index.add(name, ballast=4_000_000)
    host = make_hosts(1)[0]
    with connect(host, ["alpha"]) as in_use:
        in_use.prepare()
        for name in ("beta", "gamma"):
            with connect(host, [name]) as runtime:
                runtime.prepare()
        by_source = {one.source: one.id for one in _store(in_use).environments}
        stamps = {"[alpha]": 1000, "[gamma]": 2000, "[beta]": 3000}
        for source, stamp in stamps.items():
            os.utime(host.path(f"{ROOT}/envs/{by_source[source]}.use"), (stamp, stamp))
        size = _store(in_use).size
        # One more has to have room for another one's size, not more.
        with connect(host, EnvironmentSpec(["delta"], size_limit=size + 2_000_000)) as runtime:
            assert runtime.call(version_of, "delta") == "1.0"
            left = {one.source for one in _store(runtime).environments}
            assert left == {"[alpha]", "[beta]", "[delta]"}
            assert _store(runtime).size <= size + 2_000_000
        assert in_use.call(version_of, "alpha") == "1.0"
    assert len(environments(host)) == 3
