"""Limits of the manager's own account: errors name the limit, and what to do."""

from __future__ import annotations

import errno
import subprocess
import threading
from typing import Any

import pytest

from lazycluster.core.limits import limit_hint, limit_hint_in, start_thread
from lazycluster.exceptions import InvalidRuntimeError, LazyclusterError
from lazycluster.ssh import config


@pytest.mark.parametrize(
    ("error", "option"),
    [
        (BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable"), "ulimit -u"),
        (RuntimeError("can't start new thread"), "ulimit -u"),
        (OSError(errno.EMFILE, "Too many open files"), "ulimit -n"),
        (OSError(errno.ENFILE, "Too many open files in system"), "ulimit -n"),
        (FileNotFoundError(errno.ENOENT, "No such file or directory", "ssh"), ""),
        (RuntimeError("something else"), ""),
    ],
)
def test_errors_of_limits_have_a_next_step(error: Exception, option: str) -> None:
    for hint in (limit_hint(error), limit_hint_in(f"Traceback ...\n  File ...\n{type(error).__name__}: {error}\n")):
        assert (option in hint) if option else not hint


def test_a_thread_that_cannot_be_started_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(_: Any) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refused)
    with pytest.raises(LazyclusterError, match=r"cannot start a thread: (.|\n)*Next step: .*ulimit -u"):
        start_thread(threading.Thread())


@pytest.mark.parametrize(
    ("error", "reason", "hint"),
    [
        (BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable"), "manager", "more processes and threads"),
        (OSError(errno.EMFILE, "Too many open files"), "manager", "more open files"),
        (FileNotFoundError(errno.ENOENT, "No such file or directory", "ssh"), "ssh", "install the OpenSSH client"),
    ],
)
def test_an_ssh_that_cannot_be_started_is_not_one_that_is_missing(
    error: Exception, reason: str, hint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: Any, **__: Any) -> None:
        raise error

    config.ssh_version.cache_clear()
    monkeypatch.setattr(subprocess, "run", refused)
    with pytest.raises(InvalidRuntimeError, match=hint) as caught:
        config.ssh_version()
    assert caught.value.reason == reason
    assert not config.ssh_version.cache_info().currsize


def test_an_account_that_the_system_does_not_know(monkeypatch: pytest.MonkeyPatch) -> None:
    said = subprocess.CompletedProcess("ssh", 255, b"", b"No user exists for uid 23456\r\n")
    config.ssh_version.cache_clear()
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: said)
    with pytest.raises(InvalidRuntimeError, match=r"user id \d+ has no entry in /etc/passwd"):
        config.ssh_version()
