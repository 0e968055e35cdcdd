# SPDX-License-Identifier: Apache-2.0
"""Checkpoints and the output folder: a resumed run ends with the same bits as one that was not interrupted,
whatever is on and wherever it stops or is killed; a full or odd disk costs only what was being written; and
nothing is replaced unasked."""

import errno
import functools
import json
import os
import resource
import shutil
import signal
import stat
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from conftest import (
    IMAGES,
    Output,
    assert_continues_as,
    at_call,
    distance,
    equal_images,
    load_optimizer_state,
    load_weights,
    resumed,
    run_in_fork,
    same_weights,
    script,
)
from diffusers.training_utils import EMAModel
from matplotlib.figure import Figure
from PIL import Image
from tiny_models import make_prior

SMALL = {"train_batch_size": 2, "max_train_samples": 10, "max_train_steps": 4}
SMALL |= {"checkpointing_steps": 1, "learning_rate": 1e-3}
# Six samples a step, ten rows: epochs end inside steps 2, 4 and 7, and with step 5. Validation is due there.
UNEVEN = SMALL | {"gradient_accumulation_steps": 3, "max_train_steps": 7, "use_ema": True}
UNEVEN |= {"caption_column": "captions", "validation_prompts": ["a red apple", "an owl at night"]}
UNEVEN |= {"validation_epochs": 1, "lr_scheduler": "cosine", "lr_warmup_steps": 2}
SHORT = {"max_train_steps": 2, "train_batch_size": 2}
LONGER = SHORT | {"max_train_steps": 3, "resume_from_checkpoint": "latest"}


def cases(table, *quick):
    """The names or rows of a table, the slow ones marked."""
    rows = [(row, row if isinstance(row, tuple) else (row,)) for row in table]
    return [pytest.param(*values, marks=[] if row in quick else [pytest.mark.slow]) for row, values in rows]


