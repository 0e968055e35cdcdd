# SPDX-License-Identifier: Apache-2.0
"""Several processes, over gloo: what the ranks wait for, how one that ends is noticed, and what the others
say. `train_ranks` gives each rank an empty folder to run in, so with a relative path each has a folder of its
own, as on nodes that share none."""

import os
import re
import signal
import time
from datetime import timedelta
from functools import partial

import pytest
import torch
from conftest import load_optimizer_state, same_weights, tiny_args

import train_text_to_image_prior as script

FLAGS = {
    "train_batch_size": 2,
    "max_train_samples": 24,
    "max_train_steps": 4,
    "checkpointing_steps": 2,
    "learning_rate": 1e-3,
}
VALIDATED = FLAGS | {"validation_prompts": "an owl", "validation_split": 5, "validation_steps": 3}


def node_of_its_own(rank):
    return {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}


def is_rank(rank):
    return os.environ.get("RANK") == str(rank)


def on_call(name, number, rank, action):
    """Calls `action` on a rank at the start of a call of one of the script's functions."""
    owner, _, attribute = name.rpartition(".")
    owner = getattr(script, owner) if owner else script
    function, calls = getattr(owner, attribute), []

    def call(*args, **kwargs):
        calls.append(None)
        if len(calls) == number and is_rank(rank):
            action()
        return function(*args, **kwargs)

    setattr(owner, attribute, call)


# ------------------------------------------------------------------------------- what is refused at the start


