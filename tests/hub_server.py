# SPDX-License-Identifier: Apache-2.0
"""A Hugging Face Hub on the loopback interface, for tests: it implements what the real client sends when the
script loads and pushes, so that the client runs unpatched. Large files are uploaded by LFS, not by Xet.

    with HubServer(tmp_path, tokens={"hf_good": {"name": "tester", "write": True}}) as hub:
        run = train_fresh(env=hub.env("hf_good"), push_to_hub=True)
        assert "README.md" in hub.files("tester/out")

The client reads its settings when it is imported, so it has to run in a new process with `hub.env()`. Repos
are in memory and have one branch, `main`.
"""

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

LARGE_SUFFIXES = (
    ".arrow",
    ".bin",
    ".jpg",
    ".npy",
    ".parquet",
    ".png",
    ".pt",
    ".safetensors",
    ".webp",
    ".zip",
)
CUT = -1  # `HubServer.fail` returns it to have the connection closed in the middle of the request's body

REPO = r"(?P<repo_id>[^/]+(?:/[^/]+)??)"  # as short as the rest of the URL allows
API = rf"/api/(?P<repo_type>model|dataset)s/{REPO}"
WEB = rf"/(?:(?P<repo_type>dataset)s/)?{REPO}"
ROUTES = {  # method and URL path -> method of Handler
    r"GET /api/whoami-v2": "whoami",
    r"POST /api/validate-yaml": "validate_yaml",
    r"POST /api/repos/create": "create",
    rf"POST {API}/preupload/main": "preupload",
    rf"POST {WEB}\.git/info/lfs/objects/batch": "lfs_batch",
    r"PUT /lfs/(?P<oid>[0-9a-f]{64})": "lfs_put",
    rf"POST {API}/commit/main": "commit",
    rf"GET {API}(?:/revision/(?P<revision>[^/]+))?": "info",
    rf"GET {API}/tree/(?P<revision>[^/]+)(?:/(?P<path>.*))?": "tree",
    rf"POST {API}/paths-info/(?P<revision>[^/]+)": "paths_info",
    rf"(?:GET|HEAD) {WEB}/resolve/(?P<revision>[^/]+)/(?P<path>.+)": "resolve",
}


class HubError(Exception):
    """An error response: status, message and, if any, the `X-Error-Code` from which the client picks its
    exception."""


def is_large(path, size):
    """Whether the Hub stores a file outside Git."""
    return size > 5_000_000 or (size > 0 and path.endswith(LARGE_SUFFIXES))


def list_entry(path, content):
    """A file as the Hub lists it; content None is a folder."""
    if content is None:
        return {"type": "directory", "path": path, "oid": "0" * 40, "size": 0}
    entry = {"type": "file", "path": path, "size": len(content)}
    if is_large(path, len(content)):
        oid = hashlib.sha256(content).hexdigest()
        entry["lfs"] = {"oid": oid, "size": len(content), "pointerSize": 134}
        content = oid.encode()
    return {**entry, "oid": hashlib.sha1(content).hexdigest()}


class HubServer:
    """The server, a context manager.

    tokens: token -> {"name": user, "write": bool}.
    repos: "user/name" or "datasets/user/name" -> {"private": bool, "commits": {id: {path: bytes}}}.
    large: the large files that were uploaded by LFS, {SHA-256: bytes}.
    requests: (method, path without the query, Authorization header or None) of every request so far.
    fail: a function of (method, path). If it returns a status, that is the response. If it returns CUT, there
        is no response, and only half of the body is read.
    """

    def __init__(self, folder, tokens=None):
        self.folder, self.tokens = Path(folder), tokens or {}
        self.repos, self.large, self.requests = {}, {}, []
        self.fail = lambda method, path: None
        self.lock = threading.RLock()
        self.folder.mkdir(parents=True, exist_ok=True)

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
        no other login. None removes one."""
        online = dict.fromkeys(("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE"), "0")
        here = {"HF_ENDPOINT": self.url, "HF_HOME": str(self.folder / "client"), "NO_PROXY": "127.0.0.1"}
        client = {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
        client |= {"HF_HUB_DISABLE_UPDATE_CHECK": "1", "HF_HUB_CACHE": None, "HF_DATASETS_CACHE": None}
        return {**online, **here, **client, "HF_TOKEN": token or ""}

    def add_repo(self, repo_id, folder=None, repo_type="model", private=False):
        """Publishes a copy of a local folder, or an empty repo."""
        files = [path for path in folder.rglob("*") if path.is_file()] if folder else []
        repo = {"private": private, "commits": {}}
        self.repos[f"datasets/{repo_id}" if repo_type == "dataset" else repo_id] = repo
        self.add_commit(repo, {path.relative_to(folder).as_posix(): path.read_bytes() for path in files})

    def files(self, repo_id):
        """The newest files of a model's repo: path -> bytes."""
        return list(self.repos[repo_id]["commits"].values())[-1]

    def add_commit(self, repo, files):
        """Makes these files the newest of a repo."""
        content = json.dumps([id(repo), len(repo["commits"]), sorted(files)])
        repo["commits"][hashlib.sha1(content.encode()).hexdigest()] = files


