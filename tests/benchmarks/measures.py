# SPDX-License-Identifier: Apache-2.0
"""What benchmark.py measures. Each function time_... takes the size, the script's command line and the time
at which its process was started, and returns named numbers."""

import argparse
import contextlib
import math
import platform
import statistics
import time
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
from torch.utils.data import DataLoader

import train_text_to_image_prior as script


# ------------------------------------------------------------------------------------------------- the limits
def tflop_per_image(prior: dict, side: int, tokens: int = 77) -> float:
    """Floating point operations, in 10^12, to train a WuerstchenPrior of this config on one image, whose
    latents are side x side, if nothing is computed twice.

    A layer that computes m numbers from n costs m * n multiply-adds at each position it is applied to. Of the
    `depth` blocks of c channels, at each of the side * side positions: a depthwise 3 x 3 convolution (9 c),
    two layers to four times the channels and back (4 + 4 c^2), query, key, value and output (4 c^2), and
    attention, which compares a position with all positions and tokens and then averages those (2 c each). At
    each token: the mapper to c channels, key and value (3 c^2). Once: the timestep's scale and shift (2 c *
    c_r). Before and after the blocks a position goes from c_in channels to c and back to 2 c_in, and a token
    from c_cond to c and then to c. Elementwise operations are not counted.

    A multiply-add is two operations; the backward pass does each twice, for the gradient of the input and of
    the weight (or of either factor, in attention). That makes six.
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
    images = args.train_batch_size * args.gradient_accumulation_steps
    times = np.diff(ends[-num_timed - 1 :])
    return {
        "images_per_second": images * num_timed / times.sum(),
        "median": images / statistics.median(times),
    }


def time_script(size, argv: list[str], started: float) -> dict:
    """The script's own `main`. Without saving: the time to write 12 GB to a disk is not of interest."""
    script.save_pipeline = script.save_model_card = lambda *_, **__: None
    script.Validator.log_validation = lambda *_: None
    log_metrics, ends = script.log_metrics, []

    def log_and_time(*arguments):
        log_metrics(*arguments)
        ends.append(time.time())

    script.log_metrics = log_and_time
    script.main(argv)
    args, num_timed = script.parse_args(argv), size.steps[1]
    steps = script.read_metrics(Path(args.output_dir))[-num_timed:]
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


def time_checkpointing(size, argv: list[str], started: float) -> dict:
    """ms of a micro-step, forward and backward, and its peak memory: without --gradient_checkpointing, with
    it under autocast's default settings, and as the script has both."""
    run, found = set_up(argv), {}
    prior, cuda = run.prior.train(), run.accelerator.device.type == "cuda"
    latents, prompt_embeds = encode(run)
    timesteps = torch.rand(len(latents), device=latents.device)
    default_autocast = accelerate.utils.AutocastKwargs()

    def micro_step(autocast_handler):
        with run.accelerator.autocast(autocast_handler):
            pred_noise = prior(latents.float(), timesteps, prompt_embeds)
        pred_noise.float().square().mean().backward()

    for name, autocast_handler in (("none", None), ("default autocast", default_autocast), ("ours", None)):
        if name == "none":
            prior.disable_gradient_checkpointing()
        else:
            prior.enable_gradient_checkpointing()
        for _ in range(3):
            micro_step(autocast_handler)
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        times = [seconds(micro_step, autocast_handler) for _ in range(12)]
        found[f"{name}, ms"] = statistics.median(times) * 1000
        if cuda:
            found[f"{name}, peak of allocated GiB"] = torch.cuda.max_memory_allocated() / 2**30
    return found


# ------------------------------------------------------------------------------------------ encoding, reading
def set_up(argv: list[str]) -> SimpleNamespace:
    """What `main` has before it trains, and the first batch of the data, on the device."""
    args = script.parse_args(argv)
    accelerator = script.setup_accelerator(args)
    device = accelerator.device
    rows = script.choose_sizes(script.load_train_dataset(args), args, rows_hash="")
    tokenizer = script.load_tokenizer(args)
    text_encoder, image_encoder = script.load_encoders(args, script.frozen_dtype(accelerator), device)
    preprocess = script.make_preprocess(args, tokenizer, empty_embeds=None, train=True)
    samples = script.SampleDataset(rows, preprocess, args.seed, skip_bad_rows=False)
    batch = script.collate_fn([samples[row, row] for row in range(args.train_batch_size)])
    (batch,) = script.iterate_batches([batch], device, skipped_rows=set(), signals=[])
    return SimpleNamespace(
        args=args,
        accelerator=accelerator,
        rows=rows,
        preprocess=preprocess,
        batch=batch,
        tokenizer=tokenizer,
        text_encoder=text_encoder,
        image_encoder=image_encoder,
        prior=script.load_prior(args, None, text_encoder, image_encoder).to(device),
    )


def encode(run: SimpleNamespace) -> tuple[torch.Tensor, torch.Tensor]:
    """The latents and embeddings of the first batch."""
    return script.encode_batch(run.batch, run.text_encoder, run.image_encoder)


def cache(run: SimpleNamespace, rows: script.SizedRows) -> script.SizedRows:
    """The rows as --cache_latents has them."""
    return script.cache_latents(
        run.accelerator, rows, run.args, run.tokenizer, run.text_encoder, run.image_encoder
    )


def repeat_rows(rows: script.SizedRows, num_rows: int) -> script.SizedRows:
    """The same files again and again, up to a number of rows."""
    repeats = math.ceil(num_rows / len(rows))
    repeated = datasets.concatenate_datasets([rows.dataset] * repeats)
    return script.SizedRows(repeated, rows.sizes, np.tile(rows.buckets, repeats)).select(range(num_rows))


