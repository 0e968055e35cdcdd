# SPDX-License-Identifier: Apache-2.0
"""--push_to_hub, against a server that speaks the Hub's protocol: what arrives, what is said, and who sees the token.

The client reads the Hub's address when it is imported, so each run is a fresh process; many tests look at one run.
"""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import SCRIPT, tiny_args
from diffusers import AutoPipelineForText2Image
from hub_server import CUT, HubServer, is_large
from huggingface_hub import ModelCard
from PIL import Image
from safetensors.torch import load, load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

TOKEN = "hf_xKqTbWnVmZsLpRdFgHjY"
READER = "hf_RdNlYpWcJvTgBsQhXmKz"
UNKNOWN = "hf_ZvCpLrWsDkGtMnBhQxFj"
TOKENS = {TOKEN: {"name": "tester", "write": True}, READER: {"name": "tester", "write": False}}
PROMPTS = ["a red apple \N{RED APPLE}", 'a "new" moon: it\'s dark']
BASE, DECODER, DATA = "warp-ai/wuerstchen-prior", "warp-ai/wuerstchen", "tester/emoji"
FROM_HUB = {
    "pretrained_prior_model_name_or_path": BASE,
    "pretrained_decoder_model_name_or_path": DECODER,
    "dataset_name": DATA,
    "train_data_dir": None,
}
QUICK = {"max_train_samples": 8, "max_train_steps": 2, "push_to_hub": True}
IMPATIENT = "import train_text_to_image_prior as script; script.PUSH_WAITS = (0.1, 0.1); script.main()"
PIPELINE = {
    "model_index.json",
    "scheduler/scheduler_config.json",
    *(f"text_encoder/{name}" for name in ("config.json", "model.safetensors")),
    *(f"tokenizer/{name}" for name in ("merges.txt", "tokenizer.json", "tokenizer_config.json", "vocab.json")),
}
MODEL = {"config.json", "diffusion_pytorch_model.safetensors"}
PRIOR = PIPELINE | {f"prior/{name}" for name in MODEL}
# All that may arrive, but for the validation pictures.
WANTED = {
    *PIPELINE,
    *(f"{part}/{name}" for part in ("decoder", "vqgan") for name in MODEL),
    *(f"prior_{name}" for name in PRIOR - {"model_index.json"}),
    *(f"prior_pipeline/{name}" for name in PRIOR),
    "README.md",
    "loss.png",
}
PICTURES = ["samples/update-0000002-prompt-0.png", "samples/update-0000002-prompt-1.png"]


