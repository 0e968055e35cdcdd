# SPDX-License-Identifier: Apache-2.0
"""How fast the script trains, encodes and reads, side by side with the reference's way of computing a step.

    python tests/benchmarks/benchmark.py --out DIR                  # all rows
    python tests/benchmarks/benchmark.py --out DIR --rows reference-guide guide guide-cached
    python tests/benchmarks/benchmark.py --list

On a GPU the models have their published sizes and random weights, and the images are JPEGs of 1024 pixels; on
a CPU all is tiny, to check that this program still runs. Models and images are made once, in --work (6 GB).
Each row runs in a process of its own: a new one on a GPU, a fork, which is faster, on a CPU. One that fails
is reported in the table and in DIR/NAME.log. DIR/results.json grows row by row, and a later call keeps the
rows of earlier ones if they are of the same device, libraries and script, so the table can be made in several
calls.

The script's rows are the real `main` with its data loader, but without validating and saving. The reference's
rows are its step alone, whose pixels are on the device already: if anything, this favors them.

images/s is that of the timed steps together, by the clock, with all that happens between them; the median is
that of a single step. The first compiled row of a batch size compiles, and the next ones find that cached, so
"first step" shows both. Where the data loader cannot keep up, the median is too high, since batches come in
bursts, one per worker.
"""

import argparse
import contextlib
import hashlib
import io
import json
import math
import multiprocessing
import os
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# The first process must not take memory of the GPU.
os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(TESTS / "benchmarks"), str(TESTS), str(TESTS.parent)]

import diffusers  # noqa: E402
import measures  # noqa: E402
import numpy as np  # noqa: E402
import tiny_models  # noqa: E402
import torch  # noqa: E402
from PIL import Image  # noqa: E402
from transformers import CLIPTextConfig, CLIPTextModel  # noqa: E402

import train_text_to_image_prior as script  # noqa: E402


@dataclass(frozen=True)
class Size:
    """How much is measured."""

    name: str
    resolution: int
    image_side: int  # pixels of the JPEGs
    num_images: int
    workers: int
    matmul: int  # side of the matrices whose product is the ceiling
    limit: int  # seconds that a row may take
    # Numbers of (untimed, then timed) steps and batches. The data loader reads two batches a worker ahead,
    # and its own speed shows only after those.
    steps: tuple[int, int]
    reference_steps: tuple[int, int]
    batches: tuple[int, int]
    encoded_rows: int
    cached_rows: tuple[int, int]  # few and many


TINY = Size(
    name="tiny",
    resolution=64,
    image_side=96,
    num_images=32,
    workers=2,
    matmul=256,
    limit=240,
    steps=(1, 3),
    reference_steps=(1, 2),
    batches=(5, 8),
    encoded_rows=64,
    cached_rows=(1_000, 10_000),
)
REAL = Size(
    name="real",
    resolution=768,
    image_side=1024,
    num_images=256,
    workers=4,
    matmul=8192,
    limit=420,
    steps=(10, 20),
    reference_steps=(3, 9),
    batches=(20, 200),
    encoded_rows=4096,
    cached_rows=(1_000, 1_000_000),
)
REAL_PRIOR = {"c": 1536, "c_cond": 1280, "c_r": 64, "depth": 32, "nhead": 24}
REAL_TEXT = {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
}
COMMON = ("device", "size", "torch", "diffusers", "script")  # the same for all rows of a table

