# SPDX-License-Identifier: Apache-2.0
"""Signals, worker processes, errors and odd environments: a run stops where it can be continued, ends with an
error and a status that is not 0 where it cannot go on, and starts wherever there is no reason not to."""

import ctypes
import functools
import inspect
import json
import os
import resource
import shutil
import signal
import subprocess
import threading
import time
from pathlib import Path

import filelock
import pytest
import torch
from conftest import Output, assert_continues_as, at_call, run_in_fork, same_weights, script, tiny_args

RUN = {"train_batch_size": 2, "gradient_accumulation_steps": 3, "max_train_samples": 10, "max_train_steps": 7}
RUN |= {"checkpointing_steps": 2, "learning_rate": 1e-3}
SHORT = {"train_batch_size": 2, "max_train_steps": 2}
READERS = {"train_batch_size": 2, "max_train_steps": 20, "dataloader_num_workers": 2}
LAUNCHER = ("-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=29711")


def send(number):
    """An action: this process gets a signal."""
    return functools.partial(signal.raise_signal, number)


# ---------------------------------------------------------------------------------------------------- signals


@pytest.mark.parametrize("rank", ["0", pytest.param("1", marks=pytest.mark.slow)])
def test_ranks_stop_after_the_same_step_when_one_gets_a_signal_and_resume_exactly(
    train_ranks, tmp_path, rank
):
    flags = {"train_batch_size": 2, "gradient_accumulation_steps": 2, "max_train_samples": 10}
    flags |= {"max_train_steps": 5, "checkpointing_steps": 1, "use_ema": True, "learning_rate": 1e-3}
    whole = train_ranks(**flags, record=True)
    assert whole[0].record["clipped"] == whole[1].record["clipped"]

    patch = functools.partial(at_call, script, "check_finite", 2, send(signal.SIGTERM), rank)
    stopped = train_ranks(patch, **flags)
    assert [run.returncode for run in stopped] == [128 + signal.SIGTERM] * 2, stopped
    assert stopped[0].checkpoints() == [1, 2, 3]

    folder = tmp_path / "again"
    shutil.copytree(stopped[0].folder / "checkpoint-3", folder / "checkpoint-3")
    again = train_ranks(**flags, record=True, output_dir=folder, resume_from_checkpoint="latest")
    assert_continues_as(again[0].ok(), whole[0], 3, 5)
    for one, other in zip(again, whole, strict=True):
        for name in ("pixels", "noise", "pred"):
            assert torch.equal(one.ok().all(name), other.all(name)[3 * 2 * 2 :]), "on each rank"


@pytest.mark.parametrize("older", [False, True])
def test_a_stop_whose_checkpoint_failed_has_a_status_of_its_own(train, older):
    def patch():
        at_call(script, "encode_batch", 3, send(signal.SIGTERM))
        at_call(script, "flush_to_disk", 2 if older else 1, functools.partial(os.listdir, "/gone"))

    run = train(patch, **SHORT | {"max_train_steps": 20, "checkpointing_steps": 2 if older else 20})
    assert run.returncode == 74, run
    assert "checkpoint-3 was not saved" in run.output and "latest continues" not in run.output
    assert run.checkpoints() == [2] * older


@pytest.mark.parametrize(
    ("signals", "status"),
    [
        ([signal.SIGTERM, signal.SIGTERM], 0),  # from a scheduler, and passed on by torchrun
        ([signal.SIGINT, signal.SIGTERM], 0),
        ([signal.SIGTERM, signal.SIGINT], 130),
        ([signal.SIGINT, signal.SIGINT], 130),
    ],
)
def test_only_a_second_ctrl_c_ends_the_process_at_once(signals, status):
    """A hangup that nohup ignores stays ignored, and afterwards the handlers are what they were."""

    def work():
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job ignores it
        before, received = [signal.getsignal(number) for number in script.STOP_SIGNALS], []
        with script.deferred_signals(received):
            for number in (signal.SIGHUP, *signals):
                signal.raise_signal(number)
        assert received == signals
        assert [signal.getsignal(number) for number in script.STOP_SIGNALS] == before

    run_in_fork(work, [status])


