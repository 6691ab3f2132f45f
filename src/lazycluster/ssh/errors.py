"""Reasons why a host cannot be reached: from what ssh and the login shell said, one error with a next step."""

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

from .circumstances import NOTHING_KNOWN, Circumstances
from .config import Settings
from .config_text import BOM_HINT
from .python_search import NO_PYTHON

__all__ = [
    "FULL", "classify", "is_retryable", "last_words", "no_room_here", "no_room_in", "no_room_there", "on_terminal",
]  # fmt: skip

_EVIDENCE_LINES = 4
_BASH_CANNOT_FORK = 254  # its exit status
_OUTPUT_SHOWN = 300
_NOISE_SHOWN = 80
_SAYS_NOTHING = re.compile(
    r"@+|@.*@|Warning: Permanently added .*|Pseudo-terminal will not .*|Killed by signal \d+\.|\*\* .*|"
    r"Authenticated to .*|Transferred: sent .*|Bytes per second: .*|"
)
# That nobody listens where a forwarded port leads is no reason to end.
_ABOUT_PORTS = re.compile(r"connect_to .*|channel \d+: open failed: .*")
_LAST_WORDS = 3
_PROXY_ENDED = "UNKNOWN port 65535"
_PROXY_CLOSED = re.compile(r"kex_exchange_identification: .*|Connection closed by UNKNOWN port 65535")


def last_words(said: str) -> str:
    """Return the end of what ssh itself said of a link that is lost; empty if that tells no reason."""
    lines = dict.fromkeys(line.strip() for line in said.splitlines())
    reasons = [line for line in lines if not _SAYS_NOTHING.fullmatch(line) and not _ABOUT_PORTS.fullmatch(line)]
    return "; ".join(reasons[-_LAST_WORDS:])


def is_retryable(error: InvalidRuntimeError) -> bool:
    """Return whether the same attempt may succeed in a moment: the handshake was dropped, as a busy sshd does."""
    return error.reason == "dropped"


@dataclass(frozen=True)
class _Case:
    """A failure to connect, with all that is known of it."""

    settings: Settings
    said: str
    status: int | None
    asked: Sequence[str]
    answered: Sequence[str]
    output: str
    phase: str
    logged_in: bool
    python: str
    shell_said: str
    known: Circumstances

    def find(self, pattern: str) -> re.Match[str] | None:
        """Find the last place in what ssh said; ``^`` and ``$`` are those of a line."""
        return next(reversed([*re.finditer(pattern, self.said, re.MULTILINE | re.IGNORECASE)]), None)

    @property
    def by_proxy(self) -> bool:
        """True if a ProxyCommand or the ssh to a jump host has ended: only then ssh knows no address."""
        return _PROXY_ENDED in (_useful(self.said) or [""])[-1]

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
        return "\n".join(_useful(self.said)[-_EVIDENCE_LINES:])

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
    heard: str | None = None,
    known: Circumstances = NOTHING_KNOWN,
) -> InvalidRuntimeError:
    """Say why a host could not be reached.

    ssh's last own words tell the reason, and after a login only what came since then. What a host's sshd prints as its
    banner, or a start-up file of the login shell, may look like ssh's words, but comes before the last ones.

    Args:
        settings: How it was tried.
        said: What ssh said.
        status: ssh's exit status, None if it still ran or is not known.
        asked: What ssh asked and was not told.
        answered: What ssh asked and was told from the settings.
        output: What the host's login shell printed before the start marker.
        phase: ``timeout`` if the time was up, ``noise`` if there was too much output, else ``ended``.
        logged_in: Whether ssh is known to have logged in.
        python: The interpreter that was to be started.
        heard: What others printed to ssh's standard error: before the login the host's sshd, a jump host's ssh or a
            ProxyCommand, then the host's shell. None if it is not known apart from what ssh said.
        known: What else is known.

    Returns:
        The error, to be raised.
    """
    said = said.replace("\r", "")
    heard = heard if heard is None else heard.replace("\r", "")
    if heard is not None and _DENIED.fullmatch((_useful(said) or [""])[-1]):
        logged_in = False  # what said that it has is what the host's sshd had ssh print
    if heard is not None and not logged_in and _PROXY_ENDED in said and "kex_exchange_identification: " in said:
        # The host was not reached. Whoever was to lead there has said why.
        said = f"{heard}\n{said}"
    if heard is not None and not said and status == _SSH_FAILED and phase == "ended" and not logged_in:
        said = heard  # an error in its command line, which it reads before it knows of its log
    logged_in = logged_in or bool(output) or (status is not None and status >= 0 and status != _SSH_FAILED)
    shell_said = said if heard is None else heard if logged_in else ""
    case = _Case(
        settings, said, status, asked, answered, output, phase, logged_in, python, shell_said=shell_said, known=known
    )
    for rule in _rules(case):
        error = rule(case)
        if error is not None:
            return error
    return _unknown(case)


