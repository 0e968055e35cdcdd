# SPDX-License-Identifier: Apache-2.0
"""What training computes, against formulas written out here, other implementations and the unbroken run."""

import functools
import hashlib
import itertools
import json
import math
import re
import shutil
import socket
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.optimizer import AcceleratedOptimizer
from conftest import tiny_args
from diffusers import DDPMWuerstchenScheduler
from diffusers.models.attention_processor import AttnProcessor
from PIL import Image
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import CLIPTextModel, CLIPTokenizerFast

import train_text_to_image_prior as script
from modeling_efficient_net_encoder import EfficientNetEncoder

# Six samples an update, ten rows: epochs end within updates 2, 4 and 7, and with update 5. Validation follows each.
UNEVEN = {
    "train_batch_size": 2,
    "gradient_accumulation_steps": 3,
    "max_train_samples": 10,
    "max_train_steps": 7,
    "checkpointing_steps": 1,
    "use_ema": True,
    "caption_column": "captions",
    "validation_prompts": ["a red apple", "an owl at night"],
    "validation_epochs": 1,
    "lr_scheduler": "cosine",
    "lr_warmup_steps": 2,
    "learning_rate": 1e-3,
}


# --------------------------------------------------------------------------------- runs, and what they leave


def alpha_bar(t):
    """The share of the signal's variance that is left at t: the cosine schedule with s = 0.008, in float64."""
    s = 0.008
    angle = (torch.as_tensor(t, dtype=torch.float64) + s) / (1 + s) * math.pi / 2
    return (angle.cos() ** 2 / math.cos(s / (1 + s) * math.pi / 2) ** 2).clamp(1e-4, 0.9999)


# ------------------------------------------------------------------------------------------------- the step


BY_HAND = {
    "max_train_steps": 3,
    "train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "checkpointing_steps": 1,
    "learning_rate": 1e-3,
    "adam_beta1": 0.8,
    "adam_beta2": 0.9,
    "adam_weight_decay": 0.1,
    "adam_epsilon": 1e-3,  # large, or the first updates are the signs of gradients and rounding decides some
}


@pytest.mark.parametrize("max_grad_norm", [0.05, 1000.0], ids=["clipped", "not clipped"])
def test_loss_gradient_and_update_are_those_of_the_formulas(train, models, steady_prior, max_grad_norm):
    run = train(**BY_HAND, max_grad_norm=max_grad_norm, pretrained_prior_model_name_or_path=steady_prior)
    assert run.returncode == 0, run
    text_encoder = CLIPTextModel.from_pretrained(steady_prior / "text_encoder", attn_implementation="eager").eval()
    image_encoder = EfficientNetEncoder.from_pretrained(models / "encoder").eval()
    prior = script.wuerstchen.WuerstchenPrior.from_pretrained(steady_prior / "prior").train()
    prior.set_attn_processor(AttnProcessor())  # softmax(QK) V written out
    weights = dict(prior.named_parameters())
    mean, square = ({name: torch.zeros_like(w) for name, w in weights.items()} for _ in range(2))
    losses, norms, rates = run.logged("train_loss"), run.logged("grad_norm"), run.logged("lr")

    assert len(run.record["steps"]) == 6
    for update in (1, 2, 3):
        micro_steps = run.record["steps"][2 * update - 2 : 2 * update]
        micro_losses = []
        for step in micro_steps:
            t = step["timesteps"]
            with torch.no_grad():
                features = image_encoder.mapper(image_encoder.backbone(step["pixels"]))
                prompt_embeds = text_encoder(step["ids"], attention_mask=step["mask"])[0]
            signal = alpha_bar(t).view(-1, 1, 1, 1)
            noisy = (signal.sqrt() * ((features + 1) / 42) + (1 - signal).sqrt() * step["noise"]).float()
            loss = ((prior(noisy, t, prompt_embeds) - step["noise"]) ** 2).mean()
            (loss / 2).backward()
            micro_losses.append(loss.item())
        norm = torch.stack([w.grad.norm() for w in weights.values()]).norm().item()
        assert losses[update] == pytest.approx(np.mean(micro_losses), rel=1e-5)
        assert norms[update] == pytest.approx(norm, rel=1e-4), "the norm before clipping is logged"
        assert (norm > max_grad_norm) == (max_grad_norm == 0.05)
        assert run.record["clipped"][update - 1] == pytest.approx(min(norm, max_grad_norm), rel=1e-4)
        assert rates[update] == pytest.approx(1e-3)

        clip = min(1.0, max_grad_norm / norm)
        with torch.no_grad():
            for name, w in weights.items():
                gradient = clip * w.grad
                mean[name] = 0.8 * mean[name] + 0.2 * gradient
                square[name] = 0.9 * square[name] + 0.1 * gradient**2
                denominator = (square[name] / (1 - 0.9**update)).sqrt() + 1e-3
                w -= 1e-3 * 0.1 * w + 1e-3 * (mean[name] / (1 - 0.8**update)) / denominator
                w.grad = None
        weights_now = {name: w.detach() for name, w in weights.items()}
        before = (
            run.prior(update - 1)
            if update > 1
            else load_file(steady_prior / "prior" / "diffusion_pytorch_model.safetensors")
        )
        assert distance(run.prior(update), weights_now) < 1e-3 * distance(run.prior(update), before)


