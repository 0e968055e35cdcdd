# SPDX-License-Identifier: Apache-2.0
"""What a training step computes: the loss, the learning rate, noise and timesteps, precision, the average of
the weights, random numbers and several ranks, against formulas written out here and other implementations."""

import functools
import itertools
import json
import math
import re
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import (
    PICTURES,
    TESTS,
    Samples,
    assert_continues_as,
    distance,
    load_optimizer_state,
    resumed,
    same_weights,
    tiny_args,
)
from diffusers import DDPMWuerstchenScheduler
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0
from PIL import Image
from safetensors.torch import load_file
from transformers import CLIPTextModel, CLIPTokenizerFast

import train_text_to_image_prior as script
from modeling_efficient_net_encoder import EfficientNetEncoder

# Six samples a step, ten rows: epochs end within steps 2, 4 and 7, and with step 5. Validation follows each.
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


def alpha_bar(t):
    """The share of the signal's variance that is left at t: the cosine schedule with s = 0.008, in
    float64."""
    s = 0.008
    angle = (torch.as_tensor(t, dtype=torch.float64) + s) / (1 + s) * math.pi / 2
    return (angle.cos() ** 2 / math.cos(s / (1 + s) * math.pi / 2) ** 2).clamp(1e-4, 0.9999)


def add_noise(image_embeds, noise, t):
    """The noisy latents at t, float32."""
    signal = alpha_bar(t).view(-1, 1, 1, 1)
    return (signal.sqrt() * image_embeds + (1 - signal).sqrt() * noise).float()


def initial_weights(folder):
    """The weights that a run starts from, of a folder of `prior`, `text_encoder`, ..."""
    return load_file(folder / "prior" / "diffusion_pytorch_model.safetensors")


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
    "adam_epsilon": 1e-3,  # large, or the first steps are the signs of gradients and rounding decides some
}


@pytest.mark.parametrize("max_grad_norm", [0.05, 1000.0], ids=["clipped", "not clipped"])
def test_loss_gradient_and_step_are_those_of_the_formulas(train, models, steady_prior, max_grad_norm):
    run = train(**BY_HAND, max_grad_norm=max_grad_norm, pretrained_prior_model_name_or_path=steady_prior)
    assert run.returncode == 0, run
    text_encoder = CLIPTextModel.from_pretrained(
        steady_prior / "text_encoder", attn_implementation="eager"
    ).eval()
    image_encoder = EfficientNetEncoder.from_pretrained(models / "encoder").eval()
    prior = script.wuerstchen.WuerstchenPrior.from_pretrained(steady_prior / "prior").train()
    prior.set_attn_processor(AttnProcessor())  # softmax(QK) V written out
    weights = dict(prior.named_parameters())
    mean, square = ({name: torch.zeros_like(w) for name, w in weights.items()} for _ in range(2))
    losses, norms, rates = run.logged("train_loss"), run.logged("grad_norm"), run.logged("lr")

    assert len(run.record["steps"]) == 6
    for step in (1, 2, 3):
        micro_losses = []
        for micro_step in run.record["steps"][2 * step - 2 : 2 * step]:
            t, noise = micro_step["timesteps"], micro_step["noise"]
            with torch.no_grad():
                latents = image_encoder.mapper(image_encoder.backbone(micro_step["pixels"]))
                prompt_embeds = text_encoder(micro_step["ids"], attention_mask=micro_step["mask"])[0]
            noisy_latents = add_noise((latents + 1) / 42, noise, t)
            loss = ((prior(noisy_latents, t, prompt_embeds) - noise) ** 2).mean()
            (loss / 2).backward()
            micro_losses.append(loss.item())
        norm = torch.stack([w.grad.norm() for w in weights.values()]).norm().item()
        assert losses[step] == pytest.approx(np.mean(micro_losses), rel=1e-5)
        assert norms[step] == pytest.approx(norm, rel=1e-4), "the norm before clipping is logged"
        assert (norm > max_grad_norm) == (max_grad_norm == 0.05)
        assert run.record["clipped"][step - 1] == pytest.approx(min(norm, max_grad_norm), rel=1e-4)
        assert rates[step] == pytest.approx(1e-3)

        clip = min(1.0, max_grad_norm / norm)
        with torch.no_grad():
            for name, w in weights.items():
                gradient = clip * w.grad
                mean[name] = 0.8 * mean[name] + 0.2 * gradient
                square[name] = 0.9 * square[name] + 0.1 * gradient**2
                denominator = (square[name] / (1 - 0.9**step)).sqrt() + 1e-3
                w -= 1e-3 * 0.1 * w + 1e-3 * (mean[name] / (1 - 0.8**step)) / denominator
                w.grad = None
        expected = {name: w.detach() for name, w in weights.items()}
        before = run.prior(step - 1) if step > 1 else initial_weights(steady_prior)
        assert distance(run.prior(step), expected) < 1e-3 * distance(run.prior(step), before)


def test_all_weights_of_the_prior_are_trained_and_none_of_the_encoders(train, models):
    run = train(**UNEVEN)
    assert run.returncode == 0, run
    before = initial_weights(models / "prior")
    after = run.prior(7)
    assert before.keys() == after.keys()
    assert [name for name in before if torch.equal(before[name], after[name])] == []

    image_encoder = EfficientNetEncoder.from_pretrained(models / "encoder")
    text_encoder = CLIPTextModel.from_pretrained(models / "prior" / "text_encoder")
    frozen = run.record["frozen"]
    assert same_weights(frozen["image_encoder"], image_encoder.state_dict()), "batch statistics included"
    assert same_weights(frozen["text_encoder"], text_encoder.state_dict())
    for step in run.record["steps"]:
        assert not step["image_encoder_training"] and not step["text_encoder_training"]


