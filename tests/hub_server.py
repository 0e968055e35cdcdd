# SPDX-License-Identifier: Apache-2.0
"""A Hugging Face Hub on the loopback interface, for tests: it implements the Hub's own protocol, so that the
real client runs unpatched.

    with HubServer(tmp_path, tokens={"hf_good": {"name": "tester", "write": True}}) as hub:
        subprocess.run([...], env={**os.environ, **hub.env("hf_good")})
        assert "README.md" in hub.files("tester/prior")

The client reads its settings when it is imported, so it has to run in a process of its own, started with
`hub.env()`. A repo has one branch, `main`. Each commit is a folder of plain files,
`FOLDER/<type>/<repo_id>/<commit>/`; large files are stored in `FOLDER/lfs/<sha256>`, and commits hold links
to them. Other branches, pull requests, moving and deleting repos, `.gitattributes`, a storage on another host
and downloads by Xet are not implemented.
"""

import base64
import functools
import hashlib
import io
import json
import os
import re
import shutil
import struct
import subprocess
import sys
import tempfile
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

LARGE_SUFFIXES = {".arrow", ".bin", ".jpg", ".npy", ".parquet", ".png", ".pt", ".safetensors"}
LARGE_SUFFIXES |= {".webp", ".zip"}
LARGE_SIZE = 5_000_000  # bytes; the client assumes that files which are not "large" are no larger than this
CHUNK_SIZE = 1 << 20  # bytes of a file that are in memory at a time
CUT = -1  # `HubServer.fail` returns it to have the connection closed in the middle of the request's body

REPO = r"(?P<repo_id>[^/]+(?:/[^/]+)??)"  # as short as the rest of the URL allows
API = rf"/api/(?P<repo_type>model|dataset|space)s/{REPO}"
WEB = rf"/(?:(?P<repo_type>dataset|space)s/)?{REPO}"
ROUTES = {  # method and URL path -> method of Handler
    r"GET /api/whoami-v2": "whoami",
    r"POST /api/validate-yaml": "validate_yaml",
    r"POST /api/repos/create": "create",
    rf"POST {API}/preupload/(?P<revision>[^/]+)": "preupload",
    rf"POST {WEB}\.git/info/lfs/objects/batch": "lfs_batch",
    r"PUT /lfs/(?P<oid>[0-9a-f]{64})": "lfs_put",
    rf"GET {API}/xet-write-token/(?P<revision>[^/]+)": "xet_token",
    rf"POST {API}/commit/(?P<revision>[^/]+)": "commit",
    rf"GET {API}(?:/revision/(?P<revision>[^/]+))?": "info",
    rf"GET {API}/tree/(?P<revision>[^/]+)(?:/(?P<path>.*))?": "tree",
    rf"POST {API}/paths-info/(?P<revision>[^/]+)": "paths_info",
    rf"(?:GET|HEAD) {WEB}/resolve/(?P<revision>[^/]+)/(?P<path>.+)": "resolve",
}
XET_FETCH = """
import sys, hf_xet
store, xet_hash, size, target = sys.argv[1:]
with hf_xet.XetSession().new_file_download_group(f"local://{store}", "token", 1 << 40) as group:
    group.start_download_file(hf_xet.XetFileInfo(xet_hash, int(size)), target)
"""


class HubError(Exception):
    """An error response: status, message and, if any, the `X-Error-Code` from which the client picks its
    exception."""


def repo_key(repo_type, repo_id):
    """A repo's key in `HubServer.repos`, which is its path on the site."""
    return repo_id if repo_type == "model" else f"{repo_type}s/{repo_id}"


def is_large(path, size):
    """Whether the Hub stores a file outside Git. An empty file is never large."""
    return size > 0 and (size > LARGE_SIZE or Path(path).suffix in LARGE_SUFFIXES)


def sha256_of(source):
    """The hash of the rest of an open file, read in chunks. (hashlib.file_digest needs Python 3.11.)"""
    digest = hashlib.sha256()
    while chunk := source.read(CHUNK_SIZE):
        digest.update(chunk)
    return digest.hexdigest()


