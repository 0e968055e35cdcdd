# SPDX-License-Identifier: Apache-2.0
"""How fast the script trains, encodes and reads, side by side with the reference's way of computing a step.

    python tests/benchmarks/benchmark.py --out DIR                  # all rows
    python tests/benchmarks/benchmark.py --out DIR --rows reference-guide guide guide-cached

On a GPU the models have their published sizes and random weights, and the images are JPEGs of 1024 pixels; on
a CPU all is tiny, to check that this program still runs. Models and images are made once, in --work (6 GB).
Each row runs in a process of its own. One that fails is reported in the table and in DIR/NAME.log.
DIR/results.json grows row by row, and a later call keeps the rows of earlier ones if they are of the same
device, libraries and script.

The script's rows are the real `main` with its data loader, but without validating and saving. The reference's
rows are its step alone, whose pixels are on the device already: if anything, this favors them.

images/s is that of the timed steps together, by the clock, with all that happens between them; the median is
that of a single step, which is too high where batches come in bursts, one per worker. The first compiled row
of a batch size compiles, and the next ones find that cached: "first step" shows both.
"""

import argparse
import contextlib
import hashlib
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
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

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

# What is measured on a CPU, and on a GPU. Of steps: how many are not timed, and how many are.
SIZES = {
    "name": ("tiny", "real"),
    "resolution": (64, 768),
    "image_side": (96, 1024),  # pixels of the JPEGs
    "num_images": (32, 256),
    "workers": (2, 4),
    "matmul": (256, 8192),  # side of the matrices whose product is the ceiling
    "limit": (240, 420),  # seconds that a row may take
    "steps": ((1, 3), (10, 20)),
    "reference_steps": ((1, 2), (3, 9)),
    "encoded_rows": (64, 4096),
}
REAL_PRIOR = {"c": 1536, "c_cond": 1280, "c_r": 64, "depth": 32, "nhead": 24}
REAL_TEXT = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32}
REAL_TEXT |= {"num_attention_heads": 20, "projection_dim": 1280, "hidden_act": "gelu", "vocab_size": 49408}
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
TRAINING = {BASE: (measures.time_reference, {}), "reference-bf16-16": (measures.time_reference, BF16_16)}
TRAINING |= {name: (measures.time_script, flags) for name, flags in SCRIPT_ROWS.items()}
COMPILED = {f"{name}-compile": flags | {"compile": True} for name, flags in SCRIPT_ROWS.items()}
TRAINING |= {name: (measures.time_script, flags) for name, flags in COMPILED.items()}
OTHER = {"encoding": (measures.time_encoding, {"train_batch_size": script.CACHE_BATCH_SIZE})}
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


def make_inputs(size: SimpleNamespace, work: Path) -> dict:
    """Writes the models, in the published ones' layout, and the images with their captions."""
    tiny_models.make_tiny_models(work)
    if size.name == "real":  # the image encoder has its published size already
        with torch.device("cuda"):
            tiny_models.make_prior(**REAL_PRIOR).save_pretrained(work / "prior" / "prior")
            CLIPTextModel(CLIPTextConfig(**REAL_TEXT)).half().save_pretrained(work / "prior" / "text_encoder")
    folder = work / "images"
    folder.mkdir(exist_ok=True)
    files = [folder / f"{index:04d}.jpg" for index in range(size.num_images)]
    with ThreadPoolExecutor() as pool:
        list(pool.map(make_image, files, [size.image_side] * len(files), range(len(files))))
    rows = [{"file_name": file.name, "text": f"colored clouds, number {file.stem}"} for file in files]
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {}


def make_flags(size: SimpleNamespace, work: Path, folder: Path, flags: dict) -> list[str]:
    """The script's command line: the guide's, changed by `flags`. What it writes goes to `folder`."""
    models = {"prior_model": "prior", "decoder_model": "decoder", "image_encoder": "encoder"}
    settings = {f"pretrained_{model}_name_or_path": work / name for model, name in models.items()}
    settings |= {"train_data_dir": work / "images", "seed": "0", "report_to": "none"}
    settings |= {"output_dir": folder / "run", "cache_dir": folder / "cache"}
    settings |= {"resolution": size.resolution, "dataloader_num_workers": size.workers}
    settings |= {"max_train_steps": sum(size.steps)} | GUIDE | flags
    given = {name: value for name, value in settings.items() if value}
    return [f"--{name}" if value is True else f"--{name}={value}" for name, value in given.items()]