def read_batches(
    run: SimpleNamespace, rows: script.SizedRows, preprocess: Callable, size, workers: int
) -> list[float]:
    """ms to read the very first micro-batch, and then each of the timed ones, with the script's data
    loader."""
    args = argparse.Namespace(**vars(run.args) | {"dataloader_num_workers": workers})
    plan = script.SamplePlan(
        seed=args.seed,
        num_rows=len(rows),
        rows_hash="",
        num_processes=1,
        train_batch_size=args.train_batch_size,
        gradient_accumulation_steps=1,
    )
    batches = script.SampleOrder(rows, plan).train_batches(0, 0, sum(size.batches))
    dataloader = script.make_dataloader(rows, preprocess, batches, args, run.accelerator.device)
    dataloader.timeout = 0  # of `iterate_batches`, which also copies to the device
    ends = [time.perf_counter()]
    for batch in dataloader:
        assert "error" not in batch, batch
        ends.append(time.perf_counter())
    times = np.diff(ends) * 1000
    return [times[0], *times[size.batches[0] :]]


def time_encoding(size, argv: list[str], started: float) -> dict:
    """Rows/s of the pass over the data that --cache_latents makes, and of each of its two halves alone."""
    run, num_rows = set_up(argv), size.encoded_rows
    rows = repeat_rows(run.rows, num_rows)
    models = (run.tokenizer, run.text_encoder, run.image_encoder)
    dataloader = DataLoader(
        script.RowDataset(rows, run.args),
        batch_size=script.CACHE_BATCH_SIZE,
        collate_fn=script.collate_rows,
        num_workers=run.args.dataloader_num_workers,
    )

    def encode_batches(num_batches: int):
        for _ in range(num_batches):
            encode(run)

    def read():
        for batch in dataloader:
            assert not any(batch["errors"])

    encode_batches(2)
    num_batches = num_rows // script.CACHE_BATCH_SIZE
    return {
        "--cache_latents, rows/s": num_rows / seconds(cache, run, rows),
        "of that, hashing the weights, s": seconds(script.cache_key, rows, run.args, *models),
        "encoders alone, pixels on the device, rows/s": num_rows / seconds(encode_batches, num_batches),
        f"reading JPEGs alone, {size.workers} workers, rows/s": num_rows / seconds(read),
    }


def time_loader(size, argv: list[str], started: float) -> dict:
    """images/s of the data loader that reads images, if nothing waits for them."""
    run = set_up(argv)
    _, *times = read_batches(run, run.rows, run.preprocess, size, size.workers)
    speed = run.args.train_batch_size * len(times) / sum(times) * 1000
    return {f"loader without a cache, {size.workers} workers, images/s": speed}


def time_growth(size, argv: list[str], started: float) -> dict:
    """ms to read a batch of few and of many cached rows. The many are the same files mapped again and again,
    so this measures how rows are found, not a disk."""
    run, found = set_up(argv), {}
    cached = cache(run, run.rows)
    (empty_embeds,) = script.embed_prompts([""], run.tokenizer, run.text_encoder)
    preprocess = partial(
        script.preprocess_cached,
        empty_embeds=empty_embeds[0].cpu(),
        caption_dropout=run.args.caption_dropout,
    )
    for num_rows in size.cached_rows:
        first, *later = read_batches(run, repeat_rows(cached, num_rows), preprocess, size, workers=0)
        found[f"a batch from {num_rows:,} cached rows, ms"] = statistics.median(later)
        found[f"the first one, from {num_rows:,} cached rows, ms"] = first
    return found


# -------------------------------------------------------------------------------------------------- exactness
def compare_gradients(size, argv: list[str], started: float) -> dict:
    """The relative error of a step's gradient compared with float32's, with --mixed_precision alone and with
    --compile. Without dropout, for which each would use other random numbers."""
    run = set_up(argv)
    prior, accelerator = run.prior.train(), run.accelerator
    for module in prior.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    latents, prompt_embeds = encode(run)
    image_embeds = (latents.float() + script.LATENT_STD) / script.LATENT_MEAN
    noise = torch.randn_like(image_embeds)
    timesteps = torch.linspace(0.05, 0.95, len(noise), device=noise.device)
    noisy_latents = diffusers.DDPMWuerstchenScheduler().add_noise(image_embeds, noise, timesteps)

    def compute_gradients(precision, prompt_embeds: torch.Tensor) -> dict:
        prior.zero_grad()
        with precision:
            pred_noise = prior(noisy_latents, timesteps, prompt_embeds)
        F.mse_loss(pred_noise.float(), noise).backward()
        # Softmax does not depend on a bias of the keys: its gradient is only rounding.
        weights = {name: p for name, p in prior.named_parameters() if not name.endswith("to_k.bias")}
        return {name: p.grad.to("cpu", torch.float32, copy=True) for name, p in weights.items()}

    exact, found = compute_gradients(contextlib.nullcontext(), prompt_embeds.float()), {}
    for name in ("without", "with"):
        if name == "with":
            script.compile_prior(prior, accelerator, run.args, prompt_embeds[:1])
        gradients = compute_gradients(accelerator.autocast(), prompt_embeds)
        errors = {n: (gradients[n] - exact[n]).norm().item() for n in exact}
        norms = {n: exact[n].norm().item() for n in exact}
        total_error = math.hypot(*errors.values()) / math.hypot(*norms.values())
        label = f"{run.args.mixed_precision} {name} --compile"
        found[f"{label}, error"] = total_error
        found[f"{label}, worst tensor's"] = max(errors[n] / norms[n] for n in exact)
    return found