@functools.cache  # a commit's files never change
def describe(file):
    """A file's size, its id in Git and, if it is large, its SHA-256."""
    size = file.stat().st_size
    with open(file, "rb") as source:
        sha256 = sha256_of(source) if is_large(file, size) else None
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n".encode()
    blob = pointer if sha256 else file.read_bytes()
    return size, hashlib.sha1(b"blob %d\0" % len(blob) + blob).hexdigest(), sha256


def list_entries(root, paths):
    """Files and folders as the Hub lists them."""
    entries = []
    for path in sorted(paths):
        size, oid, sha256 = (0, "0" * 40, None) if path.is_dir() else describe(path)
        entry = {"type": "directory" if path.is_dir() else "file", "path": path.relative_to(root).as_posix()}
        large = {"lfs": {"oid": sha256, "size": size, "pointerSize": 134}} if sha256 else {}
        entries.append({**entry, "oid": oid, "size": size, **large})
    return entries


class HubServer:
    """The server, a context manager.

    tokens: token -> {"name": user, "write": bool, "orgs": other namespaces the user may write to (optional)}.
    xet: whether the client uploads large files by Xet, its default, into a folder, instead of by LFS.
    repos: "user/name" or "datasets/user/name" -> {"type", "id", "private", "commits": [oldest, ..., newest]}.
    requests: (method, path without the query, Authorization header or None) of every request so far.
    fail: a function of (method, path). If it returns a status, that is the response, with an HTML page as
        gateways send it. If it returns CUT, there is no response, and only half of the body is read.
    """

    def __init__(self, folder, tokens=None, xet=False):
        self.folder, self.tokens, self.xet = Path(folder), tokens or {}, xet
        self.repos, self.requests = {}, []
        self.fail = lambda method, path: None
        self.lock = threading.RLock()
        (self.folder / "lfs").mkdir(parents=True, exist_ok=True)

    def __enter__(self):
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.hub, self.server.daemon_threads = self, True
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *exception):
        self.server.shutdown()
        self.server.server_close()

    def env(self, token=None):
        """Environment variables that point a new process's client to this server, with a cache of its own and
        no other login."""
        online = dict.fromkeys(("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE"), "0")
        here = {"HF_ENDPOINT": self.url, "HF_HOME": str(self.folder / "client"), "NO_PROXY": "127.0.0.1"}
        client = {"HF_HUB_DISABLE_XET": "01"[not self.xet], "HF_HUB_DISABLE_TELEMETRY": "1"}
        return {**online, **here, **client, "HF_TOKEN": token or ""}

    def add_repo(self, repo_id, folder=None, repo_type="model", private=False):
        """Publishes a copy of a local folder, or an empty repo."""
        repo = {"type": repo_type, "id": repo_id, "private": private, "commits": []}
        self.commit(repo, lambda draft: folder and shutil.copytree(folder, draft, dirs_exist_ok=True))
        self.repos[repo_key(repo_type, repo_id)] = repo

    def files(self, repo_id, repo_type="model"):
        """The newest files of a repo: path -> bytes."""
        root = self.root(self.repos[repo_key(repo_type, repo_id)])
        files = [path for path in root.rglob("*") if path.is_file()]
        return {path.relative_to(root).as_posix(): path.read_bytes() for path in files}

    def root(self, repo, commit=-1):
        """The folder of a commit, by default of the newest one."""
        return self.folder / repo["type"] / repo["id"] / repo["commits"][commit]

    def commit(self, repo, change):
        """Calls `change` on a copy of the newest files and commits the result; no commit if it raises."""
        with self.lock, tempfile.TemporaryDirectory(dir=self.folder) as draft:
            draft, parent = Path(draft) / "draft", repo["commits"][-1:]
            if parent:
                shutil.copytree(self.root(repo), draft, copy_function=os.link)
            draft.mkdir(exist_ok=True)
            change(draft)
            content = json.dumps([repo["type"], repo["id"], parent, list_entries(draft, draft.rglob("*"))])
            commit = hashlib.sha1(content.encode()).hexdigest()
            (self.folder / repo["type"] / repo["id"]).mkdir(parents=True, exist_ok=True)
            draft.rename(self.folder / repo["type"] / repo["id"] / commit)
            repo["commits"].append(commit)

    def fetch_from_xet(self, oid, size):
        """Writes `lfs/<oid>` from the Xet store, which names files by another hash; its "shards" list both.

        A shard is a sequence of 48-byte records; for each file: a header, its segments, their checksums, and
        the SHA-256.
        """
        for shard in (self.folder / "xet").rglob("shards/*.mdb"):
            data, at = shard.read_bytes(), 48
            while data[at : at + 32] != b"\xff" * 32:
                flags, segments = struct.unpack_from("<II", data, at + 32)
                last = at + 48 * segments * (1 + (flags >> 31)) + 48 * (flags >> 30 & 1)
                xet_hash, sha256 = ("%016x" * 4 % struct.unpack_from("<4Q", data, i) for i in (at, last))
                if sha256 == oid:
                    return self.copy_from_xet(xet_hash, size, self.folder / "lfs" / oid)
                at = last + 48

    def copy_from_xet(self, xet_hash, size, target):
        """Writes a file of the Xet store to `target`. The client has locked the store, so a copy is read."""
        with tempfile.TemporaryDirectory(dir=self.folder) as copy:
            skip = shutil.ignore_patterns("shard-*")
            shutil.copytree(self.folder / "xet", copy, dirs_exist_ok=True, ignore=skip)
            command = [sys.executable, "-c", XET_FETCH, copy, xet_hash, str(size), target]
            subprocess.run(command, env=os.environ | self.env(), check=True)


