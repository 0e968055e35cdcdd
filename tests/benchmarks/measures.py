# SPDX-License-Identifier: Apache-2.0
"""What benchmark.py measures. Each function that is called time_... takes the sizes, the script's command line and the
time at which its process was started, and gives named numbers."""

import contextlib
import functools
import math
import platform
import statistics
import time
from pathlib import Path
from types import SimpleNamespace

import accelerate
import datasets
import diffusers
import numpy as np
import torch
import torch.nn.functional as F

import modeling_efficient_net_encoder as encoding
import train_text_to_image_prior as script


# ----------------------------------------------------------------------------------------------- the limits
def tflop_per_image(prior: dict, side: int, tokens: int = 77) -> float:
    """Floating point operations, in 10^12, to train a WuerstchenPrior of this config on one picture, whose latents are
    side x side, if nothing is computed twice.

    A layer that makes m numbers from n costs m * n multiply-adds at each place it is applied to. Of the `depth` blocks
    of c channels, at each of the side * side places: a depthwise 3 x 3 convolution (9 c), two layers to four times the
    channels and back (4 + 4 c^2), query, key, value and output (4 c^2), and attention, which compares a place with
    all places and tokens and then averages those (2 c each). At each token: the mapper to c channels, key and value
    (3 c^2). Once: the timestep's scale and shift (2 c * c_r). Before and after the blocks a place goes from c_in
    channels to c and back to 2 c_in, and a token from c_cond to c and then to c. Pointwise work is left out.

    A multiply-add is two operations; the backward pass does each twice, for the gradient of the input and of the
    weight (or of either factor, in attention). That makes six.
    """
    c, places = prior["c"], side * side
    a_place = 9 * c + 12 * c**2 + 2 * c * (places + tokens)
    block = places * a_place + tokens * 3 * c**2 + 2 * c * prior["c_r"]
    ends = places * 3 * prior["c_in"] * c + tokens * (prior["c_cond"] * c + c**2)
    return 6 * (prior["depth"] * block + ends) / 1e12


def seconds(work, *given) -> float:
    """How long a call takes, until the device has done it."""
    wait = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    wait()
    started = time.perf_counter()
    work(*given)
    wait()
    return time.perf_counter() - started


def measure_ceiling(size) -> dict:
    """The device's name and what its bf16 matrix product does, in TFLOP/s: the best of six rounds."""
    device, n = ("cuda" if torch.cuda.is_available() else "cpu"), size.matmul
    a, b = (torch.randn(n, n, device=device, dtype=torch.bfloat16) for _ in range(2))
    best = min(seconds(lambda: [a @ b for _ in range(20)]) for _ in range(6)) / 20
    name = torch.cuda.get_device_name() if device == "cuda" else f"CPU ({platform.machine()})"
    return {"device": name, "ceiling_tflops": 2 * n**3 / best / 1e12}


# --------------------------------------------------------------------------------------------------- training
def speeds(args, ends: list[float], timed: int) -> dict:
    """images/s of the last `timed` updates, which ended at these times: of all together, and the median."""
    images, spent = args.train_batch_size * args.gradient_accumulation_steps, np.diff(ends[-timed - 1 :])
    return {"images_per_second": images * timed / spent.sum(), "median": images / statistics.median(spent)}


def time_script(size, argv: list[str], started: float) -> dict:
    """The script's own `main`. Without saving: 12 GB to a disk are not what is measured."""
    for name in ("save_result", "save_model_card", "log_validation"):
        setattr(script, name, lambda *_, **__: None)
    ends, write, args, timed = [], script.log_numbers, script.parse_args(argv), size.updates[1]

    def log_numbers(*given):
        write(*given)
        ends.append(time.time())

    script.log_numbers = log_numbers
    script.main(argv)
    rows = encoding.read_losses(Path(args.output_dir))[-timed:]
    found = speeds(args, ends, timed) | {"median": statistics.median(row["images_per_second"] for row in rows)}
    found |= {"first_update_s": ends[0] - started, "loss": rows[-1]["train_loss"]}
    return found | {"skipped_updates": sum(not math.isfinite(row["grad_norm"]) for row in rows)}


