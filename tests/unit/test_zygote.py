"""The zygote, talked to directly: what its children are like, how they end, and what it imports for them."""

from __future__ import annotations

import os
import platform
import signal
import socket
import sys
import textwrap
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from direct_zygote import DirectZygote, ready_zygote

from lazycluster.tasks.pickling import dump_call

_PYENV = Path.home() / ".pyenv" / "versions"
_PLAIN_ENV = {"PATH": os.environ["PATH"], "HOME": str(Path.home())}


def interpreter(version: str) -> str:
    found = sorted(_PYENV.glob(f"{version}.*/bin/python{version}"))
    if not found:
        pytest.skip(f"no Python {version} under pyenv")
    return str(found[0])


@pytest.fixture(scope="module")
def host() -> Iterator[DirectZygote]:
    with ready_zygote() as zygote:
        yield zygote


# --- interpreters --------------------------------------------------------------------------------
@pytest.mark.parametrize("version", ["3.8", "3.9", "3.12", "3.13"])
def test_every_python_without_anything_installed(version: str) -> None:
    with DirectZygote(interpreter(version), _PLAIN_ENV) as zygote:
        facts = zygote.facts()
        assert facts["version"][:2] == [int(part) for part in version.split(".")]
        assert zygote.give_library() == {"library": True}
        # Nothing in it is compiled, so it can be pickled for another version.
        _, outcome, out, err, status = zygote.run(dump_call(platform.python_version))
        assert outcome is not None and outcome.value.startswith(version)
        assert (out, err, status) == ("", "", 0)
        assert zygote.warm("json", "asyncio", "sqlite3")[1]["modules"]


@pytest.mark.parametrize("version", ["2.7", "3.6", "3.7"])
def test_python_that_is_too_old(version: str) -> None:
    with DirectZygote(interpreter(version), _PLAIN_ENV) as zygote:
        assert f"Python {version} is too old: 3.8 or newer is needed" in zygote.facts()["error"]


def test_ends_with_its_agent() -> None:
    zygote = ready_zygote()
    assert zygote.close() == 0


def test_installed_packages_and_interpreters(host: DirectZygote) -> None:
    description, *_ = host.run(dump_call(len), kind="packages", names=["pytest", "no-such-package"])
    fields = description["fields"]
    assert fields["version"] == list(sys.version_info[:3])
    assert fields["packages"] == {"pytest": pytest.__version__, "no-such-package": None}
    description, *_ = host.run(dump_call(len), kind="interpreters")
    found = description["fields"]["interpreters"]
    assert all(os.access(one["path"], os.X_OK) and len(one["version"]) == 3 for one in found)
    assert found


# --- the process of a call -----------------------------------------------------------------------
def test_the_process_is_like_one_of_its_own(host: DirectZygote, tmp_path: Path) -> None:
    def look() -> dict[str, Any]:
        import gc
        import os
        import signal
        import sys

        return {
            "leader": os.getsid(0) == os.getpid(),
            "cwd": os.getcwd(),
            "last": sys.path[-1],
            "marker": os.environ["LAZYCLUSTER_TASK"],
            "stdin": sys.stdin.read(),
            "main": sorted(name for name in vars(sys.modules["__main__"]) if not name.startswith("__")),
            "handlers": [signal.getsignal(signal.SIGCHLD), signal.getsignal(signal.SIGTERM)],
            "fds": len(os.listdir("/proc/self/fd")),
            "gc": gc.isenabled(),
            "argv": sys.argv,
        }

    outcome = host.run(dump_call(look), cwd=str(tmp_path), task="t-1")[1]
    seen = outcome.value
    assert seen.pop("fds") <= 5  # the three streams, the socket, the one that lists them
    assert seen == {
        "leader": True,
        "cwd": str(tmp_path),
        "last": str(tmp_path),
        "marker": "t-1",
        "stdin": "",
        "main": [],
        "handlers": [signal.SIG_DFL, signal.SIG_DFL],
        "gc": True,
        "argv": ["test_the_process_is_like_one_of_its_own.look"],
    }


def test_module_in_the_working_directory_never_hides_an_installed_one(host: DirectZygote, tmp_path: Path) -> None:
    (tmp_path / "json.py").write_text("raise ImportError\n")
    (tmp_path / "lc_sent.py").write_text("VALUE = 5\n")

    def use() -> int:
        import json

        sent = __import__("lc_sent")
        return json.loads(str(sent.VALUE))

    assert host.run(dump_call(use), cwd=str(tmp_path))[1].value == 5


