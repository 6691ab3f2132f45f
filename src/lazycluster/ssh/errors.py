"""Why a host could not be reached: what ssh and the login shell said, as one error with a reason and a next step."""

from __future__ import annotations

import errno
import os
import re
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import PurePath

from lazycluster.agent.bootstrap import NO_DIRECTORY
from lazycluster.exceptions import InvalidRuntimeError

from .config import Settings

__all__ = ["FULL", "classify", "is_retryable", "no_room_here", "no_room_in", "no_room_there"]

_EVIDENCE_LINES = 4
_OUTPUT_SHOWN = 300
_NOISE = re.compile(
    r"@+|@.*@|Warning: Permanently added .*|Pseudo-terminal will not .*|Killed by signal \d+\.|\*\* .*|"
)
_PROXY_ENDED = "UNKNOWN port 65535"


def is_retryable(error: InvalidRuntimeError) -> bool:
    """Whether the same connect may well succeed in a moment: the handshake was dropped, as a busy sshd does."""
    return error.reason == "dropped"


@dataclass(frozen=True)
class _Case:
    """What is known of a failure."""

    settings: Settings
    said: str
    status: int | None
    asked: Sequence[str]
    answered: Sequence[str]
    output: str
    phase: str
    logged_in: bool
    python: str

    def find(self, pattern: str) -> re.Match[str] | None:
        """Search what ssh said; ``^`` and ``$`` are those of a line."""
        return re.search(pattern, self.said, re.MULTILINE | re.IGNORECASE)

    @property
    def by_proxy(self) -> bool:
        """Whether what ended is a ProxyCommand or the ssh to a jump host: only then ssh knows no address."""
        return _PROXY_ENDED in self.said

    @property
    def where(self) -> str:
        """Say who is meant, if it is not the host itself."""
        if not self.by_proxy:
            return ""
        jump = self.settings.proxy_jump
        return f"on the way, at the jump host{f' ({jump})' if jump else ''}: "

    @property
    def evidence(self) -> str:
        """The last lines that say something."""
        lines = [line.strip() for line in self.said.splitlines()]
        useful = [line for line in lines if not _NOISE.fullmatch(line)]
        return "\n".join(useful[-_EVIDENCE_LINES:])

    @property
    def printed(self) -> str:
        """The end of what the login shell printed."""
        return self.output.strip()[-_OUTPUT_SHOWN:]

    @property
    def plain_ssh(self) -> str:
        """The command that a person would type for this host."""
        words = ["ssh"]
        settings = self.settings
        flags = (
            ("-F", settings.config_file),
            ("-J", settings.proxy_jump),
            ("-l", settings.user),
            ("-p", settings.port),
        )
        for flag, value in flags:
            if value is not None:
                words += [flag, str(value)]
        return " ".join([*words, settings.target])

    def error(self, reason: str, detail: str, hint: str = "") -> InvalidRuntimeError:
        """Make the error."""
        return InvalidRuntimeError(self.settings.host, reason, detail, hint)


def classify(
    settings: Settings,
    said: str,
    status: int | None,
    *,
    asked: Sequence[str] = (),
    answered: Sequence[str] = (),
    output: str = "",
    phase: str = "ended",
    logged_in: bool = False,
    python: str = "python3",
) -> InvalidRuntimeError:
    """Say why a host could not be reached.

    Args:
        settings: How it was tried.
        said: What ssh printed to standard error, and the host's shell through it.
        status: ssh's exit status, None if it still ran or is not known.
        asked: What ssh asked and was not told.
        answered: What ssh asked and was told from the settings.
        output: What the host's login shell printed before the agent's mark.
        phase: ``timeout`` if the time was up, else ``ended``.
        logged_in: Whether ssh is known to have logged in.
        python: The interpreter that was to be started.

    Returns:
        The error, to be raised.
    """
    case = _Case(settings, said.replace("\r", ""), status, asked, answered, output, phase, logged_in, python)
    for rule in _RULES:
        error = rule(case)
        if error is not None:
            return error
    return _unknown(case)


def _config(case: _Case) -> InvalidRuntimeError | None:
    # A shell, of a ProxyCommand or of the host, speaks of lines in much the same way.
    terminating = case.find(r"^(?P<file>.*?):? terminating, \d+ bad configuration")
    name = re.escape(terminating["file"]) if terminating else "command-line"
    if found := case.find(rf"^(?P<file>{name}):? line (?P<line>\d+): (?P<what>.*)$"):
        if found["file"] == "command-line":
            hint = "correct ssh_options in connection_kwargs"
        else:
            hint = f"correct line {found['line']} of {found['file']}"
        return case.error("config", f"{found['file']}, line {found['line']}: {found['what']}", hint)
    if found := case.find(r"^Bad owner or permissions on (.*)$"):
        return case.error("config", found[0], f"chmod go-w {found[1]}, and make sure that the file is yours")
    if case.find(r"^(Can't open user config file|jumphost loop)") or terminating:
        return case.error("config", case.evidence, "correct the ssh configuration")
    return None