_SSH_FAILED = 255
_OF_PYTHON = (None, 1, 134)  # exit statuses of an interpreter that fails, and of a tcsh that finds none
# A banner may end without a newline: then ssh's own words are at the end of its last line.
_DENIED = re.compile(r"(?:\S+|.*\S@\S+): Permission denied \(.*\)\.?")


def _useful(text: str) -> list[str]:
    """Return the lines that say something."""
    return [line for line in map(str.strip, text.splitlines()) if not _SAYS_NOTHING.fullmatch(line)]


def _rules(case: _Case) -> Sequence[_Rule]:
    """Return what may be the reason, most likely first."""
    if case.logged_in:
        return _AFTER_LOGIN
    lines = _useful(case.said)
    while case.by_proxy and lines and _PROXY_CLOSED.fullmatch(lines[-1]):
        del lines[-1]
    if case.phase == "ended" and lines:  # else they are not its last ones
        for pattern, rule in _SAID_LAST:
            # What is wrong in the configuration of a jump host's ssh is so in our own ssh's first.
            if pattern.fullmatch(lines[-1]) and not (case.by_proxy and rule is _config):
                return (rule,)
    if case.asked:
        return (_host_key if _host_question(case) else _auth, _dropped)
    return (_dropped, *_AFTER_LOGIN) if case.phase == "ended" else ()


def _config(case: _Case) -> InvalidRuntimeError | None:
    # A shell, of a ProxyCommand or of the host, speaks of lines in much the same way.
    terminating = case.find(r"^(?P<file>.*?):? terminating, \d+ bad configuration")
    name = re.escape(terminating["file"]) if terminating else "command-line"
    if found := case.find(rf"^(?P<file>{name}):? line (?P<line>\d+): (?P<what>.*)$"):
        if found["file"] == "command-line":
            hint = "fix ssh_options in connection_kwargs"
        else:
            hint = f"fix line {found['line']} of {found['file']}"
            if "\\357\\273\\277" in found["what"]:
                hint = f"{BOM_HINT} {shlex.quote(found['file'])}"
            elif re.search(r"\\[0-7]{3}", found["what"]):
                hint += ": it has a character, shown as \\ and digits, that looks like a blank and is none"
        return case.error("config", f"{found['file']}, line {found['line']}: {found['what']}", hint)
    if found := case.find(r"^Bad owner or permissions on (.*)$"):
        return case.error("config", found[0], f"chmod go-w {found[1]}, and make sure that the file is yours")
    if case.find(r"^(Can't open user config file|jumphost loop)") or terminating:
        return case.error("config", case.evidence, "fix the ssh configuration")
    return None