def test_everything_of_the_prior_is_trained_and_nothing_of_the_encoders(train, models):
    run = train(**UNEVEN)
    assert run.returncode == 0, run
    before = load_file(models / "prior" / "prior" / "diffusion_pytorch_model.safetensors")
    after = run.prior(7)
    assert before.keys() == after.keys()
    assert [name for name in before if torch.equal(before[name], after[name])] == []

    image_encoder = EfficientNetEncoder.from_pretrained(models / "encoder")
    text_encoder = CLIPTextModel.from_pretrained(models / "prior" / "text_encoder")
    assert same(run.record["frozen"]["image_encoder"], image_encoder.state_dict()), "batch statistics included"
    assert same(run.record["frozen"]["text_encoder"], text_encoder.state_dict())
    assert not any(step["image_encoder_training"] or step["text_encoder_training"] for step in run.record["steps"])


def draws_by_picture():
    """Makes noise and timesteps a function of each sample's pixels, however these are batched."""
    seeds, forward = [], EfficientNetEncoder.forward

    def noting(self, pixels):
        digests = [hashlib.sha256(sample.numpy().tobytes()).digest() for sample in pixels]
        seeds[:] = [int.from_bytes(digest[:6], "big") for digest in digests]
        return forward(self, pixels)

    def randn_like(tensor):
        samples = [torch.randn(tensor.shape[1:], generator=torch.Generator().manual_seed(seed)) for seed in seeds]
        assert len(samples) == len(tensor)
        return torch.stack(samples)

    def rand(count, device):
        assert count == len(seeds)
        return torch.tensor([seed / 2**48 for seed in seeds], device=device)

    EfficientNetEncoder.forward, torch.randn_like, torch.rand = noting, randn_like, rand


def test_accumulating_four_of_one_is_a_batch_of_four(train, steady_prior):
    flags = {
        "pretrained_prior_model_name_or_path": steady_prior,
        "adam_epsilon": 1e-3,
        "learning_rate": 1e-2,
        "max_grad_norm": 0.1,
        "checkpointing_steps": 1,
        "max_train_steps": 4,
    }
    at_once = train(draws_by_picture, **flags, train_batch_size=4)
    one_by_one = train(draws_by_picture, **flags, train_batch_size=1, gradient_accumulation_steps=4)
    assert at_once.returncode == one_by_one.returncode == 0, (at_once, one_by_one)
    assert len(at_once.record["steps"]) == 4
    assert len(one_by_one.record["steps"]) == 16
    for name in ("pixels", "ids", "noise", "timesteps"):
        assert torch.equal(at_once.all(name), one_by_one.all(name)), name
    for update in range(1, 5):
        moved = distance(at_once.prior(update), load_file(steady_prior / "prior/diffusion_pytorch_model.safetensors"))
        assert distance(at_once.prior(update), one_by_one.prior(update)) < 1e-4 * moved
        for tag in ("train_loss", "grad_norm", "lr"):
            assert one_by_one.logged(tag)[update] == pytest.approx(at_once.logged(tag)[update], rel=1e-4)


# --------------------------------------------------------------------------------------------- the schedule


def share(schedule, update):
    """The share of the peak rate after so many updates, of 6 with 2 of warm-up."""
    left = min(1.0, (6 - update) / 4)
    return {
        "constant": 1.0,
        "constant_with_warmup": min(1.0, update / 2),
        "linear": min(update / 2, left),
        "cosine": min(update / 2, 0.5 * (1 + math.cos(math.pi * (1 - left)))),
        "cosine_with_restarts": min(update / 2, 0.5 * (1 + math.cos(math.pi * (1 - left)))),  # one cycle
        "polynomial": min(update / 2, left * (1 - 1e-7 / 1e-3) + 1e-7 / 1e-3),  # to 1e-7 in a straight line
        "piecewise_constant": 1.0 if update < 2 else 0.5 if update < 5 else 0.1,
    }[schedule]


