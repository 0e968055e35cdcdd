# SPDX-License-Identifier: Apache-2.0
"""The README's example edits, applied to a copy of the script, which is then run as the edited script would
be."""

import importlib.util
import json
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
import traceback

import pytest
import torch
from conftest import SCRIPT, Finished, tiny_args
from safetensors.torch import load_file

README = SCRIPT.with_name("README.md")
FLAGS = {
    "max_train_steps": 4,
    "checkpointing_steps": 2,
    "train_batch_size": 2,
    "validation_split": 8,
    "validation_steps": 2,
    "learning_rate": 1e-3,
}


def read_edits():
    """The README's diffs, by the first line that each adds."""
    diffs = re.findall(r"```diff\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    edits = {re.search(r"^\+ +(.*)$", diff, re.MULTILINE).group(1): diff for diff in diffs}
    names = {"huber_loss": "Huber loss", "ColorJitter": "color jitter", "requires_grad_": "attention only"}
    return {name: diff for part, name in names.items() for line, diff in edits.items() if part in line}


def run_edited(folder, args, log):
    """In a forked process: imports the edited script in place of the other one, and runs it."""
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.stdout, sys.stderr = sys.__stdout__, sys.__stderr__
    os.environ["HF_DEACTIVATE_ASYNC_LOAD"] = "1"
    torch.set_num_threads(1)
    os.chdir(folder)
    status = 0
    try:
        spec = importlib.util.spec_from_file_location("train_text_to_image_prior", folder / SCRIPT.name)
        edited = importlib.util.module_from_spec(spec)
        sys.modules["train_text_to_image_prior"] = edited
        spec.loader.exec_module(edited)
        edited.main([str(arg) for arg in args])
    except SystemExit as end:
        print(end.code, file=sys.stderr)
        status = end.code if isinstance(end.code, int) else 1
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


class Edited:
    """A copy of the project with an edit of the README's."""

    def __init__(self, folder, diff, models, pictures):
        self.folder, self.models, self.pictures = folder, models, pictures
        for file in (SCRIPT, SCRIPT.with_name("modeling_efficient_net_encoder.py")):
            shutil.copy(file, folder)
        (folder / "edit.diff").write_text(diff, encoding="utf-8")
        command = ["git", "apply", "--recount", "edit.diff"]
        subprocess.run(
            command, cwd=folder, check=True, env=os.environ | {"GIT_CEILING_DIRECTORIES": str(folder)}
        )
        assert (folder / SCRIPT.name).read_text() != SCRIPT.read_text(), "the diff was not applied"

    def run(self, name, **flags):
        args = tiny_args(self.models, self.pictures, self.folder / name, **FLAGS | flags)
        log = self.folder / f"{name}.log"
        child = multiprocessing.get_context("fork").Process(target=run_edited, args=(self.folder, args, log))
        child.start()
        child.join(300)
        if child.exitcode is None:
            child.kill()
            pytest.fail("it does not end")
        return Finished(child.exitcode, log.read_text(errors="replace"))

    def weights(self, name):
        return load_file(self.folder / name / "prior_pipeline/prior/diffusion_pytorch_model.safetensors")

    def losses(self, name, key="train_loss"):
        rows = map(json.loads, (self.folder / name / "loss.jsonl").read_text().splitlines())
        return {row["step"]: row[key] for row in rows if key in row}


@pytest.fixture(scope="module")
def edited(models, pictures, tmp_path_factory):
    """edited(name): an `Edited` copy, made and trained once, in its folder "whole"."""
    copies = {}

    def make(name):
        if name not in copies:
            diff = read_edits()[name] if name != "none" else None
            folder = tmp_path_factory.mktemp("edited")
            copies[name] = (
                Edited(folder, diff, models, pictures) if diff else Unedited(folder, models, pictures)
            )
            finished = copies[name].run("whole")
            assert finished.returncode == 0, finished
        return copies[name]

    return make


class Unedited(Edited):
    """A copy of the project as it is."""

    def __init__(self, folder, models, pictures):
        self.folder, self.models, self.pictures = folder, models, pictures
        for file in (SCRIPT, SCRIPT.with_name("modeling_efficient_net_encoder.py")):
            shutil.copy(file, folder)


EDITS = ["Huber loss", "color jitter", "attention only"]


def test_the_readme_has_these_edits():
    assert list(read_edits()) == EDITS


@pytest.mark.parametrize(
    "name", [EDITS[0], *(pytest.param(name, marks=pytest.mark.slow) for name in EDITS[1:])]
)
@pytest.mark.parametrize("num_workers", [pytest.param(0, marks=pytest.mark.slow), 2])
def test_an_edited_script_resumes_to_the_same_weights(edited, name, num_workers):
    copy = edited(name)
    resumed = f"resumed-{num_workers}"
    shutil.copytree(copy.folder / "whole" / "checkpoint-2", copy.folder / resumed / "checkpoint-2")
    flags = {"resume_from_checkpoint": "latest", "dataloader_num_workers": num_workers}
    finished = copy.run(resumed, **flags)
    assert finished.returncode == 0, finished
    expected, weights = copy.weights("whole"), copy.weights(resumed)
    assert all(torch.equal(expected[key], weights[key]) for key in expected)


@pytest.mark.parametrize("name", EDITS)
@pytest.mark.slow
def test_an_edited_script_trains_with_gradient_checkpointing(edited, name):
    copy = edited(name)
    finished = copy.run("checkpointed", gradient_checkpointing=True)
    assert finished.returncode == 0, finished
    expected = copy.losses("whole")
    assert copy.losses("checkpointed") == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("name", ["Huber loss", "attention only"])
@pytest.mark.slow
def test_an_edited_script_trains_from_a_cache(edited, name):
    copy = edited(name)
    finished = copy.run("cached", cache_latents=True, cache_dir=copy.folder / "cache")
    assert finished.returncode == 0, finished
    assert copy.losses("cached") == pytest.approx(copy.losses("whole"), rel=1e-4)


def test_the_jitter_is_not_frozen_into_a_cache(edited):
    copy = edited("color jitter")
    finished = copy.run("cached", cache_latents=True, cache_dir=copy.folder / "cache")
    assert finished.returncode == 2
    assert "--cache_latents" in finished.output.splitlines()[-2] + finished.output.splitlines()[-1]
    assert "make_augmentations" in finished.output


def test_the_jitter_changes_training_and_not_the_first_held_out_loss(edited):
    jittered, plain = edited("color jitter"), edited("none")
    assert jittered.losses("whole")[1] != plain.losses("whole")[1]
    assert jittered.losses("whole", "val_loss")[0] == plain.losses("whole", "val_loss")[0]


def test_the_loss_changes_for_training_and_held_out_rows(edited):
    """Half the squared error below 1, linear above: at most half the MSE."""
    huber, plain = edited("Huber loss"), edited("none")
    for key, step in (("train_loss", 1), ("val_loss", 0)):
        assert 0 < huber.losses("whole", key)[step] <= 0.5 * plain.losses("whole", key)[step]


def test_only_attention_is_trained(edited, models):
    before = load_file(models / "prior" / "prior" / "diffusion_pytorch_model.safetensors")
    after = edited("attention only").weights("whole")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    # The tiny prior's blocks are, in turn, a residual, a timestep and an attention block.
    assert changed == {name for name in before if re.match(r"blocks\.(2|5)\.", name)}
