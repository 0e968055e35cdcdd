# SPDX-License-Identifier: Apache-2.0
"""The Hub in hub_server.py with the real, unpatched clients: huggingface_hub, datasets and diffusers."""

import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
import urllib.request
from pathlib import Path

import huggingface_hub
import pytest
from conftest import PICTURES
from hub_server import HubServer

TOKENS = {
    "hf_good": {"name": "tester", "write": True, "orgs": ["lab"]},
    "hf_read": {"name": "tester", "write": False},
    "hf_other": {"name": "other", "write": True},
}

# The name in huggingface_hub 1 and later, and before.
NO_FILE = "RemoteEntryNotFoundError" if huggingface_hub.__version__ >= "1" else "EntryNotFoundError"


@pytest.fixture
def hub(tmp_path, request):
    with HubServer(tmp_path / "hub", tokens=TOKENS, xet=getattr(request, "param", False)) as hub:
        yield hub


def run_client(hub, code, token=None, **names):
    """Runs code in a new process whose Hub is `hub`, with `names` defined; returns its variable `result`."""
    setup = f"import json\nglobals().update(json.loads({json.dumps(json.dumps(names))}))\nresult = {{}}\n"
    command = [sys.executable, "-c", f"{setup}{code}\nprint('\\n' + json.dumps(result))"]
    env = {**os.environ, **hub.env(token), "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def read_folder(folder):
    """path -> bytes of every file."""
    files = [path for path in Path(folder).rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


@pytest.fixture
def model(tmp_path):
    """A folder with a card, a large file and small files."""
    folder = tmp_path / "model"
    (folder / "prior").mkdir(parents=True)
    (folder / "README.md").write_text("---\nlicense: mit\ntags: [wuerstchen]\n---\n# A prior\n")
    (folder / "model_index.json").write_text('{"_class_name": "Prior"}')
    (folder / "prior" / "config.json").write_text('{"depth": 2, "name": "d\u00e9j\u00e0 vu"}')
    (folder / "prior" / "a file.txt").write_text("")
    (folder / "prior" / "model.safetensors").write_bytes(random.Random(0).randbytes(6_000_001))
    return folder


@pytest.mark.parametrize("hub", [False, True], ids=["lfs", "xet"], indirect=True)
def test_uploaded_files_are_read_back(hub, model):
    if hub.xet:
        pytest.importorskip("hf_xet")
        if huggingface_hub.__version__ < "1":
            pytest.skip("it sends files of this size without Xet")
    source = read_folder(model)
    result = run_client(
        hub,
        """
from huggingface_hub import HfApi, hf_hub_download, snapshot_download
api = HfApi()
repo_id = api.create_repo("prior", private=True).repo_id
result["repo_id"] = repo_id
result["same"] = api.create_repo(repo_id, exist_ok=True).repo_id
result["commit"] = api.upload_folder(repo_id=repo_id, folder_path=model).oid
result["again"] = api.upload_folder(repo_id=repo_id, folder_path=model).oid
result["names"] = api.list_repo_files(repo_id)
result["large"] = hf_hub_download(repo_id, "prior/model.safetensors")
result["snapshot"] = snapshot_download(repo_id)
info = api.model_info(repo_id, files_metadata=True)
result["sizes"] = {file.rfilename: file.size for file in info.siblings}
result["lfs"] = {file.path: file.lfs.sha256 for file in api.list_repo_tree(repo_id, "prior") if file.lfs}
api.delete_file("prior/a file.txt", repo_id)
api.upload_file(path_or_fileobj=b"{}", path_in_repo="model_index.json", repo_id=repo_id)
result["newest"] = snapshot_download(repo_id)
result["older"] = snapshot_download(repo_id, revision=result["commit"], local_dir=older, force_download=True)
        """,
        token="hf_good",
        model=str(model),
        older=str(model.parent / "older"),
    )
    assert result["repo_id"] == result["same"] == "tester/prior"
    assert sorted(result["names"]) == sorted(source)
    assert Path(result["large"]).read_bytes() == source["prior/model.safetensors"]
    assert read_folder(result["snapshot"]) == source
    assert result["again"] == result["commit"], "nothing changed, so no commit is made"
    assert result["sizes"] == {name: len(content) for name, content in source.items()}
    sha256 = hashlib.sha256(source["prior/model.safetensors"]).hexdigest()
    assert result["lfs"] == {"prior/model.safetensors": sha256}

    changed = {**source, "model_index.json": b"{}"}
    del changed["prior/a file.txt"]
    assert read_folder(result["newest"]) == hub.files("tester/prior") == changed
    older = read_folder(result["older"])
    assert {name: older[name] for name in older if not name.startswith(".cache/")} == source
    repo = hub.repos["tester/prior"]
    assert (repo["private"], len(repo["commits"]), repo["commits"][1]) == (True, 4, result["commit"])
    assert [request for request in hub.requests if request[0] == "PUT"] == (
        [] if hub.xet else [("PUT", f"/lfs/{sha256}", None)]
    )
    assert {token for method, _, token in hub.requests if method != "PUT"} == {"Bearer hf_good"}


def test_error_responses_become_the_clients_exceptions(hub, model):
    hub.add_repo("tester/public", model)
    hub.add_repo("tester/secret", model, private=True)
    result = run_client(
        hub,
        """
from huggingface_hub import HfApi
api = HfApi()

def outcome(function, *args, **kwargs):
    try:
        return function(*args, **kwargs) and "ok"
    except Exception as error:
        return [type(error).__name__, error.response.status_code]

def upload(repo_id, token):
    return api.upload_file(path_or_fileobj=b"1", path_in_repo="one", repo_id=repo_id, token=token)

result["create: read token"] = outcome(api.create_repo, "tester/new", token="hf_read")
result["create: bad token"] = outcome(api.create_repo, "tester/new", token="hf_bad")
result["create: no token"] = outcome(api.create_repo, "tester/new")
result["create: not mine"] = outcome(api.create_repo, "other/new", token="hf_good")
result["create: my organisation"] = outcome(api.create_repo, "lab/new", token="hf_good")
result["create: exists"] = outcome(api.create_repo, "tester/public", token="hf_good")
result["create: exists, exist_ok"] = outcome(api.create_repo, "tester/public", token="hf_good", exist_ok=True)
result["upload: read token"] = outcome(upload, "tester/public", "hf_read")
result["upload: not mine"] = outcome(upload, "tester/public", "hf_other")
result["upload: no repo"] = outcome(upload, "tester/none", "hf_good")
result["read: bad token"] = outcome(api.model_info, "tester/public", token="hf_bad")
result["read: public"] = outcome(api.hf_hub_download, "tester/public", "README.md")
result["read: no file"] = outcome(api.hf_hub_download, "tester/public", "none.txt")
result["read: no repo"] = outcome(api.hf_hub_download, "tester/none", "README.md")
result["read: no revision"] = outcome(api.hf_hub_download, "tester/public", "README.md", revision="v9")
result["read: no data set with this name"] = outcome(api.dataset_info, "tester/public", token="hf_good")
result["read: private"] = outcome(api.model_info, "tester/secret")
result["read: private, not mine"] = outcome(api.model_info, "tester/secret", token="hf_other")
result["read: private, mine"] = outcome(api.model_info, "tester/secret", token="hf_read")
result["whoami"] = api.whoami(token="hf_read")["name"]
        """,
    )
    assert result == {
        "create: read token": ["HfHubHTTPError", 403],
        "create: bad token": ["HfHubHTTPError", 401],
        "create: no token": ["HfHubHTTPError", 401],
        "create: not mine": ["HfHubHTTPError", 403],
        "create: my organisation": "ok",
        "create: exists": ["HfHubHTTPError", 409],
        "create: exists, exist_ok": "ok",
        "upload: read token": ["HfHubHTTPError", 403],
        "upload: not mine": ["HfHubHTTPError", 403],
        "upload: no repo": ["RepositoryNotFoundError", 404],
        "read: bad token": ["HfHubHTTPError", 401],
        "read: public": "ok",
        "read: no file": [NO_FILE, 404],
        "read: no repo": ["RepositoryNotFoundError", 401],
        "read: no revision": ["RevisionNotFoundError", 404],
        "read: no data set with this name": ["RepositoryNotFoundError", 404],
        "read: private": ["RepositoryNotFoundError", 401],
        "read: private, not mine": ["RepositoryNotFoundError", 404],
        "read: private, mine": "ok",
        "whoami": "tester",
    }
    assert set(hub.repos) == {"tester/public", "tester/secret", "lab/new"}
    assert hub.files("tester/public") == read_folder(model)


def test_an_upload_succeeds_after_an_outage(hub, model):
    """The client retries a failed PUT, but not a failed commit. Its next upload does not send the large file
    again."""
    failures = [("PUT", "/lfs/"), ("POST", "/api/models/tester/prior/commit/")]

    def fail(method, path):
        if failures and method == failures[0][0] and path.startswith(failures[0][1]):
            failures.pop(0)
            return 503

    hub.fail = fail
    result = run_client(
        hub,
        """
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError
api = HfApi()
api.create_repo("tester/prior")
try:
    api.upload_folder(repo_id="tester/prior", folder_path=model)
except HfHubHTTPError as error:
    result["status"] = error.response.status_code
result["between"] = api.list_repo_files("tester/prior")
api.upload_folder(repo_id="tester/prior", folder_path=model)
        """,
        token="hf_good",
        model=str(model),
    )
    assert result == {"status": 503, "between": []}
    assert hub.files("tester/prior") == read_folder(model)
    assert len([method for method, _, _ in hub.requests if method == "PUT"]) == 2


@pytest.mark.parametrize(
    ("requested", "status", "part"),
    [
        ("bytes=0-9", 206, slice(0, 10)),
        ("bytes=5999999-", 206, slice(5_999_999, None)),
        ("bytes=-3", 206, slice(-3, None)),
    ],
)
def test_a_range_of_a_file_is_served(hub, model, requested, status, part):
    hub.add_repo("tester/prior", model)
    url = f"{hub.url}/tester/prior/resolve/main/prior/model.safetensors"
    with urllib.request.urlopen(urllib.request.Request(url, headers={"Range": requested})) as response:
        assert response.status == status
        assert response.read() == (model / "prior" / "model.safetensors").read_bytes()[part]


def test_a_data_set_is_loaded_by_name(hub, tmp_path):
    """One repo is added to the server, one uploaded by the client; both are recognized as image folders."""
    folder = tmp_path / "images"
    folder.mkdir()
    rows = [json.loads(line) for line in (PICTURES / "metadata.jsonl").read_text().splitlines()[:4]]
    for row in rows:
        shutil.copy(PICTURES / row["file_name"], folder)
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    hub.add_repo("tester/added", folder, repo_type="dataset")
    result = run_client(
        hub,
        """
from datasets import load_dataset
from huggingface_hub import HfApi
api = HfApi()
api.create_repo("tester/uploaded", repo_type="dataset")
api.upload_folder(repo_id="tester/uploaded", folder_path=folder, repo_type="dataset")
local = load_dataset("imagefolder", data_dir=folder, split="train")
for name in ("tester/added", "tester/uploaded"):
    rows = load_dataset(name, split="train")
    pairs = zip(rows["image"], local["image"], strict=True)
    result[name] = {
        "columns": rows.column_names,
        "captions": rows["text"][:],
        "same images": all(image.tobytes() == expected.tobytes() for image, expected in pairs),
    }
        """,
        token="hf_good",
        folder=str(folder),
    )
    loaded = {
        "columns": ["image", "text", "captions", "group"],
        "captions": [row["text"] for row in rows],
        "same images": True,
    }
    assert result == {"tester/added": loaded, "tester/uploaded": loaded}
    assert hub.files("tester/uploaded", "dataset") == read_folder(folder)


@pytest.mark.slow
def test_diffusers_loads_from_a_repo(hub, tmp_path):
    folder = tmp_path / "pipeline"
    (folder / "scheduler").mkdir(parents=True)
    config = {"_class_name": "DDPMWuerstchenScheduler", "s": 0.0123, "scaler": 1.5}
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(config))
    hub.add_repo("tester/pipeline", folder)
    result = run_client(
        hub,
        """
from diffusers import DDPMWuerstchenScheduler
scheduler = DDPMWuerstchenScheduler.from_pretrained("tester/pipeline", subfolder="scheduler")
result = {"s": scheduler.config.s, "scaler": scheduler.config.scaler}
        """,
    )
    assert result == {"s": 0.0123, "scaler": 1.5}
