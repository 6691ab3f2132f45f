"""Tiny packages made on the fly, and an index that serves them: nothing outside of this machine is needed."""

from __future__ import annotations

import base64
import hashlib
import http.server
import io
import os
import ssl
import threading
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path


def make_wheel(
    folder: Path,
    name: str,
    version: str = "1.0",
    *,
    files: Mapping[str, str] | None = None,
    requires: tuple[str, ...] = (),
    tag: str = "py3-none-any",
    scripts: Mapping[str, str] | None = None,
    ballast: int = 0,
) -> Path:
    """Write a wheel; by default with one module of the package's name that has the version.

    `ballast` bytes that cannot be compressed make it large.
    """
    module = name.replace("-", "_")
    info = f"{module}-{version}.dist-info"
    content = dict(files or {f"{module}.py": f"VERSION = {version!r}\n\n\ndef main():\n    print(VERSION)\n"})
    lines = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}"]
    content[f"{info}/METADATA"] = "\n".join([*lines, *(f"Requires-Dist: {one}" for one in requires)]) + "\n"
    content[f"{info}/WHEEL"] = f"Wheel-Version: 1.0\nGenerator: tests\nRoot-Is-Purelib: true\nTag: {tag}\n"
    if scripts:
        entries = "\n".join(f"{script} = {target}" for script, target in scripts.items())
        content[f"{info}/entry_points.txt"] = f"[console_scripts]\n{entries}\n"
    record = [f"{path},sha256={_digest(text)},{len(text.encode())}" for path, text in content.items()]
    content[f"{info}/RECORD"] = "\n".join([*record, f"{info}/RECORD,,"]) + "\n"
    path = folder / f"{module}-{version}-{tag}.whl"
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as archive:
        for inner, text in content.items():
            archive.writestr(zipfile.ZipInfo(inner, (2020, 1, 1, 0, 0, 0)), text)
        if ballast:
            archive.writestr(f"{module}.bin", os.urandom(ballast))
    path.write_bytes(data.getvalue())
    return path


def _digest(text: str) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).rstrip(b"=").decode()


def make_project(folder: Path, name: str, body: str, requires: tuple[str, ...] = ()) -> Path:
    """Write a package that is built by a backend of its own, so that building needs no index."""
    module = name.replace("-", "_")
    project = folder / name
    (project / "src" / module).mkdir(parents=True)
    (project / "src" / module / "__init__.py").write_text(body)
    (project / "pyproject.toml").write_text(
        f'[project]\nname = "{name}"\nversion = "1.0"\ndependencies = {list(requires)}\n'
        '[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n'
    )
    (project / "backend.py").write_text(
        _BACKEND.format(helper=str(Path(__file__).parent), name=name, requires=requires)
    )
    return project


_BACKEND = """
import sys
from pathlib import Path
sys.path.insert(0, {helper!r})
from wheelhouse import make_wheel

def _make(folder, files):
    return make_wheel(Path(folder), {name!r}, files=files, requires={requires!r}).name

def build_wheel(folder, config_settings=None, metadata_directory=None):
    source = Path(__file__).parent / "src"
    files = {{str(path.relative_to(source)): path.read_text() for path in source.rglob("*.py")}}
    return _make(folder, files)

def build_editable(folder, config_settings=None, metadata_directory=None):
    return _make(folder, {{"_{name}.pth": str(Path(__file__).parent / "src") + "\\n"}})
"""