def _host_key(case: _Case) -> InvalidRuntimeError | None:
    question = next((text for text in case.asked if "authenticity of host" in text), "")
    if changed := case.find(r"host key for (\S+) has changed"):
        return _changed_key(case, changed[1])
    if case.find(r"REVOKED HOST KEY|host key .*revoked"):
        hint = "do not connect; ask whoever runs the host for its new key"
        return case.error("host_key", f"{case.where}the host's key is marked as revoked:\n{case.evidence}", hint)
    if not (question or case.find(r"Host key verification failed|host key is known for")):
        return None
    name = re.search(r"host '(.*?)(?: \(.*?\))?' can't", question) or case.find(r"key is known for (\S+) and")
    key = re.search(r"(\S+) key fingerprint is:? (\S+?)\.?$", question, re.MULTILINE)
    detail = f"{case.where}the host key of {name[1] if name else case.settings.target} is unknown"
    if key:
        detail += f" ({key[1]}, {key[2]})"
    hint = (
        f"run '{case.plain_ssh}' once, compare the fingerprint with what the host's administrator says, and "
        'accept it; or take new hosts on trust: connection_kwargs={"host_keys": "accept-new"}'
    )
    return case.error("host_key", detail, hint)


def _changed_key(case: _Case, name: str) -> InvalidRuntimeError:
    key = case.find(r"^The fingerprint for the (\S+) key sent by the remote host is\s+(\S+?)\.?$")
    offending = case.find(r"^Offending .* in (.+):\d+\s*$")
    detail = f"{case.where}the host key of {name} has CHANGED"
    if key:
        detail += f": it now shows {key[1]}, {key[2]}"
    if offending:
        detail += f"; the known one is in {offending[1]}"
    file = f'-f "{offending[1]}" ' if offending else ""
    hint = (
        "someone may be listening in. Only when the host's administrator has confirmed the new fingerprint: "
        f"ssh-keygen {file}-R \"{name}\", then '{case.plain_ssh}' once"
    )
    return case.error("host_key", detail, hint)


def _dns(case: _Case) -> InvalidRuntimeError | None:
    if found := case.find(r"Could not resolve hostname (\S+): (.*)$"):
        hint = "check the spelling, and the HostName in your ssh configuration"
        return case.error("dns", f"{case.where}the name {found[1]} is not known: {found[2].strip()}", hint)
    return None


_NETWORK = (
    (r"refused", "refused", "check that sshd runs there, and its port"),
    (r"timed out", "timeout", "check that the host is up, its address, and the firewalls on the way"),
    (r"no route|unreachable|is down|assign requested", "unreachable", "check the host's address and your network"),
    (r"name or service|name resolution|not known", "dns", "the jump host must know the name; check the spelling"),
    (r"prohibited", "unreachable", "AllowTcpForwarding and PermitOpen in the jump host's sshd_config must allow it"),
    (r"", "unreachable", "check the host's address and your network"),
)


def _network(case: _Case) -> InvalidRuntimeError | None:
    if found := case.find(r"connect to host (?P<to>\S+ port \d+): (?P<why>.*)$"):
        detail = f"{case.where}connect to {found['to']}: {found['why'].strip()}"
    elif found := case.find(r"open failed: (?P<why>.*)\n.*stdio forwarding failed"):
        jump = case.settings.proxy_jump
        detail = f"the jump host{f' ({jump})' if jump else ''} cannot connect to it: {found['why'].strip()}"
    elif found := case.find(r"^(?P<why>.*(?:timed out|not responding).*)$"):
        hint = "check that it is an ssh server, its port, and the firewalls on the way."
        text = f"{case.where}it does not answer in time: {found[0].strip()}"
        return case.error("timeout", text, f"{hint} {_MORE_TIME}")
    else:
        return None
    why = found["why"]
    reason, hint = next((r, h) for pattern, r, h in _NETWORK if re.search(pattern, why, re.IGNORECASE))
    return case.error(reason, detail, hint)


