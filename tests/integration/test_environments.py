"""Python environments on hosts that have no network but the manager's, and other versions of Python."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from environment_hosts import ROOT, connect, environments, everything, version_of

from lazycluster import Environment, EnvironmentSpec, LocalRuntime, RuntimeGroup, RuntimeTask
from lazycluster.exceptions import EnvironmentBuildError, TaskExecutionError
from wheelhouse import Index, make_project

pytest.importorskip("uv")


def test_functions_and_commands_run_in_it(make_hosts: Any, index: Index) -> None:
    index.add("alpha", "1.0", requires=("beta>=2",), scripts={"say-alpha": "alpha:main"})
    index.add("beta", "2.5")
    host = make_hosts(1)[0]
    with connect(host, ["alpha"]) as runtime:
        assert runtime.environment_path is None
        assert runtime.call(version_of, "beta") == "2.5"
        prefix = runtime.environment_path
        assert prefix == f"{host.home}/.cache/lazycluster/envs/{environments(host)[0]}"
        assert runtime.call(lambda: sys.prefix) == prefix
        task = RuntimeTask().run_command("say-alpha; command -v python; echo $VIRTUAL_ENV")
        runtime.execute_task(task, execute_async=False)
        assert task.execution_log[0].splitlines() == ["1.0", f"{prefix}/bin/python", prefix]


def test_it_is_found_the_next_time(make_hosts: Any, index: Index) -> None:
    index.add("alpha")
    host = make_hosts(1)[0]
    with connect(host, ["alpha"]) as runtime:
        runtime.prepare()
    asked = len(index.requests)
    with connect(host, ["alpha"]) as runtime:
        runtime.prepare()
        assert runtime.call(version_of, "alpha") == "1.0"
    assert len(index.requests) == asked
    assert len(environments(host)) == 1


@pytest.mark.parametrize("other", ["3.8", "3.9"])
def test_the_right_python_is_found_wherever_it_is(make_hosts: Any, index: Index, other: str) -> None:
    index.add("alpha")
    version = f"{sys.version_info[0]}.{sys.version_info[1]}"
    hosts = make_hosts(1, python=other, path=(sys.base_prefix,))
    host = hosts[0]
    # Where nobody would look for it, and not on the PATH.
    host.run(f"mkdir -p ~/deep/below && ln -s {sys.base_prefix} ~/deep/below/{version}", user=host.user)
    with connect(host, ["alpha"], setup="export PATH=/usr/bin:/bin") as runtime:
        assert runtime.call(lambda: sys.version_info[:2]) == sys.version_info[:2]
        assert runtime.call(version_of, "alpha") == "1.0"
        assert ".".join(map(str, runtime._connection.agent_info.python[:2])) == other


def test_all_hosts_at_once(hosts: Any, index: Index) -> None:
    index.add("alpha")
    with RuntimeGroup(
        hosts=list(hosts.names), connection_kwargs={"config_file": hosts.config_file}, environment=["alpha"]
    ) as group:
        group.prepare()
        assert set(group.call(version_of, "alpha").values()) == {"1.0"}
        assert sorted(group.map(version_of, ["alpha"] * 5)) == ["1.0"] * 5
    # Once by uv, for what it requires, and once to be sent to all.
    assert sum("alpha-1.0" in path for path in index.requests if path.startswith("/files")) <= 2


def test_credentials_stay_on_the_manager(make_hosts: Any, index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    index.add("alpha")
    index.login = "me:s3cret-token"
    monkeypatch.setenv("UV_DEFAULT_INDEX", index.url)
    host = make_hosts(1)[0]
    with connect(host, ["alpha"]) as runtime:
        assert runtime.call(version_of, "alpha") == "1.0"
    assert "s3cret" not in everything(host)
    kept = [path for path in Path(Environment.main_directory, "environments").rglob("*") if path.is_file()]
    assert kept
    assert not [path for path in kept if b"s3cret" in path.read_bytes()]


def test_a_refusing_index_is_named_without_its_password(
    make_hosts: Any, index: Index, monkeypatch: pytest.MonkeyPatch
) -> None:
    index.login = "me:right"
    monkeypatch.setenv("UV_DEFAULT_INDEX", index.url.replace("right", "wr0ng"))
    with connect(make_hosts(1)[0], ["alpha"]) as runtime:
        with pytest.raises(EnvironmentBuildError, match="credentials") as caught:
            runtime.prepare()
        assert "wr0ng" not in str(caught.value)
        assert "host1" in str(caught.value)


def test_local_runtimes_have_environments_too(index: Index, tmp_path: Path) -> None:
    index.add("alpha")
    spec = EnvironmentSpec(["alpha"], cache_dir=str(tmp_path / "cache"))
    with LocalRuntime(environment=spec) as runtime:
        assert runtime.call(version_of, "alpha") == "1.0"


def test_a_task_says_why_there_is_no_environment(make_hosts: Any, index: Index) -> None:
    host = make_hosts(1)[0]
    with (
        connect(host, ["no-such-package"]) as runtime,
        pytest.raises(TaskExecutionError, match="no package no-such-package") as caught,
    ):
        runtime.call(version_of, "alpha")
    assert isinstance(caught.value.__cause__, EnvironmentBuildError)
    assert caught.value.__cause__.package == "no-such-package"


def test_a_local_package_is_built_and_built_again_when_it_changes(
    make_hosts: Any, index: Index, tmp_path: Path
) -> None:
    index.add("beta")
    project = make_project(tmp_path, "mine", "VERSION = 'first'\n", requires=("beta",))
    host = make_hosts(1)[0]
    with connect(host, [str(project)]) as runtime:
        assert runtime.call(version_of, "mine") == "first"
        assert runtime.call(version_of, "beta") == "1.0"
        (project / "src/mine/__init__.py").write_text("VERSION = 'second'\n")
        runtime.prepare()
        assert runtime.call(version_of, "mine") == "second"


@pytest.mark.soak
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
        with connect(host, source) as runtime:
            assert runtime.call(version_of, "alpha") == version
            there = RuntimeTask().run_command("python -c 'import extra' 2>/dev/null && echo yes || echo no")
            runtime.execute_task(there, execute_async=False)
            assert there.execution_log[0].strip() == ("yes" if has_extra else "no")


def test_an_environment_that_is_on_the_host_is_used(make_hosts: Any) -> None:
    host = make_hosts(1)[0]
    host.run(f"{sys.base_prefix}/bin/python3 -m venv --without-pip ~/mine", user=host.user)
    with connect(host, "~/mine") as runtime:
        assert runtime.call(lambda: sys.prefix) == f"{host.home}/mine"
        assert runtime.environment_path == f"{host.home}/mine"
    with connect(host, "~/mine/bin/python") as runtime:
        assert runtime.call(lambda: sys.prefix) == f"{host.home}/mine"
    host.run("rm ~/mine/bin/python", user=host.user)  # as in a system's own prefix, such as /usr
    with connect(host, "~/mine") as runtime:
        assert runtime.call(lambda: sys.prefix) == f"{host.home}/mine"
    none = pytest.raises(EnvironmentBuildError, match="/home/lazy is not an environment: it has no bin/python")
    with connect(host, "~") as runtime, none:
        runtime.prepare()
    gone = pytest.raises(EnvironmentBuildError, match="there is no /home/lazy/nothing/there on the host")
    with connect(host, "~/nothing/there") as runtime, gone:
        runtime.prepare()


@pytest.mark.parametrize("options", [{"forwarding": False}, {"bastion": True}], ids=["no forwarding", "bastion"])
def test_however_the_host_is_reached(make_hosts: Any, index: Index, options: dict[str, Any]) -> None:
    index.add("alpha")
    with connect(make_hosts(1, **options)[0], ["alpha"]) as runtime:
        assert runtime.call(version_of, "alpha") == "1.0"


def test_hosts_that_share_a_home_make_it_once(make_hosts: Any, index: Index, caplog: pytest.LogCaptureFixture) -> None:
    index.add("alpha")
    hosts = make_hosts(3, shared_home=True)
    caplog.set_level("INFO", "lazycluster")
    with RuntimeGroup(
        hosts=list(hosts.names), connection_kwargs={"config_file": hosts.config_file}, environment=["alpha"]
    ) as group:
        assert group.call(version_of, "alpha") == dict.fromkeys(hosts.names, "1.0")
    assert sum("were sent" in line for line in caplog.messages) == 1
    assert len(environments(hosts[0])) == 1


def test_a_host_that_has_the_network_uses_it(make_hosts: Any, index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    index.add("alpha")
    index.add("beta")
    host = make_hosts(1)[0]
    index.login = "me:s3cret-token"
    monkeypatch.setenv("UV_DEFAULT_INDEX", index.url)
    with connect(host, None) as plain:
        plain.expose_port_to_runtime(index.port)  # the host can reach the index now, as if it were its own
        for environment in (["alpha"], ["alpha", "beta"]):
            spec = EnvironmentSpec(environment, network="host")
            with connect(host, spec) as runtime:
                assert runtime.call(version_of, "alpha") == "1.0"
    assert not host.path(f"{ROOT}/wheels").exists()
    assert "s3cret" not in everything(host)


def test_what_is_installed_here_is_there(
    make_hosts: Any, index: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stand-in for what is installed: from an index, editable, excluded, and a plain module."""
    for name in ("alpha", "beta", "ruff", "only-for-ruff"):
        index.add(name, requires=("only-for-ruff",) if name == "ruff" else ())
    project = make_project(tmp_path, "mine", "VERSION = 'first'\n\n\ndef version():\n    return VERSION\n", ("beta",))
    site = tmp_path / "site-packages"
    install = [sys.executable, "-m", "uv", "pip", "install", "-q", "--target", site, "alpha", "ruff", "-e", project]
    subprocess.run([*install, "--no-deps"], check=True)
    subprocess.run([*install[:8], "beta", "only-for-ruff"], check=True)
    (tmp_path / "plain.py").write_text("VALUE = 1\n")
    monkeypatch.setattr(sys, "path", [str(tmp_path), str(site), str(project / "src"), *_standard_library()])
    host = make_hosts(1)[0]

    def values() -> tuple[Any, ...]:
        import mine
        import plain

        return plain.VALUE, mine.version(), importlib.util.find_spec("ruff")

    with connect(host, "manager") as runtime:
        assert runtime.call(values) == (1, "first", None)
        assert runtime.call(version_of, "beta") == "1.0"
        task = RuntimeTask().run_command("python -c 'import mine; print(mine.VERSION)'")
        assert runtime.execute_task(task, execute_async=False).execution_log == ["first\n"]
        (tmp_path / "plain.py").write_text("VALUE = 22\n")
        (project / "src/mine/__init__.py").write_text("VERSION = 'second'\n\n\ndef version():\n    return VERSION\n")
        assert runtime.call(values) == (22, "second", None)
        runtime.prepare()
        again = runtime.execute_task(task, execute_async=False)
        assert again.execution_log == ["second\n"]


