# SPDX-License-Identifier: Apache-2.0
"""Edits that the README and the script's docstring invite, made in a copy of the script, which is
then run. The README's diffs are applied as they are printed there."""

import ast
import functools
import importlib.util
import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import SCRIPT, STEPS_OF_IMAGES, load_weights, resumed, same_weights, script
from diffusers import AutoPipelineForText2Image
from peft import LoraConfig
from safetensors.torch import load_file
from tiny_models import make_tokenizer

README = SCRIPT.with_name("README.md").read_text(encoding="utf-8")
DIFFS = re.findall(r"```diff\n(.*?)```", README, re.DOTALL)
ADAPTER = "pytorch_lora_weights.safetensors"
PROJECTION = re.compile(r"blocks\.(2|5)\.attention\.(to_q|to_k|to_v|to_out\.0)\.weight")
FLAGS = {"max_train_steps": 4, "checkpointing_steps": 2, "train_batch_size": 2, "learning_rate": 1e-3}
FLAGS |= {"validation_split": 8, "validation_steps": 2, "resolution": 96}  # for images of 128 pixels

ATTENTION = """    prior.requires_grad_(False)
    for block in prior.blocks:
        block.requires_grad_(isinstance(block, wuerstchen.modeling_wuerstchen_prior.AttnBlock))
    return prior
"""
PREFIX_FLAG = '    group.add_argument("--caption_prefix", default="")\n    args = parser.parse_args(argv)\n'
EDITS = {  # pairs of what is replaced by what, or what one of the README's diffs adds
    "none": [],
    "loss": "F.huber_loss(",
    "LoRA": "add_adapter(",
    "jitter": [("augmentations = []", "augmentations = [transforms.ColorJitter(0.1, 0.1, 0.1)]")],
    "attention only": [("    return prior\n", ATTENTION)],
    "prefix": [
        ("    args = parser.parse_args(argv)\n", PREFIX_FLAG),
        ("\n    return captions\n", "\n    return [args.caption_prefix + caption for caption in captions]\n"),
    ],
}


def find_diff(text):
    """The README's diff that adds a text."""
    (diff,) = (diff for diff in DIFFS if re.search(rf"^\+.*{re.escape(text)}", diff, re.MULTILINE))
    return diff


def insert(source, function, line):
    """The source with a line before the first statement of a function."""
    (node,) = (node for node in ast.parse(source).body if getattr(node, "name", None) == function)
    lines = source.splitlines(keepends=True)
    lines.insert(node.body[1].lineno - 1, f"    {line}\n")  # after the docstring
    return "".join(lines)


def import_edited(folder):
    """In a run's process: puts the edited script in place of the other one."""
    spec = importlib.util.spec_from_file_location(script.__name__, folder / SCRIPT.name)
    sys.modules[script.__name__] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[script.__name__])


@pytest.fixture(scope="module")
def edit(tmp_path_factory):
    """edit(name), of EDITS, or edit(function, line): for `train(patch=...)`, an edited copy of the script."""

    @functools.cache
    def edit(name, line=None):
        folder, source = tmp_path_factory.mktemp("edited"), SCRIPT.read_text(encoding="utf-8")
        shutil.copy(SCRIPT.with_name("modeling_efficient_net_encoder.py"), folder)
        for before, after in EDITS[name] if isinstance(EDITS.get(name), list) else []:
            assert source.count(before) == 1, before
            source = source.replace(before, after)
        source = insert(source, name, line) if line else source
        (folder / SCRIPT.name).write_text(source, encoding="utf-8")
        if isinstance(EDITS.get(name), str):
            (folder / "edit.diff").write_text(find_diff(EDITS[name]), encoding="utf-8")
            env = os.environ | {"GIT_CEILING_DIRECTORIES": str(folder.parent)}
            subprocess.run(["git", "apply", "edit.diff"], cwd=folder, check=True, env=env)
        return functools.partial(import_edited, folder)

    return edit


