# SPDX-License-Identifier: Apache-2.0
"""Training learns, and each part of it matters: with one of them wrong, the images are not learned."""

import functools
import json

import pytest
from conftest import script
from learning import encode_images, load_pipeline, load_rows, make_flags, make_models, recall
from PIL import Image

NUM_IMAGES = 16


@pytest.fixture(scope="module")
def untrained(tmp_path_factory):
    """A folder of models with random weights."""
    folder = tmp_path_factory.mktemp("learning")
    make_models(folder)
    return folder


@pytest.fixture
def learn(untrained, images, train, tmp_path):
    """learn(guidance_scale=1.0, fault=None, **flags): recall and error of the pipeline that a run of the
    command has saved. `fault` patches the script for the run."""

    def learn(guidance_scale=1.0, fault=None, **flags):
        settings = {"train_data_dir": images, "max_train_samples": NUM_IMAGES} | flags
        argv = make_flags(untrained, tmp_path / "run", **settings)
        _, captions, latents = load_rows(argv)  # what should be learned, by the script as it is
        run = train(patch=fault, argv=argv, output_dir=tmp_path / "run", timeout=600)
        assert run.returncode == 0, run
        return recall(load_pipeline(run.folder), captions, latents, guidance_scale)

    return learn


def has_learned(found):
    """Chance is 1 in 16, an error of about 1.2. Three seeds gave recalls of 1, errors of 0.17 to 0.21."""
    return found["top1"] >= 0.9 and found["error"] < 0.4


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["adamw", "adafactor"])
def test_captioned_images_are_memorized(learn, optimizer):
    found = learn(optimizer=optimizer)
    assert has_learned(found), found


# -------------------------------------------------------------------------------------------- of all shapes


def write_panoramas(images, folder):
    """16 images, half of them 2:1 and half 1:2, whose central square is white: what the caption names is at
    the left or at the top end. Returns their captions and files."""
    folder.mkdir()
    rows = [json.loads(line) for line in (images / "metadata.jsonl").read_text().splitlines()[:16]]
    for index, row in enumerate(rows):
        with Image.open(images / row["file_name"]) as image:
            emoji = image.convert("RGB").resize((32, 64))
        panorama = Image.new("RGB", (128, 64), "white")
        panorama.paste(emoji, (0, 0))
        panorama = panorama if index % 2 else panorama.transpose(Image.Transpose.ROTATE_90)
        row["file_name"] = f"{index}.png"
        panorama.save(folder / row["file_name"])
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [(row["text"], folder / row["file_name"]) for row in rows]


@pytest.mark.slow
@pytest.mark.parametrize("buckets", [False, True], ids=["squares", "buckets"])
def test_content_outside_the_central_square_is_learned_with_buckets_only(
    buckets, untrained, images, train, tmp_path
):
    rows = write_panoramas(images, tmp_path / "panoramas")
    flags = {"train_data_dir": tmp_path / "panoramas", "resolution": 96, "train_batch_size": 16}
    flags |= {"max_train_steps": 1600, "checkpointing_steps": 1600}
    flags |= {"aspect_ratio_buckets": True} if buckets else {}
    argv = make_flags(untrained, tmp_path / "run", **flags)
    run = train(argv=argv, output_dir=tmp_path / "run", timeout=600)
    assert run.returncode == 0, run
    pipeline = load_pipeline(run.folder)
    for shape, size in ((1, (64, 128)), (0, (128, 64))):
        captions, files = zip(*rows[shape::2], strict=True)
        latents = encode_images([Image.open(file) for file in files], size, script.parse_args(argv))
        found = recall(pipeline, list(captions), latents)
        if buckets:
            assert has_learned(found), found
        else:
            assert found["top1"] < 0.5, found  # chance: 1 in 8


# ---------------------------------------------------------------------------------------- with one part wrong


def other_layer():
    """The second to last layer of the text encoder, as Stable Diffusion 2 takes it."""

    def embed_captions(tokens, text_encoder):
        ids, mask = tokens["text_input_ids"], tokens["text_mask"]
        return text_encoder(ids, attention_mask=mask, output_hidden_states=True).hidden_states[-2]

    script.embed_captions = embed_captions


def reversed_timesteps():
    """The noise is that of t, and the prior receives 1 - t."""
    forward = script.wuerstchen.WuerstchenPrior.forward

    def reversed_forward(self, x, r, c):
        return forward(self, x, 1 - r, c)

    script.wuerstchen.WuerstchenPrior.forward = reversed_forward


def swapped_schedule():
    """Where all should be noise there is none, and the other way round."""
    add_noise = script.DDPMWuerstchenScheduler.add_noise

    def swapped(self, samples, noise, timesteps):
        if samples.dim() == 4:
            samples, noise = noise, samples
        return add_noise(self, samples, noise, timesteps)

    script.DDPMWuerstchenScheduler.add_noise = swapped


def other_captions():
    """Every image has the caption of another."""
    load_train_dataset = script.load_train_dataset

    def rolled(args):
        rows, column = load_train_dataset(args), args.caption_column
        captions = rows[column][:]
        return rows.remove_columns(column).add_column(column, captions[1:] + captions[:1])

    script.load_train_dataset = rolled


# Other parts are compared with formulas, in test_diffusion.py.
half_the_scale = functools.partial(setattr, script, "LATENT_MEAN", 84.0)
FAULTS = {"captions": other_captions, "text layer": other_layer, "scale": half_the_scale}
FAULTS |= {"timesteps": reversed_timesteps, "schedule": swapped_schedule}


@pytest.mark.slow
@pytest.mark.parametrize("part", FAULTS)
def test_images_are_not_learned_with_one_part_wrong(learn, tmp_path, part):
    """Faults that were tried and are not noticed here, since training and generation then follow almost the
    same rules: leaving out the + 1, s = 0.08 in the schedule, alpha in place of its root, bf16 timesteps."""
    found = learn(fault=FAULTS[part], cache_dir=tmp_path / "cache")
    assert not has_learned(found), found


@pytest.mark.slow
def test_caption_dropout_keeps_guidance_stable(learn):
    """Without it the empty caption has no meaning, and guidance moves the latents far off."""
    without, with_dropout = (
        learn(4.0, caption_dropout=dropout, overwrite_output_dir=True)["error"] for dropout in (0.0, 0.1)
    )
    assert with_dropout < 1 < 2 < without, (with_dropout, without)
