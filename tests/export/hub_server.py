"""A small server that speaks what pushing and fetching an adapter need of the Hub, on loopback."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any
from urllib.parse import unquote, urlsplit


class Hub(ThreadingHTTPServer):
    """Repositories in memory; `token` may write, everyone may read."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.token = "hf_token_of_the_test"
        self.private: dict[str, bool] = {}
        self.commits: dict[str, list[tuple[str, dict[str, bytes]]]] = {}  # by repository, the oldest first
        self.large: dict[str, bytes] = {}
        self.asked: list[tuple[str, str]] = []
        self.broken = False

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def files(self, repo: str, revision: str) -> tuple[str, dict[str, bytes]] | None:
        commits = self.commits[repo]
        if revision == "main":
            return commits[-1] if commits else ("0" * 40, {})  # a new repository has a first, empty commit
        return next((commit for commit in commits if commit[0] == revision), None)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, *words: Any) -> None:
        pass

    def answer(self, status: int, content: Any = b"", **headers: str) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def handle_all(self) -> None:
        path = unquote(urlsplit(self.path).path)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.server.asked.append((self.command, path))
        if self.server.broken:
            return self.answer(500, b"broken")
        may_write = self.headers.get("Authorization") == f"Bearer {self.server.token}"
        if self.command in ("POST", "PUT") and not may_write and "/lfs/" not in path:
            return self.answer(401, {"error": "Invalid credentials"})
        for pattern, method in _ROUTES:
            found = re.fullmatch(pattern, f"{self.command} {path}")
            if found:
                return getattr(self, method)(body, *found.groups())
        return self.answer(404, {"error": f"no {path}"}, X_Error_Code="EntryNotFound")

    do_GET = do_HEAD = do_POST = do_PUT = handle_all

    def create(self, body: bytes) -> None:
        asked = json.loads(body)
        repo = f"{asked['organization']}/{asked['name']}" if asked.get("organization") else asked["name"]
        known = repo in self.server.commits
        self.server.commits.setdefault(repo, [])
        self.server.private.setdefault(repo, bool(asked.get("private")) or asked.get("visibility") == "private")
        self.answer(409 if known else 200, {"url": f"{self.server.url}/{repo}"})

    def preupload(self, body: bytes, repo: str) -> None:
        files = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                "shouldIgnore": False,
            }
            for file in json.loads(body)["files"]
        ]
        self.answer(200, {"files": files})

    def batch(self, body: bytes, repo: str) -> None:
        objects = [
            {**one, "actions": {"upload": {"href": f"{self.server.url}/lfs/{one['oid']}"}}}
            for one in json.loads(body)["objects"]
        ]
        self.answer(200, {"transfer": "basic", "objects": objects}, Content_Type="application/vnd.git-lfs+json")

    def put(self, body: bytes, oid: str) -> None:
        assert hashlib.sha256(body).hexdigest() == oid
        self.server.large[oid] = body
        self.answer(200)

    def commit(self, body: bytes, repo: str) -> None:
        commits = self.server.commits[repo]
        files = dict(commits[-1][1]) if commits else {}
        for line in body.splitlines():
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif item["key"] == "deletedFile":
                del files[value["path"]]
            elif item["key"] == "lfsFile":
                files[value["path"]] = self.server.large[value["oid"]]
        oid = hashlib.sha1(repr((len(commits), sorted(files.items()))).encode()).hexdigest()
        commits.append((oid, files))
        self.answer(200, {"commitUrl": f"{self.server.url}/{repo}/commit/{oid}", "commitOid": oid, "success": True})

    def found(self, repo: str, revision: str) -> tuple[str, dict[str, bytes]] | None:
        if repo not in self.server.commits:
            self.answer(404, {"error": "Repository not found"}, X_Error_Code="RepoNotFound")
            return None
        commit = self.server.files(repo, revision)
        if commit is None:
            self.answer(404, {"error": "Revision not found"}, X_Error_Code="RevisionNotFound")
        return commit

    def info(self, body: bytes, repo: str, revision: str) -> None:
        commit = self.found(repo, revision)
        if commit is not None:
            siblings = [{"rfilename": name} for name in commit[1]]
            self.answer(200, {"id": repo, "sha": commit[0], "private": False, "tags": [], "siblings": siblings})

    def tree(self, body: bytes, repo: str, revision: str) -> None:
        commit = self.found(repo, revision)
        if commit is not None:
            names = commit[1].items()
            self.answer(
                200, [{"type": "file", "path": n, "size": len(c), "oid": hashlib.sha1(c).hexdigest()} for n, c in names]
            )

    def resolve(self, body: bytes, repo: str, revision: str, name: str) -> None:
        commit = self.found(repo, revision)
        if commit is not None and name in commit[1]:
            content = commit[1][name]
            self.answer(200, content, ETag=f'"{hashlib.sha1(content).hexdigest()}"', X_Repo_Commit=commit[0])
        elif commit is not None:
            self.answer(404, b"", X_Error_Code="EntryNotFound", X_Repo_Commit=commit[0])


_REPO = r"([\w.-]+/[\w.-]+)"
_ROUTES = [
    (r"POST /api/repos/create", "create"),
    (r"POST /api/validate-yaml", "valid"),
    (rf"POST /api/models/{_REPO}/preupload/main", "preupload"),
    (rf"POST /{_REPO}\.git/info/lfs/objects/batch", "batch"),
    (r"PUT /lfs/(\w+)", "put"),
    (rf"POST /api/models/{_REPO}/commit/main", "commit"),
    (rf"GET /api/models/{_REPO}/revision/(.+)", "info"),
    (rf"GET /api/models/{_REPO}/tree/([^/]+)", "tree"),
    (rf"(?:GET|HEAD) /{_REPO}/resolve/([^/]+)/(.+)", "resolve"),
]
_Handler.valid = lambda self, body: self.answer(200, {"errors": [], "warnings": []})  # type: ignore[attr-defined]


@contextmanager
def hub() -> Iterator[Hub]:
    """A running Hub."""
    server = Hub()
    Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
