# SPDX-License-Identifier: Apache-2.0
"""A run that fails ends: with the error, a status that is not 0, and within seconds, whatever its processes
do."""

import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
from conftest import SCRIPT, script, tiny_args

READERS = {"train_batch_size": 2, "max_train_steps": 20, "dataloader_num_workers": 2}

OUT_OF_MEMORY = """
import sys, torch
backward, calls = torch.Tensor.backward, []
def fail_at_third(*args, **kwargs):
    calls.append(None)
    if len(calls) == 3:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
    return backward(*args, **kwargs)
torch.Tensor.backward = fail_at_third
sys.path.insert(0, sys.argv.pop(1))
import train_text_to_image_prior as script
script.main()
"""


def run_out_of_memory(args, tmp_path, launcher=()):
    """Runs the command until its memory is used up; its status and output. It must end soon after the
    error."""
    program = tmp_path / "out_of_memory.py"
    program.write_text(OUT_OF_MEMORY)
    command = [sys.executable, *launcher, str(program), str(SCRIPT.parent), *map(str, args)]
    with open(tmp_path / "log", "w+") as log:
        env = os.environ | {"ACCELERATE_USE_CPU": "true"}
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, cwd=tmp_path, env=env)
        try:
            failed_at = None
            while process.poll() is None:
                time.sleep(0.1)
                if failed_at is None and "OutOfMemoryError" in (tmp_path / "log").read_text(errors="replace"):
                    failed_at = time.monotonic()
                if failed_at is not None and time.monotonic() - failed_at > 60:
                    pytest.fail("it does not end:\n" + (tmp_path / "log").read_text(errors="replace"))
        finally:
            process.kill()
            process.wait()
    return process.returncode, (tmp_path / "log").read_text(errors="replace")


@pytest.mark.slow
def test_an_error_in_the_training_loop_ends_the_process_and_its_workers(models, pictures, tmp_path):
    args = tiny_args(models, pictures, tmp_path / "run", **READERS)
    status, output = run_out_of_memory(args, tmp_path)
    assert status == 1
    last_line = output.strip().splitlines()[-1]
    assert last_line == "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB."


@pytest.mark.slow
def test_an_error_on_several_ranks_ends_all_of_them(models, pictures, tmp_path):
    args = tiny_args(models, pictures, tmp_path / "run", **READERS)
    launcher = ("-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=29711")
    status, output = run_out_of_memory(args, tmp_path, launcher)
    assert status == 1
    assert "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB." in output


@pytest.mark.parametrize("cached", [False, True], ids=["training", "encoding"])
def test_a_killed_worker_is_named_with_the_way_out(models, pictures, tmp_path, run_main, monkeypatch, cached):
    # The worker of the image in the middle dies; the main process is not allowed to.
    main_process, load_image, number = os.getpid(), script.load_image, []

    def load(value, folders):
        number.append(None)
        if len(number) == 3 and os.getppid() != main_process:
            os.kill(os.getpid(), signal.SIGKILL)
        return load_image(value, folders)

    monkeypatch.setattr(script, "load_image", load)
    flags = {"cache_latents": cached, "cache_dir": tmp_path / "cache"}
    started = time.monotonic()
    finished = run_main(tiny_args(models, pictures, tmp_path / "run", **READERS, **flags), timeout=120)
    assert finished.returncode == 1, finished
    assert time.monotonic() - started < 60
    last_line = finished.output.strip().splitlines()[-1]
    assert last_line.startswith("--dataloader_num_workers=2: DataLoader worker (pid"), finished
    assert "/dev/shm" in last_line and "fewer workers" in last_line
    assert "Traceback" not in finished.output


def can_mount():
    command = ["unshare", "-m", "mount", "-t", "tmpfs", "tmpfs", "/dev/shm"]
    return shutil.which("unshare") and subprocess.run(command, capture_output=True).returncode == 0


@pytest.mark.slow
@pytest.mark.skipif(not can_mount(), reason="a small /dev/shm needs the right to mount")
@pytest.mark.parametrize("cached", [False, True], ids=["training", "encoding"])
def test_used_up_shared_memory_is_named_with_the_way_out(models, pictures, tmp_path, cached):
    flags = {"resolution": 256, "train_batch_size": 16, "dataloader_num_workers": 4, "max_train_steps": 3}
    flags |= {"cache_latents": cached, "cache_dir": tmp_path / "cache"}
    args = tiny_args(models, pictures, tmp_path / "run", **flags)
    mount = 'mount -t tmpfs -o size=8m tmpfs /dev/shm && exec "$@"'
    command = ["unshare", "-m", "sh", "-c", mount, "sh", sys.executable, str(SCRIPT), *map(str, args)]
    finished = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=120)
    assert finished.returncode == 1
    last_line = finished.stderr.strip().splitlines()[-1]
    assert last_line.startswith("--dataloader_num_workers=4: "), finished.stderr
    assert "shared memory" in last_line and "--shm-size" in last_line


@pytest.mark.slow
def test_an_error_in_an_edit_shows_its_traceback(models, pictures, tmp_path, run_main, monkeypatch):
    """An augmentation that fails is not an unreadable row, which --skip_bad_rows would hide."""

    def fail(image):
        raise TypeError("unsupported operand")

    monkeypatch.setattr(script, "make_augmentations", lambda args, size: [fail])
    for num_workers in (0, 1):
        flags = {"skip_bad_rows": True, "max_train_steps": 1, "dataloader_num_workers": num_workers}
        finished = run_main(tiny_args(models, pictures, tmp_path / f"run-{num_workers}", **flags), timeout=60)
        assert finished.returncode == 1, finished
        assert "in fail" in finished.output, finished
        assert "TypeError: unsupported operand" in finished.output, finished