def test_four_micro_steps_of_one_image_are_a_step_of_four(train, steady_prior):
    flags = {
        "pretrained_prior_model_name_or_path": steady_prior,
        "adam_epsilon": 1e-3,
        "learning_rate": 1e-2,
        "max_grad_norm": 0.1,
        "checkpointing_steps": 1,
        "max_train_steps": 4,
    }
    at_once = train(**flags, train_batch_size=4)
    one_by_one = train(**flags, train_batch_size=1, gradient_accumulation_steps=4)
    assert at_once.returncode == one_by_one.returncode == 0, (at_once, one_by_one)
    assert len(at_once.record["steps"]) == 4
    assert len(one_by_one.record["steps"]) == 16
    for name in ("pixels", "ids", "noise", "timesteps"):
        assert torch.equal(at_once.all(name), one_by_one.all(name)), name
    for step in range(1, 5):
        moved = distance(at_once.prior(step), initial_weights(steady_prior))
        assert distance(at_once.prior(step), one_by_one.prior(step)) < 1e-4 * moved
        for tag in ("train_loss", "grad_norm", "lr"):
            assert one_by_one.logged(tag)[step] == pytest.approx(at_once.logged(tag)[step], rel=1e-4)


# -------------------------------------------------------------------------- the loss has a single definition


def use_huber_loss(file):
    """Replaces diffusion_loss by a Huber loss, and saves for each call whether it is training and the
    losses."""
    calls = []

    def huber_loss(prior, noise_scheduler, latents, prompt_embeds, noise, timesteps, weighting):
        noisy_latents = noise_scheduler.add_noise((latents + 1) / 42, noise, timesteps)
        pred_noise = prior(noisy_latents, timesteps, prompt_embeds)
        losses = F.huber_loss(pred_noise, noise, reduction="none", delta=0.1).mean(dim=(1, 2, 3))
        calls.append((prior.training, losses.detach().clone()))
        torch.save(calls, file)
        return losses

    script.diffusion_loss = huber_loss


def test_another_loss_is_put_in_at_one_place_for_training_and_held_out_rows(train, tmp_path):
    """Rows, noise and timesteps are the same as with the usual loss, as the first step's inputs show."""
    flags = {"validation_split": 6, "validation_steps": 2, "max_train_steps": 2}
    file = tmp_path / "calls.pt"
    plain, huber = train(**flags), train(functools.partial(use_huber_loss, file), **flags)
    assert plain.returncode == huber.returncode == 0, (plain, huber)
    for name in ("noisy", "given", "prompt_embeds", "noise"):
        assert torch.equal(plain.all(name), huber.all(name)), name

    calls = torch.load(file)
    assert [training for training, _ in calls] == [False, False, True, True, False, False], (
        "4 + 2 rows held out"
    )
    losses = [losses for _, losses in calls]
    assert huber.logged("train_loss") == pytest.approx(
        {1: losses[2].mean().item(), 2: losses[3].mean().item()}, rel=1e-5
    )
    assert huber.logged("val_loss") == pytest.approx(
        {0: torch.cat(losses[:2]).mean().item(), 2: torch.cat(losses[4:]).mean().item()}, rel=1e-5
    )
    for tag in ("train_loss", "val_loss"):
        before, after = plain.logged(tag), huber.logged(tag)
        assert before.keys() == after.keys()
        assert all(after[step] < 0.5 * before[step] for step in before), (
            "a Huber loss is below half the square"
        )


# ------------------------------------------------------------------------------------------ the learning rate


def relative_rate(schedule, step):
    """The share of the peak rate after so many steps, of 6 with 2 of warm-up."""
    left = min(1.0, (6 - step) / 4)
    return {
        "constant": 1.0,
        "constant_with_warmup": min(1.0, step / 2),
        "linear": min(step / 2, left),
        "cosine": min(step / 2, 0.5 * (1 + math.cos(math.pi * (1 - left)))),
        "cosine_with_restarts": min(step / 2, 0.5 * (1 + math.cos(math.pi * (1 - left)))),  # one cycle
        "polynomial": min(step / 2, left * (1 - 1e-7 / 1e-3) + 1e-7 / 1e-3),  # to 1e-7 in a straight line
        "piecewise_constant": 1.0 if step < 2 else 0.5 if step < 5 else 0.1,
    }[schedule]


def without_encoder():
    """Makes all latents 0, for what does not depend on them: the encoder takes most of a tiny run's time."""
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
def test_the_learning_rate_follows_its_schedule_in_steps_whatever_the_accumulation(
    train, schedule, accumulation
):
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
    used = [1e-3 * relative_rate(schedule, step) for step in range(6)]
    assert run.record["rates"] == pytest.approx(used, rel=1e-6, abs=1e-12)
    logged = {step: 1e-3 * relative_rate(schedule, step) for step in range(1, 7)}
    assert run.logged("lr") == pytest.approx(logged, rel=1e-6, abs=1e-12)
    if schedule in ("linear", "cosine", "cosine_with_restarts"):
        assert run.logged("lr")[6] == 0


# -------------------------------------------------------------------------------------- noise and timesteps