def _host_key(case: _Case) -> InvalidRuntimeError | None:
    question = _host_question(case)
    if changed := case.find(r"host key for (\S+) has changed"):
        return _changed_key(case, changed[1])
    if case.find(r"REVOKED HOST KEY|host key .*revoked"):
        hint = "do not connect; ask the host's administrator for its new key"
        what = "certificate, or the authority that signed it," if case.find(r"-CERT host key") else "key"
        return case.error("host_key", f"{case.where}the host's {what} is marked as revoked:\n{case.evidence}", hint)
    if found := case.find(r"^Certificate (?:invalid: |for .*?(?=contains)|(?=lacks))(?P<why>.*)$"):
        return _bad_certificate(case, found["why"])
    if not (question or case.find(r"Host key verification failed|host key is known for")):
        return None
    name = re.search(r"host '(.*?)(?: \(.*?\))?' can't", question) or case.find(r"key is known for (\S+) and")
    key = re.search(r"(\S+) key fingerprint is:? (\S+?)\.?$", question, re.MULTILINE)
    detail = f"{case.where}the host key of {name[1] if name else case.settings.target} is unknown"
    if key:
        detail += f" ({key[1]}, {key[2]})"
    if case.known.authority:
        detail += f", and it shows no certificate of an authority that {case.known.authority} names for it"
        hint = (
            "do not take the key on trust: have the host's administrator get its key signed (HostCertificate in its "
            "sshd_config), or fix the @cert-authority line"
        )
        return case.error("host_key", detail, hint)
    hint = (
        f"run '{case.plain_ssh}' once, compare the fingerprint with what the host's administrator says, and "
        'accept it; or take new hosts on trust: connection_kwargs={"host_keys": "accept-new"}'
    )
    return case.error("host_key", detail, hint)


def _host_question(case: _Case) -> str:
    return next((text for text in case.asked if text.startswith("The authenticity of host ")), "")


def _bad_certificate(case: _Case, why: str) -> InvalidRuntimeError:
    name = _host_question(case) or case.settings.target
    found = re.search(r"host '(.*?)(?: \(.*?\))?' can't", name)
    detail = f"{case.where}the certificate of the host {found[1] if found else name} is not valid: {why}"
    again = (
        "the host's administrator has to have its key signed again: ssh-keygen -s CA_KEY -I ID -h -n NAME HOST_KEY.pub"
    )
    hints = {
        "expired": again,
        "not yet valid": f"check this machine's clock; if it is right, {again}",
        "name is not a listed principal": (
            "connect by a name that the certificate is for (HostName or HostKeyAlias in your ssh configuration); or "
            f"{again}"
        ),
    }
    return case.error("host_key", detail, f"do not take its key on trust; {hints.get(why, again)}")


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
    denied = case.find(r"(?:^|\s)(?P<who>\S+): Permission denied \((?P<methods>.*)\)\.?\s*$")
    gave_up = case.find(r"Too many authentication failures|Authentication failed|no more authentication")
    # A question about a key may well stay open on the way to a success: alone it explains nothing.
    if not (denied or gave_up or (case.asked and case.status != 0 and not case.output)):
        return None
    parts = [case.where + _auth_cause(case)]
    if denied:
        parts.append(f"{denied['who']} takes {denied['methods']}")
    parts += [defect.what for defect in case.known.keys[1:]]
    if not case.known.keys and (problem := case.find(r"^Load key .*$")):
        parts.append(problem[0].strip())
    if case.find(r"signing failed|agent refused"):
        parts.append("the ssh agent did not sign with a key that the host would take")
    parts += case.known.certificates
    if case.asked:
        questions = dict.fromkeys(" ".join(text.split()) for text in case.asked)
        parts.append("ssh would have asked: " + " / ".join(questions))
    return case.error("auth", "; ".join(parts), _auth_hint(case))


# What ssh says where a host demands several ways to log in (AuthenticationMethods), and the first one has succeeded.
_PARTIAL = "with partial success"


def _mentions(questions: Sequence[str], word: str) -> bool:
    return any(word in question.lower() for question in questions)


def _auth_cause(case: _Case) -> str:
    if case.find("Too many authentication failures"):
        return "too many keys were offered before the right one"
    if case.find(_PARTIAL):
        if _mentions(case.answered, "password"):
            return "the key was accepted, but not the password, which the host asks for, too"
        return "the key was accepted, but the host asks for more than that"
    if case.known.keys and not case.answered:
        return f"{case.known.keys[0].what}; no other key was accepted"
    if _mentions(case.answered, "password"):
        return "the password was not accepted"
    if _mentions(case.answered, "passphrase"):
        return "the passphrase does not unlock the key, or the host does not take the key"
    if _mentions(case.asked, "passphrase"):
        return "a private key is locked by a passphrase, and no other key was accepted"
    return "no key was accepted"


