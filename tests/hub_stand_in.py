"""The hub's HTTP interface on this machine's loopback, as far as `opd` uses it; it never leaves the machine.

It answers like the hub (paths, status codes, headers of errors, redirects of large files to another host) from
repositories held in memory, and does what a network may do: answer late or with an error, or break off in the middle.
"""

import base64
import hashlib
import json
import re
import socket
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from math import prod
from pathlib import Path
from threading import Event, Lock, Thread
from typing import Any
from urllib.parse import unquote, urlsplit

LARGE = 4096  # bytes from which a file lies on the other host
_FILE = re.compile(r"/(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)")
_INFO = re.compile(r"/api/(models|datasets)/([^/]+/[^/]+)(?:/revision/([^/]+))?")
_REFS = re.compile(r"/api/(models|datasets)/([^/]+/[^/]+)/refs")
_WRITE = re.compile(r"/api/models/([^/]+/[^/]+)/(preupload|commit)/([^/]+)")
_BATCH = re.compile(r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch")

Files = dict[str, bytes]


class Hollow(bytes):
    """A safetensors file of which the header alone is there, and the length of the whole: of models of any size.

    `Hollow.of(shapes)` has bfloat16 tensors of these shapes.
    """

    whole: int

    @classmethod
    def of(cls, shapes: Mapping[str, Sequence[int]]) -> "Hollow":
        """A file that would hold tensors of `shapes`."""
        header, end = dict[str, Any](), 0
        for name, shape in shapes.items():
            start, end = end, end + 2 * prod(shape)
            header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [start, end]}
        text = json.dumps(header).encode()
        file = cls(len(text).to_bytes(8, "little") + text)
        file.whole = 8 + len(text) + end
        return file

    def __len__(self) -> int:
        return self.whole


@dataclass
class Repository:
    """A repository: its commits by hash, branches by name, and who may see it."""

    commits: dict[str, Files] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    private: bool = False
    gated: bool = False

    def commit(self, files: Files, branch: str = "main") -> str:
        """Add a commit; returns its hash."""
        digest = hashlib.sha1(repr((len(self.commits), sorted(files), branch)).encode()).hexdigest()
        self.commits[digest] = dict(files)
        self.branches[branch] = digest
        return digest


@dataclass
class Fault:
    """What happens to the next `times` requests whose path has `path` in it (and that begin at `method`)."""

    path: str
    method: str = "GET"
    status: int = 0
    break_after: int = -1  # bytes of the body, after which the connection ends
    hold: bool = False  # no answer at all, until the hub is closed
    drip_s: float = 0.0  # between two bytes of the body
    times: int = 1


class HubStandIn:
    """A hub on the loopback. `token` is the one that opens private and gated repositories."""

    def __init__(self) -> None:
        self.token, self.repositories = "hf_" + "t" * 20, dict[tuple[str, str], Repository]()
        self.faults, self.blobs = list[Fault](), dict[str, bytes]()
        self.seen, self.sent, self.ranges = list[str](), Counter[str](), list[str]()
        self.wrong = list[str]()  # what a client must never do
        self.closed, self.lock = Event(), Lock()
        hub = self

        class Handler(_Handler):
            stand_in = hub

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.port = self._server.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.elsewhere = f"http://localhost:{self.port}/elsewhere"  # another host for a client
        Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    def add(self, kind: str, repo: str, files: Files, **who: bool) -> str:
        """A repository with one commit, or one more commit of it; returns the hash."""
        found = self.repositories.setdefault((kind, repo), Repository(**who))
        return found.commit(files)

    def close(self) -> None:
        """End the server and what it holds back."""
        self.closed.set()
        self._server.shutdown()
        self._server.server_close()


@contextmanager
def hub_stand_in() -> Iterator[HubStandIn]:
    """A hub that lasts as long as the context."""
    hub = HubStandIn()
    try:
        yield hub
    finally:
        hub.close()


def folder_files(folder: Path) -> Files:
    """All files of a folder."""
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