# The guide's command, and what other rows change in it.
GUIDE = {
    "mixed_precision": "fp16",
    "train_batch_size": 4,
    "gradient_accumulation_steps": 4,
    "gradient_checkpointing": True,
    "learning_rate": 1e-5,
    "max_grad_norm": 1,
    "lr_scheduler": "constant",
    "lr_warmup_steps": 0,
}
BF16 = {"mixed_precision": "bf16", "gradient_accumulation_steps": 1, "gradient_checkpointing": False}
BF16_4 = BF16 | {"train_batch_size": 4}
BF16_16 = BF16 | {"train_batch_size": 16}
BF16_32 = BF16 | {"train_batch_size": 32}
CACHED = {"cache_latents": True}
SCRIPT_ROWS = {
    "guide": {},
    "guide-cached": CACHED,
    "bf16-16": BF16_16,
    "bf16-16-cached": BF16_16 | CACHED,
    "bf16-32-cached": BF16_32 | CACHED,
    "guide-8bit-adam": {"use_8bit_adam": True},
}
BASE = "reference-guide"  # the other rows' ratios are to this one
TRAINING = {
    BASE: (measures.time_reference, {}),
    "reference-bf16-16": (measures.time_reference, BF16_16),
}
for name, flags in SCRIPT_ROWS.items():
    TRAINING[name] = (measures.time_script, flags)
for name, flags in SCRIPT_ROWS.items():
    TRAINING[f"{name}-compile"] = (measures.time_script, flags | {"compile": True})
OTHER = {
    "encoding": (measures.time_encoding, {"train_batch_size": script.CACHE_BATCH_SIZE}),
    "gradients": (measures.compare_gradients, BF16_4 | {"compile": True}),
    "checkpointing": (measures.time_checkpointing, BF16_4 | {"gradient_checkpointing": True}),
    "loader": (measures.time_loader, {}),
    "growth": (measures.time_growth, {}),
}
ROWS = TRAINING | OTHER


# -------------------------------------------------------------------------------------- models, images, flags
def make_image(file: Path, side: int, seed: int):
    """A JPEG of smooth random shapes of several scales with a little grain, so that it has about the bytes of
    a photo."""
    rng, image = np.random.default_rng(seed), np.zeros((side, side, 3), np.float32)
    for cells, share in ((3, 0.45), (12, 0.25), (48, 0.17), (192, 0.13)):
        noise = Image.fromarray(rng.integers(0, 256, (cells, cells, 3), np.uint8))
        image += share * np.asarray(noise.resize((side, side), Image.Resampling.BICUBIC), np.float32)
    image += rng.normal(0, 2, image.shape)
    Image.fromarray(image.clip(0, 255).astype(np.uint8)).save(file, quality=90)


def make_inputs(size: Size, work: Path) -> dict:
    """Writes the models, in the published ones' layout, and the images with their captions."""
    tiny_models.make_tiny_models(work)
    if size.name == "real":  # the image encoder has its published size already
        with torch.device("cuda"):
            tiny_models.make_prior(**REAL_PRIOR).save_pretrained(work / "prior" / "prior")
            config = CLIPTextConfig(**REAL_TEXT, projection_dim=1280, hidden_act="gelu", vocab_size=49408)
            CLIPTextModel(config).half().save_pretrained(work / "prior" / "text_encoder")
    folder = work / "images"
    folder.mkdir(exist_ok=True)
    files = [folder / f"{index:04d}.jpg" for index in range(size.num_images)]
    with ThreadPoolExecutor() as pool:
        list(pool.map(make_image, files, [size.image_side] * len(files), range(len(files))))
    rows = [{"file_name": file.name, "text": f"colored clouds, number {file.stem}"} for file in files]
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {}


def make_flags(size: Size, work: Path, folder: Path, flags: dict) -> list[str]:
    """The script's command line: the guide's, changed by `flags`. What it writes goes to `folder`."""
    settings = {
        "pretrained_prior_model_name_or_path": work / "prior",
        "pretrained_decoder_model_name_or_path": work / "decoder",
        "pretrained_image_encoder_name_or_path": work / "encoder",
        "train_data_dir": work / "images",
        "resolution": size.resolution,
        "dataloader_num_workers": size.workers,
        "report_to": "none",
        "output_dir": folder / "run",
        "cache_dir": folder / "cache",
        "max_train_steps": sum(size.steps),
        "seed": "0",
    }
    settings |= GUIDE | flags
    given = {name: value for name, value in settings.items() if value}
    return [f"--{name}" if value is True else f"--{name}={value}" for name, value in given.items()]


