"""Commands of clients: permission, execution, answer."""

from __future__ import annotations

import logging
import sqlite3
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ....cluster.sent.auth_limit import limited_logger
from . import admin_commands, read_commands, scram, write_commands
from .cursors import Cursors
from .errors import CommandError, bad_value
from .store import DocumentStore

logger = logging.getLogger("lazycluster.mongo")

Document = dict[str, Any]

# What drivers add to every command, and what makes no difference here.
_EVERYWHERE = frozenset(
    {
        "$db",
        "lsid",
        "$clusterTime",
        "$readPreference",
        "apiVersion",
        "apiStrict",
        "apiDeprecationErrors",
        "comment",
        "maxTimeMS",
        "writeConcern",
        "readConcern",
    }
)
_BEFORE_LOGIN = frozenset(
    {"hello", "ismaster", "saslstart", "saslcontinue", "ping", "logout", "endsessions", "buildinfo"}
)
_DISK_FULL = 14031


@dataclass
class ClientSession:
    """One connection.

    Attributes:
        authenticated: Whether it has proved that it knows the password.
        conversation: The attempt to do so that is going on.
    """

    authenticated: bool = False
    conversation: scram.Conversation | None = field(default=None, repr=False)


class Dispatcher:
    """Runs commands. Those that write are in one transaction until `commit`.

    Args:
        store: The documents.
        credentials: What those who connect have to know; None: nothing, everybody may do everything.
    """

    def __init__(self, store: DocumentStore, credentials: scram.ScramCredentials | None) -> None:
        self.store = store
        self.cursors = Cursors(store)
        self._credentials = credentials
        self._own: dict[str, Callable[[ClientSession, Document], Document]] = {
            "hello": self._hello,
            "ismaster": self._hello,
            "saslstart": self._sasl_start,
            "saslcontinue": self._sasl_continue,
            "logout": self._logout,
        }

    def run(self, session: ClientSession, command: Document) -> Document:
        """Run a command and return the answer to it, which tells of failures, too."""
        try:
            return {**self._run(session, command), "ok": 1.0}
        except CommandError as error:
            return error.reply()
        except sqlite3.Error as error:
            full = "full" in str(error)
            return CommandError(_DISK_FULL if full else 8, f"the database cannot be used: {error}").reply()
        except Exception as error:  # a fault of ours must not end the server for everybody
            log = logger if session.authenticated or self._credentials is None else limited_logger()
            log.exception("a command failed")
            return CommandError(8, f"{type(error).__name__}: {error}").reply()

    def _run(self, session: ClientSession, command: Document) -> Document:
        if not command:
            raise bad_value("the command is empty")
        name = next(iter(command))
        key = name.lower()
        if not session.authenticated and self._credentials is not None and key not in _BEFORE_LOGIN:
            raise CommandError(13, f"Command {name} requires authentication")
        if key in self._own:
            return self._own[key](session, command)
        for module in (read_commands, write_commands, admin_commands):
            handler = module.COMMANDS.get(key)
            if handler is not None:
                function, known = handler
                _check_fields(name, command, known)
                return self._isolated(function, command) if module is not read_commands else function(self, command)
        raise CommandError(59, f"no such command: '{name}'")

    def _isolated(self, function: Callable[..., Document], command: Document) -> Document:
        """Run what may write such that a failure leaves nothing half done."""
        sql = self.store.sql
        if not sql.in_transaction:
            sql.execute("BEGIN IMMEDIATE")
        sql.execute("SAVEPOINT command")
        try:
            result = function(self, command)
        except BaseException:
            if sql.in_transaction:  # a full disk ends the whole transaction
                sql.execute("ROLLBACK TO command")
                sql.execute("RELEASE command")
            self.store.forget()
            raise
        sql.execute("RELEASE command")
        return result

    def commit(self) -> CommandError | None:
        """Bring to the disk what was written; returns why that failed, if it did: then nothing was written."""
        if not self.store.sql.in_transaction:
            return None
        try:
            self.store.sql.execute("COMMIT")
        except sqlite3.Error as error:
            if self.store.sql.in_transaction:
                self.store.sql.execute("ROLLBACK")
            self.store.forget()
            return CommandError(_DISK_FULL, f"the database cannot be written: {error}")
        return None

    # --- greeting and logging in ---------------------------------------------------------------
    def _hello(self, session: ClientSession, command: Document) -> Document:
        reply = admin_commands.greeting()
        if self._credentials is not None:
            if "saslSupportedMechs" in command:
                reply["saslSupportedMechs"] = [scram.MECHANISM]
            wanted = command.get("speculativeAuthenticate")
            if isinstance(wanted, Mapping) and wanted.get("mechanism") == scram.MECHANISM:
                try:
                    reply["speculativeAuthenticate"] = self._sasl_start(session, dict(wanted))
                except CommandError:  # the client then logs in the long way, and is told there
                    session.conversation = None
        return reply

    def _sasl_start(self, session: ClientSession, command: Document) -> Document:
        if command.get("mechanism") != scram.MECHANISM:
            raise CommandError(334, f"Only {scram.MECHANISM} is supported, not {command.get('mechanism')!r}")
        if self._credentials is None:
            raise CommandError(18, "Authentication failed: this server knows no users")
        session.authenticated = False
        session.conversation = scram.Conversation(self._credentials)
        return self._sasl_continue(session, command)

    def _sasl_continue(self, session: ClientSession, command: Document) -> Document:
        conversation = session.conversation
        payload = command.get("payload")
        if conversation is None or not isinstance(payload, bytes):
            raise CommandError(18, "Authentication failed.")
        try:
            answer = conversation.answer(bytes(payload))
        except CommandError:
            session.conversation = None
            raise
        session.authenticated = conversation.done
        return {"conversationId": 1, "done": conversation.done, "payload": answer}

    def _logout(self, session: ClientSession, command: Document) -> Document:
        session.authenticated, session.conversation = False, None
        return {}


def _check_fields(name: str, command: Document, known: frozenset[str]) -> None:
    for field_name in list(command)[1:]:
        if field_name not in known and field_name not in _EVERYWHERE:
            raise CommandError(40415, f"BSON field '{name}.{field_name}' is not supported by this server")
