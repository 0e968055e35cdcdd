# SPDX-License-Identifier: Apache-2.0
"""Signals, worker processes, errors and odd environments: a run stops where it can be continued, ends with an
error and a status that is not 0 where it cannot go on, and starts wherever there is no reason not to."""

import contextlib
import ctypes
import functools
import inspect
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import threading
import time
from pathlib import Path

import filelock
import pytest
from conftest import load_weights, same_weights, script, tiny_args

# An epoch ends with step 5, and inside 2, 4 and 7; validation is due there.
RUN = {"train_batch_size": 2, "gradient_accumulation_steps": 3, "max_train_samples": 10, "max_train_steps": 7}
RUN |= {"checkpointing_steps": 2, "checkpoints_total_limit": 2, "use_ema": True, "learning_rate": 1e-3}
RUN |= {"validation_prompts": "a red apple", "validation_epochs": 1}
SHORT = {"train_batch_size": 2, "max_train_steps": 2}
READERS = {"train_batch_size": 2, "max_train_steps": 20, "dataloader_num_workers": 2}
LAUNCHER = ("-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=29711")


def at_call(owner, name, call, action, rank=None):
    """Replaces a function by itself, but at its `call`-th call, of a rank, `action` is called first."""
    function, calls = getattr(owner, name), []

    @functools.wraps(function)
    def counted(*args, **kwargs):
        calls.append(None)
        if len(calls) == call and rank in (None, os.environ.get("RANK")):
            action()
        return function(*args, **kwargs)

    setattr(owner, name, counted)


def send(number):
    os.kill(os.getpid(), number)


def last_line(run):
    assert "Traceback" not in run.output, run
    return run.output.strip().splitlines()[-1]


def steps_of(folder):
    return [script.read_state(checkpoint)["global_step"] for checkpoint in script.list_checkpoints(folder)]


@pytest.fixture(scope="module")
def unbroken(train):
    """A run that nothing interrupts."""
    run = train(**RUN)
    assert run.returncode == 0, run
    return run


def assert_resumes(train, run, unbroken, **flags):
    again = train(**RUN | flags, output_dir=run.folder, resume_from_checkpoint="latest")
    assert again.returncode == 0, again
    assert same_weights(again.prior(), unbroken.prior()) and again.losses() == unbroken.losses()
    assert {name: pixels.tobytes() for name, pixels in again.samples().items()} == {
        name: pixels.tobytes() for name, pixels in unbroken.samples().items()
    }


# ---------------------------------------------------------------------------------------------------- signals

STOPPED = {
    "within a step": (signal.SIGTERM, "encode_batch", 8, [2, 3]),
    "too late for its step": (signal.SIGINT, "check_finite", 3, [2, 4]),
    "while it saves": (signal.SIGTERM, "save_checkpoint", 1, [2, 3]),
    "while it validates": (signal.SIGINT, "generate_images", 2, [2, 3]),
    "before a validation": (signal.SIGHUP, "encode_batch", 10, [2, 4]),
}


@pytest.mark.parametrize(
    "case",
    [pytest.param(case, marks=[pytest.mark.slow] * (i in (1, 2, 3))) for i, case in enumerate(STOPPED)],
)
def test_a_signal_ends_the_run_after_the_step_with_a_checkpoint(train, unbroken, tmp_path, case):
    number, name, call, steps = STOPPED[case]

    def patch():
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # under nohup, it would be ignored
        at_call(script, name, call, functools.partial(send, number))

    run = train(patch, **RUN, dataloader_num_workers=2, output_dir=tmp_path / "run")
    assert run.returncode == 128 + number, run
    assert "--resume_from_checkpoint=latest continues" in run.output and "Traceback" not in run.output
    assert steps_of(run.folder) == steps and not (run.folder / "prior_pipeline").exists()
    assert_resumes(train, run, unbroken)


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("save_checkpoint", "save_model_card")]


@pytest.mark.parametrize("name", ["save_pipeline", *SLOW])
def test_a_signal_after_the_last_step_ends_the_run(train, unbroken, tmp_path, name):
    """The last checkpoint is completed. Later nothing is, and Python's handlers are back."""
    flags = RUN | {"checkpointing_steps": 7, "output_dir": tmp_path / "run"}
    terminate = functools.partial(send, signal.SIGTERM)
    run = train(functools.partial(at_call, script, name, 1, terminate), **flags)
    assert run.returncode == (128 + signal.SIGTERM if name == "save_checkpoint" else -signal.SIGTERM), run
    assert steps_of(run.folder) == [7] and "Traceback" not in run.output
    assert (run.folder / "prior_pipeline").exists() == (name == "save_model_card")
    assert not (run.folder / "README.md").exists()
    assert_resumes(train, run, unbroken, checkpointing_steps=7)
    assert (run.folder / "README.md").exists()


