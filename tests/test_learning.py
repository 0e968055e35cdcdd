# SPDX-License-Identifier: Apache-2.0
"""Training learns: a prior memorizes captioned images through the real command."""

import pytest
from learning import load_pipeline, load_rows, make_flags, make_models, recall

# Fewer images than in learning.py need fewer steps. test_demo.py learns with AdamW.
QUICK = {"train_batch_size": 8, "max_train_steps": 400, "learning_rate": 3e-3, "lr_warmup_steps": 50}
QUICK |= {"optimizer": "adafactor", "caption_dropout": 0.1, "max_train_samples": 8}


def has_learned(found):
    """Chance is 1 in 8, an error of about 1.2."""
    return found["top1"] >= 0.9 and found["error"] < 0.4


@pytest.mark.slow
def test_captioned_images_are_memorized(images, train, tmp_path):
    """Also with guidance, which needs the caption dropout: without it the error was more than 2."""
    make_models(tmp_path)
    argv = make_flags(tmp_path, tmp_path / "run", train_data_dir=images, **QUICK)
    run = train(argv=argv, output_dir=tmp_path / "run", timeout=600).ok()
    pipeline, (captions, latents) = load_pipeline(run.folder), load_rows(argv)
    plain, guided = (recall(pipeline, captions, latents, scale) for scale in (1.0, 4.0))
    assert has_learned(plain) and guided["error"] < 1, (plain, guided)
    other_captions = captions[1:] + captions[:1]
    assert not has_learned(recall(pipeline, other_captions, latents)), "the test can fail"