def test_working_directory_that_is_not_there(host: DirectZygote) -> None:
    description, outcome, *_ = host.run(dump_call(len, ([],)), cwd="/no/such/directory")
    assert outcome is None
    assert "/no/such/directory" in description["message"]


def test_output_of_the_function_its_threads_and_subprocesses(host: DirectZygote) -> None:
    def speak() -> None:
        import atexit
        import os
        import sys
        import threading

        atexit.register(print, "exit")
        print("grün")
        print("err", file=sys.stderr)
        os.system("echo sub")
        threading.Thread(target=lambda: print("thread")).start()
        sys.stdout.write("no newline ")

    _, outcome, out, err, _ = host.run(dump_call(speak))
    assert outcome.status == "returned"
    assert out.startswith("grün\nsub\n")
    assert out.endswith("exit\n")
    assert "thread" in out and "no newline" in out
    assert err == "err\n"


@pytest.mark.parametrize(("code", "status", "text"), [(3, 3, ""), (None, 0, ""), ("sorry", 1, "sorry\n")])
def test_exit(host: DirectZygote, code: Any, status: int, text: str) -> None:
    _, outcome, _, err, waited = host.run(dump_call(sys.exit, (code,)))
    assert outcome is None
    assert os.WEXITSTATUS(waited) == status
    assert err == text


def test_hard_exit_and_signals(host: DirectZygote) -> None:
    assert os.WEXITSTATUS(host.run(dump_call(os._exit, (5,)))[4]) == 5
    for number in (signal.SIGKILL, signal.SIGTERM, signal.SIGSEGV):

        def end(number: int = number) -> None:
            os.kill(os.getpid(), number)

        assert os.WTERMSIG(host.run(dump_call(end))[4]) == number
    assert host.call(lambda: "still there") == "still there"


def test_outcome_counts_though_the_process_dies_afterwards(host: DirectZygote) -> None:
    def later() -> str:
        import atexit

        atexit.register(os._exit, 9)
        return "done"

    _, outcome, _, _, status = host.run(dump_call(later))
    assert outcome.value == "done"
    assert os.WEXITSTATUS(status) == 9


def test_memory_limit(host: DirectZygote) -> None:
    def eat() -> None:
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))
        bytearray(1 << 32)

    outcome = host.run(dump_call(eat))[1]
    assert outcome.type_name == "MemoryError"


# --- outcomes ------------------------------------------------------------------------------------
def test_result_that_cannot_be_pickled(host: DirectZygote) -> None:
    outcome = host.run(dump_call(lambda: (x for x in ())))[1]
    text = outcome.describe("f")
    assert "the result, a generator, cannot be sent back" in text
    assert "return plain data, for instance a list" in text
    text = host.run(dump_call(lambda: [threading.Lock()]))[1].describe("f")
    assert "the result, a list, cannot be sent back" in text and "_thread.lock" in text


def test_exception_that_cannot_be_sent_or_made_again(host: DirectZygote) -> None:
    def picky() -> None:
        class PickyError(Exception):
            def __new__(cls, a: int, b: int) -> PickyError:
                return super().__new__(cls, "picky text")

            def __init__(self, a: int, b: int) -> None:
                super().__init__("picky text")

        raise PickyError(1, 2)

    def holding() -> None:
        error = ValueError("held")
        error.lock = threading.Lock()  # type: ignore[attr-defined]
        raise error

    def unprintable() -> None:
        class MuteError(Exception):
            def __str__(self) -> str:
                raise RuntimeError

        raise MuteError

    for function, name in ((picky, "picky text"), (holding, "held"), (unprintable, "MuteError")):
        outcome = host.run(dump_call(function))[1]
        assert outcome.status == "raised"
        assert name in outcome.describe("f")
        assert "raise" in outcome.traceback  # the line of code
        assert f"in {function.__name__}" in outcome.traceback
    assert host.run(dump_call(picky))[1].exception is None


def test_module_that_the_host_does_not_have(host: DirectZygote) -> None:
    def use() -> None:
        import lc_not_installed_anywhere  # type: ignore[import-not-found]  # noqa: F401

    outcome = host.run(dump_call(use))[1]
    assert outcome.type_name == "ModuleNotFoundError"
    assert "lc_not_installed_anywhere" in outcome.describe("use")


def test_base_exceptions(host: DirectZygote) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    assert isinstance(host.run(dump_call(interrupt))[1].exception, KeyboardInterrupt)


def test_large_argument_and_result(host: DirectZygote) -> None:
    import numpy

    array = numpy.arange(8_000_000)
    assert (host.call(lambda a: a + 1, array) == array + 1).all()
    text = "x" * 50_000_000
    assert host.call(lambda t: t + "y", text) == text + "y"