def _auth_hint(case: _Case) -> str:
    settings = case.settings
    if case.known.certificates:
        return "have your key signed again, for this account: ssh-keygen -s CA_KEY -I ID -n USER KEY.pub"
    if case.find("Too many authentication failures"):
        return (
            f"name the one that {settings.target} takes: IdentityFile, with 'IdentitiesOnly yes', in your ssh "
            "configuration or, in Python, key_filename in connection_kwargs"
        )
    if _mentions(case.answered, "password"):
        return "check user and password in connection_kwargs"
    if case.find(_PARTIAL):
        return "run the command on a terminal, where you are asked; or, in Python, give password in connection_kwargs"
    if case.known.keys and not case.answered:
        return case.known.keys[0].step
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


def _disconnected(case: _Case) -> InvalidRuntimeError | None:
    # What it says is the host's own text, of any number of lines.
    return _auth(case) if case.find(r"^Received disconnect from .*Too many authentication failures") else None


def _protocol(case: _Case) -> InvalidRuntimeError | None:
    if found := case.find(r"^(Unable to negotiate with .*|Protocol major versions differ.*|Bad server host key.*)$"):
        hint = "the two versions of OpenSSH have no algorithm in common; ssh_options can allow an older one"
        return case.error("protocol", found[0].strip(), hint)
    return None


# What an sshd from OpenSSH 9.8 on says to whoever it penalises (PerSourcePenalties).
_PENALTY = "Not allowed at this time"


def _dropped(case: _Case) -> InvalidRuntimeError | None:
    ended = r"kex_exchange_identification|ssh_dispatch_run_fatal|^Connection (?:closed|reset) by|Broken pipe"
    if not case.find(ended):
        return None
    if case.known.refusal == _PENALTY:
        detail = f"the host takes no connection from here for now ({_PENALTY!r}): logins from this address have failed"
        hint = (
            "wait some minutes, and fix what fails (the user, the key): each further attempt may lengthen that. "
            "PerSourcePenalties in the host's sshd_config sets for how long"
        )
        return case.error("refused", detail, hint)
    own = [line for line in case.evidence.splitlines() if not re.search(r"^kex_|^Connection |^ssh_dispatch", line)]
    if case.by_proxy and own and not case.known.proxy_is_ssh:  # an ssh says why it failed, and then that is the reason
        detail = "the ProxyCommand or the jump host failed: " + "; ".join(own)
        return case.error("proxy", detail, f"try '{case.plain_ssh}' by hand")
    hint = (
        "if it stays so: is it an ssh server? MaxStartups in sshd_config of the host (or jump host) limits how many "
        "may connect at once"
    )
    said = "; ".join(line for line in case.evidence.splitlines() if not case.known.proxy_is_ssh or line not in own)
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
        return no_room_here(here[1])  # ssh's control socket, which it makes after the login
    places = no_room_in(f"{case.shell_said}\n{case.output}")
    return no_room_there(case.settings, places) if places else None


def _lost(case: _Case) -> InvalidRuntimeError | None:
    """The link was lost when ssh had logged in already, as ssh itself says."""
    if case.status not in (None, _SSH_FAILED) or case.shell_said is case.said:
        return None
    words = last_words(case.said)
    if re.search(r"timed out|not responding", words, re.IGNORECASE):
        return case.error("timeout", f"it does not answer any more: {words}", f"check the network. {_MORE_TIME}")
    if re.search(r"Broken pipe|Connection .*(?:closed|reset)|Disconnected from", words):
        hint = f"try '{case.plain_ssh}': does the host end sessions, or is it about to shut down?"
        return case.error("dropped", f"the connection was lost right after the login: {words}", hint)
    return None


def _ending(case: _Case) -> list[str]:
    """Return the last lines of the host's shell: what a start-up file printed, or a banner, comes before them."""
    return [*_useful(case.shell_said)[-_EVIDENCE_LINES:], *_useful(case.output)[-_EVIDENCE_LINES:]]


