# SPDX-License-Identifier: Apache-2.0
"""Validation: the held-out loss, the images of the prompts, and when both are made. The held-out loss is
compared with its definition, written out here, and images with those of the pipelines of diffusers."""

import itertools
import json
import math
import os
import re
from contextlib import nullcontext
from types import SimpleNamespace
from unittest.mock import MagicMock, call

import numpy as np
import pytest
import torch
from conftest import STEPS_OF_IMAGES, distance, equal_images, same_weights, script
from diffusers.models.attention_processor import AttnProcessor
from PIL import Image
from tiny_models import read_images
from transformers import CLIPTextModel, CLIPTokenizerFast

from modeling_efficient_net_encoder import EfficientNetEncoder

wuerstchen = script.wuerstchen
PROMPTS = ["a red apple", "an owl at night 🦉", "雪の結晶"]
NUM_ROWS, HELD_OUT = 14, 6
# An epoch is two steps of eight samples. Held-out rows come in batches of four and of two.
RUN = {"train_batch_size": 4, "max_train_steps": 7, "checkpointing_steps": 2, "learning_rate": 3e-4}
RUN |= {"random_flip": True, "caption_dropout": 0.5, "validation_prompts": PROMPTS}
RUN |= {"validation_steps": 2, "validation_split": HELD_OUT}
WITH_EMA = RUN | {"use_ema": True, "loss_weighting": "p2", "report_to": "tensorboard,wandb", "record": True}
VALIDATED = [0, 2, 4, 6, 7]
RANKS = RUN | {"train_batch_size": 2, "max_train_steps": 4, "validation_split": 0.4, "report_to": "none"}
BANDS = [f"val_loss_t{start}" for start in (0.0, 0.25, 0.5, 0.75)]
MEAN, STD = (torch.tensor(n).view(3, 1, 1) for n in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))


# ------------------------------------------------------------------------------- runs, and what they record


@pytest.fixture(scope="module")
def small(images, tmp_path_factory):
    """A folder of 14 of the images at 64 pixels, so that nothing is left to resize or to crop."""
    folder = tmp_path_factory.mktemp("small")
    rows = [json.loads(line) for line in (images / "metadata.jsonl").read_text().splitlines()[:NUM_ROWS]]
    for number, row in enumerate(rows):
        image = Image.open(images / row["file_name"]).convert("RGB").resize((64, 64))
        row["file_name"] = f"{number:02d}.png"
        image.save(folder / row["file_name"])
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def record_validation():
    """In the forked child, before `main`: records what is computed for held-out rows and how many images a
    rank generates, and saves it in the output folder after each validation."""
    record, pixels = {"held_out": [], "num_images": 0}, []
    encode, predict = EfficientNetEncoder.forward, wuerstchen.WuerstchenPrior.forward
    decode, log_validation = wuerstchen.WuerstchenDecoderPipeline.__call__, script.log_validation

    def record_pixels(self, batch):
        pixels[:] = [(batch * STD + MEAN).mul(255).round().byte()]
        return encode(self, batch)

    def record_inputs(self, x, r, c):
        if pixels and not self.training:  # the pipeline that generates images calls the prior without
            record["held_out"].append([tensor.clone() for tensor in (pixels.pop(), x, r, c)])
        return predict(self, x, r, c)

    def count_image(*args, **kwargs):
        record["num_images"] += 1
        return decode(*args, **kwargs)

    def save_record(accelerator, args, *others):
        pixels.clear()
        log_validation(accelerator, args, *others)
        torch.save(record, args.output_dir / f"validation-record-{accelerator.process_index}.pt")

    EfficientNetEncoder.forward, wuerstchen.WuerstchenPrior.forward = record_pixels, record_inputs
    wuerstchen.WuerstchenDecoderPipeline.__call__, script.log_validation = count_image, save_record


def read_record(run, rank=0):
    return torch.load(run.folder / f"validation-record-{rank}.pt")


@pytest.fixture
def run_with_ema(train, small):
    run = train(patch=record_validation, train_data_dir=small, **WITH_EMA).ok()
    return run


@pytest.fixture
def ranks(train_ranks, small):
    """Two ranks, of which the second has no memory for its image after the second step."""
    runs = train_ranks(patch=record_with_one_failure, train_data_dir=small, **RANKS)
    assert [run.returncode for run in runs] == [0, 0], runs
    return runs


