# SPDX-License-Identifier: Apache-2.0
"""What benchmark.py measures. Each function time_... takes the size, the script's command line and the time
at which its process was started, and returns named numbers."""

import argparse
import math
import platform
import statistics
import time
from collections import deque
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import accelerate
import datasets
import diffusers
import numpy as np
import torch
import torch.nn.functional as F

import train_text_to_image_prior as script


# ------------------------------------------------------------------------------------------------- the limits
def tflop_per_image(prior: dict, side: int, tokens: int = 77) -> float:
    """10^12 floating point operations to train a WuerstchenPrior of this config on one image, whose latents
    are side x side, if nothing is computed twice. Elementwise operations are not counted.

    A layer from n to m numbers costs m * n multiply-adds at each position. A block has at each position of
    the latents a depthwise 3 x 3 convolution (9 c), two layers to four times the channels and back (4 + 4
    c^2), query, key, value and output (4 c^2), and attention, which compares a position with all positions
    and tokens and averages those (2 c each); at each token the mapper, key and value (3 c^2); once the
    timestep's scale and shift (2 c * c_r). A multiply-add is two operations, and the backward pass does each
    twice. That makes six.
    """
    c, positions = prior["c"], side * side
    per_position = 9 * c + 12 * c**2 + 2 * c * (positions + tokens)
    block = positions * per_position + tokens * 3 * c**2 + 2 * c * prior["c_r"]
    ends = positions * 3 * prior["c_in"] * c + tokens * (prior["c_cond"] * c + c**2)
    return 6 * (prior["depth"] * block + ends) / 1e12


def seconds(function: Callable, *arguments) -> float:
    """How long a call takes, until the device has finished it."""
    wait = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    wait()
    started = time.perf_counter()
    function(*arguments)
    wait()
    return time.perf_counter() - started


def measure_ceiling(size) -> dict:
    """The device's name and the speed of its bf16 matrix product, in TFLOP/s: the best of six rounds."""
    device, n = ("cuda" if torch.cuda.is_available() else "cpu"), size.matmul
    a, b = (torch.randn(n, n, device=device, dtype=torch.bfloat16) for _ in range(2))
    best = min(seconds(lambda: [a @ b for _ in range(20)]) for _ in range(6)) / 20
    name = torch.cuda.get_device_name() if device == "cuda" else f"CPU ({platform.machine()})"
    return {"device": name, "ceiling_tflops": 2 * n**3 / best / 1e12}


# --------------------------------------------------------------------------------------------------- training
def speeds(args: argparse.Namespace, ends: list[float], num_timed: int) -> dict:
    """images/s of the last `num_timed` steps, which ended at these times: of all together, and the median."""
    images, times = args.train_batch_size * args.gradient_accumulation_steps, np.diff(ends[-num_timed - 1 :])
    return {"images_per_second": images * num_timed / times.sum(), "median": images / np.median(times)}


def time_script(size, argv: list[str], started: float) -> dict:
    """The script's own `main`. Without saving: the time to write 12 GB to a disk is not of interest."""
    for name in ("log_validation", "save_checkpoint", "save_pipeline", "save_model_card"):
        setattr(script, name, lambda *_: None)
    log_metrics, ends = script.log_metrics, []

    def log_and_time(*arguments):
        log_metrics(*arguments)
        ends.append(time.time())

    script.log_metrics = log_and_time
    script.main(argv)
    args, num_timed = script.parse_args(argv), size.steps[1]
    steps = script.read_metrics(Path(args.output_dir), "train_loss")[-num_timed:]
    return speeds(args, ends, num_timed) | {
        "median": statistics.median(step["images_per_second"] for step in steps),
        "first_step_s": ends[0] - started,
        "loss": steps[-1]["train_loss"],
        "skipped_steps": sum(not math.isfinite(step["grad_norm"]) for step in steps),
    }