@dataclass
class Index:
    """A package index on the loopback interface.

    Attributes:
        folder: The wheels; bare repositories of git are below its `repositories`.
        login: ``name:password`` that it asks for.
        broken: Names of files that are served with another content than the index says.
        requests: The paths that were asked for, but for those of which only the size was.
        asked_by: The same with who asked, as ``path@address``.
        refused: Addresses whose requests are refused.
        address: Where it is.
        gate: While it is cleared, files are not served.
        waiting: Is set when a file waits for that.
    """

    folder: Path
    login: str = ""
    broken: set[str] = field(default_factory=set)
    requests: list[str] = field(default_factory=list)
    asked_by: list[str] = field(default_factory=list)
    refused: set[str] = field(default_factory=set)
    address: str = "127.0.0.1"
    port: int = 0
    gate: threading.Event = field(default_factory=threading.Event)
    waiting: threading.Event = field(default_factory=threading.Event)

    @property
    def url(self) -> str:
        """Its address, with the credentials."""
        login = f"{self.login}@" if self.login else ""
        return f"http://{login}{self.address}:{self.port}/simple/"

    @contextmanager
    def at(self, address: str, context: ssl.SSLContext | None = None) -> Iterator[None]:
        """Serve it at another address, too, until the end of the block; by TLS if so asked."""
        before = self.address, self.port
        with _serving(self, address, context) as port:
            self.address, self.port = address, port
            try:
                yield
            finally:
                self.address, self.port = before

    def add(self, name: str, version: str = "1.0", **options: object) -> Path:
        """Publish a package."""
        return make_wheel(self.folder, name, version, **options)  # type: ignore[arg-type]

    def page(self, name: str) -> str | None:
        """The list of a package's files."""
        module = name.replace("-", "_")
        links = []
        for path in sorted(self.folder.glob(f"{module}-*")):
            digest = hashlib.sha256(path.read_bytes()).hexdigest()
            links.append(f'<a href="/files/{path.name}#sha256={digest}">{path.name}</a>')
        return "<html><body>" + "\n".join(links) + "</body></html>" if links else None


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    index: Index

    def do_GET(self) -> None:
        index = self.index
        if self.command == "GET":
            index.requests.append(self.path)
            index.asked_by.append(f"{self.path}@{self.client_address[0]}")
        wanted = "Basic " + base64.b64encode(index.login.encode()).decode()
        if self.client_address[0] in index.refused:
            self.answer(503, b"")
        elif index.login and self.headers.get("Authorization", "") != wanted:
            self.answer(401, b"", {"WWW-Authenticate": 'Basic realm="index"'})
        elif self.path.startswith("/repositories/"):
            self.serve_file(index.folder / self.path.partition("?")[0].lstrip("/"))
        elif self.path.startswith("/files/"):
            self.serve_file(index.folder / self.path.removeprefix("/files/"))
        else:
            page = index.page(self.path.removeprefix("/simple/").strip("/"))
            self.answer(200 if page else 404, (page or "").encode(), {"Content-Type": "text/html"})

    def serve_file(self, path: Path) -> None:
        if not path.is_file():
            self.answer(404, b"")
            return
        if not self.index.gate.is_set():
            self.index.waiting.set()
            self.index.gate.wait(30)
        data = path.read_bytes()
        self.answer(200, data + b"broken" if path.name in self.index.broken else data)

    def do_HEAD(self) -> None:
        self.do_GET()

    def answer(self, status: int, body: bytes, headers: Mapping[str, str] | None = None) -> None:
        self.send_response(status)
        for key, value in {**(headers or {}), "Content-Length": str(len(body))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


@contextmanager
def _serving(index: Index, address: str, context: ssl.SSLContext | None = None) -> Iterator[int]:
    """Serve an index at an address; returns the port."""
    handler = type("Handler", (_Handler,), {"index": index})
    server = http.server.ThreadingHTTPServer((address, 0), handler)
    server.daemon_threads = True
    if context is not None:
        server.socket = context.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield server.server_address[1]
    finally:
        index.gate.set()
        server.shutdown()
        server.server_close()
        thread.join()


@contextmanager
def serve(folder: Path, **options: str) -> Iterator[Index]:
    """Serve an index until the end of the block."""
    folder.mkdir(parents=True, exist_ok=True)
    index = Index(folder, **options)
    index.gate.set()
    with _serving(index, index.address) as index.port:
        yield index
