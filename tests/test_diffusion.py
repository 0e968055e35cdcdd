# SPDX-License-Identifier: Apache-2.0
"""What a training step computes: the loss, noise and timesteps, precision, random numbers and several ranks,
against formulas written out here and other implementations."""

import functools
import itertools
import json
import math
import re
import sys

import numpy as np
import pytest
import torch
from conftest import checksum, distance, load_optimizer_state, load_weights, run_in_fork, same_weights, script
from diffusers.models.attention_processor import AttnProcessor
from transformers import CLIPTextModel, CLIPTokenizerFast

from modeling_efficient_net_encoder import EfficientNetEncoder

WuerstchenPrior = script.wuerstchen.WuerstchenPrior


def alpha_bar(t):
    """The share of the signal's variance that is left at t, in float64: the cosine schedule, s = 0.008."""
    s = 0.008
    angle = (torch.as_tensor(t, dtype=torch.float64) + s) / (1 + s) * math.pi / 2
    return (angle.cos() ** 2 / math.cos(s / (1 + s) * math.pi / 2) ** 2).clamp(1e-4, 0.9999)


def add_noise(image_embeds, noise, t):
    """The noisy latents at t, float32."""
    signal = alpha_bar(t).view(-1, 1, 1, 1)
    return (signal.sqrt() * image_embeds + (1 - signal).sqrt() * noise).float()


# ------------------------------------------------------------------------------------------------- the step


# Four samples a step, six rows: epochs end inside step 2, and with step 3.
BY_HAND = {"max_train_steps": 3, "train_batch_size": 2, "gradient_accumulation_steps": 2}
BY_HAND |= {"max_train_samples": 6, "checkpointing_steps": 1, "learning_rate": 1e-3}
# A large epsilon, or the first steps are the signs of gradients and rounding decides some.
BY_HAND |= {"adam_beta1": 0.8, "adam_beta2": 0.9, "adam_epsilon": 1e-3, "adam_weight_decay": 0.1}


@pytest.mark.parametrize("max_grad_norm", [0.05, 1000.0], ids=["clipped", "not clipped"])
def test_loss_gradient_and_step_are_those_of_the_formulas(train, models, steady_prior, max_grad_norm):
    flags = {"max_grad_norm": max_grad_norm, "pretrained_prior_model_name_or_path": steady_prior}
    run = train(**BY_HAND, **flags, record=True).ok()

    def check():
        text_encoder = CLIPTextModel.from_pretrained(
            steady_prior / "text_encoder", attn_implementation="eager"
        ).eval()
        image_encoder = EfficientNetEncoder.from_pretrained(models / "encoder").eval()
        prior = WuerstchenPrior.from_pretrained(steady_prior / "prior").train()
        prior.set_attn_processor(AttnProcessor())  # softmax(QK) V written out
        weights = dict(prior.named_parameters())
        mean, square = ({name: torch.zeros_like(w) for name, w in weights.items()} for _ in range(2))
        losses, norms, rates = run.logged("train_loss"), run.logged("grad_norm"), run.logged("lr")

        assert len(run.record["steps"]) == 6
        epochs = [{checksum(pixels) for pixels in epoch} for epoch in run.all("pixels").split(6)]
        assert epochs[0] == epochs[1] and len(epochs[0]) == 6, "each row once an epoch"
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
            before = run.prior(step - 1) if step > 1 else load_weights(steady_prior / "prior")
            assert distance(run.prior(step), expected) < 1e-3 * distance(run.prior(step), before)

    run_in_fork(check)


