"""Functions: calls that are forked from zygotes, and questions about the interpreters of the host."""

from __future__ import annotations

import json

from .commands import environment
from .forked_call import ForkedCall
from .paths import meant
from .processes import explained
from .zygotes import Zygotes

TYPE_CHECKING = False  # importing typing would cost more than the rest of the module
if TYPE_CHECKING:
    from typing import Any, Callable, Dict, List, Optional

    from .session import RequestChannel
    from .zygotes import Interpreter


def call(channel: RequestChannel) -> None:
    """Handle the request `call`: a pickled function, whose outcome is the channel's OUTPUT."""
    params = channel.params
    env = environment(channel)
    message = {
        "kind": "call",
        "cwd": meant(params.get("cwd") or "", "", env),
        "task": params.get("task") or "",
        "name": params.get("name") or "",
        "limits": params.get("limits") or {},
    }
    with_interpreter(
        channel,
        env,
        lambda interpreter: ForkedCall(channel, interpreter, message, lambda fields: _called(channel, fields)).start,
    )


def keep_library(channel: RequestChannel) -> Optional[bytes]:
    """Return what has a zygote import the pickling library, keeping it if it came with this request: it comes once."""
    params = channel.params
    libraries = channel.agent.shared(Zygotes).libraries
    if params.get("sources"):
        libraries[params["library"]] = json.dumps({"library": params["sources"]}).encode("ascii")
    return libraries.get(params["library"])


def with_interpreter(
    channel: RequestChannel,
    env: Dict[str, str],
    prepared: Callable[[Interpreter], Callable[[], Any]],
    failed: Callable[[], Any] = lambda: None,
) -> None:
    """Get the interpreter that a request for functions names ready, with what they will import; or fail the request.

    Args:
        channel: The request.
        env: The whole environment of its processes.
        prepared: Is called with the interpreter at once; what it returns, when that is ready.
        failed: Is called if the request has been failed.
    """
    params = channel.params
    zygotes = channel.agent.shared(Zygotes)
    digest = params["library"]
    library = keep_library(channel)
    if library is None:
        channel.fail("value", "the pickling library was not sent")
        failed()
        return
    interpreter = _interpreter(channel, zygotes, env)
    if interpreter is None:
        failed()
        return
    chosen = interpreter
    start = prepared(chosen)

    def ready() -> None:
        if chosen.error:
            _fail_start(channel, params.get("python"), chosen.error)
            failed()
        elif chosen.facts["version"][:2] != params["version"][:2]:
            _mismatch(channel, zygotes, chosen, env)
            failed()
        else:
            chosen.give_library(digest, library or b"")
            chosen.prepare([] if params.get("fresh") else params.get("imports") or [], start)

    chosen.when_ready(ready)


def _called(channel: RequestChannel, fields: Dict[str, Any]) -> None:
    if fields["status"] == "failed":
        channel.fail("os", fields["message"], path=fields.get("path"))
    else:
        channel.result(**fields)


def _interpreter(channel: RequestChannel, zygotes: Zygotes, env: Dict[str, str]) -> Optional[Interpreter]:
    python = channel.params.get("python")
    try:
        return zygotes.get(python, env)
    except OSError as error:
        _fail_start(channel, python, explained(error.strerror))
        return None


def _fail_start(channel: RequestChannel, python: Optional[str], why: str) -> None:
    channel.fail("python", "the interpreter {} cannot be started: {}".format(python or "python3", why), python=python)


def _mismatch(channel: RequestChannel, zygotes: Zygotes, interpreter: Interpreter, env: Dict[str, str]) -> None:
    """Answer that the versions differ, with what else the host has to offer."""
    wanted = channel.params["version"]
    version = interpreter.facts["version"]

    def tell(fields: Dict[str, Any]) -> None:
        found: List[Dict[str, Any]] = (fields.get("fields") or {}).get("interpreters") or []
        names = ["{} ({})".format(one["path"], _dotted(one["version"])) for one in found]
        fitting = [one["path"] for one in found if one["version"][:2] == wanted[:2]]
        if fitting:
            step = 'choose {} with python="{}" or python="auto"; or '.format(_dotted(wanted[:2]), fitting[0])
            step += 'have the manager\'s packages there, too: environment="manager"'
        else:
            step = 'have Python {} and the manager\'s packages there with environment="manager"; or install it on '
            step = (step + "the host, or use the host's version on the manager").format(_dotted(wanted[:2]))
        channel.fail(
            "mismatch",
            "Python {} on the manager, but {} on the host ({}): a function needs the same minor version on both. "
            "The host has: {}\n  Next step: {}".format(
                _dotted(wanted), _dotted(version), interpreter.facts["executable"], ", ".join(names) or "no other", step
            ),
            version=version,
            executable=interpreter.facts["executable"],
            interpreters=found,
        )

    ForkedCall(channel, interpreter, {"kind": "interpreters", "cwd": "/"}, tell).start()


def _dotted(version: List[int]) -> str:
    return ".".join(str(part) for part in version)


def packages(channel: RequestChannel) -> None:
    """Handle the request `packages`: the versions of what is installed for an interpreter."""
    _ask(channel, {"kind": "packages", "names": [str(name) for name in channel.params.get("names") or []]}, False)


def interpreters(channel: RequestChannel) -> None:
    """Handle the request `interpreters`: those that the host has."""
    _ask(channel, {"kind": "interpreters"}, True)


def _ask(channel: RequestChannel, message: Dict[str, Any], own: bool) -> None:
    """Have a zygote's child answer a question."""
    zygotes = channel.agent.shared(Zygotes)
    env = environment(channel)
    interpreter = zygotes.own(env) if own else _interpreter(channel, zygotes, env)
    if interpreter is None:
        return
    asked = interpreter

    def done(fields: Dict[str, Any]) -> None:
        if fields["status"] == "answered":
            channel.result(**fields["fields"])
        elif fields["status"] == "failed":
            channel.fail("os", fields["message"])
        else:
            channel.fail("python", "the interpreter does not answer", **fields)

    work = ForkedCall(channel, asked, message, done)

    def ready() -> None:
        if asked.error:
            _fail_start(channel, channel.params.get("python"), asked.error)
        else:
            work.start()

    asked.when_ready(ready)
