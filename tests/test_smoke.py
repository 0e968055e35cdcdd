# SPDX-License-Identifier: Apache-2.0
"""Run this after an edit of the script: the real command, its checkpoint resumed, its result loaded and used.

    pytest tests/test_smoke.py

It takes under a minute on two cores. That the numbers are right is tested by the other files.
"""

import json
import shutil

import numpy as np
import torch
from conftest import script, tiny_args
from diffusers import AutoPipelineForText2Image
from safetensors.torch import load_file

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
    "report_to": "tensorboard",
}


def load_prior_weights(output_dir):
    return load_file(output_dir / "prior_pipeline" / "prior" / "diffusion_pytorch_model.safetensors")


def test_the_command_trains_resumes_and_generates(models, pictures, tmp_path, run_script, run_main):
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    finished = run_script(tiny_args(models, pictures, whole, **FLAGS))
    assert finished.returncode == 0, finished.stderr

    # What a run leaves in its folder, and a loss for every step.
    names = {path.name for path in whole.iterdir()}
    assert names >= {
        "checkpoint-3",
        "prior_pipeline",
        "model_index.json",
        "README.md",
        "loss.png",
        "loss.jsonl",
    }
    assert (whole / "samples" / "contact-sheet.png").exists()
    rows = [json.loads(line) for line in (whole / "loss.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "train_loss" in row] == [1, 2, 3, 4, 5, 6]
    assert [row["step"] for row in rows if "val_loss" in row] == [0, 3, 6]
    assert all(np.isfinite([row.get("train_loss", 0), row.get("val_loss", 0)]).all() for row in rows)

    # The weights have changed, and a resumed run ends with the same ones.
    shutil.copytree(whole / "checkpoint-3", resumed / "checkpoint-3")
    finished = run_main(tiny_args(models, pictures, resumed, **FLAGS, resume_from_checkpoint="latest"))
    assert finished.returncode == 0, finished
    before = load_file(models / "prior" / "prior" / "diffusion_pytorch_model.safetensors")
    after, again = load_prior_weights(whole), load_prior_weights(resumed)
    assert not any(torch.equal(before[name], after[name]) for name in before)
    assert all(torch.equal(after[name], again[name]) for name in after)

    # The result loads as the guide's snippet does, and generates the image that validation did.
    pipeline = AutoPipelineForText2Image.from_pretrained(whole)
    generator = torch.Generator().manual_seed(0)
    arguments = {"prior_timesteps": script.wuerstchen.DEFAULT_STAGE_C_TIMESTEPS, "prior_guidance_scale": 4.0}
    image = pipeline("red apple", width=128, height=128, generator=generator, **arguments).images[0]
    assert image.size == (128, 128)
    assert np.asarray(image).std() > 1, "the image is of one color"