@pytest.mark.slow
def test_a_closed_terminal_does_not_cost_a_checkpoint(train_fresh):
    """Standard output is closed, and the reader of standard error is gone."""
    wrapper = ("bash", "-c", 'exec "$@" 2> >(head -c 9) >&-', "bash")
    run = train_fresh(wrapper=wrapper, wait=False, **SHORT | {"max_train_steps": 5000})
    losses = run.folder / "loss.jsonl"
    while not (losses.exists() and losses.read_text().count("\n") > 2):
        assert run.process.poll() is None
        time.sleep(0.1)
    run.process.send_signal(signal.SIGTERM)
    assert run.finish(60).returncode == 128 + signal.SIGTERM
    assert len(run.checkpoints()) == 1


# ---------------------------------------------------------------------------------------------------- workers


def block_samples(script, positions, seconds, folder):
    """Makes reading each of the samples at `positions` take `seconds`, the first time, when it leaves a file
    in `folder`."""
    read_sample = script.SampleDataset.__getitem__

    def read_or_block(self, sample):
        file = folder / f"blocked-{sample[0]}"
        if sample[0] in positions and not file.exists():
            file.touch()
            time.sleep(seconds)
        return read_sample(self, sample)

    script.SampleDataset.__getitem__ = read_or_block
    script.BATCH_TIMEOUT = 1


@pytest.mark.slow
def test_a_run_waits_for_slow_storage_and_says_so_once(train, tmp_path):
    patch = functools.partial(block_samples, script, (20, 22, 32, 34), 3.5, tmp_path)
    run = train(patch, **RUN, dataloader_num_workers=2).ok()
    assert len(list(tmp_path.glob("blocked-*"))) == 4
    assert run.output.count("Waiting for a batch for 1 seconds") == 1
    assert same_weights(run.prior(), train(**RUN).prior())


@pytest.mark.slow
def test_a_signal_ends_a_run_whose_storage_hangs(train, train_fresh, tmp_path):
    """Both workers hang in step 4. A scheduler sends SIGTERM to all processes of the run, which have to end
    within seconds, workers included."""
    patch = f"import time\nfrom pathlib import Path\n{inspect.getsource(block_samples)}"
    patch += f"\nblock_samples(script, (20, 22), 600, Path({str(tmp_path)!r}))"
    run = train_fresh(patch=patch, wait=False, **RUN, dataloader_num_workers=2)
    while len(list(tmp_path.glob("blocked-*"))) < 2 or "Waiting for a batch" not in run.output:
        assert run.process.poll() is None
        time.sleep(0.1)
    time.sleep(2)
    assert run.process.poll() is None, "without a signal it waits"
    os.killpg(run.process.pid, signal.SIGTERM)
    assert run.finish(20).returncode == 128 + signal.SIGTERM, run
    with pytest.raises(ProcessLookupError):  # workers end, too
        time.sleep(1)
        os.killpg(run.process.pid, 0)
    assert "Traceback" not in run.output and run.checkpoints() == [2]
    flags = RUN | run.encoder
    again = train(**flags, output_dir=run.folder, resume_from_checkpoint="latest").ok()
    unbroken = train(**flags).ok()
    assert same_weights(again.prior(), unbroken.prior()) and again.losses() == unbroken.losses()


@pytest.mark.parametrize("cached", [False, True], ids=["training", "encoding"])
@pytest.mark.parametrize("fault", ["killed", "cannot send its batch"])
def test_a_worker_that_ends_is_one_line_with_the_way_out(train, tmp_path, fault, cached):
    def patch():
        script.BATCH_TIMEOUT = 1
        main_process, collate_fn = os.getpid(), script.collate_fn

        def collate_or_die(samples):  # as where the kernel lacks memory
            return collate_fn(samples) if os.getpid() == main_process else signal.raise_signal(signal.SIGKILL)

        unsendable = {"position": lambda: None, "skipped": []}
        script.collate_fn = collate_or_die if fault == "killed" else lambda samples: unsendable

    run = train(patch, timeout=60, cache_latents=cached, cache_dir=tmp_path / "cache", **READERS)
    assert run.error().startswith("--dataloader_num_workers=2: DataLoader worker (pid"), run
    assert "use fewer" in run.error() and "--train_batch_size" in run.error()
    assert ("cannot send its batch: " in run.output) == (fault != "killed")


def can_mount():
    command = ["unshare", "-m", "mount", "-t", "tmpfs", "tmpfs", "/dev/shm"]
    return shutil.which("unshare") and subprocess.run(command, capture_output=True).returncode == 0