@pytest.mark.parametrize("rank", ["0", pytest.param("1", marks=pytest.mark.slow)])
def test_ranks_stop_after_the_same_step_when_one_gets_a_signal_and_resume_exactly(
    train_ranks, tmp_path, rank
):
    flags = RUN | {"train_batch_size": 1, "validation_prompts": None}
    terminate = functools.partial(send, signal.SIGTERM)
    patch = functools.partial(at_call, script, "check_finite", 3, terminate, rank)
    stopped = train_ranks(patch, **flags, output_dir=tmp_path / "run")
    assert [run.returncode for run in stopped] == [143, 143], stopped
    assert steps_of(tmp_path / "run") == [2, 4]
    resumed = train_ranks(**flags, output_dir=tmp_path / "run", resume_from_checkpoint="latest")
    whole = train_ranks(**flags)
    assert [run.returncode for run in (*resumed, *whole)] == [0, 0, 0, 0], (resumed, whole)
    assert same_weights(resumed[0].prior(), whole[0].prior())


@pytest.mark.parametrize("older", [False, True])
def test_a_stop_whose_checkpoint_failed_has_a_status_of_its_own(train, older):
    def patch():
        at_call(script, "encode_batch", 3, functools.partial(send, signal.SIGTERM))
        at_call(script, "flush_to_disk", 3 if older else 1, functools.partial(os.listdir, "/gone"))

    run = train(patch, **SHORT | {"max_train_steps": 20, "checkpointing_steps": 2 if older else 20})
    assert run.returncode == 74, run
    assert "checkpoint-3 was not saved" in run.output and "latest continues" not in run.output
    assert steps_of(run.folder) == [2] * older


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
    def work():
        received = []
        with script.deferred_signals(received):
            for number in signals:
                send(number)
        os._exit(0 if received == signals else 1)

    child = multiprocessing.get_context("fork").Process(target=work)
    child.start()
    child.join(60)
    assert child.exitcode == status


def test_handlers_are_restored_after_training_and_signals_that_nohup_ignores_stay_ignored():
    stop_signals = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    hangup = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        before = [signal.getsignal(number) for number in stop_signals]
        received = []
        with script.deferred_signals(received):
            assert [signal.getsignal(n) == b for n, b in zip(stop_signals, before, strict=True)] == [0, 0, 1]
            send(signal.SIGHUP)
        assert [signal.getsignal(number) for number in stop_signals] == before and not received
    finally:
        signal.signal(signal.SIGHUP, hangup)


@pytest.mark.slow
@pytest.mark.parametrize("stream", ["closed", "reader gone"])
def test_a_closed_terminal_does_not_cost_a_checkpoint(train_fresh, stream):
    wrapper = ("sh", "-c", 'exec "$@" >&- 2>&-', "sh") if stream == "closed" else ()
    flags = SHORT | {"max_train_steps": 5000, "checkpointing_steps": 5000}
    run = train_fresh(wrapper=wrapper, wait=False, stdout=subprocess.PIPE, **flags)
    losses = run.folder / "loss.jsonl"
    while not (losses.exists() and losses.read_text().count("\n") > 2):
        assert run.process.poll() is None
        time.sleep(0.1)
    run.process.stdout.close()
    run.process.send_signal(signal.SIGTERM)
    assert run.finish(60).returncode == 128 + signal.SIGTERM
    assert len(steps_of(run.folder)) == 1


# ---------------------------------------------------------------------------------------------------- workers


def block_samples(script, positions, seconds, folder):
    """Makes reading each of the samples at `positions` take `seconds`, the first time. Meanwhile there is a
    file of that name in `folder`."""
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
def test_a_run_waits_for_slow_storage_and_says_so_once(train, unbroken, tmp_path):
    patch = functools.partial(block_samples, script, (20, 22, 32, 34), 3.5, tmp_path)
    run = train(patch, **RUN, dataloader_num_workers=2)
    assert run.returncode == 0 and len(list(tmp_path.glob("blocked-*"))) == 4, run
    assert run.output.count("Waiting for a batch for 1 seconds") == 1
    assert same_weights(run.prior(), unbroken.prior())


