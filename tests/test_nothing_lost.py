# SPDX-License-Identifier: Apache-2.0
"""What is left when a run is killed, told to stop, or finds its disk full, and that going on gives the same bits."""

import errno
import json
import multiprocessing
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from conftest import SCRIPT, tiny_args
from diffusers.training_utils import EMAModel
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_models import make_prior

import modeling_efficient_net_encoder as encoding
import train_text_to_image_prior as script

UPDATES = 7
RUN = {  # epochs of ten rows end inside updates 2, 4 and 7 and with update 5
    "train_batch_size": 2,
    "gradient_accumulation_steps": 3,
    "max_train_samples": 10,
    "max_train_steps": UPDATES,
    "checkpointing_steps": 2,
    "checkpoints_total_limit": 2,
    "use_ema": True,
    "caption_column": "captions",
    "lr_scheduler": "cosine",
    "learning_rate": 1e-3,
}


def weights(output_dir):
    return load_file(Path(output_dir) / "prior_pipeline" / "prior" / "diffusion_pytorch_model.safetensors")


def assert_same_bits(one, other):
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name], other[name]), name


@pytest.fixture(scope="module")
def unbroken(models, pictures, tmp_path_factory, run_main):
    output_dir = tmp_path_factory.mktemp("unbroken") / "run"
    result = run_main(tiny_args(models, pictures, output_dir, **RUN))
    assert result.returncode == 0, result
    return weights(output_dir)


# ------------------------------------------------------------------------------- killed at any file operation