def time_reference(size, argv: list[str], started: float) -> dict:
    """A step as Hugging Face's script does it, on pixels and tokens that are on the device already: autocast about the
    prior, all else by default, timesteps in half precision, and two numbers read back a micro-step."""
    parts = open_parts(argv)
    args, accelerator, scheduler = parts.args, parts.accelerator, diffusers.DDPMWuerstchenScheduler()
    accelerator.autocast_handler = accelerate.utils.AutocastKwargs()
    parts.prior.set_default_attn_processor()
    if args.gradient_checkpointing:
        parts.prior.enable_gradient_checkpointing()
    optimizer = torch.optim.AdamW(parts.prior.parameters(), lr=args.learning_rate)
    prior, optimizer = accelerator.prepare(parts.prior.train(), optimizer)
    ends, skipped, (untimed, timed) = [], 0, size.reference_updates
    for update in range(untimed + timed):
        for _ in range(args.gradient_accumulation_steps):
            with accelerator.accumulate(prior):
                with torch.no_grad():
                    prompt_embeds, latents = encode(parts)
                    image_embeds = latents.add(1.0).div(42.0)
                    noise = torch.randn_like(image_embeds)
                    timesteps = torch.rand(len(noise), device=noise.device, dtype=noise.dtype)
                    noisy_latents = scheduler.add_noise(image_embeds, noise, timesteps)
                pred_noise = prior(noisy_latents, timesteps, prompt_embeds)
                loss = F.mse_loss(pred_noise.float(), noise.float())
                accelerator.gather(loss.detach().repeat(len(noise))).mean().item()
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(prior.parameters(), args.max_grad_norm)
                optimizer.step()
                optimizer.zero_grad()
            value = loss.detach().item()  # waits for all before it, the optimizer, too
        ends.append(time.time())
        skipped += update >= untimed and accelerator.optimizer_step_was_skipped
    return speeds(args, ends, timed) | {"loss": value, "skipped_updates": skipped}


def time_checkpointing(size, argv: list[str], started: float) -> dict:
    """ms of a micro-step, forward and backward, and the most memory that it takes: without --gradient_checkpointing,
    with it as diffusers does it by itself, under autocast's own settings, and as the script does both."""
    parts, found = open_parts(argv), {}
    prior, cuda = parts.prior.train(), parts.accelerator.device.type == "cuda"
    prompt_embeds, latents = encode(parts)
    given = latents.float(), torch.rand(len(latents), device=latents.device), prompt_embeds
    chosen, default = prior._gradient_checkpointing_func, accelerate.utils.AutocastKwargs()

    def micro_step(precision):
        with parts.accelerator.autocast(precision):
            pred_noise = prior(*given)
        pred_noise.float().square().mean().backward()

    for name, function, precision in (("none", None, None), ("diffusers'", None, default), ("ours", chosen, None)):
        prior.disable_gradient_checkpointing()
        if name != "none":
            prior.enable_gradient_checkpointing(function)
        for _ in range(3):
            micro_step(precision)
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        spent = [seconds(micro_step, precision) for _ in range(12)]
        found[f"{name}, ms"] = statistics.median(spent) * 1000
        found |= {f"{name}, allocated GiB at most": torch.cuda.max_memory_allocated() / 2**30} if cuda else {}
    return found


# -------------------------------------------------------------------------------------------- encoding, reading
def open_parts(argv: list[str]) -> SimpleNamespace:
    """What `main` has before it trains, and the first batch of the data, on the device."""
    args = script.parse_args(argv)
    accelerator, rows = script.make_accelerator(args), script.load_train_dataset(args, args.seed)
    tokenizer, *models = script.load_models(args, None, script.frozen_dtype(accelerator))
    text_encoder, image_encoder, prior = (model.to(accelerator.device) for model in models)
    parts = SimpleNamespace(args=args, accelerator=accelerator, rows=rows, tokenizer=tokenizer, prior=prior)
    parts.text_encoder, parts.image_encoder, size = text_encoder, image_encoder, args.train_batch_size
    samples = encoding.TrainSamples(
        rows, functools.partial(script.preprocess_train, tokenizer=tokenizer, args=args), 0, False
    )
    batch = script.collate_fn([samples[position] for position in range(size)])
    parts.samples, parts.batch = samples, encoding.next_batch(iter([batch]), accelerator.device, set())
    return parts


@torch.no_grad()
def encode(parts: SimpleNamespace) -> tuple[torch.Tensor, torch.Tensor]:
    """What both encoders give for the first batch: embeddings and latents."""
    return script.encode_batch(parts.text_encoder, parts.image_encoder, parts.batch)


def cache(parts: SimpleNamespace, rows: datasets.Dataset) -> datasets.Dataset:
    """The rows as --cache_latents gives them."""
    models = parts.tokenizer, parts.text_encoder, parts.image_encoder
    return script.cache_encodings(parts.accelerator, rows, *models, parts.args)


def read_batches(parts: SimpleNamespace, samples: encoding.TrainSamples, size, workers: int) -> list[float]:
    """ms to read the very first micro-batch, and then each of the timed ones, as the script reads them."""
    plan = {"processes": 1, "train_batch_size": parts.args.train_batch_size, "gradient_accumulation_steps": 1}
    given = {"batch_sampler": encoding.micro_batches(0, sum(size.batches), plan, 0), "num_workers": workers}
    given |= {"collate_fn": script.collate_fn, "pin_memory": parts.accelerator.device.type == "cuda"}
    times = [time.perf_counter()]
    for batch in torch.utils.data.DataLoader(samples, **given):
        assert "problem" not in batch, batch
        times.append(time.perf_counter())
    spent = np.diff(times) * 1000
    return [spent[0], *spent[size.batches[0] :]]


