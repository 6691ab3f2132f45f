"""One error of each kind that the library has, for tests that pickle them.

As a program: writes what this version makes of them, for later versions to read (``pickled_errors.json``).
"""

from __future__ import annotations

import base64
import json
import pickle
from pathlib import Path

from lazycluster.background.state import _DamagedError
from lazycluster.cluster.exceptions import (
    ClusterError,
    ClusterFileError,
    ClusterStartError,
    MasterStartError,
    ServiceError,
    UnreachableError,
    VersionMismatchError,
    WorkerStartError,
)
from lazycluster.environments.uv import IndexUnreachableError
from lazycluster.exceptions import (
    AgentError,
    BackgroundError,
    BrokenPoolError,
    ConnectionLostError,
    EnvironmentBuildError,
    EnvironmentsBuildError,
    ForwardingForbiddenError,
    GroupTaskError,
    HostsLostError,
    InvalidRuntimeError,
    InvalidRuntimesError,
    LazyclusterError,
    NoAnswerError,
    NoPortsLeftError,
    NoRuntimesDetectedError,
    NoRuntimesError,
    PathCreationError,
    PortInUseError,
    RemoteTraceback,
    TaskExecutionError,
    TunnelError,
    WorkerLostError,
)
from lazycluster.runtime.reachability import Obstacle, Reachability
from lazycluster.ssh.mux import MuxError
from lazycluster.ssh.transfer import TransferError

FILE = Path(__file__).with_name("pickled_errors.json")

_INVALID = InvalidRuntimeError("host-1", "auth", "Permission denied\n", "add a key")
_FAILED = TaskExecutionError(
    "host-1: task 'a', step 1 of 1 failed: false",
    host="host-1", task="a", step=0, what="false", exit_status=1, output="x\n", log_file="/log",
)  # fmt: skip
_NO_ENVIRONMENT = EnvironmentBuildError("host-1", "no space left", "numpy", "free some", "error: disk\n")

ERRORS = [
    LazyclusterError("something"),
    _INVALID,
    InvalidRuntimesError([_INVALID, InvalidRuntimeError("host-2", "dns")]),
    ConnectionLostError("host-1", "it has ended"),
    NoAnswerError("host-1", "an answer to 'ports'", 30.0, "the link is interrupted"),
    AgentError("host-1", "os", "no such file", {"path": "/x"}),
    _FAILED,
    GroupTaskError([_FAILED, _FAILED]),
    RemoteTraceback("host-1", 12, "Traceback ..."),
    BrokenPoolError("the executor is broken"),
    WorkerLostError("lost", call="f()", host="host-1", hosts=["host-1"], pid=3, exit_status=-9, output="x"),
    HostsLostError("none is left", call="f()", hosts=["host-1", "host-2"]),
    NoRuntimesDetectedError("none"),
    NoRuntimesError("none"),
    TunnelError("no tunnel"),
    ForwardingForbiddenError("host-1", "AllowTcpForwarding is no"),
    PortInUseError(5000, "host-1", "by sshd"),
    NoPortsLeftError("none"),
    PathCreationError("not made"),
    _NO_ENVIRONMENT,
    EnvironmentsBuildError([_NO_ENVIRONMENT]),
    IndexUnreachableError("manager", "the index cannot be reached"),
    ClusterError("closed"),
    ServiceError("worker-1", "host-1", "it ended", exit_status=-9, output="a\nb\n", log_file="/x", hint="do"),
    MasterStartError(host="host-1", problem="gone", exit_status=3, name="scheduler"),
    WorkerStartError("worker-1", "host-1", "it ended", exit_status=1, output="x"),
    ClusterStartError([PortInUseError(5)]),
    ClusterFileError("cluster.toml", [(3, "unknown key 'x'"), (None, "hosts is missing")], "see the manual"),
    VersionMismatchError("other versions", ["host-1"]),
    UnreachableError(Reachability(obstacles=(Obstacle("host-1", "host-2", "10.0.0.2", 25000, "refused"),))),
    BackgroundError("its process has ended", "ClusterError"),
    _DamagedError(Path("/state/night/record.json"), "it is no record", "remove it"),
    MuxError("refused", True),
    TransferError("host-1", "manager", "/x\n\udcff", 28, "No space left", "free some"),
]


def described(error: BaseException) -> dict[str, str]:
    """Return what is to be the same of an error and of what was pickled."""
    attributes = {name: repr(value) for name, value in vars(error).items()}
    return {"type": type(error).__name__, "text": str(error), **attributes}


if __name__ == "__main__":
    kept = [[base64.b64encode(pickle.dumps(error, 4)).decode(), described(error)] for error in ERRORS]
    FILE.write_text(json.dumps(kept, indent=1) + "\n")
