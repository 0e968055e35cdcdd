# SPDX-License-Identifier: Apache-2.0
"""Checkpoints, signals and resuming: what remains when a run is killed, stopped or finds its disk full, and
that the resumed run ends with the same bits as one that was not interrupted."""

import errno
import hashlib
import inspect
import itertools
import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from contextlib import nullcontext, suppress
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from conftest import SCRIPT, Samples, assert_continues_as, distance, resumed, same_weights, tiny_args
from diffusers.training_utils import EMAModel
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_models import make_prior

import train_text_to_image_prior as script

# Six samples a step, ten rows: epochs end inside steps 2, 4 and 7, and with step 5.
RUN = {
    "train_batch_size": 2,
    "gradient_accumulation_steps": 3,
    "max_train_samples": 10,
    "max_train_steps": 7,
    "checkpointing_steps": 2,
    "checkpoints_total_limit": 2,
    "use_ema": True,
    "caption_column": "captions",
    "lr_scheduler": "cosine",
    "learning_rate": 1e-3,
}
VALIDATION = {"validation_prompts": "a red apple", "validation_epochs": 1}  # changes no weights

# The same samples, with all checkpoints and with validation at the end of each epoch.
UNEVEN = {
    "train_batch_size": 2,
    "gradient_accumulation_steps": 3,
    "max_train_samples": 10,
    "max_train_steps": 7,
    "checkpointing_steps": 1,
    "use_ema": True,
    "caption_column": "captions",
    "validation_prompts": ["a red apple", "an owl at night"],
    "validation_epochs": 1,
    "lr_scheduler": "cosine",
    "lr_warmup_steps": 2,
    "learning_rate": 1e-3,
}

RANKS = {  # for two ranks
    "train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "max_train_samples": 10,
    "max_train_steps": 4,
    "checkpointing_steps": 1,
    "use_ema": True,
    "learning_rate": 1e-3,
}


def load_weights(output_dir):
    return load_file(Path(output_dir) / "prior_pipeline" / "prior" / "diffusion_pytorch_model.safetensors")


def assert_same_bits(one, other):
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name], other[name]), name


def no_space(*args, **kwargs):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def call_at(function, call, action):
    """`function`, but at its `call`-th call `action` is called first."""
    calls = []

    def counted(*args, **kwargs):
        calls.append(None)
        if len(calls) == call:
            action()
        return function(*args, **kwargs)

    return counted


@pytest.fixture(scope="module")
def unbroken(models, pictures, tmp_path_factory, run_main):
    """The weights at the end of a run with RUN that nothing interrupts."""
    output_dir = tmp_path_factory.mktemp("unbroken") / "run"
    result = run_main(tiny_args(models, pictures, output_dir, **RUN))
    assert result.returncode == 0, result
    return load_weights(output_dir)


# ------------------------------------------------------------------------------- killed at any file operation


WRITES = {"os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "shutil.rmtree"}


def kill_at(operation: int):
    """Kills this process when it is about to change the file system for the `operation`-th time from now
    on."""
    seen = 0

    def count(event, args):
        nonlocal seen
        writes = event == "open" and isinstance(args[1], str) and set(args[1]) & set("wax+")
        flushes = event == "open" and args[1] is None and str(args[0]).find("checkpoint-") >= 0
        if writes or flushes or event in WRITES:
            seen += 1
            if seen == operation:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count)


class Saver:
    """All that `save_checkpoint` needs, without the rest of a run."""

    def __init__(self):
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        self.accelerator = Accelerator(cpu=True)
        prior = make_prior(depth=1)
        self.ema = EMAModel(prior.parameters(), model_cls=type(prior), model_config=prior.config)
        optimizer = torch.optim.AdamW(prior.parameters(), lr=1e-3)
        self.prior, self.optimizer = self.accelerator.prepare(prior, optimizer)
        script.register_checkpoint_hooks(self.accelerator, self.ema)

    def save(self, output_dir, step, limit, plan=None):
        """Saves a checkpoint in which every weight is the step's number."""
        with torch.no_grad():
            for parameter in self.prior.parameters():
                parameter.fill_(step)
        state = script.TrainState(global_step=step, plan=plan or {})
        script.save_checkpoint(self.accelerator, output_dir, state, limit)


@pytest.fixture
def saver():
    yield Saver()
    AcceleratorState._reset_state()
    GradientState._reset_state()


def step_in(checkpoint):
    """The step that a checkpoint's tensors are of; all of them are read."""
    tensors = load_file(checkpoint / "prior" / "diffusion_pytorch_model.safetensors")
    steps = {value for tensor in tensors.values() for value in tensor.unique().tolist()}
    assert len(steps) == 1, f"{checkpoint} mixes steps {steps}"
    torch.load(checkpoint / "optimizer.bin", weights_only=True)
    ema = load_file(checkpoint / "prior_ema" / "diffusion_pytorch_model.safetensors")
    assert ema.keys() == tensors.keys()
    return int(steps.pop())


def run_in_child(function):
    """The exit status of a forked process that calls `function` (-9: killed)."""
    child = multiprocessing.get_context("fork").Process(target=function)
    child.start()
    child.join(120)
    assert child.exitcode is not None
    return child.exitcode


def test_kill_at_any_file_operation_of_saving_leaves_complete_checkpoints(saver, tmp_path):
    """Two checkpoints are kept, a third is written and the oldest deleted. The process is killed once at each
    operation."""
    start = tmp_path / "start"
    start.mkdir()
    for step in (1, 2):
        saver.save(start, step, limit=2)
    operation, status, newest = 0, -9, set()
    while status == -9:
        operation += 1
        output_dir = tmp_path / "run"
        shutil.copytree(start, output_dir)

        def save(output_dir=output_dir, operation=operation):
            kill_at(operation)
            saver.save(output_dir, 3, limit=2)

        status = run_in_child(save)
        found = script.list_checkpoints(output_dir)
        steps = [step_in(path) for path in found]
        assert steps == [int(path.name.split("-")[1]) for path in found]
        assert steps in ([1, 2], [1, 2, 3], [2, 3]), f"killed at operation {operation}: {steps}"
        newest.add(steps[-1])
        stale = script.find_stale_checkpoints(output_dir, found[-1], overwrite=False)
        script.delete_checkpoints(stale, output_dir)
        assert sorted(path.name for path in output_dir.iterdir()) == [path.name for path in found]
        saver.save(output_dir, 4, limit=2)  # as the resumed run does
        assert [step_in(path) for path in script.list_checkpoints(output_dir)] == [steps[-1], 4]
        shutil.rmtree(output_dir)
    assert status == 0 and operation > 15 and newest == {2, 3}
    print(f"killed at each of {operation - 1} file operations")


