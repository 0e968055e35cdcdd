# SPDX-License-Identifier: Apache-2.0
"""Run this after an edit of the script: the real command, its checkpoint resumed, its result loaded and used.

    pytest tests/test_smoke.py

It takes under a minute on two cores. That the numbers are right is tested by the other files.
"""

import numpy as np
import torch
from conftest import load_weights, resumed, same_weights, script
from diffusers import AutoPipelineForText2Image

FLAGS = {
    "max_train_steps": 6,
    "checkpointing_steps": 3,
    "gradient_accumulation_steps": 2,
    "train_batch_size": 2,
    "resolution": 96,  # 3 x 3 latents, for which the tiny decoder generates 128 pixels
    "learning_rate": 1e-3,
    "use_ema": True,
    "validation_split": 8,
    "validation_steps": 3,
    "validation_prompts": ["red apple", "new moon"],
    "dataloader_num_workers": 1,
}


def test_the_command_trains_resumes_and_generates(models, tmp_path, train, train_fresh):
    run = train_fresh(**FLAGS)
    assert run.returncode == 0, run

    # What a run leaves in its folder, and a loss for every step.
    results = {"prior_pipeline", "model_index.json", "README.md", "loss.png", "loss.jsonl"}
    assert {path.name for path in run.folder.iterdir()} >= {"checkpoint-3", *results}
    assert (run.folder / "samples" / "contact-sheet.png").exists()
    assert list(run.losses()) == [1, 2, 3, 4, 5, 6]
    assert list(run.losses("val_loss")) == [0, 3, 6]
    assert np.isfinite([*run.losses().values(), *run.losses("val_loss").values()]).all()

    # The weights have changed, and a resumed run ends with the same ones.
    before, after = load_weights(models / "prior" / "prior"), run.prior()
    assert not any(torch.equal(before[name], after[name]) for name in before)
    assert same_weights(resumed(train, run, 3, tmp_path, **FLAGS).prior(), after)

    # The result loads as the guide's snippet does, and generates the image that validation did.
    pipeline = AutoPipelineForText2Image.from_pretrained(run.folder)
    generator = torch.Generator().manual_seed(0)
    arguments = {"prior_timesteps": script.wuerstchen.DEFAULT_STAGE_C_TIMESTEPS, "prior_guidance_scale": 4.0}
    image = pipeline("red apple", width=128, height=128, generator=generator, **arguments).images[0]
    assert image.size == (128, 128)
    assert np.asarray(image).std() > 1, "the image is of one color"
