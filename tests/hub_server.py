"""A Hugging Face Hub on the loopback: repositories with commits, branches and tags, in memory.

It speaks as much of the Hub's protocol as the real client needs to create, push, tag, list and
fetch, keeps a log of what it was asked, and misbehaves on request. Large files (``*.safetensors``)
are stored as LFS objects, and served from another origin when ``redirect`` is on.
"""

import base64
import contextlib
import hashlib
import http.server
import json
import re
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple
from urllib.parse import unquote, urlsplit

TOKEN = "hf_mayread_and_write"


class Request(NamedTuple):
    method: str
    path: str
    host: str
    authorization: str | None


@dataclass
class Repository:
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    private: bool = False
    gated: bool = False

    def resolve(self, revision: str) -> str | None:
        found = self.branches.get(revision) or self.tags.get(revision)
        return found or (revision if revision in self.commits else None)

    def commit(self, branch: str, files: Mapping[str, bytes]) -> str:
        digest = hashlib.sha1(f"{len(self.commits)} {branch}".encode())
        for path, content in sorted(files.items()):
            digest.update(path.encode() + b"\0" + content)
        self.commits[digest.hexdigest()] = dict(files)
        self.branches[branch] = digest.hexdigest()
        return digest.hexdigest()


@dataclass
class Hub:
    """State of the server; tests read and set it directly."""

    repositories: dict[str, Repository] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)  # LFS, by SHA-256
    log: list[Request] = field(default_factory=list)
    uploads: list[str] = field(default_factory=list)  # SHA-256 of LFS objects received
    # by file name: how often its content is still altered in transit, or cut off
    tamper: dict[str, int] = field(default_factory=dict)
    interrupt: dict[str, int] = field(default_factory=dict)
    redirect: bool = False  # LFS objects come from another origin
    moved: dict[str, Mapping[str, bytes]] = field(default_factory=dict)  # pushed once a file is got
    endpoint: str = ""
    other_origin: str = ""

    def add(self, name: str, files: Mapping[str, bytes], **options) -> str:
        """The commit of a repository with these files."""
        repository = self.repositories.setdefault(name, Repository(**options))
        return repository.commit("main", files)

    def asked(self, method: str, part: str) -> list[Request]:
        return [r for r in self.log if r.method == method and part in r.path]


@contextlib.contextmanager
def running() -> Iterator[Hub]:
    """A server in a thread, on two names (origins) of the same machine."""
    hub = Hub()
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _handler(hub))
    server.daemon_threads = True
    hub.endpoint = f"http://127.0.0.1:{server.server_port}"
    hub.other_origin = f"http://localhost:{server.server_port}"
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


def is_large(path: str) -> bool:
    return path.endswith(".safetensors")


def git_hash(content: bytes) -> str:
    return hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest()


def stored_hash(path: str, content: bytes) -> str:
    return hashlib.sha256(content).hexdigest() if is_large(path) else git_hash(content)


class _Error(Exception):
    """An answer other than 200: status, the Hub's code for it, text."""

    def __init__(self, status: int, code: str, text: str = ""):
        super().__init__(status, code, text)
        self.status, self.code, self.text = status, code, text or code


ROUTES = (
    ("POST", r"/api/repos/create", "create"),
    ("POST", r"/api/validate-yaml", "validate"),
    ("POST", r"/api/models/(?P<name>[^/]+/[^/]+)/preupload/(?P<revision>[^/]+)", "preupload"),
    ("POST", r"/api/models/(?P<name>[^/]+/[^/]+)/commit/(?P<revision>[^/]+)", "commit"),
    ("POST", r"/api/models/(?P<name>[^/]+/[^/]+)/tag/(?P<revision>[^/]+)", "tag"),
    ("POST", r"/api/models/(?P<name>[^/]+/[^/]+)/branch/(?P<branch>[^/]+)", "branch"),
    ("GET", r"/api/models/(?P<name>[^/]+/[^/]+)/tree/(?P<revision>[^/]+)", "tree"),
    ("GET", r"/api/models/(?P<name>[^/]+/[^/]+)/revision/(?P<revision>[^/]+)", "info"),
    ("GET", r"/api/models/(?P<name>[^/]+/[^/]+)", "info"),
    ("POST", r"/(?P<name>[^/]+/[^/]+)\.git/info/lfs/objects/batch", "batch"),
    ("PUT", r"/lfs/(?P<oid>[0-9a-f]{64})", "put_object"),
    ("GET", r"/lfs/(?P<oid>[0-9a-f]{64})/(?P<path>.+)", "get_object"),
    ("GET", r"/(?P<name>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<path>.+)", "file"),
)


