"""Commands where a shell's start-up files are slow and talk, beside a host where there are none."""

from __future__ import annotations

from collections.abc import Iterator

from harness import Row, in_turns, settings, ssh_hosts

from lazycluster import Runtime, RuntimeTask

# As much as nvm defines, and as slow as pyenv, conda and nvm together are.
_FUNCTIONS = "".join(
    f"fun_{number}() {{\n" + "".join(f'  local v{n}="${{1:-x}}"; [ -n "$v{n}" ] || echo "{n}" >&2\n' for n in range(25))
    + "}\n"
    for number in range(100)
)  # fmt: skip
_BASHRC = f'echo "noise"; echo "noise" >&2\nsleep 0.3\nexport FROM_FILE=1\n{_FUNCTIONS}'


def rows() -> Iterator[Row]:
    with (
        ssh_hosts(1) as plain,
        ssh_hosts(1, files={".bashrc": _BASHRC}) as slow,
        Runtime(plain.names[0], connection_kwargs=settings(plain)) as without,
        Runtime(slow.names[0], connection_kwargs=settings(slow)) as once,
        Runtime(slow.names[0], connection_kwargs=settings(slow), startup_files="always") as always,
    ):
        for runtime in (without, once):
            assert _output(runtime, "echo clean") == "clean\n"
        assert _output(once, "echo $FROM_FILE; fun_7; declare -F | wc -l") == "1\n100\n"
        times = in_turns(51, without=lambda: _output(without, "true"), once=lambda: _output(once, "true"))
        again = in_turns(3, always=lambda: _output(always, "true"))["always"]
    times = {name: value * 1000 for name, value in times.items()}
    yield Row(
        'run_command("true"), .bashrc of 0.3 s and 100 functions',
        times["once"],
        "ms",
        "<= 1.5 x",
        "without .bashrc",
        times["without"],
        times["once"] <= 1.5 * times["without"],
        f'startup_files="always": {again * 1000:.0f} ms',
    )


def _output(runtime: Runtime, command: str) -> str:
    task = RuntimeTask("t").run_command(command)
    runtime.execute_task(task, execute_async=False)
    return task.execution_log[0]