def record_with_one_failure():
    record_validation()
    decoder, calls = wuerstchen.WuerstchenDecoderPipeline, itertools.count(1)
    decode = decoder.__call__

    def fail_once(*args, **kwargs):
        if os.environ["RANK"] == "1" and next(calls) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return decode(*args, **kwargs)

    decoder.__call__ = fail_once


def generate(models, prior_folder, prompts, width=128, height=128):
    """The images of a prior's weights, by the pipelines of diffusers alone."""
    prior = wuerstchen.WuerstchenPrior.from_pretrained(prior_folder)
    prior_pipeline = wuerstchen.WuerstchenPriorPipeline.from_pretrained(models / "prior", prior=prior)
    decoder_pipeline = wuerstchen.WuerstchenDecoderPipeline.from_pretrained(models / "decoder")
    size, images = {"width": width, "height": height}, []
    for prompt in prompts:
        settings = {"generator": torch.Generator().manual_seed(0)}
        timesteps, decoder_steps = STEPS_OF_IMAGES
        prior_settings = {"timesteps": timesteps, "guidance_scale": 4.0}
        latents = prior_pipeline(prompt, **size, **prior_settings, **settings).image_embeddings
        images += decoder_pipeline(
            latents, prompt, guidance_scale=0.0, num_inference_steps=decoder_steps, **settings
        ).images
    return [np.asarray(image).astype(int) for image in images]


# ------------------------------------------------------------------------------------------ the held-out loss


@pytest.fixture(scope="module")
def held_out_rows():
    """The indices of the rows that seed 0 holds out: `train_test_split` of `datasets` holds out the same."""
    return np.random.default_rng(0).permutation(NUM_ROWS)[:HELD_OUT].tolist()


@pytest.fixture(scope="module")
def compute_by_formula(models, small, held_out_rows):
    """compute_by_formula(folder, weighting): a prior's held-out loss by its definition, {name: number}."""
    prior = models / "prior"
    text_encoder = CLIPTextModel.from_pretrained(prior / "text_encoder", attn_implementation="eager").eval()
    tokenizer = CLIPTokenizerFast.from_pretrained(prior / "tokenizer")
    image_encoder = EfficientNetEncoder.from_pretrained(models / "encoder").eval()
    metadata = [json.loads(line) for line in (small / "metadata.jsonl").read_text().splitlines()]
    files = [np.asarray(Image.open(small / metadata[row]["file_name"])) for row in held_out_rows]
    pixels = (torch.tensor(np.stack(files)).permute(0, 3, 1, 2) / 255 - MEAN) / STD
    texts = [metadata[row]["text"] for row in held_out_rows]
    tokens = tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt")
    with torch.no_grad():
        embeds = text_encoder(tokens.input_ids, attention_mask=tokens.attention_mask)[0]
        image_embeds = (image_encoder.mapper(image_encoder.backbone(pixels)) + 1) / 42
    seeds = [script.derive_seed(0, "held out", row) for row in range(HELD_OUT)]
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    noise = torch.stack([torch.randn(image_embeds.shape[1:], generator=g) for g in generators])
    t = (torch.arange(HELD_OUT, dtype=torch.float64) + 0.5) / HELD_OUT
    cosine = [torch.cos((time + 0.008) / 1.008 * math.pi / 2) ** 2 for time in (t, torch.zeros_like(t))]
    signal_share = (cosine[0] / cosine[1]).clamp(1e-4, 0.9999).view(-1, 1, 1, 1)
    noisy = (signal_share.sqrt() * image_embeds + (1 - signal_share).sqrt() * noise).float()

    def compute(folder, weighting):
        prior = wuerstchen.WuerstchenPrior.from_pretrained(folder).eval()
        prior.set_attn_processor(AttnProcessor())  # softmax(QK) V written out
        with torch.no_grad():
            losses = ((prior(noisy, t.float(), embeds) - noise) ** 2).mean(dim=(1, 2, 3)).double()
        if weighting == "p2":
            losses *= 1 - signal_share.flatten()
        assert prior.config.dropout > 0, "or train mode would not show"
        # t is 1/12, 3/12, ... 11/12.
        bands = [losses[:1], losses[1:3], losses[3:4], losses[4:]]
        by_band = {name: band.mean().item() for name, band in zip(BANDS, bands, strict=True)}
        return {"val_loss": losses.mean().item()} | by_band

    return compute


