"""Python environments on hosts that have no network but the manager's, and other versions of Python."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lazycluster import EnvironmentSpec, LocalRuntime, Runtime, RuntimeGroup, RuntimeTask
from lazycluster.exceptions import EnvironmentBuildError, TaskExecutionError
from wheelhouse import Index, make_project, serve

pytest.importorskip("uv")

_ROOT = "~/.cache/lazycluster"


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Index]:
    """An index that the manager's uv is configured to use, and nothing else."""
    config = tmp_path / "uv.toml"
    config.write_text("")
    monkeypatch.setenv("UV_CACHE_DIR", str(tmp_path / "uv-cache"))
    monkeypatch.setenv("UV_CONFIG_FILE", str(config))
    for name in ("UV_INDEX", "UV_EXTRA_INDEX_URL", "UV_FIND_LINKS", "UV_INDEX_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with serve(tmp_path / "index") as served:
        monkeypatch.setenv("UV_DEFAULT_INDEX", served.url)
        yield served


def _connect(host: Any, environment: Any, **options: Any) -> Runtime:
    return Runtime(
        host.name, connection_kwargs={"config_file": host._pool.config_file}, environment=environment, **options
    )


def _version(name: str) -> Any:
    return importlib.import_module(name).VERSION


def _envs(host: Any, user: str | None = None) -> list[str]:
    folder = host.path(f"{_ROOT}/envs")
    return sorted(path.name for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []


def _everything(host: Any) -> str:
    """All files of the user's cache, in one text."""
    return host.run(f"find {host.home} -type f -size -200k -print0 | xargs -0 cat -v").stdout


def test_functions_and_commands_run_in_it(make_hosts: Any, index: Index) -> None:
    index.add("alpha", "1.0", requires=("beta>=2",), scripts={"say-alpha": "alpha:main"})
    index.add("beta", "2.5")
    host = make_hosts(1)[0]
    with _connect(host, ["alpha"]) as runtime:
        assert runtime.environment_path is None
        assert runtime.call(_version, "beta") == "2.5"
        prefix = runtime.environment_path
        assert prefix == f"{host.home}/.cache/lazycluster/envs/{_envs(host)[0]}"
        assert runtime.call(lambda: sys.prefix) == prefix
        task = RuntimeTask().run_command("say-alpha; command -v python; echo $VIRTUAL_ENV")
        runtime.execute_task(task, execute_async=False)
        assert task.execution_log[0].splitlines() == ["1.0", f"{prefix}/bin/python", prefix]


def test_it_is_found_the_next_time(make_hosts: Any, index: Index) -> None:
    index.add("alpha")
    host = make_hosts(1)[0]
    with _connect(host, ["alpha"]) as runtime:
        runtime.prepare()
    asked = len(index.requests)
    with _connect(host, ["alpha"]) as runtime:
        runtime.prepare()
        assert runtime.call(_version, "alpha") == "1.0"
    assert len(index.requests) == asked
    assert len(_envs(host)) == 1


def test_the_right_python_is_found_wherever_it_is(make_hosts: Any, index: Index) -> None:
    index.add("alpha")
    version = f"{sys.version_info[0]}.{sys.version_info[1]}"
    other = "3.8" if version != "3.8" else "3.9"
    hosts = make_hosts(1, python=other, path=(sys.base_prefix,))
    host = hosts[0]
    # Where nobody would look for it, and not on the PATH.
    host.run(f"mkdir -p ~/deep/below && ln -s {sys.base_prefix} ~/deep/below/{version}", user=host.user)
    with _connect(host, ["alpha"], setup="export PATH=/usr/bin:/bin") as runtime:
        assert runtime.call(lambda: sys.version_info[:2]) == sys.version_info[:2]
        assert runtime.call(_version, "alpha") == "1.0"
        assert ".".join(map(str, runtime.connection.hello.python[:2])) == other


def test_all_hosts_at_once(hosts: Any, index: Index) -> None:
    index.add("alpha")
    with RuntimeGroup(
        hosts=list(hosts.names), connection_kwargs={"config_file": hosts.config_file}, environment=["alpha"]
    ) as group:
        group.prepare()
        assert set(group.call(_version, "alpha").values()) == {"1.0"}
        assert sorted(group.map(_version, ["alpha"] * 5)) == ["1.0"] * 5
    # Once by uv, for what it requires, and once to be sent to all.
    assert sum("alpha-1.0" in path for path in index.requests if path.startswith("/files")) <= 2


def test_credentials_stay_on_the_manager(make_hosts: Any, index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    index.add("alpha")
    index.login = "me:s3cret-token"
    monkeypatch.setenv("UV_DEFAULT_INDEX", index.url)
    host = make_hosts(1)[0]
    with _connect(host, ["alpha"]) as runtime:
        assert runtime.call(_version, "alpha") == "1.0"
    assert "s3cret" not in _everything(host)
    state = Path(os.environ["XDG_STATE_HOME"])
    for path in state.rglob("*"):
        assert not path.is_file() or b"s3cret" not in path.read_bytes()


def test_a_refusing_index_is_named_without_its_password(
    make_hosts: Any, index: Index, monkeypatch: pytest.MonkeyPatch
) -> None:
    index.login = "me:right"
    monkeypatch.setenv("UV_DEFAULT_INDEX", index.url.replace("right", "wr0ng"))
    with _connect(make_hosts(1)[0], ["alpha"]) as runtime:
        with pytest.raises(EnvironmentBuildError, match="credentials") as caught:
            runtime.prepare()
        assert "wr0ng" not in str(caught.value)
        assert "host1" in str(caught.value)


def test_local_runtimes_have_environments_too(index: Index, tmp_path: Path) -> None:
    index.add("alpha")
    spec = EnvironmentSpec(["alpha"], cache_dir=str(tmp_path / "cache"))
    with LocalRuntime(environment=spec) as runtime:
        assert runtime.call(_version, "alpha") == "1.0"


def test_a_task_says_why_there_is_no_environment(make_hosts: Any, index: Index) -> None:
    host = make_hosts(1)[0]
    with (
        _connect(host, ["no-such-package"]) as runtime,
        pytest.raises(TaskExecutionError, match="no package no-such-package") as caught,
    ):
        runtime.call(_version, "alpha")
    assert isinstance(caught.value.__cause__, EnvironmentBuildError)
    assert caught.value.__cause__.package == "no-such-package"


def test_a_local_package_is_built_and_built_again_when_it_changes(
    make_hosts: Any, index: Index, tmp_path: Path
) -> None:
    index.add("beta")
    project = make_project(tmp_path, "mine", "VERSION = 'first'\n", requires=("beta",))
    host = make_hosts(1)[0]
    with _connect(host, [str(project)]) as runtime:
        assert runtime.call(_version, "mine") == "first"
        assert runtime.call(_version, "beta") == "1.0"
        (project / "src/mine/__init__.py").write_text("VERSION = 'second'\n")
        runtime.prepare()
        assert runtime.call(_version, "mine") == "second"


def test_files_say_what_is_in_it(make_hosts: Any, index: Index, tmp_path: Path) -> None:
    for version in ("1.0", "2.0"):
        index.add("alpha", version)
    index.add("extra")
    host = make_hosts(1)[0]
    requirements = tmp_path / "requirements.txt"
    (tmp_path / "more.txt").write_text("extra\n")
    requirements.write_text("alpha<2\n-r more.txt\n")
    project = tmp_path / "project" / "pyproject.toml"
    project.parent.mkdir()
    project.write_text(
        '[project]\nname = "thing"\nversion = "1"\nrequires-python = ">=3.8"\ndependencies = ["alpha>=2"]\n'
        '[project.optional-dependencies]\nmore = ["extra"]\n'
    )
    lock = tmp_path / "pylock.toml"
    uv = [sys.executable, "-m", "uv"]
    subprocess.run([*uv, "pip", "compile", "-q", "--no-header", "-o", lock, requirements], check=True)
    subprocess.run([*uv, "lock", "-q", "--directory", project.parent], check=True)
    expected = {
        str(requirements): ("1.0", True),
        EnvironmentSpec(project, extras=["more"]): ("2.0", True),
        str(project.with_name("uv.lock")): ("2.0", False),
        str(lock): ("1.0", True),
    }
    for source, (version, has_extra) in expected.items():
        with _connect(host, source) as runtime:
            assert runtime.call(_version, "alpha") == version
            there = RuntimeTask().run_command("python -c 'import extra' 2>/dev/null && echo yes || echo no")
            runtime.execute_task(there, execute_async=False)
            assert there.execution_log[0].strip() == ("yes" if has_extra else "no")


def test_an_environment_that_is_on_the_host_is_used(make_hosts: Any) -> None:
    host = make_hosts(1)[0]
    host.run(f"{sys.base_prefix}/bin/python3 -m venv --without-pip ~/mine", user=host.user)
    with _connect(host, "~/mine") as runtime:
        assert runtime.call(lambda: sys.prefix) == f"{host.home}/mine"
        assert runtime.environment_path == f"{host.home}/mine"
    with _connect(host, "~/mine/bin/python") as runtime:
        assert runtime.call(lambda: sys.prefix) == f"{host.home}/mine"
    gone = pytest.raises(EnvironmentBuildError, match="there is no /home/lazy/nothing/there on the host")
    with _connect(host, "~/nothing/there") as runtime, gone:
        runtime.prepare()