@pytest.mark.parametrize(
    "name", ["optimizer.bin", "prior/diffusion_pytorch_model.safetensors", script.STATE_FILE]
)
@pytest.mark.parametrize("damage", ["missing", "truncated", "empty"])
def test_damaged_checkpoint_is_ignored(saver, tmp_path, name, damage):
    for step in (1, 2):
        saver.save(tmp_path, step, limit=None)
    file = tmp_path / "checkpoint-2" / name
    if damage == "missing":
        file.unlink()
    else:
        os.truncate(file, file.stat().st_size // 2 if damage == "truncated" else 0)
    assert [path.name for path in script.list_checkpoints(tmp_path)] == ["checkpoint-1"]
    assert script.find_checkpoint("latest", tmp_path).name == "checkpoint-1"
    with pytest.raises(SystemExit, match="--resume_from_checkpoint"):
        script.find_checkpoint(str(tmp_path / "checkpoint-2"), tmp_path)


def test_other_folders_are_not_taken_for_checkpoints(saver, tmp_path):
    saver.save(tmp_path, 9, limit=None)
    saver.save(tmp_path, 10, limit=None)
    for name in (
        "checkpoint",
        "checkpoint-",
        "checkpoint-best",
        "checkpoint-11",
        "checkpoint-12.tmp",
        ".checkpoint-13",
    ):
        (tmp_path / name).mkdir()
    (tmp_path / "checkpoint-11" / "optimizer.bin").write_bytes(b"a copy that was interrupted")
    (tmp_path / "checkpoint-14").write_text("a file")
    assert [path.name for path in script.list_checkpoints(tmp_path)] == ["checkpoint-9", "checkpoint-10"]
    assert script.find_checkpoint("latest", tmp_path).name == "checkpoint-10"
    saver.save(tmp_path, 11, limit=2)  # replaces the incomplete one
    assert [step_in(path) for path in script.list_checkpoints(tmp_path)] == [10, 11]
    assert (tmp_path / "checkpoint-best").is_dir(), "only checkpoints are deleted over the limit"


# ------------------------------------------------------------------------------------------------- full disks


def test_full_disk_costs_only_the_checkpoint(saver, tmp_path):
    saver.save(tmp_path, 1, limit=1)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    largest = max(path.stat().st_size for path in (tmp_path / "checkpoint-1").rglob("*"))

    def save():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest // 2, before[1]))
        saver.save(tmp_path, 2, limit=1)

    assert run_in_child(save) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]
    assert step_in(tmp_path / "checkpoint-1") == 1
    saver.save(tmp_path, 3, limit=1)  # there is space again
    assert [step_in(path) for path in script.list_checkpoints(tmp_path)] == [3]


@pytest.mark.parametrize("call", ["fsync", "rename"])
def test_failed_flush_or_rename_costs_only_the_checkpoint(saver, tmp_path, monkeypatch, call):
    saver.save(tmp_path, 1, limit=1)
    with monkeypatch.context() as patch:
        patch.setattr(*((script.os, "fsync") if call == "fsync" else (Path, "rename")), no_space)
        saver.save(tmp_path, 2, limit=1)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]


def test_run_on_a_full_disk_ends_with_an_error(models, pictures, tmp_path, run_main, monkeypatch):
    monkeypatch.setattr(script, "flush_to_disk", no_space)
    monkeypatch.setattr(script, "save_components", no_space)
    result = run_main(tiny_args(models, pictures, tmp_path / "run", checkpointing_steps=1))
    assert result.returncode == 1 and "Traceback" not in result.output
    assert result.output.count("the run continues without it") == 3
    last_line = result.output.splitlines()[-1]
    assert "--output_dir" in last_line and "No space left" in last_line


@pytest.mark.slow
@pytest.mark.parametrize(
    ("owner", "name", "lost"),
    [
        (script, "save_figure", ["samples/", "loss.png"]),
        (Image.Image, "save", ["samples/", "loss.png"]),
        (script, "open", ["loss.jsonl"]),
    ],
    ids=["figures", "images", "loss.jsonl"],
)
def test_full_disk_for_what_is_only_shown_does_not_end_the_run(
    models, pictures, tmp_path, run_main, monkeypatch, unbroken, owner, name, lost
):
    def no_space_to_write(file, mode="r", **kwargs):
        return open(file, mode, **kwargs) if mode.startswith("r") else no_space()

    failing = no_space_to_write if name == "open" else no_space
    monkeypatch.setattr(owner, name, failing, raising=False)  # `open` becomes a global of the script
    result = run_main(tiny_args(models, pictures, tmp_path / "run", **RUN, **VALIDATION))
    assert result.returncode == 0, result
    for what in lost:
        assert f"Writing {what} failed, the run continues: OSError: [Errno {errno.ENOSPC}]" in result.output
    assert_same_bits(load_weights(tmp_path / "run"), unbroken)


# ----------------------------------------------------------------------------------------------------- killed