def time_reference(size, argv: list[str], started: float) -> dict:
    """A step as Hugging Face's script computes it, on pixels and tokens that are on the device already:
    autocast around the prior, everything else by default, timesteps in half precision, and two numbers
    transferred from the device in each micro-step."""
    run = set_up(argv)
    args, accelerator, noise_scheduler = run.args, run.accelerator, diffusers.DDPMWuerstchenScheduler()
    accelerator.autocast_handler = accelerate.utils.AutocastKwargs()
    run.prior.set_default_attn_processor()
    optimizer = torch.optim.AdamW(run.prior.parameters(), lr=args.learning_rate)
    prior, optimizer = accelerator.prepare(run.prior.train(), optimizer)
    ends, skipped, (num_untimed, num_timed) = [], 0, size.reference_steps
    for step in range(num_untimed + num_timed):
        for _ in range(args.gradient_accumulation_steps):
            with accelerator.accumulate(prior):
                with torch.no_grad():
                    latents, prompt_embeds = encode(run)
                    image_embeds = latents.add(1.0).div(42.0)
                    noise = torch.randn_like(image_embeds)
                    timesteps = torch.rand(len(noise), device=noise.device, dtype=noise.dtype)
                    noisy_latents = noise_scheduler.add_noise(image_embeds, noise, timesteps)
                pred_noise = prior(noisy_latents, timesteps, prompt_embeds)
                loss = F.mse_loss(pred_noise.float(), noise.float())
                accelerator.gather(loss.detach().repeat(len(noise))).mean().item()
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(prior.parameters(), args.max_grad_norm)
                optimizer.step()
                optimizer.zero_grad()
            value = loss.detach().item()  # waits for everything before it, also the optimizer
        ends.append(time.time())
        skipped += step >= num_untimed and accelerator.optimizer_step_was_skipped
    return speeds(args, ends, num_timed) | {"loss": value, "skipped_steps": skipped}


# ------------------------------------------------------------------------------------------ encoding, reading
def set_up(argv: list[str]) -> SimpleNamespace:
    """What `main` has before it trains, and the first batch of the data, on the device."""
    args = script.parse_args(argv)
    accelerator = script.setup_accelerator(args)
    tokenizer = script.load_model(args, script.PRIOR_FLAG, script.CLIPTokenizerFast, "tokenizer")
    dataset, _, rows_hash = script.check_rows(script.load_train_dataset(args), args)
    encoders = script.load_encoders(args, accelerator)
    prior = script.load_prior(args, None, *encoders).to(accelerator.device)
    run = SimpleNamespace(args=args, accelerator=accelerator, tokenizer=tokenizer, dataset=dataset)
    vars(run).update(rows_hash=rows_hash, encoders=encoders, prior=prior)
    run.preprocess = partial(script.preprocess_train, args=args, tokenizer=tokenizer)
    first = [(row, row) for row in range(args.train_batch_size)]
    run.batch = next(load(run, dataset, run.preprocess, [first], workers=0))
    return run


def encode(run: SimpleNamespace) -> tuple[torch.Tensor, torch.Tensor]:
    """The latents and embeddings of the first batch."""
    return script.encode_batch(run.batch, *run.encoders)


def make_sizes(run: SimpleNamespace, dataset: datasets.Dataset) -> np.ndarray:
    return np.full((len(dataset), 2), run.args.resolution)


def load(run: SimpleNamespace, dataset, preprocess: Callable, batches, workers: int):
    """The script's iterator of batches, read by so many workers and copied to the device."""
    args = argparse.Namespace(**vars(run.args) | {"dataloader_num_workers": workers})
    sizes, rows = make_sizes(run, dataset), np.arange(len(dataset))
    device = run.accelerator.device
    return script.load_batches(args, device, [], dataset, sizes, preprocess, rows, batches, train=True)


def cache(run: SimpleNamespace, dataset: datasets.Dataset) -> Path:
    """The folder of the rows as --cache_latents has them."""
    load = partial(script.load_batches, run.args, run.accelerator.device, [])
    models = (run.rows_hash, run.args, run.accelerator, run.tokenizer, *run.encoders)
    return script.cache_latents(load, dataset, make_sizes(run, dataset), *models)


def repeat_rows(dataset: datasets.Dataset, num_rows: int) -> datasets.Dataset:
    """The same files again and again, up to a number of rows."""
    repeated = datasets.concatenate_datasets([dataset] * math.ceil(num_rows / len(dataset)))
    return repeated.select(range(num_rows))


def time_encoding(size, argv: list[str], started: float) -> dict:
    """Rows/s of the pass over the data that --cache_latents makes, and of each of its two halves alone."""
    run, num_rows = set_up(argv), size.encoded_rows
    dataset = repeat_rows(run.dataset, num_rows)
    sizes = make_sizes(run, dataset)
    models = (run.rows_hash, run.args, run.tokenizer, *run.encoders)

    def encode_batches(num_batches: int):
        for _ in range(num_batches):
            encode(run)

    def read():
        batches = script.group_by_size(range(num_rows), sizes, script.CACHE_BATCH_SIZE)
        batches = load(run, dataset, partial(script.preprocess_row, args=run.args), batches, size.workers)
        deque(batches, maxlen=0)

    encode_batches(2)
    num_batches = num_rows // script.CACHE_BATCH_SIZE
    return {
        "--cache_latents, rows/s": num_rows / seconds(cache, run, dataset),
        "of that, hashing the weights, s": seconds(script.cache_key, dataset, sizes, *models),
        "encoders alone, pixels on the device, rows/s": num_rows / seconds(encode_batches, num_batches),
        f"reading JPEGs alone, {size.workers} workers, rows/s": num_rows / seconds(read),
    }