class Handler(BaseHTTPRequestHandler):
    """A connection. `serve` passes each request on it to the method that ROUTES names."""

    protocol_version = "HTTP/1.1"  # keeps connections open, as the Hub does

    def serve(self):
        self.hub, self.repo_headers = self.server.hub, {}
        url = urlsplit(self.path)
        self.query, path = parse_qs(url.query), unquote(url.path)
        self.hub.requests.append((self.command, path, self.headers["Authorization"]))
        with tempfile.NamedTemporaryFile(dir=self.hub.folder) as self.body:
            try:
                status = self.hub.fail(self.command, path)
                # Read in any case: otherwise the next request would begin inside this one's body.
                self.receive_body(divisor=2 if status == CUT else 1)
                if status == CUT:
                    self.close_connection = True
                    return
                if status:
                    return self.reply(status, b"<html><body>injected failure</body></html>")
                token = (self.headers["Authorization"] or "").removeprefix("Bearer ")
                if token and token not in self.hub.tokens:
                    raise HubError(401, "Invalid credentials in Authorization header")
                self.user = self.hub.tokens.get(token)
                for route, name in ROUTES.items():
                    if match := re.fullmatch(route, f"{self.command} {url.path}"):
                        groups = {key: value and unquote(value) for key, value in match.groupdict().items()}
                        return getattr(self, name)(**groups)
                raise HubError(404, f"hub_server does not implement {self.command} {path}")
            except HubError as error:
                status, message, *code = error.args
                headers = {"X-Error-Message": message, "X-Error-Code": "".join(code)}
                self.reply(status, {"error": message}, headers)

    do_GET = do_HEAD = do_POST = do_PUT = serve

    def log_message(self, *args):
        pass

    def receive_body(self, divisor):
        """Reads the request's body into `self.body`, or only that part of it."""
        if self.headers["Transfer-Encoding"]:
            self.close_connection = True
            raise HubError(411, "hub_server does not accept a body without a Content-Length")
        left = int(self.headers["Content-Length"] or 0) // divisor
        while left and (chunk := self.rfile.read(min(left, CHUNK_SIZE))):
            self.body.write(chunk)
            left -= len(chunk)
        self.body.seek(0)

    def reply(self, status, content=b"", headers=None):
        """Sends JSON, a page, or a Path's bytes: all of them, or the requested range."""
        headers = self.repo_headers | (headers or {})
        if isinstance(content, (dict, list)):
            content, headers["Content-Type"] = json.dumps(content).encode(), "application/json"
        with open(content, "rb") if isinstance(content, Path) else io.BytesIO(content) as source:
            size = source.seek(0, os.SEEK_END)
            start, stop = 0, size
            requested = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers["Range"] or "")
            if requested and status == 200 and self.command == "GET":
                first, last = requested.groups()
                start = int(first) if first else max(size - int(last), 0)
                stop = min(int(last) + 1, size) if first and last else size
                status = 206 if start < stop else 416
                sent_range = f"{start}-{stop - 1}" if status == 206 else "*"
                headers["Content-Range"] = f"bytes {sent_range}/{size}"
            self.send_response(status)
            headers = {"Content-Type": "text/html", **headers, "Content-Length": max(stop - start, 0)}
            for name, value in headers.items():
                self.send_header(name, str(value))
            self.end_headers()
            source.seek(start)
            while self.command != "HEAD" and start < stop:
                start += self.wfile.write(source.read(min(stop - start, CHUNK_SIZE)))

    def owns(self, namespace):
        return self.user is not None and namespace in (self.user["name"], *self.user.get("orgs", ()))

    def require_write(self, namespace):
        if self.user is None:
            raise HubError(401, "Invalid username or password.")
        if not (self.user["write"] and self.owns(namespace)):
            raise HubError(403, f"You don't have the rights to write under the namespace {namespace!r}")

    def open_repo(self, repo_type, repo_id, revision="main", write=False):
        """The repo, and the folder of one of its revisions."""
        repo = self.hub.repos.get(repo_key(repo_type or "model", repo_id))
        namespace = repo_id.split("/")[0]
        if repo is None or (repo["private"] and not self.owns(namespace)):
            raise HubError(404 if self.user else 401, "Repository not found", "RepoNotFound")
        if write:
            self.require_write(namespace)
        if revision not in (None, "main", *repo["commits"]):
            raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        root = self.hub.root(repo, repo["commits"].index(revision) if revision in repo["commits"] else -1)
        self.repo_headers = {"X-Repo-Commit": root.name}
        return repo, root

    def whoami(self):
        self.user or self.require_write(None)
        role = {"accessToken": {"displayName": "token", "role": "write" if self.user["write"] else "read"}}
        orgs = [{"type": "org", "name": name} for name in self.user.get("orgs", ())]
        self.reply(200, {"type": "user", "name": self.user["name"], "orgs": orgs, "auth": role})

    def validate_yaml(self):
        absent = not json.load(self.body)["content"].startswith("---")
        self.reply(200, {"errors": [], "warnings": [{"message": "empty or missing yaml metadata"}] * absent})

    def create(self):
        request = json.load(self.body)
        repo_type = request.get("type") or "model"
        namespace = request.get("organization") or (self.user or {}).get("name")
        self.require_write(namespace)
        repo_id = f"{namespace}/{request['name']}"
        response = {"url": f"{self.hub.url}/{repo_key(repo_type, repo_id)}", "name": repo_id}
        with self.hub.lock:
            if repo_key(repo_type, repo_id) in self.hub.repos:
                return self.reply(409, {"error": f"You already created this {repo_type} repo", **response})
            private = request.get("visibility") == "private" or request.get("private") is True  # old clients
            self.hub.add_repo(repo_id, repo_type=repo_type, private=private)
        self.reply(200, response)

    def preupload(self, repo_type, repo_id, revision):
        _, root = self.open_repo(repo_type, repo_id, revision, write=True)
        responses = []
        for file in json.load(self.body)["files"]:
            mode = "lfs" if is_large(file["path"], file["size"]) else "regular"
            response = {"path": file["path"], "uploadMode": mode, "shouldIgnore": False}
            if (root / file["path"]).is_file():  # the client does not send an unchanged file again
                _, oid, sha256 = describe(root / file["path"])
                response["oid"] = sha256 or oid
            responses.append(response)
        self.reply(200, {"files": responses})

    def lfs_batch(self, repo_type, repo_id):
        self.open_repo(repo_type, repo_id, write=True)
        objects = json.load(self.body)["objects"]
        for entry in objects:
            if not (self.hub.folder / "lfs" / entry["oid"]).exists():
                # Like the Hub's signed URLs, this one needs no token.
                entry["actions"] = {"upload": {"href": f"{self.hub.url}/lfs/{entry['oid']}"}}
        self.reply(200, {"transfer": "basic", "objects": objects})

    def lfs_put(self, oid):
        if sha256_of(self.body) != oid:
            raise HubError(400, "the content does not have the hash in the URL")
        with self.hub.lock:
            if not (self.hub.folder / "lfs" / oid).exists():
                os.link(self.body.name, self.hub.folder / "lfs" / oid)
        self.reply(200)

    def xet_token(self, repo_type, repo_id, revision):
        self.open_repo(repo_type, repo_id, revision, write=True)
        (self.hub.folder / "xet").mkdir(exist_ok=True)
        store, expires = f"local://{self.hub.folder / 'xet'}", int(time.time()) + 3600
        headers = {"X-Xet-Cas-Url": store, "X-Xet-Access-Token": "token", "X-Xet-Token-Expiration": expires}
        self.reply(200, {"casUrl": store, "accessToken": "token", "exp": expires}, headers)

    def commit(self, repo_type, repo_id, revision):
        repo, _ = self.open_repo(repo_type, repo_id, revision, write=True)
        if revision != "main" or "create_pr" in self.query:
            raise HubError(501, "hub_server accepts commits to main only")
        operations = [json.loads(line) for line in self.body]
        self.hub.commit(repo, lambda draft: [self.apply(repo, draft, **entry) for entry in operations])
        commit = repo["commits"][-1]
        url = f"{self.hub.url}/{repo_key(repo_type, repo_id)}/commit/{commit}"
        self.reply(200, {"success": True, "commitOid": commit, "commitUrl": url})

    def apply(self, repo, draft, key, value):
        """Applies one line of a commit to the folder `draft`."""
        if key == "header":
            if value.get("parentCommit", repo["commits"][-1]) != repo["commits"][-1]:
                raise HubError(412, "A commit has happened since. Please refresh and try again.")
            return
        file, large = draft / value["path"], self.hub.folder / "lfs" / value.get("oid", "")
        if key in ("deletedFile", "deletedFolder"):
            if not (file.is_dir() if key == "deletedFolder" else file.is_file()):
                raise HubError(404, "A file with this name doesn't exist", "EntryNotFound")
            return shutil.rmtree(file) if file.is_dir() else file.unlink()
        file.parent.mkdir(parents=True, exist_ok=True)
        file.unlink(missing_ok=True)  # it is a link that older commits share
        if key == "file":
            return file.write_bytes(base64.b64decode(value["content"]))
        if self.hub.xet and not large.exists():
            self.hub.fetch_from_xet(value["oid"], value["size"])
        if not large.exists():
            raise HubError(400, f"LFS pointer pointed to a file that does not exist: {value['path']}")
        os.link(large, file)

    def info(self, repo_type, repo_id, revision):
        repo, root = self.open_repo(repo_type, repo_id, revision)
        siblings = []
        for file in list_entries(root, (path for path in root.rglob("*") if path.is_file())):
            sizes = {"size": file["size"], "blobId": file["oid"]} if "blobs" in self.query else {}
            siblings.append({"rfilename": file["path"], **sizes})
        known = {"id": repo_id, "author": repo_id.split("/")[0], "sha": root.name, "private": repo["private"]}
        self.reply(200, {**known, "gated": False, "disabled": False, "tags": [], "siblings": siblings})

    def tree(self, repo_type, repo_id, revision, path):
        _, root = self.open_repo(repo_type, repo_id, revision)
        folder = root / (path or "")
        if not folder.is_dir():
            raise HubError(404, f"{path} does not exist", "EntryNotFound")
        recursive = self.query.get("recursive", [""])[0].lower() == "true"
        self.reply(200, list_entries(root, folder.rglob("*") if recursive else folder.iterdir()))

    def paths_info(self, repo_type, repo_id, revision):
        _, root = self.open_repo(repo_type, repo_id, revision)
        paths = [root / path for path in parse_qs(self.body.read().decode())["paths"]]
        self.reply(200, list_entries(root, (path for path in paths if path.exists())))

    def resolve(self, repo_type, repo_id, revision, path):
        _, root = self.open_repo(repo_type, repo_id, revision)
        if not (root / path).is_file():
            raise HubError(404, "Entry not found", "EntryNotFound")
        size, oid, sha256 = describe(root / path)
        linked = {"X-Linked-Etag": f'"{sha256}"', "X-Linked-Size": size} if sha256 else {}
        self.reply(200, root / path, {"ETag": f'"{sha256 or oid}"', "Accept-Ranges": "bytes", **linked})
