# SPDX-License-Identifier: Apache-2.0
"""A Hugging Face Hub on the loopback interface, for tests: it answers what the real client asks when the
script loads and pushes, so that the client runs unpatched. Large files are uploaded by LFS, not by Xet.

    with HubServer(tmp_path, tokens={"hf_good": {"name": "tester", "write": True}}) as hub:
        run = train_fresh(env=hub.env("hf_good"), push_to_hub=True)
        assert "README.md" in hub.repos["tester/out"].files

The client reads its settings when it is imported, so it has to run in a new process with `hub.env()`. Repos
are in memory, and whichever revision is asked for, the newest one is returned.
"""

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

CUT = -1  # `HubServer.fail` returns it to have the connection closed in the middle of the request's body
LARGE = (".jpg", ".npy", ".parquet", ".png", ".pt", ".safetensors", ".webp")  # ends of names of LFS files
NAME = r"(?P<name>(?:datasets/)?[^/]+/[^/]+?)"
API = rf"/api/(?:models/)?{NAME}"
ROUTES = {  # method and URL path -> method of Handler
    r"POST /api/validate-yaml": "validate_yaml",
    r"POST /api/repos/create": "create",
    rf"POST {API}/preupload/main": "preupload",
    rf"POST /{NAME}\.git/info/lfs/objects/batch": "lfs_batch",
    r"PUT /lfs/(?P<oid>[0-9a-f]{64})": "lfs_put",
    rf"POST {API}/commit/main": "commit",
    rf"GET {API}(?:/revision/[^/]+)?": "info",
    rf"GET {API}/tree/[^/]+(?:/(?P<folder>.*))?": "tree",
    rf"(?:GET|HEAD) /{NAME}/resolve/[^/]+/(?P<path>.+)": "resolve",
}


class HubError(Exception):
    """An error response: status, message and, if any, the code from which the client picks its exception."""


@dataclass
class Repo:
    private: bool
    files: dict = field(default_factory=dict)  # path -> bytes
    commits: list = field(default_factory=list)  # their ids

    def commit(self, files):
        self.files |= files
        self.commits.append(f"{id(self):030x}{len(self.commits):010x}")


class HubServer:
    """The server, a context manager.

    tokens: token -> {"name": user, "write": bool}.
    repos: "user/name" or "datasets/user/name" -> Repo.
    large: the large files that were uploaded by LFS, {SHA-256: bytes}.
    requests: (method, path without the query, Authorization header or None) of every request so far.
    fail: a function of (method, path). If it returns a status, that is the response. If it returns CUT, there
        is no response, and only half of the body is read.
    """

    def __init__(self, folder, tokens=None):
        self.folder, self.tokens = Path(folder), tokens or {}
        self.repos, self.large, self.requests = {}, {}, []
        self.fail = lambda method, path: None
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

    def env(self, token=""):
        """Environment variables that point a new process's client to this server, with a cache of its own and
        no other login. None removes one."""
        online = dict.fromkeys(("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE"), "0")
        here = {"HF_ENDPOINT": self.url, "HF_HOME": str(self.folder / "client"), "NO_PROXY": "127.0.0.1"}
        client = {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "HF_TOKEN": token}
        client |= {"HF_HUB_DISABLE_UPDATE_CHECK": "1", "HF_HUB_CACHE": None, "HF_DATASETS_CACHE": None}
        return online | here | client

    def add_repo(self, name, folder=None, private=False):
        """Publishes a copy of a local folder, or an empty repo."""
        self.repos[name] = Repo(private)
        files = [path for path in folder.rglob("*") if path.is_file()] if folder else []
        self.repos[name].commit({path.relative_to(folder).as_posix(): path.read_bytes() for path in files})