def _standard_library() -> list[str]:
    return [path for path in sys.path if "site-packages" not in path]


def test_they_are_listed_and_removed_unless_in_use(make_hosts: Any, index: Index) -> None:
    for name in ("alpha", "beta", "gamma"):
        index.add(name, ballast=200_000)
    hosts = make_hosts(1)
    kwargs = {"config_file": hosts.config_file}
    for name in ("alpha", "beta"):
        with connect(hosts[0], [name]) as runtime:
            runtime.prepare()
    with RuntimeGroup(hosts=["host1"], connection_kwargs=kwargs, environment=["gamma"]) as group:
        group.prepare()
        store = group.list_environments()["host1"]
        assert [one.source for one in store.environments if one.in_use] == ["[gamma]"]
        by_source = {one.source: one for one in store.environments}
        assert by_source["[alpha]"].packages == {"alpha": "1.0"}
        assert store.size > by_source["[alpha]"].size > 200_000
        used = by_source["[gamma]"].id
        told = group.remove_environments([by_source["[alpha]"].id, used, "py399-none"])["host1"]
        assert (told.removed, told.in_use, told.unknown) == ((by_source["[alpha]"].id,), (used,), ("py399-none",))
        pruned = group.prune_environments(size_limit=0)["host1"]
        assert pruned.removed == (by_source["[beta]"].id,)
        assert pruned.in_use == (used,)
        assert group.call(version_of, "gamma") == {"host1": "1.0"}
    assert environments(hosts[0]) == [used]