def test_the_held_out_loss_is_that_of_the_averaged_weights_by_the_formula(
    run_with_ema, compute_by_formula, models
):
    """With the training's weighting, without its dropout, flips and empty captions."""
    folder = run_with_ema.folder
    curves = {name: run_with_ema.losses(name) for name in ("val_loss", *BANDS)}
    assert all(list(curve) == VALIDATED for curve in curves.values())
    for step, weights in {
        0: models / "prior" / "prior",
        6: folder / "checkpoint-6" / "prior_ema",
        7: folder / "prior_pipeline" / "prior",
    }.items():
        for name, number in compute_by_formula(weights, "p2").items():
            assert curves[name][step] == pytest.approx(number, rel=1e-5), (step, name)
    last, average = (
        compute_by_formula(folder / "checkpoint-6" / name, "p2") for name in ("prior", "prior_ema")
    )
    assert last["val_loss"] != pytest.approx(average["val_loss"], rel=1e-3), "this can tell the two apart"


def test_two_ranks_share_the_held_out_rows_and_get_the_loss_of_one(ranks, compute_by_formula, models):
    """Here a fraction of the rows is held out; 0.4 of 14 are 6."""
    losses = {name: ranks[0].losses(name) for name in ("val_loss", *BANDS)}
    folders = [ranks[0].folder / f"checkpoint-{step}" for step in (2, 4)]
    for step, folder in zip((0, 2, 4), (models / "prior", *folders), strict=True):
        for name, number in compute_by_formula(folder / "prior", "none").items():
            assert list(losses[name]) == [0, 2, 4]
            assert losses[name][step] == pytest.approx(number, rel=1e-5), (step, name)
    batches = [[len(pixels) for pixels, *_ in read_record(ranks[0], rank)["held_out"]] for rank in (0, 1)]
    assert batches == [[2] * 6, [2] * 3], "in three validations"


def test_held_out_rows_are_the_same_each_time_and_never_trained_on(run_with_ema, small, held_out_rows):
    """So are their captions, noise and timesteps. All other rows are trained on."""
    pixels = read_images(small, 64)
    row_of = {(image * STD + MEAN).mul(255).round().byte(): row for row, image in enumerate(pixels)}
    row_of |= {image.flip(-1): row for image, row in row_of.items()}  # --random_flip
    row_of = {image.numpy().tobytes(): row for image, row in row_of.items()}
    trained = (run_with_ema.all("pixels") * STD + MEAN).mul(255).round().byte()
    trained = [row_of[image.numpy().tobytes()] for image in trained]
    assert len(trained) == 7 * 4 and set(trained) == set(range(NUM_ROWS)) - set(held_out_rows)
    assert run_with_ema.losses("epoch") == {step: step / 2 for step in range(1, 8)}, "of eight rows"

    batches = read_record(run_with_ema)["held_out"]
    held_out = [row_of[image.numpy().tobytes()] for images, *_ in batches[:2] for image in images]
    assert sorted(held_out) == sorted(held_out_rows)
    assert len(batches) == 2 * len(VALIDATED)
    for number, batch in enumerate(batches):
        assert all(torch.equal(*tensors) for tensors in zip(batch, batches[number % 2], strict=True))


def test_neither_validation_nor_trackers_change_a_bit_of_the_training(run_with_ema, train, small):
    """The same rows are held out; no images, other intervals and no trackers."""
    flags = {"validation_prompts": None, "validation_steps": None, "validation_epochs": 50}
    other = train(train_data_dir=small, **WITH_EMA | flags | {"report_to": "none", "record": False}).ok()
    # Before the first step, after the first epoch and at the end.
    assert list(other.losses("val_loss")) == [0, 2, 7] and not (other.folder / "samples").exists()
    for place in ((2, "prior"), (6, "prior"), (6, "prior_ema"), ()):
        assert same_weights(other.prior(*place), run_with_ema.prior(*place)), place
    for column in ("train_loss", "grad_norm", "lr", "epoch"):
        assert other.losses(column) == run_with_ema.losses(column)


@pytest.mark.parametrize("value", [NUM_ROWS, 0.99, 1.5])
def test_a_validation_split_of_all_rows_or_of_a_fraction_of_a_row_is_refused(value):
    with pytest.raises(SystemExit, match=rf"--validation_split={value}: there are {NUM_ROWS} rows"):
        script.split_held_out(NUM_ROWS, value, seed=0)


