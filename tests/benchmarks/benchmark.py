# SPDX-License-Identifier: Apache-2.0
"""How fast the script trains, encodes and reads, side by side with the reference's way of doing a step.

    python tests/benchmarks/benchmark.py --out DIR                  # all rows
    python tests/benchmarks/benchmark.py --out DIR --rows reference-guide guide guide-cached
    python tests/benchmarks/benchmark.py --list

On a GPU the models have their published sizes and random weights, and the pictures are JPEGs of 1024 pixels; on a CPU
all is tiny, to see that this program still runs. Models and pictures are made once, in --work (6 GB). Each row runs
in a process of its own, which starts afresh on a GPU and is a quick fork on a CPU. One that fails says so in the table
and in DIR/NAME.log. DIR/results.json grows row by row, and a later call keeps the rows of earlier ones, if they are of
the same device, libraries and script, so that the table can be made in several calls.

The script's rows are the real `main` with its loader, but without validating and saving. The reference's rows are its
step alone, which finds its pixels on the device: if anything, they flatter it.

images/s is of the later updates together, by the clock, with all that happens between them; the median is that of an
update alone. The first compiled row of a batch size compiles, and the next ones find that done, so that "first update"
shows both. Where the loader cannot keep up the median is too high, since batches come in bursts, one a worker.
"""

import argparse
import contextlib
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
from pathlib import Path
from types import SimpleNamespace

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # the first process must not take memory of the GPU
TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(TESTS / "benchmarks"), str(TESTS), str(TESTS.parent)]

import diffusers  # noqa: E402
import measures  # noqa: E402
import numpy as np  # noqa: E402
import tiny_models  # noqa: E402
import torch  # noqa: E402
from PIL import Image  # noqa: E402
from transformers import CLIPTextConfig, CLIPTextModel  # noqa: E402

import modeling_efficient_net_encoder as encoding  # noqa: E402
import train_text_to_image_prior as script  # noqa: E402

# Updates and batches are (first ones not timed, timed ones). The loader reads two batches a worker ahead, and more
# than those must be taken before its own speed shows. `limit`: seconds a row may take.
TINY = SimpleNamespace(name="tiny", resolution=64, picture=96, pictures=32, workers=2, matmul=256, limit=240)
TINY.updates, TINY.reference_updates, TINY.batches, TINY.encoded_rows = (1, 3), (1, 2), (5, 8), 64
REAL = SimpleNamespace(name="real", resolution=768, picture=1024, pictures=256, workers=4, matmul=8192, limit=420)
REAL.updates, REAL.reference_updates, REAL.batches, REAL.encoded_rows = (10, 20), (3, 9), (20, 200), 4096
TINY.cached_rows, REAL.cached_rows = (1_000, 10_000), (1_000, 1_000_000)
REAL_PRIOR = {"c": 1536, "c_cond": 1280, "c_r": 64, "depth": 32, "nhead": 24}
REAL_TEXT = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20}
SAME = ("device", "size", "torch", "diffusers", "script")  # what rows of one table have in common

# The guide's command, and what other rows change in it.
GUIDE = {"mixed_precision": "fp16", "train_batch_size": 4, "gradient_accumulation_steps": 4, "learning_rate": 1e-5}
GUIDE |= {"gradient_checkpointing": True, "max_grad_norm": 1, "lr_scheduler": "constant", "lr_warmup_steps": 0}
BF16 = {"mixed_precision": "bf16", "gradient_accumulation_steps": 1, "gradient_checkpointing": False}
BF16_16, BF16_32, CACHED = BF16 | {"train_batch_size": 16}, BF16 | {"train_batch_size": 32}, {"cache_latents": True}
BASE = "reference-guide"  # what the ratio is to
TRAINING = {
    BASE: (measures.time_reference, {}),
    "reference-bf16-16": (measures.time_reference, BF16_16),
    "guide": (measures.time_script, {}),
    "guide-cached": (measures.time_script, CACHED),
    "bf16-16": (measures.time_script, BF16_16),
    "bf16-16-cached": (measures.time_script, BF16_16 | CACHED),
    "bf16-32-cached": (measures.time_script, BF16_32 | CACHED),
    "guide-8bit-adam": (measures.time_script, {"use_8bit_adam": True}),
}
TRAINING |= {
    f"{n}-compile": (m, flags | {"compile": True}) for n, (m, flags) in TRAINING.items() if m is measures.time_script
}
OTHER = {"encoding": (measures.time_encoding, {"train_batch_size": encoding.ENCODING_BATCH})}
OTHER |= {"gradients": (measures.compare_gradients, BF16 | {"train_batch_size": 4, "compile": True})}
OTHER |= {
    "checkpointing": (measures.time_checkpointing, BF16 | {"train_batch_size": 4, "gradient_checkpointing": True})
}
OTHER |= {"loader": (measures.time_loader, {}), "growth": (measures.time_growth, {})}
ROWS = TRAINING | OTHER