def _handler(hub: Hub) -> type[http.server.BaseHTTPRequestHandler]:
    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self):
            url = urlsplit(self.path)
            host, token = self.headers["Host"], self.headers.get("Authorization")
            hub.log.append(Request(self.command, url.path, host, token))
            self.body = self.received()
            method = "GET" if self.command == "HEAD" else self.command
            try:
                for verb, pattern, action in ROUTES:
                    if verb == method and (match := re.fullmatch(pattern, url.path)):
                        parts = {key: unquote(value) for key, value in match.groupdict().items()}
                        return getattr(self, action)(**parts)
                raise _Error(404, "NotFound", f"no route for {method} {url.path}")
            except _Error as error:
                content = json.dumps({"error": error.text} | getattr(error, "more", {})).encode()
                headers = {"X-Error-Code": error.code, "X-Error-Message": error.text}
                self.answer(error.status, content, headers)

        do_HEAD = do_POST = do_PUT = do_GET

        # ---- repositories

        def create(self):
            self.require_token()
            asked = json.loads(self.body)
            organisation = asked.get("organization") or "someone"
            name = f"{organisation}/{asked['name']}"
            if name in hub.repositories:
                error = _Error(409, "Conflict", "You already created this model repo")
                error.more = {"url": f"{hub.endpoint}/{name}"}
                raise error
            private = bool(asked.get("private")) or asked.get("visibility") == "private"
            hub.repositories[name] = Repository(private=private)
            hub.repositories[name].commit("main", {".gitattributes": b"*.safetensors filter=lfs\n"})
            self.json({"url": f"{hub.endpoint}/{name}"})

        def validate(self):
            self.json({"errors": [], "warnings": []})

        def info(self, name, revision="main"):
            repository = self.repository(name)
            commit = self.commit_of(repository, revision)
            siblings = [{"rfilename": path} for path in repository.commits[commit]]
            self.json({"id": name, "sha": commit, "siblings": siblings, "tags": []})

        def tree(self, name, revision):
            repository = self.repository(name)
            rows = []
            for path, content in repository.commits[self.commit_of(repository, revision)].items():
                row = {"type": "file", "path": path, "size": len(content)}
                row["oid"] = git_hash(content)
                if is_large(path):
                    lfs = {"oid": stored_hash(path, content), "size": len(content)}
                    row["lfs"] = lfs | {"pointerSize": 130}
                rows.append(row)
            self.json(rows)

        def tag(self, name, revision):
            repository = self.repository(name, write=True)
            tag = json.loads(self.body)["tag"]
            if tag in repository.tags:
                raise _Error(409, "Conflict", "Tag reference exists already")
            repository.tags[tag] = self.commit_of(repository, revision)
            self.json({})

        def branch(self, name, branch):
            repository = self.repository(name, write=True)
            if branch in repository.branches:
                raise _Error(409, "Conflict", "Reference already exists")
            repository.branches[branch] = repository.branches["main"]
            self.json({})

        # ---- pushing

        def preupload(self, name, revision):
            repository = self.repository(name, write=True)
            there = repository.commits[self.commit_of(repository, revision)]
            rows = []
            for file in json.loads(self.body)["files"]:
                path = file["path"]
                mode = "lfs" if is_large(path) else "regular"
                row = {"path": path, "uploadMode": mode, "shouldIgnore": False}
                if path in there:
                    row["oid"] = stored_hash(path, there[path])
                rows.append(row)
            self.json({"files": rows})

        def batch(self, name):
            self.repository(name, write=True)
            rows = []
            for wanted in json.loads(self.body)["objects"]:
                row = {"oid": wanted["oid"], "size": wanted["size"]}
                if wanted["oid"] not in hub.objects:
                    row["actions"] = {"upload": {"href": f"{hub.endpoint}/lfs/{wanted['oid']}"}}
                rows.append(row)
            self.json({"transfer": "basic", "objects": rows})

        def put_object(self, oid):
            if hashlib.sha256(self.body).hexdigest() != oid:
                raise _Error(400, "BadRequest", "content does not have its hash")
            hub.objects[oid] = self.body
            hub.uploads.append(oid)
            self.answer(200, b"")

        def commit(self, name, revision):
            repository = self.repository(name, write=True)
            files = dict(repository.commits[self.commit_of(repository, revision)])
            for line in map(json.loads, self.body.splitlines()):
                key, value = line["key"], line["value"]
                if key == "header":
                    parent = value.get("parentCommit")
                    if parent not in (None, repository.branches[revision]):
                        raise _Error(412, "PreconditionFailed", "the branch has moved on")
                elif key == "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                elif key == "lfsFile":
                    files[value["path"]] = hub.objects[value["oid"]]
                else:
                    raise _Error(400, "BadRequest", f"unknown operation {key}")
            oid = repository.commit(revision, files)
            self.json({"commitOid": oid, "commitUrl": f"{hub.endpoint}/{name}/commit/{oid}"})

        # ---- fetching

        def file(self, name, revision, path):
            repository = self.repository(name)
            if repository.gated:
                self.require_token("GatedRepo", 403)
            commit = self.commit_of(repository, revision)
            if path not in repository.commits[commit]:
                raise _Error(404, "EntryNotFound")
            content = repository.commits[commit][path]
            etag = stored_hash(path, content)
            headers = {"X-Repo-Commit": commit, "ETag": f'"{etag}"'}
            if is_large(path):
                headers |= {"X-Linked-Etag": f'"{etag}"', "X-Linked-Size": str(len(content))}
                if hub.redirect:
                    hub.objects[etag] = content
                    headers["Location"] = f"{hub.other_origin}/lfs/{etag}/{path}"
                    return self.answer(302, b"", headers)
            self.send_content(path, content, headers)
            if self.command == "GET" and path in hub.moved:
                hub.add(name, hub.moved.pop(path))

        def get_object(self, oid, path):
            self.send_content(path, hub.objects[oid], {"ETag": f'"{oid}"'})

        def send_content(self, path, content, headers):
            if self.command == "GET" and hub.tamper.get(path, 0) > 0:
                hub.tamper[path] -= 1
                content = content[:-1] + bytes([content[-1] ^ 1])
            if self.command == "GET" and hub.interrupt.get(path, 0) > 0:
                hub.interrupt[path] -= 1
                return self.answer(200, content, headers, cut=len(content) // 2)
            self.answer(200, content, headers)

        # ---- shared

        def repository(self, name, write=False) -> Repository:
            found = hub.repositories.get(name)
            if found is None or (found.private and not self.has_token):
                status = 404 if self.has_token else 401
                raise _Error(status, "RepoNotFound", "Repository not found")
            if write:
                self.require_token()
            return found

        def commit_of(self, repository, revision) -> str:
            commit = repository.resolve(revision)
            if commit is None:
                raise _Error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
            return commit

        @property
        def has_token(self) -> bool:
            return self.headers.get("Authorization") == f"Bearer {TOKEN}"

        def require_token(self, code="Unauthorized", status=401):
            if not self.has_token:
                raise _Error(status, code, "Invalid username or password.")

        def received(self) -> bytes:
            if self.headers.get("Transfer-Encoding") == "chunked":
                content = b""
                while size := int(self.rfile.readline(), 16):
                    content += self.rfile.read(size)
                    self.rfile.readline()
                self.rfile.readline()
                return content
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))

        def json(self, value):
            self.answer(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

        def answer(self, status, content, headers=None, cut=None):
            self.send_response(status)
            for key, value in (headers or {}).items():
                self.send_header(key, value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content[:cut])
            if cut is not None:
                self.close_connection = True

        def log_message(self, *arguments):
            pass

    return Handler