def _auth(case: _Case) -> InvalidRuntimeError | None:
    denied = case.find(r"^(?P<who>\S+): Permission denied \((?P<methods>.*)\)\.?\s*$")
    gave_up = case.find(r"Too many authentication failures|Authentication failed|no more authentication")
    # A question about a key may well stay open on the way to a success: alone it explains nothing.
    if not (denied or gave_up or (case.asked and case.status != 0 and not case.output)):
        return None
    parts = [case.where + _auth_cause(case)]
    if denied:
        parts.append(f"{denied['who']} takes {denied['methods']}")
    if problem := case.find(r"^(Load key .*|Permissions .* are too open.*|no such identity.*|.*Identity file.*)$"):
        parts.append(problem[0].strip())
    if case.find(r"signing failed|agent refused"):
        parts.append("the ssh agent did not sign with a key that the host would take")
    if case.asked:
        questions = dict.fromkeys(" ".join(text.split()) for text in case.asked)
        parts.append("ssh would have asked: " + " / ".join(questions))
    return case.error("auth", "; ".join(parts), _auth_hint(case))


def _mentions(questions: Sequence[str], word: str) -> bool:
    return any(word in question.lower() for question in questions)


def _auth_cause(case: _Case) -> str:
    if case.find("Too many authentication failures"):
        return "too many keys were offered before the right one"
    if _mentions(case.answered, "password"):
        return "the password was not accepted"
    if _mentions(case.answered, "passphrase"):
        return "the passphrase does not unlock the key, or the host does not take the key"
    if _mentions(case.asked, "passphrase"):
        return "a private key is locked by a passphrase, and no other key was accepted"
    return "no key was accepted"


def _auth_hint(case: _Case) -> str:
    settings = case.settings
    if case.find("Too many authentication failures"):
        return "name the right key as key_filename in connection_kwargs"
    if _mentions(case.answered, "password"):
        return "check user and password in connection_kwargs"
    if _mentions([*case.asked, *case.answered], "passphrase"):
        return "unlock the key with ssh-add, or give the right passphrase in connection_kwargs"
    if case.by_proxy:
        return f"install your key on the jump host with ssh-copy-id; '{case.plain_ssh}' must work without a question"
    key = f"-i {settings.key_filename[0]} " if settings.key_filename else ""
    port = f"-p {settings.port} " if settings.port else ""
    user = f"{settings.user}@" if settings.user else ""
    file = f"-F {shlex.quote(settings.config_file)} " if settings.config_file else ""
    return (
        f"install your key with 'ssh-copy-id {file}{key}{port}{user}{settings.target}', "
        "or, in Python, give key_filename or password in connection_kwargs"
    )


def _protocol(case: _Case) -> InvalidRuntimeError | None:
    if found := case.find(r"^(Unable to negotiate with .*|Protocol major versions differ.*|Bad server host key.*)$"):
        hint = "the two versions of OpenSSH have no algorithm in common; ssh_options can allow an older one"
        return case.error("protocol", found[0].strip(), hint)
    return None


def _dropped(case: _Case) -> InvalidRuntimeError | None:
    ended = r"kex_exchange_identification|ssh_dispatch_run_fatal|^Connection (?:closed|reset) by|Broken pipe"
    if not case.find(ended):
        return None
    own = [line for line in case.evidence.splitlines() if not re.search(r"^kex_|^Connection |^ssh_dispatch", line)]
    if case.by_proxy and own:
        detail = "the ProxyCommand or the jump host failed: " + "; ".join(own)
        return case.error("proxy", detail, f"try '{case.plain_ssh}' by hand")
    hint = (
        "if it stays so: is it an ssh server? MaxStartups in sshd_config of the host (or jump host) limits how many "
        "may connect at once"
    )
    said = "; ".join(case.evidence.splitlines())
    return case.error("dropped", f"{case.where}the connection was dropped during the handshake: {said}", hint)


#: The numbers of the system's errors that say that there is no room to write to.
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
_NO_ROOM_HINT = (
    "free some space (inodes too, and your quota) in one of these directories, or set TMPDIR{where} to one with space"
)


def no_room_in(said: str) -> str:
    """Return in which places an agent could not make its directory, and why, from what it printed; "" if it could."""
    return "; ".join(line[len(NO_DIRECTORY) :] for line in said.splitlines() if line.startswith(NO_DIRECTORY))


def no_room_here(places: str) -> InvalidRuntimeError:
    """Return the error about this machine, on which no directory for temporary files can be made.

    Args:
        places: The directories that were tried, each with what is wrong there.
    """
    detail = f"no directory for temporary files can be made on this machine, the manager: {places}"
    return InvalidRuntimeError("localhost", "manager", detail, _NO_ROOM_HINT.format(where=""))


