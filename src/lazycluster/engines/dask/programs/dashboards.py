"""Dashboards: only for those who know the cluster's secret path, and imported only when somebody looks."""

from __future__ import annotations

import asyncio
import hmac
import importlib
import re
import sys
from typing import Any

from tornado import web

from .connection_limits import HandshakeLimit

# The page of a worker, as a scheduler passes it on if jupyter-server-proxy is installed.
_OF_WORKER = re.compile(r"^/proxy/\d+/[^/]+/")
_MISSING = "This dashboard needs bokeh, which cannot be imported here ({})\n  Next step: pip install 'bokeh>=3.8.2'"


class _Attach(web.RequestHandler):
    """Answers the first visitor: imports bokeh, which takes a second, and sends him to the page that is there then."""

    def initialize(self, dashboard: Dashboard) -> None:
        self._dashboard = dashboard

    async def get(self) -> None:
        await self._dashboard.attach()
        if self._dashboard.problem:
            self.set_status(501)
            self.finish(_MISSING.format(self._dashboard.problem))
        else:
            # Relative, as all that distributed has in its pages: a proxy may have put more before the path.
            query = f"?{self.request.query}" if self.request.query else ""
            self.redirect("./" + self.request.path.rpartition("/")[2] + query)


class Dashboard:
    """The pages of a scheduler or a worker.

    Other users of the machine can connect to its loopback interface: so nothing is answered outside the path that the
    cluster's user was told. The pages themselves know nothing of it: all links in them are relative only where
    distributed takes them for the root.

    Args:
        server: The scheduler or worker, whose HTTP server runs.
        module: The module of distributed with its pages.
        prefix: The secret first part of the path.
    """

    def __init__(self, server: Any, module: str, prefix: str) -> None:
        self._server, self._module, self._prefix = server, module, prefix
        self._attaching: asyncio.Task[None] | None = None
        self.problem = ""
        self._application = server.http_application
        self._find = self._application.find_handler
        self._application.find_handler = self._find_handler
        self._limit = HandshakeLimit()
        self._serve_stream = server.http_server.handle_stream
        server.http_server.handle_stream = self._handle_stream
        info = sys.modules.get("distributed.http.scheduler.info")
        if info is not None:  # its pages lie in info/main and the like: more than that leads out of the path
            info.rel_path_statics["rel_path_statics"] = "../.."

    def _handle_stream(self, stream: Any, address: Any) -> Any:
        """Serve a connection, which has to ask for something below the path before long."""
        self._limit.came(stream)
        return self._serve_stream(stream, address)

    def _find_handler(self, request: Any, **kwargs: Any) -> Any:
        _, _, path = request.path.partition("/")
        first, slash, rest = path.partition("/")
        if not hmac.compare_digest(first.encode(), self._prefix.encode()):
            return self._application.get_handler_delegate(request, web.ErrorHandler, {"status_code": 404})
        self._limit.known(request.connection.stream)
        if not rest:  # distributed itself leads from here to an absolute path
            target = {"url": "./status" if slash else f"./{self._prefix}/status", "permanent": False}
            return self._application.get_handler_delegate(request, web.RedirectHandler, target)
        request.path = self._of_worker("/" + rest)
        request.uri = f"{request.path}?{request.query}" if request.query else request.path
        found = self._find(request, **kwargs)
        attached = self._attaching is not None and self._attaching.done() and not self.problem
        if attached or (found is not None and not issubclass(found.handler_class, web.ErrorHandler)):
            return found
        return self._application.get_handler_delegate(request, _Attach, {"dashboard": self})

    def _of_worker(self, path: str) -> str:
        """Return a path, with the secret part of a worker's if it leads to one."""
        return _OF_WORKER.sub(lambda found: f"{found[0]}{self._prefix}/", path)

    async def attach(self) -> None:
        """Add the pages, once."""
        if self._attaching is None:
            self._attaching = asyncio.ensure_future(self._attach())
        await asyncio.shield(self._attaching)

    async def _attach(self) -> None:
        try:
            pages = await asyncio.to_thread(importlib.import_module, self._module)
        except ImportError as error:
            self.problem = str(error)
            return
        pages.connect(self._application, self._server.http_server, self._server)
