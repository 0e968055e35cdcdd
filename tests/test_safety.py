# SPDX-License-Identifier: Apache-2.0
"""A run cannot hurt its owner: results, side files, two runs at once, data that changed, untrusted input."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import PICTURES, SCRIPT, same_weights, script, tiny_args
from PIL import Image
from safetensors.torch import load_file

SHORT = {"max_train_steps": 2, "train_batch_size": 2}


def snapshot(folder):
    """Every file in a folder with its content, except for the lock."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != ".lock"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def last_line(finished):
    return finished.output.strip().splitlines()[-1]


def load_result(folder):
    return load_file(folder / "prior_pipeline" / "prior" / "diffusion_pytorch_model.safetensors")


def fail_with_full_disk(*args, **kwargs):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def send_at_step(patch, step, number):
    """Sends this process a signal in a certain step, before its optimizer step."""
    reduce_metrics, calls = script.reduce_metrics, []

    def reduce(*args, **kwargs):
        calls.append(None)
        if len(calls) == step:
            os.kill(os.getpid(), number)
        return reduce_metrics(*args, **kwargs)

    patch.setattr(script, "reduce_metrics", reduce)


@pytest.fixture(scope="module")
def finished_run(models, pictures, tmp_path_factory, run_main):
    """The folder of a finished run of two steps. Copy it before changing it."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    finished = run_main(tiny_args(models, pictures, folder, **SHORT, validation_prompts=["a red apple"]))
    assert finished.returncode == 0, finished
    return folder


@pytest.fixture
def run_copy(finished_run, tmp_path):
    return Path(shutil.copytree(finished_run, tmp_path / "run"))


# ----------------------------------------------------------------------------- what is there is not destroyed


@pytest.mark.parametrize("resume", [None, "latest"])
def test_a_result_without_checkpoints_is_not_replaced(run_copy, models, pictures, run_main, resume):
    shutil.rmtree(run_copy / "checkpoint-2")
    before = snapshot(run_copy)
    args = tiny_args(models, pictures, run_copy, **SHORT, seed=1, resume_from_checkpoint=resume)
    finished = run_main(args)
    assert finished.returncode == 1, finished
    for way in (
        "--output_dir",
        "prior_pipeline",
        "--resume_from_checkpoint=latest",
        "--overwrite_output_dir",
    ):
        assert way in last_line(finished)
    assert "Traceback" not in finished.output
    assert snapshot(run_copy) == before


def test_a_result_is_replaced_if_that_is_asked_for(run_copy, models, pictures, run_main):
    before = load_result(run_copy)
    finished = run_main(tiny_args(models, pictures, run_copy, **SHORT, seed=1, overwrite_output_dir=True))
    assert finished.returncode == 0, finished
    assert not same_weights(load_result(run_copy), before)
    steps = [json.loads(line)["step"] for line in (run_copy / "loss.jsonl").read_text().splitlines()]
    assert steps == [1, 2]


@pytest.mark.parametrize("name", ["tokenizer", "decoder", "README.md", "samples", "logs"])
def test_a_users_own_files_are_not_replaced(models, pictures, tmp_path, run_main, name):
    mine = tmp_path / "run" / name if "." in name else tmp_path / "run" / name / "mine.txt"
    mine.parent.mkdir(parents=True)
    mine.write_text("mine")
    finished = run_main(tiny_args(models, pictures, tmp_path / "run", **SHORT))
    assert finished.returncode == 1, finished
    assert name in last_line(finished)
    assert mine.read_text() == "mine"


def test_only_names_of_the_run_are_deleted(models, pictures, tmp_path, run_main):
    output_dir = tmp_path / "run"
    for name in (".best-checkpoint-2", ".checkpoint-old", "checkpoint-mine", ".old-checkpoint-1"):
        (output_dir / name).mkdir(parents=True)
        (output_dir / name / "mine.txt").write_text("mine")
    (output_dir / "._checkpoint-2").write_text("mine")
    flags = {"max_train_steps": 4, "checkpointing_steps": 1, "checkpoints_total_limit": 1}
    finished = run_main(tiny_args(models, pictures, output_dir, **flags))
    assert finished.returncode == 0, finished
    mine = [path for path in output_dir.rglob("*") if path.is_file() and path.read_bytes() == b"mine"]
    assert len(mine) == 5
    assert [path.name for path in script.list_checkpoints(output_dir)] == ["checkpoint-4"]


def test_a_linked_checkpoint_is_unlinked_and_its_target_kept(run_copy, models, pictures, tmp_path, run_main):
    target = tmp_path / "elsewhere"
    (run_copy / "checkpoint-2").rename(target)
    (run_copy / "checkpoint-2").symlink_to(target)
    flags = {"max_train_steps": 4, "checkpointing_steps": 1, "checkpoints_total_limit": 1}
    args = tiny_args(models, pictures, run_copy, **SHORT | flags, resume_from_checkpoint="latest")
    finished = run_main(args)
    assert finished.returncode == 0, finished
    assert "could not be written" not in finished.output
    assert [path.name for path in script.list_checkpoints(run_copy)] == ["checkpoint-4"]
    assert script.is_complete(target)


def break_optimizer(*args):
    raise RuntimeError("libbitsandbytes was not found")


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ({"lr_scheduler": "piecewise_constant", "lr_step_rules": "1:x"}, "--lr_scheduler"),
        ({"lr_scheduler": "polynomial", "learning_rate": 1e-9}, "--lr_scheduler"),
        ({"report_to": "wandb"}, "--report_to"),
        ({"use_8bit_adam": True}, "--optimizer=adamw8bit"),
    ],
    ids=["rules", "polynomial", "tracker", "optimizer"],
)
def test_a_start_that_fails_deletes_nothing(run_copy, models, pictures, run_main, monkeypatch, flags, named):
    before = snapshot(run_copy)
    if "report_to" in flags:
        monkeypatch.setattr(script.Accelerator, "init_trackers", break_optimizer)
    if "use_8bit_adam" in flags:
        monkeypatch.setattr(script, "make_optimizer", break_optimizer)
    finished = run_main(tiny_args(models, pictures, run_copy, **SHORT | flags, overwrite_output_dir=True))
    assert finished.returncode == 1, finished
    assert named in last_line(finished)
    assert "Traceback" not in finished.output
    assert snapshot(run_copy) == before


def test_overwriting_deletes_checkpoints_after_the_first_step(
    run_copy, models, pictures, run_main, monkeypatch
):
    monkeypatch.setattr(script, "check_finite", break_optimizer)  # in the first step, before it is taken
    args = tiny_args(models, pictures, run_copy, **SHORT, overwrite_output_dir=True)
    assert run_main(args).returncode == 1
    assert [path.name for path in script.list_checkpoints(run_copy)] == ["checkpoint-2"]
    monkeypatch.undo()
    finished = run_main([*args, "--max_train_steps=1"])
    assert finished.returncode == 0, finished
    assert [path.name for path in script.list_checkpoints(run_copy)] == ["checkpoint-1"]


@pytest.mark.parametrize("call", [1, 2, 3], ids=["the prior", "the decoder", "the configuration"])
def test_a_full_disk_at_the_end_keeps_the_old_result(
    run_copy, models, pictures, run_main, monkeypatch, call, tmp_path
):
    before = snapshot(run_copy)
    save_components, calls = script.save_components, []

    def save(components, folder):
        calls.append(None)
        if len(calls) == call:
            fail_with_full_disk()
        save_components(components, folder)

    monkeypatch.setattr(script, "save_components", save)
    if call == 3:
        pipeline = script.wuerstchen.WuerstchenCombinedPipeline
        monkeypatch.setattr(pipeline, "save_config", fail_with_full_disk)
    flags = SHORT | {"max_train_steps": 3, "resume_from_checkpoint": "latest"}
    finished = run_main(tiny_args(models, pictures, run_copy, **flags))
    assert "No space left" in finished.output
    assert finished.returncode == (1 if call == 1 else 0), finished
    after = snapshot(run_copy)
    for name in before:
        is_replaced = name.startswith(("checkpoint", "loss", "samples", "README", "grid"))
        if not is_replaced and not (call > 1 and name.startswith("prior_pipeline")):
            assert after[name] == before[name], name
    assert script.is_complete(run_copy / "checkpoint-3")


def test_a_text_encoder_is_read_from_the_folder_that_is_written(run_copy, models, pictures, run_main):
    """The run is continued with its own result as the pretrained prior."""
    source = run_copy / "prior_pipeline"
    flags = SHORT | {"max_train_steps": 3, "resume_from_checkpoint": "latest"}
    flags["pretrained_prior_model_name_or_path"] = source
    finished = run_main(tiny_args(models, pictures, run_copy, **flags))
    assert finished.returncode == 0, finished
    encoders = [path / "text_encoder" / "model.safetensors" for path in (source, models / "prior")]
    assert same_weights(*map(load_file, encoders))


@pytest.mark.parametrize("name", ["save_pipeline", "save_model_card"])
def test_a_signal_in_the_final_save_leaves_only_saving(
    models, pictures, tmp_path, run_main, monkeypatch, finished_run, name
):
    original = getattr(script, name)

    def save(*args):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)
        return original(*args)

    args = tiny_args(models, pictures, tmp_path / "run", **SHORT, resume_from_checkpoint="latest")
    with monkeypatch.context() as patch:
        patch.setattr(script, name, save)
        stopped = run_main(args)
    assert stopped.returncode == 143, stopped
    assert "Traceback" not in stopped.output
    finished = run_main(args)
    assert finished.returncode == 0, finished
    assert "nothing is left to train" in finished.output
    assert same_weights(load_result(tmp_path / "run"), load_result(finished_run))


@pytest.mark.slow
def test_two_runs_in_one_folder_are_refused(models, pictures, tmp_path, run_main, monkeypatch):
    started = tmp_path / "started"
    load_prior = script.load_prior

    def wait(*args):
        started.touch()
        time.sleep(8)
        return load_prior(*args)

    args = tiny_args(models, pictures, tmp_path / "run", **SHORT)
    first = []
    with monkeypatch.context() as patch:
        patch.setattr(script, "load_prior", wait)
        thread = threading.Thread(target=lambda: first.append(run_main(args)))
        thread.start()
        while not started.exists():
            time.sleep(0.05)
    second = run_main(args)
    thread.join()
    assert second.returncode == 1, second
    assert "another run is writing" in last_line(second)
    assert first[0].returncode == 0, first[0]
    assert run_main([*args, "--overwrite_output_dir"]).returncode == 0, "the lock ends with its process"


@pytest.mark.slow
def test_processes_that_would_each_train_alone_are_refused(models, pictures, tmp_path, run_script):
    launcher = ("-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=29713")
    env = {"ACCELERATE_USE_CPU": None, "CUDA_VISIBLE_DEVICES": ""}
    finished = run_script(tiny_args(models, pictures, tmp_path / "run", **SHORT), launcher, **env)
    assert finished.returncode == 1
    (line,) = {line for line in finished.stderr.splitlines() if line.startswith("WORLD_SIZE=2")}
    assert "ACCELERATE_USE_CPU=true" in line
    assert snapshot(tmp_path / "run") == {}


# ----------------------------------------------------------------------------- what is shown never ends a run


def test_a_tracker_that_dies_is_reported_once(
    models, pictures, tmp_path, run_main, monkeypatch, finished_run
):
    monkeypatch.setattr(script.Accelerator, "log", break_optimizer)
    monkeypatch.setattr(script.Accelerator, "end_training", break_optimizer)
    monkeypatch.setattr(script, "log_images_to_tracker", break_optimizer)
    flags = SHORT | {"report_to": "tensorboard", "validation_prompts": ["a red apple"]}
    finished = run_main(tiny_args(models, pictures, tmp_path / "run", **flags))
    assert finished.returncode == 0, finished
    assert finished.output.count("Logging to the trackers failed, the run continues") == 1
    assert finished.output.count("Logging images to tensorboard failed, the run continues") == 1
    assert same_weights(load_result(tmp_path / "run"), load_result(finished_run))


def test_everything_that_is_only_shown_may_fail(
    models, pictures, tmp_path, run_main, monkeypatch, finished_run
):
    for name in ("save_contact_sheet", "save_figure", "save_model_card", "truncate_logs"):
        monkeypatch.setattr(script, name, fail_with_full_disk)
    flags = SHORT | {"validation_prompts": ["a red apple"]}
    finished = run_main(tiny_args(models, pictures, tmp_path / "run", **flags))
    assert finished.returncode == 0, finished
    assert "Traceback" not in finished.output
    assert same_weights(load_result(tmp_path / "run"), load_result(finished_run))


@pytest.mark.slow
@pytest.mark.parametrize("stream", ["closed", "reader gone"])
def test_a_closed_terminal_does_not_cost_a_checkpoint(models, pictures, tmp_path, stream):
    flags = SHORT | {"max_train_steps": 5000, "checkpointing_steps": 5000}
    args = list(map(str, tiny_args(models, pictures, tmp_path / "run", **flags)))
    command = [sys.executable, str(SCRIPT), *args]
    if stream == "closed":
        command = ["sh", "-c", 'exec "$@" >&- 2>&-', "sh", *command]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, cwd=tmp_path)
    try:
        losses = tmp_path / "run" / "loss.jsonl"
        while not (losses.exists() and losses.read_text().count("\n") > 2):
            assert process.poll() is None
            time.sleep(0.1)
        process.stdout.close()
        process.send_signal(signal.SIGTERM)  # a background job's processes ignore SIGINT
        assert process.wait(60) == 128 + signal.SIGTERM
    finally:
        process.kill()
    assert len(script.list_checkpoints(tmp_path / "run")) == 1


@pytest.mark.parametrize(
    "line", ['{"step": 1, "train', "foreign", "[1]", "17", '{"train_loss": 1.0}', '"{}"']
)
def test_a_foreign_line_in_the_log_is_ignored(run_copy, models, pictures, run_main, line):
    with open(run_copy / "loss.jsonl", "a") as file:
        file.write(line + "\n")
    flags = SHORT | {"max_train_steps": 3, "resume_from_checkpoint": "latest"}
    finished = run_main(tiny_args(models, pictures, run_copy, **flags))
    assert finished.returncode == 0, finished
    steps = [json.loads(row)["step"] for row in (run_copy / "loss.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3]


def test_a_stop_whose_checkpoint_failed_says_so(models, pictures, tmp_path, run_main, monkeypatch):
    send_at_step(monkeypatch, 2, signal.SIGTERM)
    monkeypatch.setattr(script, "write_state_file", fail_with_full_disk)
    flags = SHORT | {"max_train_steps": 20}
    finished = run_main(tiny_args(models, pictures, tmp_path / "run", **flags))
    assert finished.returncode == 74, finished
    assert "Stopped, but the checkpoint could not be saved" in finished.output
    assert "latest continues" not in finished.output


def test_a_closed_terminals_signal_is_a_stop(models, pictures, tmp_path, run_main, monkeypatch):
    send_at_step(monkeypatch, 2, signal.SIGHUP)
    previous = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # under nohup it is ignored
    try:
        finished = run_main(tiny_args(models, pictures, tmp_path / "run", **SHORT | {"max_train_steps": 20}))
    finally:
        signal.signal(signal.SIGHUP, previous)
    assert finished.returncode == 128 + signal.SIGHUP, finished
    assert len(script.list_checkpoints(tmp_path / "run")) == 1


def test_folders_that_cannot_be_flushed_keep_their_checkpoints(
    models, pictures, tmp_path, run_main, monkeypatch
):
    fsync = os.fsync

    def fail_for_folders(descriptor):
        if Path(f"/proc/self/fd/{descriptor}").resolve().is_dir():
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", fail_for_folders)
    finished = run_main(tiny_args(models, pictures, tmp_path / "run", **SHORT, checkpointing_steps=1))
    assert finished.returncode == 0, finished
    assert len(script.list_checkpoints(tmp_path / "run")) == 2


# --------------------------------------------------------------------------- the run is the run it says it is


@pytest.mark.parametrize("change", ["other images", "other order", "one caption of 64"])
def test_changed_data_are_not_resumed(run_copy, models, tmp_path, run_main, change):
    folder = Path(shutil.copytree(PICTURES, tmp_path / "data"))
    metadata = folder / "metadata.jsonl"
    rows = metadata.read_text().splitlines()
    if change == "other images":
        name = json.loads(rows[40])["file_name"]
        Image.new("RGB", (64, 64)).save(folder / name, format="PNG")
    elif change == "other order":
        metadata.write_text("\n".join(rows[::-1]) + "\n")
    else:
        rows[33] = json.dumps(json.loads(rows[33]) | {"text": "something else"})
        metadata.write_text("\n".join(rows) + "\n")
    flags = SHORT | {"max_train_steps": 3, "resume_from_checkpoint": "latest"}
    finished = run_main(tiny_args(models, folder, run_copy, **flags))
    assert finished.returncode == 1, finished
    assert "other images or captions" in last_line(finished)


def test_a_moved_data_set_is_resumed(run_copy, models, tmp_path, run_main):
    folder = shutil.copytree(PICTURES, tmp_path / "data")
    flags = SHORT | {"max_train_steps": 3, "resume_from_checkpoint": "latest"}
    finished = run_main(tiny_args(models, folder, run_copy, **flags))
    assert finished.returncode == 0, finished


def test_several_metadata_files_are_read_in_one_order(tmp_path):
    for index, name in enumerate("hgfedcba"):
        (tmp_path / "set" / name).mkdir(parents=True)
        rows = []
        for number in range(2):
            Image.new("RGB", (8, 8), (index, number, 0)).save(tmp_path / "set" / name / f"{number}.png")
            rows.append(json.dumps({"file_name": f"{number}.png", "text": f"{name}{number}"}))
        (tmp_path / "set" / name / "metadata.jsonl").write_text("\n".join(rows) + "\n")
    args = script.parse_args([f"--train_data_dir={tmp_path / 'set'}", f"--cache_dir={tmp_path / 'cache'}"])
    assert script.load_train_dataset(args)["text"][:] == [
        f"{name}{number}" for name in "abcdefgh" for number in range(2)
    ]


def test_changed_settings_are_reported(run_copy, models, pictures, run_main):
    flags = {"max_train_steps": 3, "caption_dropout": 0.5, "loss_weighting": "p2", "resolution": 96}
    args = tiny_args(models, pictures, run_copy, **SHORT | flags, resume_from_checkpoint="latest")
    finished = run_main(args)
    assert finished.returncode == 0, finished
    (line,) = (line for line in finished.output.splitlines() if "Changed since checkpoint-2" in line)
    for text in (
        "--caption_dropout=0.5 (was 0.0)",
        "--loss_weighting=p2 (was none)",
        "--resolution=96 (was 64)",
    ):
        assert text in line
    assert "train_batch_size" not in line


@pytest.mark.parametrize("optimizer", ["adamw8bit", "adafactor"])
def test_another_optimizer_is_refused_in_one_line(run_copy, models, pictures, run_main, optimizer):
    flags = SHORT | {"max_train_steps": 3, "optimizer": optimizer, "resume_from_checkpoint": "latest"}
    finished = run_main(tiny_args(models, pictures, run_copy, **flags))
    assert finished.returncode == 1, finished
    assert f"--optimizer={optimizer}" in last_line(finished) and "--optimizer=adamw" in last_line(finished)
    assert "Traceback" not in finished.output


@pytest.mark.parametrize("used", ["adamw", "adamw8bit"])
def test_the_optimizer_of_an_older_checkpoint_is_known(used):
    """Its settings have --use_8bit_adam alone."""
    plan = script.SamplePlan(0, 10, "", num_processes=1, train_batch_size=1, gradient_accumulation_steps=1)
    state = script.TrainState(settings={"use_8bit_adam": used == "adamw8bit"})
    for optimizer in ("adamw", "adamw8bit", "adafactor"):
        argv = ["--train_data_dir=unused", f"--optimizer={optimizer}", "--max_train_steps=1"]
        report = (script.parse_args(argv), plan, state, Path("checkpoint-3"))
        if optimizer == used:
            script.report_settings(*report)
        else:
            message = f"--optimizer={optimizer}: checkpoint-3 is of a run with --optimizer={used}"
            with pytest.raises(SystemExit, match=f"^{message}$"):
                script.report_settings(*report)


def test_weights_that_overflow_are_not_saved(models, pictures, tmp_path, run_main, monkeypatch):
    step, calls = torch.optim.AdamW.step, []

    def overflow(self, *args, **kwargs):
        result = step(self, *args, **kwargs)
        calls.append(None)
        if len(calls) == 3:
            with torch.no_grad():
                self.param_groups[0]["params"][5].view(-1)[0] = float("inf")
        return result

    monkeypatch.setattr(torch.optim.AdamW, "step", overflow)
    flags = SHORT | {"max_train_steps": 3, "checkpointing_steps": 1}
    finished = run_main(tiny_args(models, pictures, tmp_path / "run", **flags))
    assert finished.returncode == 1, finished
    assert "after step 3" in last_line(finished) and "checkpoint-2" in last_line(finished)
    assert [path.name for path in script.list_checkpoints(tmp_path / "run")] == [
        "checkpoint-1",
        "checkpoint-2",
    ]
    assert not (tmp_path / "run" / "prior_pipeline").exists()


@pytest.mark.parametrize("name", ["prior/diffusion_pytorch_model.safetensors", "optimizer.bin"])
def test_a_checkpoint_with_changed_files_is_not_resumed(run_copy, models, pictures, run_main, name):
    file = run_copy / "checkpoint-2" / name
    size = file.stat().st_size
    file.write_bytes(bytes(size))
    flags = SHORT | {"max_train_steps": 3, "resume_from_checkpoint": "checkpoint-2"}
    finished = run_main(tiny_args(models, pictures, run_copy, **flags))
    assert finished.returncode == 1, finished
    assert "--resume_from_checkpoint=checkpoint-2" in last_line(finished)
    finished = run_main(tiny_args(models, pictures, run_copy, **flags | {"resume_from_checkpoint": "latest"}))
    assert "checkpoint-2: its files were changed" in finished.output, finished
    assert finished.returncode == 1, "there is a result, and no other checkpoint to continue from"


def test_an_image_is_only_shown_beside_its_own_prompt(run_copy, models, pictures, run_main, monkeypatch):
    flags = SHORT | {"max_train_steps": 3, "resume_from_checkpoint": "latest", "validation_steps": 1}
    flags["validation_prompts"] = ["an owl", "a red apple"]
    grids = []
    make_image_grid = script.make_image_grid

    def record(images, **kwargs):
        grids.append([bool(np.asarray(image).std() > 0) for image in images])
        torch.save(grids, run_copy.parent / "grids.pt")
        return make_image_grid(images, **kwargs)

    monkeypatch.setattr(script, "make_image_grid", record)
    finished = run_main(tiny_args(models, pictures, run_copy, **flags))
    assert finished.returncode == 0, finished
    sheet = torch.load(run_copy.parent / "grids.pt")[0]
    # Of step 0 there is one image, of "a red apple", with the number 0. Step 2 has been validated again.
    assert sheet == [False, True, True, True]


# -------------------------------------------------------------------------------------------- untrusted input


def test_code_in_a_decoders_folder_is_not_run(models, pictures, tmp_path, run_main):
    decoder = Path(shutil.copytree(models / "decoder", tmp_path / "decoder"))
    (decoder / "vqgan" / "evil.py").write_text(f"open({str(tmp_path / 'evil')!r}, 'w')\nclass Evil: pass\n")
    index = json.loads((decoder / "model_index.json").read_text())
    (decoder / "model_index.json").write_text(json.dumps(index | {"vqgan": ["evil", "Evil"]}))
    flags = SHORT | {"validation_prompts": ["a red apple"], "pretrained_decoder_model_name_or_path": decoder}
    finished = run_main(tiny_args(models, pictures, tmp_path / "run", **flags))
    assert finished.returncode == 0, finished
    assert not (tmp_path / "evil").exists()
    assert len(list((tmp_path / "run" / "samples").glob("step-*.png"))) == 2


@pytest.mark.parametrize("path", ["zip://a.png::{0}/a.zip", "http://127.0.0.1:9/a.png", "file://{0}/a.png"])
def test_urls_in_rows_are_not_opened(tmp_path, path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    subprocess.run([sys.executable, "-m", "zipfile", "-c", "a.zip", "a.png"], cwd=tmp_path, check=True)
    with pytest.raises(ValueError, match="cannot be read"):
        script.load_image({"bytes": None, "path": path.format(tmp_path)}, [tmp_path])


def test_postscript_that_is_named_png_is_not_interpreted(tmp_path, monkeypatch):
    monkeypatch.setattr(
        subprocess, "check_call", lambda *args, **kwargs: pytest.fail("Ghostscript is started")
    )
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png", format="EPS")
    with pytest.raises(ValueError, match="cannot be read"):
        script.load_image({"bytes": None, "path": str(tmp_path / "a.png")}, [tmp_path])


def test_an_image_that_would_fill_the_memory_is_refused_before_it_is_decoded(tmp_path, monkeypatch):
    Image.new("1", (12_000, 12_000)).save(tmp_path / "a.png")
    load, modes = Image.Image.load, []
    monkeypatch.setattr(Image.Image, "load", lambda self: modes.append(self.mode) or load(self))
    with pytest.raises(ValueError, match=r"a\.png\).*12000 x 12000"):
        script.load_image({"bytes": None, "path": str(tmp_path / "a.png")}, [tmp_path])
    assert modes == []


def test_control_characters_are_escaped_and_messages_short(tmp_path):
    value = {"bytes": b"no image", "path": "a\x1b[2J\n" + "b" * 5000 + ".png"}
    with pytest.raises(ValueError, match="cannot be read") as caught:
        script.load_image(value, [tmp_path])
    message = str(caught.value)
    assert message.isprintable()
    assert len(message) < 600


# --------------------------------------------------------------------------------------------------- messages


def test_a_folder_that_cannot_be_written_is_named_before_anything_is_loaded(
    models, pictures, tmp_path, run_main, monkeypatch
):
    monkeypatch.setattr(script, "load_train_dataset", lambda args: pytest.fail("it loads the data"))
    (tmp_path / "file").write_text("")
    finished = run_main(tiny_args(models, pictures, tmp_path / "file" / "run", **SHORT))
    assert finished.returncode == 1, finished
    assert last_line(finished).startswith("--output_dir="), finished


@pytest.mark.parametrize("content", ["[]", "1", "null", "{", '{"files": []}', '{"files": null}'])
def test_a_state_file_of_another_form_is_an_incomplete_checkpoint(tmp_path, content):
    (tmp_path / "checkpoint-1").mkdir()
    (tmp_path / "checkpoint-1" / script.STATE_FILE).write_text(content)
    assert script.list_checkpoints(tmp_path) == []


@pytest.mark.parametrize("flag", ["--dataset_name", "--train_data_dir", "--hub_token", "--output_dir"])
def test_an_empty_value_is_named(flag, capsys):
    with pytest.raises(SystemExit):
        script.parse_args(["--train_data_dir=x", f"{flag}="])
    assert f"{flag} is empty" in capsys.readouterr().err


def test_the_launchers_spelling_of_local_rank_is_accepted():
    assert script.parse_args(["--train_data_dir=x", "--local-rank=3"]).local_rank == 3


@pytest.mark.parametrize(
    ("flag", "suggestion"),
    [
        ("--lr=1", "--learning_rate"),
        ("--learnin_rate=1", "--learning_rate"),
        ("--batch_size=2", "--train_batch_size"),
    ],
)
def test_a_misspelt_flag_is_answered_with_the_nearest(flag, suggestion, capsys):
    with pytest.raises(SystemExit):
        script.parse_args(["--train_data_dir=x", flag])
    assert f"did you mean {suggestion}?" in capsys.readouterr().err


def test_pushing_without_a_token_says_what_to_do(models, pictures, tmp_path, run_main):
    finished = run_main(tiny_args(models, pictures, tmp_path / "run", **SHORT, push_to_hub=True))
    assert finished.returncode == 1, finished
    assert "hf auth login" in last_line(finished)


# ------------------------------------------------------------------------------------------- the latent cache


@pytest.fixture(scope="module")
def cached_run(models, tmp_path_factory, run_main):
    """The folder of the data set and of a cache of it, made by a run with --skip_bad_rows."""
    folder = tmp_path_factory.mktemp("cached")
    shutil.copytree(PICTURES, folder / "data")
    name = json.loads((PICTURES / "metadata.jsonl").read_text().splitlines()[5])["file_name"]
    (folder / "data" / name).rename(folder / "missing")
    flags = SHORT | {"cache_latents": True, "cache_dir": folder / "cache", "skip_bad_rows": True}
    finished = run_main(tiny_args(models, folder / "data", folder / "run", **flags))
    assert finished.returncode == 0, finished
    return folder, name


@pytest.mark.parametrize("cut", ["at a batch", "anywhere", "empty"])
@pytest.mark.slow
def test_a_truncated_cache_is_made_anew(cached_run, models, tmp_path, run_main, cut):
    folder, _ = cached_run
    cache = Path(shutil.copytree(folder / "cache", tmp_path / "cache"))
    (shard,) = (cache / "wuerstchen_latents").rglob("*.arrow")
    whole = shard.read_bytes()
    if cut == "at a batch":
        batches = list(script.pa.ipc.open_stream(whole))
        assert len(batches) == 2
        schema = batches[0].schema
        with script.pa.OSFile(str(shard), "wb") as sink, script.pa.ipc.new_stream(sink, schema) as writer:
            writer.write_batch(batches[0])
    else:
        shard.write_bytes(whole[: len(whole) // 2 if cut == "anywhere" else 0])
    flags = SHORT | {"cache_latents": True, "cache_dir": cache, "skip_bad_rows": True}
    finished = run_main(tiny_args(models, folder / "data", tmp_path / "run", **flags))
    assert finished.returncode == 0, finished
    assert shard.read_bytes() == whole
    assert same_weights(load_result(tmp_path / "run"), load_result(folder / "run"))


def test_a_row_that_can_be_read_again_is_encoded_again(cached_run, models, tmp_path, run_main):
    folder, name = cached_run
    cache = Path(shutil.copytree(folder / "cache", tmp_path / "cache"))
    (shard,) = (cache / "wuerstchen_latents").rglob("*.arrow")
    args = script.parse_args([f"--train_data_dir={folder / 'data'}", "--resolution=64"])
    rows = script.choose_sizes(script.load_train_dataset(args), args, rows_hash="")
    rows = script.RowDataset(rows, args)
    assert script.load_shard(shard, rows) is not None
    shutil.copy(folder / "missing", folder / "data" / name)
    try:
        assert script.load_shard(shard, rows) is None
    finally:
        (folder / "data" / name).unlink()