def without_encoder():
    """Makes all pictures' latents 0, for what does not depend on them: most of a tiny run goes into the encoder."""
    EfficientNetEncoder.forward = lambda self, pixels: pixels.new_zeros(
        len(pixels), 16, *(n // 32 for n in pixels.shape[2:])
    )


@pytest.mark.parametrize("accumulation", [pytest.param(1, marks=pytest.mark.slow), 4])
@pytest.mark.parametrize(
    "schedule",
    [
        "constant",
        "constant_with_warmup",
        "linear",
        "cosine",
        "cosine_with_restarts",
        "polynomial",
        "piecewise_constant",
    ],
)
def test_the_rate_follows_its_schedule_in_updates_whatever_the_accumulation(train, schedule, accumulation):
    run = train(
        without_encoder,
        lr_scheduler=schedule,
        lr_step_rules="1:2,0.5:5,0.1" if schedule == "piecewise_constant" else None,
        lr_warmup_steps=2,
        learning_rate=1e-3,
        max_train_steps=6,
        train_batch_size=1,
        gradient_accumulation_steps=accumulation,
    )
    assert run.returncode == 0, run
    used = [1e-3 * share(schedule, update) for update in range(6)]
    assert run.record["rates"] == pytest.approx(used, rel=1e-6, abs=1e-12)
    logged = {update: 1e-3 * share(schedule, update) for update in range(1, 7)}
    assert run.logged("lr") == pytest.approx(logged, rel=1e-6, abs=1e-12)
    if schedule in ("linear", "cosine", "cosine_with_restarts"):
        assert run.logged("lr")[6] == 0


# -------------------------------------------------------------------------------------- noise and timesteps


def test_timesteps_are_uniform_float32_and_no_draw_comes_twice(train):
    run = train(without_encoder, max_train_steps=32, train_batch_size=4, gradient_accumulation_steps=2)
    assert run.returncode == 0, run
    timesteps, noise = run.all("timesteps"), run.all("noise")
    assert timesteps.dtype == noise.dtype == torch.float32
    assert torch.equal(timesteps, run.all("given")), "the prior sees the timesteps of the noise"
    assert len(timesteps) == len(set(timesteps.tolist())) == 256
    assert timesteps.min() >= 0
    assert timesteps.max() < 1
    # Kolmogorov and Smirnov: 256 uniform draws are further away than this once in a thousand times.
    ranks = torch.arange(256) / 256
    assert (timesteps.sort().values - ranks).abs().max() < 1.95 / math.sqrt(256)

    flat = noise.flatten(1)
    likeness = torch.corrcoef(flat).fill_diagonal_(0).abs().max()
    assert likeness < 0.75, "no two samples share their noise"  # 64 numbers each; 30,000 pairs reach some 0.5
    assert flat.mean().item() == pytest.approx(0, abs=4 / math.sqrt(flat.numel()))
    assert flat.var().item() == pytest.approx(1, abs=4 * math.sqrt(2 / flat.numel()))


def test_bf16_sees_the_timesteps_in_float32(train, steady_prior):
    run = train(mixed_precision="bf16", pretrained_prior_model_name_or_path=steady_prior, **BF16)
    assert run.returncode == 0, run
    step = run.record["steps"][0]
    assert step["given"].dtype == torch.float32
    prior = script.wuerstchen.WuerstchenPrior.from_pretrained(steady_prior / "prior").train()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        in_float32, in_bf16 = (
            prior(step["noisy"], t, step["prompt_embeds"]) for t in (step["given"], step["given"].bfloat16())
        )
    assert distance({"": step["pred"]}, {"": in_float32}) < 0.05 * distance({"": step["pred"]}, {"": in_bf16})


# ------------------------------------------------------------------------------------------------ precision


BF16 = {"max_train_steps": 3, "checkpointing_steps": 1, "use_ema": True}


def test_bf16_keeps_the_weights_and_the_optimizer_in_float32(train, steady_prior):
    flags = BF16 | {"pretrained_prior_model_name_or_path": steady_prior}
    run, exact = train(mixed_precision="bf16", **flags), train(mixed_precision="no", **flags)
    assert run.returncode == exact.returncode == 0, (run, exact)
    for weights in (
        run.prior(),
        run.prior(3),
        run.prior(3, "prior_ema"),
        optimizer_state(run.folder / "checkpoint-3"),
    ):
        assert {value.dtype for value in weights.values()} == {torch.float32}
    step, plain = run.record["steps"][0], exact.record["steps"][0]
    for encoder in run.record["frozen"].values():
        assert {value.dtype for value in encoder.values() if value.is_floating_point()} == {torch.bfloat16}
    assert step["pixels"].dtype == step["prompt_embeds"].dtype == torch.bfloat16
    assert plain["pixels"].dtype == plain["prompt_embeds"].dtype == torch.float32

    assert not step["weights_cached"], "copies in half precision would take half the prior's memory once more"
    assert torch.equal(step["noise"], plain["noise"])
    assert step["image_embeds"].dtype == torch.float32
    losses, exact_losses = run.logged("train_loss"), exact.logged("train_loss")
    assert losses != exact_losses
    assert losses == pytest.approx(exact_losses, rel=2**-6)
    # Updates of 1e-4 would be lost on most weights, were those rounded to bf16's 8 bits.
    before = load_file(steady_prior / "prior" / "diffusion_pytorch_model.safetensors")
    assert [name for name, value in run.prior(3).items() if torch.equal(value, before[name])] == []
    assert any((value != value.bfloat16()).any() for value in run.prior(3).values())


def test_mixed_precision_comes_from_accelerate_too(train, steady_prior):
    flags = BF16 | {"pretrained_prior_model_name_or_path": steady_prior}
    told = train(env={"ACCELERATE_MIXED_PRECISION": "bf16"}, **flags)
    asked = train(mixed_precision="bf16", **flags)
    assert told.returncode == asked.returncode == 0, (told, asked)
    assert told.record["steps"][0]["pixels"].dtype == torch.bfloat16
    assert same(told.prior(3), asked.prior(3))


def test_the_flag_wins_over_accelerates_precision(train, steady_prior):
    flags = BF16 | {"pretrained_prior_model_name_or_path": steady_prior}
    run = train(mixed_precision="no", env={"ACCELERATE_MIXED_PRECISION": "bf16"}, **flags)
    assert run.returncode == 0, run
    assert same(run.prior(3), train(mixed_precision="no", **flags).prior(3))


@pytest.mark.parametrize("by", ["flag", "environment"])
def test_fp16_on_a_cpu_is_float32_with_a_warning(train, steady_prior, by):
    flags = BF16 | {"pretrained_prior_model_name_or_path": steady_prior}
    if by == "flag":
        run = train(mixed_precision="fp16", **flags)
    else:
        run = train(env={"ACCELERATE_MIXED_PRECISION": "fp16"}, **flags)
    assert run.returncode == 0, run
    assert re.search(r"WARNING.*cpu.*fp16.*float32", run.output)
    assert same(run.prior(3), train(mixed_precision="no", **flags).prior(3))
    assert run.record["steps"][0]["prompt_embeds"].dtype == torch.float32


# ----------------------------------------------------------------------- checkpointing, average and dropout


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_gradient_checkpointing_changes_no_bit_but_one_sum(train, train_ranks, ranks):
    """With dropout. The first bias has its gradient added up in another order, and later updates differ by that
    rounding, of which Adam's usual epsilon would make more."""
    flags = {"max_train_steps": 4, "gradient_accumulation_steps": 2, "learning_rate": 1e-3, "checkpointing_steps": 1}
    start = train if ranks == 1 else lambda **flags: train_ranks(**flags)[0]
    plain, checkpointing = (start(**flags, adam_epsilon=1e-3, gradient_checkpointing=on) for on in (False, True))
    assert plain.returncode == checkpointing.returncode == 0, (plain, checkpointing)
    here, there = checkpointing.prior(1), plain.prior(1)
    assert {name for name in there if not torch.equal(here[name], there[name])} <= {"projection.bias"}
    assert checkpointing.logged("train_loss")[1] == plain.logged("train_loss")[1]
    moved = distance(plain.prior(4), there)
    for update in range(1, 5):
        assert distance(checkpointing.prior(update), plain.prior(update)) < 1e-5 * moved


def test_the_average_follows_its_recursion(train):
    run = train(**UNEVEN)
    assert run.returncode == 0, run
    average = {name: value.double() for name, value in run.prior(1).items()}
    assert distance(average, run.prior(1, "prior_ema")) == 0, "the first update is all there is to average"
    for update in range(2, 8):
        step = update - 1
        decay = min(0.9999, (1 + step) / (10 + step))
        average = {name: decay * average[name] + (1 - decay) * w.double() for name, w in run.prior(update).items()}
        assert distance(average, run.prior(update, "prior_ema")) < 1e-6
    assert distance(run.prior(7), run.prior(7, "prior_ema")) > 1e-4
    assert same(run.prior(), run.prior(7, "prior_ema")), "the average is what is saved"


def draw(models, prior_folder, prompts, side, seed=0):
    """Pictures of a prior, by the pipelines of diffusers alone."""
    prior = script.wuerstchen.WuerstchenPrior.from_pretrained(prior_folder)
    prior_pipeline = script.wuerstchen.WuerstchenPriorPipeline.from_pretrained(models / "prior", prior=prior)
    decoder_pipeline = script.wuerstchen.WuerstchenDecoderPipeline.from_pretrained(models / "decoder")
    pictures = []
    for prompt in prompts:
        generator = torch.Generator().manual_seed(seed)
        timesteps = script.wuerstchen.DEFAULT_STAGE_C_TIMESTEPS
        size = {"height": side, "width": side}
        embeds = prior_pipeline(prompt, timesteps=timesteps, guidance_scale=4.0, generator=generator, **size)
        pictures += decoder_pipeline(
            embeds.image_embeddings, prompt, guidance_scale=0.0, num_inference_steps=12, generator=generator
        ).images
    return [np.asarray(picture) for picture in pictures]


def test_validation_draws_with_the_average(train, models):
    run = train(**UNEVEN)
    assert run.returncode == 0, run
    for update in (2, 7):
        seen = [np.asarray(Image.open(run.folder / f"samples/update-{update:07d}-prompt-{i}.png")) for i in (0, 1)]
        checkpoint = run.folder / f"checkpoint-{update}"
        averaged, last = (
            draw(models, checkpoint / name, UNEVEN["validation_prompts"], len(seen[0]))
            for name in ("prior_ema", "prior")
        )
        for picture, right, wrong in zip(seen, averaged, last, strict=True):
            # Another attention kernel draws it here, so that with some versions a few values round the other way.
            assert np.abs(picture.astype(int) - right).max() <= 1
            assert 20 * np.count_nonzero(picture != right) < np.count_nonzero(picture != wrong)


def test_validation_has_no_dropout_and_training_has_it(train, models, steady_prior):
    """With a rate of 0 the weights stay what they are, and so must the pictures."""
    flags = {"learning_rate": 0.0, "max_train_steps": 6, "max_train_samples": 8, "validation_epochs": 1}
    run = train(**flags, validation_prompts=["a red apple"])
    assert run.returncode == 0, run
    files = sorted((run.folder / "samples").glob("update-*"))
    assert [file.name for file in files] == [f"update-{update:07d}-prompt-0.png" for update in (0, 2, 4, 6)]
    pictures = [np.asarray(Image.open(file)) for file in files]
    assert np.array_equal(pictures[0], pictures[1])
    assert np.array_equal(pictures[0], pictures[2])
    assert np.array_equal(pictures[0], pictures[3])
    (right,) = draw(models, models / "prior" / "prior", ["a red apple"], len(pictures[0]))
    assert np.array_equal(pictures[0], right)

    assert len(run.record["steps"]) == 6
    prior = script.wuerstchen.WuerstchenPrior.from_pretrained(models / "prior" / "prior").eval()
    for step in run.record["steps"]:  # those after a validation as well
        with torch.no_grad():
            without = prior(step["noisy"], step["given"], step["prompt_embeds"])
        assert distance({"": step["pred"]}, {"": without}) > 1e-3


def test_validating_changes_no_bit_of_the_training(train):
    validated = train(**UNEVEN)
    plain = train(**UNEVEN | {"validation_prompts": None})
    assert validated.returncode == plain.returncode == 0, (validated, plain)
    assert len(list((validated.folder / "samples").glob("update-*"))) == 10
    assert not (plain.folder / "samples").exists()
    for update in range(1, 8):
        assert same(validated.prior(update), plain.prior(update))
        assert same(validated.prior(update, "prior_ema"), plain.prior(update, "prior_ema"))
    assert validated.logged("train_loss") == plain.logged("train_loss")


# ----------------------------------------------------------------------------------------- what breaks a run


def spoil_third_call(how):
    """Makes the prior's third training step come out wrong."""
    forward, calls = script.wuerstchen.WuerstchenPrior.forward, itertools.count(1)

    def spoiled(self, *args, **kwargs):
        pred_noise = forward(self, *args, **kwargs)
        if next(calls) == 3:
            if how == "nan gradient":
                pred_noise.register_hook(lambda gradient: gradient * math.nan)
            else:
                pred_noise = pred_noise * float(how.split()[0])
        return pred_noise

    script.wuerstchen.WuerstchenPrior.forward = spoiled


@pytest.mark.parametrize("how", ["nan loss", "inf loss", "nan gradient"])
def test_a_loss_that_is_no_number_stops_before_it_reaches_the_weights(train, how):
    run = train(functools.partial(spoil_third_call, how), max_train_steps=5, checkpointing_steps=1, use_ema=True)
    assert run.returncode == 1, run
    assert re.search(r"\bupdate 3\b", run.output), run
    assert "Traceback" not in run.output
    assert len(run.record["rates"]) == 2, "the optimizer made two updates"
    checkpoints = sorted(path.name for path in run.folder.glob("*checkpoint-*"))
    assert checkpoints == ["checkpoint-1", "checkpoint-2"]
    assert all(value.isfinite().all() for value in (run.prior(2) | run.prior(2, "prior_ema")).values())
    assert not (run.folder / "prior_pipeline").exists()


@pytest.mark.parametrize("accumulation", [1, 2])
def test_what_stopped_a_run_names_its_rows(train, models, pictures, accumulation):
    run = train(
        functools.partial(spoil_third_call, "nan loss"),
        max_train_steps=5,
        train_batch_size=2,
        gradient_accumulation_steps=accumulation,
    )
    assert run.returncode == 1, run
    step = run.record["steps"][2]
    tokenizer = CLIPTokenizerFast.from_pretrained(models / "prior" / "tokenizer")
    captions = [json.loads(line)["text"].lower() for line in (pictures / "metadata.jsonl").read_text().splitlines()]
    tokens = [tokenizer(caption, truncation=True, max_length=77)["input_ids"] for caption in captions]
    rows = [tokens.index(ids[mask.bool()].tolist()) for ids, mask in zip(step["ids"], step["mask"], strict=True)]
    named = [int(row) for row in re.search(r"rows\W+\[([\d, ]+)\]", run.output).group(1).split(",")]
    assert len(named) == 2 * accumulation
    assert set(rows) <= set(named), run


# ------------------------------------------------------------------------------------------------- the seed


def test_one_seed_gives_the_same_bits_and_another_seed_others(train):
    flags = {"checkpointing_steps": 1, "use_ema": True}
    first, again, other = train(**flags, seed=5), train(**flags, seed=5, logging_dir="logs"), train(**flags, seed=6)
    assert first.folder != again.folder
    for update in (1, 2, 3):
        assert same(first.prior(update), again.prior(update))
        assert same(first.prior(update, "prior_ema"), again.prior(update, "prior_ema"))
        assert not same(first.prior(update), other.prior(update))
    assert first.logged("train_loss") == again.logged("train_loss")
    assert torch.equal(first.all("pixels"), again.all("pixels"))
    for name in ("pixels", "noise", "timesteps"):
        assert not torch.equal(first.all(name), other.all(name))


def test_a_run_without_a_seed_says_which_it_picked(train):
    flags = {"checkpointing_steps": 3}
    run, another = train(**flags, seed=None), train(**flags, seed=None, logging_dir="logs")
    assert run.returncode == another.returncode == 0, (run, another)
    picked, picked_then = (int(re.search(r"seed\W+(\d+)", r.output).group(1)) for r in (run, another))
    assert picked != picked_then
    again = train(**flags, seed=picked)
    assert same(run.prior(), again.prior())
    assert not same(run.prior(), another.prior())


# ----------------------------------------------------------------------------------------------- resuming


@pytest.mark.parametrize(
    ("update", "by", "workers"),
    [(1, "latest", 0), (2, "latest", 2), (5, "path", 0), (6, "path", 2)],
    ids=["within an epoch", "after a validation", "at an epoch's edge", "before the last update"],
)
def test_a_resumed_run_ends_as_the_unbroken_one(train, tmp_path, update, by, workers):
    """With an accumulation that does not divide the epoch, an average, lists of captions and validation."""
    run = train(**UNEVEN)
    assert run.returncode == 0, run
    again = resumed(train, run, update, tmp_path, by, **UNEVEN, dataloader_num_workers=workers)
    assert len(again.record["steps"]) == 3 * (7 - update), "no sample is read that is not trained on"
    for name in ("pixels", "ids", "noise", "timesteps"):
        assert torch.equal(again.all(name), run.all(name)[6 * update :])
    assert_goes_on_as(again, run, update, 7)


def test_each_epoch_sees_each_row_once_and_workers_change_nothing(train):
    run, with_workers = train(**UNEVEN), train(**UNEVEN, dataloader_num_workers=2)
    assert same(run.prior(), with_workers.prior())
    pixels = [hashlib.sha256(sample.numpy().tobytes()).hexdigest() for sample in run.all("pixels")]
    assert len(pixels) == 42
    epochs = [pixels[start : start + 10] for start in range(0, 40, 10)]
    assert all(len(set(epoch)) == 10 and set(epoch) == set(epochs[0]) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4, "each in another order"


def test_a_resumed_run_draws_its_seed_from_the_checkpoint(train, tmp_path):
    flags = {"max_train_steps": 4, "checkpointing_steps": 1, "seed": None}
    run = train(**flags)
    again = resumed(train, run, 2, tmp_path, **flags)
    assert_goes_on_as(again, run, 2, 4)


def test_a_finished_run_goes_on_with_more_updates(train, tmp_path):
    flags = {"checkpointing_steps": 1, "use_ema": True, "learning_rate": 1e-3}
    whole, half = train(**flags, max_train_steps=5), train(**flags, max_train_steps=2)
    assert half.returncode == whole.returncode == 0, (half, whole)
    again = resumed(train, half, 2, tmp_path, **flags, max_train_steps=5)
    assert_goes_on_as(again, whole, 2, 5)


def test_a_finished_run_has_nothing_left_but_to_write_its_result(train, tmp_path):
    flags = {"checkpointing_steps": 1, "use_ema": True, "learning_rate": 1e-3}
    run = train(**flags, max_train_steps=2)
    again = resumed(train, run, 2, tmp_path, **flags, max_train_steps=2)
    assert "nothing is left to train" in again.output
    assert again.record["steps"] == again.record["rates"] == []
    assert same(again.prior(), run.prior())


# ------------------------------------------------------------------------------------------------ weighting


def test_p2_weighs_each_sample_by_the_share_of_noise(train):
    """At a rate of 0 and with one seed, two runs differ by the weight alone."""
    flags = {"learning_rate": 0.0, "max_train_steps": 16, "train_batch_size": 1}
    plain, weighted = train(**flags), train(**flags, loss_weighting="p2")
    assert plain.returncode == weighted.returncode == 0, (plain, weighted)
    timesteps = plain.all("timesteps")
    assert torch.equal(timesteps, weighted.all("timesteps"))
    weights = 1 - alpha_bar(timesteps)
    losses, weighted_losses = plain.logged("train_loss"), weighted.logged("train_loss")
    ratios = [weighted_losses[update] / losses[update] for update in range(1, 17)]
    assert ratios == pytest.approx(weights.tolist(), rel=1e-4, abs=2e-7)


def test_p2_averages_to_054_and_weighs_samples_not_batches(train, steady_prior):
    t = (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000
    expected = (1 - alpha_bar(t)).mean().item()
    assert expected == pytest.approx(0.54, abs=0.05)
    weights = script.loss_weights("p2", DDPMWuerstchenScheduler(), t.float())
    assert weights.mean().item() == pytest.approx(expected, rel=1e-4)

    run = train(
        max_train_steps=1, train_batch_size=8, loss_weighting="p2", pretrained_prior_model_name_or_path=steady_prior
    )
    (step,) = run.record["steps"]
    errors = ((step["pred"] - step["noise"]) ** 2).mean(dim=(1, 2, 3))
    by_hand = (errors * (1 - alpha_bar(step["timesteps"]))).mean().item()
    assert run.logged("train_loss")[1] == pytest.approx(by_hand, rel=1e-5)


# -------------------------------------------------------------------------------------------- several ranks


RANKS = {
    "train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "max_train_samples": 10,
    "max_train_steps": 4,
    "checkpointing_steps": 1,
    "use_ema": True,
    "learning_rate": 1e-3,
}


def test_ranks_draw_different_noise_for_different_rows(train_ranks):
    first, second = train_ranks(**RANKS)
    assert first.returncode == second.returncode == 0, (first, second)
    timesteps = [*first.all("timesteps").tolist(), *second.all("timesteps").tolist()]
    assert len(timesteps) == len(set(timesteps)) == 32
    noise = torch.cat([first.all("noise"), second.all("noise")]).flatten(1)
    assert torch.corrcoef(noise).fill_diagonal_(0).abs().max() < 0.75
    update = torch.cat([run.all("pixels")[:4] for run in (first, second)])
    assert len({sample.numpy().tobytes() for sample in update}) == 8, "an update of eight samples is of eight rows"


def test_ranks_draw_different_dropout(train_ranks):
    flags = RANKS | {"max_train_steps": 1, "gradient_accumulation_steps": 1, "learning_rate": 0.0}
    runs = train_ranks(same_inputs, **flags)
    assert all(run.returncode == 0 for run in runs), runs
    first, second = (run.record["steps"][0] for run in runs)
    assert distance({"": first["pred"]}, {"": second["pred"]}) > 1e-3


def same_inputs():
    """Gives the prior the same inputs on every rank, so that only its dropout can differ."""
    forward = script.wuerstchen.WuerstchenPrior.forward

    def fed(self, *inputs):
        return forward(self, *(torch.full_like(tensor, 0.5) for tensor in inputs))

    script.wuerstchen.WuerstchenPrior.forward = fed


def test_the_logged_loss_is_the_mean_over_ranks_and_micro_steps(train_ranks):
    runs = train_ranks(**RANKS)
    errors = [[((s["pred"] - s["noise"]) ** 2).mean().item() for s in run.record["steps"]] for run in runs]
    means = np.array(errors).reshape(2, 4, 2).mean(axis=(0, 2))
    assert list(runs[0].logged("train_loss").values()) == pytest.approx(means.tolist(), rel=1e-5)
    assert np.abs(np.array(errors[0]) - np.array(errors[1])).min() > 1e-4, "the ranks' losses differ"


def test_two_ranks_of_two_are_one_of_four(train, train_ranks, steady_prior):
    flags = RANKS | {"pretrained_prior_model_name_or_path": steady_prior, "adam_epsilon": 1e-3, "max_grad_norm": 0.1}
    flags |= {"lr_scheduler": "cosine", "lr_warmup_steps": 1}
    runs = train_ranks(draws_by_picture, **flags)
    alone = train(draws_by_picture, **flags | {"train_batch_size": 4})
    assert all(run.returncode == 0 for run in (*runs, alone)), (*runs, alone)
    assert runs[0].record["rates"] == runs[1].record["rates"] == alone.record["rates"]
    before = load_file(steady_prior / "prior" / "diffusion_pytorch_model.safetensors")
    for update in (2, 3, 4):
        moved = distance(alone.prior(update), before)
        assert distance(runs[0].prior(update), alone.prior(update)) < 1e-4 * moved
        assert distance(runs[0].prior(update, "prior_ema"), alone.prior(update, "prior_ema")) < 1e-4 * moved
    for tag in ("train_loss", "grad_norm", "lr"):
        assert runs[0].logged(tag) == pytest.approx(alone.logged(tag), rel=1e-4, abs=1e-12)


def test_ranks_end_with_the_same_weights_and_resume_exactly(train_ranks, tmp_path):
    runs = train_ranks(**RANKS)
    assert runs[0].record["clipped"] == runs[1].record["clipped"]
    folder = tmp_path / "again"
    shutil.copytree(runs[0].folder / "checkpoint-1", folder / "checkpoint-1")
    again = train_ranks(**RANKS, output_dir=folder, resume_from_checkpoint="latest")
    assert all(run.returncode == 0 for run in again), again
    assert_goes_on_as(again[0], runs[0], 1, 4)
    for one, other in zip(again, runs, strict=True):
        for name in ("pixels", "noise", "pred"):
            assert torch.equal(one.all(name), other.all(name)[4:]), "on each rank"


def test_a_loss_that_is_no_number_on_one_rank_stops_both(train_ranks):
    runs = train_ranks(spoil_on_second_rank, **RANKS)
    assert [run.returncode for run in runs] == [1, 1], runs
    assert all(re.search(r"\bupdate 2\b", run.output) for run in runs), runs
    assert sorted(path.name for path in runs[0].folder.glob("*checkpoint-*")) == ["checkpoint-1"]


def spoil_on_second_rank():
    if script.os.environ["RANK"] == "1":
        spoil_third_call("nan loss")