def read_folder(folder):
    """path -> bytes of every file."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@contextmanager
def small_hub(folder, models, pictures, xet=False):
    """A Hub that has tiny models, and a data set of eight pictures, whose folders are in `folder`, too."""
    shutil.copytree(models / "prior", folder / "prior")
    (folder / "prior" / "README.md").write_text("---\nlicense: mit\n---\n# A prior\n")
    (folder / "emoji").mkdir()
    lines = (pictures / "metadata.jsonl").read_text().splitlines()[:8]
    for line in lines:
        shutil.copy(pictures / json.loads(line)["file_name"], folder / "emoji")
    (folder / "emoji" / "metadata.jsonl").write_text("\n".join(lines))
    with HubServer(folder / "hub", tokens=TOKENS, xet=xet) as hub:
        hub.add_repo(BASE, folder / "prior")
        hub.add_repo(DECODER, models / "decoder")
        hub.add_repo(DATA, folder / "emoji", repo_type="dataset")
        yield hub


def fresh_process(hub, command, token=None, cwd=None, **env):
    """Runs a command as a user does whose Hub is `hub`, by default in an empty folder; gives it, and what was printed.

    An environment variable that is None is removed.
    """
    cwd = cwd or hub.folder / f"cwd-{len([*hub.folder.glob('cwd-*')])}"
    cwd.mkdir(exist_ok=True)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    env = {"HF_HUB_CACHE": None, "HF_DATASETS_CACHE": None, "PATH": path, "PYTHONPATH": str(SCRIPT.parent)} | env
    env = os.environ | hub.env(token) | {"HF_HUB_DISABLE_UPDATE_CHECK": "1"} | env
    done = subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        env={name: value for name, value in env.items() if value is not None},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
    )
    return SimpleNamespace(returncode=done.returncode, log=done.stdout, cwd=cwd, hub=hub)


def watch_upload(hub, output_dir):
    """A dict that gets all files of `output_dir`, as they are when the upload begins."""
    then = {}

    def look(method, path):
        trained = (output_dir / "checkpoint-2").exists()
        if trained and not then and method in ("POST", "PUT") and re.search("/tester/|/lfs/", path):
            then.update(read_folder(output_dir))

    hub.fail = look
    return then


# -------------------------------------------------------------------------------------------- two runs


@pytest.fixture(scope="module")
def rich(models, pictures, tmp_path_factory):
    """All from the Hub, prompts, every tracker, which write into --output_dir; a private repo, LFS, --hub_token."""
    folder = tmp_path_factory.mktemp("rich")
    output_dir = folder / "apples"
    # What may lie there already, some of it from other programs.
    for name in ("checkpoint-other/config.json", "checkpoint-other/optimizer.pt", "private/picture.png"):
        (output_dir / name).parent.mkdir(parents=True, exist_ok=True)
        (output_dir / name).write_bytes(b"{}")
    args = tiny_args(
        models,
        pictures,
        output_dir,
        **QUICK | FROM_HUB,
        cache_dir=output_dir / "cache",
        checkpointing_steps=1,
        use_ema=True,
        validation_prompts=PROMPTS,
        validation_steps=1,
        report_to="all",
        hub_private_repo=True,
        hub_token=TOKEN,
    )
    with small_hub(folder, models, pictures) as hub:
        then = watch_upload(hub, output_dir)
        run = fresh_process(hub, [sys.executable, SCRIPT, *args], WANDB_DIR=str(output_dir))
        assert run.returncode == 0, run.log
        run.folder, run.output_dir, run.then, run.trained = folder, output_dir, then, "checkpoint-2/prior_ema"
        run.repo_id, run.pictures, run.prompt = "tester/apples", ["grid.png", *PICTURES], PROMPTS[0]
        yield run


@pytest.fixture(scope="module")
def bare(models, pictures, tmp_path_factory):
    """Local models and pictures, no prompts, no trackers; Xet, and the token as `hf auth login` leaves it."""
    folder = tmp_path_factory.mktemp("bare")
    with small_hub(folder, models, pictures, xet=True) as hub:
        flags = {"pretrained_prior_model_name_or_path": folder / "prior", "checkpointing_steps": 2, "seed": None}
        args = tiny_args(models, pictures, folder / "plain", **QUICK | flags)
        (hub.folder / "client").mkdir()
        (hub.folder / "client" / "token").write_text(TOKEN)
        then = watch_upload(hub, folder / "plain")
        run = fresh_process(hub, [sys.executable, SCRIPT, *args])
        assert run.returncode == 0, run.log
        run.folder, run.output_dir, run.then, run.trained = folder, folder / "plain", then, "checkpoint-2/prior"
        run.repo_id, run.pictures, run.prompt = "tester/plain", [], "a photo"
        yield run


@pytest.fixture(params=["rich", pytest.param("bare", marks=pytest.mark.slow)])
def pushed(request):
    """Each of the two runs."""
    return request.getfixturevalue(request.param)


def test_what_a_user_needs_arrives_and_nothing_else(pushed):
    files = pushed.hub.files(pushed.repo_id)
    assert set(files) == WANTED | set(pushed.pictures)
    assert {name: (pushed.output_dir / name).read_bytes() for name in files} == files
    assert len(pushed.hub.repos[pushed.repo_id]["commits"]) == 2, "the empty one, and all else at once"


def test_neither_the_card_nor_a_picture_names_a_folder_of_this_machine(pushed):
    """As diffusers' own config.json does, with where a model was loaded from."""
    files = pushed.hub.files(pushed.repo_id)
    named = {name for name, content in files.items() if str(pushed.folder).encode() in content}
    assert {name for name in named if not name.endswith("/config.json")} == set()


