# SPDX-License-Identifier: Apache-2.0
"""Several processes, over gloo: what is refused, what they share, and how the others end when one does.
`train_ranks` gives each rank an empty folder to run in, so with a relative path each has a folder of its own,
as on nodes that share none."""

import functools
import itertools
import os
import re
import signal
import time
from datetime import timedelta
from functools import partial

import pytest
import torch
from conftest import distance, load_optimizer_state, same_weights, script

FLAGS = {"train_batch_size": 2, "max_train_samples": 24, "learning_rate": 1e-3}
FLAGS |= {"max_train_steps": 4, "checkpointing_steps": 2}
VALIDATED = FLAGS | {"validation_prompts": ["an owl"], "validation_split": 5, "validation_steps": 3}


def finished(runs):
    assert all(run.returncode == 0 for run in runs), runs
    return runs


def on_call(name, number, rank, action):
    """Calls `action` on a rank at the start of a call of one of the script's functions."""
    *owner, attribute = name.split(".")
    owner = functools.reduce(getattr, owner, script)
    function, calls = getattr(owner, attribute), []

    def call(*args, **kwargs):
        calls.append(None)
        if len(calls) == number and os.environ.get("RANK") == str(rank):
            action()
        return function(*args, **kwargs)

    setattr(owner, attribute, call)


@pytest.mark.parametrize("engine", ["DEEPSPEED", "FSDP", "MEGATRON_LM"])
def test_sharding_engines_are_refused_before_anything_is_loaded(engine, train, monkeypatch):
    """Also where their libraries are not installed, for which Accelerate would look."""
    monkeypatch.delattr(script, "Accelerator")
    run = train(env={f"ACCELERATE_USE_{engine}": "true"})
    reason = f"accelerate config: {engine} is not supported: the model fits one GPU; choose multi-GPU"
    assert run.returncode == 1 and run.output.splitlines()[-1] == reason, run
    assert "Traceback" not in run.output and not run.folder.exists(), run


def test_processes_that_would_each_train_alone_are_refused(train_ranks):
    """`torchrun --nproc_per_node=2` without a GPU, and without ACCELERATE_USE_CPU=true."""
    for run in train_ranks(env=lambda rank: {"ACCELERATE_USE_CPU": None}):
        assert "WORLD_SIZE: each process would train alone" in run.error()
        assert "ACCELERATE_USE_CPU=true" in run.error()


@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_an_output_folder_that_is_not_shared_is_one_line_and_ends_all_ranks(train_ranks, ranks):
    runs = train_ranks(ranks=ranks, **FLAGS | {"output_dir": "out"})
    assert all(run.returncode == 1 for run in runs), runs
    reason = "--output_dir=out: rank 0 has another folder of that name; share it between the nodes"
    assert [run.output.splitlines()[-1] for run in runs[1:]] == [reason] * (ranks - 1)
    assert not (runs[0].folder / "loss.jsonl").exists(), "nothing was trained"


def test_ranks_that_found_other_rows_are_refused(train_ranks):
    """Or each would train on, with other numbers of steps."""
    load_train_dataset = script.load_train_dataset

    def find_fewer_rows():
        if os.environ["RANK"] == "1":
            script.load_train_dataset = lambda args: load_train_dataset(args).select(range(9))

    for run in train_ranks(find_fewer_rows, **FLAGS):
        assert run.returncode == 1 and run.output.splitlines()[-1].startswith("processes found other rows"), (
            run
        )


def enter_node(folder):
    """Ranks 0 and 1 run in one folder, 2 and 3 in another."""
    node = folder / f"node-{int(os.environ['RANK']) // 2}"
    node.mkdir(exist_ok=True, parents=True)
    os.chdir(node)


def node_environment(rank):
    return {"LOCAL_RANK": rank % 2, "LOCAL_WORLD_SIZE": 2}


