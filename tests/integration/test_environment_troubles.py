"""What goes wrong with Python environments: a clear error, and never a half one in use."""

from __future__ import annotations

import datetime
import importlib
import ipaddress
import os
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from environment_hosts import connect, environments, prefix, version_of

from lazycluster import Environment, EnvironmentSpec, Runtime
from lazycluster.exceptions import EnvironmentBuildError, LazyclusterError
from wheelhouse import Index, make_project

pytest.importorskip("uv")


def _refused(host: Any, environment: Any, *parts: str) -> EnvironmentBuildError:
    """Ask for an environment; it must fail with an error that names the host and all of some texts."""
    with connect(host, environment) as runtime:
        with pytest.raises(EnvironmentBuildError) as caught:
            runtime.prepare()
        assert runtime.environment_path is None
    for part in (host.name, *parts):
        assert part in str(caught.value)
    assert "Next step:" in str(caught.value)
    assert environments(host) == []
    return caught.value


def test_what_cannot_be_resolved_is_explained(make_hosts: Any, index: Index, tmp_path: Path) -> None:
    index.add("alpha", requires=("beta<2",))
    index.add("beta", "1.0")
    index.add("beta", "2.0")
    index.add("windows-only", tag="cp39-cp39-win_amd64")
    host = make_hosts(1)[0]
    assert _refused(host, ["no-such-package"], "no-such-package").package == "no-such-package"
    assert _refused(host, ["beta==7"], "beta==7").package == "beta"
    _refused(host, ["alpha", "beta==2.0"], "alpha", "beta")
    _refused(host, ["windows-only"], "windows-only")
    _refused(host, ["this is no requirement!"], "this is no requirement!")
    _refused(host, [str(tmp_path)], str(tmp_path))


def test_a_package_without_a_wheel_that_cannot_be_built(make_hosts: Any, index: Index, tmp_path: Path) -> None:
    project = make_project(tmp_path, "source-only", "")
    (project / "PKG-INFO").write_text("Metadata-Version: 2.1\nName: source-only\nVersion: 1.0\n")
    backend = project / "backend.py"
    works = backend.read_text()
    backend.write_text("def build_wheel(*args, **kwargs):\n    raise SystemExit('no compiler')\n")
    archive = index.folder / "source_only-1.0.tar.gz"

    def publish() -> None:
        with tarfile.open(archive, "w:gz") as file:
            file.add(project, "source_only-1.0")

    publish()
    host = make_hosts(1)[0]
    error = _refused(host, ["source-only"], "source-only 1.0", "no wheel fits, and it cannot be built")
    assert error.package == "source-only"
    assert "no compiler" in str(error)
    backend.write_text(works)
    publish()
    with connect(host, EnvironmentSpec(["source-only"])) as runtime:
        runtime.prepare(refresh=True)
        assert runtime.call(lambda: importlib.import_module("source_only").__name__) == "source_only"