def test_there_was_more_that_could_have_arrived(rich):
    names = set(read_folder(rich.output_dir))
    for pattern in (
        "checkpoint-1/optimizer.bin",
        "checkpoint-2/random_states_0.pkl",
        "samples/update-0000001-prompt-0.png",
        r"logs/.*tfevents.*",
        r"wandb/.*\.png",
        r"cache/.*model\.safetensors",
    ):
        assert [name for name in names if re.fullmatch(pattern, name)], pattern


def test_what_arrives_is_on_disk_before_the_upload_begins(pushed):
    files = pushed.hub.files(pushed.repo_id)
    assert {name: pushed.then.get(name) for name in files} == files


def test_no_byte_goes_up_twice(pushed):
    """The two folders hold the same weights. Of small files, which travel inside the commit, nothing is asked."""
    large = [content for name, content in pushed.hub.files(pushed.repo_id).items() if is_large(name, len(content))]
    once = sum(map(len, {hashlib.sha256(content).digest(): content for content in large}.values()))
    twice = sum(map(len, large))
    if pushed.hub.xet:  # what the store keeps is compressed, by a few percent
        sent = sum(file.stat().st_size for file in pushed.hub.folder.glob("xet/**/xorbs/default.*"))
        assert 0.8 * once < sent <= once
        assert once < 0.7 * twice
    else:
        stored = [pushed.hub.folder / path[1:] for method, path, _ in pushed.hub.requests if method == "PUT"]
        assert sum(file.stat().st_size for file in stored) == once
        assert once < 0.7 * twice


def test_the_upload_has_a_progress_bar(pushed):
    after = pushed.log[pushed.log.rindex("Steps: 100%") :]
    assert re.search(r"(Upload \d+ LFS files|New Data Upload *): 100%\|", after)


def test_the_log_does_not_list_requests(pushed):
    """Addresses that files are sent to are signed: who reads one may write there."""
    assert pushed.hub.url not in pushed.log


def test_the_weights_are_the_trained_ones(pushed):
    files = pushed.hub.files(pushed.repo_id)
    trained = load_file(pushed.output_dir / pushed.trained / "diffusion_pytorch_model.safetensors")
    for folder in ("prior_prior", "prior_pipeline/prior"):
        arrived = load(files[f"{folder}/diffusion_pytorch_model.safetensors"])
        assert arrived.keys() == trained.keys()
        assert all(torch.equal(arrived[name], value) for name, value in trained.items())


def test_the_cards_code_runs_as_printed(pushed):
    """In an empty folder, with nothing downloaded, it draws what the pipeline on disk draws from the same noise."""
    (code,) = re.findall(r"```python\n(.*?)```", pushed.hub.files(pushed.repo_id)["README.md"].decode(), re.DOTALL)
    seeded = f"import torch; torch.manual_seed(7); exec({code!r})"
    home = str(pushed.folder / "elsewhere")
    done = fresh_process(pushed.hub, [sys.executable, "-c", seeded], TOKEN, HF_HOME=home)
    assert done.returncode == 0, done.log
    pipeline = AutoPipelineForText2Image.from_pretrained(pushed.output_dir)
    torch.manual_seed(7)
    drawn = pipeline(pushed.prompt, width=128, height=128, prior_guidance_scale=4.0).images[0]
    assert np.array_equal(np.asarray(Image.open(done.cwd / "picture.png")), np.asarray(drawn))