@pytest.mark.parametrize("engine", ["DEEPSPEED", "FSDP", "MEGATRON_LM"])
def test_sharding_engines_are_refused_before_anything_is_loaded(
    engine, run_main, models, pictures, tmp_path, monkeypatch
):
    """Also where their libraries are not installed, for which Accelerate would look."""

    def fail(*args, **kwargs):
        raise AssertionError("it sets up something")

    monkeypatch.setattr(script, "Accelerator", fail)
    run = run_main(tiny_args(models, pictures, tmp_path / "out"), **{f"ACCELERATE_USE_{engine}": "true"})
    assert run.returncode == 1 and "Traceback" not in run.output, run
    line = run.output.splitlines()[-1]
    assert line.startswith(f"accelerate config: {engine} is not supported; choose multi-GPU")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_fsdp_from_accelerates_configuration_is_refused(run_script, models, pictures, tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text(
        "compute_environment: LOCAL_MACHINE\ndistributed_type: FSDP\nfsdp_config: {fsdp_version: 2}\n"
        "num_machines: 1\nnum_processes: 2\nmachine_rank: 0\nmixed_precision: 'no'\nuse_cpu: false\n"
    )
    launcher = ("-m", "accelerate.commands.accelerate_cli", "launch", "--config_file", str(config))
    done = run_script(tiny_args(models, pictures, tmp_path / "out"), launcher=launcher)
    assert done.returncode == 1, done
    assert "accelerate config: FSDP is not supported; choose multi-GPU" in done.stderr
    assert 'train_text_to_image_prior.py", line' not in done.stderr, "no traceback of the script"


@pytest.mark.parametrize("variables", [{}, {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}])
def test_one_process_where_more_were_asked_for_is_reported(run_main, models, pictures, tmp_path, variables):
    """`accelerate launch --num_processes=2` without a GPU starts one, with these variables."""
    run = run_main(tiny_args(models, pictures, tmp_path / "out", max_train_steps=1), **variables)
    assert run.returncode == 0, run
    assert ("One process trains, although MASTER_ADDR is set" in run.output) == bool(variables)


@pytest.mark.parametrize("ranks", [2, 4])
def test_an_output_folder_that_is_not_shared_is_one_line(train_ranks, ranks):
    runs = train_ranks(ranks=ranks, env=node_of_its_own, **FLAGS | {"output_dir": "out"})
    assert [run.returncode for run in runs] == [1] * ranks, runs
    others = f"{ranks - 1} of {ranks} processes have another folder of that name; share it between the nodes"
    assert [run.output.splitlines()[-1:] for run in runs] == [
        [f"--output_dir=out: {others}"],
        *[[]] * (ranks - 1),
    ]


def test_only_separate_folders_are_counted_and_nothing_stays(train_ranks, tmp_path):
    runs = train_ranks(**FLAGS)
    assert [run.returncode for run in runs] == [0, 0], runs
    assert not list(runs[0].folder.glob(".shared*"))


# --------------------------------------------------------------------------------- two nodes and their caches


def two_nodes(rank):
    return {"LOCAL_RANK": str(rank % 2), "LOCAL_WORLD_SIZE": "2"}


def enter_node(folder):
    """Ranks 0 and 1 run in one folder, 2 and 3 in another, and write down which rows they encode."""
    script.CACHE_SHARD_SIZE = 3
    rank = int(os.environ["RANK"])
    node = folder / f"node-{rank // 2}"
    node.mkdir(exist_ok=True)
    os.chdir(node)
    write_shard = script.write_shard

    def record_shard(file, batches):
        with open(node / "encoded.txt", "a") as encoded:
            print(rank, file.stem.split("-")[0], file=encoded)
        write_shard(file, batches)

    script.write_shard = record_shard


@pytest.mark.slow
def test_each_node_encodes_all_rows_for_a_cache_of_its_own(train_ranks, tmp_path):
    flags = FLAGS | {"cache_latents": True, "ranks": 4, "env": two_nodes}
    (tmp_path / "separate").mkdir()
    (tmp_path / "shared").mkdir()
    separate = train_ranks(partial(enter_node, tmp_path / "separate"), **flags, cache_dir="cache")
    shared = train_ranks(partial(enter_node, tmp_path / "shared"), **flags, cache_dir=tmp_path / "cache")
    assert all(run.returncode == 0 for run in separate + shared), (separate, shared)
    starts = [f"{start:09d}" for start in range(0, 24, 3)]
    for node in range(2):
        lines = (tmp_path / "separate" / f"node-{node}" / "encoded.txt").read_text().splitlines()
        own = [f"{2 * node + index % 2} {start}" for index, start in enumerate(starts)]
        assert sorted(lines) == sorted(own), "its two ranks share the shards"
    lines = [line for file in (tmp_path / "shared").rglob("encoded.txt") for line in file.open()]
    assert sorted(line.split()[1] for line in lines) == starts
    assert separate[0].logged("train_loss") == shared[0].logged("train_loss")
    assert same_weights(separate[0].prior(), shared[0].prior())


# ------------------------------------------------------------------------------------------- a rank that ends


def fail_to_read():
    """The second rank cannot read its first image of the second step."""
    load_image, calls = script.load_image, []

    def load_or_fail(*args):
        calls.append(None)
        if is_rank(1) and len(calls) == FLAGS["train_batch_size"] + 1:
            raise ValueError("the image (x.png) cannot be read")
        return load_image(*args)

    script.load_image = load_or_fail


@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_a_bad_row_of_one_rank_ends_the_others_in_silence(train_ranks, ranks):
    runs = train_ranks(fail_to_read, ranks=ranks, **FLAGS)
    assert [run.returncode for run in runs] == [1] * ranks, runs
    last_lines = [run.output.splitlines()[-1] for run in runs if run.output.strip()]
    reason = re.compile(r"row \d+ of the 24 used: the image \(x.png\) cannot be read; fix it, or skip .*")
    assert [bool(reason.fullmatch(line)) for line in last_lines].count(True) == 1, runs
    for rank, run in enumerate(runs):
        assert "Traceback" not in run.output and "another process" not in run.output, run
        assert ("x.png" in run.output) == (rank == 1), run


KILLED = [
    # function, call, rank, checkpoint from which the run is resumed
    ("load_train_dataset", 1, 1, None),
    ("load_prior", 1, 0, None),
    ("register_checkpoint_hooks", 1, 1, None),
    ("Validator.generate_image", 1, 0, None),
    ("Validator.compute_held_out_loss", 1, 1, None),
    ("encode_batch", 3, 1, None),
    ("reduce_metrics", 2, 0, None),
    ("save_checkpoint", 1, 1, None),
    ("write_state_file", 1, 0, None),
    ("delete", 1, 0, None),
    ("reduce_metrics", 3, 1, 2),
    ("check_finite", 4, 0, 2),
    ("save_pipeline", 1, 0, 4),
    ("Validator.log_validation", 3, 1, 4),
]


@pytest.mark.slow
@pytest.mark.parametrize(("function", "call", "rank", "checkpoint"), KILLED)
def test_a_killed_rank_ends_the_others_and_the_run_resumes_to_the_same_bits(
    train_ranks, tmp_path, function, call, rank, checkpoint
):
    whole = train_ranks(**VALIDATED)
    assert [run.returncode for run in whole] == [0, 0], whole
    kill = partial(on_call, function, call, rank, lambda: os.kill(os.getpid(), signal.SIGKILL))
    folder, started = tmp_path / "out", time.monotonic()
    runs = train_ranks(kill, **VALIDATED, output_dir=folder)
    assert time.monotonic() - started < 60
    assert runs[rank].returncode == -signal.SIGKILL, runs
    other = runs[1 - rank]
    assert other.returncode == 1 and "Traceback" not in other.output, runs
    assert other.output.splitlines()[-1].startswith(
        f"rank {1 - rank}: another process has ended without a message"
    ), runs
    again = train_ranks(**VALIDATED, output_dir=folder, resume_from_checkpoint="latest")
    assert [run.returncode for run in again] == [0, 0], again
    assert f"Training from step {checkpoint or 0} to 4" in again[0].output, again
    assert same_weights(again[0].prior(), whole[0].prior())
    optimizers = [load_optimizer_state(run.folder / "checkpoint-4") for run in (again[0], whole[0])]
    assert same_weights(*optimizers)
    logged = [
        [{name: row.get(name) for name in ("step", "train_loss", "grad_norm", "val_loss")} for row in rows]
        for rows in map(script.read_metrics, (folder, whole[0].folder))
    ]
    assert logged[0] == logged[1]
    images = [
        (run.folder / "samples" / "step-0000004-prompt-0.png").read_bytes() for run in (again[0], whole[0])
    ]
    assert images[0] == images[1]


# ------------------------------------------------------------------------------------------------- time-outs


def shorten_timeout(seconds, function, rank, delay, call=1):
    script.COLLECTIVE_TIMEOUT = timedelta(seconds=seconds)
    on_call(function, call, rank, partial(time.sleep, delay))


def check_timeout():
    init_process_group = torch.distributed.init_process_group

    def check_and_init(*args, timeout=None, **kwargs):
        assert timeout == script.COLLECTIVE_TIMEOUT
        return init_process_group(*args, timeout=timeout, **kwargs)

    torch.distributed.init_process_group = check_and_init


def test_the_short_timeout_reaches_pytorch(train_ranks):
    """Accelerate leaves out what equals its default for another backend."""
    runs = train_ranks(check_timeout, **FLAGS)
    assert [run.returncode for run in runs] == [0, 0], runs


@pytest.mark.slow
def test_a_rank_that_does_not_answer_is_lost_after_the_short_timeout(train_ranks):
    patch = partial(shorten_timeout, 3, "reduce_metrics", 1, 6, call=2)
    runs = train_ranks(patch, **FLAGS)
    assert [run.returncode for run in runs] == [1, 1], runs
    assert all("Traceback" not in run.output for run in runs), runs
    line = runs[0].output.splitlines()[-1]
    assert line.startswith("rank 0: another process") and "Timed out" in line, runs
    assert [row["step"] for row in script.read_metrics(runs[0].folder)] == [1]


SLOW = [
    ("load_train_dataset", 0),
    ("load_encoders", 1),
    ("write_shard", 0),
    ("init_trackers", 0),
    ("Validator.generate_image", 0),
    ("Accelerator.save_state", 0),
    ("flush_to_disk", 0),
    ("save_pipeline", 0),
]


@pytest.mark.slow
@pytest.mark.parametrize(("function", "rank"), SLOW)
def test_the_ranks_wait_longer_for_one_that_loads_encodes_generates_or_saves(
    train_ranks, tmp_path, function, rank
):
    patch = partial(shorten_timeout, 4, function, rank, 7)
    flags = VALIDATED | {"cache_latents": function == "write_shard", "cache_dir": tmp_path / "cache"}
    runs = train_ranks(patch, **flags)
    assert [run.returncode for run in runs] == [0, 0], runs


# -------------------------------------------------------------------------------------- gradients in buckets


def copy_gradients():
    """DDP as it is by default."""
    handler = script.accelerate.utils.DistributedDataParallelKwargs
    script.accelerate.utils.DistributedDataParallelKwargs = lambda gradient_as_bucket_view: handler()


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


@pytest.mark.parametrize("accumulation", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_gradients_in_ddps_buckets_change_no_bit(train_ranks, accumulation):
    flags = FLAGS | {"gradient_accumulation_steps": accumulation}
    runs, copied = train_ranks(check_buckets, **flags), train_ranks(copy_gradients, **flags)
    assert [run.returncode for run in runs + copied] == [0] * 4, (runs, copied)
    assert same_weights(runs[0].prior(), copied[0].prior())
    for tag in ("train_loss", "grad_norm"):
        assert runs[0].logged(tag) == copied[0].logged(tag)
    assert all("strides" not in run.output for run in runs), "PyTorch's warning about dimensions of size 1"


# ------------------------------------------------------------------------------ validation, shared unevenly


@pytest.mark.parametrize(
    ("ranks", "prompts", "held_out"),
    [(2, 1, 5), *(pytest.param(4, *counts, marks=pytest.mark.slow) for counts in ((1, 1), (3, 5), (5, 9)))],
)
def test_uneven_shares_give_what_one_process_gives(train, train_ranks, ranks, prompts, held_out):
    """Before the first step, since ranks train on other samples. A batch has four rows."""
    flags = FLAGS | {"train_batch_size": 4, "max_train_steps": 1, "validation_split": held_out}
    flags |= {"validation_prompts": ["an owl", "a tomato", "a canoe", "a llama", "books"][:prompts]}
    runs, alone = train_ranks(ranks=ranks, **flags), train(**flags)
    assert [run.returncode for run in (*runs, alone)] == [0] * (ranks + 1), (runs, alone)
    here, there = (run.logged("val_loss")[0] for run in (runs[0], alone))
    assert here == pytest.approx(there, rel=1e-5)
    files = sorted(path.name for path in (alone.folder / "samples").glob("step-0000000-*"))
    assert len(files) == prompts
    for name in files:
        images = [script.Image.open(run.folder / "samples" / name) for run in (runs[0], alone)]
        assert images[0].info["prompt"] == images[1].info["prompt"]
        assert images[0].tobytes() == images[1].tobytes()


def fail_to_generate():
    def fail():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    on_call("Validator.generate_image", 1, 2, fail)


@pytest.mark.slow
def test_images_that_fail_on_one_of_four_ranks_cost_only_images(train_ranks):
    flags = VALIDATED | {"validation_prompts": ["an owl", "a tomato", "a canoe"], "max_train_steps": 3}
    runs, whole = train_ranks(fail_to_generate, ranks=4, **flags), train_ranks(ranks=4, **flags)
    assert [run.returncode for run in runs + whole] == [0] * 8, (runs, whole)
    assert "No validation images at step 0: OutOfMemoryError" in runs[0].output
    assert not list((runs[0].folder / "samples").glob("step-0000000-*"))
    assert len(list((runs[0].folder / "samples").glob("step-0000003-*"))) == 3
    for tag in ("train_loss", "val_loss"):
        assert runs[0].logged(tag) == whole[0].logged(tag)
    assert same_weights(runs[0].prior(), whole[0].prior())