class _Handler(BaseHTTPRequestHandler):
    stand_in: HubStandIn
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *arguments: Any) -> None: ...

    def do_HEAD(self) -> None:
        self._answer(self._get)

    def do_GET(self) -> None:
        self._answer(self._get)

    def do_POST(self) -> None:
        self._answer(self._post)

    def do_PUT(self) -> None:
        self._answer(self._put)

    def _answer(self, act: Callable[[str], None]) -> None:
        path = unquote(urlsplit(self.path).path) if "/revision/" not in self.path else urlsplit(self.path).path
        hub = self.stand_in
        with hub.lock:
            hub.seen.append(f"{self.command} {path}")
            fault = next((f for f in hub.faults if f.times and f.path in path and f.method == self.command), None)
            if fault is not None:
                fault.times -= 1
        self._fault = fault
        if fault is not None and fault.hold:
            hub.closed.wait(60)
            self.close_connection = True
            return
        if fault is not None and fault.status:
            self._body()
            self._say(fault.status, {"error": "planted"})
            return
        act(path)

    def _body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _say(self, status: int, value: Any, **headers: str) -> None:
        self._send(status, json.dumps(value).encode(), {"Content-Type": "application/json", **headers})

    def _refuse(self, status: int, code: str, message: str) -> None:
        self._say(status, {"error": message}, **{"X-Error-Code": code, "X-Error-Message": message})

    def _send(self, status: int, data: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(data))} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        cut = self._fault.break_after if self._fault is not None else -1
        if self._fault is not None and self._fault.drip_s:
            self._drip(data, self._fault.drip_s)
            return
        self.wfile.write(data if cut < 0 else data[:cut])
        self.stand_in.sent[urlsplit(self.path).path] += len(data) if cut < 0 else min(cut, len(data))
        if cut >= 0:
            self.wfile.flush()
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)

    def _drip(self, data: bytes, pause_s: float) -> None:
        for at in range(len(data)):
            if self.stand_in.closed.wait(pause_s):
                break
            try:
                self.wfile.write(data[at : at + 1])
            except OSError:
                break  # the client has gone
        self.close_connection = True

    # --- reading -----------------------------------------------------------------------------------------------------

    def _open(self, kind: str, repo: str) -> Repository | None:
        found = self.stand_in.repositories.get((kind, repo))
        given = self.headers.get("Authorization")
        if given and given != f"Bearer {self.stand_in.token}":
            self._refuse(401, "", "Invalid credentials in Authorization header")
            return None
        if found is None or (found.private and not given):
            self._refuse(401 if not given else 404, "RepoNotFound", "Repository not found")
            return None
        return found

    def _commit(self, repository: Repository, revision: str) -> str:
        commit = repository.branches.get(revision, revision)
        if commit not in repository.commits:
            self._refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
            return ""
        return commit

    def _get(self, path: str) -> None:
        if path.startswith("/elsewhere/"):
            self._blob(path.rpartition("/")[2])
        elif found := _REFS.fullmatch(path):
            if repository := self._open(found[1][:-1], found[2]):
                refs = [
                    {"name": n, "ref": f"refs/heads/{n}", "targetCommit": c} for n, c in repository.branches.items()
                ]
                self._say(200, {"branches": refs, "tags": [], "converts": []})
        elif found := _INFO.fullmatch(path):
            self._info(found[1][:-1], found[2], unquote(found[3] or "main"))
        elif found := _FILE.fullmatch(path):
            self._file("dataset" if found[1] else "model", found[2], found[3], found[4])
        else:
            self._refuse(404, "", "no such page")

    def _info(self, kind: str, repo: str, revision: str) -> None:
        if (repository := self._open(kind, repo)) and (commit := self._commit(repository, revision)):
            siblings = [{"rfilename": n, "size": len(d)} for n, d in sorted(repository.commits[commit].items())]
            about = {"id": repo, "sha": commit, "private": repository.private, "siblings": siblings}
            self._say(200, about | {"gated": "auto" if repository.gated else False})

    def _file(self, kind: str, repo: str, revision: str, name: str) -> None:
        repository = self._open(kind, repo)
        if repository is None or not (commit := self._commit(repository, revision)):
            return
        if repository.gated and not self.headers.get("Authorization"):
            self._refuse(401, "GatedRepo", "Access to this repository is restricted")
            return
        if name not in repository.commits[commit]:
            self._refuse(404, "EntryNotFound", "Entry not found")
            return
        if name.endswith((".bin", ".py", ".pt")):
            self.stand_in.wrong.append(f"{name} was asked for")
        data = repository.commits[commit][name]
        digest = hashlib.sha256(data).hexdigest()
        head = {"X-Repo-Commit": commit, "ETag": f'"{digest[:40]}"', "Accept-Ranges": "bytes"}
        if len(data) < LARGE:
            self._part(data, head)
            return
        self.stand_in.blobs[digest] = data
        linked = {"X-Linked-Size": str(len(data)), "X-Linked-Etag": f'"{digest}"'}
        self._send(
            302, b"", head | linked | {"Location": f"{self.stand_in.elsewhere}/{digest}?signature=planted-secret"}
        )

    def _blob(self, digest: str) -> None:
        if self.headers.get("Authorization"):
            self.stand_in.wrong.append("a token was sent to the other host")
        self._part(self.stand_in.blobs[digest], {"ETag": f'"{digest}"', "Accept-Ranges": "bytes"})

    def _part(self, data: bytes, headers: dict[str, str]) -> None:
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if wanted is None:
            self._send(200, data, headers)
            return
        self.stand_in.ranges.append(wanted[0])
        start, end = int(wanted[1]), min(len(data), int(wanted[2] or len(data)) + bool(wanted[2]))
        self._send(206, data[start:end], headers | {"Content-Range": f"bytes {start}-{end - 1}/{len(data)}"})

    # --- writing -----------------------------------------------------------------------------------------------------

    def _post(self, path: str) -> None:
        body = self._body()
        if path == "/api/validate-yaml":
            self._say(200, {"errors": [], "warnings": []})
        elif self.headers.get("Authorization") != f"Bearer {self.stand_in.token}":
            self._refuse(401, "", "Invalid username or password.")
        elif path == "/api/repos/create":
            self._create(json.loads(body))
        elif found := _BATCH.fullmatch(path):
            self._batch(json.loads(body))
        elif found := _WRITE.fullmatch(path):
            if repository := self._open("model", found[1]):
                self._preupload(repository, json.loads(body)) if found[2] == "preupload" else self._store(
                    repository, found[1], body.decode()
                )
        else:
            self._refuse(404, "", "no such page")

    def _create(self, wanted: dict[str, Any]) -> None:
        repo = f"{wanted['organization']}/{wanted['name']}" if wanted.get("organization") else wanted["name"]
        if repo.startswith("forbidden/"):
            self._refuse(403, "", "You don't have the rights to create a model under this namespace")
            return
        if ("model", repo) in self.stand_in.repositories:
            self._refuse(409, "", "You already created this model repo")
            return
        private = bool(wanted.get("private") or wanted.get("visibility") == "private")
        self.stand_in.add("model", repo, {".gitattributes": b"*.safetensors filter=lfs\n"}, private=private)
        self._say(200, {"url": f"{self.stand_in.url}/{repo}"})

    def _preupload(self, repository: Repository, wanted: dict[str, Any]) -> None:
        now = repository.commits[repository.branches["main"]]
        files = [
            {
                "path": one["path"],
                "uploadMode": "lfs" if one["size"] >= LARGE else "regular",
                "shouldIgnore": False,
                "oid": None if one["path"] not in now else "0" * 40,
            }
            for one in wanted["files"]
        ]
        self._say(200, {"files": files})

    def _batch(self, wanted: dict[str, Any]) -> None:
        objects = [
            {**one, "actions": {"upload": {"href": f"{self.stand_in.url}/upload/{one['oid']}"}}}
            for one in wanted["objects"]
        ]
        self._say(200, {"transfer": "basic", "objects": objects})

    def _put(self, path: str) -> None:
        data = self._body()
        self.stand_in.blobs[path.rpartition("/")[2]] = data
        self._send(200, b"", {})

    def _store(self, repository: Repository, repo: str, lines: str) -> None:
        files = dict(repository.commits[repository.branches["main"]])
        for line in map(json.loads, lines.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.stand_in.blobs[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        commit = repository.commit(files)
        url = f"{self.stand_in.url}/{repo}/commit/{commit}"
        self._say(200, {"success": True, "commitOid": commit, "commitUrl": url, "hookOutput": ""})