def test_no_python_that_fits(make_hosts: Any, index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    index.add("alpha")
    monkeypatch.setenv("UV_PYTHON_INSTALL_MIRROR", index.url)
    monkeypatch.setenv("UV_HTTP_RETRIES", "0")
    version = "3.99"
    _refused(make_hosts(1)[0], EnvironmentSpec(["alpha"], python=version), f"no Python {version}", "the host has: 3.")


def test_a_wheel_that_is_not_what_the_index_says(make_hosts: Any, index: Index) -> None:
    index.broken.add(index.add("tampered").name)  # a name of its own: good ones are kept on the manager
    host = make_hosts(1)[0]
    with (
        pytest.raises(EnvironmentBuildError, match="hash of tampered") as caught,
        connect(host, ["tampered"]) as runtime,
    ):
        runtime.prepare()
    assert caught.value.package == "tampered"
    assert environments(host) == []


def test_an_index_that_cannot_be_reached(make_hosts: Any, index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UV_DEFAULT_INDEX", "http://me:s3cret@127.0.0.1:9/simple/")
    monkeypatch.setenv("UV_HTTP_RETRIES", "0")
    error = _refused(make_hosts(1)[0], ["alpha"], "the index cannot be reached")
    assert "s3cret" not in str(error)


def test_an_index_that_never_answers(make_hosts: Any, index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UV_HTTP_TIMEOUT", "1")
    monkeypatch.setenv("UV_HTTP_RETRIES", "0")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("UV_DEFAULT_INDEX", f"http://127.0.0.1:{silent.getsockname()[1]}/simple/")
        _refused(make_hosts(1)[0], ["alpha"], "the index cannot be reached", "check the network and the index")


def test_an_index_that_is_lost_after_it_was_asked(make_hosts: Any, index: Index) -> None:
    index.add("alpha")
    host = make_hosts(1)[0]
    with connect(host, ["alpha"]) as runtime:
        runtime.prepare()
    host.run("rm -rf ~/.cache/lazycluster/envs ~/.cache/lazycluster/wheels", user=host.user)
    shutil.rmtree(Path(Environment.main_directory, "environments", "wheels"))
    index.refused.add("127.0.0.1")
    error = _refused(host, ["alpha"], "alpha 1.0 cannot be fetched", "503", "check the network and the index")
    assert error.package == "alpha"


def test_places_that_cannot_be_used(make_hosts: Any, index: Index) -> None:
    index.add("alpha")
    host = make_hosts(1)[0]
    host.run("mkdir /home/lazy/plain && mount -t tmpfs -o noexec,mode=0777 tmpfs /home/lazy/plain")
    _refused(host, EnvironmentSpec(["alpha"], cache_dir="/home/lazy/plain/cache"), "noexec", "cache_dir")
    _refused(host, EnvironmentSpec(["alpha"], cache_dir="/usr/share/cache"), "/usr/share/cache", "cache_dir")
    host.run("touch ~/file", user=host.user)
    _refused(host, EnvironmentSpec(["alpha"], cache_dir="~/file"), "file", "cache_dir")


def test_a_disk_that_is_full(make_hosts: Any, index: Index) -> None:
    index.add("alpha", ballast=30_000_000)
    size = Path(importlib.import_module("uv").find_uv_bin()).stat().st_size
    for room in (40, 15):  # while it is installed; while it is sent
        host = make_hosts(1, home_size=str(size + room * 1_000_000))[0]
        _refused(host, ["alpha"], "space")


@pytest.mark.soak
def test_one_that_is_damaged_is_made_anew(make_hosts: Any, index: Index) -> None:
    index.add("alpha")
    host = make_hosts(1)[0]
    damages: list[Callable[[Path], Any]] = [
        lambda prefix: (prefix / "lazycluster.json").unlink(),
        lambda prefix: (prefix / "lazycluster.json").write_text("{"),
        lambda prefix: next(prefix.glob("lib/*/site-packages/alpha.py")).unlink(),
        lambda prefix: ((prefix / "bin/python").unlink(), (prefix / "bin/python").symlink_to("/gone/python")),
    ]
    for damage in damages:
        with connect(host, ["alpha"]) as runtime:
            runtime.prepare()
        damage(prefix(host))
        with connect(host, ["alpha"]) as runtime:
            assert runtime.call(version_of, "alpha") == "1.0"


def test_two_managers_at_once(make_hosts: Any, index: Index) -> None:
    index.add("alpha")
    host = make_hosts(1)[0]
    with connect(host, ["alpha"]) as first, connect(host, ["alpha"]) as second, ThreadPoolExecutor(2) as threads:
        for result in [threads.submit(one.call, version_of, "alpha") for one in (first, second)]:
            assert result.result(60) == "1.0"
        assert first.environment_path == second.environment_path
    assert len(environments(host)) == 1


def _flip_a_byte(path: Path) -> None:
    stamp = path.stat()
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))


def test_a_package_that_was_kept_and_is_damaged_is_had_anew(
    make_hosts: Any, index: Index, caplog: pytest.LogCaptureFixture
) -> None:
    index.add("alpha")
    host = make_hosts(1)[0]
    kept = Path(Environment.main_directory, "environments", "wheels")
    for gone, damaged in (("", None), ("", host.path("~/.cache/lazycluster/wheels")), ("wheels", kept)):
        host.run(f"cd {host.home}/.cache/lazycluster 2>/dev/null && rm -rf envs cache {gone} || true")
        if damaged is not None:
            (path,) = damaged.glob("*/*.whl")
            _flip_a_byte(path)
        caplog.clear()
        with connect(host, ["alpha"]) as runtime:
            assert runtime.call(version_of, "alpha") == "1.0"
        assert ("cached packages were damaged" in caplog.text) == (damaged is not None)


def test_a_manager_that_cannot_keep_packages(
    make_hosts: Any, index: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index.add("alpha")
    file = tmp_path / "file"
    file.touch()
    monkeypatch.setattr(Environment, "main_directory", str(file / "below"))
    _refused(make_hosts(1)[0], ["alpha"], f"on the manager: {file}", "Environment.main_directory")


def _begun(index: Index) -> None:
    assert index.waiting.wait(60)


def test_a_link_that_is_lost_while_it_is_made(make_hosts: Any, index: Index) -> None:
    index.add("alpha")
    host = make_hosts(1)[0]
    with connect(host, ["alpha"]) as runtime:
        runtime.call(int)  # resolved
    host.run("rm -rf ~/.cache/lazycluster", user=host.user)
    index.add("beta")
    index.gate.clear()
    with connect(host, ["alpha", "beta"]) as runtime, ThreadPoolExecutor(1) as thread:
        future = thread.submit(runtime.prepare)
        _begun(index)
        for session in host.sessions():
            os.kill(session.pid, signal.SIGKILL)
        index.gate.set()
        future.result(60)  # the link is made again, and the work goes on
        assert runtime.call(version_of, "beta") == "1.0"
    assert len(environments(host)) == 1


@pytest.mark.soak
def test_a_host_that_is_lost_while_it_is_made(make_hosts: Any, index: Index) -> None:
    index.add("alpha")
    host = make_hosts(1)[0]
    index.gate.clear()
    settings = {"config_file": host._pool.config_file, "reconnect": 1, "link_timeout": 3}
    runtime = Runtime(host.name, connection_kwargs=settings, environment=EnvironmentSpec(["alpha"], network="manager"))
    with runtime, ThreadPoolExecutor(1) as thread:
        future = thread.submit(runtime.prepare)
        _begun(index)
        host.power_off()
        index.gate.set()
        with pytest.raises(LazyclusterError, match=r"host1: .*lost.*(?s:.)*Next step:"):
            future.result(60)
        assert runtime.environment_path is None
    host.power_on()
    with connect(host, ["alpha"]) as runtime:
        assert runtime.call(version_of, "alpha") == "1.0"


_VICTIM = """
import sys
from lazycluster import Runtime
runtime = Runtime("host1", connection_kwargs={"config_file": sys.argv[1]}, environment=["alpha"])
print("go", flush=True)
runtime.prepare()
"""


def test_a_manager_that_is_killed_while_it_makes_one(make_hosts: Any, index: Index) -> None:
    index.add("alpha")
    host = make_hosts(1)[0]
    with connect(host, ["alpha"]) as runtime:
        runtime.prepare()
    host.run("rm -rf ~/.cache/lazycluster/envs ~/.cache/lazycluster/wheels", user=host.user)
    # A file of the host's that nobody can finish: the installer waits for the lock of its cache.
    holder = subprocess.Popen(
        host.inside(f"flock {host.home}/.cache/lazycluster/cache/.lock cat", user=host.user), stdin=-1
    )
    try:
        victim = subprocess.Popen([sys.executable, "-c", _VICTIM, host._pool.config_file], stdout=-1)
        assert victim.stdout is not None
        assert victim.stdout.readline() == b"go\n"
        _until(lambda: any("/uv" in process.command for process in host.processes()))
        victim.kill()
        victim.communicate()
        _until(lambda: not any("/uv" in process.command for process in host.processes()))
    finally:
        holder.communicate(b"")
    with connect(host, ["alpha"]) as runtime:
        assert runtime.call(version_of, "alpha") == "1.0"
    assert len(environments(host)) == 1


def _until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        threading.Event().wait(0.02)


def test_an_index_whose_certificate_is_not_valid_by_this_clock(
    make_hosts: Any, index: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As it looks from where the clock is years behind."""
    certificate = tmp_path / "certificate.pem"
    certificate.write_bytes(_certificate(datetime.datetime(2090, 1, 1), datetime.datetime(2091, 1, 1)))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    monkeypatch.setenv("UV_HTTP_RETRIES", "0")
    with index.at("127.0.0.1", context):
        monkeypatch.setenv("UV_DEFAULT_INDEX", index.url.replace("http:", "https:"))
        _refused(make_hosts(1)[0], ["alpha"], "the certificate of the index is not accepted", "check the clock")


def _certificate(begins: datetime.datetime, ends: datetime.datetime) -> bytes:
    """A certificate of this machine that is its own authority, with its key."""
    x509 = pytest.importorskip("cryptography.x509")
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "index")])
    addresses = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
    builder = x509.CertificateBuilder(name, name, key.public_key(), 1, begins, ends)
    made = builder.add_extension(addresses, critical=False).sign(key, hashes.SHA256())
    encoding, plain = serialization.Encoding.PEM, serialization.NoEncryption()
    private = key.private_bytes(encoding, serialization.PrivateFormat.PKCS8, plain)
    return bytes(made.public_bytes(encoding) + private)


@pytest.mark.soak
def test_clocks_that_are_years_off(make_hosts: Any, index: Index) -> None:
    index.add("alpha")
    index.add("beta")
    host = make_hosts(1)[0]
    for name in ("alpha", "beta"):
        with connect(host, [name]) as runtime:
            runtime.prepare()
    stamps = [path for path in host.path("~/.cache/lazycluster/envs").iterdir() if path.name.endswith(".use")]
    for path, stamp in zip(stamps, (0, 4_000_000_000), strict=True):
        os.utime(path, (stamp, stamp))
    with connect(host, ["alpha"]) as runtime:
        assert runtime.call(version_of, "alpha") == "1.0"