def test_the_token_is_nowhere_but_in_requests_to_the_hub(pushed):
    assert TOKEN not in pushed.log
    files = read_folder(pushed.folder)
    assert {name for name, content in files.items() if TOKEN.encode() in content} <= {"hub/client/token"}
    asked = [token for method, path, token in pushed.hub.requests if re.search("/commit/|/repos/create", path)]
    assert asked == [f"Bearer {TOKEN}"] * 2


def test_trackers_write_down_the_command_line(rich):
    """So the search for the token in what they wrote can fail."""
    files = read_folder(rich.output_dir)
    assert [name for name, content in files.items() if name.startswith("wandb/") and b"--hub_token" in content]


def test_the_repo_is_made_before_anything_else_is_loaded(rich):
    asked = [f"{method} {path}" for method, path, _ in rich.hub.requests]
    before = asked[: asked.index("POST /api/repos/create")]
    assert {line.split("/", 1)[1] for line in before} == {f"{DECODER}/resolve/main/model_index.json"}


@pytest.mark.parametrize(("run", "private"), [("rich", True), pytest.param("bare", False, marks=pytest.mark.slow)])
def test_the_repo_is_private_if_that_is_asked_for(request, run, private):
    run = request.getfixturevalue(run)
    assert run.hub.repos[run.repo_id]["private"] == private


# ------------------------------------------------------------------------------------------- the card


def test_the_cards_metadata_are_what_the_hub_goes_by(rich):
    metadata = ModelCard(rich.hub.files(rich.repo_id)["README.md"].decode()).data.to_dict()
    assert metadata == {
        "base_model": BASE,
        "datasets": [DATA],
        "license": "mit",
        "library_name": "diffusers",
        "pipeline_tag": "text-to-image",
        "tags": ["wuerstchen", "text-to-image", "diffusers", "diffusers-training"],
        "widget": [{"text": prompt, "output": {"url": url}} for prompt, url in zip(PROMPTS, PICTURES, strict=True)],
    }
    assert ("POST", "/api/validate-yaml", f"Bearer {TOKEN}") in rich.hub.requests


@pytest.mark.slow
def test_the_card_of_a_local_run_names_nothing_that_the_hub_does_not_have(bare):
    card = bare.hub.files(bare.repo_id)["README.md"].decode()
    metadata = ModelCard(card).data.to_dict()
    assert metadata["license"] == "mit", "of the base, whose folder has a card"
    assert metadata.keys() == {"license", "library_name", "pipeline_tag", "tags"}
    assert "fine-tuned on **local pictures**" in card
    state = json.loads((bare.output_dir / "checkpoint-2" / "trainer_state.json").read_text())
    assert re.search(rf"\bseed[ =]{state['plan']['seed']}\b", card), "the one that was picked"


def test_the_card_tells_what_was_trained_on_what_for_how_long_and_how(rich):
    card = rich.hub.files(rich.repo_id)["README.md"].decode()
    assert f"**{BASE}**, fine-tuned on **{DATA}**" in card
    assert "For 2 updates of 4 samples, 1.0 epochs of 8 rows, in 0.0 hours on 1 x\ncpu" in card
    for setting in ("learning_rate=0.0001", "resolution=64", "use_ema ", "seed=0", "train_batch_size=4"):
        assert f"--{setting}" in card
    assert "hub_token" not in card
    for prompt in PROMPTS:
        assert f"* {prompt}\n" in card


def test_the_cards_pictures_are_the_last_ones_drawn_and_the_curve(rich):
    files = rich.hub.files(rich.repo_id)
    assert re.findall(r"!\[.*?\]\((.*?)\)", files["README.md"].decode()) == ["grid.png", "loss.png"]
    drawn = [np.asarray(Image.open(BytesIO(files[name]))) for name in PICTURES]
    assert np.array_equal(np.asarray(Image.open(BytesIO(files["grid.png"]))), np.hstack(drawn))
    assert not np.array_equal(*drawn)
    curve = np.asarray(Image.open(BytesIO(files["loss.png"])))
    assert (curve == (0, 0, 255)).all(axis=2).any(), "the blue line"


