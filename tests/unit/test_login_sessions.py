"""A process that is to outlive the login where systemd's logind ends it; its commands are stand-ins."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from lazycluster.background import login_session
from lazycluster.core import unix
from lazycluster.exceptions import BackgroundError

_SESSION = "0::/user.slice/user-1000.slice/session-3.scope\n"
_SERVICE = "0::/user.slice/user-1000.slice/user@1000.service/app.slice/jupyter.service\n"
_HYBRID = f"12:pids:/user.slice\n1:name=systemd:/user.slice/user-1000.slice/session-3.scope\n{'0::/'}\n"
_SYSTEM = "0::/system.slice/jupyterhub.service\n"


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """A function that says how the machine is."""
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    monkeypatch.setattr(login_session.getpass, "getuser", lambda: "me")

    def make(group: str, kills: str = "no", lingers: str = "no", excluded: str = "root", only: str = "") -> None:
        monkeypatch.setattr(unix, "control_groups", group.splitlines)
        script = tmp_path / "loginctl"
        manager = f"KillUserProcesses={kills}\\nKillOnlyUsers={only}\\nKillExcludeUsers={excluded}\\n"
        script.write_text(
            f"#!/bin/sh\ncase $2 in\nshow-session) printf '{manager}';;\nshow-user) echo Linger={lingers};;\nesac\n"
        )
        script.chmod(0o755)
        run = tmp_path / "systemd-run"
        run.write_text("#!/bin/sh\n")
        run.chmod(0o755)

    return make


@pytest.mark.parametrize("group", ["", "0::/\n", _SYSTEM, _SESSION, _HYBRID])
def test_where_logind_ends_nothing_a_process_is_started_as_it_is(machine: Callable[..., None], group: str) -> None:
    machine(group)
    assert login_session.outliving() == []


@pytest.mark.parametrize("group", [_SESSION, _HYBRID])
def test_where_it_ends_a_session_with_its_processes_lingering_is_asked_for(
    machine: Callable[..., None], group: str
) -> None:
    machine(group, kills="yes")
    with pytest.raises(BackgroundError, match=r"KillUserProcesses=yes\n  Next step: loginctl enable-linger"):
        login_session.outliving()


def test_with_lingering_it_is_started_outside_of_the_session(machine: Callable[..., None]) -> None:
    machine(_SESSION, kills="yes", lingers="yes")
    assert login_session.outliving()[:3] == ["systemd-run", "--user", "--scope"]


def test_who_has_no_manager_of_their_own_is_told_so(
    machine: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    machine(_SESSION, kills="yes", lingers="yes")
    monkeypatch.delenv("XDG_RUNTIME_DIR")
    with pytest.raises(BackgroundError, match="XDG_RUNTIME_DIR is not set"):
        login_session.outliving()


@pytest.mark.parametrize("users", [{"excluded": "root me"}, {"only": "others"}])
def test_users_whose_processes_stay_are_known(machine: Callable[..., None], users: dict[str, str]) -> None:
    machine(_SESSION, kills="yes", **users)
    assert login_session.outliving() == []


def test_a_service_of_the_users_own_ends_with_the_last_login_unless_they_linger(machine: Callable[..., None]) -> None:
    machine(_SERVICE)
    with pytest.raises(BackgroundError, match="one of your own services"):
        login_session.outliving()
    machine(_SERVICE, lingers="yes")
    assert login_session.outliving() == []


def test_a_logind_that_does_not_answer_is_taken_for_the_default(machine: Callable[..., None], tmp_path: Path) -> None:
    machine(_SESSION, kills="yes")
    (tmp_path / "loginctl").write_text("#!/bin/sh\nexit 1\n")
    assert login_session.outliving() == []
