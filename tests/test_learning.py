# SPDX-License-Identifier: Apache-2.0
"""Training learns, and each part of it matters: with one of them wrong, the images are not learned."""

import pytest
from conftest import script
from learning import load_pipeline, load_rows, make_flags, make_models, recall

pytestmark = pytest.mark.slow
NUM_IMAGES = 8
# Fewer images than in learning.py need fewer steps. test_demo.py learns with AdamW.
QUICK = {"train_batch_size": 8, "max_train_steps": 400, "learning_rate": 3e-3, "lr_warmup_steps": 50}
QUICK |= {"optimizer": "adafactor", "caption_dropout": 0.1}


@pytest.fixture(scope="module")
def untrained(tmp_path_factory):
    """A folder of models with random weights."""
    folder = tmp_path_factory.mktemp("learning")
    make_models(folder)
    return folder


@pytest.fixture
def learn(untrained, images, train, tmp_path):
    """learn(*guidance_scales, fault=None, **flags): for each scale, recall and error of the pipeline that a
    run of the command has saved. `fault` patches the script for the run."""

    def learn(*guidance_scales, fault=None, **flags):
        settings = QUICK | {"train_data_dir": images, "max_train_samples": NUM_IMAGES} | flags
        argv = make_flags(untrained, tmp_path / "run", **settings)
        captions, latents = load_rows(argv)  # what should be learned, by the script as it is
        run = train(patch=fault, argv=argv, output_dir=tmp_path / "run", timeout=600).ok()
        return [recall(load_pipeline(run.folder), captions, latents, scale) for scale in guidance_scales]

    return learn


def has_learned(found):
    """Chance is 1 in 8, an error of about 1.2."""
    return found["top1"] >= 0.9 and found["error"] < 0.4


def test_captioned_images_are_memorized(learn):
    """Also with guidance, which needs the caption dropout: without it the error was more than 2."""
    plain, guided = learn(1.0, 4.0)
    assert has_learned(plain) and guided["error"] < 1, (plain, guided)


def other_captions():
    """Every image has the caption of another."""
    load_train_dataset = script.load_train_dataset

    def rolled(args):
        rows, column = load_train_dataset(args), args.caption_column
        captions = rows[column][:]
        return rows.remove_columns(column).add_column(column, captions[1:] + captions[:1])

    script.load_train_dataset = rolled


def swapped_schedule():
    """Where all should be noise there is none, and the other way round."""
    add_noise = script.DDPMWuerstchenScheduler.add_noise

    def swapped(self, samples, noise, timesteps):
        if samples.dim() == 4:
            samples, noise = noise, samples
        return add_noise(self, samples, noise, timesteps)

    script.DDPMWuerstchenScheduler.add_noise = swapped


@pytest.mark.parametrize("fault", [other_captions, swapped_schedule])
def test_images_are_not_learned_with_one_part_wrong(learn, tmp_path, fault):
    """Other parts are compared with formulas, in test_diffusion.py. Faults that were tried and are not seen,
    since training and generation then follow almost the same rules: leaving out the + 1, s = 0.08 in the
    schedule, alpha in place of its root, bf16 timesteps."""
    (found,) = learn(1.0, fault=fault, cache_dir=tmp_path / "cache")
    assert not has_learned(found), found