@pytest.mark.parametrize(
    "operation", [pytest.param(1, marks=pytest.mark.slow), 9, pytest.param(17, marks=pytest.mark.slow)]
)
def test_run_killed_while_saving_resumes_exactly(
    models, pictures, tmp_path, run_main, monkeypatch, unbroken, operation
):
    """The process is killed in its second save. When it is resumed, there are other folders and an incomplete
    checkpoint, too."""
    output_dir = tmp_path / "run"
    with monkeypatch.context() as patch:
        save = call_at(script.save_checkpoint, 2, lambda: kill_at(operation))
        patch.setattr(script, "save_checkpoint", save)
        assert run_main(tiny_args(models, pictures, output_dir, **RUN)).returncode == -9
    shutil.copytree(output_dir / "checkpoint-2", output_dir / "checkpoint-9")
    (output_dir / "checkpoint-9" / "optimizer.bin").unlink()
    (output_dir / "checkpoint-mine").mkdir()
    result = run_main(tiny_args(models, pictures, output_dir, **RUN, resume_from_checkpoint="latest"))
    assert result.returncode == 0, result
    assert_same_bits(load_weights(output_dir), unbroken)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("owner", "name", "call", "operation"),
    [
        (script, "encode_batch", 8, 0),  # within an accumulation
        (script, "reduce_metrics", 5, 0),  # before the optimizer's step
        (script.Validator, "log_validation", 1, 0),  # before the first step
        (script.Validator, "generate_images", 2, 0),  # with the average in the prior's place
        (script, "log_images", 2, 2),  # while the images are written
        (script, "save_pipeline", 1, 3),  # with half of the result written
        (script, "save_components", 2, 5),  # the decoder, after prior_pipeline/
        (script, "save_model_card", 1, 0),
    ],
)
def test_run_killed_at_another_moment_resumes_exactly(
    models, pictures, tmp_path, run_main, monkeypatch, unbroken, owner, name, call, operation
):
    def kill():
        if operation:
            kill_at(operation)
        else:
            os.kill(os.getpid(), signal.SIGKILL)

    output_dir = tmp_path / "run"
    args = tiny_args(models, pictures, output_dir, **RUN, **VALIDATION, resume_from_checkpoint="latest")
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, call_at(getattr(owner, name), call, kill))
        killed = run_main(args)  # there is no checkpoint: a new run
    assert killed.returncode == -9, killed
    result = run_main(args)
    assert result.returncode == 0, result
    assert_same_bits(load_weights(output_dir), unbroken)
    steps = [0, 2, 4, 5, 7]
    assert script.list_sample_steps(output_dir) == steps, "what had been validated, and what had not"


# ---------------------------------------------------------------------------------------------------- signals


def send(name):
    os.kill(os.getpid(), getattr(signal, name))


@pytest.mark.parametrize(
    ("signal_name", "owner", "name", "call", "last_step"),
    [
        ("SIGTERM", script, "encode_batch", 8, 3),  # within step 3
        ("SIGINT", script, "reduce_metrics", 3, 4),  # as step 3 ends, when it is too late for that one
        pytest.param("SIGTERM", script, "save_checkpoint", 1, 3, marks=pytest.mark.slow),  # after step 2
        pytest.param("SIGINT", script.Validator, "generate_images", 2, 3, marks=pytest.mark.slow),  # after it
    ],
)
def test_signal_ends_the_run_after_the_step_with_a_checkpoint(
    models, pictures, tmp_path, run_main, monkeypatch, unbroken, signal_name, owner, name, call, last_step
):
    output_dir = tmp_path / "run"
    with monkeypatch.context() as patch:
        function = call_at(getattr(owner, name), call, lambda: send(signal_name))
        patch.setattr(owner, name, function)
        args = tiny_args(models, pictures, output_dir, **RUN, **VALIDATION, dataloader_num_workers=2)
        result = run_main(args)
    assert result.returncode == 128 + getattr(signal, signal_name), result
    assert "--resume_from_checkpoint=latest" in result.output and "Traceback" not in result.output
    steps = [
        json.loads((path / script.STATE_FILE).read_text())["global_step"]
        for path in script.list_checkpoints(output_dir)
    ]
    assert steps == [2, last_step]
    assert not (output_dir / "prior_pipeline").exists()
    args = tiny_args(models, pictures, output_dir, **RUN, **VALIDATION, resume_from_checkpoint="latest")
    result = run_main(args)
    assert result.returncode == 0, result
    assert_same_bits(load_weights(output_dir), unbroken)


@pytest.mark.parametrize("name", ["save_checkpoint", "save_pipeline", "save_model_card"])
def test_signal_after_the_last_step_ends_the_run(
    models, pictures, tmp_path, run_main, monkeypatch, unbroken, name
):
    """While the last checkpoint is written, it is completed. Later there is nothing to complete."""
    output_dir = tmp_path / "run"
    flags = RUN | {"checkpointing_steps": 7}
    with monkeypatch.context() as patch:
        patch.setattr(script, name, call_at(getattr(script, name), 1, lambda: send("SIGTERM")))
        result = run_main(tiny_args(models, pictures, output_dir, **flags))
    assert result.returncode == 128 + signal.SIGTERM, result
    assert "Traceback" not in result.output
    assert (output_dir / "prior_pipeline").exists() == (name == "save_model_card")
    assert not (output_dir / "README.md").exists()
    result = run_main(tiny_args(models, pictures, output_dir, **flags, resume_from_checkpoint="latest"))
    assert result.returncode == 0 and "nothing is left to train" in result.output, result
    assert (output_dir / "README.md").exists()
    assert_same_bits(load_weights(output_dir), unbroken)


def test_signal_handlers_are_restored_after_training():
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with script.deferred_signals([]):
        assert signal.getsignal(signal.SIGTERM) not in before
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


def test_second_signal_ends_the_process_at_once():
    def work():
        received = []
        with script.deferred_signals(received):
            send("SIGTERM")
            assert received == [signal.SIGTERM]
            send("SIGINT")
            time.sleep(60)

    assert run_in_child(work) == 128 + signal.SIGINT


def test_two_sigterms_in_quick_succession_are_one(tmp_path, monkeypatch):
    """A scheduler may send SIGTERM to every process, and torchrun passes its own on."""
    monkeypatch.setattr(script, "DUPLICATE_SIGTERM", 0.5)

    def work():
        received = []
        with script.deferred_signals(received):
            send("SIGTERM")
            send("SIGTERM")
            (tmp_path / "received").write_text(repr(list(map(int, received))))
            time.sleep(0.6)
            send("SIGTERM")
            time.sleep(60)

    assert run_in_child(work) == 128 + signal.SIGTERM
    assert (tmp_path / "received").read_text() == repr([int(signal.SIGTERM)])


