"""A Hugging Face hub on this machine: what `huggingface_hub` asks, answered from local folders."""

import hashlib
import json
import re
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.parse import unquote, urlsplit

INFO = re.compile(r"/api/(models|datasets)/([^/]+/[^/]+)(?:/revision/(.+))?")
TREE = re.compile(r"/api/(models|datasets)/([^/]+/[^/]+)/tree/(.+)")
FILE = re.compile(r"/(?:(datasets)/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)")


class FakeHub:
    """Repositories by kind ("models", "datasets") and name, and the requests that came."""

    def __init__(self):
        self.refs: dict[tuple, str] = {}  # (kind, name, revision) -> commit
        self.files: dict[tuple, dict[str, bytes]] = {}  # (kind, name, commit) -> files
        self.requests: list[str] = []
        self.is_down = False

    def commit(self, kind: str, name: str, folder: Path, revision: str = "main") -> str:
        """Makes a folder's files the new commit of a branch; returns its hash."""
        paths = sorted(path for path in folder.rglob("*") if path.is_file())
        files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}
        commit = hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()
        self.refs[kind, name, revision] = self.refs[kind, name, commit] = commit
        self.files[kind, name, commit] = files
        return commit

    def downloads(self) -> set[str]:
        """Returns the files that were downloaded."""
        found = (FILE.fullmatch(line.split()[1]) for line in self.requests if line[:3] == "GET")
        return {match[4] for match in found if match}

    def answer(self, url: str) -> tuple[int, dict[str, str], bytes]:
        """Returns status, headers and body of a request."""
        path = unquote(urlsplit(url).path)
        if self.is_down:
            return 503, {}, b"{}"
        for pattern, give in ((TREE, self._tree), (INFO, self._info), (FILE, self._file)):
            if match := pattern.fullmatch(path):
                kind, name, revision, *rest = match.groups()
                kind, revision = kind or "models", revision or "main"
                if not any(ref[:2] == (kind, name) for ref in self.refs):
                    return 401, {"X-Error-Code": "RepoNotFound"}, b'{"error": "no such repository"}'
                if (commit := self.refs.get((kind, name, revision))) is None:
                    return 404, {"X-Error-Code": "RevisionNotFound"}, b"{}"
                return give(self.files[kind, name, commit], name, commit, *rest)
        return 404, {}, b"{}"

    def _info(self, files: dict, name: str, commit: str):
        siblings = [{"rfilename": file} for file in files]
        return 200, {}, json.dumps({"id": name, "sha": commit, "siblings": siblings}).encode()

    def _tree(self, files: dict, name: str, commit: str):
        entries = [
            {"type": "file", "path": path, "size": len(raw), "oid": hashlib.sha1(raw).hexdigest()}
            for path, raw in files.items()
        ]
        return 200, {}, json.dumps(entries).encode()

    def _file(self, files: dict, name: str, commit: str, path: str):
        if path not in files:
            return 404, {"X-Error-Code": "EntryNotFound"}, b""
        etag = hashlib.sha1(files[path]).hexdigest()
        return 200, {"ETag": f'"{etag}"', "X-Repo-Commit": commit}, files[path]


@contextmanager
def serve(hub: FakeHub):
    """Serves `hub`; yields its address."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self):
            hub.requests.append(f"{self.command} {self.path}")
            status, headers, body = hub.answer(self.path)
            self.send_response(status)
            for header in {"Content-Length": str(len(body)), **headers}.items():
                self.send_header(*header)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        do_HEAD = do_GET

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