# ---------------------------------------------------------------------------------- the images of the prompts


def test_images_are_those_of_the_averaged_weights_from_the_same_noise(run_with_ema, models):
    images = {key: image.astype(int) for key, image in run_with_ema.samples().items()}
    assert list(images) == [(step, prompt) for step in VALIDATED for prompt in range(3)]
    assert len({image.tobytes() for image in images.values()}) == len(images)
    folders = {0: models / "prior", 6: run_with_ema.folder / "checkpoint-6"}
    for step, name in ((0, "prior"), (6, "prior_ema")):
        right = generate(models, folders[step] / name, PROMPTS)
        wrong = generate(models, run_with_ema.folder / "checkpoint-6" / "prior", PROMPTS)
        for prompt in range(3):
            # Another attention kernel: with some versions a few values are rounded differently.
            difference = np.abs(images[step, prompt] - right[prompt])
            assert difference.max() <= 1
            others = np.count_nonzero(images[step, prompt] != wrong[prompt])
            assert 20 * np.count_nonzero(difference) < others


def test_training_has_dropout_also_after_a_validation(run_with_ema, models):
    places = {0: models / "prior" / "prior"}  # the weights of the steps after a validation
    places |= {step: run_with_ema.folder / f"checkpoint-{step}" / "prior" for step in (2, 4, 6)}
    for step, folder in places.items():
        prior, inputs = wuerstchen.WuerstchenPrior.from_pretrained(folder), run_with_ema.record["steps"][step]
        with torch.no_grad():
            without = prior.eval()(inputs["noisy"], inputs["given"], inputs["prompt_embeds"])
        assert distance({"": inputs["pred"]}, {"": without}) > 1e-3


def test_ranks_share_the_prompts_and_no_memory_for_an_image_is_a_warning(
    ranks, train_ranks, run_with_ema, small
):
    """On one rank of two: training continues, ends in the same bits, and the next images are generated. One
    prompt is enough for two ranks."""
    images, alone = ranks[0].samples(), run_with_ema.samples()
    assert list(images) == [(step, prompt) for step in (0, 4) for prompt in range(3)]
    assert equal_images(*({key: i for key, i in found.items() if not key[0]} for found in (images, alone)))
    counts = [read_record(ranks[0], rank)["num_images"] for rank in (0, 1)]
    assert counts == [6, 2], "in three validations, one of which failed"
    warnings = [re.findall("WARNING .*out of memory.*", run.output) for run in ranks]
    assert [len(lines) for lines in warnings] == [0, 1] and "validation images" in warnings[1][0]
    assert not any("Traceback" in run.output for run in ranks)

    flags = RANKS | {"validation_prompts": PROMPTS[2]}
    others = train_ranks(train_data_dir=small, **flags)
    assert [run.returncode for run in others] == [0, 0], others
    images = others[0].samples()
    assert list(images) == [(0, 0), (2, 0), (4, 0)] and np.array_equal(images[0, 0], alone[0, 2])
    assert all(same_weights(ranks[0].prior(step), others[0].prior(step)) for step in (2, 4, None))
    for column in ("train_loss", "val_loss"):
        assert ranks[0].losses(column) == others[0].losses(column)


@pytest.mark.parametrize("fails", [False, True], ids=["", "out of memory"])
def test_the_decoder_leaves_the_gpu_while_it_is_not_used(models, fails):
    accelerator = MagicMock(device=SimpleNamespace(type="cuda"), split_between_processes=nullcontext)
    args = SimpleNamespace(resolution=64, validation_prompts=PROMPTS, validation_size=None, seed=0)
    prior = wuerstchen.WuerstchenPrior.from_pretrained(models / "prior" / "prior").eval()
    embeds = dict.fromkeys(["", *PROMPTS], torch.zeros(1, 77, 32))
    decoder = MagicMock(side_effect=torch.OutOfMemoryError("CUDA out of memory") if fails else None)
    decoder.decoder.config = SimpleNamespace(patch_size=2, c_hidden=[8, 8, 16, 16])
    decoder.config.latent_dim_scale = 10.67
    inputs = (prior, decoder, script.DDPMWuerstchenScheduler(), embeds)
    for _ in range(2):
        assert len(script.generate_images(accelerator, args, *inputs)) == (0 if fails else 3)
    calls = [name for name, *_ in decoder.mock_calls if name in ("", "to")]  # "" is to generate an image
    assert calls == ["to", *[""] * (1 if fails else 3), "to"] * 2
    assert decoder.to.call_args_list == [call(accelerator.device), call("cpu")] * 2


