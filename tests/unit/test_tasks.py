"""Tasks as far as they need no host: steps, names, variables, output."""

from __future__ import annotations

import copy
import pickle
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lazycluster import RuntimeTask
from lazycluster.exceptions import GroupTaskError, InvalidRuntimeError, InvalidRuntimesError, TaskExecutionError
from lazycluster.group.broadcast import _for_host
from lazycluster.output.lines import TAIL_LIMIT
from lazycluster.tasks.context import checked_variables
from lazycluster.tasks.step_runner import claimed
from lazycluster.tasks.steps import GetFile, RunCommand, RunFunction, SendFile
from lazycluster.tasks.task_log import TaskLog
from lazycluster.utils import Environment, Timestamp, new_log_file_path, safe_name


@pytest.fixture(autouse=True)
def main_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setattr(Environment, "main_directory", str(tmp_path / "main"))
    yield tmp_path / "main"


# --- steps -----------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("make", "error"),
    [
        (lambda: RunCommand(""), ValueError),
        (lambda: RunCommand("  \n"), ValueError),
        (lambda: RunCommand("a\0b"), ValueError),
        (lambda: RunCommand(["ls"]), TypeError),
        (lambda: RunFunction("ls"), TypeError),
        (lambda: SendFile(""), ValueError),
        (lambda: SendFile(3), TypeError),
        (lambda: SendFile("a", ""), ValueError),
        (lambda: SendFile("a\0"), ValueError),
        (lambda: SendFile(b"a"), TypeError),
        (lambda: GetFile(""), ValueError),
        (lambda: GetFile("a", ""), ValueError),
        (lambda: GetFile(None), TypeError),
        (lambda: RuntimeTask(""), ValueError),
        (lambda: RuntimeTask(3), TypeError),
    ],
)
def test_what_makes_no_sense_is_refused_when_it_is_written_down(make: Any, error: type[Exception]) -> None:
    with pytest.raises(error):
        make()


def test_steps_take_paths_of_all_kinds(tmp_path: Path) -> None:
    assert SendFile(tmp_path).local_path == str(tmp_path)
    assert GetFile("data/x.csv").target() == str(Path("x.csv").absolute())
    assert GetFile("data/x.csv", tmp_path).target() == str(tmp_path / "x.csv")
    assert GetFile("data/x.csv", str(tmp_path / "y.csv")).target() == str(tmp_path / "y.csv")
    assert GetFile("data/x.csv", "new/").target() == str(Path("new/x.csv").absolute())


# --- tasks -----------------------------------------------------------------------------------------
def test_methods_of_a_task_return_it() -> None:
    task = RuntimeTask("name")
    assert task.send_file("a").get_file("b").run_command("c").run_function(len, obj="").call(len, "d") is task
    assert [type(step) for step in task.steps] == [SendFile, GetFile, RunCommand, RunFunction, RunFunction]
    assert task.status == "pending"
    assert task.host is None
    assert task.execution_log == []
    assert list(task.function_returns) == []
    assert task.process is None
    assert task.execution_log_file_path is None
    task.join()
    task.cleanup()


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, lambda task: pickle.loads(pickle.dumps(task))])
def test_a_copy_has_the_same_steps_and_a_life_of_its_own(duplicate: Any) -> None:
    task = RuntimeTask("name").run_command("true").run_function(len, obj="x")
    task.env_variables = {"A": 1}
    other = duplicate(task)
    assert (other.name, other.steps, other.env_variables) == (task.name, task.steps, {"A": "1"})
    other.run_command("false")
    other.env_variables["A"] = "2"
    assert len(task.steps) == 2
    assert task.env_variables == {"A": "1"}


def test_names_are_made_where_none_is_given() -> None:
    assert RuntimeTask().name != RuntimeTask().name


# --- environment variables -------------------------------------------------------------------------
def test_variables_are_text(tmp_path: Path) -> None:
    assert checked_variables({"A": 1, "B": 1.5, "C": tmp_path, "D": "é$'\"\n"}) == {
        "A": "1",
        "B": "1.5",
        "C": str(tmp_path),
        "D": "é$'\"\n",
    }


@pytest.mark.parametrize(
    ("variables", "error"),
    [
        ({"": "x"}, ValueError),
        ({"A=B": "x"}, ValueError),
        ({"A": "x\0"}, ValueError),
        ({"A": None}, TypeError),
        ({"A": True}, TypeError),
        ({"A": b"x"}, TypeError),
        ({1: "x"}, TypeError),
        ([("A", "x")], TypeError),
    ],
)
def test_variables_that_no_process_can_have_are_refused(variables: Any, error: type[Exception]) -> None:
    with pytest.raises(error):
        checked_variables(variables)


# --- names of files --------------------------------------------------------------------------------
HOSTILE = ["../x", "..", ".", "", "a/b", "a%2Fb", "a_b", "a\0b", "a\nb", "ü", "x" * 300, "x" * 301, "me@h:22", "\udcff"]


def test_hostile_names_stay_apart_and_in_their_directory() -> None:
    safe = [safe_name(name) for name in HOSTILE]
    assert len(set(safe)) == len(HOSTILE)
    for name in safe:
        assert name not in ("", ".", "..")
        assert "/" not in name
        assert len(name) <= 120
        assert name.isascii()


def test_log_files_are_private_and_new_each_time(main_directory: Path) -> None:
    first, second = new_log_file_path("../../h", "a/b"), new_log_file_path("../../h", "a/b")
    assert first != second
    assert first.parent.parent == main_directory / "logs"
    assert first.parent.stat().st_mode & 0o777 == 0o700