def mount(*words):
    """Mounts something for this process and its children alone."""
    assert ctypes.CDLL(None).unshare(0x00020000) == 0  # CLONE_NEWNS
    subprocess.run(["mount", "--make-rprivate", "/"], check=True)
    subprocess.run(["mount", *map(str, words)], check=True)


needs_mounts = pytest.mark.skipif(not can_mount(), reason="it needs the right to mount")


@needs_mounts
@pytest.mark.parametrize("option", ["size=1m", "ro"])
def test_a_dev_shm_that_is_small_or_cannot_be_written_is_one_line(train, option):
    flags = {"resolution": 256, "train_batch_size": 16, "dataloader_num_workers": 2, "max_train_steps": 2}
    patch = functools.partial(mount, "-t", "tmpfs", "-o", option, "tmpfs", "/dev/shm")
    error = train(patch, timeout=60, **flags).error().lstrip("\0")  # PyTorch's SIGBUS handler writes one
    assert error.startswith("--dataloader_num_workers=2: ") and "use fewer" in error and "/dev/shm" in error


def test_workers_that_cannot_be_started_are_one_line_within_seconds(train):
    def limit_files():
        resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 20,) * 2)

    run = train(limit_files, timeout=15, **SHORT, dataloader_num_workers=16)
    assert run.error().startswith("--dataloader_num_workers=16: ") and "use fewer" in run.error()


@needs_mounts
def test_a_read_only_cache_is_read_if_it_is_whole_and_otherwise_one_line(train, tmp_path):
    patch = functools.partial(mount, "--bind", "-o", "ro", tmp_path, tmp_path)
    flags = SHORT | {"cache_latents": True, "cache_dir": tmp_path}
    expected, run = train(**flags).ok(), train(patch, **flags).ok()
    assert same_weights(run.prior(), expected.prior())
    error = train(patch, **flags, max_train_samples=9).error()
    assert error.startswith("--cache_dir=") and "Read-only" in error


# ----------------------------------------------------------------------------------------------------- errors

OUT_OF_MEMORY = """
def fail(*args):
    raise script.torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
script.check_finite = fail
"""
MESSAGE = "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB."


@pytest.mark.slow
def test_an_error_in_the_training_loop_ends_all_processes_and_their_workers(train_fresh):
    env = {"ACCELERATE_USE_CPU": "true"}
    run = train_fresh(launcher=LAUNCHER, env=env, patch=OUT_OF_MEMORY, wait=False, **READERS)
    while "OutOfMemoryError" not in run.output and run.process.poll() is None:
        time.sleep(0.1)
    assert run.finish(60).returncode == 1 and MESSAGE in run.output, run


@pytest.mark.parametrize(
    "error", [*script.BUGS, KeyError, UnboundLocalError, OSError, ValueError, RuntimeError]
)
def test_errors_of_users_are_one_line_and_bugs_are_raised(error, caplog):
    args, is_bug = script.parse_args(["--train_data_dir=x"]), issubclass(error, script.BUGS)
    with pytest.raises(error if is_bug else SystemExit) as caught, script.explain_errors(args, "resolution"):
        raise error("first line\nsecond")
    if not is_bug:
        kind = "" if error is ValueError else f"{error.__name__}: "
        assert str(caught.value) == f"--resolution=512: {kind}first line\\nsecond"
    script.logger.warning_once.cache_clear()
    for _ in range(2):
        with script.only_warn("The summary"):
            raise error("it is broken")
    (record,) = caplog.records
    assert "The summary failed, the run continues" in record.getMessage()
    assert bool(record.exc_info) == is_bug, "a traceback"


def test_two_runs_in_one_folder_are_refused(train, tmp_path):
    flags, lock = SHORT | {"output_dir": tmp_path}, functools.partial(filelock.FileLock, tmp_path / ".lock")

    def check():
        with pytest.raises(filelock.Timeout), lock(timeout=0):
            pass

    train(functools.partial(at_call, script, "load_prior", 1, check), **flags).ok()
    flags["overwrite_output_dir"] = True
    with lock():
        assert "another run is writing" in train(**flags).error()
    train(**flags).ok()


# ------------------------------------------------------------------------------------------- odd environments