def test_what_others_keep_is_neither_listed_nor_removed(make_hosts: Any, index: Index) -> None:
    for name in ("alpha", "beta"):
        index.add(name)
    hosts = make_hosts(1)
    host = hosts[0]
    others = "envs/work/bin envs/.git wheels/mine"
    fill = f"mkdir -p {others} && for folder in {others}; do head -c 3000000 /dev/zero > $folder/file; done"

    def env(action: str, *arguments: str) -> tuple[int, str]:
        where = ["--config", str(hosts.config_file), "-w", "host1", "--cache-dir", "~"]
        argv = [sys.executable, "-m", "lazycluster", "env", action, *where, *arguments]
        done = subprocess.run(argv, capture_output=True, text=True, timeout=100)
        return done.returncode, done.stdout + done.stderr

    def files(place: str, what: str = ".") -> str:
        return str(host.run(f"cd {place} && find {what} | sort", user=host.user).stdout)

    # A directory that is not ours: nothing is made there, nothing is removed.
    host.run(f"cd ~ && {fill}", user=host.user)
    before = files("~")
    commands = ("list", "prune --size 0", "prune --unused 0m", "remove work", "build alpha")
    for command in commands:
        status, text = env(*command.split())
        assert status == 1, command
        assert "/home/lazy is not empty, and not known as a directory for environments" in text
    assert "Next step: choose another directory: --cache-dir" in text
    assert files("~") == before

    # Ours, with other things in it: those stay, and do not count.
    with connect(host, ["alpha"]) as runtime:
        runtime.prepare()
    (first,) = environments(host)
    host.run(f"cd {ROOT} && {fill}", user=host.user)
    before = files(ROOT, others)
    with connect(host, EnvironmentSpec(["beta"], size_limit=1)) as runtime:
        runtime.prepare()
    assert first not in environments(host)
    assert files(ROOT, others) == before

    # What has the name of one, but is none, makes way and stays.
    prefix = str(runtime.environment_path)
    host.run(f"rm -r {prefix} && mkdir {prefix} && touch {prefix}/mine", user=host.user)
    with connect(host, ["beta"]) as runtime:
        assert runtime.call(version_of, "beta") == "1.0"
        assert runtime.environment_path == prefix
    assert str(host.run(f"ls {prefix}.replaced-*/mine", user=host.user).stdout)