class Handler(BaseHTTPRequestHandler):
    """A connection. `serve` passes each request on it to the method that ROUTES names."""

    protocol_version = "HTTP/1.1"  # keeps connections open, as the Hub does

    def serve(self):
        self.hub, path = self.server.hub, urlsplit(self.path).path
        self.status, self.headers_out = 200, {}
        self.hub.requests.append((self.command, unquote(path), self.headers["Authorization"]))
        status, size = self.hub.fail(self.command, path), int(self.headers["Content-Length"] or 0)
        # Read in any case: otherwise the next request would begin inside this one's body.
        self.body = self.rfile.read(size // 2 if status == CUT else size)
        if status == CUT:
            self.close_connection = True
        elif status:
            self.reply(status, b"<html><body>as gateways answer</body></html>")
        else:
            try:
                content = self.answer(path)
                self.reply(self.status, content)
            except HubError as error:
                status, message, *code = error.args
                self.headers_out |= {"X-Error-Message": message, "X-Error-Code": "".join(code)}
                self.reply(status, {"error": message})

    do_GET = do_HEAD = do_POST = do_PUT = serve

    def log_message(self, *args):
        pass

    def answer(self, path):
        token = (self.headers["Authorization"] or "").removeprefix("Bearer ")
        if token and token not in self.hub.tokens:
            raise HubError(401, "Invalid credentials in Authorization header")
        self.user = self.hub.tokens.get(token)
        for route, method in ROUTES.items():
            if match := re.fullmatch(route, f"{self.command} {path}"):
                groups = {key: value and unquote(value) for key, value in match.groupdict().items()}
                return getattr(self, method)(**groups)
        raise HubError(501, f"hub_server does not implement {self.command} {path}")

    def reply(self, status, content):
        """Sends JSON or bytes."""
        if not isinstance(content, bytes):
            content, self.headers_out["Content-Type"] = json.dumps(content).encode(), "application/json"
        self.send_response(status)
        for name, value in (self.headers_out | {"Content-Length": len(content)}).items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def require_write(self, namespace):
        if self.user is None:
            raise HubError(401, "Invalid username or password.")
        if not self.user["write"] or self.user["name"] != namespace:
            raise HubError(403, f"You don't have the rights to write under the namespace {namespace!r}")

    def open_repo(self, name, write=False):
        repo, namespace = self.hub.repos.get(name), name.split("/")[-2]
        if repo is None or (repo.private and (self.user or {}).get("name") != namespace):
            raise HubError(404 if self.user else 401, "Repository not found", "RepoNotFound")
        if write:
            self.require_write(namespace)
        self.headers_out["X-Repo-Commit"] = repo.commits[-1]
        return repo

    def validate_yaml(self):
        return {"errors": [], "warnings": []}

    def create(self):
        request = json.loads(self.body)
        namespace = request.get("organization") or (self.user or {}).get("name")
        self.require_write(namespace)
        name = f"{namespace}/{request['name']}"
        if name in self.hub.repos:
            self.status = 409
        else:
            private = request.get("visibility") == "private" or request.get("private") is True  # old clients
            self.hub.add_repo(name, private=private)
        return {"url": f"{self.hub.url}/{name}", "name": name}

    def preupload(self, name):
        self.open_repo(name, write=True)
        files = json.loads(self.body)["files"]
        for file in files:
            file["uploadMode"] = "lfs" if file["path"].endswith(LARGE) else "regular"
            file["shouldIgnore"] = False
        return {"files": files}

    def lfs_batch(self, name):
        self.open_repo(name, write=True)
        objects = json.loads(self.body)["objects"]
        for entry in objects:  # like the Hub's signed URLs, these need no token
            entry["actions"] = {"upload": {"href": f"{self.hub.url}/lfs/{entry['oid']}"}}
        return {"transfer": "basic", "objects": objects}

    def lfs_put(self, oid):
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise HubError(400, "the content does not have the hash in the URL")
        self.hub.large[oid] = self.body
        return b""

    def commit(self, name):
        repo, files = self.open_repo(name, write=True), {}
        for line in map(json.loads, self.body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.hub.large[value["oid"]]
            elif line["key"] != "header":
                raise HubError(501, f"hub_server does not implement {line['key']}")
        repo.commit(files)
        url = f"{self.hub.url}/{name}/commit/{repo.commits[-1]}"
        return {"success": True, "commitOid": repo.commits[-1], "commitUrl": url}

    def info(self, name):
        repo = self.open_repo(name)
        siblings = [{"rfilename": path} for path in sorted(repo.files)]
        known = {"id": name.removeprefix("datasets/"), "sha": repo.commits[-1], "private": repo.private}
        return known | {"gated": False, "tags": [], "siblings": siblings}

    def tree(self, name, folder):
        """All files in a folder, as if asked for them recursively: without entries for folders."""
        files = self.open_repo(name).files
        found = {
            path: file for path, file in files.items() if path.startswith(f"{folder}/" if folder else "")
        }
        if folder and not found:
            raise HubError(404, f"{folder} does not exist", "EntryNotFound")
        return [
            {"type": "file", "path": path, "size": len(file), "oid": hashlib.sha1(file).hexdigest()}
            for path, file in sorted(found.items())
        ]

    def resolve(self, name, path):
        files = self.open_repo(name).files
        if path not in files:
            raise HubError(404, "Entry not found", "EntryNotFound")
        self.headers_out["ETag"] = f'"{hashlib.sha1(files[path]).hexdigest()}"'
        return files[path]
