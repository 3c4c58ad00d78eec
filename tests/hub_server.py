"""A server of the hub's HTTP API on this machine, for the real client: `HF_ENDPOINT=server.url`.

    with HubServer() as server:
        commit = server.add_folder("org/model", folder)
        server.faults.append(Fault("/resolve/", status=429, headers={"Retry-After": "1"}, times=1))
        subprocess.run(command, env=server.environment(tmp_path))
    assert server.bytes_of("/resolve/") < 100_000

Served are revision info, the tree, paths-info, and files with ranges, ETags, X-Repo-Commit and, for large ones, a redirect to a
signed URL as of LFS files. Contents are bytes, files of a folder, or `Sparse` files: a beginning and a size, whose rest is not
kept anywhere.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

SIGNATURE = "X-Amz-Signature=do-not-log-me"
"""In the query of every redirect: a secret that must be in no message and no log."""
LFS_BYTES = 100_000
"""Files of this size and more are redirected, as the hub does with LFS files."""
CHUNK = 1 << 16


@dataclass(frozen=True)
class Sparse:
    """A file with a beginning and a size; the rest reads as zeros and is made only while it is sent."""

    begin: bytes
    size: int

    def read(self, start: int, end: int) -> bytes:
        piece = self.begin[start:end]
        return piece + bytes(end - start - len(piece))


Content = bytes | Path | Sparse


def size_of(content: Content) -> int:
    return content.stat().st_size if isinstance(content, Path) else content.size if isinstance(content, Sparse) else len(content)


def read_part(content: Content, start: int, end: int) -> bytes:
    if isinstance(content, Path):
        with content.open("rb") as file:
            file.seek(start)
            return file.read(end - start)
    return content.read(start, end) if isinstance(content, Sparse) else content[start:end]


def digest_of(content: Content) -> str:
    found = content.read_bytes() if isinstance(content, Path) else content.begin if isinstance(content, Sparse) else content
    return hashlib.sha256(found + str(size_of(content)).encode()).hexdigest()


@dataclass
class Stored:
    """A repository: its commits, its refs, and who may read it."""

    commits: dict[str, dict[str, Content]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    readers: set[str] | None = None
    """Tokens that may know of a private repository; None for a public one."""
    granted: set[str] | None = None
    """Tokens that may read the files of a gated repository; None for one that is not gated."""


@dataclass
class Fault:
    """What goes wrong for paths that contain `part`: a status, a connection cut after so many bytes, ranges that are ignored."""

    part: str
    status: int = 0
    headers: Mapping[str, str] = field(default_factory=dict)
    cut_after: int | None = None
    whole: bool = False
    times: int = 1_000_000


@dataclass(frozen=True)
class Request:
    """A request as it was answered."""

    method: str
    path: str
    status: int
    num_bytes: int
    token: str


class HubServer:
    """Answers on 127.0.0.1 in a thread, until the context ends."""

    def __init__(self) -> None:
        self.repositories: dict[tuple[str, str], Stored] = {}
        self.faults: list[Fault] = []
        self.requests: list[Request] = []
        self.tokens: set[str] | None = None
        """Tokens that are valid at all; None for any."""
        self.lock = threading.Lock()
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)

    def __enter__(self) -> HubServer:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def environment(self, home: Path, **more: str) -> dict[str, str]:
        """Environment of a process whose hub this is: caches below `home`, online, without a token of this machine."""
        own = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING_FACE", "TRANSFORMERS_"))}
        hub = {"HF_ENDPOINT": self.url, "HF_HOME": str(home / "hf"), "ORCHESTRATOR_CACHE": str(home / "cache")}
        return own | hub | {"HF_HUB_DISABLE_XET": "1", "NO_PROXY": "127.0.0.1"} | more

    def add(self, name: str, files: Mapping[str, Content], *, kind: str = "model", ref: str = "main") -> str:
        """Add a commit with these files and let `ref` point at it; return the commit."""
        commit = hashlib.sha1(json.dumps([name, {path: digest_of(file) for path, file in files.items()}]).encode()).hexdigest()
        stored = self.repositories.setdefault((kind, name), Stored())
        stored.commits[commit] = dict(files)
        stored.refs[ref] = commit
        return commit

    def add_folder(self, name: str, folder: Path, *, kind: str = "model", ref: str = "main") -> str:
        """Add a commit with the files of a folder."""
        files: dict[str, Content] = {
            path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()
        }
        return self.add(name, files, kind=kind, ref=ref)

    def asked(self, part: str = "", method: str = "") -> list[Request]:
        """Requests whose path contains `part`."""
        return [request for request in self.requests if part in request.path and method in ("", request.method)]

    def bytes_of(self, part: str = "") -> int:
        """Bytes of the bodies that were sent for paths that contain `part`."""
        return sum(request.num_bytes for request in self.asked(part))


class _RefusedError(Exception):
    """An answer without a body that the client reads as an error."""

    def __init__(self, status: int, code: str = "", message: str = "", **headers: str) -> None:
        super().__init__(status)
        self.status = status
        self.headers = {key.replace("_", "-"): value for key, value in headers.items()}
        self.headers |= {"X-Error-Code": code} if code else {}
        self.headers |= {"X-Error-Message": message} if message else {}


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._answer()

    def do_HEAD(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    @property
    def token(self) -> str:
        return self.headers.get("Authorization", "").removeprefix("Bearer ").strip()

    def _answer(self) -> None:
        self.body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.cut_after: int | None = None
        self.whole = False
        try:
            self._fail_as_told()
            if self.hub.tokens is not None and self.token and self.token not in self.hub.tokens:
                raise _RefusedError(401, message="Invalid credentials in Authorization header")
            url = urlsplit(self.path)
            parts = [unquote(part) for part in url.path.strip("/").split("/")]
            if parts[0] == "cdn":
                self._send_file(*self._find(parts[1], "/".join(parts[2:4]), parts[4], "/".join(parts[5:])))
            elif parts[0] == "api" and parts[1] in ("models", "datasets"):
                self._send_api(parts[1].removesuffix("s"), parts[2:], parse_qs(url.query))
            else:
                kind, rest = ("dataset", parts[1:]) if parts[0] == "datasets" else ("model", parts)
                self._send_resolved(kind, rest)
        except _RefusedError as refused:
            self._send(refused.status, b"", refused.headers)

    def _fail_as_told(self) -> None:
        for fault in self.hub.faults:
            if fault.part in self.path and fault.times > 0:
                if fault.cut_after is not None and self.command != "GET":
                    continue
                fault.times -= 1
                self.cut_after, self.whole = fault.cut_after, fault.whole
                if fault.status:
                    raise _RefusedError(fault.status, **{key.replace("-", "_"): value for key, value in fault.headers.items()})
                return

    def _repository(self, kind: str, parts: list[str]) -> tuple[str, Stored, list[str]]:
        """Return the id, the repository and the rest of the path: an id has one part or two."""
        for count in (2, 1):
            name = "/".join(parts[:count])
            stored = self.hub.repositories.get((kind, name))
            if stored is not None and len(parts) >= count:
                if stored.readers is not None and self.token not in stored.readers:
                    break
                return name, stored, parts[count:]
        # The hub answers 401 to those without a token, whether it is missing or private.
        raise _RefusedError(404 if self.token else 401, "RepoNotFound", "Repository not found")

    def _commit(self, stored: Stored, revision: str) -> str:
        commit = stored.refs.get(revision, revision)
        if commit not in stored.commits:
            raise _RefusedError(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return commit

    def _require_granted(self, stored: Stored) -> None:
        if stored.granted is not None and self.token not in stored.granted:
            raise _RefusedError(403 if self.token else 401, "GatedRepo", "Access to the repository is restricted")

    def _find(self, kind: str, name: str, revision: str, path: str) -> tuple[str, Content]:
        stored = self.hub.repositories[kind, name.removeprefix("-/")]
        commit = self._commit(stored, revision)
        if path not in stored.commits[commit]:
            raise _RefusedError(404, "EntryNotFound", "Entry not found", X_Repo_Commit=commit)
        return commit, stored.commits[commit][path]

    def _send_api(self, kind: str, parts: list[str], query: dict[str, list[str]]) -> None:
        name, stored, rest = self._repository(kind, parts)
        if rest[:1] == ["tree"]:
            files = stored.commits[self._commit(stored, rest[1])]
            self._send_json(_tree(files, "/".join(rest[2:]), "true" in str(query.get("recursive", "")).lower()))
        elif rest[:1] == ["paths-info"]:
            files = stored.commits[self._commit(stored, rest[1])]
            asked = parse_qs(self.body.decode()).get("paths") or json.loads(self.body or b"{}").get("paths", [])
            entries = {entry["path"]: entry for path in asked for entry in _tree(files, path.rpartition("/")[0], recursive=False)}
            self._send_json([entries[path] for path in asked if path in entries])
        elif rest == ["auth-check"]:
            self._require_granted(stored)
            self._send_json({})
        elif not rest or rest[0] == "revision":
            commit = self._commit(stored, rest[1] if rest else "main")
            siblings = [{"rfilename": path} for path in stored.commits[commit]]
            gated = "manual" if stored.granted is not None else False
            self._send_json(
                {"_id": "0", "id": name, "sha": commit, "gated": gated, "private": False, "tags": [], "siblings": siblings}
            )
        else:
            raise _RefusedError(404, "EntryNotFound")

    def _send_resolved(self, kind: str, parts: list[str]) -> None:
        name, stored, rest = self._repository(kind, parts)
        if rest[:1] != ["resolve"] or len(rest) < 3:
            raise _RefusedError(404, "EntryNotFound")
        self._require_granted(stored)
        path = "/".join(rest[2:])
        commit, content = self._find(kind, name, rest[1], path)
        if size_of(content) < LFS_BYTES:
            self._send_file(commit, content)
            return
        headers = {
            "Location": f"{self.hub.url}/cdn/{kind}/{name if '/' in name else f'-/{name}'}/{commit}/{path}?{SIGNATURE}",
            "X-Repo-Commit": commit,
            "X-Linked-Size": str(size_of(content)),
            "X-Linked-Etag": f'"{digest_of(content)}"',
        }
        self._send(302, b"", headers)

    def _send_file(self, commit: str, content: Content) -> None:
        size, start = size_of(content), 0
        headers = {"ETag": f'"{digest_of(content)}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        status, end = 200, size
        asked = None if self.whole else self.headers.get("Range")
        if asked:
            first, _, last = asked.removeprefix("bytes=").partition("-")
            start, end = int(first), min(int(last) + 1, size) if last else size
            if start >= size:
                raise _RefusedError(416, Content_Range=f"bytes */{size}")
            status, headers["Content-Range"] = 206, f"bytes {start}-{end - 1}/{size}"
        self.send_response(status)
        for key, value in (headers | {"Content-Length": str(end - start)}).items():
            self.send_header(key, value)
        self.end_headers()
        sent = 0
        while self.command != "HEAD" and start + sent < end:
            piece = read_part(content, start + sent, min(start + sent + CHUNK, end))
            if self.cut_after is not None:
                piece = piece[: max(0, self.cut_after - sent)]
            try:
                self.wfile.write(piece)
            except OSError:  # the client has what it wanted
                self.close_connection = True
                break
            sent += len(piece)
            if self.cut_after is not None and sent >= self.cut_after:
                self.close_connection = True
                break
        self._count(status, sent)

    def _send_json(self, value: Any) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _send(self, status: int, body: bytes, headers: Mapping[str, str]) -> None:
        self.send_response(status)
        for key, value in ({"Content-Length": str(len(body))} | dict(headers)).items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)
        self._count(status, len(body) if self.command != "HEAD" else 0)

    def _count(self, status: int, num_bytes: int) -> None:
        with self.hub.lock:
            self.hub.requests.append(Request(self.command, self.path, status, num_bytes, self.token))


def _tree(files: Mapping[str, Content], below: str, recursive: bool) -> list[dict[str, Any]]:
    """Return the entries of a folder as the hub lists them, folders among them."""
    prefix = f"{below}/" if below else ""
    entries: dict[str, dict[str, Any]] = {}
    for path, content in files.items():
        if not path.startswith(prefix):
            continue
        inner = path.removeprefix(prefix).split("/")
        for depth in range(1, len(inner) if recursive else min(len(inner), 2)):
            folder = prefix + "/".join(inner[:depth])
            entries[folder] = {"type": "directory", "oid": hashlib.sha1(folder.encode()).hexdigest(), "size": 0, "path": folder}
        if recursive or len(inner) == 1:
            digest, size = digest_of(content), size_of(content)
            entries[path] = {"type": "file", "oid": digest[:40], "size": size, "path": path}
            if size >= LFS_BYTES:
                entries[path]["lfs"] = {"oid": digest, "size": size, "pointerSize": 134}
    return list(entries.values())