@pytest.mark.slow
def test_a_run_works_with_the_environment_of_a_notebook_a_plain_terminal_and_a_long_tmpdir(
    train_fresh, images, tmp_path
):
    """In one process, as each takes long to start."""
    temporary = tmp_path / ("x" * (120 - len(str(tmp_path))))  # sockets in there would have too long a path
    temporary.mkdir()
    shutil.copytree(images, tmp_path / "images")
    env = {"MPLBACKEND": "module://matplotlib_inline.backend_inline", "HOME": tmp_path, "TMPDIR": temporary}
    env |= {"PYTHONIOENCODING": "ascii", "HF_DATASETS_CACHE": tmp_path / "cache"}
    flags = SHORT | {"train_data_dir": "~/images", "output_dir": "~/run", "dataloader_num_workers": 2}
    flags |= {"cache_latents": True, "validation_prompts": ["ein süßer Apfel", "\U0001f34e"]}
    run = train_fresh(env=env, **flags).ok()
    assert "Traceback" not in run.output
    assert (tmp_path / "run" / "README.md").read_text(encoding="utf-8").count("ein süßer Apfel") == 3
    assert not (run.cwd / "~").exists() and len(list((tmp_path / "run" / "samples").iterdir())) == 5


@pytest.mark.parametrize("precision", ["fp8", "int8"])
def test_a_precision_of_accelerates_configuration_that_is_not_supported_is_one_line(train, precision):
    error = train(env={"ACCELERATE_MIXED_PRECISION": precision}, **SHORT).error()
    assert error.startswith(f"accelerate config: mixed_precision={precision}")


def test_the_trackers_folder_may_lie_anywhere(train, tmp_path):
    elsewhere = SHORT | {"logging_dir": tmp_path / "logs"}
    for name in ("a", "b"):
        train(**elsewhere, output_dir=tmp_path / name).ok()
    train(**SHORT, logging_dir=".", output_dir=tmp_path / "c").ok()
    events = [str(path.relative_to(tmp_path).parent.parent) for path in tmp_path.rglob("events*")]
    assert {name.partition("/")[0] for name in events} == {"logs", "c"}
    longer = elsewhere | {"max_train_steps": 3, "resume_from_checkpoint": "latest"}
    train(**longer, output_dir=tmp_path / "a").ok()


@pytest.mark.slow
def test_main_can_be_called_again_in_a_process_and_in_a_thread(train, models, images, tmp_path):
    """As cells of a notebook and apps do. Each run is what it is in a process of its own."""
    bf16 = SHORT | {"mixed_precision": "bf16", "gradient_accumulation_steps": 2, "dataloader_num_workers": 1}

    def call_main(name, images=images, **flags):
        script.main([str(word) for word in tiny_args(models, images, tmp_path / name, **flags)])

    def call_earlier():
        with pytest.raises(SystemExit) as end:  # its traceback, which a notebook keeps, has the lock
            call_main("first", images=tmp_path / "nothing")
        call_main("first", **SHORT)
        del end
        filelock.FileLock(tmp_path / "first" / ".lock", timeout=0).acquire().lock.release()
        thread = threading.Thread(target=call_main, args=("thread",), kwargs=bf16)
        thread.start()
        thread.join()

    train(call_earlier, **bf16, output_dir=tmp_path / "last").ok()
    expected = {"first": train(**SHORT).ok(), "thread": train(**bf16).ok(), "last": train(**bf16).ok()}
    for name, other in expected.items():
        assert same_weights(Output(tmp_path / name).prior(), other.prior()), name
    assert not same_weights(expected["first"].prior(), expected["last"].prior())


# -------------------------------------------------------------------------------------------- untrusted input


def test_code_in_a_decoders_folder_is_not_run(train, models, tmp_path):
    decoder = Path(shutil.copytree(models / "decoder", tmp_path / "decoder"))
    (decoder / "vqgan" / "evil.py").write_text(f"open({str(tmp_path / 'evil')!r}, 'w')\nclass Evil: pass\n")
    index = json.loads((decoder / "model_index.json").read_text())
    (decoder / "model_index.json").write_text(json.dumps(index | {"vqgan": ["evil", "Evil"]}))
    run = train(**SHORT, pretrained_decoder_model_name_or_path=decoder)
    assert "the folder contains code" in run.error() and run.checkpoints() == []
    assert not (tmp_path / "evil").exists()