# ------------------------------------------------------------------------------------ models, pictures, flags
def draw_picture(file: Path, side: int, seed: int):
    """A JPEG of random shapes: noise of several scales, made smooth, and a little grain, so that it takes about the
    bytes of a photo."""
    draw, picture = np.random.default_rng(seed), np.zeros((side, side, 3), np.float32)
    for cells, share in ((3, 0.45), (12, 0.25), (48, 0.17), (192, 0.13)):
        noise = Image.fromarray(draw.integers(0, 256, (cells, cells, 3), np.uint8))
        picture += share * np.asarray(noise.resize((side, side), Image.Resampling.BICUBIC), np.float32)
    picture += draw.normal(0, 2, picture.shape)
    Image.fromarray(picture.clip(0, 255).astype(np.uint8)).save(file, quality=90)


def make_inputs(size, work: Path) -> dict:
    """Writes the models, laid out as the published ones, and the pictures with their captions."""
    tiny_models.make_tiny_models(work)
    if size.name == "real":  # the image encoder has its published size already
        with torch.device("cuda"):
            tiny_models.make_prior(**REAL_PRIOR).save_pretrained(work / "prior" / "prior")
            config = CLIPTextConfig(**REAL_TEXT, projection_dim=1280, hidden_act="gelu", vocab_size=49408)
            CLIPTextModel(config).half().save_pretrained(work / "prior" / "text_encoder")
    (work / "pictures").mkdir(exist_ok=True)
    files = [work / "pictures" / f"{index:04d}.jpg" for index in range(size.pictures)]
    with ThreadPoolExecutor() as pool:
        list(pool.map(draw_picture, files, [size.picture] * len(files), range(len(files))))
    rows = [{"file_name": file.name, "text": f"coloured clouds, number {file.stem}"} for file in files]
    (work / "pictures" / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {}


def flags_of(size, work: Path, folder: Path, flags: dict) -> list[str]:
    """The script's command line: the guide's, changed by `flags`. What it writes goes to `folder`."""
    settings = {f"pretrained_{name}_model_name_or_path": work / name for name in ("prior", "decoder")}
    settings |= {"pretrained_image_encoder_name_or_path": work / "encoder", "train_data_dir": work / "pictures"}
    settings |= {"resolution": size.resolution, "dataloader_num_workers": size.workers, "report_to": "none"}
    settings |= {"output_dir": folder / "run", "cache_dir": folder / "cache", "max_train_steps": sum(size.updates)}
    settings |= {"seed": "0"} | GUIDE | flags
    return [f"--{name}" if value is True else f"--{name}={value}" for name, value in settings.items() if value]


# ------------------------------------------------------------------------------------------- processes, the table
def driver_memory() -> float | None:
    """GiB of the GPU's memory in use, as the driver has it; None where there is no nvidia-smi."""
    device = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    command = ["nvidia-smi", f"--id={device}", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    with contextlib.suppress(OSError, ValueError):
        return int(subprocess.run(command, capture_output=True, text=True).stdout) / 1024


def child(log: Path, result_file: Path, start_method: str, measure, *arguments):
    """Writes what `measure` gives, or how it failed, into a file; what it prints goes to the log."""
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    # The loader's workers are to start as a user's do, not as this process was.
    multiprocessing.set_start_method(start_method, force=True)
    try:
        result = {name: v if isinstance(v, str) else float(v) for name, v in measure(*arguments).items()}
        if not all(math.isfinite(value) for value in result.values() if isinstance(value, float)):
            raise ValueError(f"not all numbers are finite: {result}")
        if not torch.cuda.is_available():  # where it is, the driver tells
            result["peak_gib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    except BaseException as error:
        traceback.print_exc()
        result = {"error": " ".join(f"{type(error).__name__}: {error}".split()).replace("|", "/")[:200]}
    result_file.write_text(json.dumps(result))


def run_apart(size, log: Path, measure, *arguments) -> dict:
    """What `measure` gives in a process of its own, or {"error": why it did not}."""
    deadline, memory = time.time() + size.limit, []
    context = multiprocessing.get_context("spawn" if size.name == "real" else "fork")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "result.json")
        given = (log, file, multiprocessing.get_start_method(), measure, size, *arguments)
        process = context.Process(target=child, args=given)
        process.start()
        while process.is_alive() and time.time() < deadline:
            memory += [used] if size.name == "real" and (used := driver_memory()) else []
            process.join(0.2)
        if process.is_alive():
            process.kill()
            process.join()
            return {"error": f"stopped after {size.limit} seconds"}
        result = json.loads(file.read_text()) if file.exists() else {"error": f"exit status {process.exitcode}"}
    return result | ({"peak_gib": max(memory)} if memory else {})


def refusal(argv: list[str]) -> str:
    """What the script's parser says against a command line; "" if nothing."""
    with contextlib.redirect_stderr(io.StringIO()) as told:
        try:
            script.parse_args(argv)
        except SystemExit:
            return told.getvalue().strip().splitlines()[-1].split("error: ")[-1]
    return ""


def table(results: dict) -> str:
    """The results as Markdown."""
    rows, columns = results["rows"], ("images/s", "median", "ratio", "of the ceiling", "peak GiB", "first update, s")
    told = "{device}, PyTorch {torch}, diffusers {diffusers}, {date}, {size} models, {resolution} pixels. "
    told += "An image takes {tflop_per_image:.4g} TFLOP; bf16 matrix products reach {ceiling_tflops:.4g} TFLOP/s."
    lines = [told.format(**results), "", f"| row | {' | '.join(columns)} | remark |", "|---" * 8 + "|"]
    for name in (name for name in TRAINING if name in rows):
        row, speed = rows[name], rows[name].get("images_per_second")
        ratio, share = speed and row.get("ratio"), speed and row["share_of_ceiling"]
        cells = zip(
            (speed, row.get("median"), ratio, share, row.get("peak_gib"), row.get("first_update_s")),
            (".1f", ".1f", ".2f", ".1%", ".1f", ".1f"),
            strict=True,
        )
        remark = f"failed: {row['error']}" if "error" in row else row.get("remark", "")
        remark = f"{row['skipped_updates']:.0f} updates skipped" if row.get("skipped_updates") else remark
        shown = ["-" if value is None else format(value, form) for value, form in cells]
        lines.append(f"| {' | '.join([name, *shown, remark])} |")
    lines += ["", "| what | |", "|---|---|"]
    for name in (name for name in OTHER if name in rows):
        row = {what: value for what, value in rows[name].items() if not what.endswith("_gib")}
        lines += [f"| {name}: {w} | {v if isinstance(v, str) else format(v, '.4g')} |" for w, v in row.items()]
    lines += ["", *(f"* left out: {name} ({reason})" for name, reason in results["left_out"].items())]
    return "\n".join(lines)


def earlier_rows(file: Path, results: dict) -> dict:
    """The rows that an earlier call has measured, if it was in every way the same."""
    earlier = json.loads(file.read_text()) if file.exists() else {}
    return earlier["rows"] if all(earlier.get(name) == results[name] for name in SAME) else {}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder for results.json and the rows' logs")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS), metavar="NAME")
    parser.add_argument("--work", type=Path, help="folder for models and pictures; by default a temporary one, kept")
    parser.add_argument("--list", action="store_true", help="name the rows, and what they change in the guide's flags")
    args = parser.parse_args()
    size = REAL if torch.cuda.is_available() else TINY
    work = args.work or Path(tempfile.gettempdir(), f"wuerstchen-benchmark-{size.name}")
    argv = {name: flags_of(size, work, work / f"run-{name}", flags) for name, (_, flags) in ROWS.items()}
    left_out = {name: reason for name in ROWS if (reason := refusal(argv[name]))}
    if args.list:
        for name, (_, flags) in ROWS.items():
            print(f"{name}: {flags}{' -- left out: ' if name in left_out else ''}{left_out.get(name, '')}")
        return
    if args.out is None:
        parser.error("give --out")
    for folder in (args.out, work):
        folder.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(work / "compiled", ignore_errors=True)
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(work / "compiled")

    def measure(name: str, function, *given) -> dict:
        found = run_apart(size, args.out / f"{name}.log", function, *given)
        if "error" in found and name not in ROWS:
            sys.exit(f"{name}: {found['error']}; see {args.out / name}.log")
        said = re.search(r"--compile is left out.*", (args.out / f"{name}.log").read_text(errors="replace"))
        return found | ({"remark": said[0].replace("|", "/")[:200]} if said else {})

    if not (work / "made").exists():
        measure("inputs", make_inputs, work)
        (work / "made").touch()
    prior = json.loads((work / "prior" / "prior" / "config.json").read_text())
    results = measure("ceiling", measures.measure_ceiling) | {"size": size.name, "resolution": size.resolution}
    results |= {"tflop_per_image": measures.tflop_per_image(prior, math.ceil(size.resolution / encoding.STRIDE))}
    results |= {"torch": torch.__version__, "diffusers": diffusers.__version__, "date": time.strftime("%Y-%m-%d")}
    results |= {"script": encoding.fingerprint(*(Path(module.__file__).read_text() for module in (script, encoding)))}
    results |= {"left_out": {name: reason for name, reason in left_out.items() if name in args.rows}}
    file = args.out / "results.json"
    results["rows"] = earlier_rows(file, results)
    for name in (name for name in args.rows if name not in left_out):
        started = time.time()
        row = measure(name, ROWS[name][0], argv[name], started)
        shutil.rmtree(work / f"run-{name}", ignore_errors=True)
        if speed := row.get("images_per_second"):
            row["share_of_ceiling"] = speed * results["tflop_per_image"] / results["ceiling_tflops"]
        results["rows"][name] = row
        base = results["rows"].get(BASE, {}).get("images_per_second")
        for row in results["rows"].values():
            if base and "images_per_second" in row:
                row["ratio"] = row["images_per_second"] / base
        file.write_text(json.dumps(results, indent=2))
        print(f"{name}, {time.time() - started:.0f} s: {results['rows'][name]}", file=sys.stderr, flush=True)
    print(table(results))


if __name__ == "__main__":
    main()