def no_space(*args, **kwargs):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def snapshot(folder):
    """Every file in a folder with its content, except for the lock."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != ".lock"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    """A data set of 14 wide and 10 high images, of which one of each is cut in half."""
    folder = tmp_path_factory.mktemp("shapes")
    lines = (IMAGES / "metadata.jsonl").read_text().splitlines()[:24]
    for index, name in enumerate(json.loads(line)["file_name"] for line in lines):
        image = Image.open(IMAGES / name).convert("RGB").resize((96, 48) if index < 14 else (48, 96))
        image.save(folder / name, format="PNG")
        os.truncate(folder / name, 900 if index in (3, 20) else (folder / name).stat().st_size)
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return folder


@pytest.fixture
def run_copy(train, tmp_path):
    """A copy of the folder of a finished run of two steps."""
    run = train(**SHORT, validation_prompts=["a red apple"], report_to="none").ok()
    return Path(shutil.copytree(run.folder, tmp_path / "run"))


# -------------------------------------------------------------------------- resuming ends with the same bits

AUGMENTED = {"random_crop": True, "random_flip": True, "caption_dropout": 0.3, "resolution": 96}
AUGMENTED |= {"loss_weighting": "p2", "timestep_sampling": "stretched", "skip_bad_rows": True}
BUCKETS = {"aspect_ratio_buckets": True, "skip_bad_rows": True, "max_train_samples": None}
HELD_OUT = {"validation_split": 5, "validation_steps": 2, "gradient_accumulation_steps": 2}
OFFLOADED = {"optimizer": "adafactor", "use_ema": True, "offload_ema": True}
# Five rows, four samples a step: an epoch ends inside step 2, and with step 5.
CACHED = SMALL | HELD_OUT | {"cache_latents": True, "use_ema": True, "max_train_steps": 6}
CACHED |= {"caption_column": "captions", "caption_dropout": 0.25}
RESUMED = {  # what is on, where the run stops, how the checkpoint is named, and the workers afterwards
    "within an epoch": (UNEVEN, 1, "latest", 0),
    "after a validation": (UNEVEN, 2, "latest", 2),
    "at an epoch's end": (UNEVEN, 5, "path", 0),
    "before the last step": (UNEVEN, 6, "path", 2),
    "augmented": (SMALL | AUGMENTED, 2, "path", 1),
    "bf16": (SMALL | {"mixed_precision": "bf16", "gradient_checkpointing": True}, 2, "path", 0),
    "8-bit Adam": (SMALL | {"use_8bit_adam": True}, 2, "latest", 0),
    "Adafactor": (SMALL | OFFLOADED, 2, "latest", 0),
    "buckets": (SMALL | BUCKETS | HELD_OUT, 2, "latest", 1),
    "cache, within an epoch": (CACHED, 2, "latest", 0),
    "cache, at an epoch's end": (CACHED, 5, "path", 2),
    "a seed that was chosen": (SMALL | {"seed": None}, 2, "latest", 0),
}
QUICK = ["within an epoch", "before the last step", "augmented", "buckets", "cache, within an epoch"]


@pytest.mark.parametrize("case", cases(RESUMED, *QUICK))
def test_a_resumed_run_equals_the_unbroken_one(train, shapes, tmp_path, case):
    flags, step, by, workers = RESUMED[case]
    flags = flags | {"record": True} | ({"train_data_dir": shapes} if "skip_bad_rows" in flags else {})
    run = train(**flags).ok()
    again = resumed(train, run, step, tmp_path, by, **flags, dataloader_num_workers=workers)
    last, micro_steps = flags["max_train_steps"], flags.get("gradient_accumulation_steps", 1)
    assert len(again.record["steps"]) == micro_steps * (last - step), "no sample is read without being used"
    for name in ("image_embeds", "prompt_embeds", "noise", "timesteps", "pred"):
        expected = [micro_step[name] for micro_step in run.record["steps"][micro_steps * step :]]
        there = [micro_step[name] for micro_step in again.record["steps"]]
        assert all(map(torch.equal, there, expected)), name
    assert_continues_as(again, run, step, last)
    assert f" {step}/{last} " in again.output and f" 0/{last} " not in again.output
    if "validation_prompts" in flags:
        assert [at for at, _ in again.samples()] == [at for at, _ in run.samples() if at > step]
    if "validation_split" in flags:
        assert again.losses("val_loss") == {at: x for at, x in run.losses("val_loss").items() if at > step}
    if "cache_latents" in flags:
        assert again.record["images"] == [], "no image is encoded again"
    if "use_8bit_adam" in flags:
        moments = load_optimizer_state(run.folder / "checkpoint-4")
        assert torch.uint8 in {moment.dtype for moment in moments.values()}


def test_a_finished_run_is_resumed_with_more_steps_or_only_writes_its_result(train, tmp_path):
    flags = SMALL | {"use_ema": True, "record": True}
    whole, half = train(**flags), train(**flags | {"max_train_steps": 2})
    again = resumed(train, half, 2, tmp_path / "on", **flags)
    assert_continues_as(again, whole, 2, 4)
    again = resumed(train, half, 2, tmp_path / "same", **flags | {"max_train_steps": 2})
    assert again.record["steps"] == again.record["rates"] == []
    assert same_weights(again.prior(), half.prior()) and (again.folder / "README.md").exists()
    assert not same_weights(again.prior(), half.prior(2)), "the average"


ELASTIC = SMALL | HELD_OUT | AUGMENTED | {"max_train_samples": 20, "validation_split": 6, "use_ema": True}
ELASTIC |= {"adam_epsilon": 1e-3, "max_grad_norm": 0.1, "record": True}
ELASTIC |= {"lr_scheduler": "piecewise_constant", "lr_step_rules": "1:1,0.5:2,0.8:3,0.6:4,1"}
# Processes, micro-batch and micro-steps of the unbroken run, and of runs that take two steps each.
SPLITS = {
    "two ranks, then one": [(1, 2, 4), (2, 2, 2), (1, 2, 4)],
    "one rank, then two": [(2, 2, 2), (1, 2, 4), (2, 2, 2)],
    "other micro-batches": [(2, 4, 1), (1, 2, 4), (4, 1, 2), (2, 2, 2), (1, 8, 1)],
}


@pytest.mark.parametrize("case", cases(SPLITS))
def test_any_ranks_train_alike_from_any_step(train_ranks, shapes, steady_prior, models, tmp_path, case):
    """It follows the unbroken one to rounding: samples, crops, captions, noise and timesteps are the same
    and, as long as the micro-batches are, dropout's masks."""
    prior = steady_prior if case == "other micro-batches" else models / "prior"
    flags = ELASTIC | {"pretrained_prior_model_name_or_path": prior, "train_data_dir": shapes}
    start = load_weights(prior / "prior")

    def start_or_resume(split, source, last_step):
        ranks, batch_size, accumulation = split
        plan = {"train_batch_size": batch_size, "gradient_accumulation_steps": accumulation}
        plan |= {"max_train_steps": last_step}
        if source is not None:
            folder = tmp_path / f"to-{last_step}"
            shutil.copytree(source, folder / source.name)
            plan |= {"output_dir": folder, "resume_from_checkpoint": "latest"}
        return [run.ok() for run in train_ranks(**flags | plan, ranks=ranks)]

    def samples(runs, name, first_micro_step, last_micro_step):
        steps = [step for run in runs for step in run.record["steps"][first_micro_step:last_micro_step]]
        return sorted(sample.double().numpy().tobytes() for step in steps for sample in step[name])

    unbroken_split, *splits = SPLITS[case]
    unbroken = start_or_resume(unbroken_split, None, 2 * len(splits))
    per_step, checkpoint = unbroken_split[2], None
    for step, split in zip(range(0, 2 * len(splits), 2), splits, strict=True):
        runs = start_or_resume(split, checkpoint, step + 2)
        checkpoint = runs[0].folder / f"checkpoint-{step + 2}"
        for name in ("pixels", "ids", "noise", "timesteps"):
            expected = samples(unbroken, name, step * per_step, (step + 2) * per_step)
            assert len(expected) == 16 and samples(runs, name, 0, None) == expected, name
        for done in (step + 1, step + 2):
            moved = distance(unbroken[0].prior(done), start)
            for folder in ("prior", "prior_ema"):
                apart = distance(runs[0].prior(done, folder), unbroken[0].prior(done, folder))
                assert apart < 1e-4 * moved, (split, done, folder)
            for name in ("train_loss", "grad_norm", "lr"):
                numbers = [run.losses(name)[done] for run in (runs[0], unbroken[0])]
                assert numbers[0] == pytest.approx(numbers[1], rel=1e-4), name
        losses = [run.losses("val_loss")[step + 2] for run in (runs[0], unbroken[0])]
        assert losses[0] == pytest.approx(losses[1], rel=1e-4)