def test_timesteps_are_uniform_float32_and_no_noise_is_used_twice(train):
    run = train(without_encoder, max_train_steps=32, train_batch_size=4, gradient_accumulation_steps=2)
    assert run.returncode == 0, run
    timesteps, noise = run.all("timesteps"), run.all("noise")
    assert timesteps.dtype == noise.dtype == torch.float32
    assert torch.equal(timesteps, run.all("given")), "the prior gets the timesteps of the noise"
    assert len(timesteps) == len(set(timesteps.tolist())) == 256
    assert timesteps.min() >= 0
    assert timesteps.max() < 1
    # Kolmogorov-Smirnov: of 256 uniform samples, one set in a thousand is further away than this.
    ranks = torch.arange(256) / 256
    assert (timesteps.sort().values - ranks).abs().max() < 1.95 / math.sqrt(256)

    flat = noise.flatten(1)
    correlation = torch.corrcoef(flat).fill_diagonal_(0).abs().max()
    assert correlation < 0.75, "no two samples share noise"  # 64 numbers each; 30,000 pairs reach some 0.5
    assert flat.mean().item() == pytest.approx(0, abs=4 / math.sqrt(flat.numel()))
    assert flat.var().item() == pytest.approx(1, abs=4 * math.sqrt(2 / flat.numel()))


def sample_many_timesteps(sampling, count=200_000, seed=0):
    torch.manual_seed(seed)
    return script.sample_timesteps(torch.rand(count), sampling)


def test_stretched_timesteps_are_one_as_often_as_in_the_original_training():
    """(1 - u) * 1.08 + 0.001 is uniform on [0.001, 1.081]; what is above 1 becomes 1."""
    t = sample_many_timesteps("stretched").double()
    assert t.min() >= 0.001 and t.max() == 1
    share = 0.081 / 1.08
    tolerance = 4 * (share * (1 - share) / len(t)) ** 0.5
    assert (t == 1).double().mean().item() == pytest.approx(share, abs=tolerance)
    mean = ((1 - 0.001**2) / 2 + 0.081) / 1.08
    assert t.mean().item() == pytest.approx(mean, abs=4 * t.std().item() / len(t) ** 0.5)
    below = t[t < 1]
    edges = torch.linspace(0.001, 1, 11, dtype=torch.float64)
    counts = torch.histogram(below, edges).hist
    assert (counts - len(below) / 10).abs().max() < 5 * (len(below) / 10) ** 0.5, "uniform below 1"


def test_uniform_timesteps_are_those_of_torch_rand_and_never_one():
    t = sample_many_timesteps("uniform")
    assert t.dtype == torch.float32 and t.min() >= 0 and t.max() < 1
    assert t.double().mean().item() == pytest.approx(0.5, abs=4 * (1 / 12 / len(t)) ** 0.5)
    torch.manual_seed(0)
    assert torch.equal(t, torch.rand(len(t)))


# ------------------------------------------------------------------------------------------------ precision

# How sums in bf16 are rounded depends on the kernel and on the CPU's instructions (AVX2, AVX-512 BF16, AMX).
# So a close comparison here is one of float32 numbers, or of the same kernels on the same inputs.
BF16 = {"max_train_steps": 3, "checkpointing_steps": 1, "use_ema": True, "learning_rate": 1e-5}


def record_timestep_embeddings(file):
    """Saves the embedded timesteps that each timestep block gets in training."""
    modeling = sys.modules[script.wuerstchen.WuerstchenPrior.__module__]
    forward, embeddings = modeling.TimestepBlock.forward, []

    def forward_and_record(self, x, t):
        if self.training:
            embeddings.append(t.detach().clone())
            torch.save(embeddings, file)
        return forward(self, x, t)

    modeling.TimestepBlock.forward = forward_and_record