@pytest.fixture(scope="module")
def train_edited(train, edit):
    """train_edited(name, **flags): the finished Run of the script with one of EDITS."""

    def train_edited(name, **flags):
        run = train(patch=edit(name), **FLAGS | flags)
        assert run.returncode == 0, run
        return run

    return train_edited


# ------------------------------------------------------------------------------ edits that train another way


@pytest.mark.slow
@pytest.mark.parametrize("name", ["LoRA", "loss", "jitter", "attention only"])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_an_edited_script_resumes_to_the_same_weights(train, train_edited, edit, tmp_path, name, num_workers):
    run = train_edited(name)
    flags = FLAGS | {"patch": edit(name), "dataloader_num_workers": num_workers}
    again = resumed(train, run, 2, tmp_path, **flags)
    assert same_weights(again.prior(), run.prior())
    if name == "LoRA":
        adapters = [load_file(r.folder / "prior_pipeline" / "prior" / ADAPTER) for r in (again, run)]
        assert same_weights(*adapters)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["loss", "LoRA", "attention only"])
@pytest.mark.parametrize("flag", ["gradient_checkpointing", "cache_latents"])
def test_an_edited_script_trains_alike_with_checkpointing_and_from_a_cache(
    train_edited, tmp_path, name, flag
):
    losses = train_edited(name, **{flag: True}, cache_dir=tmp_path / "cache").losses()
    assert losses == pytest.approx(train_edited(name).losses(), rel=1e-4)


@pytest.mark.slow
def test_the_loss_changes_for_training_and_held_out_rows(train_edited):
    """Half the squared error below 1, linear above: at most half the MSE."""
    huber, plain = train_edited("loss"), train_edited("none")
    for column, step in (("train_loss", 1), ("val_loss", 0)):
        assert 0 < huber.losses(column)[step] <= 0.5 * plain.losses(column)[step]


@pytest.mark.slow
def test_the_jitter_changes_training_alone_and_is_not_frozen_into_a_cache(train, train_edited, edit):
    jittered, plain = train_edited("jitter"), train_edited("none")
    assert jittered.losses()[1] != plain.losses()[1]
    assert jittered.losses("val_loss")[0] == plain.losses("val_loss")[0]
    run = train(patch=edit("jitter"), **FLAGS, cache_latents=True)
    assert run.returncode == 2 and "error: --cache_latents" in run.output, run
    assert "make_augmentations" in run.output


def test_only_attention_is_trained(train_edited, models):
    before, after = load_weights(models / "prior" / "prior"), train_edited("attention only").prior()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    # The tiny prior's blocks are, in turn, a residual, a timestep and an attention block.
    assert changed == {name for name in before if re.match(r"blocks\.(2|5)\.", name)}


# ------------------------------------------------------------------------------------------------------- LoRA


def test_the_result_is_the_pretrained_prior_with_the_adapter_merged(train_edited, models):
    """The attention's projections plus B @ A (alpha / r is 1), and every other weight as it was."""
    run = train_edited("LoRA")
    before, after = load_weights(models / "prior" / "prior"), run.prior()
    adapter = load_file(run.folder / "prior_pipeline" / "prior" / ADAPTER)
    assert before.keys() == after.keys()
    merged = {name for name in before if PROJECTION.fullmatch(name)}
    assert {name.split(".lora_")[0] + ".weight" for name in adapter} == merged and len(adapter) == 16
    for name in before:
        expected, layer = before[name], name.removesuffix(".weight")
        if name in merged:
            change = adapter[f"{layer}.lora_B.weight"] @ adapter[f"{layer}.lora_A.weight"]
            assert change.abs().max() > 1e-5, "the adapter has learned"
            torch.testing.assert_close(after[name], expected + change)
        else:
            assert torch.equal(after[name], expected), name