class Handler(BaseHTTPRequestHandler):
    """A connection. `serve` passes each request on it to the method that ROUTES names."""

    protocol_version = "HTTP/1.1"  # keeps connections open, as the Hub does

    def serve(self):
        self.hub, self.repo_headers = self.server.hub, {}
        url = urlsplit(self.path)
        self.query, path = parse_qs(url.query), unquote(url.path)
        self.hub.requests.append((self.command, path, self.headers["Authorization"]))
        status, size = self.hub.fail(self.command, path), int(self.headers["Content-Length"] or 0)
        # Read in any case: otherwise the next request would begin inside this one's body.
        self.body = self.rfile.read(size // 2 if status == CUT else size)
        if status == CUT:
            self.close_connection = True
            return
        if status:
            return self.reply(status, b"<html><body>as gateways answer</body></html>", {})
        try:
            token = (self.headers["Authorization"] or "").removeprefix("Bearer ")
            if token and token not in self.hub.tokens:
                raise HubError(401, "Invalid credentials in Authorization header")
            self.user = self.hub.tokens.get(token)
            for route, name in ROUTES.items():
                if match := re.fullmatch(route, f"{self.command} {url.path}"):
                    groups = {key: value and unquote(value) for key, value in match.groupdict().items()}
                    with self.hub.lock:
                        status, content, headers = getattr(self, name)(**groups)
                    break
            else:
                raise HubError(404, f"hub_server does not implement {self.command} {path}")
        except HubError as error:
            status, message, *code = error.args
            content, headers = {"error": message}, {"X-Error-Message": message, "X-Error-Code": "".join(code)}
        self.reply(status, content, self.repo_headers | headers)

    do_GET = do_HEAD = do_POST = do_PUT = serve

    def log_message(self, *args):
        pass

    def reply(self, status, content, headers):
        """Sends JSON or bytes."""
        if not isinstance(content, bytes):
            content, headers["Content-Type"] = json.dumps(content).encode(), "application/json"
        self.send_response(status)
        for name, value in (headers | {"Content-Length": len(content)}).items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def require_write(self, namespace):
        if self.user is None:
            raise HubError(401, "Invalid username or password.")
        if not (self.user["write"] and self.user["name"] == namespace):
            raise HubError(403, f"You don't have the rights to write under the namespace {namespace!r}")

    def open_repo(self, repo_type, repo_id, revision="main", write=False):
        """The repo, and the files of one of its revisions."""
        repo = self.hub.repos.get(f"datasets/{repo_id}" if repo_type == "dataset" else repo_id)
        namespace = repo_id.split("/")[0]
        if repo is None or (repo["private"] and (self.user or {}).get("name") != namespace):
            raise HubError(404 if self.user else 401, "Repository not found", "RepoNotFound")
        if write:
            self.require_write(namespace)
        commit = list(repo["commits"])[-1] if revision in (None, "main") else revision
        if commit not in repo["commits"]:
            raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        self.repo_headers = {"X-Repo-Commit": commit}
        return repo, repo["commits"][commit]

    def whoami(self):
        self.user or self.require_write(None)
        role = {"accessToken": {"displayName": "token", "role": "write" if self.user["write"] else "read"}}
        return 200, {"type": "user", "name": self.user["name"], "orgs": [], "auth": role}, {}

    def validate_yaml(self):
        return 200, {"errors": [], "warnings": []}, {}

    def create(self):
        request = json.loads(self.body)
        namespace = request.get("organization") or (self.user or {}).get("name")
        self.require_write(namespace)
        repo_id = f"{namespace}/{request['name']}"
        response = {"url": f"{self.hub.url}/{repo_id}", "name": repo_id}
        if repo_id in self.hub.repos:
            return 409, {"error": "You already created this model repo", **response}, {}
        private = request.get("visibility") == "private" or request.get("private") is True  # old clients
        self.hub.add_repo(repo_id, private=private)
        return 200, response, {}

    def preupload(self, repo_type, repo_id):
        self.open_repo(repo_type, repo_id, write=True)
        files = json.loads(self.body)["files"]
        for file in files:
            file["uploadMode"] = "lfs" if is_large(file["path"], file["size"]) else "regular"
            file["shouldIgnore"] = False
        return 200, {"files": files}, {}

    def lfs_batch(self, repo_type, repo_id):
        self.open_repo(repo_type, repo_id, write=True)
        objects = json.loads(self.body)["objects"]
        for entry in objects:
            if entry["oid"] not in self.hub.large:  # like the Hub's signed URLs, this one needs no token
                entry["actions"] = {"upload": {"href": f"{self.hub.url}/lfs/{entry['oid']}"}}
        return 200, {"transfer": "basic", "objects": objects}, {}

    def lfs_put(self, oid):
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise HubError(400, "the content does not have the hash in the URL")
        self.hub.large[oid] = self.body
        return 200, b"", {}

    def commit(self, repo_type, repo_id):
        repo, files = self.open_repo(repo_type, repo_id, write=True)
        files = dict(files)
        for line in map(json.loads, self.body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                if value["oid"] not in self.hub.large:
                    raise HubError(400, f"the file of an LFS pointer does not exist: {value['path']}")
                files[value["path"]] = self.hub.large[value["oid"]]
            elif line["key"] != "header":
                raise HubError(501, f"hub_server does not implement {line['key']}")
        self.hub.add_commit(repo, files)
        commit = list(repo["commits"])[-1]
        url = f"{self.hub.url}/{repo_id}/commit/{commit}"
        return 200, {"success": True, "commitOid": commit, "commitUrl": url}, {}

    def info(self, repo_type, repo_id, revision):
        repo, files = self.open_repo(repo_type, repo_id, revision)
        siblings = [{"rfilename": path} for path in sorted(files)]
        sha = self.repo_headers["X-Repo-Commit"]
        known = {"id": repo_id, "author": repo_id.split("/")[0], "sha": sha, "private": repo["private"]}
        return 200, {**known, "gated": False, "disabled": False, "tags": [], "siblings": siblings}, {}

    def tree(self, repo_type, repo_id, revision, path):
        _, files = self.open_repo(repo_type, repo_id, revision)
        prefix = f"{path}/" if path else ""
        folders = {parent.as_posix(): None for name in files for parent in [*Path(name).parents][:-1]}
        found = {name: file for name, file in (files | folders).items() if name.startswith(prefix)}
        if not found and prefix:
            raise HubError(404, f"{path} does not exist", "EntryNotFound")
        if self.query.get("recursive", [""])[0].lower() != "true":
            found = {name: file for name, file in found.items() if "/" not in name[len(prefix) :]}
        return 200, [list_entry(*item) for item in sorted(found.items())], {}

    def paths_info(self, repo_type, repo_id, revision):
        _, files = self.open_repo(repo_type, repo_id, revision)
        paths = parse_qs(self.body.decode())["paths"]
        entries = [list_entry(path, files[path]) for path in paths if path in files]
        folders = [path for path in paths if any(file.startswith(f"{path}/") for file in files)]
        return 200, entries + [list_entry(path, None) for path in folders], {}

    def resolve(self, repo_type, repo_id, revision, path):
        _, files = self.open_repo(repo_type, repo_id, revision)
        if path not in files:
            raise HubError(404, "Entry not found", "EntryNotFound")
        if self.headers["Range"] not in (None, "bytes=0-"):
            raise HubError(501, "hub_server does not implement ranges")
        entry = list_entry(path, files[path])
        if "lfs" not in entry:
            return 200, files[path], {"ETag": f'"{entry["oid"]}"'}
        linked = {"X-Linked-Etag": f'"{entry["lfs"]["oid"]}"', "X-Linked-Size": entry["size"]}
        return 200, files[path], {"ETag": f'"{entry["lfs"]["oid"]}"', **linked}