# --------------------------------------------------------------------------------------- processes, the table
def driver_memory() -> float | None:
    """GiB of the GPU's memory in use according to the driver; None where there is no nvidia-smi."""
    device = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    command = ["nvidia-smi", f"--id={device}", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    with contextlib.suppress(OSError, ValueError):
        return int(subprocess.run(command, capture_output=True, text=True).stdout) / 1024


def run_in_child(log: Path, result_file: Path, start_method: str, measure, *arguments):
    """Writes what `measure` returns, or its error, to a file; what it prints goes to the log."""
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    # The data loader's workers should start as a user's do, not as this process did.
    multiprocessing.set_start_method(start_method, force=True)
    try:
        result = {
            name: value if isinstance(value, str) else float(value)
            for name, value in measure(*arguments).items()
        }
        if not all(math.isfinite(value) for value in result.values() if isinstance(value, float)):
            raise ValueError(f"not all numbers are finite: {result}")
        if not torch.cuda.is_available():  # on a GPU, `driver_memory` measures it
            result["peak_gib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    except BaseException as error:
        traceback.print_exc()
        result = {"error": " ".join(f"{type(error).__name__}: {error}".split()).replace("|", "/")[:200]}
    result_file.write_text(json.dumps(result))


def run_measure(size: Size, log: Path, measure, *arguments) -> dict:
    """What `measure` returns in a process of its own, or {"error": the reason}."""
    deadline, memory = time.time() + size.limit, []
    context = multiprocessing.get_context("spawn" if size.name == "real" else "fork")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "result.json")
        process = context.Process(
            target=run_in_child,
            args=(log, file, multiprocessing.get_start_method(), measure, size, *arguments),
        )
        process.start()
        while process.is_alive() and time.time() < deadline:
            used = driver_memory() if size.name == "real" else None
            if used:
                memory.append(used)
            process.join(0.2)
        if process.is_alive():
            process.kill()
            process.join()
            return {"error": f"stopped after {size.limit} seconds"}
        if not file.exists():
            return {"error": f"exit status {process.exitcode}"}
        result = json.loads(file.read_text())
    if memory:
        result["peak_gib"] = max(memory)
    return result


def rejection(argv: list[str]) -> str:
    """The script's error message about a command line; "" if there is none."""
    with contextlib.redirect_stderr(io.StringIO()) as output:
        try:
            script.parse_args(argv)
        except SystemExit:
            return output.getvalue().strip().splitlines()[-1].split("error: ")[-1]
    return ""


def make_table(results: dict) -> str:
    """The results as Markdown."""
    columns = {
        "images/s": ("images_per_second", ".1f"),
        "median": ("median", ".1f"),
        "ratio": ("ratio", ".2f"),
        "of the ceiling": ("share_of_ceiling", ".1%"),
        "peak GiB": ("peak_gib", ".1f"),
        "first step, s": ("first_step_s", ".1f"),
    }
    rows = results["rows"]
    heading = (
        "{device}, PyTorch {torch}, diffusers {diffusers}, {date}, {size} models, {resolution} pixels. An "
        "image takes {tflop_per_image:.4g} TFLOP; bf16 matrix products reach {ceiling_tflops:.4g} TFLOP/s."
    )
    lines = [heading.format(**results), "", f"| row | {' | '.join(columns)} | remark |", "|---" * 8 + "|"]
    for name in (name for name in TRAINING if name in rows):
        row = rows[name]
        cells = [format(row[key], form) if key in row else "-" for key, form in columns.values()]
        remark = row.get("remark", "")
        if "error" in row:
            remark = f"failed: {row['error']}"
        elif row.get("skipped_steps"):
            remark = f"{row['skipped_steps']:.0f} steps skipped"
        lines.append(f"| {' | '.join([name, *cells, remark])} |")
    lines += ["", "| what | |", "|---|---|"]
    for name in (name for name in OTHER if name in rows):
        for what, value in rows[name].items():
            if not what.endswith("_gib"):
                shown = value if isinstance(value, str) else format(value, ".4g")
                lines.append(f"| {name}: {what} | {shown} |")
    lines.append("")
    lines += [f"* not run: {name} ({reason})" for name, reason in results["rejected"].items()]
    return "\n".join(lines)


def earlier_rows(file: Path, results: dict) -> dict:
    """The rows that an earlier call has measured under the same conditions."""
    earlier = json.loads(file.read_text()) if file.exists() else {}
    return earlier["rows"] if all(earlier.get(name) == results[name] for name in COMMON) else {}


def hash_script() -> str:
    files = (Path(script.__file__), Path(script.__file__).with_name("modeling_efficient_net_encoder.py"))
    return hashlib.blake2b(b"".join(file.read_bytes() for file in files), digest_size=16).hexdigest()


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="folder for results.json and the rows' logs")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS), metavar="NAME")
    parser.add_argument(
        "--work", type=Path, help="folder for models and images; default: in the temporary folder"
    )
    parser.add_argument(
        "--list", action="store_true", help="list the rows and what they change in the guide's flags"
    )
    args = parser.parse_args()
    size = REAL if torch.cuda.is_available() else TINY
    work = args.work or Path(tempfile.gettempdir(), f"wuerstchen-benchmark-{size.name}")
    argv = {name: make_flags(size, work, work / f"run-{name}", flags) for name, (_, flags) in ROWS.items()}
    rejected = {name: reason for name in ROWS if (reason := rejection(argv[name]))}
    if args.list:
        for name, (_, flags) in ROWS.items():
            print(f"{name}: {flags}" + (f" -- not run: {rejected[name]}" if name in rejected else ""))
        return
    if args.out is None:
        parser.error("give --out")
    for folder in (args.out, work):
        folder.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(work / "compiled", ignore_errors=True)
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(work / "compiled")

    def run(name: str, measure, *arguments) -> dict:
        log = args.out / f"{name}.log"
        result = run_measure(size, log, measure, *arguments)
        if "error" in result and name not in ROWS:
            sys.exit(f"{name}: {result['error']}; see {log}")
        warning = re.search(r"--compile is ignored.*", log.read_text(errors="replace"))
        if warning:
            result["remark"] = warning[0].replace("|", "/")[:200]
        return result

    if not (work / "made").exists():
        run("inputs", make_inputs, work)
        (work / "made").touch()
    prior = json.loads((work / "prior" / "prior" / "config.json").read_text())
    latents_side = math.ceil(size.resolution / script.STRIDE)
    results = run("ceiling", measures.measure_ceiling) | {
        "size": size.name,
        "resolution": size.resolution,
        "tflop_per_image": measures.tflop_per_image(prior, latents_side),
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "date": time.strftime("%Y-%m-%d"),
        "script": hash_script(),
        "rejected": {name: reason for name, reason in rejected.items() if name in args.rows},
    }
    file = args.out / "results.json"
    results["rows"] = earlier_rows(file, results)
    for name in (name for name in args.rows if name not in rejected):
        started = time.time()
        row = run(name, ROWS[name][0], argv[name], started)
        shutil.rmtree(work / f"run-{name}", ignore_errors=True)
        if "images_per_second" in row:
            speed = row["images_per_second"] * results["tflop_per_image"]
            row["share_of_ceiling"] = speed / results["ceiling_tflops"]
        results["rows"][name] = row
        base = results["rows"].get(BASE, {}).get("images_per_second")
        for row in results["rows"].values():
            if base and "images_per_second" in row:
                row["ratio"] = row["images_per_second"] / base
        file.write_text(json.dumps(results, indent=2))
        print(f"{name}, {time.time() - started:.0f} s: {results['rows'][name]}", file=sys.stderr, flush=True)
    print(make_table(results))


if __name__ == "__main__":
    main()
