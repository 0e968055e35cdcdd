# SPDX-License-Identifier: Apache-2.0
"""A run that fails ends: with the error, a status that is not 0, and within seconds, whatever its processes
do."""

import os
import shutil
import signal
import subprocess
import time

import pytest
from conftest import script

READERS = {"train_batch_size": 2, "max_train_steps": 20, "dataloader_num_workers": 2}
OUT_OF_MEMORY = """
import torch
backward, calls = torch.Tensor.backward, []
def fail_at_third(*args, **kwargs):
    calls.append(None)
    if len(calls) == 3:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
    return backward(*args, **kwargs)
torch.Tensor.backward = fail_at_third
"""
MESSAGE = "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB."


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_an_error_in_the_training_loop_ends_all_processes_and_their_workers(train_fresh, ranks):
    launcher = ("-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=29711")
    run = train_fresh(
        launcher=launcher if ranks > 1 else (),
        env={"ACCELERATE_USE_CPU": "true"},
        patch=OUT_OF_MEMORY,
        wait=False,
        **READERS,
    )
    while "OutOfMemoryError" not in run.output and run.process.poll() is None:
        time.sleep(0.1)
    assert run.finish(60).returncode == 1, run
    lines = run.output.strip().splitlines()
    assert MESSAGE in run.output if ranks > 1 else lines[-1] == MESSAGE, run


@pytest.mark.parametrize("cached", [False, True], ids=["training", "encoding"])
def test_a_killed_worker_is_named_with_the_way_out(train, tmp_path, monkeypatch, cached):
    # The worker of the image in the middle dies; the main process is not allowed to.
    main_process, load_image, number = os.getpid(), script.load_image, []

    def load(value, folders):
        number.append(None)
        if len(number) == 3 and os.getppid() != main_process:
            os.kill(os.getpid(), signal.SIGKILL)
        return load_image(value, folders)

    monkeypatch.setattr(script, "load_image", load)
    run = train(timeout=60, cache_latents=cached, cache_dir=tmp_path / "cache", **READERS)
    assert run.returncode == 1, run
    last_line = run.output.strip().splitlines()[-1]
    assert last_line.startswith("--dataloader_num_workers=2: DataLoader worker (pid"), run
    assert "/dev/shm" in last_line and "fewer workers" in last_line
    assert "Traceback" not in run.output


def can_mount():
    command = ["unshare", "-m", "mount", "-t", "tmpfs", "tmpfs", "/dev/shm"]
    return shutil.which("unshare") and subprocess.run(command, capture_output=True).returncode == 0


@pytest.mark.slow
@pytest.mark.skipif(not can_mount(), reason="a small /dev/shm needs the right to mount")
@pytest.mark.parametrize("cached", [False, True], ids=["training", "encoding"])
def test_used_up_shared_memory_is_named_with_the_way_out(train_fresh, tmp_path, cached):
    flags = {"resolution": 256, "train_batch_size": 16, "dataloader_num_workers": 4, "cache_latents": cached}
    mount = 'mount -t tmpfs -o size=8m tmpfs /dev/shm && exec "$@"'
    wrapper = ("unshare", "-m", "sh", "-c", mount, "sh")
    run = train_fresh(wrapper=wrapper, timeout=120, cache_dir=tmp_path / "cache", **flags)
    assert run.returncode == 1
    last_line = run.output.strip().splitlines()[-1]
    assert last_line.startswith("--dataloader_num_workers=4: "), run
    assert "shared memory" in last_line and "--shm-size" in last_line


@pytest.mark.slow
@pytest.mark.parametrize("num_workers", [0, 1])
def test_an_error_in_an_edit_shows_its_traceback(train, monkeypatch, num_workers):
    """An augmentation that fails is not an unreadable row, which --skip_bad_rows would hide."""

    def fail(image):
        raise TypeError("unsupported operand")

    monkeypatch.setattr(script, "make_augmentations", lambda args, size: [fail])
    run = train(timeout=60, skip_bad_rows=True, max_train_steps=1, dataloader_num_workers=num_workers)
    assert run.returncode == 1, run
    assert "in fail" in run.output, run
    assert "TypeError: unsupported operand" in run.output, run