# --------------------------------------------------------------------------------------- processes, the table
def driver_memory() -> float | None:
    """GiB of the GPU's memory in use according to the driver; None where there is no nvidia-smi."""
    device = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    command = ["nvidia-smi", f"--id={device}", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    with contextlib.suppress(OSError, ValueError):
        return int(subprocess.run(command, capture_output=True, text=True).stdout) / 1024


def run_in_child(log: Path, result_file: Path, measure, *arguments):
    """Writes what `measure` returns to a file; what it prints, and its error, goes to the log."""
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    # The data loader's workers should start as a user's do, not as this process did.
    multiprocessing.set_start_method(None, force=True)
    result = {name: v if isinstance(v, str) else float(v) for name, v in measure(*arguments).items()}
    if not all(math.isfinite(value) for value in result.values() if isinstance(value, float)):
        raise ValueError(f"not all numbers are finite: {result}")
    if not torch.cuda.is_available():  # on a GPU, `driver_memory` measures it
        result["peak_gib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    result_file.write_text(json.dumps(result))


def run_measure(size: SimpleNamespace, log: Path, measure, *arguments) -> dict:
    """What `measure` returns in a process of its own, with a remark if --compile was ignored; or an
    "error" with the last line that it printed."""
    deadline, memory, file = time.time() + size.limit, [], log.with_suffix(".result")
    file.unlink(missing_ok=True)
    context = multiprocessing.get_context("spawn" if size.name == "real" else "fork")
    process = context.Process(target=run_in_child, args=(log, file, measure, size, *arguments))
    process.start()
    while process.is_alive() and time.time() < deadline:
        memory.append((size.name == "real" and driver_memory()) or 0.0)
        process.join(0.2)
    if process.is_alive():
        process.kill()
        return {"error": f"stopped after {size.limit} seconds"}
    printed = log.read_text(errors="replace").replace("|", "/")
    if process.exitcode != 0:
        return {"error": f"exit status {process.exitcode}: {printed.strip().splitlines()[-1:]}"[:300]}
    result = json.loads(file.read_text())
    if any(memory):
        result["peak_gib"] = max(memory)
    ignored = re.search(r"--compile is ignored.*", printed)
    return result | ({"remark": ignored[0][:200]} if ignored else {})


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
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for results.json and the rows' logs")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS), metavar="NAME")
    parser.add_argument("--work", type=Path, help="folder of models and images; default: a temporary one")
    args = parser.parse_args()
    size = SimpleNamespace(**{name: of[torch.cuda.is_available()] for name, of in SIZES.items()})
    work = args.work or Path(tempfile.gettempdir(), f"wuerstchen-benchmark-{size.name}")
    for folder in (args.out, work):
        folder.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(work / "compiled", ignore_errors=True)
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(work / "compiled")
    if not (work / "made").exists():
        made = run_measure(size, args.out / "inputs.log", make_inputs, work)
        if "error" in made:
            sys.exit(f"inputs: {made['error']}")
        (work / "made").touch()
    prior = json.loads((work / "prior" / "prior" / "config.json").read_text())
    files = (Path(script.__file__), Path(script.__file__).with_name("modeling_efficient_net_encoder.py"))
    results = run_measure(size, args.out / "ceiling.log", measures.measure_ceiling) | {
        "size": size.name,
        "resolution": size.resolution,
        "tflop_per_image": measures.tflop_per_image(prior, math.ceil(size.resolution / script.STRIDE)),
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "date": time.strftime("%Y-%m-%d"),
        "script": hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest(),
    }
    file = args.out / "results.json"
    earlier = json.loads(file.read_text()) if file.exists() else {}
    is_same = all(earlier.get(name) == results[name] for name in COMMON)
    rows = results["rows"] = earlier["rows"] if is_same else {}
    for name in args.rows:
        started, (measure, flags) = time.time(), ROWS[name]
        argv = make_flags(size, work, work / f"run-{name}", flags)
        rows[name] = run_measure(size, args.out / f"{name}.log", measure, argv, started)
        shutil.rmtree(work / f"run-{name}", ignore_errors=True)
        base = rows.get(BASE, {}).get("images_per_second")
        if "images_per_second" in rows[name]:
            tflops = rows[name]["images_per_second"] * results["tflop_per_image"]
            rows[name]["share_of_ceiling"] = tflops / results["ceiling_tflops"]
        for row in rows.values():
            if base and "images_per_second" in row:
                row["ratio"] = row["images_per_second"] / base
        file.write_text(json.dumps(results, indent=2))
        print(f"{name}, {time.time() - started:.0f} s: {rows[name]}", file=sys.stderr, flush=True)
    print(make_table(results))


if __name__ == "__main__":
    main()