@pytest.mark.slow
def test_nodes_encode_all_rows_once_for_a_cache_of_their_own_or_a_shared_one(train_ranks, tmp_path):
    flags = FLAGS | {"cache_latents": True, "ranks": 4, "env": node_environment, "record": True}
    encoded, results = {}, []
    for name, cache_dir in (("separate", "cache"), ("shared", tmp_path / "cache")):
        runs = finished(train_ranks(partial(enter_node, tmp_path / name), **flags, cache_dir=cache_dir))
        encoded[name] = [list(itertools.chain(*run.record["images"])) for run in runs]
        results.append(runs[0].prior())
    once = sorted(itertools.chain(*encoded["shared"]))
    assert len(set(once)) == len(once) == 24 and all(encoded["shared"])
    for first in (0, 2):
        assert sorted(encoded["separate"][first] + encoded["separate"][first + 1]) == once
    assert distance(*results) < 1e-4, "batches of other rows differ in rounding"


def fail(error):
    raise error


def fail_to_read():
    """The second rank cannot read its first image of the second step."""
    error = ValueError("the image (x.png) cannot be read")
    on_call("load_image", FLAGS["train_batch_size"] + 1, 1, partial(fail, error))


@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_a_bad_row_of_one_rank_is_its_last_line_and_ends_the_others(train_ranks, ranks):
    runs = train_ranks(fail_to_read, ranks=ranks, timeout=60, **FLAGS)
    assert [run.returncode for run in runs] == [1] * ranks, runs
    reason = re.compile(r"row \d+: the image \(x.png\) cannot be read; fix it, or skip such rows .*")
    assert reason.fullmatch(runs[1].output.splitlines()[-1]) and "Traceback" not in runs[1].output, runs
    assert not any("x.png" in run.output for run in runs if run is not runs[1]), runs
    assert list(runs[0].losses()) == [1]


# A function, its call and rank, and the checkpoint from which the run is resumed. (When rank 1 is killed as
# checkpoint 2 is saved, rank 0 writes it nevertheless.)
KILLED = ["load_train_dataset 1 1 0", "load_prior 1 0 0", "generate_images 1 0 0", "encode_batch 3 1 0"]
KILLED += ["compute_held_out_loss 1 1 0", "check_finite 2 0 0", "save_prior 1 0 0", "save_checkpoint 1 1 2"]
KILLED += ["check_finite 3 1 2", "check_finite 4 0 2", "save_pipeline 1 0 4", "log_validation 3 1 4"]


@pytest.mark.slow
@pytest.mark.parametrize("killed", KILLED)
def test_a_killed_rank_ends_the_other_and_the_run_resumes_to_the_same_bits(train_ranks, tmp_path, killed):
    function, call, rank, checkpoint = [int(word) if word.isdigit() else word for word in killed.split()]
    whole, folder = finished(train_ranks(**VALIDATED))[0], tmp_path / "out"
    kill = partial(on_call, function, call, rank, lambda: os.kill(os.getpid(), signal.SIGKILL))
    runs = train_ranks(kill, **VALIDATED, output_dir=folder, timeout=60)
    assert [runs[rank].returncode, runs[1 - rank].returncode] == [-signal.SIGKILL, 1], runs
    again = finished(train_ranks(**VALIDATED, output_dir=folder, resume_from_checkpoint="latest"))[0]
    assert f"Training from step {checkpoint} to 4" in again.output, again
    assert same_weights(again.prior(), whole.prior())
    assert same_weights(*[load_optimizer_state(run.folder / "checkpoint-4") for run in (again, whole)])
    for column in ("train_loss", "grad_norm", "val_loss"):
        assert again.losses(column) == whole.losses(column), column
    sample = "samples/step-0000004-prompt-0.png"
    assert (folder / sample).read_bytes() == (whole.folder / sample).read_bytes()


def check_timeout():
    init_process_group = torch.distributed.init_process_group

    def check_and_init(*args, timeout=None, **kwargs):
        assert timeout == timedelta(hours=3)
        print("checked")
        return init_process_group(*args, timeout=timeout, **kwargs)

    torch.distributed.init_process_group = check_and_init