def _no_process(case: _Case) -> InvalidRuntimeError | None:
    said = re.search(r"(?:BlockingIOError|fork\b.*|Cannot fork).*(?:unavailable|fork)", "\n".join(_ending(case)))
    # What it tells the agent of its start-up files needs a process, too: there bash says nothing.
    unsaid = case.status == _BASH_CANNOT_FORK and not case.shell_said.strip()
    if case.phase == "timeout" or not (said or unsaid):
        return None
    detail = "no process can be started on the host: its limit of processes is reached"
    hint = "end what runs there under this account, or raise the limit (ulimit -u, or that of a control group)"
    return case.error("python", detail, hint)


def _no_python(case: _Case) -> InvalidRuntimeError | None:
    if case.phase == "timeout" or (case.status == _SSH_FAILED and not case.output and not case.logged_in):
        return None  # it did not end, or it was ssh that failed
    if none := [line for line in case.shell_said.splitlines() if line.startswith(NO_PYTHON)]:
        hint = 'install one there, or name the path of one with python="/path/to/python3"'
        return case.error("python", none[-1].partition(": ")[2], hint)
    name, base = re.escape(case.python), re.escape(PurePath(case.python).name)
    before = rf"(?:{name}|{base})\W.*(?:not found|no such file|permission denied)"
    missing = re.compile(rf"{before}|(?:not found|unknown command)\W.*{base}", re.IGNORECASE)
    last = [lines[-1] for lines in (_useful(case.shell_said), _useful(case.output)) if lines]
    if case.status in (126, 127) and last and not any(map(missing.search, _ending(case))):
        return _other_program(case, last)
    may_be = case.status in _OF_PYTHON  # else a start-up file has printed that
    if case.status in (126, 127) or (may_be and any(map(missing.search, last))):
        hint = (
            "install Python 3.8 or newer there, link one as python3 into a directory of the PATH that commands have "
            'over ssh, or name its path with python="/path/to/python3"'
        )
        named = [line for line in _ending(case) if missing.search(line)]
        said = (named or last or [f"exit status {case.status}"])[-1]
        return case.error("python", f"{case.python} does not run on the host: {said}", hint)
    if may_be and re.search(
        r"Traceback \(most recent|SyntaxError|ImportError|No module named|Fatal Python error", "\n".join(last)
    ):
        hint = 'name another interpreter with python="/path/to/python3"'
        return case.error("python", f"{case.python} failed on the host: {'; '.join(_ending(case))}", hint)
    return None


_NOT_THERE = re.compile(r"(?:not found|no such file|permission denied|cannot execute|unknown command)", re.IGNORECASE)


def _other_program(case: _Case, last: Sequence[str]) -> InvalidRuntimeError:
    """Something else than Python was to be started, and is not there."""
    said = next((line for line in last if _NOT_THERE.search(line)), last[-1])
    hint = (
        "fix that on the host: in the file that is named, or ForceCommand in sshd_config, or the command "
        "that authorized_keys sets. A start-up file that starts another shell (exec) has to see whether that is there"
    )
    return case.error("shell", f"the login shell ended before Python was started: {said}", hint)


def _restricted(case: _Case) -> InvalidRuntimeError | None:
    said = [line for line in _ending(case) if re.search(r": restricted(?:$|: )", line)]
    if not said:
        return None
    detail = f"the login shell of the account is a restricted one, which starts no Python: {said[-1]}"
    return case.error("shell", detail, "have the host's administrator give it another: usermod -s /bin/bash USER")


def on_terminal(host: str) -> InvalidRuntimeError:
    """Return the error about a host that runs commands on a terminal, which changes the bytes that go through it."""
    detail = "the host runs commands on a terminal, as recordings of sessions do (script, tlog, asciinema)"
    hint = (
        "have commands that come without a terminal left out of the recording: start it only if [ -t 0 ], in the "
        "start-up file, the ForceCommand of sshd_config, or the command of authorized_keys that starts it"
    )
    return InvalidRuntimeError(host, "shell", detail, hint)


