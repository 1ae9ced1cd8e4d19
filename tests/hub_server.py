"""A Hugging Face Hub of folders on 127.0.0.1: what huggingface_hub and datasets ask for, no more.

Repositories are the folders models/<owner>/<name>/ and datasets/<owner>/<name>/ below one root.
Answers are the Hub's: an ETag and a commit with each file, an X-Error-Code with each refusal. It
answers 401 where a token is missing, also for a repository that does not exist, and to any token
that it does not know; what a gated repository is, though not its files, it tells everyone.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import re
import threading
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

TOKEN = "hf_test_token"
API = re.compile(r"/api/(models|datasets)/([^/]+/[^/]+|[^/]+)(?:/(revision|tree)/(.+))?")
UPLOAD = re.compile(r"/api/models/([^/]+/[^/]+)/(preupload|commit)/main")
FILE = re.compile(r"/(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)")


@dataclass
class Hub:
    """The running server; `requests` lists what was asked for, as "GET /path"."""

    url: str
    root: Path
    gated: Collection[str]
    requests: list[str] = field(default_factory=list)
    private: set[str] = field(default_factory=set)

    def commit(self, repository: str) -> str:
        """The commit of models/<owner>/<name> or datasets/<owner>/<name>: a sha1 of its files."""
        files = sorted(p for p in (self.root / repository).rglob("*") if p.is_file())
        return hashlib.sha1(b"".join(p.read_bytes() for p in files)).hexdigest()


class Refusal(Exception):
    """An answer that is no success: HTTP status, the Hub's error code, its message."""


class Handler(BaseHTTPRequestHandler):
    hub: Hub

    def do_GET(self) -> None:
        address, _, query = self.path.partition("?")
        self.hub.requests.append(f"{self.command} {unquote(address)}")
        try:
            if match := API.fullmatch(address):
                self._api(*match.groups(), deep="recursive=true" in query.lower())
            elif match := FILE.fullmatch(address):
                kind, name, revision, path = match.groups()
                folder, commit = self._repository("datasets" if kind else "models", name, revision)
                file = self._entry(folder, unquote(path))
                self._answer(
                    200, file.read_bytes(), {"X-Repo-Commit": commit, "ETag": f'"{_id(file)}"'}
                )
            else:
                raise Refusal(404, "", "Sorry, we can't find the page you are looking for.")
        except Refusal as refusal:
            status, code, message = refusal.args
            self._answer(status, b"", {"X-Error-Code": code, "X-Error-Message": message})

    do_HEAD = do_GET

    def do_POST(self) -> None:
        """Create a model's repository, or add files to it; needs the token."""
        address = self.path.partition("?")[0]
        self.hub.requests.append(f"POST {address}")
        body = self.rfile.read(int(self.headers["Content-Length"]))
        try:
            if self.headers.get("Authorization") != f"Bearer {TOKEN}":
                raise Refusal(401, "", "Invalid credentials in Authorization header")
            answer = self._post(address, body)
        except Refusal as refusal:
            status, code, message = refusal.args
            self._answer(status, b"", {"X-Error-Code": code, "X-Error-Message": message})
        else:
            status = 409 if "error" in answer else 200
            body = json.dumps(answer).encode()
            self._answer(status, body, {"Content-Type": "application/json"})

    def _post(self, address: str, body: bytes) -> dict[str, object]:
        if address == "/api/validate-yaml":
            return {"errors": [], "warnings": []}
        if address == "/api/repos/create":
            fields = json.loads(body)
            name = f"{fields['organization']}/{fields['name']}"
            folder = self.hub.root / "models" / name
            if folder.is_dir():
                return {"error": "You already created it", "url": f"{self.hub.url}/{name}"}
            folder.mkdir(parents=True)
            if fields.get("private") or fields.get("visibility") == "private":
                self.hub.private.add(name)
            return {"url": f"{self.hub.url}/{name}", "name": name}
        name, what = UPLOAD.fullmatch(address).groups()
        folder, commit = self._repository("models", name, "main")
        if what == "preupload":
            files = [file["path"] for file in json.loads(body)["files"]]
            regular = {"uploadMode": "regular", "shouldIgnore": False}
            return {"files": [{"path": path, **regular} for path in files]}
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "file":
                file = line["value"]
                (folder / file["path"]).write_bytes(base64.b64decode(file["content"]))
        commit = self.hub.commit(f"models/{name}")
        return {"commitUrl": f"{self.hub.url}/{name}/commit/{commit}", "commitOid": commit}

    def _api(self, kind: str, name: str, what: str | None, rest: str | None, deep: bool) -> None:
        revision, _, path = (rest or "main").partition("/")
        folder, commit = self._repository(kind, name, revision, public=what is None)
        if what == "tree":
            inside = self._entry(folder, unquote(path))
            found = inside.rglob("*") if deep else inside.iterdir()
            answer = [_record(folder, entry) for entry in sorted(found)]
        else:
            files = sorted(p for p in folder.rglob("*") if p.is_file())
            names = [{"rfilename": str(p.relative_to(folder))} for p in files]
            private = name in self.hub.private
            answer = {"id": name, "sha": commit, "private": private, "siblings": names}
        self._answer(200, json.dumps(answer).encode(), {"Content-Type": "application/json"})

    def _repository(
        self, kind: str, name: str, revision: str, public: bool = False
    ) -> tuple[Path, str]:
        token, folder = self.headers.get("Authorization"), self.hub.root / kind / name
        if token not in (None, f"Bearer {TOKEN}"):
            raise Refusal(401, "", "Invalid credentials in Authorization header")
        if not folder.is_dir():
            raise Refusal(404 if token else 401, "RepoNotFound", "Repository not found")
        if name in self.hub.gated and not token and not public:
            raise Refusal(401, "GatedRepo", f"Access to {kind[:-1]} {name} is restricted.")
        commit = self.hub.commit(f"{kind}/{name}")
        if unquote(revision) not in ("main", commit):
            raise Refusal(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return folder, commit

    def _entry(self, folder: Path, path: str) -> Path:
        if not (folder / path).exists():
            raise Refusal(404, "EntryNotFound", "Entry not found")
        return folder / path

    def _answer(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Keep the tests' output clean: `requests` has it all."""


def _record(folder: Path, entry: Path) -> dict[str, object]:
    path = str(entry.relative_to(folder))
    if entry.is_dir():
        return {"type": "directory", "path": path, "oid": hashlib.sha1(path.encode()).hexdigest()}
    return {"type": "file", "path": path, "size": entry.stat().st_size, "oid": _id(entry)}


def _id(file: Path) -> str:
    return hashlib.sha1(file.read_bytes()).hexdigest()


@contextlib.contextmanager
def hub(root: Path, gated: Collection[str] = ()) -> Iterator[Hub]:
    """Serve the folders below `root`; those in `gated` only to who sends TOKEN."""
    handler = type("HubHandler", (Handler,), {})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    handler.hub = Hub(f"http://127.0.0.1:{server.server_port}", root, gated)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield handler.hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