def test_the_timeout_of_collectives_reaches_pytorch(train_ranks):
    """Accelerate leaves out what equals its default for another backend."""
    assert all("checked" in run.output for run in finished(train_ranks(check_timeout, **FLAGS)))


def stop_answering():
    script.timedelta = lambda hours: timedelta(seconds=10)
    on_call("check_finite", 2, 1, partial(time.sleep, 20))


@pytest.mark.slow
def test_a_rank_that_does_not_answer_is_lost_after_the_timeout(train_ranks):
    runs = train_ranks(stop_answering, timeout=90, **FLAGS)
    assert [run.returncode for run in runs] == [1, 1], runs
    assert "Timed out" in runs[0].output, runs
    assert list(runs[0].losses()) == [1, 2]


def copy_gradients():
    """DDP as it is by default."""
    handler = script.DistributedDataParallelKwargs
    script.DistributedDataParallelKwargs = lambda gradient_as_bucket_view: handler()


def check_buckets():
    """At each step, gradients are parts of few buckets, which are as large as the gradients together."""
    step = torch.optim.AdamW.step

    def check_and_step(self, *args, **kwargs):
        gradients = [parameter.grad for group in self.param_groups for parameter in group["params"]]
        storages = [gradient.untyped_storage() for gradient in gradients]
        buckets = {storage.data_ptr(): storage.nbytes() for storage in storages}
        assert len(buckets) <= 2 < len(gradients)
        assert sum(buckets.values()) == sum(gradient.nbytes for gradient in gradients)
        return step(self, *args, **kwargs)

    torch.optim.AdamW.step = check_and_step


@pytest.mark.slow
@pytest.mark.parametrize("accumulation", [1, 3])
def test_gradients_in_ddps_buckets_change_no_bit(train_ranks, accumulation):
    flags = FLAGS | {"gradient_accumulation_steps": accumulation}
    run, copied = (finished(train_ranks(patch, **flags))[0] for patch in (check_buckets, copy_gradients))
    assert same_weights(run.prior(), copied.prior())
    assert all(run.losses(name) == copied.losses(name) for name in ("train_loss", "grad_norm"))
    assert "strides" not in run.output, "PyTorch's warning about dimensions of size 1"


PROMPTS = ["an owl", "a tomato", "a canoe", "a llama", "books"]


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "prompts", "held_out"), [(4, 1, 1), (4, 5, 9)])
def test_uneven_shares_give_what_one_process_gives(train, train_ranks, ranks, prompts, held_out):
    """Before the first step, since ranks train on other samples. A batch has four rows."""
    flags = FLAGS | {"train_batch_size": 4, "max_train_steps": 1, "validation_split": held_out}
    flags |= {"validation_prompts": PROMPTS[:prompts]}
    runs = finished(train_ranks(ranks=ranks, **flags))[0], *finished([train(**flags)])
    together, alone = (run.losses("val_loss")[0] for run in runs)
    assert together == pytest.approx(alone, rel=1e-5)
    files = [sorted((run.folder / "samples").glob("step-0000000-*")) for run in runs]
    images = [[(file.name, file.read_bytes()) for file in found] for found in files]
    assert len(images[0]) == prompts and images[0] == images[1], "pixels and prompts"


def fail_to_generate():
    error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
    on_call("wuerstchen.WuerstchenPriorPipeline.__call__", 1, 2, partial(fail, error))


@pytest.mark.slow
def test_images_that_fail_on_one_of_four_ranks_cost_only_images(train_ranks):
    flags = VALIDATED | {"validation_prompts": PROMPTS[:3], "max_train_steps": 3}
    runs, whole = (finished(train_ranks(patch, ranks=4, **flags)) for patch in (fail_to_generate, None))
    assert "Generating validation images failed, the run continues: OutOfMemoryError" in runs[2].output
    assert [key for key in whole[0].samples() if key not in runs[0].samples()] == [(0, 0), (0, 1), (0, 2)]
    assert all(runs[0].losses(name) == whole[0].losses(name) for name in ("train_loss", "val_loss"))
    assert same_weights(runs[0].prior(), whole[0].prior())