def test_the_main_directory_is_checked(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for wrong in ("", "a\0", str(tmp_path / "file")):
        with pytest.raises(ValueError, match=r"."):
            Environment.set_main_directory(wrong)
    Environment.set_main_directory(tmp_path / "other")
    assert Environment.main_directory == str(tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_timestamps() -> None:
    first, second = Timestamp(), Timestamp()
    assert first.get_unique() != second.get_unique()
    assert str(first) == first.get_formatted()
    assert first.get_unformatted().isdigit()


# --- output ----------------------------------------------------------------------------------------
def test_output_is_kept_byte_for_byte_in_the_file_and_decoded_in_memory() -> None:
    log = TaskLog("host", "task", debug=False)
    log.write(b"one \xff\xfe")
    log.write(b"\xc3")
    log.write(b"\xa9")
    assert log.end_step("x") == "one \ufffd\ufffdé"
    log.write(b"two\n")
    assert log.end_step("y") == "two\n"
    assert log.path is not None
    assert log.path.read_bytes() == b"one \xff\xfe\xc3\xa9two\n"
    assert log.path.stat().st_mode & 0o777 == 0o600


def test_the_end_of_long_output_is_kept_in_memory() -> None:
    log = TaskLog("host", "task", debug=False)
    for _ in range(40):
        log.write(b"x" * 65536)
    log.write(b"end")
    text = log.end_step("x")
    first, rest = text.split("\n", 1)
    assert str(40 * 65536 + 3 - TAIL_LIMIT) in first
    assert str(log.path) in first
    assert len(rest) == TAIL_LIMIT
    assert rest.endswith("xend")
    assert log.path is not None
    assert log.path.stat().st_size == 40 * 65536 + 3


def test_many_short_writes_keep_the_end_too() -> None:
    log = TaskLog("host", "task", debug=False)
    for number in range(3000):
        log.write(b"%d\n" % number)
    assert log.end_step("x") == "".join(f"{number}\n" for number in range(3000))


def test_debug_prints_whole_lines_with_the_host(capsys: pytest.CaptureFixture[str]) -> None:
    log = TaskLog("host", "task", debug=True)
    log.write(b"one\ntw")
    assert capsys.readouterr().out == "[host] one\n"
    log.write(b"o\nthree")
    assert capsys.readouterr().out == "[host] two\n"
    log.end_step("x")
    assert capsys.readouterr().out == "[host] three\n"


def test_a_standard_output_that_cannot_show_it_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    import io

    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    log = TaskLog("host", "task", debug=True)
    log.write("é\n".encode())
    assert raw.getvalue() == b"[host] \\xe9\n"
    sys.stdout.close()
    log.write(b"more\n")


def test_a_log_that_cannot_be_written_does_not_stop_the_work(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").touch()
    Environment.main_directory = str(tmp_path / "file" / "below")
    log = TaskLog("host", "task", debug=False)
    log.write(b"x")
    assert log.end_step("step") == "x"
    assert log.path is None
    assert "cannot be written" in caplog.text


# --- what was fetched ------------------------------------------------------------------------------
def test_two_hosts_cannot_write_one_file_at_once(tmp_path: Path) -> None:
    target = str(tmp_path / "x")
    with claimed(target, "host1"), pytest.raises(TaskExecutionError, match="host1"), claimed(target, "host2"):
        pass
    with claimed(target, "host2"):
        pass


@pytest.mark.parametrize("given", ["$RESULTS", "${RESULTS}/", "$RESULTS/out", "~/out"])
def test_what_all_hosts_give_goes_where_the_path_leads(
    given: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RESULTS", str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path))
    step = _for_host(GetFile("far/out", given), "host-1")
    assert isinstance(step, GetFile)
    assert step.local_path == str(tmp_path / "host-1" / "out")
    assert GetFile("far/out", given).target() == str(tmp_path / "out")


def test_a_user_that_nobody_knows_is_no_error() -> None:
    step = _for_host(GetFile("far/out", "~nobody-of-that-name/out"), "host-1")
    assert isinstance(step, GetFile)
    assert step.local_path == "~nobody-of-that-name/host-1/out"


def test_what_one_host_gave_is_not_replaced_silently(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    target = tmp_path / "x"
    with claimed(str(target), "host1"):
        target.write_text("one")
    with claimed(str(target), "host1"):
        pass
    assert not caplog.records
    with claimed(str(target), "host2"):
        target.write_text("two!")
    assert "host1" in caplog.text
    caplog.clear()
    target.write_text("somebody has made use of it")
    with claimed(str(target), "host1"):
        pass
    assert not caplog.records


# --- errors ----------------------------------------------------------------------------------------
def test_errors_survive_pickling() -> None:
    error = TaskExecutionError("m", host="h", task="t", step=1, what="w", exit_status=2, output="o", log_file="l")
    again = pickle.loads(pickle.dumps(error))
    assert (str(again), again.__dict__) == (str(error), error.__dict__)
    group = pickle.loads(pickle.dumps(GroupTaskError([error, error])))
    assert [str(part) for part in group.errors] == ["m", "m"]
    several = InvalidRuntimesError([InvalidRuntimeError("a", "dns"), InvalidRuntimeError("b", "dns")])
    again = pickle.loads(pickle.dumps(several))
    assert (again.reason, again.host) == ("dns", "a, b")