@pytest.mark.slow
def test_a_signal_ends_a_run_whose_storage_hangs(train, train_fresh, unbroken, tmp_path):
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
    assert "Traceback" not in run.output and steps_of(run.folder) == [2]
    assert_resumes(train, run, unbroken)


@pytest.mark.parametrize("cached", [False, True], ids=["training", "encoding"])
@pytest.mark.parametrize("fault", ["killed", "cannot send its batch"])
def test_a_worker_that_ends_is_one_line_with_the_way_out(train, tmp_path, fault, cached):
    def patch():
        script.BATCH_TIMEOUT = 1
        main_process, collate_fn = os.getpid(), script.collate_fn

        def collate_or_die(samples):  # as where the kernel lacks memory
            return collate_fn(samples) if os.getpid() == main_process else send(signal.SIGKILL)

        unsendable = {"position": lambda: None, "skipped": []}
        script.collate_fn = collate_or_die if fault == "killed" else lambda samples: unsendable

    run = train(patch, timeout=60, cache_latents=cached, cache_dir=tmp_path / "cache", **READERS)
    assert run.returncode == 1, run
    assert last_line(run).startswith("--dataloader_num_workers=2: DataLoader worker (pid"), run
    assert "use fewer" in last_line(run) and "--train_batch_size" in last_line(run)
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
    run = train(
        functools.partial(mount, "-t", "tmpfs", "-o", option, "tmpfs", "/dev/shm"), timeout=60, **flags
    )
    assert run.returncode == 1 and "Traceback" not in run.output, run
    assert last_line(run).startswith("--dataloader_num_workers=2: "), run
    assert option == "ro" or ("use fewer" in last_line(run) and "/dev/shm" in last_line(run)), run


@needs_mounts
@pytest.mark.parametrize("is_whole", [True, False])
def test_a_read_only_cache_is_read_if_it_is_whole_and_otherwise_one_line(train, tmp_path, is_whole):
    flags = SHORT | {"cache_latents": True, "cache_dir": tmp_path}
    expected = train(**flags | {"seed": 0 if is_whole else 1, "max_train_samples": None if is_whole else 9})
    assert expected.returncode == 0, expected
    run = train(functools.partial(mount, "--bind", "-o", "ro", tmp_path, tmp_path), **flags)
    assert run.returncode == (0 if is_whole else 1), run
    if is_whole:
        assert same_weights(run.prior(), expected.prior())
    else:
        assert last_line(run).startswith("--cache_dir=") and "Read-only" in last_line(run), run


# ----------------------------------------------------------------------------------------------------- errors

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
    launcher, env = LAUNCHER if ranks > 1 else (), {"ACCELERATE_USE_CPU": "true"}
    run = train_fresh(launcher=launcher, env=env, patch=OUT_OF_MEMORY, wait=False, **READERS)
    while "OutOfMemoryError" not in run.output and run.process.poll() is None:
        time.sleep(0.1)
    assert run.finish(60).returncode == 1, run
    assert MESSAGE in run.output if ranks > 1 else run.output.strip().splitlines()[-1] == MESSAGE, run


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
    def wait():
        (tmp_path / "started").touch()
        while not (tmp_path / "refused").exists():
            time.sleep(0.05)

    first, flags = [], SHORT | {"output_dir": tmp_path / "run"}
    patch = functools.partial(at_call, script, "load_prior", 1, wait)
    thread = threading.Thread(target=lambda: first.append(train(patch, **flags)))
    thread.start()
    while not (tmp_path / "started").exists():
        time.sleep(0.05)
    second = train(**flags, overwrite_output_dir=True)
    (tmp_path / "refused").touch()
    thread.join()
    assert second.returncode == 1 and "another run is writing" in last_line(second), second
    assert first[0].returncode == 0, first[0]
    assert train(**flags, overwrite_output_dir=True).returncode == 0, "the lock ends with its process"


# ------------------------------------------------------------------------------------------- odd environments