# ------------------------------------------------------------------------------------------ outages


@pytest.fixture(scope="module", params=["/commit/", pytest.param("", marks=pytest.mark.slow)], ids=["commit", "all"])
def out_of_order(models, pictures, tmp_path_factory, request):
    """From the last checkpoint on the Hub answers 503 to each commit, or to all. The token is in HF_TOKEN.

    All means what saving asks the Hub for, too. The client itself is patient there: it takes two minutes.
    """
    folder = tmp_path_factory.mktemp("outage")
    flags = {"validation_prompts": PROMPTS, "checkpointing_steps": 2, "report_to": "tensorboard"}
    args = tiny_args(models, pictures, "my run", **QUICK | FROM_HUB | flags, hub_model_id="tester/later")
    with small_hub(folder, models, pictures) as hub:

        def fail(method, path):
            if request.param in path and [*folder.glob("hub/cwd-*/my run/checkpoint-2")]:
                return 503

        hub.fail = fail
        run = fresh_process(hub, [sys.executable, "-c", IMPATIENT, *args], TOKEN)
        hub.fail = lambda method, path: None
        run.output_dir = run.cwd / "my run"
        yield run


def test_an_outage_without_end_is_told_with_a_status_after_all_is_saved(out_of_order):
    run = out_of_order
    assert run.returncode == 1, run.log
    assert len(re.findall("WARNING .*tried again in 0.1 seconds", run.log)) == 2
    assert "Traceback" not in run.log
    told = run.log[run.log.rindex("--push_to_hub: ") :]
    assert "503" in told.splitlines()[0]
    assert re.match("All of it is in my run; to push it later: hf upload tester/later ", told.splitlines()[-1])
    assert run.hub.files("tester/later") == {}
    assert set(read_folder(run.output_dir)) >= WANTED | {"grid.png", *PICTURES}
    assert TOKEN not in run.log
    assert [path for path in run.cwd.rglob("*") if path.is_file() and TOKEN.encode() in path.read_bytes()] == []


def test_after_an_outage_the_trackers_have_all(out_of_order):
    folder = out_of_order.output_dir / "logs" / "text2image-fine-tune"
    shown = EventAccumulator(str(folder), {"scalars": 0, "images": 0}).Reload()
    assert [scalar.step for scalar in shown.Scalars("train_loss")] == [1, 2]
    assert [image.step for image in shown.Images("validation/1")] == [0, 2]


def test_the_command_that_is_printed_pushes_the_same_later(out_of_order):
    command = re.findall("to push it later: (.*)", out_of_order.log)[-1]
    done = fresh_process(out_of_order.hub, ["sh", "-c", command], TOKEN, cwd=out_of_order.cwd)
    assert done.returncode == 0, done.log
    files = out_of_order.hub.files("tester/later")
    assert set(files) == WANTED | {"grid.png", *PICTURES}
    assert {name: (out_of_order.output_dir / name).read_bytes() for name in files} == files


@pytest.mark.slow
def test_an_outage_that_ends_is_waited_out(models, pictures, tmp_path):
    """A connection is cut in the middle of a file, one in the middle of the commit, and then there is a 503."""
    commit = "POST /api/models/tester/out/commit/"
    faults = [("PUT /lfs/", CUT), (commit, CUT), (commit, 503)]

    def fail(method, path):
        if faults and f"{method} {path}".startswith(faults[0][0]):
            return faults.pop(0)[1]

    with small_hub(tmp_path, models, pictures) as hub:
        hub.fail = fail
        args = tiny_args(models, pictures, tmp_path / "out", **QUICK)
        done = fresh_process(hub, [sys.executable, "-c", IMPATIENT, *args], TOKEN)
    assert done.returncode == 0, done.log
    assert faults == []
    assert len(re.findall("WARNING .*tried again in 0.1 seconds", done.log)) == 2
    files = hub.files("tester/out")
    assert set(files) == WANTED
    assert {name: (tmp_path / "out" / name).read_bytes() for name in files} == files
    assert TOKEN not in done.log