def no_room_there(settings: Settings, places: str) -> InvalidRuntimeError:
    """Return the same error about a host."""
    detail = f"no directory for temporary files can be made on the host: {places}"
    return InvalidRuntimeError(
        settings.host, "disk", detail, _NO_ROOM_HINT.format(where=f" for sessions on {settings.host}")
    )


def _no_room(case: _Case) -> InvalidRuntimeError | None:
    full = "|".join(map(os.strerror, FULL))
    if here := case.find(rf"^unix_listener: cannot bind to path (.*: (?:{full}))$"):
        return no_room_here(here[1])  # the control socket, on this side
    places = no_room_in(f"{case.said}\n{case.output}")
    return no_room_there(case.settings, places) if places else None


def _no_process(case: _Case) -> InvalidRuntimeError | None:
    if not re.search(r"(?:BlockingIOError|fork\b.*|Cannot fork).*(?:unavailable|fork)", f"{case.said}\n{case.output}"):
        return None
    detail = "no process can be started on the host: its limit of processes is reached"
    hint = "end what runs there under this account, or raise the limit (ulimit -u, or that of a control group)"
    return case.error("python", detail, hint)


def _no_python(case: _Case) -> InvalidRuntimeError | None:
    if case.status == 255 and not case.output:
        return None  # ssh's own failure
    name, base = re.escape(case.python), re.escape(PurePath(case.python).name)
    text = case.said + "\n" + case.output
    before = rf"(?:{name}|{base})\W.*(?:not found|no such file|permission denied)"
    missing = rf"{before}|(?:not found|unknown command)\W.*{base}"
    if re.search(missing, text, re.IGNORECASE) or case.status in (126, 127):
        hint = (
            "install Python 3.8 or newer there, link one as python3 into a directory of the PATH that commands have "
            'over ssh, or name its path with python="/path/to/python3"'
        )
        said = case.evidence or case.printed
        return case.error("python", f"{case.python} does not run on the host: {said}", hint)
    if re.search(r"Traceback \(most recent|SyntaxError|ImportError|No module named|Fatal Python error", text):
        hint = 'name another interpreter with python="/path/to/python3"'
        return case.error("python", f"{case.python} failed on the host: {case.evidence}", hint)
    return None


def _shell(case: _Case) -> InvalidRuntimeError | None:
    if found := case.find(r"(?:exec|shell|subsystem) request failed on channel.*|This service allows.*"):
        return case.error("shell", found[0].strip(), "the account must be allowed to run commands")
    if case.phase == "timeout":
        if not case.printed and not case.logged_in:
            return None
        said = f"it printed: {case.printed}" if case.printed else "it printed nothing"
        detail = f"the login shell did not start Python within the time allowed; {said}"
        hint = f"'{case.plain_ssh} true' must end by itself: does a start-up file of the shell wait for input?"
        return case.error("shell", detail, f"{hint} {_MORE_TIME}")
    if case.status is None or (case.status in (255, -15) and not case.printed):
        return None
    detail = f"the login shell ended with exit status {case.status} instead of starting Python"
    if case.printed or case.evidence:
        detail += f": {case.printed or case.evidence}"
    hint = (
        f"'{case.plain_ssh} true' must succeed: does a start-up file of the shell end it (exit), or replace it (exec)? "
        "May the account log in at all?"
    )
    if case.python != "python3":
        hint = f"is {case.python} a Python interpreter? If so: {hint}"
    return case.error("shell", detail, hint)


_MORE_TIME = 'Or allow more time: connection_kwargs={"timeout": 60}'

_Rule = Callable[[_Case], "InvalidRuntimeError | None"]
_RULES: tuple[_Rule, ...] = (
    _config,
    _host_key,
    _dns,
    _network,
    _auth,
    _protocol,
    _dropped,
    _no_room,
    _no_process,
    _no_python,
    _shell,
)


def _unknown(case: _Case) -> InvalidRuntimeError:
    said = case.evidence or "nothing"
    if case.phase == "timeout":
        detail = f"ssh has not logged in within the time allowed; it said: {said}"
        hint = f"'{case.plain_ssh} true' must end by itself: what does the host, or ssh, wait for?"
        return case.error("timeout", detail, f"{hint} {_MORE_TIME}")
    if case.by_proxy:
        return case.error("proxy", f"{case.where}ssh ended: {said}", f"try '{case.plain_ssh}' by hand")
    return case.error("ssh", f"ssh ended (exit status {case.status}) and said: {said}", f"try '{case.plain_ssh}'")