@pytest.mark.slow
def test_a_run_works_with_the_environment_of_a_notebook_a_plain_terminal_and_a_long_tmpdir(
    train_fresh, images, tmp_path
):
    """In one process, as each takes long to start."""
    temporary = tmp_path / ("x" * (120 - len(str(tmp_path))))  # sockets in there would have too long a path
    temporary.mkdir()
    shutil.copytree(images, tmp_path / "images")
    env = {"MPLBACKEND": "module://not_installed.backend_inline", "HOME": tmp_path, "TMPDIR": temporary}
    env |= {"PYTHONIOENCODING": "ascii", "HF_DATASETS_CACHE": tmp_path / "cache"}
    flags = SHORT | {"train_data_dir": "~/images", "output_dir": "~/run", "dataloader_num_workers": 2}
    run = train_fresh(
        env=env, **flags, cache_latents=True, validation_prompts=["ein süßer Apfel", "\U0001f34e"]
    )
    assert run.returncode == 0 and "Traceback" not in run.output, run
    assert (tmp_path / "run" / "README.md").read_text(encoding="utf-8").count("ein süßer Apfel") == 3
    assert not (run.cwd / "~").exists() and len(list((tmp_path / "run" / "samples").iterdir())) == 5


@pytest.mark.parametrize("precision", ["fp8", "int8"])
def test_a_precision_of_accelerates_configuration_that_is_not_supported_is_one_line(train, precision):
    run = train(env={"ACCELERATE_MIXED_PRECISION": precision}, **SHORT)
    assert run.returncode == 1, run
    assert last_line(run).startswith(f"accelerate config: mixed_precision={precision}")


def test_the_trackers_folder_may_lie_anywhere(train, tmp_path):
    elsewhere = SHORT | {"logging_dir": tmp_path / "logs"}
    runs = [train(**elsewhere, output_dir=tmp_path / name) for name in ("a", "b")]
    runs.append(train(**SHORT, logging_dir=".", output_dir=tmp_path / "c"))
    assert [run.returncode for run in runs] == [0, 0, 0], runs
    events = [str(path.relative_to(tmp_path).parent.parent) for path in tmp_path.rglob("events*")]
    assert {name.partition("/")[0] for name in events} == {"logs", "c"}
    again = train(
        **elsewhere | {"max_train_steps": 3}, output_dir=tmp_path / "a", resume_from_checkpoint="latest"
    )
    assert again.returncode == 0, again


@pytest.mark.slow
def test_main_can_be_called_again_in_a_process_and_in_a_thread(train, models, images, tmp_path):
    """As cells of a notebook and apps do. Each run is what it is in a process of its own."""
    bf16 = SHORT | {"mixed_precision": "bf16", "gradient_accumulation_steps": 2, "dataloader_num_workers": 1}
    broken = tiny_args(models, tmp_path / "nothing", tmp_path / "broken")

    def call_earlier():
        with contextlib.suppress(SystemExit):
            script.main(list(map(str, broken)))
        script.main(list(map(str, tiny_args(models, images, tmp_path / "first", **SHORT))))
        filelock.FileLock(tmp_path / "first" / ".lock", timeout=0).acquire().lock.release()
        args = list(map(str, tiny_args(models, images, tmp_path / "thread", **bf16)))
        thread = threading.Thread(target=script.main, args=(args,))
        thread.start()
        thread.join()

    run = train(call_earlier, **bf16, output_dir=tmp_path / "last")
    assert run.returncode == 0, run
    expected, in_bf16 = train(**SHORT), train(**bf16)
    names = {"first": expected, "thread": in_bf16, "last": in_bf16}
    for name, other in names.items():
        files = [folder / "prior_pipeline" / "prior" for folder in (tmp_path / name, other.folder)]
        assert same_weights(*map(load_weights, files)), name
    assert not same_weights(expected.prior(), in_bf16.prior())


# -------------------------------------------------------------------------------------------- untrusted input


def test_code_in_a_decoders_folder_is_not_run(train, models, tmp_path):
    decoder = Path(shutil.copytree(models / "decoder", tmp_path / "decoder"))
    (decoder / "vqgan" / "evil.py").write_text(f"open({str(tmp_path / 'evil')!r}, 'w')\nclass Evil: pass\n")
    index = json.loads((decoder / "model_index.json").read_text())
    (decoder / "model_index.json").write_text(json.dumps(index | {"vqgan": ["evil", "Evil"]}))
    prompts = {"validation_prompts": "a red apple", "pretrained_decoder_model_name_or_path": decoder}
    run = train(**SHORT, **prompts)
    assert run.returncode == 0 and len(run.samples()) == 2, run
    assert not (tmp_path / "evil").exists()
