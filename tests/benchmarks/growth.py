# SPDX-License-Identifier: Apache-2.0
"""What grows with the data set and with the run, in seconds and in GB of main memory. Needs Linux.

    python tests/benchmarks/growth.py                                       # some two minutes
    python tests/benchmarks/growth.py --rows 1000 --steps 1000 --checkpoints 10

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
from types import SimpleNamespace

os.environ["HF_HUB_OFFLINE"] = "1"
TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(TESTS), str(TESTS.parent)]

import datasets  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
from accelerate import PartialState  # noqa: E402
from transformers import CLIPTokenizerFast  # noqa: E402

import train_text_to_image_prior as script  # noqa: E402

CAPTION = "a photo of an owl that sits on a branch at night, number "
BATCHES = 100
FAR = 10**5  # a step at which a run is resumed


@contextlib.contextmanager
def measure(results: list, name: str, calls: int = 1):
    """Appends the name, the seconds of a call, and by how many GB the process is larger at its largest."""
    Path("/proc/self/clear_refs").write_text("5")  # the largest is the current size again
    before, start = peak_memory(), time.perf_counter()
    yield
    results.append((name, (time.perf_counter() - start) / calls, peak_memory() - before))


def peak_memory() -> float:
    """The process's largest resident size in GB."""
    return int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024 / 1e9


def parse_script_args(*argv: str) -> argparse.Namespace:
    args = script.parse_args(["--train_data_dir=unused", "--output_dir=.", "--seed=0", *argv])
    args.output_dir = Path(args.output_dir)
    return args


def measure_rows(count: int) -> list:
    results, args = [], parse_script_args("--train_batch_size=16")
    images = [{"bytes": b"not read", "path": f"{row}.jpg"} for row in range(count)]
    columns = {"image": images, "text": [f"{CAPTION}{row}" for row in range(count)]}
    features = datasets.Features(image=datasets.Image(decode=False), text=datasets.Value("string"))
    dataset = datasets.Dataset.from_dict(columns, features=features)
    tokenizer = CLIPTokenizerFast.from_pretrained(TESTS / "data" / "clip-tokenizer")
    with measure(results, "check captions and images"):
        _, captions, _ = script.check_rows(dataset, args)
    with measure(results, "count captions that are cut"):
        script.report_captions(captions, tokenizer)
    sizes = np.full((count, 2), args.resolution)
    rows, _ = script.split_held_out(count, 64, seed=0)
    for first_step in (0, FAR):
        with measure(results, f"order the rows, to step {first_step:,}"):
            batches = script.order_batches(
                rows, sizes, args, SimpleNamespace(num_processes=1, process_index=0), first_step
            )
            next(batches)
        with measure(results, f"a micro-batch of 16 at step {first_step:,}", BATCHES):
            samples = [next(batches) for _ in range(BATCHES)]
    with measure(results, "read a row", BATCHES):
        for _, row in [batch[0] for batch in samples]:
            dataset[row]
    return results


def measure_steps(count: int) -> list:
    """Of a loss.jsonl with a held-out loss every 500 steps."""
    results, args = [], parse_script_args(f"--max_train_steps={count}")
    metrics = {"train_loss": 0.1, "lr": 1e-4, "grad_norm": 0.5, "images_per_second": 51.2, "epoch": 1.5}
    with open("loss.jsonl", "w") as file:
        for step in range(1, count + 1):
            file.write(json.dumps({"step": step} | metrics) + "\n")
            if step % 500 == 0:
                file.write(json.dumps({"step": step, "val_loss": 0.1}) + "\n")
    with measure(results, "validate: draw the curve"):
        script.save_loss_curve(Path())
    with measure(results, "resume: truncate the log"):
        script.truncate_logs(args, {"global_step": count, "validated_step": count})
    with measure(results, "end: summary"):
        script.log_summary(args, count)
    return results


def measure_checkpoints(count: int) -> list:
    results, args = [], parse_script_args("--resume_from_checkpoint=latest")
    for step in range(count):
        folder = Path(f"checkpoint-{step}")
        folder.mkdir()
        (folder / script.OPTIMIZER_FILE).write_bytes(b"state")
        state = {"global_step": step, "files": {script.OPTIMIZER_FILE: 5}}
        (folder / script.STATE_FILE).write_text(json.dumps(state))
    with measure(results, "find the newest checkpoint"):
        assert script.find_checkpoint(args).name == f"checkpoint-{count - 1}"
    return results


KINDS = {  # what is measured, and for how many by default
    "rows": (measure_rows, [1_000, 1_000_000]),
    "steps": (measure_steps, [1_000, 1_000_000]),
    "checkpoints": (measure_checkpoints, [10, 10_000]),
}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for kind, (_, counts) in KINDS.items():
        parser.add_argument(f"--{kind}", type=int, nargs="+", default=counts)
    args = parser.parse_args()
    torch.set_num_threads(1)
    PartialState(cpu=True)  # the script's logger asks it for the rank
    print(f"PyTorch {torch.__version__}\n\n| of | | s | GB |\n|---|---|---|---|")
    for kind, (function, _) in KINDS.items():
        for count in getattr(args, kind):
            with tempfile.TemporaryDirectory() as folder:
                with multiprocessing.get_context("fork").Pool(1, os.chdir, [folder]) as pool:
                    results = pool.apply(function, [count])
                for name, seconds, memory in results:
                    print(f"| {count:,} {kind} | {name} | {seconds:.3g} | {memory:.1f} |", flush=True)


if __name__ == "__main__":
    main()