# ----------------------------------------------------------------------------- saving: killed, and full disks

WRITES = {"os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "shutil.rmtree"}


def kill_at(operation):
    """Kills this process when it is about to change the file system for the `operation`-th time from now on,
    or at once."""
    seen = 0
    if operation == 0:
        signal.raise_signal(signal.SIGKILL)

    def count(event, args):
        nonlocal seen
        writes = event == "open" and isinstance(args[1], str) and set(args[1]) & set("wax+")
        flushes = event == "open" and args[1] is None and "checkpoint" in str(args[0])
        if writes or flushes or event in WRITES:
            seen += 1
            if seen == operation:
                signal.raise_signal(signal.SIGKILL)

    sys.addaudithook(count)


@pytest.fixture(scope="module")
def save():
    """save(output_dir, step, limit=None): saves a checkpoint in which every weight is the step's number, and
    returns whether that succeeded. It has all that `save_checkpoint` needs, without the rest of a run."""
    accelerator, prior = Accelerator(cpu=True), make_prior(depth=1)
    ema = EMAModel(prior.parameters(), model_cls=type(prior), model_config=prior.config)
    prior, optimizer = accelerator.prepare(prior, torch.optim.AdamW(prior.parameters(), lr=1e-3))

    def save(output_dir, step, limit=None):
        with torch.no_grad():
            for parameter in prior.parameters():
                parameter.fill_(step)
        args = SimpleNamespace(output_dir=output_dir, checkpoints_total_limit=limit)
        state = {"global_step": step, "validated_step": -1, "plan": {}, "wandb_run_id": ""}
        return script.save_checkpoint(accelerator, args, state, prior, ema, optimizer)

    return save


def steps_in(output_dir):
    """The steps of all complete checkpoints, oldest first. All tensors are read, and must be of that step."""
    steps = []
    for checkpoint in script.list_checkpoints(output_dir):
        steps.append(script.read_state(checkpoint)["global_step"])
        tensors, average = (load_weights(checkpoint / name) for name in ("prior", "prior_ema"))
        assert {value for tensor in tensors.values() for value in tensor.unique().tolist()} == {steps[-1]}
        assert average.keys() == tensors.keys()
        torch.load(checkpoint / "optimizer.bin", weights_only=True)
        assert checkpoint.name == f"checkpoint-{steps[-1]}"
    return steps


def test_a_kill_at_any_file_operation_of_saving_leaves_complete_checkpoints(save, tmp_path):
    """Two checkpoints are kept, a third is written and the oldest deleted. The process is killed once at each
    operation."""
    start = tmp_path / "start"
    for step in (1, 2):
        save(start, step, limit=2)
    operation, status, newest = 0, None, set()
    while status != 0:
        operation += 1
        output_dir = tmp_path / "run"
        shutil.copytree(start, output_dir)

        def save_until_killed(output_dir=output_dir, operation=operation):
            kill_at(operation)
            save(output_dir, 3, limit=2)

        status = run_in_fork(save_until_killed, (0, -signal.SIGKILL))
        steps = steps_in(output_dir)
        assert steps in ([1, 2], [1, 2, 3], [2, 3]), f"killed at operation {operation}: {steps}"
        newest.add(steps[-1])
        assert save(output_dir, 4, limit=2)  # as the resumed run does
        assert steps_in(output_dir) == [steps[-1], 4]
        assert not [path for path in output_dir.iterdir() if path.name.startswith(".")]
        shutil.rmtree(output_dir)
    assert operation > 15 and newest == {2, 3}


def test_every_file_is_flushed_before_the_checkpoint_has_its_name(save, tmp_path, monkeypatch):
    rename, flushed, renamed = Path.rename, set(), []

    def note_fsync(descriptor):
        flushed.add(os.readlink(f"/proc/self/fd/{descriptor}"))

    def note_rename(path, target):
        if path.exists():
            written = {str(file) for file in path.rglob("*") if file.is_file()}
            renamed.append(len(written))
            assert written <= flushed
        return rename(path, target)

    monkeypatch.setattr(os, "fsync", note_fsync)
    monkeypatch.setattr(Path, "rename", note_rename)
    assert save(tmp_path, 1)
    assert renamed == [6], "two models of two files, the optimizer and the state"


@pytest.mark.parametrize("name", ["optimizer.bin", "prior/diffusion_pytorch_model.safetensors", "state"])
@pytest.mark.parametrize("damage", ["missing", "truncated", "empty"])
def test_a_damaged_checkpoint_is_passed_over(save, tmp_path, name, damage):
    for step in (1, 2):
        save(tmp_path, step)
    file = tmp_path / "checkpoint-2" / name.replace("state", script.STATE_FILE)
    if damage == "missing":
        file.unlink()
    else:
        os.truncate(file, file.stat().st_size // 2 if damage == "truncated" else 0)
    args = SimpleNamespace(resume_from_checkpoint="latest", output_dir=tmp_path)
    assert script.find_checkpoint(args).name == "checkpoint-1"
    args.resume_from_checkpoint = str(tmp_path / "checkpoint-2")
    with pytest.raises(SystemExit, match="--resume_from_checkpoint"):
        script.find_checkpoint(args)


def test_other_folders_are_not_taken_for_checkpoints(save, tmp_path):
    for step in (9, 10):
        save(tmp_path, step)
    others = ["checkpoint", "checkpoint-", "checkpoint-best", "checkpoint-12.tmp", ".checkpoint-13"]
    for name in (*others, "checkpoint-15", "checkpoint-16"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "mine.txt").write_text("mine")
    (tmp_path / "checkpoint-14").write_text("a file")
    (tmp_path / "checkpoint-9").rename(tmp_path / "elsewhere")
    (tmp_path / "checkpoint-9").symlink_to(tmp_path / "elsewhere")
    for content in ("[]", "1", "null", "{", '{"files": []}', '{"files": null}', '{"files": {"gone": 1}}'):
        (tmp_path / "checkpoint-15" / script.STATE_FILE).write_text(content)
        assert steps_in(tmp_path) == [9, 10], content
    save(tmp_path, 11, limit=1)
    assert steps_in(tmp_path) == [11]
    assert sum(path.name == "mine.txt" for path in tmp_path.rglob("*")) == 7, "only checkpoints are deleted"
    assert script.read_state(tmp_path / "elsewhere"), "of a link only the link"


@pytest.mark.parametrize("call", ["write", "fsync", "rename"])
def test_a_full_disk_costs_only_the_checkpoint(save, tmp_path, call):
    save(tmp_path, 1, limit=1)
    largest = max(path.stat().st_size for path in (tmp_path / "checkpoint-1").rglob("*"))

    def fail_to_save():
        if call == "write":
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            hard_limit = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
            resource.setrlimit(resource.RLIMIT_FSIZE, (largest // 2, hard_limit))
        else:
            setattr(os if call == "fsync" else Path, call, no_space)
        assert not save(tmp_path, 2, limit=1)

    run_in_fork(fail_to_save)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]
    assert steps_in(tmp_path) == [1]
    assert save(tmp_path, 3, limit=1), "there is space again"
    assert steps_in(tmp_path) == [3]


def test_weights_that_overflow_are_not_saved(train):
    """In step 3, whose learning rate is larger than the largest float32."""
    flags = SHORT | {"max_train_steps": 3, "checkpointing_steps": 1}
    run = train(**flags, lr_scheduler="piecewise_constant", lr_step_rules="1:2,1e43")
    assert "stopped after step 3: weights that are not finite" in run.error()
    assert run.checkpoints() == [1, 2] and not (run.folder / "prior_pipeline").exists()


LOST = {"loss.png": (Figure, "savefig"), "samples/": (Image.Image, "save"), "loss.jsonl": (script, "open")}


@pytest.mark.slow
@pytest.mark.parametrize("lost", LOST)
def test_a_full_disk_for_what_is_not_essential_does_not_end_the_run(train, lost):
    def no_space_to_write(file, mode="r", **kwargs):
        return open(file, mode, **kwargs) if mode.startswith("r") else no_space()

    def patch():
        owner, name = LOST[lost]  # `open` becomes a global of the script
        setattr(owner, name, no_space_to_write if name == "open" else no_space)

    run = train(patch, **UNEVEN).ok()
    message = f"Writing {lost} failed, the run continues: OSError: [Errno {errno.ENOSPC}]"
    assert run.output.count(message) == 1, run
    assert same_weights(run.prior(), train(**UNEVEN).prior())


# ----------------------------------------------------------- stopped at any other moment, and resumed exactly

LIMITED = UNEVEN | {"checkpointing_steps": 2, "checkpoints_total_limit": 2}
# A function of the script, its call, what happens there (a signal, or a kill at a file operation from there
# on), and after a signal the checkpoints. After the last step, Python's own handlers are back.
STOPPED = [
    ("encode_batch", 8, signal.SIGTERM, [2, 3]),
    ("save_pipeline", 1, 25, None),
    ("encode_batch", 10, signal.SIGHUP, [2, 4]),  # a validation is due
    ("save_pipeline", 1, signal.SIGTERM, [6, 7]),
    ("generate_images", 2, 0, None),
    ("check_finite", 3, signal.SIGINT, [2, 4]),  # too late for its step
    ("save_checkpoint", 1, signal.SIGTERM, [2, 3]),
    ("generate_images", 2, signal.SIGINT, [2, 3]),
    ("save_checkpoint", 4, signal.SIGTERM, [6, 7]),
    ("save_model_card", 1, signal.SIGTERM, [6, 7]),
    ("encode_batch", 8, 0, None),
    ("log_validation", 1, 0, None),
    ("save_pipeline", 1, 3, None),
    ("log_images", 2, 2, None),
    ("save_components", 2, 5, None),
    ("move_into_place", 2, 14, None),
    ("save_model_card", 1, 0, None),
]


@pytest.mark.parametrize(("name", "call", "event", "checkpoints"), cases(STOPPED, *STOPPED[:2]))
def test_a_run_stopped_at_any_moment_resumes_exactly(train, tmp_path, name, call, event, checkpoints):
    is_signal = isinstance(event, signal.Signals)

    def patch():
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # under nohup, it would be ignored
        at_call(script, name, call, functools.partial(signal.raise_signal if is_signal else kill_at, event))

    flags = LIMITED | {"output_dir": tmp_path / "run", "resume_from_checkpoint": "latest"}
    stopped = train(patch, **flags, dataloader_num_workers=2 * is_signal)  # a new run
    if is_signal:
        is_handled = name not in ("save_pipeline", "save_model_card")
        assert stopped.returncode == (128 + event if is_handled else -event), stopped
        assert stopped.checkpoints() == checkpoints and "Traceback" not in stopped.output
        assert ("latest continues" in stopped.output) == is_handled
        assert (stopped.folder / "prior_pipeline").exists() == (name == "save_model_card")
        assert not (stopped.folder / "README.md").exists()
    else:
        assert stopped.returncode == -signal.SIGKILL, stopped
    (stopped.folder / ".DS_Store").touch()  # without a checkpoint, hidden files and logs do not count
    run, unbroken = train(**flags).ok(), train(**UNEVEN).ok()
    assert same_weights(run.prior(), unbroken.prior()) and run.losses() == unbroken.losses()
    assert equal_images(run.samples(), unbroken.samples()), "what had been validated, and what had not"
    assert (run.folder / "README.md").exists()
    assert not list(run.folder.glob(".result*")) + list(run.folder.glob(".checkpoint*"))


# ------------------------------------------------------------------------------ what may change on resuming


def test_other_settings_apply_on_resuming(train, run_copy):
    schedule = {"learning_rate": 5e-4, "lr_scheduler": "linear", "lr_warmup_steps": 0, "max_train_steps": 5}
    others = {"caption_dropout": 0.5, "resolution": 96, "use_ema": True, "checkpointing_steps": 1}
    run = train(**SHORT | schedule | others, output_dir=run_copy, resume_from_checkpoint="latest").ok()
    rates = [run.losses("lr")[step] for step in (3, 4, 5)]
    assert rates == pytest.approx([5e-4 * 2 / 5, 5e-4 / 5, 0])
    assert same_weights(run.prior(3), run.prior(3, "prior_ema")), "a new average, as after the first step"
    assert not same_weights(run.prior(5), run.prior(5, "prior_ema"))


CHANGED = {  # flags that change, and the reason
    "an image": ({}, "rows_hash="),
    "the order": ({}, "rows_hash="),
    "one caption": ({}, "rows_hash="),
    "the optimizer": ({"optimizer": "adamw8bit"}, "optimizer=adamw, not adamw8bit"),
}


@pytest.mark.parametrize("change", CHANGED)
def test_other_data_or_optimizers_are_refused_in_one_line(train, run_copy, tmp_path, change):
    folder = Path(shutil.copytree(IMAGES, tmp_path / "data"))
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    if change == "an image":
        Image.new("RGB", (64, 64)).save(folder / rows[40]["file_name"], format="PNG")
    elif change == "the order":
        rows.reverse()
    elif change == "one caption":
        rows[33]["text"] = "something else"
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    before, (flags, reason) = snapshot(run_copy), CHANGED[change]
    error = train(**LONGER, **flags, train_data_dir=folder, output_dir=run_copy).error()
    assert reason in error and "checkpoint-2" in error
    assert snapshot(run_copy) == before


def test_a_moved_data_set_foreign_lines_and_a_foreign_folder_do_not_matter(train, run_copy, tmp_path):
    """The folder, with the name of a checkpoint that the resumed run writes, is not lost."""
    lines = ["foreign", "[1]", "17", '{"train_loss": 1.0}', '"{}"', "null", '{"step": 1, "train']
    with open(run_copy / "loss.jsonl", "a") as file:
        file.write("\n".join(lines))
    (run_copy / "checkpoint-3").mkdir()
    (run_copy / "checkpoint-3" / "mine.txt").write_text("mine")
    folder = shutil.copytree(IMAGES, tmp_path / "data")
    run = train(**LONGER, train_data_dir=folder, output_dir=run_copy).ok()
    assert list(run.losses()) == [1, 2, 3] and run.checkpoints() == [2, 3]
    assert [path.read_text() for path in run_copy.rglob("mine.txt")] == ["mine"]


@pytest.mark.parametrize("content", ["code", "zeros", "a prior of zeros", "another version"])
def test_a_checkpoint_of_other_content_is_one_line_and_runs_no_code(train, run_copy, tmp_path, content):
    checkpoint, state = run_copy / "checkpoint-2", script.read_state(run_copy / "checkpoint-2")
    name = "prior/diffusion_pytorch_model.safetensors" if content == "a prior of zeros" else "optimizer.bin"
    file = checkpoint / name
    if content == "code":  # it makes a folder when it is unpickled
        code = type("Code", (), {"__reduce__": lambda self: (os.mkdir, (str(tmp_path / "ran"),))})
        torch.save({"optimizer": code(), "scaler": None}, file)
    elif content.endswith("zeros"):
        file.write_bytes(bytes(file.stat().st_size))
    else:  # 892205b
        sizes = {"num_processes": 1, "train_batch_size": 2, "gradient_accumulation_steps": 1}
        rows = {name: state["plan"][name] for name in ("seed", "num_rows", "rows_hash")}
        state |= {"plan": rows | {"bucket_rows": {}} | sizes, "digests": {}}
        del state["validated_step"]
    state["files"][name] = file.stat().st_size
    (checkpoint / script.STATE_FILE).write_text(json.dumps(state))
    run = train(**LONGER | {"resume_from_checkpoint": checkpoint}, output_dir=run_copy)
    flag = "" if content == "another version" else "--resume_from_checkpoint="
    assert run.error().startswith(f"{flag}{checkpoint}")
    assert not (tmp_path / "ran").exists()
    if content == "code":
        torch.load(file, weights_only=False)
        assert (tmp_path / "ran").exists(), "otherwise the test proves nothing"


# --------------------------------------------------------------------------- the output folder: what is there

FOREIGN = ["prior_pipeline", "tokenizer/mine", "README.md", "samples/mine", "logs/mine", "checkpoint-2/mine"]
LATEST = [("latest", "prior_pipeline"), ("latest", "checkpoint-2/mine")]


@pytest.mark.parametrize(("resume", "name"), [*((None, name) for name in FOREIGN), *LATEST])
def test_what_is_in_the_folder_is_not_replaced_unasked(train, run_copy, tmp_path, resume, name):
    shutil.rmtree(run_copy / "checkpoint-2")
    folder = run_copy
    if name != "prior_pipeline":  # a file of somebody else's alone
        folder = tmp_path / "folder"
        (folder / name).parent.mkdir(parents=True)
        (folder / name).write_text("mine")
    before = snapshot(folder)
    error = train(**SHORT, checkpointing_steps=1, output_dir=folder, resume_from_checkpoint=resume).error()
    ways = ("--output_dir", "--resume_from_checkpoint=latest", "--overwrite_output_dir")
    assert all(text in error for text in (*ways, name.partition("/")[0])), error
    assert snapshot(folder) == before


def test_resuming_an_older_checkpoint_deletes_the_newer_only_if_asked(train, tmp_path):
    unbroken = train(**UNEVEN).ok()
    folder = shutil.copytree(unbroken.folder, tmp_path / "run")
    flags = UNEVEN | {"output_dir": folder, "resume_from_checkpoint": folder / "checkpoint-5"}
    before, error = snapshot(folder), train(**flags).error()
    assert "--overwrite_output_dir" in error and "checkpoint-6" in error
    assert snapshot(folder) == before
    run = train(**flags, overwrite_output_dir=True).ok()
    assert same_weights(run.prior(), unbroken.prior()) and run.losses() == unbroken.losses()


def fail():
    raise RuntimeError("it is broken")


@pytest.mark.parametrize(
    ("flags", "owner", "name", "named"),
    [
        ({"lr_scheduler": "piecewise_constant", "lr_step_rules": "1:x"}, None, None, "--lr_scheduler"),
        ({"lr_scheduler": "polynomial", "learning_rate": 1e-9}, None, None, "--lr_scheduler"),
        ({"report_to": "wandb"}, Accelerator, "init_trackers", "--report_to"),
        ({"use_8bit_adam": True}, script, "make_optimizer", "--optimizer=adamw8bit"),
        ({}, script, "check_finite", "RuntimeError: it is broken"),  # in the first step
    ],
    ids=["rules", "polynomial", "tracker", "optimizer", "first step"],
)
def test_a_start_that_fails_deletes_no_checkpoint(train, run_copy, flags, owner, name, named):
    before, patch = snapshot(run_copy), functools.partial(at_call, owner, name, 1, fail) if owner else None
    flags = SHORT | {"report_to": "none", "overwrite_output_dir": True} | flags
    run = train(patch, **flags, output_dir=run_copy)
    assert run.returncode == 1 and named in run.output.strip().splitlines()[-1], run
    if name == "check_finite":  # a new log has begun
        logs = ("loss.jsonl", "loss.png", "samples/")
        before = {file: value for file, value in before.items() if not file.startswith(logs)}
    assert before.items() <= snapshot(run_copy).items()


def test_overwriting_replaces_result_logs_and_checkpoints_after_the_first_step(train, run_copy):
    flags, before = SHORT | {"max_train_steps": 1, "seed": 1}, Output(run_copy).prior()
    run = train(**flags, output_dir=run_copy, overwrite_output_dir=True).ok()
    assert not same_weights(run.prior(), before)
    assert list(run.losses()) == run.checkpoints() == [1]


# ------------------------------------------------------------------------------------- the result at the end


def assert_complete(run, expected):
    """The result is that run's, in both places, and nothing temporary is left."""
    for root in (run.folder / "prior_pipeline" / "prior", run.folder / "prior_prior"):
        assert same_weights(load_weights(root), expected.prior()), root
    wanted = {name for name in snapshot(expected.folder) if not name.startswith(("checkpoint", "logs"))}
    assert wanted <= snapshot(run.folder).keys() and not list(run.folder.glob(".result*"))


def refuse(names, error, is_refused):
    """Makes functions of `os` fail for some paths."""

    def replace(function):
        def call(path, *args, **kwargs):
            if is_refused(path, **kwargs):
                raise OSError(error, os.strerror(error), path)
            return function(path, *args, **kwargs)

        return call

    for name in names:
        setattr(os, name, replace(getattr(os, name)))


def test_modes_times_links_and_flushes_of_folders_are_not_needed(train, run_copy):
    """As on CIFS, gcsfuse, or a Windows drive in WSL."""

    def is_there(path, **kwargs):
        return os.path.abspath(path).startswith(str(run_copy))

    def patch():
        refuse(["chmod", "utime", "link", "symlink"], errno.EPERM, is_there)
        refuse(["fsync"], errno.EPERM, lambda descriptor: os.path.isdir(f"/proc/self/fd/{descriptor}"))

    run = train(patch, **LONGER, output_dir=run_copy).ok()
    assert_complete(run, train(**SHORT | {"max_train_steps": 3}))
    assert run.checkpoints() == [2, 3]


def test_a_busy_old_result_is_replaced_and_what_stays_is_a_warning(train, run_copy):
    """Its files are open on another NFS client: they can be moved, and not be deleted."""
    busy = {path.stat().st_ino for path in (run_copy / "prior_pipeline").rglob("*") if path.is_file()}

    def is_busy(path, **kwargs):
        return os.stat(path, follow_symlinks=False, **kwargs).st_ino in busy

    patch = functools.partial(refuse, ["unlink", "remove"], errno.EBUSY, is_busy)
    run, expected = train(patch, **LONGER, output_dir=run_copy).ok(), train(**SHORT | {"max_train_steps": 3})
    assert any(path.stat().st_ino in busy for path in run_copy.rglob("*"))
    warnings = [line for line in run.output.splitlines() if "WARNING" in line and "Delet" in line]
    assert warnings and all(os.strerror(errno.EBUSY) in line for line in warnings)
    assert same_weights(run.prior(), expected.prior())
    train(patch, **LONGER, output_dir=run_copy).ok()  # they are still busy
    assert_complete(train(**LONGER, output_dir=run_copy).ok(), expected)


def test_a_busy_file_in_an_old_checkpoint_costs_no_newer_one(train):
    busy = set()

    def is_busy(path, **kwargs):
        inode = os.stat(path, follow_symlinks=False, **kwargs).st_ino
        if not busy and str(path).endswith("optimizer.bin"):
            busy.add(inode)
        return inode in busy

    flags = SHORT | {"max_train_steps": 4, "checkpointing_steps": 1, "checkpoints_total_limit": 1}
    run = train(functools.partial(refuse, ["unlink"], errno.EBUSY, is_busy), **flags).ok()
    assert run.output.count("Saved ") == 4 and "not saved" not in run.output
    assert run.output.count("Deleting ") == 1
    assert script.list_checkpoints(run.folder) == [run.folder.resolve() / "checkpoint-4"]


FULL = {  # what is being written when there is no space left
    "the prior": (script.CLIPTextModel, "save_pretrained"),
    "the decoder": (script.wuerstchen.PaellaVQModel, "save_pretrained"),
    "the configuration": (script.wuerstchen.WuerstchenCombinedPipeline, "save_config"),
}


@pytest.mark.parametrize("part", FULL)
@pytest.mark.parametrize("is_new", [True, False])
def test_a_full_disk_at_the_end_is_an_error_without_a_card_and_keeps_the_old_result(
    train, run_copy, tmp_path, part, is_new
):
    folder = tmp_path / "new" if is_new else run_copy
    before = {} if is_new else snapshot(folder)
    run = train(functools.partial(at_call, *FULL[part], 1, no_space), **LONGER, output_dir=folder)
    assert "--output_dir" in run.error() and "No space left" in run.error(), run
    assert script.read_state(folder / "checkpoint-3")
    assert not list(folder.glob(".result*")), "it would fill the disk"
    assert (folder / "prior_pipeline").exists() == (part != "the prior" or not is_new)
    after = snapshot(folder)
    assert not is_new or "README.md" not in after
    replaced = ("checkpoint", "loss", "samples") + ("prior_pipeline",) * (part != "the prior")
    kept = {name: content for name, content in before.items() if not name.startswith(replaced)}
    assert kept.items() <= after.items()


def test_modes_of_all_files_are_those_of_the_umask(train, tmp_path):
    """safetensors 0.8 lets only their owner read them."""
    flags = SMALL | {"use_ema": True, "output_dir": tmp_path / "run"}
    run = train(functools.partial(os.umask, 0o027), **flags).ok()
    files = [path for path in run.folder.rglob("*") if path.is_file() and path.name != ".lock"]
    assert {stat.S_IMODE(path.stat().st_mode) for path in files} == {0o640}
    assert len([path for path in files if path.suffix == ".safetensors"]) == 15