def time_encoding(size, argv: list[str], started: float) -> dict:
    """Rows/s of the pass over the data that --cache_latents makes, and of each of its two halves alone."""
    parts, count = open_parts(argv), size.encoded_rows
    rows = datasets.concatenate_datasets([parts.rows] * math.ceil(count / len(parts.rows))).select(range(count))
    reader = encoding.RowReader(rows, functools.partial(script.read_row, args=parts.args))
    loader = torch.utils.data.DataLoader(
        reader, encoding.ENCODING_BATCH, collate_fn=list, num_workers=parts.args.dataloader_num_workers
    )

    def encode_batches(batches: int):
        for _ in range(batches):
            encode(parts)

    def read():
        for batch in loader:
            assert not any(problem for _, problem in batch)

    encode_batches(2)
    return {
        "--cache_latents, rows/s": count / seconds(cache, parts, rows),
        "of that, hashing the weights, s": seconds(encoding.fingerprint, parts.text_encoder, parts.image_encoder),
        "encoders alone, pixels on the device, rows/s": count
        / seconds(encode_batches, count // encoding.ENCODING_BATCH),
        f"reading JPEGs alone, {size.workers} workers, rows/s": count / seconds(read),
    }


def time_loader(size, argv: list[str], started: float) -> dict:
    """images/s of the loader that reads pictures, taken as fast as it gives them."""
    parts = open_parts(argv)
    _, *spent = read_batches(parts, parts.samples, size, size.workers)
    speed = parts.args.train_batch_size * len(spent) / sum(spent) * 1000
    return {f"loader without a cache, {size.workers} workers, images/s": speed}


def time_growth(size, argv: list[str], started: float) -> dict:
    """ms to read a batch of few and of many cached rows. The many are the same files mapped again and again, so this
    tells of looking rows up, not of a disk."""
    parts, found = open_parts(argv), {}
    cached = cache(parts, parts.rows)
    with torch.no_grad():
        empty = script.embed_tokens(*script.tokenize_captions([""], parts.tokenizer), parts.text_encoder)[0].cpu()
    read = functools.partial(encoding.read_cached, empty=empty, args=parts.args)
    for count in size.cached_rows:
        rows = datasets.concatenate_datasets([cached] * math.ceil(count / len(cached))).select(range(count))
        first, *later = read_batches(parts, encoding.TrainSamples(rows, read, 0, False), size, 0)
        found[f"a batch from {count:,} cached rows, ms"] = statistics.median(later)
        found[f"the first one, from {count:,} cached rows, ms"] = first
    return found


# ------------------------------------------------------------------------------------------------- exactness
def compare_gradients(size, argv: list[str], started: float) -> dict:
    """How far a step's gradient is from float32's, relative: as --mixed_precision gives it, and --compile with that.
    Without dropout, which each would draw in its own way."""
    parts = open_parts(argv)
    prior, accelerator, scheduler = parts.prior.train(), parts.accelerator, diffusers.DDPMWuerstchenScheduler()
    for module in prior.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    prompt_embeds, latents = encode(parts)
    image_embeds = (latents.float() + script.LATENT_STD) / script.LATENT_MEAN
    noise = torch.randn_like(image_embeds)
    timesteps = torch.linspace(0.05, 0.95, len(noise), device=noise.device)
    noisy_latents = scheduler.add_noise(image_embeds, noise, timesteps)

    def gradients(precision, prompt_embeds: torch.Tensor) -> dict:
        prior.zero_grad()
        with precision:
            pred_noise = prior(noisy_latents, timesteps, prompt_embeds)
        F.mse_loss(pred_noise.float(), noise).backward()
        # Softmax does not see a bias of the keys: what it has for a gradient is rounding.
        named = {name: p.grad for name, p in prior.named_parameters() if not name.endswith("to_k.bias")}
        return {name: gradient.to("cpu", torch.float32, copy=True) for name, gradient in named.items()}

    exact, found = gradients(contextlib.nullcontext(), prompt_embeds.float()), {}
    for name in ("without", "with"):
        if name == "with":
            encoding.compile_prior(prior, accelerator, parts.args, prompt_embeds[:1])
        given = gradients(accelerator.autocast(), prompt_embeds)
        norms = {n: ((given[n] - exact[n]).norm().item(), exact[n].norm().item()) for n in exact}
        error, norm = (math.hypot(*column) for column in zip(*norms.values(), strict=True))
        found[f"{parts.args.mixed_precision} {name} --compile, error"] = error / norm
        found[f"{parts.args.mixed_precision} {name} --compile, worst tensor's"] = max(e / n for e, n in norms.values())
    return found