@pytest.mark.slow
def test_a_token_that_is_withdrawn_while_training_is_not_waited_for(models, pictures, tmp_path):
    with small_hub(tmp_path, models, pictures) as hub:
        hub.tokens = dict(TOKENS)

        def fail(method, path):
            if (tmp_path / "out" / "README.md").exists():
                hub.tokens.pop(TOKEN, None)

        hub.fail = fail
        args = tiny_args(models, pictures, tmp_path / "out", **QUICK)
        done = fresh_process(hub, [sys.executable, "-c", IMPATIENT, *args], TOKEN)
    assert done.returncode == 1, done.log
    assert "tried again" not in done.log
    assert re.search(r"--push_to_hub: .*401[^`]*to push it later: hf upload tester/out ", done.log)
    assert set(read_folder(tmp_path / "out")) >= WANTED


# ----------------------------------------------------------------------------------------- refusals

REFUSED = {  # flags, and what is said
    "a wrong token": ({"hub_token": UNKNOWN, "hub_model_id": "tester/new"}, "401"),
    "a wrong token with the end of a line": ({"hub_token": f"{UNKNOWN}\r", "hub_model_id": "tester/new"}, "401"),
    "no token": ({"hub_model_id": "tester/new"}, "401"),
    "a token that may only read, and no repo yet": ({"hub_token": READER, "hub_model_id": "tester/new"}, "403"),
    "a token that may only read": ({"hub_token": READER, "hub_model_id": "tester/there"}, "403"),
    "someone else's repo": ({"hub_token": TOKEN, "hub_model_id": "other/theirs"}, "403"),
    "someone else's private repo": ({"hub_token": TOKEN, "hub_model_id": "other/secret"}, "403"),
    "what is no name": ({"hub_token": TOKEN, "hub_model_id": "my run!"}, "Repo id must"),
}
START_EACH = """
import json, os, sys
import train_text_to_image_prior as script
said = {}
for name, args in json.loads(os.environ["RUNS"]).items():
    try:
        script.main(args)
    except SystemExit as end:
        said[name] = end.code
print(json.dumps(said))
"""


@pytest.fixture(scope="module")
def refusals(models, pictures, tmp_path_factory):
    """What each of REFUSED says, one after another in one process. The pictures are nowhere: nobody looks for them."""
    folder = tmp_path_factory.mktemp("refusals")
    runs = {}
    for name, (flags, _) in REFUSED.items():
        args = tiny_args(models, folder / "nowhere", folder / "out", **QUICK | flags)
        runs[name] = [str(arg) for arg in args]
    with HubServer(folder / "hub", tokens=TOKENS) as hub:
        for repo_id in ("tester/there", "other/theirs", "other/secret"):
            hub.add_repo(repo_id, models / "prior", private=repo_id == "other/secret")
        done = fresh_process(hub, [sys.executable, "-c", START_EACH], RUNS=json.dumps(runs))
    assert done.returncode == 0, done.log
    return SimpleNamespace(said=json.loads(done.log.splitlines()[-1]), log=done.log, folder=folder, hub=hub)


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_pushed_to_is_refused_at_the_start(refusals, name):
    flags, reason = REFUSED[name]
    said = refusals.said[name]
    assert re.fullmatch(f"--push_to_hub: --hub_model_id={re.escape(flags['hub_model_id'])}: .*{reason}.*", said)


def test_a_refusal_leaves_nothing_and_does_not_tell_the_token(refusals):
    assert [path for path in (refusals.folder / "out").rglob("*") if path.is_file()] == []
    assert set(refusals.hub.repos) == {"tester/there", "other/theirs", "other/secret"}
    assert {len(repo["commits"]) for repo in refusals.hub.repos.values()} == {1}
    assert [token for token in (TOKEN, READER, UNKNOWN) if token in refusals.log] == []
