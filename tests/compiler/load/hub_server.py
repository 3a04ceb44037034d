"""A Hugging Face hub in small, on loopback: what ``huggingface_hub`` asks for when it downloads a model."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

COMMIT = "5b1a7d4f0c3e29886e0d1f2c3b4a59687f6e5d4c"


class Hub(ThreadingHTTPServer):
    """Serves folders as repositories of one revision, "main".

    Attributes:
        repositories: hub id to folder; None is a gated repository.
        requests: method and path of everything that was asked for, in order.
    """

    daemon_threads = True

    def __init__(self, repositories: dict[str, Path | None]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repositories = repositories
        self.requests: list[str] = []

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def downloads(self) -> set[str]:
        """Paths inside repositories whose content was sent."""
        return {match[1] for line in self.requests if (match := re.match(r"GET .*/resolve/\w+/(.*)", line))}


@contextmanager
def serve_hub(repositories: dict[str, Path | None]) -> Iterator[Hub]:
    """Run a hub while the context is open."""
    with Hub(repositories) as hub:
        thread = threading.Thread(target=hub.serve_forever)
        thread.start()
        try:
            yield hub
        finally:
            hub.shutdown()
            thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def log_message(self, format: str, *args: object) -> None:
        """Nothing: the test reads `Hub.requests`."""

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.server.requests.append(f"{self.command} {path}")
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree)/([^/]+))?(?:/.*)?", path):
            repository, kind, revision = match[1], match[2], match[3]
        elif match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.*)", path):
            repository, kind, revision = match[1], match[3], match[2]
        else:
            return self._fail(404, "EntryNotFound")
        if repository not in self.server.repositories:
            return self._fail(401, "RepoNotFound")
        folder = self.server.repositories[repository]
        if folder is None:
            return self._fail(403, "GatedRepo")
        if revision not in (None, "main", COMMIT):
            return self._fail(404, "RevisionNotFound")
        if path.startswith("/api/"):
            return self._send_json(_list_files(folder) if kind == "tree" else _describe(repository, folder))
        return self._send_file(folder / kind)

    def _fail(self, status: int, code: str) -> None:
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("X-Error-Message", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def _send_json(self, value: object) -> None:
        self._send(json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _send_file(self, path: Path) -> None:
        if not path.is_file():
            return self._fail(404, "EntryNotFound")
        content = path.read_bytes()
        headers = {
            "ETag": f'"{hashlib.sha256(content).hexdigest()}"',
            "X-Repo-Commit": COMMIT,
            "Accept-Ranges": "bytes",
            "Content-Type": "application/octet-stream",
        }
        if match := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            first, last = int(match[1]), int(match[2] or len(content) - 1)
            headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
            return self._send(content[first : last + 1], headers, status=206)
        return self._send(content, headers)

    def _send(self, content: bytes, headers: dict[str, str], *, status: int = 200) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)


def _describe(repository: str, folder: Path) -> dict[str, object]:
    siblings = [{"rfilename": str(entry["path"])} for entry in _list_files(folder)]
    return {"id": repository, "modelId": repository, "sha": COMMIT, "private": False, "siblings": siblings}


def _list_files(folder: Path) -> list[dict[str, object]]:
    return [
        {
            "type": "file",
            "path": path.relative_to(folder).as_posix(),
            "size": path.stat().st_size,
            "oid": hashlib.sha1(path.read_bytes()).hexdigest(),
        }
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    ]
