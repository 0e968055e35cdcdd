# SPDX-License-Identifier: Apache-2.0
"""What grows with the data set and with the run, in seconds and in GB of main memory. Needs Linux.

    python tests/benchmarks/growth.py                                       # some two minutes
    python tests/benchmarks/growth.py --rows 1000 --steps 1000 --checkpoints 10 --prompts 2

Each number is of one call, on one core, in a fork of its own. Rows are captions and names of images, which
are not read.
"""

import argparse
import contextlib
import json
import multiprocessing
import os
import re
import sys
import tempfile
import time
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(TESTS), str(TESTS.parent)]

import datasets  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
from PIL import Image  # noqa: E402
from PIL.PngImagePlugin import PngInfo  # noqa: E402
from transformers import CLIPTokenizerFast  # noqa: E402

import train_text_to_image_prior as script  # noqa: E402

CAPTION = "a photo of an owl that sits on a branch at night, number "
BATCHES = 100
FAR = 10**6  # a step at which a run is resumed


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[1_000, 1_000_000])
    parser.add_argument("--steps", type=int, nargs="+", default=[1_000, 1_000_000])
    parser.add_argument("--checkpoints", type=int, nargs="+", default=[10, 10_000])
    parser.add_argument("--prompts", type=int, nargs="+", default=[8, 64])
    return parser.parse_args()


def run_in_fork(function, count: int, folder: str) -> list[tuple[str, float, float]]:
    """What one of the functions below returns, from a process that starts with this one's memory, and runs
    in the folder."""

    def run():
        os.chdir(folder)
        theirs.send(function(count))

    ours, theirs = multiprocessing.Pipe()
    child = multiprocessing.get_context("fork").Process(target=run)
    child.start()
    theirs.close()  # so that a child that fails ends `recv`
    results = ours.recv()
    child.join()
    return results


@contextlib.contextmanager
def measure(results: list, name: str, calls: int = 1):
    """Appends the name, the seconds of a call, and by how many GB the process is larger at its largest."""
    Path("/proc/self/clear_refs").write_text("5")  # the largest is the current size again
    before, start = peak_memory(), time.perf_counter()
    yield
    seconds = (time.perf_counter() - start) / calls
    results.append((name, seconds, peak_memory() - before))


def peak_memory() -> float:
    """The process's largest resident size in GB."""
    return int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024 / 1e9


def measure_rows(count: int) -> list:
    results, args = [], script.parse_args(["--train_data_dir=unused", "--resolution=512"])
    images = [{"bytes": b"not read", "path": f"{row}.jpg"} for row in range(count)]
    columns = {"image": images, "text": [f"{CAPTION}{row}" for row in range(count)]}
    features = datasets.Features(image=datasets.Image(decode=False), text=datasets.Value("string"))
    dataset = datasets.Dataset.from_dict(columns, features=features)
    tokenizer = CLIPTokenizerFast.from_pretrained(TESTS / "data" / "clip-tokenizer")
    with measure(results, "check captions and images"):
        script.check_rows(dataset, args, tokenizer)
    with measure(results, "hash rows"):
        rows_hash = script.hash_rows(dataset, args)
    with measure(results, "hold out 64 rows, select and order the others"):
        rows = script.SizedRows(dataset, [(512, 512)], np.zeros(count, np.int64))
        rows = rows.select(script.split_held_out(count, 64, seed=0)[0])
        plan = script.SamplePlan(
            seed=0,
            num_rows=len(rows),
            rows_hash=rows_hash,
            num_processes=1,
            train_batch_size=16,
            gradient_accumulation_steps=1,
        )
        next(script.SampleOrder(rows, plan).train_batches(0, 0, 1))
    for first_step in (0, FAR):
        order = script.SampleOrder(rows, plan)
        batches = order.train_batches(0, first_step, first_step + BATCHES + 1)
        next(batches)  # orders an epoch
        with measure(results, f"a micro-batch of 16 at step {first_step:,}", BATCHES):
            samples = list(batches)
    with measure(results, "read a row", BATCHES):
        for _, row in [batch[0] for batch in samples]:
            rows[row]
    return results


def measure_steps(count: int) -> list:
    """Of a loss.jsonl with a held-out loss every 500 steps."""
    results, args = [], script.parse_args(["--train_data_dir=unused", "--output_dir=."])
    metrics = {"train_loss": 0.1, "lr": 1e-4, "grad_norm": 0.5, "images_per_second": 51.2, "epoch": 1.5}
    with open("loss.jsonl", "w") as file:
        for step in range(1, count + 1):
            file.write(json.dumps({"step": step} | metrics) + "\n")
            if step % 500 == 0:
                file.write(json.dumps({"step": step, "val_loss": 0.1}) + "\n")
    plan = script.SamplePlan(0, 1000, "", 1, 16, 1)
    with measure(results, "validate: draw the curve, see what has been done"):
        script.save_loss_curve(Path())
        any(row["step"] == count for row in script.read_metrics(Path(), "val_loss"))
    with measure(results, "resume: truncate the log"):
        script.truncate_logs(Path(), count)
    with measure(results, "end: summary"):
        script.log_summary(args, count, plan)
    return results


def measure_checkpoints(count: int) -> list:
    results = []
    for step in range(count):
        folder = Path(f"checkpoint-{step}")
        folder.mkdir()
        for name in ("optimizer.bin", "random_states_0.pkl"):
            (folder / name).write_bytes(b"state")
        script.write_state_file(folder, script.TrainState(global_step=step))
    with measure(results, "find the newest checkpoint"):
        assert script.find_checkpoint("latest", Path()).name == f"checkpoint-{count - 1}"
    return results


def measure_prompts(count: int) -> list:
    results, prompts = [], [f"{CAPTION}{index}" for index in range(count)]
    pixels = np.random.default_rng(0).integers(0, 64, (1024, 1024, 3), np.uint8)
    for index, prompt in enumerate(prompts):
        text, file = PngInfo(), script.sample_file(Path(), 0, index)
        text.add_itxt("prompt", prompt)
        file.parent.mkdir(exist_ok=True)
        Image.fromarray(pixels).save(file, pnginfo=text)
        for step in range(1, 20):
            os.link(file, script.sample_file(Path(), step, index))
    with measure(results, "contact sheet of 20 validations at 1024 pixels"):
        script.save_contact_sheet(Path(), prompts)
    return results


def main():
    args = parse_args()
    torch.set_num_threads(1)
    script.accelerate.PartialState(cpu=True)  # the script's logger asks it for the rank
    print(f"PyTorch {torch.__version__}\n\n| of | | s | GB |\n|---|---|---|---|")
    kinds = {
        "rows": measure_rows,
        "steps": measure_steps,
        "checkpoints": measure_checkpoints,
        "prompts": measure_prompts,
    }
    for kind, function in kinds.items():
        for count in getattr(args, kind):
            with tempfile.TemporaryDirectory() as folder:
                for name, seconds, memory in run_in_fork(function, count, folder):
                    print(f"| {count:,} {kind} | {name} | {seconds:.3g} | {memory:.1f} |", flush=True)


if __name__ == "__main__":
    main()