def test_on_the_command_line(make_hosts: Any, index: Index) -> None:
    index.add("alpha")
    hosts = make_hosts(2)

    def env(*arguments: str) -> tuple[int, str]:
        where = ["--config", str(hosts.config_file), "-w", "host[1-2]"]
        argv = [sys.executable, "-m", "lazycluster", "env", arguments[0], *where, *arguments[1:]]
        done = subprocess.run(argv, capture_output=True, text=True, timeout=100)
        return done.returncode, done.stdout + done.stderr

    status, path = env("build", "alpha")
    assert status == 0
    name = path.strip().rpartition("/")[2]
    assert environments(hosts[0]) == environments(hosts[1]) == [name]
    status, text = env("list", "--json")
    assert [store["environments"][0]["packages"] for store in json.loads(text)] == [{"alpha": "1.0"}] * 2
    status, text = env("list")
    assert (status, text.count(name), text.count("1 package ")) == (0, 2, 2)
    assert env("prune", "--unused", "1d", "--size", "10G")[0] == 0
    assert env("remove", name, "py399-none") == (
        1,
        "".join(f"{host}: 1 removed\n  py399-none is not there\n" for host in ("host1", "host2")),
    )
    assert environments(hosts[0]) == environments(hosts[1]) == []
    status, text = env("build", "no-such-package")
    assert status == 1
    assert "host1" in text
    assert "no package no-such-package" in text
