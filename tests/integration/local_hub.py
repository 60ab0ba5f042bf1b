"""A model hub on this machine: as much of the protocol as the hub's own client uses."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

REVISION = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class LocalHub:
    """One repository, which has one commit.

    `fetched` lists the files whose content was asked for.
    """

    hub_id: str
    folder: Path
    url: str = ""
    fetched: list[str] = field(default_factory=list)

    @property
    def files(self) -> list[str]:
        """Paths inside the repository."""
        paths = sorted(path for path in self.folder.rglob("*") if path.is_file())
        return [str(path.relative_to(self.folder)) for path in paths]

    def response(self, path: str) -> Any:
        """JSON for a path below `/api/`, or None if there is no such thing."""
        if path == f"/api/models/{self.hub_id}/revision/{REVISION}":
            siblings = [{"rfilename": name} for name in self.files]
            return {"id": self.hub_id, "sha": REVISION, "siblings": siblings}
        if path == f"/api/models/{self.hub_id}/tree/{REVISION}":
            return [
                {
                    "type": "file",
                    "path": name,
                    "size": len(self.content(name)),
                    "oid": digest(self.content(name)),
                }
                for name in self.files
            ]
        return None

    def content(self, name: str) -> bytes:
        return (self.folder / name).read_bytes()

    def named(self, path: str) -> str | None:
        """The file that a path means, if there is one."""
        name = path.removeprefix(f"/{self.hub_id}/resolve/{REVISION}/")
        return name if name in self.files else None


def digest(content: bytes) -> str:
    return hashlib.sha1(content, usedforsecurity=False).hexdigest()


class Handler(BaseHTTPRequestHandler):
    """Answers for the hub of its server."""

    protocol_version = "HTTP/1.1"
    server: HubServer

    def do_HEAD(self) -> None:
        self._response(with_body=False)

    def do_GET(self) -> None:
        self._response(with_body=True)

    def _response(self, with_body: bool) -> None:
        hub, path = self.server.hub, urlsplit(self.path).path
        if path.startswith("/api/"):
            told = hub.response(path)
            self._send(json.dumps(told).encode(), with_body, "" if told else "RevisionNotFound")
        elif (name := hub.named(path)) is not None:
            if with_body:
                hub.fetched.append(name)
            self._send(hub.content(name), with_body)
        else:
            self._send(b"", with_body, "EntryNotFound")

    def _send(self, body: bytes, with_body: bool, error: str = "") -> None:
        self.send_response(404 if error else 200)
        if error:
            self.send_header("X-Error-Code", error)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Content-Type", "application/json")
        self.send_header("ETag", f'"{digest(body)}"')
        self.send_header("X-Repo-Commit", REVISION)
        self.end_headers()
        if with_body:
            self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        """Nobody reads it."""


class HubServer(ThreadingHTTPServer):
    """On a free port of this machine."""

    def __init__(self, hub: LocalHub) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.hub = hub
        hub.url = f"http://127.0.0.1:{self.server_address[1]}"


@contextmanager
def local_hub(hub_id: str, folder: Path) -> Iterator[LocalHub]:
    """Serves a folder as a repository, for as long as the block runs."""
    server = HubServer(LocalHub(hub_id, folder))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server.hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
