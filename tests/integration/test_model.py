"""A group and its runtimes against a simple model of them: whatever is done, in whatever order, both agree."""

from __future__ import annotations

import concurrent.futures
import os
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from lazycluster import RuntimeGroup, RuntimeTask
from lazycluster.exceptions import LazyclusterError, TaskExecutionError
from lazycluster.runtimes import LocalRuntime

_MOST = 3

names = st.sampled_from(["a", "b c", "-x", "ü", "$A"])
variables = st.sampled_from(["LC_ONE", "LC_TWO"])
values = st.text("abc $'\"\\n=", max_size=6)


def _variable(name: str) -> str | None:
    return os.environ.get(name)


def _files() -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in Path().iterdir()}


def _fail(text: str) -> None:
    raise ValueError(text)


class Model(RuleBasedStateMachine):
    """What a group is to its user: hosts that have variables and files, and tasks that come to a result once."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp())
        self.hosts: dict[str, dict[str, Any]] = {}
        self.returns: list[Any] = []
        self.failed: list[str] = []
        self.closed = False
        self.made = 0

    def _new_host(self) -> LocalRuntime:
        self.made += 1
        runtime = LocalRuntime(host=f"host{self.made}")
        self.hosts[runtime.host] = {"files": {}, "variables": {}}
        return runtime

    @initialize()
    def begin(self) -> None:
        self.group = RuntimeGroup([self._new_host(), self._new_host()])

    def teardown(self) -> None:
        try:
            if hasattr(self, "group"):
                self._agrees()
        finally:
            if hasattr(self, "group"):
                self.group.cleanup()
            for path in self.folder.iterdir():
                path.unlink()
            self.folder.rmdir()

    def _agrees(self) -> None:
        """At the end of each sequence all is compared, whatever was asked in it."""
        assert not self.group.contains_runtime("no-such-host")
        with pytest.raises(ValueError, match="no-such-host"):
            self.group.get_runtime("no-such-host")
        if not self.failed:
            assert list(self.group.function_returns) == self.returns
        if self.closed:
            return
        for name in ("LC_ONE", "LC_TWO"):
            wanted = {host: known["variables"].get(name) for host, known in self.hosts.items()}
            assert self.group.call(_variable, name) == wanted
        assert self.group.call(_files) == {host: known["files"] for host, known in self.hosts.items()}

    # --- members -------------------------------------------------------------------------------
    @precondition(lambda self: not self.closed and len(self.hosts) < _MOST)
    @rule()
    def add(self) -> None:
        self.group.add_runtime(runtime=self._new_host())

    @precondition(lambda self: not self.closed and len(self.hosts) > 1)
    @rule(data=st.data())
    def remove(self, data: st.DataObject) -> None:
        host = data.draw(st.sampled_from(sorted(self.hosts)))
        # One that executes something cannot be removed.
        concurrent.futures.wait([task.future for task in self.group.get_runtime(host).tasks])
        self.group.remove_runtime(host).cleanup()
        del self.hosts[host]

    # --- tasks ---------------------------------------------------------------------------------
    @precondition(lambda self: not self.closed)
    @rule(numbers=st.lists(st.integers(), max_size=3))
    def call(self, numbers: list[int]) -> None:
        assert self.group.call(sum, numbers) == dict.fromkeys(self.hosts, sum(numbers))

    @precondition(lambda self: not self.closed)
    @rule(data=st.data(), value=st.integers())
    def start(self, data: st.DataObject, value: int) -> None:
        host = data.draw(st.sampled_from([None, *sorted(self.hosts)]))
        task = RuntimeTask().call(abs, value)
        if data.draw(st.booleans()):
            self.group.execute_task(task, broadcast=True)
            self.returns += [abs(value)] * len(self.hosts)
        else:
            assert self.group.execute_task(task, host=host).host in ({host} if host else set(self.hosts))
            self.returns.append(abs(value))

    @precondition(lambda self: not self.closed)
    @rule(text=st.text("xyz", min_size=1, max_size=3))
    def start_what_fails(self, text: str) -> None:
        self.group.execute_task(RuntimeTask().call(_fail, text))
        self.failed.append(text)

    @rule()
    def join(self) -> None:
        """A failure is raised once, then it is known."""
        failed, self.failed = self.failed, []
        if not failed or self.closed:
            self.closed or self.group.join()
            return
        with pytest.raises(TaskExecutionError) as caught:
            self.group.join()
        for text in failed:
            assert f"ValueError: {text}" in str(caught.value)
        self.group.join()

    @precondition(lambda self: not self.failed)
    @rule()
    def collect(self) -> None:
        assert list(self.group.function_returns) == self.returns

    @precondition(lambda self: not self.closed and not self.failed)
    @rule()
    def forget(self) -> None:
        self.group.join()
        self.group.clear_tasks()
        self.returns.clear()

    # --- what hosts have -----------------------------------------------------------------------
    @precondition(lambda self: not self.closed)
    @rule(name=variables, value=values)
    def set_variable(self, name: str, value: str) -> None:
        self.group.add_env_variables({name: value})
        for host in self.hosts.values():
            host["variables"][name] = value

    @precondition(lambda self: not self.closed)
    @rule(name=variables)
    def see_variable(self, name: str) -> None:
        wanted = {host: known["variables"].get(name) for host, known in self.hosts.items()}
        assert self.group.call(_variable, name) == wanted

    @precondition(lambda self: not self.closed)
    @rule(name=names, content=st.binary(max_size=50))
    def send(self, name: str, content: bytes) -> None:
        (self.folder / "out").write_bytes(content)
        self.group.send_file(self.folder / "out", f"./{name}", execute_async=False)
        for host in self.hosts.values():
            host["files"][name] = content

    @precondition(lambda self: not self.closed)
    @rule(data=st.data(), name=names)
    def get(self, data: st.DataObject, name: str) -> None:
        host = data.draw(st.sampled_from(sorted(self.hosts)))
        runtime = self.group.get_runtime(host)
        if name in self.hosts[host]["files"]:
            runtime.get_file(f"./{name}", str(self.folder / "in"))
            assert (self.folder / "in").read_bytes() == self.hosts[host]["files"][name]
        else:
            with pytest.raises(TaskExecutionError, match="No such file"):
                runtime.get_file(f"./{name}", str(self.folder / "in"))

    # --- the end -------------------------------------------------------------------------------
    @precondition(lambda self: not self.closed and not self.failed)
    @rule(data=st.data())
    def close(self, data: st.DataObject) -> None:
        if data.draw(st.integers(0, 5)) == 0:
            self.group.join()
            self._agrees()
            self.group.cleanup()
            self.group.cleanup()
            self.closed = True

    @precondition(lambda self: self.closed)
    @rule()
    def use_what_is_closed(self) -> None:
        for use in (
            lambda: self.group.call(sum, [1]),
            lambda: self.group.execute_task(RuntimeTask().run_command("true")),
            lambda: self.group.add_runtime("x"),
            lambda: self.group.send_file(__file__),
        ):
            with pytest.raises(LazyclusterError):
                use()

    @invariant()
    def members_are_known(self) -> None:
        if hasattr(self, "group"):
            assert sorted(self.group.hosts) == sorted(self.hosts)
            assert self.group.runtime_count == len(self.hosts)
            states = {one.host: one.state for one in self.group.status}
            assert states == dict.fromkeys(self.hosts, "closed" if self.closed else "open")


@pytest.mark.parametrize(
    ("examples", "steps"),
    [(6, 20), pytest.param(40, 40, marks=[pytest.mark.soak, pytest.mark.timeout(600)])],
    ids=["the same each time", "others each time"],
)
def test_a_group_is_what_its_model_is(examples: int, steps: int) -> None:
    run_state_machine_as_test(
        Model,
        settings=settings(
            max_examples=examples,
            stateful_step_count=steps,
            deadline=None,
            derandomize=steps == 20,
            database=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