def embed_timesteps(t):
    """The sine and cosine of 10000 t at 32 frequencies from 1 to 1 / 10000, in float64."""
    frequencies = 10000 ** (-torch.arange(32, dtype=torch.float64) / 31)
    angles = 10000 * t.double()[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def test_bf16_embeds_the_timesteps_in_float32(train, steady_prior, tmp_path):
    """Rounded to bf16, the timestep 0.7 can be off by 0.002, which turns the fastest sine by 20 radians."""
    file = tmp_path / "embeddings.pt"
    flags = BF16 | {"pretrained_prior_model_name_or_path": steady_prior, "mixed_precision": "bf16"}
    run = train(functools.partial(record_timestep_embeddings, file), **flags)
    assert run.returncode == 0, run
    embeddings = torch.load(file)
    assert len(embeddings) == 3 * 2, "two timestep blocks"
    t = run.all("timesteps")
    for rounded in (t.bfloat16(), t.half()):
        assert (embed_timesteps(rounded) - embed_timesteps(t)).abs().max() > 0.5, "rounding would be seen"
    for index, step in enumerate(run.record["steps"]):
        t = step["timesteps"]
        assert t.dtype == step["given"].dtype == torch.float32
        assert torch.equal(step["given"], t), "the prior gets the timesteps of the noise"
        assert (t != t.half()).all() and (t != t.bfloat16()).all()
        assert (add_noise(step["image_embeds"], step["noise"], t) - step["noisy"]).abs().max() < 1e-5
        # Float32 rounds angles of up to 10000 by up to 0.001.
        expected = embed_timesteps(t)
        for embedding in embeddings[2 * index : 2 * index + 2]:
            assert embedding.dtype == torch.float32
            assert (embedding - expected).abs().max() < 0.01


def test_bf16_predicts_from_the_timesteps_in_float32(train, steady_prior):
    """The same prior with the same attention kernels gives the same prediction, bf16's rounding included."""
    run = train(mixed_precision="bf16", pretrained_prior_model_name_or_path=steady_prior, **BF16)
    assert run.returncode == 0, run
    step = run.record["steps"][0]
    assert step["given"].dtype == torch.float32
    prior = script.wuerstchen.WuerstchenPrior.from_pretrained(steady_prior / "prior").train()
    prior.set_attn_processor(AttnProcessor2_0())
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        in_float32, in_bf16 = (
            prior(step["noisy"], t, step["prompt_embeds"])
            for t in (step["timesteps"], step["timesteps"].bfloat16())
        )
    assert distance({"": step["pred"]}, {"": in_float32}) < 0.05 * distance({"": step["pred"]}, {"": in_bf16})


def bf16_spacing(weights):
    """The distance between neighbouring bf16 numbers, of 8 significant bits, at each of the weights."""
    return torch.exp2(weights.abs().clamp(min=1e-30).log2().floor() - 7)


def test_bf16_keeps_the_weights_and_the_optimizer_in_float32(train, steady_prior):
    run = train(mixed_precision="bf16", pretrained_prior_model_name_or_path=steady_prior, **BF16)
    assert run.returncode == 0, run
    moments = load_optimizer_state(run.folder / "checkpoint-3")
    for saved in (run.prior(3), run.prior(3, "prior_ema"), moments):
        assert {value.dtype for value in saved.values()} == {torch.float32}
        for name, value in saved.items():
            # Of random float32 numbers, one in 2 ** 16 is a bf16 number, too.
            if not name.endswith(".step"):
                assert (value != value.bfloat16()).double().mean() > 0.9, f"{name} is rounded to bf16"
    assert {value.dtype for value in run.prior().values()} == {torch.float32}
    assert same_weights(run.prior(), run.prior(3, "prior_ema"))

    # Adam's first step moves each weight by the rate at most, whichever way it would be rounded.
    before, first, second = initial_weights(steady_prior), run.prior(1), run.prior(2)
    assert [name for name, value in run.prior(3).items() if torch.equal(value, before[name])] == []
    assert distance(first, before) < 1.1 * BF16["learning_rate"]
    # A weight in bf16 stays or moves by its spacing at least. These move, and by a fraction of it.
    moves, spacings = [], []
    for name, value in first.items():
        moves.append((second[name] - value).abs().flatten())
        spacings.append(bf16_spacing(value).flatten())
    moves, spacings = torch.cat(moves), torch.cat(spacings)
    wide = spacings > 8 * BF16["learning_rate"]
    assert wide.double().mean() > 0.5, "most weights"
    assert ((moves > 0) & (moves < spacings / 4))[wide].double().mean() > 0.99


def test_bf16_is_for_the_encoders_and_matrix_products_and_the_loss_is_float32(train, steady_prior):
    flags = BF16 | {"pretrained_prior_model_name_or_path": steady_prior}
    run, exact = train(mixed_precision="bf16", **flags), train(mixed_precision="no", **flags)
    assert run.returncode == exact.returncode == 0, (run, exact)
    for encoder in run.record["frozen"].values():
        assert {value.dtype for value in encoder.values() if value.is_floating_point()} == {torch.bfloat16}
    losses, exact_losses = run.logged("train_loss"), exact.logged("train_loss")
    assert losses != exact_losses

    prior = script.wuerstchen.WuerstchenPrior.from_pretrained(steady_prior / "prior").train()
    for index, (step, plain) in enumerate(zip(run.record["steps"], exact.record["steps"], strict=True)):
        assert step["prompt_embeds"].dtype == torch.bfloat16
        assert plain["pixels"].dtype == plain["prompt_embeds"].dtype == torch.float32
        assert step["pixels"].dtype == torch.bfloat16
        assert torch.equal(step["pixels"], plain["pixels"].bfloat16()), "rounded after they are normalized"
        assert not step["weights_cached"], "copies in half precision would take half the prior's memory again"
        assert torch.equal(step["noise"], plain["noise"])

        # The encoder with its random weights is off by some 4 % in bf16, with any instructions.
        assert step["image_embeds"].dtype == torch.float32
        assert torch.equal(step["image_embeds"], (step["latents"].float() + 1) / 42)
        assert (step["image_embeds"] - plain["image_embeds"]).norm() < 0.1 * plain["image_embeds"].norm()
        # From the same latents, the loss is that of float32 up to the prior's own rounding, some 0.0004.
        loss = ((step["pred"].double() - step["noise"]) ** 2).mean().item()
        assert losses[index + 1] == pytest.approx(loss, rel=1e-5)
        prior.load_state_dict(run.prior(index) if index else initial_weights(steady_prior))
        with torch.no_grad():
            pred_noise = prior(step["noisy"], step["timesteps"], step["prompt_embeds"].float())
        exact_loss = ((pred_noise - step["noise"]) ** 2).mean().item()
        assert losses[index + 1] == pytest.approx(exact_loss, rel=2**-9)


def test_mixed_precision_comes_from_accelerate_too(train, steady_prior):
    flags = BF16 | {"pretrained_prior_model_name_or_path": steady_prior}
    configured = train(env={"ACCELERATE_MIXED_PRECISION": "bf16"}, **flags)
    by_flag = train(mixed_precision="bf16", **flags)
    assert configured.returncode == by_flag.returncode == 0, (configured, by_flag)
    assert configured.record["steps"][0]["pixels"].dtype == torch.bfloat16
    assert same_weights(configured.prior(3), by_flag.prior(3))


def test_the_flag_overrides_accelerates_precision(train, steady_prior):
    flags = BF16 | {"pretrained_prior_model_name_or_path": steady_prior}
    run = train(mixed_precision="no", env={"ACCELERATE_MIXED_PRECISION": "bf16"}, **flags)
    assert run.returncode == 0, run
    assert same_weights(run.prior(3), train(mixed_precision="no", **flags).prior(3))


@pytest.mark.parametrize("source", ["flag", "environment"])
def test_fp16_on_a_cpu_is_float32_with_a_warning(train, steady_prior, source):
    flags = BF16 | {"pretrained_prior_model_name_or_path": steady_prior}
    if source == "flag":
        run = train(mixed_precision="fp16", **flags)
    else:
        run = train(env={"ACCELERATE_MIXED_PRECISION": "fp16"}, **flags)
    assert run.returncode == 0, run
    assert re.search(r"WARNING.*cpu.*fp16.*float32", run.output)
    assert same_weights(run.prior(3), train(mixed_precision="no", **flags).prior(3))
    assert run.record["steps"][0]["prompt_embeds"].dtype == torch.float32


# ----------------------------------------------------------------------------------- gradient checkpointing


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_gradient_checkpointing_changes_no_bit_but_one_sum(train, train_ranks, ranks):
    """With dropout. The first bias has its gradient added up in another order, and later steps differ by that
    rounding, of which Adam's usual epsilon would make more."""
    flags = {
        "max_train_steps": 4,
        "gradient_accumulation_steps": 2,
        "learning_rate": 1e-3,
        "checkpointing_steps": 1,
        "adam_epsilon": 1e-3,
    }
    start = train if ranks == 1 else lambda **flags: train_ranks(**flags)[0]
    plain, checkpointing = (start(**flags, gradient_checkpointing=on) for on in (False, True))
    assert plain.returncode == checkpointing.returncode == 0, (plain, checkpointing)
    here, there = checkpointing.prior(1), plain.prior(1)
    assert {name for name in there if not torch.equal(here[name], there[name])} <= {"projection.bias"}
    assert checkpointing.logged("train_loss")[1] == plain.logged("train_loss")[1]
    moved = distance(plain.prior(4), there)
    for step in range(1, 5):
        assert distance(checkpointing.prior(step), plain.prior(step)) < 1e-5 * moved


def count_block_calls(file):
    """Saves how often each kind of the prior's blocks is called."""
    modeling = sys.modules[script.wuerstchen.WuerstchenPrior.__module__]
    calls = dict.fromkeys(("ResBlock", "TimestepBlock", "AttnBlock"), 0)

    def counted(name, forward):
        def forward_and_count(*args):
            calls[name] += 1
            file.write_text(json.dumps(calls))
            return forward(*args)

        return forward_and_count

    for name in calls:
        block = getattr(modeling, name)
        block.forward = counted(name, block.forward)


@pytest.mark.slow
def test_gradient_checkpointing_runs_each_block_again_in_the_backward_pass(train, tmp_path):
    calls = []
    for on in (False, True):
        file = tmp_path / f"{on}.json"
        run = train(functools.partial(count_block_calls, file), max_train_steps=2, gradient_checkpointing=on)
        assert run.returncode == 0, run
        calls.append(json.loads(file.read_text()))
    assert calls[0] == dict.fromkeys(("ResBlock", "TimestepBlock", "AttnBlock"), 2 * 2), (
        "two steps, two of each"
    )
    assert calls[1] == dict.fromkeys(calls[0], 2 * 2 * 2)


def train_attention_alone():
    """Freezes all of the prior but its attention blocks."""
    load_prior = script.load_prior

    def load_and_freeze(*args):
        prior = load_prior(*args)
        prior.requires_grad_(False)
        for block in prior.blocks:
            if type(block).__name__ == "AttnBlock":
                block.requires_grad_(True)
        return prior

    script.load_prior = load_and_freeze


def test_a_part_of_the_prior_can_be_frozen_with_and_without_gradient_checkpointing(train, models):
    """With checkpointing, the first attention block gets a gradient although none of its inputs needs one."""
    flags = {"max_train_steps": 4, "learning_rate": 1e-3, "checkpointing_steps": 1, "use_ema": True}
    plain, checkpointing = (
        train(train_attention_alone, **flags, gradient_checkpointing=on) for on in (False, True)
    )
    assert plain.returncode == checkpointing.returncode == 0, (plain, checkpointing)
    before = initial_weights(models / "prior")
    trained = {name for name in before if name.startswith(("blocks.2.", "blocks.5."))}
    assert len(trained) == 2 * 10, "query, key, value, output and condition of two blocks"
    for run in (plain, checkpointing):
        for weights in (run.prior(1), run.prior(4), run.prior(4, "prior_ema"), run.prior()):
            assert {name for name in before if not torch.equal(weights[name], before[name])} == trained
        optimized = {name.split(".")[0] for name in load_optimizer_state(run.folder / "checkpoint-4")}
        assert len(optimized) == len(trained), "the optimizer has nothing of the others"
    for tag in ("train_loss", "grad_norm"):
        assert checkpointing.logged(tag) == pytest.approx(plain.logged(tag), rel=1e-5)
    assert distance(checkpointing.prior(4), plain.prior(4)) < 1e-3 * distance(plain.prior(4), before)


# ---------------------------------------------------------------------------- average, validation, dropout


def test_the_average_follows_its_recursion(train):
    run = train(**UNEVEN)
    assert run.returncode == 0, run
    average = {name: value.double() for name, value in run.prior(1).items()}
    assert distance(average, run.prior(1, "prior_ema")) == 0, "after the first step there is nothing else"
    for step in range(2, 8):
        decay = min(0.9999, (1 + step - 1) / (10 + step - 1))
        for name, value in run.prior(step).items():
            average[name] = decay * average[name] + (1 - decay) * value.double()
        assert distance(average, run.prior(step, "prior_ema")) < 1e-6
    assert distance(run.prior(7), run.prior(7, "prior_ema")) > 1e-4
    assert same_weights(run.prior(), run.prior(7, "prior_ema")), "the average is what is saved"


def generate(models, prior_folder, prompts, side, seed=0):
    """A prior's images, by the pipelines of diffusers alone."""
    prior = script.wuerstchen.WuerstchenPrior.from_pretrained(prior_folder)
    prior_pipeline = script.wuerstchen.WuerstchenPriorPipeline.from_pretrained(models / "prior", prior=prior)
    decoder_pipeline = script.wuerstchen.WuerstchenDecoderPipeline.from_pretrained(models / "decoder")
    images = []
    for prompt in prompts:
        generator = torch.Generator().manual_seed(seed)
        timesteps = script.wuerstchen.DEFAULT_STAGE_C_TIMESTEPS
        size = {"height": side, "width": side}
        latents = prior_pipeline(
            prompt, timesteps=timesteps, guidance_scale=4.0, generator=generator, **size
        ).image_embeddings
        images += decoder_pipeline(
            latents, prompt, guidance_scale=0.0, num_inference_steps=12, generator=generator
        ).images
    return [np.asarray(image) for image in images]


def test_validation_generates_with_the_average(train, models):
    run = train(**UNEVEN)
    assert run.returncode == 0, run
    for step in (2, 7):
        files = [run.folder / f"samples/step-{step:07d}-prompt-{index}.png" for index in (0, 1)]
        images = [np.asarray(Image.open(file)) for file in files]
        averaged, last = (
            generate(
                models, run.folder / f"checkpoint-{step}" / name, UNEVEN["validation_prompts"], len(images[0])
            )
            for name in ("prior_ema", "prior")
        )
        for image, right, wrong in zip(images, averaged, last, strict=True):
            # `generate` uses another attention kernel: with some versions a few values are rounded
            # differently.
            assert np.abs(image.astype(int) - right).max() <= 1
            assert 20 * np.count_nonzero(image != right) < np.count_nonzero(image != wrong)


def test_validation_has_no_dropout_and_training_has_it(train, models):
    """With a rate of 0 the weights stay as they are, and so must the images."""
    flags = {"learning_rate": 0.0, "max_train_steps": 6, "max_train_samples": 8, "validation_epochs": 1}
    run = train(**flags, validation_prompts=["a red apple"])
    assert run.returncode == 0, run
    files = sorted((run.folder / "samples").glob("step-*"))
    assert [file.name for file in files] == [f"step-{step:07d}-prompt-0.png" for step in (0, 2, 4, 6)]
    images = [np.asarray(Image.open(file)) for file in files]
    assert np.array_equal(images[0], images[1])
    assert np.array_equal(images[0], images[2])
    assert np.array_equal(images[0], images[3])
    (right,) = generate(models, models / "prior" / "prior", ["a red apple"], len(images[0]))
    assert np.array_equal(images[0], right)

    assert len(run.record["steps"]) == 6
    prior = script.wuerstchen.WuerstchenPrior.from_pretrained(models / "prior" / "prior").eval()
    for step in run.record["steps"]:  # those after a validation as well
        with torch.no_grad():
            without = prior(step["noisy"], step["given"], step["prompt_embeds"])
        assert distance({"": step["pred"]}, {"": without}) > 1e-3


def test_validation_changes_no_bit_of_the_training(train):
    validated = train(**UNEVEN)
    plain = train(**UNEVEN | {"validation_prompts": None})
    assert validated.returncode == plain.returncode == 0, (validated, plain)
    assert len(list((validated.folder / "samples").glob("step-*"))) == 10
    assert not (plain.folder / "samples").exists()
    for step in range(1, 8):
        assert same_weights(validated.prior(step), plain.prior(step))
        assert same_weights(validated.prior(step, "prior_ema"), plain.prior(step, "prior_ema"))
    assert validated.logged("train_loss") == plain.logged("train_loss")


# ------------------------------------------------------------------------- a loss or gradient that diverges


def spoil_third_call(how):
    """Makes the loss or the gradient of the prior's third call in training NaN or infinite."""
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
def test_a_loss_or_gradient_that_is_not_finite_stops_before_it_reaches_the_weights(train, how):
    run = train(
        functools.partial(spoil_third_call, how), max_train_steps=5, checkpointing_steps=1, use_ema=True
    )
    assert run.returncode == 1, run
    assert "stopped before step 3: " in run.output, run
    assert "the last good checkpoint: checkpoint-2" in run.output, run
    assert "Traceback" not in run.output
    assert len(run.record["rates"]) == 2, "the optimizer made two steps"
    checkpoints = sorted(path.name for path in run.folder.glob("*checkpoint-*"))
    assert checkpoints == ["checkpoint-1", "checkpoint-2"]
    assert all(value.isfinite().all() for value in (run.prior(2) | run.prior(2, "prior_ema")).values())
    assert not (run.folder / "prior_pipeline").exists()


@pytest.mark.parametrize("accumulation", [1, 2])
def test_what_stopped_a_run_is_reported_with_its_rows_and_timesteps(train, models, pictures, accumulation):
    run = train(
        functools.partial(spoil_third_call, "nan loss"),
        max_train_steps=5,
        train_batch_size=2,
        gradient_accumulation_steps=accumulation,
    )
    assert run.returncode == 1, run
    step = run.record["steps"][2]
    tokenizer = CLIPTokenizerFast.from_pretrained(models / "prior" / "tokenizer")
    lines = (pictures / "metadata.jsonl").read_text().splitlines()
    captions = [json.loads(line)["text"].lower() for line in lines]
    tokens = [tokenizer(caption, truncation=True, max_length=77)["input_ids"] for caption in captions]
    rows = [
        tokens.index(ids[mask.bool()].tolist()) for ids, mask in zip(step["ids"], step["mask"], strict=True)
    ]
    reported = [int(row) for row in re.search(r"rows \[([\d, ]+)\]", run.output).group(1).split(",")]
    assert len(reported) == 2 * accumulation
    assert reported[:2] == rows, "the spoiled call is the first of its step"
    timesteps = [float(t) for t in re.search(r"timesteps \[([\d., e-]+)\]", run.output).group(1).split(",")]
    assert len(timesteps) == 2 * accumulation
    assert timesteps[:2] == pytest.approx(step["timesteps"].tolist(), rel=1e-6)


# ------------------------------------------------------------------------------------------------- the seed


def test_one_seed_gives_the_same_bits_and_another_seed_others(train):
    flags = {"checkpointing_steps": 1, "use_ema": True}
    first, again = train(**flags, seed=5), train(**flags, seed=5, logging_dir="logs")
    other = train(**flags, seed=6)
    assert first.folder != again.folder
    for step in (1, 2, 3):
        assert same_weights(first.prior(step), again.prior(step))
        assert same_weights(first.prior(step, "prior_ema"), again.prior(step, "prior_ema"))
        assert not same_weights(first.prior(step), other.prior(step))
    assert first.logged("train_loss") == again.logged("train_loss")
    assert torch.equal(first.all("pixels"), again.all("pixels"))
    for name in ("pixels", "noise", "timesteps"):
        assert not torch.equal(first.all(name), other.all(name))


def test_a_run_without_a_seed_logs_the_one_it_chose(train):
    flags = {"checkpointing_steps": 3}
    run, another = train(**flags, seed=None), train(**flags, seed=None, logging_dir="logs")
    assert run.returncode == another.returncode == 0, (run, another)
    seed, other_seed = (int(re.search(r"seed\W+(\d+)", r.output).group(1)) for r in (run, another))
    assert seed != other_seed
    again = train(**flags, seed=seed)
    assert same_weights(run.prior(), again.prior())
    assert not same_weights(run.prior(), another.prior())


# ------------------------------------------------------------------------------------------------ weighting


def test_p2_weights_each_sample_by_the_share_of_noise(train):
    """At a rate of 0 and with one seed, two runs differ by the weight alone."""
    flags = {"learning_rate": 0.0, "max_train_steps": 16, "train_batch_size": 1}
    plain, weighted = train(**flags), train(**flags, loss_weighting="p2")
    assert plain.returncode == weighted.returncode == 0, (plain, weighted)
    timesteps = plain.all("timesteps")
    assert torch.equal(timesteps, weighted.all("timesteps"))
    weights = 1 - alpha_bar(timesteps)
    losses, weighted_losses = plain.logged("train_loss"), weighted.logged("train_loss")
    ratios = [weighted_losses[step] / losses[step] for step in range(1, 17)]
    assert ratios == pytest.approx(weights.tolist(), rel=1e-4, abs=2e-7)


def test_p2_averages_to_054_and_weights_samples_not_batches(train, steady_prior):
    t = (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000
    expected = (1 - alpha_bar(t)).mean().item()
    assert expected == pytest.approx(0.54, abs=0.05)
    noise = torch.zeros(len(t), 1, 1, 1)
    weights, ones = (
        script.diffusion_loss(
            lambda noisy_latents, timesteps, prompt_embeds: noise + 1,  # the squared error is 1
            DDPMWuerstchenScheduler(),
            latents=torch.zeros_like(noise),
            prompt_embeds=None,
            noise=noise,
            timesteps=t.float(),
            weighting=weighting,
        )
        for weighting in ("p2", "none")
    )
    assert weights.shape == t.shape
    assert weights.mean().item() == pytest.approx(expected, rel=1e-4)
    assert torch.equal(ones, torch.ones(len(t)))

    run = train(
        max_train_steps=1,
        train_batch_size=8,
        loss_weighting="p2",
        pretrained_prior_model_name_or_path=steady_prior,
    )
    (step,) = run.record["steps"]
    errors = ((step["pred"] - step["noise"]) ** 2).mean(dim=(1, 2, 3))
    by_hand = (errors * (1 - alpha_bar(step["timesteps"]))).mean().item()
    assert run.logged("train_loss")[1] == pytest.approx(by_hand, rel=1e-5)


# ------------------------------------------------------------------------------ caption dropout, other flags


def parse_flags(**flags):
    settings = {"train_data_dir": PICTURES, "resolution": 64, "report_to": "none", "seed": 0} | flags
    return script.parse_args([f"--{name}" if v is True else f"--{name}={v}" for name, v in settings.items()])


def read_pixels(positions=range(64), **flags):
    """The pixels of the samples at some positions, by the data set's row."""
    args = parse_flags(**flags)
    tokenizer = CLIPTokenizerFast.from_pretrained(TESTS / "data" / "clip-tokenizer", model_max_length=77)
    preprocess = script.make_preprocess(args, tokenizer, empty_embeds=None, train=True)
    samples = Samples(script.load_train_dataset(args), preprocess, args.seed, False)
    read = [samples[position] for position in positions]
    return {sample["row"]: sample["effnet_pixel_values"] for sample in read}


@pytest.fixture(scope="module")
def plain_pixels():
    return read_pixels()


def test_without_the_flags_every_epoch_has_the_same_pixels(plain_pixels):
    later = read_pixels(range(128, 192))
    assert later.keys() == plain_pixels.keys()
    assert all(torch.equal(later[row], plain_pixels[row]) for row in plain_pixels)


def test_a_dropped_caption_is_the_embedding_of_the_empty_string(
    run_main, models, pictures, tmp_path, monkeypatch
):
    """For each sample by itself: of a batch, some captions are dropped and some are not."""
    recorded = tmp_path / "prompt_embeds.pt"
    encode_batch = script.encode_batch

    def encode_and_record(*args, **kwargs):
        latents, prompt_embeds = encode_batch(*args, **kwargs)
        torch.save(prompt_embeds, recorded)
        return latents, prompt_embeds

    monkeypatch.setattr(script, "encode_batch", encode_and_record)
    flags = {"caption_dropout": 0.5, "max_train_steps": 1, "train_batch_size": 16}
    done = run_main(tiny_args(models, pictures, tmp_path / "out", **flags))
    assert done.returncode == 0, done
    tokenizer = CLIPTokenizerFast.from_pretrained(models / "prior" / "tokenizer")
    text_encoder = CLIPTextModel.from_pretrained(models / "prior" / "text_encoder")
    tokens = tokenizer([""], padding="max_length", truncation=True, return_tensors="pt")
    with torch.no_grad():
        empty = text_encoder(tokens.input_ids, attention_mask=tokens.attention_mask).last_hidden_state[0]
    dropped = [(embeds - empty).abs().max().item() < 1e-5 for embeds in torch.load(recorded)]
    assert len(dropped) == 16
    assert 2 <= sum(dropped) <= 14


ORIGINAL_RECIPE = {
    "timestep_sampling": "stretched",
    "loss_weighting": "p2",
    "caption_dropout": 0.3,
    "random_crop": True,
    "random_flip": True,
    "caption_column": "captions",
    "validation_split": 8,
    "checkpointing_steps": 1,
    "max_train_steps": 4,
    "use_ema": True,
}


@pytest.mark.slow
def test_a_run_with_the_original_recipe_resumes_exactly(train, tmp_path):
    run = train(**ORIGINAL_RECIPE)
    assert run.returncode == 0, run
    again = resumed(train, run, 2, tmp_path, by="path", **ORIGINAL_RECIPE)
    assert_continues_as(again, run, 2, 4)
    other = train(**ORIGINAL_RECIPE | {"timestep_sampling": "uniform"})
    assert other.returncode == 0, other
    assert not same_weights(other.prior(4), run.prior(4))


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


def test_ranks_have_different_rows_noise_and_timesteps(train_ranks):
    first, second = train_ranks(**RANKS)
    assert first.returncode == second.returncode == 0, (first, second)
    timesteps = [*first.all("timesteps").tolist(), *second.all("timesteps").tolist()]
    assert len(timesteps) == len(set(timesteps)) == 32
    noise = torch.cat([first.all("noise"), second.all("noise")]).flatten(1)
    assert torch.corrcoef(noise).fill_diagonal_(0).abs().max() < 0.75
    pixels = torch.cat([run.all("pixels")[:4] for run in (first, second)])
    assert len({sample.numpy().tobytes() for sample in pixels}) == 8, "a step of 8 samples has 8 rows"


def test_ranks_have_different_dropout(train_ranks):
    flags = RANKS | {"max_train_steps": 1, "gradient_accumulation_steps": 1, "learning_rate": 0.0}
    runs = train_ranks(use_constant_inputs, **flags)
    assert all(run.returncode == 0 for run in runs), runs
    first, second = (run.record["steps"][0] for run in runs)
    assert distance({"": first["pred"]}, {"": second["pred"]}) > 1e-3


def use_constant_inputs():
    """Gives the prior the same inputs on every rank, so that only its dropout can differ."""
    forward = script.wuerstchen.WuerstchenPrior.forward

    def forward_constants(self, *inputs):
        return forward(self, *(torch.full_like(tensor, 0.5) for tensor in inputs))

    script.wuerstchen.WuerstchenPrior.forward = forward_constants


def test_the_logged_loss_is_the_mean_over_ranks_and_micro_steps(train_ranks):
    runs = train_ranks(**RANKS)
    errors = [[((s["pred"] - s["noise"]) ** 2).mean().item() for s in run.record["steps"]] for run in runs]
    means = np.array(errors).reshape(2, 4, 2).mean(axis=(0, 2))
    assert list(runs[0].logged("train_loss").values()) == pytest.approx(means.tolist(), rel=1e-5)
    assert np.abs(np.array(errors[0]) - np.array(errors[1])).min() > 1e-4, "the ranks' losses differ"


def test_two_ranks_of_two_images_are_one_of_four(train, train_ranks, steady_prior):
    flags = RANKS | {
        "pretrained_prior_model_name_or_path": steady_prior,
        "adam_epsilon": 1e-3,
        "max_grad_norm": 0.1,
        "lr_scheduler": "cosine",
        "lr_warmup_steps": 1,
    }
    runs = train_ranks(**flags)
    alone = train(**flags | {"train_batch_size": 4})
    assert all(run.returncode == 0 for run in (*runs, alone)), (*runs, alone)
    assert runs[0].record["rates"] == runs[1].record["rates"] == alone.record["rates"]
    before = initial_weights(steady_prior)
    for step in (2, 3, 4):
        moved = distance(alone.prior(step), before)
        assert distance(runs[0].prior(step), alone.prior(step)) < 1e-4 * moved
        assert distance(runs[0].prior(step, "prior_ema"), alone.prior(step, "prior_ema")) < 1e-4 * moved
    for tag in ("train_loss", "grad_norm", "lr"):
        assert runs[0].logged(tag) == pytest.approx(alone.logged(tag), rel=1e-4, abs=1e-12)


def test_a_loss_that_is_not_finite_on_one_rank_stops_both(train_ranks):
    runs = train_ranks(spoil_on_second_rank, **RANKS)
    assert [run.returncode for run in runs] == [1, 1], runs
    assert all("stopped before step 2: " in run.output for run in runs), runs
    assert sorted(path.name for path in runs[0].folder.glob("*checkpoint-*")) == ["checkpoint-1"]


def spoil_on_second_rank():
    if script.os.environ["RANK"] == "1":
        spoil_third_call("nan loss")