def test_the_result_generates_what_the_adapter_generated_in_validation(train_edited, models):
    flags = {"validation_prompts": ["red apple"], "learning_rate": 0.03}
    run = train_edited("LoRA", **flags)
    pipeline = AutoPipelineForText2Image.from_pretrained(run.folder)
    generator = torch.Generator().manual_seed(0)
    arguments = dict(zip(("prior_timesteps", "num_inference_steps"), STEPS_OF_IMAGES, strict=True))
    arguments["prior_guidance_scale"] = 4.0
    image = pipeline("red apple", width=128, height=128, generator=generator, **arguments).images[0]
    first, last = (run.samples()[step, 0].astype(float) for step in (0, 4))
    errors = [np.abs(np.asarray(image) - sample).mean() for sample in (first, last)]
    assert errors[1] < 0.05 * errors[0], errors


def test_lora_is_at_most_15_lines_and_its_adapter_as_small_as_the_readme_says():
    diff = find_diff("add_adapter(")
    assert len(re.findall(r"^\+(?!\+\+)", diff, re.MULTILINE)) <= 15
    rank = int(re.search(r"LoraConfig\(r=(\d+)", diff)[1])
    with torch.device("meta"):
        prior = script.wuerstchen.WuerstchenPrior(c=1536, c_cond=1280, depth=32, nhead=24)  # as published
        prior.add_adapter(LoraConfig(r=rank, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
    size = sum(4 * weight.numel() for name, weight in prior.named_parameters() if "lora_" in name)
    assert size < 50e6 and f"{size / 1e6:.0f} MB" in " ".join(README.split())


# ------------------------------------------------------------------------------------------ mistakes in edits

ROWS_SKIPPED = {"skip_bad_rows": True}
TYPOS = [("make_optimizer", {}), ("load_folder", {}), ("load_image", {}), ("list_captions", ROWS_SKIPPED)]
TYPOS += [("load_image", ROWS_SKIPPED | {"dataloader_num_workers": 1})]
SLOW = [("make_lr_scheduler", {}), ("load_prior", {}), ("save_prior", {})]
SLOW += [("load_image", ROWS_SKIPPED | {"cache_latents": True})]
TYPOS += [pytest.param(*typo, marks=pytest.mark.slow) for typo in SLOW]


@pytest.mark.parametrize(("function", "flags"), TYPOS)
def test_a_typo_shows_its_traceback_and_ends_the_run(train, edit, tmp_path, function, flags):
    run = train(patch=edit(function, "lion = Lion"), timeout=60, **FLAGS | flags, cache_dir=tmp_path)
    assert run.returncode == 1, run
    assert "Traceback (most recent call last)" in run.output and f"in {function}" in run.output, run
    assert "NameError: name 'Lion' is not defined" in run.output.strip().splitlines()[-1], run


@pytest.mark.slow
def test_a_typo_in_the_logging_of_images_is_one_warning_with_its_traceback(train, edit):
    patch = edit("log_images_to_tracker", "tracker.name.uper()")
    run = train(patch=patch, **FLAGS, validation_prompts=["an owl"])
    assert run.returncode == 0, run
    assert run.output.count("Traceback") == 1 and "in log_images_to_tracker" in run.output, run
    assert "AttributeError: 'str' object has no attribute 'uper'" in run.output, run
    assert sorted(run.samples()) == [(0, 0), (2, 0), (4, 0)]


@pytest.mark.slow
def test_a_caption_prefix_by_a_new_flag_is_trained_on_also_from_a_cache(train_edited, tmp_path):
    """The second prefix finds the cache of the first."""
    for prefix in ("emoji : ", "a drawing of a "):
        flags = {"record": True, "caption_prefix": prefix}
        plain = train_edited("prefix", **flags)
        cached = train_edited("prefix", **flags, cache_latents=True, cache_dir=tmp_path)
        texts = make_tokenizer().batch_decode(plain.all("ids"), skip_special_tokens=True)
        assert len(texts) == 8 and all(text.startswith(prefix) for text in texts), texts
        torch.testing.assert_close(cached.all("prompt_embeds"), plain.all("prompt_embeds"))