# -------------------------------------------------------------------------------------------------- sizes


SIZES = {"": (128, 128), "-128x256": (128, 256), "-250x140": (256, 128)}  # the last one becomes the nearest


def test_each_prompt_is_generated_at_each_size(train, models, small):
    sizes = [128, 256, 250, 140]
    flags = {"max_train_steps": 2, "validation_steps": 2, "validation_prompts": PROMPTS[:2]}
    run = train(train_data_dir=small, validation_size=sizes, **flags).ok()
    names = [f"step-{s:07d}-prompt-{p}{size}.png" for s in (0, 2) for p in (0, 1) for size in SIZES]
    samples = run.folder / "samples"
    assert sorted(file.name for file in samples.iterdir()) == sorted([*names, "contact-sheet.png"])
    for suffix, size in SIZES.items():
        expected = generate(models, run.folder / "prior_pipeline" / "prior", PROMPTS[:2], *size)
        for index, prompt in enumerate(PROMPTS[:2]):
            with Image.open(samples / f"step-0000002-prompt-{index}{suffix}.png") as image:
                assert image.size == size and image.info["prompt"] == prompt
                assert np.abs(np.asarray(image) - expected[index]).max() <= 1


def test_images_have_a_size_near_what_the_latents_stand_for_that_the_decoder_can_generate(models):
    """With the published decoder's sizes, without weights. The guide's sizes are possible."""
    with torch.device("meta"):
        sizes = {"patch_size": 2, "c_hidden": [320, 640, 1280, 1280], "blocks": [1, 1, 1, 1]}
        decoder = wuerstchen.WuerstchenDiffNeXt(**sizes)
    components = wuerstchen.WuerstchenDecoderPipeline.from_pretrained(models / "decoder").components
    pipeline = wuerstchen.WuerstchenDecoderPipeline(**components | {"decoder": decoder})
    for resolution, size in ((768, 1024), (512, 640), (1536 * 32 / 42.67, 1536)):
        assert script.decoder_image_size(pipeline, resolution) == size
    for resolution in range(32, 1600, 32):
        size = script.decoder_image_size(pipeline, resolution)
        side = math.ceil(size / 42.67)  # of the latents, as in the prior's pipeline
        decoder_side = int(side * 10.67)  # of the decoder's latents, as in its pipeline
        assert decoder_side % 16 == 0, "patches of 2 are halved three times"
        assert decoder_side > 0 and size % 128 == 0
        assert abs(side - resolution / 32) <= 2.5, "three latents are 128 pixels"


# ------------------------------------------------------------------------------------ when validation happens


def list_due_steps(num_steps, num_rows, samples_per_step, **flags):
    """The steps up to `num_steps` after which the script validates."""
    args = script.parse_args(["--train_data_dir=images", *(f"--{n}={v}" for n, v in flags.items())])
    due = [script.is_validation_due(s, args, samples_per_step, num_rows) for s in range(num_steps + 1)]
    return np.flatnonzero(due).tolist()


@pytest.mark.parametrize("interval", [1, 4, 7])
def test_validation_is_due_before_the_first_step_and_every_so_many_steps(interval):
    """Whatever the epochs are."""
    due = list_due_steps(20, 5, 2, validation_steps=interval, validation_epochs=1)
    assert due == list(range(0, 21, interval))


@pytest.mark.parametrize("epochs", [1, 2, 5])
@pytest.mark.parametrize("num_rows, batch_size", [(8, 4), (8, 3), (7, 7), (3, 8), (5, 1)])
def test_validation_is_due_after_the_first_epoch_and_every_so_many_from_there(epochs, num_rows, batch_size):
    """An epoch ends with the step that contains its last row. A step may end several epochs."""
    ends = [math.ceil((epoch + 1) * num_rows / batch_size) for epoch in range(0, 100, epochs)]
    due = list_due_steps(30, num_rows, batch_size, validation_epochs=epochs)
    assert due == [0, *sorted({step for step in ends if step <= 30})]