def block_samples(script, positions, seconds, folder):
    """Makes reading each of the samples at `positions` take `seconds`, the first time. Meanwhile there is a
    file of that name in `folder`."""
    read_sample = script.SampleDataset.__getitem__

    def read_or_block(self, sample):
        position, _ = sample
        file = folder / f"blocked-{position}"
        if position in positions and not file.exists():
            file.touch()
            time.sleep(seconds)
        return read_sample(self, sample)

    script.SampleDataset.__getitem__ = read_or_block
    script.BATCH_TIMEOUT = 1


@pytest.mark.slow
def test_signal_ends_a_run_whose_storage_hangs(models, pictures, tmp_path, run_main, unbroken):
    """Both workers hang in step 4. A scheduler sends SIGTERM to all processes of the run. They have to end
    within seconds, the workers, too."""
    driver = tmp_path / "driver.py"
    driver.write_text(f"""
import sys, time
from pathlib import Path
sys.path.insert(0, {str(SCRIPT.parent)!r})
import train_text_to_image_prior as script

{inspect.getsource(block_samples)}

block_samples(script, (20, 22), 600, Path({str(tmp_path)!r}))
script.main(sys.argv[1:])
""")
    output_dir, blocked = tmp_path / "run", [tmp_path / f"blocked-{position}" for position in (20, 22)]
    args = tiny_args(models, pictures, output_dir, **RUN, dataloader_num_workers=2)
    run = subprocess.Popen(
        [sys.executable, str(driver), *args],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        deadline = time.monotonic() + 200
        while not all(file.exists() for file in blocked) or len(script.read_metrics(output_dir)) < 3:
            assert run.poll() is None and time.monotonic() < deadline
            time.sleep(0.1)
        time.sleep(2.5)
        assert run.poll() is None, "without a signal it waits"
        os.killpg(run.pid, signal.SIGTERM)
        output, _ = run.communicate(timeout=15)  # waits for all processes that could write more
    finally:
        with suppress(ProcessLookupError):
            os.killpg(run.pid, signal.SIGKILL)
    assert run.returncode == 128 + signal.SIGTERM, output
    assert "no batch arrived within 1 seconds" in output and "Traceback" not in output
    assert [path.name for path in script.list_checkpoints(output_dir)] == ["checkpoint-2"]
    result = run_main(tiny_args(models, pictures, output_dir, **RUN, resume_from_checkpoint="latest"))
    assert result.returncode == 0, result
    assert_same_bits(load_weights(output_dir), unbroken)


@pytest.mark.slow
def test_run_waits_for_slow_storage(models, pictures, tmp_path, run_main, monkeypatch, unbroken):
    monkeypatch.setattr(script, "BATCH_TIMEOUT", script.BATCH_TIMEOUT)
    monkeypatch.setattr(script.SampleDataset, "__getitem__", script.SampleDataset.__getitem__)
    block_samples(script, (20, 22), 3.5, tmp_path)
    result = run_main(tiny_args(models, pictures, tmp_path / "run", **RUN, dataloader_num_workers=2))
    assert result.returncode == 0, result
    assert (tmp_path / "blocked-20").exists() and (tmp_path / "blocked-22").exists()
    assert_same_bits(load_weights(tmp_path / "run"), unbroken)


STOPPER = """
import os, signal, sys
sys.path.insert(0, os.path.dirname(sys.argv[1]))
import train_text_to_image_prior as script
original, calls = script.reduce_metrics, []
def reduce_metrics(*args, **kwargs):
    calls.append(None)
    if len(calls) == 3 and os.environ.get("RANK", "0") == os.environ["STOP_RANK"]:
        os.kill(os.getpid(), getattr(signal, os.environ["STOP_SIGNAL"]))
    return original(*args, **kwargs)
script.reduce_metrics = reduce_metrics
script.main(sys.argv[2:])
"""


@pytest.mark.slow
@pytest.mark.parametrize("rank", ["0", "1"])
def test_two_ranks_stop_after_the_same_step_and_resume_exactly(models, pictures, tmp_path, rank):
    """Only one rank gets the signal; both stop after the same step."""
    driver = tmp_path / "driver.py"
    driver.write_text(STOPPER)
    output_dir = tmp_path / "run"
    args = tiny_args(models, pictures, output_dir, **RUN | {"train_batch_size": 1})
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    env = os.environ | {"ACCELERATE_USE_CPU": "true", "STOP_RANK": rank, "STOP_SIGNAL": "SIGTERM"}

    def run(arguments, **more):
        command = [*launch, str(driver), str(SCRIPT), *map(str, arguments)]
        return subprocess.run(command, env=env | more, capture_output=True, text=True, timeout=500)

    stopped = run(args)
    assert stopped.returncode != 0 and "Stopped;" in stopped.stderr + stopped.stdout, stopped.stderr[-3000:]
    found = [path.name for path in script.list_checkpoints(output_dir)]
    assert found == ["checkpoint-2", "checkpoint-4"], stopped.stderr[-3000:]
    assert run([*args, "--resume_from_checkpoint=latest"], STOP_RANK="none").returncode == 0
    whole = tmp_path / "whole"
    arguments = tiny_args(models, pictures, whole, **RUN | {"train_batch_size": 1})
    assert run(arguments, STOP_RANK="none").returncode == 0
    assert_same_bits(load_weights(output_dir), load_weights(whole))


# --------------------------------------------------------------------------- resuming ends with the same bits


@pytest.mark.parametrize(
    ("step", "by", "workers"),
    [
        pytest.param(1, "latest", 0, id="within an epoch"),
        pytest.param(2, "latest", 2, id="after a validation", marks=pytest.mark.slow),
        pytest.param(5, "path", 0, id="at an epoch's end", marks=pytest.mark.slow),
        pytest.param(6, "path", 2, id="before the last step"),
    ],
)
def test_resumed_run_equals_the_unbroken_one(train, tmp_path, step, by, workers):
    """With an accumulation that does not divide the epoch, an average, lists of captions and validation."""
    run = train(**UNEVEN)
    assert run.returncode == 0, run
    again = resumed(train, run, step, tmp_path, by, **UNEVEN, dataloader_num_workers=workers)
    assert len(again.record["steps"]) == 3 * (7 - step), "no sample is read that is not trained on"
    for name in ("pixels", "ids", "noise", "timesteps"):
        assert torch.equal(again.all(name), run.all(name)[6 * step :])
    assert_continues_as(again, run, step, 7)


def test_each_epoch_has_each_row_once_and_workers_change_nothing(train):
    run, with_workers = train(**UNEVEN), train(**UNEVEN, dataloader_num_workers=2)
    assert same_weights(run.prior(), with_workers.prior())
    pixels = [hashlib.sha256(sample.numpy().tobytes()).hexdigest() for sample in run.all("pixels")]
    assert len(pixels) == 42
    epochs = [pixels[start : start + 10] for start in range(0, 40, 10)]
    assert all(len(set(epoch)) == 10 and set(epoch) == set(epochs[0]) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4, "each in another order"


def test_resumed_run_takes_its_seed_from_the_checkpoint(train, tmp_path):
    flags = {"max_train_steps": 4, "checkpointing_steps": 1, "seed": None}
    run = train(**flags)
    again = resumed(train, run, 2, tmp_path, **flags)
    assert_continues_as(again, run, 2, 4)


@pytest.mark.slow
def test_finished_run_is_resumed_with_more_steps(train, tmp_path):
    flags = {"checkpointing_steps": 1, "use_ema": True, "learning_rate": 1e-3}
    whole, half = train(**flags, max_train_steps=5), train(**flags, max_train_steps=2)
    assert half.returncode == whole.returncode == 0, (half, whole)
    again = resumed(train, half, 2, tmp_path, **flags, max_train_steps=5)
    assert_continues_as(again, whole, 2, 5)


def test_resumed_finished_run_only_saves_its_result(train, tmp_path):
    flags = {"checkpointing_steps": 1, "use_ema": True, "learning_rate": 1e-3}
    run = train(**flags, max_train_steps=2)
    again = resumed(train, run, 2, tmp_path, **flags, max_train_steps=2)
    assert "nothing is left to train" in again.output
    assert again.record["steps"] == again.record["rates"] == []
    assert same_weights(again.prior(), run.prior())


def test_finished_run_is_resumed_in_its_own_folder(models, pictures, tmp_path, run_main):
    output_dir = tmp_path / "run"
    args = tiny_args(models, pictures, output_dir, checkpointing_steps=3)
    assert run_main(args).returncode == 0
    before = load_weights(output_dir)
    shutil.rmtree(output_dir / "prior_pipeline")
    result = run_main([*args, "--resume_from_checkpoint=latest"])
    assert result.returncode == 0 and "nothing is left to train" in result.output, result
    assert_same_bits(load_weights(output_dir), before)


def test_ranks_end_with_the_same_weights_and_resume_exactly(train_ranks, tmp_path):
    runs = train_ranks(**RANKS)
    assert runs[0].record["clipped"] == runs[1].record["clipped"]
    folder = tmp_path / "again"
    shutil.copytree(runs[0].folder / "checkpoint-1", folder / "checkpoint-1")
    again = train_ranks(**RANKS, output_dir=folder, resume_from_checkpoint="latest")
    assert all(run.returncode == 0 for run in again), again
    assert_continues_as(again[0], runs[0], 1, 4)
    for one, other in zip(again, runs, strict=True):
        for name in ("pixels", "noise", "pred"):
            assert torch.equal(one.all(name), other.all(name)[4:]), "on each rank"


ELASTIC = {
    "max_train_steps": 6,
    "checkpointing_steps": 1,
    "adam_epsilon": 1e-3,
    "learning_rate": 1e-3,
    "use_ema": True,
    "validation_split": 6,
    "validation_steps": 2,
    "caption_dropout": 0.3,
    "random_crop": True,
    "random_flip": True,
}
# Processes, micro-batch and micro-steps of the unbroken run, and of two steps each that follow its second.
SPLITS = {
    "dropout": [(1, 2, 4), (2, 2, 2), (1, 2, 4)],
    "without dropout": [(2, 4, 1), (1, 2, 4), (4, 1, 2), (2, 2, 2), (1, 8, 1)],
}


@pytest.mark.slow
@pytest.mark.parametrize("case", SPLITS)
def test_a_run_goes_on_with_another_number_of_ranks(case, train, train_ranks, steady_prior, models, tmp_path):
    """And follows the unbroken one to rounding: samples, crops, captions, noise and timesteps are the same
    and, as long as the micro-batches are, dropout's masks."""
    prior = models / "prior" if case == "dropout" else steady_prior
    flags = ELASTIC | {"pretrained_prior_model_name_or_path": prior}
    start = load_file(prior / "prior" / "diffusion_pytorch_model.safetensors")

    def go_on(split, source, last_step):
        ranks, batch_size, accumulation = split
        settings = flags | {"train_batch_size": batch_size, "gradient_accumulation_steps": accumulation}
        if source is not None:
            folder = tmp_path / f"to-{last_step}"
            shutil.copytree(source, folder / source.name)
            settings |= {"output_dir": folder, "resume_from_checkpoint": "latest"}
        settings["max_train_steps"] = last_step
        runs = train_ranks(**settings, ranks=ranks) if ranks > 1 else [train(**settings)]
        assert all(run.returncode == 0 for run in runs), runs
        return runs

    def samples(runs, name, first_micro_step, last_micro_step):
        of_micro_steps = [run.record["steps"][first_micro_step:last_micro_step] for run in runs]
        tensors = [sample for steps in of_micro_steps for step in steps for sample in step[name]]
        return sorted(sample.double().numpy().tobytes() for sample in tensors)

    unbroken_split, *splits = SPLITS[case]
    unbroken = go_on(unbroken_split, None, 2 + 2 * len(splits))
    runs, per_step = unbroken, unbroken_split[2]
    for step, split in zip(range(2, 2 + 2 * len(splits), 2), splits, strict=True):
        runs = go_on(split, runs[0].folder / f"checkpoint-{step}", step + 2)
        for name in ("pixels", "ids", "noise", "timesteps"):
            expected = samples(unbroken, name, step * per_step, (step + 2) * per_step)
            assert len(expected) == 16 and samples(runs, name, 0, None) == expected, name
        for done in (step + 1, step + 2):
            moved = distance(unbroken[0].prior(done), start)
            for folder in ("prior", "prior_ema"):
                apart = distance(runs[0].prior(done, folder), unbroken[0].prior(done, folder))
                assert apart < 1e-4 * moved, (split, done, folder)
            losses = [run.logged("train_loss")[done] for run in (runs[0], unbroken[0])]
            assert losses[0] == pytest.approx(losses[1], rel=1e-4)
        losses = [run.logged("val_loss")[step + 2] for run in (runs[0], unbroken[0])]
        assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def tensors_in(entry):
    """The tensors of a dict of them, and of the dicts in it."""
    for value in entry.values():
        if isinstance(value, dict):
            yield from tensors_in(value)
        elif torch.is_tensor(value):
            yield value


@pytest.mark.slow
def test_eight_bit_adam_resumes_exactly(models, pictures, tmp_path, run_main):
    flags = RUN | {"use_8bit_adam": True, "checkpoints_total_limit": None}
    assert run_main(tiny_args(models, pictures, tmp_path / "whole", **flags)).returncode == 0
    state = torch.load(tmp_path / "whole" / "checkpoint-4" / "optimizer.bin", weights_only=True)["state"]
    assert torch.uint8 in {tensor.dtype for entry in state.values() for tensor in tensors_in(entry)}
    flags |= {"resume_from_checkpoint": tmp_path / "whole" / "checkpoint-4"}
    assert run_main(tiny_args(models, pictures, tmp_path / "on", **flags)).returncode == 0
    assert_same_bits(load_weights(tmp_path / "whole"), load_weights(tmp_path / "on"))


@settings(deadline=None, max_examples=60)
@given(
    num_rows=st.integers(1, 40),
    batch_size=st.integers(1, 5),
    accumulation=st.integers(1, 4),
    ranks=st.integers(1, 3),
    steps=st.integers(1, 12),
    data=st.data(),
)
def test_resuming_continues_the_sequence_of_samples(num_rows, batch_size, accumulation, ranks, steps, data):
    """Whatever the epoch's length, and wherever a run stops: the samples that follow are those that would
    have followed, on every rank, with the same random numbers."""
    stop = data.draw(st.integers(0, steps))
    plan = script.SamplePlan(
        seed=3,
        num_rows=num_rows,
        rows_hash="",
        num_processes=ranks,
        train_batch_size=batch_size,
        gradient_accumulation_steps=accumulation,
    )

    def preprocess(row, size):
        return {"sample": (row, random.random(), torch.rand(()).item(), np.random.random())}

    dataset = Samples(range(num_rows), preprocess, seed=3, skip_bad_rows=False)

    def sequence(first_step, last_step, rank):
        batches = plan.train_batches(rank, first_step, last_step)
        return [[(position, dataset[position]["sample"]) for position in batch] for batch in batches]

    seen = []
    for rank in range(ranks):
        unbroken_sequence = sequence(0, steps, rank)
        assert sequence(0, stop, rank) + sequence(stop, steps, rank) == unbroken_sequence
        assert len(unbroken_sequence) == steps * accumulation
        seen += [item for batch in unbroken_sequence for item in batch]
    seen.sort()
    assert [position for position, _ in seen] == list(range(steps * plan.samples_per_step))
    assert len({sample[1:] for _, sample in seen}) == len(seen), "each sample has random numbers of its own"
    for epoch in range(len(seen) // num_rows):
        rows = [sample[0] for _, sample in seen[epoch * num_rows : (epoch + 1) * num_rows]]
        assert sorted(rows) == list(range(num_rows))


# -------------------------------------------------------------------------------- what may change on resuming


@pytest.mark.slow
def test_resuming_an_older_checkpoint_deletes_the_newer_only_if_allowed(
    models, pictures, tmp_path, run_main, unbroken
):
    output_dir = tmp_path / "run"
    args = tiny_args(models, pictures, output_dir, **RUN | {"checkpoints_total_limit": None})
    assert run_main(args).returncode == 0
    back = [*args, "--resume_from_checkpoint", output_dir / "checkpoint-2"]
    refused = run_main(back)
    assert refused.returncode == 1 and "--overwrite_output_dir" in refused.output.splitlines()[-1]
    assert len(script.list_checkpoints(output_dir)) == 4
    assert run_main([*back, "--overwrite_output_dir"]).returncode == 0
    assert_same_bits(load_weights(output_dir), unbroken)


@pytest.fixture(scope="module")
def halfway(models, pictures, tmp_path_factory, run_main):
    """The flags of a finished run, and its checkpoint from before its last step."""
    output_dir = tmp_path_factory.mktemp("halfway") / "run"
    flags = {
        "max_train_steps": 3,
        "checkpointing_steps": 2,
        "report_to": "tensorboard",
        "lr_scheduler": "linear",
        "lr_warmup_steps": 0,
    }
    assert run_main(tiny_args(models, pictures, output_dir, **flags)).returncode == 0
    return flags, output_dir / "checkpoint-2"


def read_rates(output_dir):
    """The learning rate logged at each step."""
    (folder,) = {path.parent for path in Path(output_dir, "logs").glob("*/events*")}
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    return {event.step: event.value for event in events.Scalars("lr")}


def test_other_learning_rate_and_length_apply_on_resuming(models, pictures, tmp_path, run_main, halfway):
    flags, checkpoint = halfway
    flags = flags | {"learning_rate": 5e-4, "max_train_steps": 5, "resume_from_checkpoint": checkpoint}
    result = run_main(tiny_args(models, pictures, tmp_path / "on", **flags))
    assert result.returncode == 0, result
    assert read_rates(tmp_path / "on") == pytest.approx({3: 5e-4 * 2 / 5, 4: 5e-4 / 5, 5: 0})


def test_other_data_set_of_the_same_size_is_refused(models, pictures, tmp_path, run_main, halfway):
    flags, checkpoint = halfway
    shutil.copytree(pictures, tmp_path / "others")
    lines = (pictures / "metadata.jsonl").read_text().splitlines()
    rows = [json.loads(line) | {"text": f"caption {index}"} for index, line in enumerate(lines)]
    (tmp_path / "others" / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    flags = flags | {"resume_from_checkpoint": checkpoint}
    result = run_main(tiny_args(models, tmp_path / "others", tmp_path / "on", **flags))
    assert result.returncode == 1, result
    last_line = result.output.splitlines()[-1]
    assert "cannot be resumed exactly: its run had other images or captions" in last_line, result


class Payload:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


@pytest.mark.parametrize("name", ["optimizer.bin", "random_states_0.pkl"])
def test_code_in_a_checkpoint_does_not_run(models, pictures, tmp_path, run_main, halfway, name):
    flags, checkpoint = halfway
    poisoned = tmp_path / checkpoint.name
    shutil.copytree(checkpoint, poisoned)
    torch.save({"state": Payload(tmp_path / "ran")}, poisoned / name)
    state = json.loads((poisoned / script.STATE_FILE).read_text())
    state["files"][name] = (poisoned / name).stat().st_size
    (poisoned / script.STATE_FILE).write_text(json.dumps(state))
    args = tiny_args(models, pictures, tmp_path / "on", **flags, resume_from_checkpoint=poisoned)
    result = run_main(args)
    assert not (tmp_path / "ran").exists()
    if name == "optimizer.bin":  # the random states are not used: every step has a seed of its own
        assert result.returncode == 1, result
        assert "--resume_from_checkpoint" in result.output.splitlines()[-1], result
    torch.load(poisoned / name, weights_only=False)  # the payload does work
    assert (tmp_path / "ran").exists()


# ------------------------------------------------------------------------------ checkpoints of older versions


def write_old_state_file(checkpoint):
    """Rewrites trainer_state.json as versions before 2026-11-25 wrote it."""
    state = json.loads((checkpoint / script.STATE_FILE).read_text())
    plan = state["plan"]
    old_state = {
        "global_step": state["global_step"],
        "plan": {
            "seed": plan["seed"],
            "rows": plan["num_rows"],
            "captions": 1280904221157676144,
            "processes": plan["num_processes"],
            "train_batch_size": plan["train_batch_size"],
            "gradient_accumulation_steps": plan["gradient_accumulation_steps"],
        },
        "run_id": state["wandb_run_id"],
        "due": state["global_step"] in (2, 4, 5, 7),  # whether a validation followed
        "files": state["files"],
    }
    (checkpoint / script.STATE_FILE).write_text(json.dumps(old_state, indent=2))


def write_old_layout(output_dir):
    """Turns the files of a run into those of an older version."""
    for checkpoint in script.list_checkpoints(output_dir):
        write_old_state_file(checkpoint)
    rows = script.read_metrics(output_dir)
    lines = [json.dumps({"update": row.pop("step")} | row) + "\n" for row in rows]
    (output_dir / "loss.jsonl").write_text("".join(lines))
    for file in (output_dir / "samples").glob("step-*.png"):
        file.rename(file.with_name(file.name.replace("step", "update")))


@pytest.mark.parametrize(
    ("flags", "is_validated"),
    [
        ({}, True),
        pytest.param({}, False, marks=pytest.mark.slow),
        pytest.param({"validation_split": 2, "max_train_samples": 12}, True, marks=pytest.mark.slow),
    ],
    ids=["validated", "not validated", "held-out loss"],
)
def test_run_of_an_older_version_is_resumed_exactly(train, tmp_path, flags, is_validated):
    """The run was killed after step 7, and its last complete checkpoint is that of step 2, at which there is
    a validation: done before the next checkpoint, or not since the run was stopped."""
    flags = UNEVEN | flags
    run = train(**flags)
    assert run.returncode == 0, run
    folder = tmp_path / "run"
    ignored = shutil.ignore_patterns("logs", "prior_pipeline", "README.md", "checkpoint-[34567]")
    shutil.copytree(run.folder, folder, ignore=ignored)
    if not is_validated:
        for file in (folder / "samples").glob("step-0000002-*"):
            file.unlink()
    wandb_run_id = json.loads((folder / "checkpoint-2" / script.STATE_FILE).read_text())["wandb_run_id"]
    write_old_layout(folder)
    kept = {}
    for file in (folder / "samples").glob("update-000000[012]-*.png"):
        kept[file.name.replace("update", "step")] = file.stat().st_ino
    assert len(kept) == (4 if is_validated else 2)

    again = train(**flags, output_dir=folder, resume_from_checkpoint="latest")
    assert again.returncode == 0, again
    assert_continues_as(again, run, 2, 7)
    names = {file.name for file in (folder / "samples").iterdir()}
    assert names == {file.name for file in (run.folder / "samples").iterdir()} and len(names) == 11
    for name, inode in kept.items():
        assert (folder / "samples" / name).stat().st_ino == inode, f"{name} is not generated again"

    rows = [json.loads(line) for line in (folder / "loss.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "train_loss" in row] == [1, 2, 3, 4, 5, 6, 7]
    if "validation_split" in flags:
        assert [row["step"] for row in rows if "val_loss" in row] == [0, 2, 4, 5, 7]
    expected = script.read_metrics(run.folder)
    for row in (*rows, *expected):
        row.pop("images_per_second", None)
    assert rows == expected

    state = json.loads((folder / "checkpoint-7" / script.STATE_FILE).read_text())
    assert state.keys() == {"global_step", "plan", "settings", "wandb_run_id", "files", "digests"}
    assert state["wandb_run_id"] == wandb_run_id
    assert state["plan"] == json.loads((run.folder / "checkpoint-7" / script.STATE_FILE).read_text())["plan"]


def test_plan_of_an_older_version_is_compared(saver, tmp_path):
    plan = script.SamplePlan(
        seed=5,
        num_rows=10,
        rows_hash="123",
        num_processes=2,
        train_batch_size=3,
        gradient_accumulation_steps=4,
    )
    saver.save(tmp_path, 6, limit=None, plan=asdict(plan))
    (checkpoint,) = script.list_checkpoints(tmp_path)
    state = script.load_train_state(checkpoint, [], tmp_path)
    write_old_state_file(checkpoint)
    assert state.global_step == 6 and state.plan == asdict(plan)
    old_state = script.load_train_state(checkpoint, [], tmp_path)
    newer = ("rows_hash", "bucket_rows")
    numbers = {name: value for name, value in asdict(plan).items() if name not in newer}
    assert old_state.global_step == 6 and old_state.wandb_run_id == state.wandb_run_id
    assert {name: old_state.plan[name] for name in numbers} == numbers
    script.check_same_plan(plan, old_state, checkpoint)
    changed = {
        "seed": "seed=5, this one 6",
        "num_rows": "num_rows=10, this one 11",
        "num_processes": r"24 samples a step \(.*\), this one 36 samples a step \(.* x 3 processes\)",
    }
    for name, difference in changed.items():
        other = replace(plan, **{name: numbers[name] + 1})
        with pytest.raises(SystemExit, match=f"cannot be resumed exactly: its run had {difference}"):
            script.check_same_plan(other, old_state, checkpoint)
    buckets = replace(plan, bucket_rows={"64x32": 4, "32x64": 6})
    with pytest.raises(SystemExit, match=r"its run had bucket_rows=\{\}, this one"):
        script.check_same_plan(buckets, old_state, checkpoint)


def test_the_same_samples_a_step_may_be_split_up_otherwise(tmp_path):
    """With buckets except for the micro-batch, since a micro-batch is of one bucket."""
    sizes = itertools.product((1, 2, 3, 4, 6), repeat=3)
    plan = script.SamplePlan(5, 10, "123", num_processes=2, train_batch_size=3, gradient_accumulation_steps=2)
    bucket_rows = {"64x32": 4, "32x64": 6}
    refused = 0
    for ranks, batch_size, accumulation in sizes:
        other = replace(
            plan,
            num_processes=ranks,
            train_batch_size=batch_size,
            gradient_accumulation_steps=accumulation,
        )
        for buckets in ({}, bucket_rows):
            state = script.TrainState(plan=asdict(replace(plan, bucket_rows=buckets)))
            allowed = ranks * batch_size * accumulation == 12 and (not buckets or batch_size == 3)
            error = (
                nullcontext()
                if allowed
                else pytest.raises(SystemExit, match=r"samples a step|train_batch_size")
            )
            refused += not allowed
            with error:
                script.check_same_plan(replace(other, bucket_rows=buckets), state, tmp_path)
    assert 0 < refused < 250


# ------------------------------------------------------------------------------------ broken rows and numbers


@pytest.fixture(scope="module")
def broken_images(pictures, tmp_path_factory):
    """Ten rows; the image of row 3 is truncated, and row 7 has no caption."""
    folder = tmp_path_factory.mktemp("broken")
    rows = [json.loads(line) for line in (pictures / "metadata.jsonl").read_text().splitlines()[:10]]
    for row in rows:
        shutil.copy(pictures / row["file_name"], folder)
    os.truncate(folder / rows[3]["file_name"], 900)
    rows[7]["text"] = None
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def test_skipped_rows_are_reported_once_and_the_run_resumes_exactly(
    models, broken_images, tmp_path, run_main
):
    flags = {"skip_bad_rows": True, "max_train_steps": 8, "checkpointing_steps": 3, "use_ema": True}
    whole = run_main(tiny_args(models, broken_images, tmp_path / "whole", **flags))
    assert whole.returncode == 0, whole
    assert whole.output.count("Skipped row 3 ") == 1 and whole.output.count("Skipped row 7 ") == 1
    assert whole.output.count("(1 so far)") == whole.output.count("(2 so far)") == 1
    flags |= {"resume_from_checkpoint": tmp_path / "whole" / "checkpoint-3", "dataloader_num_workers": 2}
    assert run_main(tiny_args(models, broken_images, tmp_path / "on", **flags)).returncode == 0
    assert_same_bits(load_weights(tmp_path / "whole"), load_weights(tmp_path / "on"))


def test_data_set_of_mostly_unreadable_images_ends_the_run(models, broken_images, tmp_path, run_main):
    for path in broken_images.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes()[: None if path.suffix == ".jsonl" else 900])
    flags = {"skip_bad_rows": True, "max_train_steps": 200}
    result = run_main(tiny_args(models, tmp_path, tmp_path / "run", **flags))
    assert result.returncode == 1, result
    assert "12 rows in succession cannot be read" in result.output.splitlines()[-1], result


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(("loss", "stops"), [(1.0, False), (NAN, True), (INF, True)])
@pytest.mark.parametrize(
    ("scale", "stops_fp16"), [(None, None), (2.0**16, False), (2.0**-20, False), (2.0**-21, True)]
)
def test_only_a_diverged_run_is_stopped(saver, tmp_path, loss, stops, scale, stops_fp16):
    """Without a loss scale that means a loss that is not finite. In fp16 overflows are normal, until the
    scale has been halved too often."""
    saver.save(tmp_path, 4, limit=None)
    stops = stops if scale is None else stops_fp16
    accelerator = SimpleNamespace(scaler=scale and torch.amp.GradScaler("cpu", init_scale=scale))
    if accelerator.scaler:
        accelerator.scaler.scale(torch.ones(()))  # the scale is created when it is first used
    message = r"before step 5: .*rows \[7, 8\], timesteps \[0\.5, 0\.25\]; .*checkpoint-4"
    timesteps = [torch.tensor([0.5]), torch.tensor([0.25])]
    with pytest.raises(SystemExit, match=message) if stops else nullcontext():
        script.check_finite(accelerator, tmp_path, 5, loss, 1.0, [7, 8], timesteps)