# --- warming -------------------------------------------------------------------------------------
def test_warmed_zygote_has_numpy_and_each_call_its_own_random_numbers(host: DirectZygote) -> None:
    control, said = host.warm("numpy", "numpy.random")
    assert said["modules"] == ["numpy", "numpy.random"]
    draw = dump_call(lambda: (__import__("sys").modules["numpy"].random.rand(), __import__("random").random()))
    draws = [host.run(draw, control)[1].value for _ in range(3)]
    assert len({pair[0] for pair in draws}) == 3
    assert len({pair[1] for pair in draws}) == 3
    description, outcome, *_ = host.run(dump_call(_matrix_product), control)
    assert outcome.value == 400.0 * 400 * 400
    assert "numpy" not in description["imported"]
    control.close()


def _matrix_product() -> float:
    import numpy

    return float((numpy.ones((400, 400)) @ numpy.ones((400, 400))).sum())


def test_call_tells_what_it_imported(host: DirectZygote, tmp_path: Path) -> None:
    (tmp_path / "lc_not_installed.py").write_text("")

    def use() -> None:
        __import__("lc_not_installed")
        __import__("colorsys")

    description, *_ = host.run(dump_call(use), cwd=str(tmp_path))
    assert "colorsys" in description["imported"]
    assert "lc_not_installed" not in description["imported"]


@pytest.fixture
def host_with_modules(tmp_path: Path) -> Iterator[DirectZygote]:
    modules = {
        "lc_loud": "import os, sys\nprint('loud'); print('loud', file=sys.stderr); os.system('echo loud')\n",
        "lc_threaded": "import threading, time\nthreading.Thread(target=time.sleep, args=(99,), daemon=True).start()\n",
        "lc_socket": "import socket\nkept = socket.socketpair()\n",
        "lc_exit": "raise SystemExit(1)\n",
        "lc_crash": "import os\nos.kill(os.getpid(), 11)\n",
        "lc_broken": "1/0\n",
    }
    for name, source in modules.items():
        (tmp_path / f"{name}.py").write_text(textwrap.dedent(source))
    # Hosts buffer what is printed, whatever the environment of the tests says.
    with DirectZygote(env={**os.environ, "PYTHONPATH": str(tmp_path), "PYTHONUNBUFFERED": ""}) as zygote:
        assert zygote.facts()["ready"]
        assert zygote.give_library()["library"]
        yield zygote


def test_what_was_installed_since_an_import_is_noticed(host_with_modules: DirectZygote, tmp_path: Path) -> None:
    host = host_with_modules
    control, said = host.warm("colorsys")
    before = dict(said["stamps"])
    assert before[str(tmp_path)] == tmp_path.stat().st_mtime_ns
    (tmp_path / "lc_new.py").write_text("x = 1")
    os.utime(tmp_path, (1, 1))
    # One that is forked from it has what was imported before, so the times from before.
    ours, theirs = socket.socketpair()
    host.tell({"id": 100, "warm": ["lc_new"]}, [theirs.fileno()], control)
    theirs.close()
    while "pid" not in host.receive(control):
        pass
    said = host.receive(ours)
    ours.close()
    assert "lc_new" in said["modules"]
    assert dict(said["stamps"])[str(tmp_path)] == before[str(tmp_path)]


def test_imports_that_fail_or_speak_do_no_harm(host_with_modules: DirectZygote) -> None:
    control, said = host_with_modules.warm("lc_loud", "lc_exit", "lc_broken", "lc_missing", "colorsys")
    assert said["modules"] == ["lc_loud", "colorsys"]
    _, outcome, out, err, _ = host_with_modules.run(dump_call(lambda: 1), control)
    assert (outcome.value, out, err) == (1, "", "")
    control.close()


@pytest.mark.parametrize("module", ["lc_threaded", "lc_socket"])
def test_what_does_not_survive_a_fork_is_not_forked(host_with_modules: DirectZygote, module: str) -> None:
    control, said = host_with_modules.warm("colorsys", module)
    assert said == {"unsafe": module}
    assert control.recv(1) == b""
    control.close()
    assert host_with_modules.call(lambda: 2) == 2


def test_import_that_crashes(host_with_modules: DirectZygote) -> None:
    with pytest.raises(EOFError):
        host_with_modules.warm("lc_crash")
    while "status" not in host_with_modules.receive():
        pass
    assert host_with_modules.call(lambda: 2) == 2