WRITES = {"os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "shutil.rmtree"}


def kill_at(operation: int):
    """Kills this process when it is about to touch the file system for the `operation`-th time from now on."""
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
        self.prior, self.optimizer = self.accelerator.prepare(prior, torch.optim.AdamW(prior.parameters(), lr=1e-3))
        script.register_checkpoint_hooks(self.accelerator, self.ema)

    def update(self, step):
        """Puts the step's number into every weight, so that a checkpoint says which update it is of."""
        with torch.no_grad():
            for parameter in self.prior.parameters():
                parameter.fill_(step)

    def save(self, output_dir, step, limit):
        self.update(step)
        script.save_checkpoint(self.accelerator, output_dir, {"global_step": step, "plan": {}}, limit)


@pytest.fixture
def saver():
    yield Saver()
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def step_in(checkpoint):
    """The update that a checkpoint's tensors are of, all of them read."""
    tensors = load_file(checkpoint / "prior" / "diffusion_pytorch_model.safetensors")
    steps = {value for tensor in tensors.values() for value in tensor.unique().tolist()}
    assert len(steps) == 1, f"{checkpoint} mixes updates {steps}"
    torch.load(checkpoint / "optimizer.bin", weights_only=True)
    assert load_file(checkpoint / "prior_ema" / "diffusion_pytorch_model.safetensors").keys() == tensors.keys()
    return int(steps.pop())


def in_child(work):
    """The exit status of a forked process that does `work` (-9: killed)."""
    child = multiprocessing.get_context("fork").Process(target=work)
    child.start()
    child.join(120)
    assert child.exitcode is not None
    return child.exitcode


def test_a_kill_at_any_file_operation_of_saving_leaves_whole_checkpoints(saver, tmp_path):
    """Two checkpoints are kept, a third is written and the oldest deleted: at each operation the process dies once."""
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

        status = in_child(save)
        found = script.checkpoints_in(output_dir)
        steps = [step_in(path) for path in found]
        assert steps == [int(path.name.split("-")[1]) for path in found]
        assert steps in ([1, 2], [1, 2, 3], [2, 3]), f"killed at operation {operation}: {steps}"
        newest.add(steps[-1])
        script.remove_checkpoints(script.other_checkpoints(output_dir, found[-1]), output_dir)
        assert sorted(path.name for path in output_dir.iterdir()) == [path.name for path in found]
        saver.save(output_dir, 4, limit=2)  # as the run that goes on does
        assert [step_in(path) for path in script.checkpoints_in(output_dir)] == [steps[-1], 4]
        shutil.rmtree(output_dir)
    assert status == 0 and operation > 15 and newest == {2, 3}
    print(f"killed at each of {operation - 1} file operations")


@pytest.mark.parametrize("name", ["optimizer.bin", "prior/diffusion_pytorch_model.safetensors", script.STATE_FILE])
@pytest.mark.parametrize("harm", ["gone", "cut", "empty"])
def test_a_torn_checkpoint_is_passed_over(saver, tmp_path, name, harm):
    for step in (1, 2):
        saver.save(tmp_path, step, limit=None)
    file = tmp_path / "checkpoint-2" / name
    if harm == "gone":
        file.unlink()
    else:
        os.truncate(file, file.stat().st_size // 2 if harm == "cut" else 0)
    assert [path.name for path in script.checkpoints_in(tmp_path)] == ["checkpoint-1"]
    with pytest.raises(SystemExit, match="--resume_from_checkpoint"):
        script.find_checkpoint(str(tmp_path / "checkpoint-2"), tmp_path)


def test_what_is_not_a_checkpoint_is_passed_over(saver, tmp_path):
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
    (tmp_path / "checkpoint-14").write_text("a file")
    assert [path.name for path in script.checkpoints_in(tmp_path)] == ["checkpoint-9", "checkpoint-10"]
    assert script.find_checkpoint("latest", tmp_path).name == "checkpoint-10"
    saver.save(tmp_path, 11, limit=2)  # over the empty folder of that name
    assert [step_in(path) for path in script.checkpoints_in(tmp_path)] == [10, 11]
    assert (tmp_path / "checkpoint-best").is_dir(), "pruning deleted what is none of its business"


# ------------------------------------------------------------------------------------------------- full disks


def test_a_full_disk_costs_the_checkpoint_and_not_the_run(saver, tmp_path):
    saver.save(tmp_path, 1, limit=1)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    largest = max(path.stat().st_size for path in (tmp_path / "checkpoint-1").rglob("*"))

    def save():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest // 2, before[1]))
        saver.save(tmp_path, 2, limit=1)

    assert in_child(save) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]
    assert step_in(tmp_path / "checkpoint-1") == 1
    saver.save(tmp_path, 3, limit=1)  # there is room again
    assert [step_in(path) for path in script.checkpoints_in(tmp_path)] == [3]


@pytest.mark.parametrize("call", ["fsync", "rename"])
def test_a_failing_flush_or_rename_costs_the_checkpoint_and_not_the_run(saver, tmp_path, monkeypatch, call):
    saver.save(tmp_path, 1, limit=1)

    def fail(*args, **kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(*((script.os, "fsync") if call == "fsync" else (Path, "rename")), fail)
        saver.save(tmp_path, 2, limit=1)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]


def test_a_run_on_a_disk_that_fills_up_says_so_at_the_end(models, pictures, tmp_path, run_main, monkeypatch):
    def fail(*args, **kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(script, "flush_to_disk", fail)
    monkeypatch.setattr(script, "save_parts", fail)
    result = run_main(tiny_args(models, pictures, tmp_path / "run", checkpointing_steps=1))
    assert result.returncode == 1 and "Traceback" not in result.output
    assert result.output.count("the run goes on without it") == 3
    assert "--output_dir" in result.output.splitlines()[-1] and "No space left" in result.output.splitlines()[-1]


def test_a_disk_too_full_for_pictures_and_curves_does_not_end_a_run(
    models, pictures, tmp_path, run_main, monkeypatch, unbroken
):
    def fail(*args, **kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(script.encoding, "contact_sheet", fail)
    monkeypatch.setattr(script.encoding, "loss_curve", fail)
    args = tiny_args(models, pictures, tmp_path / "run", **RUN, validation_prompts="a red apple", validation_epochs=1)
    result = run_main(args)
    assert result.returncode == 0, result
    assert_same_bits(weights(tmp_path / "run"), unbroken)


# ------------------------------------------------------------------------------------ killed and told to stop


@pytest.mark.parametrize("operation", [1, 9, 17])
def test_a_run_killed_while_saving_ends_in_the_bits_of_the_unbroken_one(
    models, pictures, tmp_path, run_main, monkeypatch, unbroken, operation
):
    """The process dies inside its second save; foreign and torn folders lie about when it goes on."""
    original = script.save_checkpoint

    def save(accelerator, output_dir, state, limit):
        if state["global_step"] == 4:
            kill_at(operation)
        original(accelerator, output_dir, state, limit)

    output_dir = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(script, "save_checkpoint", save)
        assert run_main(tiny_args(models, pictures, output_dir, **RUN)).returncode == -9
    shutil.copytree(output_dir / "checkpoint-2", output_dir / "checkpoint-9")
    (output_dir / "checkpoint-9" / "optimizer.bin").unlink()
    (output_dir / "checkpoint-mine").mkdir()
    result = run_main(tiny_args(models, pictures, output_dir, **RUN, resume_from_checkpoint="latest"))
    assert result.returncode == 0, result
    assert_same_bits(weights(output_dir), unbroken)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "call", "operation"),
    [
        ("next_batch", 8, 0),  # inside an accumulation
        ("read_numbers", 5, 0),  # before the optimizer's step
        ("log_validation", 1, 0),  # with the average in the prior's place
        ("log_validation", 1, 2),  # while the pictures are written
        ("save_result", 1, 3),  # the result half-written
        ("save_parts", 3, 5),  # the decoder, after prior_pipeline/
        ("save_model_card", 1, 0),
    ],
)
def test_a_run_killed_at_any_other_moment_ends_in_the_same_bits(
    models, pictures, tmp_path, run_main, monkeypatch, unbroken, name, call, operation
):
    module = encoding if name == "next_batch" else script
    original, calls = getattr(module, name), []

    def count(*args, **kwargs):
        calls.append(name)
        if len(calls) == call:
            if not operation:
                os.kill(os.getpid(), signal.SIGKILL)
            kill_at(operation)
        return original(*args, **kwargs)

    args = tiny_args(models, pictures, tmp_path / "run", **RUN, validation_prompts="a red apple", validation_epochs=1)
    with monkeypatch.context() as patch:
        patch.setattr(module, name, count)
        killed = run_main([*args, "--resume_from_checkpoint=latest"])  # there is none: it starts anew
    assert killed.returncode == -9, killed
    result = run_main([*args, "--resume_from_checkpoint=latest"])
    assert result.returncode == 0, result
    assert_same_bits(weights(tmp_path / "run"), unbroken)


STOPPER = """
import os, signal, sys
sys.path.insert(0, os.path.dirname(sys.argv[1]))
import train_text_to_image_prior as script
original, updates = script.read_numbers, []
def read_numbers(*args):
    updates.append(None)
    if len(updates) == 3 and os.environ.get("RANK", "0") == os.environ["STOP_RANK"]:
        os.kill(os.getpid(), getattr(signal, os.environ["STOP_SIGNAL"]))
    return original(*args)
script.read_numbers = read_numbers
script.main(sys.argv[2:])
"""


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_a_signal_ends_the_update_and_leaves_a_checkpoint(
    models, pictures, tmp_path, run_main, monkeypatch, unbroken, name
):
    original, updates = script.read_numbers, []

    def read_numbers(*args):
        updates.append(None)
        if len(updates) == 3:
            os.kill(os.getpid(), getattr(signal, name))
        return original(*args)

    output_dir = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(script, "read_numbers", read_numbers)
        result = run_main(tiny_args(models, pictures, output_dir, **RUN, dataloader_num_workers=2))
    assert result.returncode == 128 + getattr(signal, name), result
    assert "--resume_from_checkpoint=latest" in result.output and "Traceback" not in result.output
    steps = [
        json.loads((path / script.STATE_FILE).read_text())["global_step"] for path in script.checkpoints_in(output_dir)
    ]
    assert steps[-1] in (3, 4), "the update in progress, or the next if the signal came as it ended"
    assert not (output_dir / "prior_pipeline").exists()
    result = run_main(tiny_args(models, pictures, output_dir, **RUN, resume_from_checkpoint="latest"))
    assert result.returncode == 0, result
    assert_same_bits(weights(output_dir), unbroken)


def test_signals_are_the_systems_again_after_training():
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with encoding.noted_signals():
        assert signal.getsignal(signal.SIGTERM) not in before
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


def test_a_second_signal_ends_the_process_at_once(tmp_path):
    def work():
        with encoding.noted_signals() as received:
            os.kill(os.getpid(), signal.SIGTERM)
            assert received == [signal.SIGTERM]
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(60)

    assert in_child(work) == 128 + signal.SIGINT


@pytest.mark.slow
@pytest.mark.parametrize("rank", ["0", "1"])
def test_two_ranks_stop_at_the_same_update_and_go_on_exactly(models, pictures, tmp_path, rank):
    """Only one rank gets the signal; both leave after the same update."""
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
    assert script.checkpoints_in(output_dir), stopped.stderr[-3000:]
    assert run([*args, "--resume_from_checkpoint=latest"], STOP_RANK="none").returncode == 0
    whole = tmp_path / "whole"
    arguments = tiny_args(models, pictures, whole, **RUN | {"train_batch_size": 1})
    assert run(arguments, STOP_RANK="none").returncode == 0
    assert_same_bits(weights(output_dir), weights(whole))


# ---------------------------------------------------------------------------------------- older checkpoints


def test_going_back_to_an_older_checkpoint_needs_leave_to_delete_the_newer(
    models, pictures, tmp_path, run_main, unbroken
):
    output_dir = tmp_path / "run"
    args = tiny_args(models, pictures, output_dir, **RUN | {"checkpoints_total_limit": None})
    assert run_main(args).returncode == 0
    back = [*args, "--resume_from_checkpoint", output_dir / "checkpoint-2"]
    refused = run_main(back)
    assert refused.returncode == 1 and "--overwrite_output_dir" in refused.output.splitlines()[-1]
    assert len(script.checkpoints_in(output_dir)) == 3
    assert run_main([*back, "--overwrite_output_dir"]).returncode == 0
    assert_same_bits(weights(output_dir), unbroken)


def test_a_finished_run_is_resumed_without_another_update(models, pictures, tmp_path, run_main):
    output_dir = tmp_path / "run"
    args = tiny_args(models, pictures, output_dir, checkpointing_steps=3)
    assert run_main(args).returncode == 0
    before = weights(output_dir)
    shutil.rmtree(output_dir / "prior_pipeline")
    result = run_main([*args, "--resume_from_checkpoint=latest"])
    assert result.returncode == 0 and "nothing is left to train" in result.output, result
    assert_same_bits(weights(output_dir), before)


# ------------------------------------------------------------------------------------------ the order of samples


@settings(deadline=None, max_examples=60)
@given(
    rows=st.integers(1, 40),
    batch=st.integers(1, 5),
    accumulation=st.integers(1, 4),
    ranks=st.integers(1, 3),
    updates=st.integers(1, 12),
    data=st.data(),
)
def test_the_sequence_of_rows_and_captions_is_the_unbroken_one(rows, batch, accumulation, ranks, updates, data):
    """Whatever the epoch's length, wherever it stops: what follows is what would have followed, on every rank."""
    stop = data.draw(st.integers(0, updates))
    plan = {"train_batch_size": batch, "gradient_accumulation_steps": accumulation, "processes": ranks}

    def read(row, draw):
        return {"what": (row, draw.random())}

    samples = encoding.TrainSamples(range(rows), read, seed=3, skip_bad_rows=False)

    def sequence(first, last, rank):
        batches = encoding.micro_batches(first, last, plan, rank)
        return [[(position, samples[position]["what"]) for position in positions] for positions in batches]

    seen = []
    for rank in range(ranks):
        unbroken_sequence = sequence(0, updates, rank)
        assert sequence(0, stop, rank) + sequence(stop, updates, rank) == unbroken_sequence
        assert len(unbroken_sequence) == updates * accumulation
        seen += [item for micro_batch in unbroken_sequence for item in micro_batch]
    seen.sort()
    assert [position for position, _ in seen] == list(range(updates * accumulation * batch * ranks))
    for epoch in range(len(seen) // rows):
        assert sorted(row for _, (row, _) in seen[epoch * rows : (epoch + 1) * rows]) == list(range(rows))


# ---------------------------------------------------------------------------------- what may change on resuming


@pytest.fixture(scope="module")
def halfway(models, pictures, tmp_path_factory, run_main):
    """The arguments of a run that has ended, and its checkpoint from before its last update."""
    output_dir = tmp_path_factory.mktemp("halfway") / "run"
    flags = {"max_train_steps": 3, "checkpointing_steps": 2, "report_to": "tensorboard", "lr_scheduler": "linear"}
    flags["lr_warmup_steps"] = 0
    assert run_main(tiny_args(models, pictures, output_dir, **flags)).returncode == 0
    return flags, output_dir / "checkpoint-2"


def rates(output_dir):
    """The rate logged at each update."""
    (folder,) = {path.parent for path in Path(output_dir, "logs").glob("*/events*")}
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    return {event.step: event.value for event in events.Scalars("lr")}


def test_another_learning_rate_and_length_hold_on_resuming(models, pictures, tmp_path, run_main, halfway):
    flags, checkpoint = halfway
    flags = flags | {"learning_rate": 5e-4, "max_train_steps": 5, "resume_from_checkpoint": checkpoint}
    result = run_main(tiny_args(models, pictures, tmp_path / "on", **flags))
    assert result.returncode == 0, result
    assert rates(tmp_path / "on") == pytest.approx({3: 5e-4 * 2 / 5, 4: 5e-4 / 5, 5: 0})


def test_another_data_set_of_the_same_size_is_refused(models, pictures, tmp_path, run_main, halfway):
    flags, checkpoint = halfway
    shutil.copytree(pictures, tmp_path / "others")
    lines = (pictures / "metadata.jsonl").read_text().splitlines()
    rows = [json.loads(line) | {"text": f"caption {index}"} for index, line in enumerate(lines)]
    (tmp_path / "others" / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    flags = flags | {"resume_from_checkpoint": checkpoint}
    result = run_main(tiny_args(models, tmp_path / "others", tmp_path / "on", **flags))
    assert result.returncode == 1 and "captions" in result.output.splitlines()[-1], result


class Payload:
    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return os.mkdir, (str(self.file),)


@pytest.mark.parametrize("name", ["optimizer.bin", "random_states_0.pkl"])
def test_code_in_a_checkpoint_does_not_run(models, pictures, tmp_path, run_main, halfway, name):
    flags, checkpoint = halfway
    poisoned = tmp_path / checkpoint.name
    shutil.copytree(checkpoint, poisoned)
    torch.save({"state": Payload(tmp_path / "ran")}, poisoned / name)
    state = json.loads((poisoned / script.STATE_FILE).read_text())
    state["files"][name] = (poisoned / name).stat().st_size
    (poisoned / script.STATE_FILE).write_text(json.dumps(state))
    result = run_main(tiny_args(models, pictures, tmp_path / "on", **flags, resume_from_checkpoint=poisoned))
    assert not (tmp_path / "ran").exists()
    if name == "optimizer.bin":  # the random states are not used: every update seeds its own
        assert result.returncode == 1 and "--resume_from_checkpoint" in result.output.splitlines()[-1], result
    torch.load(poisoned / name, weights_only=False)  # the payload does work
    assert (tmp_path / "ran").exists()


# ------------------------------------------------------------------------------------ broken rows and numbers


@pytest.fixture(scope="module")
def broken_pictures(pictures, tmp_path_factory):
    """Ten rows; the picture of row 3 is cut off, and row 7 has no caption."""
    folder = tmp_path_factory.mktemp("broken")
    rows = [json.loads(line) for line in (pictures / "metadata.jsonl").read_text().splitlines()[:10]]
    for row in rows:
        shutil.copy(pictures / row["file_name"], folder)
    os.truncate(folder / rows[3]["file_name"], 900)
    rows[7]["text"] = None
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def test_bad_rows_are_named_once_counted_and_the_run_resumes_exactly(models, broken_pictures, tmp_path, run_main):
    flags = {"skip_bad_rows": True, "max_train_steps": 8, "checkpointing_steps": 3, "use_ema": True}
    whole = run_main(tiny_args(models, broken_pictures, tmp_path / "whole", **flags))
    assert whole.returncode == 0, whole
    assert whole.output.count("Left out: row 3 ") == 1 and whole.output.count("Left out: row 7 ") == 1
    assert "2 rows left out so far, at the end of epoch 3" in whole.output
    flags |= {"resume_from_checkpoint": tmp_path / "whole" / "checkpoint-3", "dataloader_num_workers": 2}
    assert run_main(tiny_args(models, broken_pictures, tmp_path / "on", **flags)).returncode == 0
    assert_same_bits(weights(tmp_path / "whole"), weights(tmp_path / "on"))


def test_a_data_set_that_is_mostly_broken_is_refused(models, broken_pictures, tmp_path, run_main):
    for path in broken_pictures.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes()[: None if path.suffix == ".jsonl" else 900])
    flags = {"skip_bad_rows": True, "max_train_steps": 200}
    result = run_main(tiny_args(models, tmp_path, tmp_path / "run", **flags))
    assert result.returncode == 1 and "12 rows in a row cannot be read" in result.output.splitlines()[-1], result


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(("loss", "stops"), [(1.0, False), (NAN, True), (INF, True)])
@pytest.mark.parametrize(
    ("scale", "stops_fp16"), [(None, None), (2.0**16, False), (2.0**-20, False), (2.0**-21, True)]
)
def test_what_is_not_finite_stops_the_run_and_fp16s_overflows_do_not_until_they_never_end(
    saver, tmp_path, loss, stops, scale, stops_fp16
):
    saver.save(tmp_path, 4, limit=None)
    stops = stops if scale is None else stops_fp16
    accelerator = SimpleNamespace(scaler=scale and torch.amp.GradScaler("cpu", init_scale=scale))
    if accelerator.scaler:
        accelerator.scaler.scale(torch.ones(()))  # the scale is made when it is first used
    with pytest.raises(SystemExit, match=r"before update 5.*checkpoint-4") if stops else nullcontext():
        script.refuse_broken_numbers(accelerator, tmp_path, 5, loss, 1.0, {})


def tensors_in(entry):
    """The tensors of a dict of them, and of the dicts in it."""
    for value in entry.values():
        if isinstance(value, dict):
            yield from tensors_in(value)
        elif torch.is_tensor(value):
            yield value


def test_eight_bit_adam_resumes_exactly(models, pictures, tmp_path, run_main):
    flags = RUN | {"use_8bit_adam": True}
    assert run_main(tiny_args(models, pictures, tmp_path / "whole", **flags)).returncode == 0
    state = torch.load(tmp_path / "whole" / "checkpoint-4" / "optimizer.bin", weights_only=True)["state"]
    assert "torch.uint8" in str([[str(value.dtype) for value in tensors_in(entry)] for entry in state.values()])
    flags |= {"resume_from_checkpoint": tmp_path / "whole" / "checkpoint-4"}
    assert run_main(tiny_args(models, pictures, tmp_path / "on", **flags)).returncode == 0
    assert_same_bits(weights(tmp_path / "whole"), weights(tmp_path / "on"))