@pytest.mark.slow
def test_losses_over_200_steps_are_those_of_the_references_loop(train, steady_prior):
    """Of the script of the same name in diffusers, on the same embeddings and noise."""
    flags = {"learning_rate": 1e-4, "max_train_steps": 200, "checkpointing_steps": 200, "record": True}
    flags |= {"train_batch_size": 8, "gradient_accumulation_steps": 2}
    run = train(**flags, pretrained_prior_model_name_or_path=steady_prior, timeout=900)
    assert run.returncode == 0, run

    def check():
        prior = WuerstchenPrior.from_pretrained(steady_prior / "prior").train()
        noise_scheduler = script.DDPMWuerstchenScheduler()
        settings = {"lr": 1e-4, "betas": (0.9, 0.999), "weight_decay": 0.0, "eps": 1e-8}
        optimizer = torch.optim.AdamW(prior.parameters(), **settings)
        losses = []
        for batch in run.record["steps"]:
            image_embeds = batch["latents"].add(1.0).div(42.0)
            noisy_latents = noise_scheduler.add_noise(image_embeds, batch["noise"], batch["timesteps"])
            pred_noise = prior(noisy_latents, batch["timesteps"], batch["prompt_embeds"])
            loss = torch.nn.functional.mse_loss(pred_noise.float(), batch["noise"].float(), reduction="mean")
            (loss / 2).backward()
            losses.append(loss.item())
            if len(losses) % 2 == 0:
                torch.nn.utils.clip_grad_norm_(prior.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
        losses = np.reshape(losses, (200, 2)).mean(axis=1)
        assert np.abs(losses - list(run.losses().values())).max() < 3e-7
        assert losses[-50:].mean() < 0.95 * losses[:50].mean(), "the weights have changed"

    run_in_fork(check)


def test_p2_weights_each_sample_by_its_share_of_noise(train, steady_prior):
    t = (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000
    assert (1 - alpha_bar(t)).mean().item() == pytest.approx(0.54, abs=0.05)
    noise, noise_scheduler = torch.zeros(len(t), 1, 1, 1), script.DDPMWuerstchenScheduler()
    inputs = {"latents": noise, "prompt_embeds": None, "noise": noise, "timesteps": t.float()}
    for weighting, expected in (("p2", 1 - alpha_bar(t.float())), ("none", torch.ones(len(t)))):
        # The predicted noise is 1 and the noise 0, so that the loss is the weight.
        weights = script.diffusion_loss(lambda *_: noise + 1, noise_scheduler, **inputs, weighting=weighting)
        assert weights.tolist() == pytest.approx(expected.tolist(), rel=1e-4, abs=2e-7)

    flags = {"max_train_steps": 1, "train_batch_size": 8, "loss_weighting": "p2", "record": True}
    run = train(**flags, pretrained_prior_model_name_or_path=steady_prior)
    (step,) = run.record["steps"]
    errors = ((step["pred"] - step["noise"]) ** 2).mean(dim=(1, 2, 3))
    by_hand = (errors * (1 - alpha_bar(step["timesteps"]))).mean().item()
    assert run.logged("train_loss")[1] == pytest.approx(by_hand, rel=1e-5)


# ------------------------------------------------------------------------------ noise, timesteps and captions


def without_encoder():
    """Makes all latents 0, for what does not depend on them: the encoder takes most of a tiny run's time."""
    EfficientNetEncoder.forward = lambda self, pixels: pixels.new_zeros(
        len(pixels), 16, *(n // 32 for n in pixels.shape[2:])
    )


def test_timesteps_are_uniform_float32_and_no_noise_is_used_twice(train):
    flags = {"max_train_steps": 32, "train_batch_size": 4, "gradient_accumulation_steps": 2}
    run = train(without_encoder, **flags, record=True).ok()
    timesteps, noise = run.all("timesteps"), run.all("noise")
    assert timesteps.dtype == noise.dtype == torch.float32
    assert torch.equal(timesteps, run.all("given")), "the prior gets the timesteps of the noise"
    assert len(timesteps) == len(set(timesteps.tolist())) == 256
    assert timesteps.min() >= 0 and timesteps.max() < 1
    # Kolmogorov-Smirnov: of 256 uniform samples, one set in a thousand is further away than this.
    ranks = torch.arange(256) / 256
    assert (timesteps.sort().values - ranks).abs().max() < 1.95 / math.sqrt(256)

    flat = noise.flatten(1)
    correlation = torch.corrcoef(flat).fill_diagonal_(0).abs().max()
    assert correlation < 0.75, "no two samples share noise"  # 64 numbers each; 30,000 pairs reach some 0.5
    assert flat.mean().item() == pytest.approx(0, abs=4 / math.sqrt(flat.numel()))
    assert flat.var().item() == pytest.approx(1, abs=4 * math.sqrt(2 / flat.numel()))


@pytest.mark.parametrize(
    ("sampling", "lowest", "share"), [("uniform", 0, 0), ("stretched", 0.001, 0.081 / 1.08)]
)
def test_timesteps_are_one_as_often_as_in_the_original_training_or_never(sampling, lowest, share):
    """(1 - u) * 1.08 + 0.001 is uniform on [0.001, 1.081]; what is above 1 becomes 1."""
    u = torch.rand(200_000, generator=torch.Generator().manual_seed(0))
    t = script.sample_timesteps(u, sampling)
    assert t.dtype == torch.float32 and t.min() >= lowest and t.max() <= 1
    assert sampling == "stretched" or torch.equal(t, u)
    t = t.double()
    tolerance = 4 * (share * (1 - share) / len(t)) ** 0.5
    assert (t == 1).double().mean().item() == pytest.approx(share, abs=tolerance)
    mean = (1 - share) * (1 + lowest) / 2 + share
    assert t.mean().item() == pytest.approx(mean, abs=4 * t.std().item() / len(t) ** 0.5)
    below = t[t < 1]
    counts = torch.histogram(below, torch.linspace(lowest, 1, 11, dtype=torch.float64)).hist
    assert (counts - len(below) / 10).abs().max() < 5 * (len(below) / 10) ** 0.5, "uniform below 1"


def test_a_dropped_caption_is_the_embedding_of_the_empty_string(train, models, images):
    """Sample by sample: of a batch, some captions are dropped, and the others are those of the rows."""
    flags = {"caption_dropout": 0.5, "max_train_steps": 1, "train_batch_size": 16, "record": True}
    run = train(**flags).ok()
    tokenizer = CLIPTokenizerFast.from_pretrained(models / "prior" / "tokenizer")
    text_encoder = CLIPTextModel.from_pretrained(models / "prior" / "text_encoder")
    captions = [json.loads(line)["text"] for line in (images / "metadata.jsonl").read_text().splitlines()]
    tokens = tokenizer(["", *captions], padding="max_length", truncation=True, return_tensors="pt")
    with torch.no_grad():
        embeds = text_encoder(tokens.input_ids, attention_mask=tokens.attention_mask).last_hidden_state
    difference = (run.all("prompt_embeds")[:, None] - embeds).abs().amax(dim=(2, 3))
    assert len(difference) == 16 and difference.amin(dim=1).max() < 1e-5
    assert 2 <= (difference.argmin(dim=1) == 0).sum() <= 14


# ------------------------------------------------------------------------------------------------ precision

# How sums in bf16 are rounded depends on the kernel and on the CPU's instructions (AVX2, AVX-512 BF16, AMX).
# So a close comparison here is one of float32 numbers, or of the same kernels on the same inputs.
PRECISE = {"max_train_steps": 3, "checkpointing_steps": 1, "use_ema": True, "learning_rate": 1e-5}
BF16 = PRECISE | {"mixed_precision": "bf16"}


def record_timestep_embeddings(file):
    """Saves the embedded timesteps that each timestep block gets in training."""
    modeling = sys.modules[WuerstchenPrior.__module__]
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
    flags = BF16 | {"pretrained_prior_model_name_or_path": steady_prior, "record": True}
    run = train(functools.partial(record_timestep_embeddings, file), **flags).ok()
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


def test_bf16_keeps_the_weights_and_the_optimizer_in_float32(train, steady_prior):
    run = train(**BF16, pretrained_prior_model_name_or_path=steady_prior, record=True).ok()
    moments = load_optimizer_state(run.folder / "checkpoint-3")
    for saved in (run.prior(3), run.prior(3, "prior_ema"), moments):
        assert {value.dtype for value in saved.values()} == {torch.float32}
        for name, value in saved.items():
            # Of random float32 numbers, one in 2 ** 16 is a bf16 number, too.
            if not name.endswith(".step"):
                assert (value != value.bfloat16()).double().mean() > 0.9, f"{name} is rounded to bf16"
    assert same_weights(run.prior(), run.prior(3, "prior_ema"))

    # Adam's first step moves each weight by the rate at most, whichever way it would be rounded.
    before = load_weights(steady_prior / "prior")
    assert [name for name, value in run.prior(3).items() if torch.equal(value, before[name])] == []
    assert distance(run.prior(1), before) < 1.1 * BF16["learning_rate"]


def test_bf16_is_for_the_encoders_and_matrix_products_and_the_loss_is_float32(train, steady_prior):
    flags = {"pretrained_prior_model_name_or_path": steady_prior, "record": True}
    run, exact = train(**BF16, **flags).ok(), train(**PRECISE, **flags).ok()
    for encoder in run.record["frozen"].values():
        assert {dtype for dtype, _ in encoder.values() if dtype.is_floating_point} == {torch.bfloat16}
    losses, exact_losses = run.logged("train_loss"), exact.logged("train_loss")
    assert losses != exact_losses

    prior = WuerstchenPrior.from_pretrained(steady_prior / "prior").train()
    for index, (step, plain) in enumerate(zip(run.record["steps"], exact.record["steps"], strict=True)):
        assert step["prompt_embeds"].dtype == torch.bfloat16
        assert plain["pixels"].dtype == plain["prompt_embeds"].dtype == torch.float32
        assert torch.equal(step["pixels"], plain["pixels"].bfloat16()), "rounded after they are normalized"
        assert step["pixels"].dtype == torch.bfloat16
        assert not step["weights_cached"], "copies in half precision would take half the prior's memory again"
        assert torch.equal(step["noise"], plain["noise"])

        # The encoder with its random weights is off by some 4 % in bf16, with any instructions.
        assert step["image_embeds"].dtype == torch.float32
        assert torch.equal(step["image_embeds"], (step["latents"].float() + 1) / 42)
        assert (step["image_embeds"] - plain["image_embeds"]).norm() < 0.1 * plain["image_embeds"].norm()
        # From the same latents, the loss is that of float32 up to the prior's own rounding, some 0.0004.
        loss = ((step["pred"].double() - step["noise"]) ** 2).mean().item()
        assert losses[index + 1] == pytest.approx(loss, rel=1e-5)
        prior.load_state_dict(run.prior(index) if index else load_weights(steady_prior / "prior"))
        with torch.no_grad():
            pred_noise = prior(step["noisy"], step["timesteps"], step["prompt_embeds"].float())
        exact_loss = ((pred_noise - step["noise"]) ** 2).mean().item()
        assert losses[index + 1] == pytest.approx(exact_loss, rel=2**-9)


@pytest.mark.parametrize(
    ("flag", "configured", "used"),
    [
        (None, "bf16", "bf16"),
        ("no", "bf16", "no"),
        ("fp16", None, "no"),  # a CPU has none
        pytest.param(None, "fp16", "no", marks=pytest.mark.slow),
    ],
)
def test_the_precision_is_the_flags_or_else_accelerates(train, steady_prior, flag, configured, used):
    flags = PRECISE | {"pretrained_prior_model_name_or_path": steady_prior, "record": True}
    env = {"ACCELERATE_MIXED_PRECISION": configured} if configured else None
    run = train(env=env, **flags | {"mixed_precision": flag}).ok()
    plain = train(**flags | ({"mixed_precision": "bf16"} if used == "bf16" else {})).ok()
    dtype = torch.bfloat16 if used == "bf16" else torch.float32
    assert run.record["steps"][0]["prompt_embeds"].dtype == dtype
    assert same_weights(run.prior(3), plain.prior(3))


# ----------------------------------------------------------------------------------- gradient checkpointing


def print_attention_calls():
    """Prints a line for each call of an attention block of the prior."""
    block = sys.modules[WuerstchenPrior.__module__].AttnBlock
    forward = block.forward

    def print_and_forward(*args):
        print("attention block")
        return forward(*args)

    block.forward = print_and_forward


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_gradient_checkpointing_runs_blocks_twice_and_changes_no_bit_but_one_sum(train_ranks, ranks):
    """With dropout. The first bias has its gradient added up in another order, and later steps differ by that
    rounding, of which Adam's usual epsilon would make more."""
    flags = {"max_train_steps": 4, "gradient_accumulation_steps": 2, "learning_rate": 1e-3}
    flags |= {"checkpointing_steps": 1, "adam_epsilon": 1e-3}
    runs = []
    for on in (False, True):
        run = train_ranks(print_attention_calls, ranks, **flags, gradient_checkpointing=on)[0]
        assert run.output.count("attention block") == 8 * 2 * (1 + on), "two blocks, in eight micro-steps"
        runs.append(run.ok())
    plain, checkpointing = runs
    here, there = checkpointing.prior(1), plain.prior(1)
    assert {name for name in there if not torch.equal(here[name], there[name])} <= {"projection.bias"}
    assert checkpointing.logged("train_loss")[1] == plain.logged("train_loss")[1]
    moved = distance(plain.prior(4), there)
    for step in range(1, 5):
        assert distance(checkpointing.prior(step), plain.prior(step)) < 1e-5 * moved


# ------------------------------------------------------------------------- a loss or gradient that diverges


def spoil_third_call(how, rank="0"):
    """Makes the loss or the gradient of the prior's third call in training on a rank NaN or infinite."""
    forward, calls = WuerstchenPrior.forward, itertools.count(1)

    def spoiled(self, *args, **kwargs):
        pred_noise = forward(self, *args, **kwargs)
        if next(calls) == 3 and script.os.environ.get("RANK", "0") == rank:
            if how == "nan gradient":
                pred_noise.register_hook(lambda gradient: gradient * math.nan)
            else:
                pred_noise = pred_noise * float(how.split()[0])
        return pred_noise

    WuerstchenPrior.forward = spoiled


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("how", ["nan loss", "inf loss", "nan gradient"])
def test_what_is_not_finite_stops_the_run_before_it_reaches_the_weights(
    train, models, images, how, accumulation
):
    """The message names the step's rows."""
    flags = {"max_train_steps": 5, "checkpointing_steps": 1, "use_ema": True, "train_batch_size": 2}
    flags |= {"gradient_accumulation_steps": accumulation, "record": True}
    run = train(functools.partial(spoil_third_call, how), **flags)
    step = 3 if accumulation == 1 else 2
    assert f"stopped before step {step}: " in run.error() and "last checkpoint" in run.error()
    assert len(run.record["rates"]) == step - 1, "steps of the optimizer"
    assert run.checkpoints() == list(range(1, step))
    for weights in (run.prior(step - 1), run.prior(step - 1, "prior_ema")):
        assert all(value.isfinite().all() for value in weights.values())
    assert not (run.folder / "prior_pipeline").exists()

    spoiled = run.record["steps"][2]  # the first micro-step of its step
    tokenizer = CLIPTokenizerFast.from_pretrained(models / "prior" / "tokenizer")
    lines = (images / "metadata.jsonl").read_text().splitlines()
    tokens = [tokenizer(json.loads(line)["text"], truncation=True, max_length=77).input_ids for line in lines]
    rows = [tokens.index(i[m.bool()].tolist()) for i, m in zip(spoiled["ids"], spoiled["mask"], strict=True)]
    reported = json.loads(re.search(r"rows (\[[\d, ]+\])", run.error()).group(1))
    assert len(reported) == 2 * accumulation and reported[:2] == rows


# ------------------------------------------------------------------------------------ the seed, several ranks


def test_one_seed_gives_the_same_bits_and_another_seed_others(train):
    """The seed of a run without --seed is chosen and logged."""
    flags = {"checkpointing_steps": 1, "use_ema": True, "record": True}
    first, other = (train(**flags, seed=None, logging_dir=name).ok() for name in ("logs", "./logs"))
    seed, other_seed = (int(re.search(r"seed\W+(\d+)", run.output).group(1)) for run in (first, other))
    assert seed != other_seed
    again = train(**flags, seed=seed)
    for step in (1, 2, 3):
        assert same_weights(first.prior(step), again.prior(step))
        assert same_weights(first.prior(step, "prior_ema"), again.prior(step, "prior_ema"))
        assert not same_weights(first.prior(step), other.prior(step))
    assert first.logged("train_loss") == again.logged("train_loss")
    for name in ("pixels", "noise", "timesteps"):
        assert torch.equal(first.all(name), again.all(name))
        assert not torch.equal(first.all(name), other.all(name))


RANKS = {"train_batch_size": 2, "gradient_accumulation_steps": 2, "max_train_samples": 10}
RANKS |= {"max_train_steps": 4, "checkpointing_steps": 1, "use_ema": True, "learning_rate": 1e-3}


def use_constant_inputs():
    """Gives the prior the same inputs on every rank, so that only its dropout can differ."""
    forward = WuerstchenPrior.forward

    def forward_constants(self, *inputs):
        return forward(self, *(torch.full_like(tensor, 0.5) for tensor in inputs))

    WuerstchenPrior.forward = forward_constants


def test_ranks_have_different_dropout(train_ranks):
    flags = RANKS | {"max_train_steps": 1, "gradient_accumulation_steps": 1, "learning_rate": 0.0}
    runs = train_ranks(use_constant_inputs, **flags, record=True)
    first, second = (run.ok().record["steps"][0] for run in runs)
    assert distance({"": first["pred"]}, {"": second["pred"]}) > 1e-3


def test_a_loss_that_is_not_finite_on_one_rank_stops_both(train_ranks):
    runs = train_ranks(functools.partial(spoil_third_call, "nan loss", "1"), **RANKS)
    assert [run.returncode for run in runs] == [1, 1], runs
    assert all("stopped before step 2: " in run.output for run in runs), runs
    assert runs[0].checkpoints() == [1]