def _noise(case: _Case) -> InvalidRuntimeError | None:
    if case.phase != "noise":
        return None
    end = " / ".join(_useful(case.output)[-2:])[-_NOISE_SHOWN:]
    detail = f"the start-up files of the login shell print more than 1 MiB before Python starts, at the end: {end}"
    hint = (
        "have them print only on a terminal: for bash, '[[ $- == *i* ]] || return' at the beginning of ~/.bashrc. Or "
        "does one replace the shell by another program (exec)?"
    )
    return case.error("shell", detail, hint)


def _shell(case: _Case) -> InvalidRuntimeError | None:
    if found := case.find(r"^(?:exec|shell|subsystem) request failed on channel.*$"):
        return case.error("shell", found[0].strip(), "the account must be allowed to run commands")
    if case.phase == "timeout":
        if not case.printed and not case.logged_in:
            return None
        said = f"it printed: {case.printed}" if case.printed else "it printed nothing"
        detail = f"the login shell did not start Python within the time allowed; {said}"
        hint = (
            f"'{case.plain_ssh} true' must end by itself: does a start-up file of the shell wait for input, or start "
            "another shell or a recording (script)?"
        )
        return case.error("shell", detail, f"{hint} {_MORE_TIME}")
    if case.status is None or (case.status in (_SSH_FAILED, -15) and not case.printed and not case.logged_in):
        return None
    detail = f"the login shell ended with exit status {case.status} instead of starting Python"
    if printed := case.printed or "\n".join(_useful(case.shell_said)[-_EVIDENCE_LINES:]):
        detail += f"; it printed: {printed}"
    hint = (
        f"'{case.plain_ssh} true' must succeed: does a start-up file of the shell end it (exit), or replace it (exec)? "
        "May the account log in at all?"
    )
    if case.status == 0:
        hint = (
            "does the host run another command in place of the one that it gets? ForceCommand in sshd_config, and "
            'a command that authorized_keys sets, must pass it on in quotes: /bin/sh -c "$SSH_ORIGINAL_COMMAND". '
            "Or does a start-up file of the login shell end it (exit 0)?"
        )
    if case.python != "python3":
        hint = f"is {case.python} a Python interpreter? If so: {hint}"
    return case.error("shell", detail, hint)


_MORE_TIME = 'Or allow more time: connection_kwargs={"timeout": 60}'

_Rule = Callable[[_Case], "InvalidRuntimeError | None"]
_AFTER_LOGIN: tuple[_Rule, ...] = (_noise, _no_room, _lost, _no_process, _restricted, _no_python, _shell)

# How ssh ends, line by line: what its last line is tells what kind of failure it was.
_SAID_LAST: tuple[tuple[re.Pattern[str], _Rule], ...] = tuple(
    (re.compile(pattern, re.IGNORECASE), rule)
    for pattern, rule in (
        (r".* terminating, \d+ bad configuration options?|\S.*? line \d+: .*|Bad owner or permissions on .*", _config),
        (r"Can't open user config file .*|jumphost loop.*", _config),
        (r"Host key verification failed\.", _host_key),
        (r"ssh: Could not resolve hostname .*", _dns),
        (r"ssh: connect to host .*|stdio forwarding failed", _network),
        (r"(?:\S+: )?(?:Timeout, server |Connection |banner exchange: ).*(?:timed out|not responding).*", _network),
        (rf"{_DENIED.pattern}|.*\bToo many authentication failures.*", _auth),
        (r"Authentication failed\.?|.*no more authentication methods.*", _auth),
        (r"Disconnected from .*", _disconnected),
        (r"Unable to negotiate with .*|Protocol major versions differ.*|Bad server host key.*", _protocol),
        (r"kex_exchange_identification: .*|ssh_dispatch_run_fatal: .*|Connection (?:closed|reset) by .*", _dropped),
        (r"[\w:. ]*: Broken pipe", _dropped),
        (r"(?:exec|shell|subsystem) request failed on channel.*", _shell),
    )
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
