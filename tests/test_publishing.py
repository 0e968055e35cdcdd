# SPDX-License-Identifier: Apache-2.0
"""The result of a run: the folder it leaves, the model card, and the upload to the Hub.

The Hub is the server in hub_server.py. The client reads its address when it is imported, so each run against
it is a fresh process; many tests look at the same run.
"""

import hashlib
import inspect
import json
import os
import re
import shlex
import shutil
import struct
import subprocess
import sys
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from conftest import SCRIPT, TESTS, same_weights, tiny_args
from diffusers import AutoPipelineForText2Image, DiffusionPipeline
from hub_server import CUT, HubServer, is_large
from huggingface_hub import ModelCard
from PIL import Image
from safetensors.torch import load, load_file, save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_models import save_published_encoder

import train_text_to_image_prior as script
from modeling_efficient_net_encoder import EfficientNetEncoder

TOKEN = "hf_xKqTbWnVmZsLpRdFgHjY"
READ_TOKEN = "hf_RdNlYpWcJvTgBsQhXmKz"
UNKNOWN_TOKEN = "hf_ZvCpLrWsDkGtMnBhQxFj"
TOKENS = {TOKEN: {"name": "tester", "write": True}, READ_TOKEN: {"name": "tester", "write": False}}
ACCELERATE_LAUNCH = ("-m", "accelerate.commands.launch")


def load_weights(folder):
    """The weights of a diffusers model."""
    return load_file(folder / "diffusion_pytorch_model.safetensors")


def read_folder(folder):
    """path -> bytes of every file."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def is_pretrained_text_encoder(text_encoder, models):
    """Whether it is the pretrained prior's text encoder, in float32."""
    source = script.CLIPTextModel.from_pretrained(models / "prior" / "text_encoder", dtype=torch.float32)
    return {p.dtype for p in text_encoder.parameters()} == {torch.float32} and same_weights(
        dict(text_encoder.named_parameters()), dict(source.named_parameters())
    )


# ---------------------------------------------------------------------------- the settings that are published

SETTINGS = {
    "pretrained_prior_model_name_or_path": "tester/prior",
    "pretrained_decoder_model_name_or_path": "tester/decoder",
    "pretrained_image_encoder_name_or_path": "tester/encoder",
    "cache_dir": "a cache that does not exist",
    "dataset_name": "tester/images",
    "dataset_config_name": "it's $HOME",
    "image_column": "my image",
    "caption_column": "captions",
    "max_train_samples": 8,
    "validation_split": 0.1,
    "resolution": 768,
    "random_crop": True,
    "random_flip": True,
    "skip_bad_rows": True,
    "seed": 0,
    "train_batch_size": 4,
    "gradient_accumulation_steps": 2,
    "num_train_epochs": 3,
    "max_train_steps": 6,
    "gradient_checkpointing": True,
    "mixed_precision": "bf16",
    "allow_tf32": True,
    "use_ema": True,
    "loss_weighting": "p2",
    "timestep_sampling": "stretched",
    "caption_dropout": 0.05,
    "compile": True,
    "learning_rate": 1e-05,
    "lr_scheduler": "piecewise_constant",
    "lr_warmup_steps": 0,
    "lr_step_rules": "1:100,0.1",
    "adam_beta1": 0.8,
    "adam_beta2": 0.99,
    "adam_weight_decay": 0.01,
    "adam_epsilon": 1e-10,
    "max_grad_norm": 0.3333333333333333,
    "output_dir": "out of here",
    "checkpointing_steps": 1,
    "checkpoints_total_limit": 2,
    "validation_prompts": [
        'a "new" moon: it\'s dark',
        "$HOME/* `ls`\n\\t",
        "\N{RED APPLE}",
        "",
        "#1; {2}",
        "-1",
    ],
    "validation_epochs": 1,
    "validation_steps": 2,
    "logging_dir": "my logs",
    "report_to": "wandb",
    "tracker_project_name": "a project",
    "push_to_hub": True,
    "hub_private_repo": True,
}


def parse_flags(**flags):
    words = []
    for name, value in flags.items():
        values = value if isinstance(value, list) else [] if value is True else [str(value)]
        words += [f"--{name}", *values]
    return script.parse_args(words)


@pytest.mark.parametrize("changed", [{}, {"random_crop": None, "random_flip": None, "cache_latents": True}])
def test_public_args_can_be_pasted_back(tmp_path, monkeypatch, changed):
    """They give the same settings, even if folders happen to have the names of some values."""
    monkeypatch.chdir(tmp_path)
    for name in ("wandb", "captions"):  # wandb itself creates the first one
        Path(name).mkdir(parents=True)
    flags = {name: value for name, value in (SETTINGS | changed).items() if value is not None}
    args = parse_flags(**flags)
    assert {name: value for name, value in vars(args).items() if name in flags} == flags
    pasted = script.parse_args(shlex.split(script.public_args(args)))
    assert vars(pasted) == vars(args)


def test_public_args_omit_the_token_local_paths_and_settings_of_this_machine(tmp_path):
    folder = tmp_path / "private name"
    folder.mkdir()
    models = [f"pretrained_{name}_name_or_path" for name in ("prior_model", "decoder_model", "image_encoder")]
    paths = [*models, "cache_dir", "dataset_name", "train_data_dir", "output_dir", "logging_dir"]
    private = dict.fromkeys(paths, folder) | {"hub_token": TOKEN, "resume_from_checkpoint": folder}
    private |= {
        "overwrite_output_dir": True,
        "dataloader_num_workers": 3,
        "local_rank": 0,
        "hub_model_id": "a/b",
    }
    settings = script.public_args(parse_flags(**private, learning_rate=0.5))
    flags = {word.split("=")[0].removeprefix("--") for word in shlex.split(settings)}
    assert "learning_rate" in flags
    assert flags & private.keys() == set()
    assert TOKEN not in settings
    assert "private name" not in settings


# ---------------------------------------------------------------------------------------- the guide's command

PROMPT = "A robot naruto, 4k photo"
# The guide's flags, except for the number of steps and of workers, and for --use_ema.
GUIDE = {
    "mixed_precision": "fp16",
    "dataset_name": "lambdalabs/naruto-blip-captions",
    "resolution": 768,
    "train_batch_size": 4,
    "gradient_accumulation_steps": 4,
    "gradient_checkpointing": True,
    "dataloader_num_workers": 2,
    "max_train_steps": 6,
    "learning_rate": "1e-05",
    "max_grad_norm": 1,
    "checkpoints_total_limit": 3,
    "checkpointing_steps": 1,
    "use_ema": True,
    "lr_scheduler": "constant",
    "lr_warmup_steps": 0,
    "validation_prompts": PROMPT,
    "report_to": "wandb",
    "push_to_hub": True,
    "hub_token": TOKEN,
}
# The guide's code, except for the path, the device and the image size.
SNIPPET = """
import torch
from diffusers import AutoPipelineForText2Image
{imports}

pipeline = AutoPipelineForText2Image.from_pretrained({path!r}, torch_dtype=torch.float32).to("cpu")

caption = "A cute bird naruto holding a shield"
images = pipeline(
    caption,
    width=128,
    height=256,
    prior_timesteps=DEFAULT_STAGE_C_TIMESTEPS,
    prior_guidance_scale=4.0,
    num_images_per_prompt=2,
).images
"""
IMPORTS = {
    "up to 0.37": "from diffusers.pipelines.wuerstchen import DEFAULT_STAGE_C_TIMESTEPS",
    "from 0.38 on": "import diffusers.pipelines.deprecated.wuerstchen as w, diffusers\n"
    "diffusers.pipelines.wuerstchen = w\nDEFAULT_STAGE_C_TIMESTEPS = w.DEFAULT_STAGE_C_TIMESTEPS",
}


@pytest.fixture
def guide(finished_runs, run_script, models, pictures, tmp_path_factory):
    """guide(**flags): the guide's command in a fresh process, against a Hub that has what it loads.

    Returns its `log`, its `output_dir`, the folder `wandb`, and the `hub` as it is afterwards.
    """

    def run(**flags):
        key = f"guide {flags}"
        if key not in finished_runs:
            folder = tmp_path_factory.mktemp("guide")
            output_dir = folder / "wuerstchen-prior-naruto-model"
            for name in ("published", "wandb"):
                (folder / name).mkdir()
            encoder = EfficientNetEncoder.from_pretrained(models / "encoder")
            save_published_encoder(encoder, folder / "published" / "model_v2_stage_b.pt")
            defaults = [f"pretrained_{name}_model_name_or_path" for name in ("prior", "decoder")]
            defaults += ["pretrained_image_encoder_name_or_path", "train_data_dir", "seed"]
            args = tiny_args(models, pictures, output_dir, **dict.fromkeys(defaults) | GUIDE | flags)
            with HubServer(folder / "hub", tokens={TOKEN: {"name": "tester", "write": True}}) as hub:
                hub.add_repo("warp-ai/wuerstchen-prior", models / "prior")
                hub.add_repo("warp-ai/wuerstchen", models / "decoder")
                hub.add_repo("dome272/wuerstchen", folder / "published")
                hub.add_repo("lambdalabs/naruto-blip-captions", pictures, repo_type="dataset")
                env = hub.env() | {"HF_HUB_CACHE": None, "HF_DATASETS_CACHE": None}
                env |= {"WANDB_DIR": str(folder / "wandb"), "ACCELERATE_USE_CPU": "true"}
                done = run_script(args, launcher=ACCELERATE_LAUNCH, **env)
            log = done.stdout + done.stderr
            assert done.returncode == 0, log
            run = SimpleNamespace(log=log, output_dir=output_dir, wandb=folder / "wandb", hub=hub)
            finished_runs[key] = run
        return finished_runs[key]

    return run


@pytest.mark.slow
def test_the_guides_command_keeps_the_newest_checkpoints(guide):
    run = guide(resolution=64)
    checkpoints = sorted(path.name for path in run.output_dir.glob("*checkpoint*"))
    assert checkpoints == ["checkpoint-4", "checkpoint-5", "checkpoint-6"]
    assert re.search(r"WARNING.*fp16.*float32", run.log)


@pytest.mark.slow
def test_the_guides_command_at_768_pixels(guide):
    run = guide(max_train_steps=1)
    image = Image.open(run.output_dir / "samples" / "step-0000001-prompt-0.png")
    assert image.size == (1024, 1024)
    assert image.convert("RGB").getextrema() != ((0, 0),) * 3
    assert "model_index.json" in run.hub.files("tester/wuerstchen-prior-naruto-model")


def read_wandb_file(folder):
    """The payload of wandb's offline file: LevelDB's log format, 7 bytes before each record, blocks of
    32 KiB."""
    # Accelerate 1.10 starts an offline run a second time to add the settings.
    file = max(folder.glob("wandb/offline-run-*/*.wandb"), key=lambda file: file.parent.name)
    data, at, payload = file.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        (size,) = struct.unpack_from("<H", data, at + 4)
        payload += data[at + 7 : at + 7 + size]
        at += 7 + size
    return payload


@pytest.mark.slow
def test_wandb_gets_the_metrics_and_the_images_with_their_captions(guide):
    run = guide(resolution=64)
    records = read_wandb_file(run.wandb)
    captions = re.findall(rb'captions[^"]{1,8}(\["A robot[^]]*"\])', records)
    assert {json.loads(caption)[0] for caption in captions} == {PROMPT}
    media = run.wandb.glob("wandb/offline-run-*/files/media/images/*.png")
    samples = [*(run.output_dir / "samples").glob("step-*.png")]
    assert len(samples) == 3, (
        "before the first step, after the first epoch, which step 4 ends, and at the end"
    )
    logged, saved = ({np.asarray(Image.open(path)).tobytes() for path in paths} for paths in (media, samples))
    assert logged == saved
    for tag in (b"train_loss", b"lr", b"grad_norm", b"images_per_second"):
        assert tag in records


@pytest.mark.slow
def test_the_guides_command_uploads_what_a_user_needs_and_no_more(guide):
    run = guide(resolution=64)
    files = run.hub.files("tester/wuerstchen-prior-naruto-model")
    folders = {"samples", "prior_pipeline", "decoder", "scheduler", "text_encoder", "tokenizer", "vqgan"}
    folders |= {f"prior_{name}" for name in ("prior", "scheduler", "text_encoder", "tokenizer")}
    assert {name.split("/")[0] for name in files if "/" in name} == folders
    at_root = {name for name in files if "/" not in name}
    assert at_root == {"README.md", "model_index.json", "grid.png", "loss.png"}
    assert "prior_pipeline/prior/diffusion_pytorch_model.safetensors" in files
    unwanted = r"checkpoint|optimizer|random_states|trainer_state|logs"
    assert not [name for name in files if re.search(unwanted, name)]
    for name, content in files.items():
        assert (run.output_dir / name).read_bytes() == content, name
    metadata = ModelCard(files["README.md"].decode()).data.to_dict()
    assert metadata["base_model"] == "warp-ai/wuerstchen-prior"
    assert metadata["datasets"] == ["lambdalabs/naruto-blip-captions"]
    assert metadata["library_name"] == "diffusers"
    assert metadata["pipeline_tag"] == "text-to-image"
    assert ("POST", "/api/validate-yaml") in [request[:2] for request in run.hub.requests]
    assert {token for _, path, token in run.hub.requests if "/commit/" in path} == {f"Bearer {TOKEN}"}


@pytest.mark.slow
def test_the_guides_command_shows_the_token_to_the_hub_only(guide, tmp_path_factory):
    """It is in no byte that is written, printed or uploaded, including the working folder and the caches."""
    run = guide(resolution=64)
    assert TOKEN not in run.log
    folders = [run.output_dir, run.wandb, run.hub.folder, *tmp_path_factory.getbasetemp().glob("cwd*")]
    files = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
    assert b"--hub_token" in read_wandb_file(run.wandb), "wandb records the command line, so this can fail"
    assert [str(path) for path in files if TOKEN.encode() in path.read_bytes()] == []


@pytest.mark.parametrize("tracker", ["tensorboard", "none"])
def test_the_token_is_not_logged(run_main, models, pictures, tmp_path, tracker):
    args = tiny_args(
        models, pictures, tmp_path / "out", hub_token=TOKEN, report_to=tracker, max_train_steps=1
    )
    args[args.index("--hub_token") : args.index("--hub_token") + 2] = [f"--hub_token={TOKEN}"]
    done = run_main(args)
    assert done.returncode == 0, done
    assert TOKEN not in done.output
    assert [name for name, content in read_folder(tmp_path).items() if TOKEN.encode() in content] == []


# --------------------------------------------------------------------------------- the result and its loading


@pytest.mark.slow
def test_the_guides_snippet_generates_with_the_trained_prior(guide, models):
    run = guide(resolution=64)
    names = {}
    line = "up to 0.37" if script.diffusers.__version__ < "0.38" else "from 0.38 on"
    exec(SNIPPET.format(path=str(run.output_dir), imports=IMPORTS[line]), names)
    assert [image.size for image in names["images"]] == [(128, 256)] * 2
    assert not np.array_equal(*map(np.asarray, names["images"]))

    pipeline = names["pipeline"]
    trained = load_weights(run.output_dir / "checkpoint-6" / "prior_ema")
    assert {value.dtype for value in trained.values()} == {torch.float32}
    assert same_weights(dict(pipeline.prior_prior.named_parameters()), trained)
    assert not same_weights(trained, load_weights(models / "prior" / "prior"))
    assert is_pretrained_text_encoder(pipeline.prior_text_encoder, models)
    decoder = load_weights(models / "decoder" / "decoder")
    assert same_weights(dict(pipeline.decoder.named_parameters()), decoder)


@pytest.mark.slow
def test_the_prior_pipeline_loads_by_itself(guide, models):
    run = guide(resolution=64)
    pipeline = DiffusionPipeline.from_pretrained(run.output_dir / "prior_pipeline")
    assert type(pipeline).__name__ == "WuerstchenPriorPipeline"
    trained = load_weights(run.output_dir / "checkpoint-6" / "prior_ema")
    assert same_weights(dict(pipeline.prior.named_parameters()), trained)
    assert is_pretrained_text_encoder(pipeline.text_encoder, models)
    assert (pipeline.config.latent_mean, pipeline.config.latent_std) == (42.0, 1.0)
    embeds = pipeline("a bird", width=128, height=128, output_type="pt").image_embeddings
    assert embeds.shape == (1, 16, 3, 3)
    assert embeds.isfinite().all()


@pytest.mark.slow
def test_saved_indices_name_classes_that_every_version_has(guide):
    run = guide(resolution=64)
    root = json.loads((run.output_dir / "model_index.json").read_text())
    prior = json.loads((run.output_dir / "prior_pipeline" / "model_index.json").read_text())
    assert root["prior_prior"] == prior["prior"] == ["wuerstchen", "WuerstchenPrior"]
    assert root["decoder"] == ["wuerstchen", "WuerstchenDiffNeXt"]
    assert {root["tokenizer"][1], root["prior_tokenizer"][1], prior["tokenizer"][1]} <= {
        "CLIPTokenizer",
        "CLIPTokenizerFast",
    }
    for file in run.output_dir.rglob("tokenizer_config.json"):
        assert json.loads(file.read_text())["tokenizer_class"] in ("CLIPTokenizer", "CLIPTokenizerFast")


@pytest.mark.slow
def test_no_weights_are_on_disk_twice(guide):
    """The files of prior_prior/ and of prior_pipeline/prior/ are the same, under two names."""
    run = guide(resolution=64)
    files = [path for path in run.output_dir.rglob("*.safetensors") if "checkpoint-" not in str(path)]
    inodes = {}
    for file in files:
        inodes.setdefault(hashlib.sha256(file.read_bytes()).digest(), set()).add(file.stat().st_ino)
    assert len(files) == 7
    assert len(inodes) == 5
    assert all(len(of_content) == 1 for of_content in inodes.values())


@pytest.mark.slow
def test_the_smallest_images_have_the_size_that_the_decoder_can_generate(guide):
    """64 pixels are latents of 2 x 2, for which the decoder has no size; 3 x 3 is the nearest one."""
    run = guide(resolution=64)
    assert {Image.open(path).size for path in (run.output_dir / "samples").glob("step-*")} == {(128, 128)}
    pipeline = AutoPipelineForText2Image.from_pretrained(run.output_dir)
    assert script.decoder_image_size(pipeline.decoder_pipe, 64) == 128
    with pytest.raises(RuntimeError):
        pipeline("a bird", width=85, height=85, prior_timesteps=[1.0, 0.0], num_inference_steps=1)


def test_without_a_decoder_the_trained_prior_is_saved(run_main, models, pictures, tmp_path):
    shutil.copytree(models / "decoder", tmp_path / "decoder")
    (tmp_path / "decoder" / "decoder" / "diffusion_pytorch_model.safetensors").unlink()
    args = tiny_args(
        models,
        pictures,
        tmp_path / "out",
        pretrained_decoder_model_name_or_path=tmp_path / "decoder",
        validation_prompts="a red apple",
        max_train_steps=2,
        checkpointing_steps=2,
    )
    done = run_main(args)
    assert done.returncode == 0, done
    assert "Traceback" not in done.output
    assert re.search(r"WARNING.*No validation images at step 2", done.output)
    assert re.search(r"WARNING.*prior_pipeline", done.output)
    pipeline = DiffusionPipeline.from_pretrained(tmp_path / "out" / "prior_pipeline")
    trained = load_weights(tmp_path / "out" / "checkpoint-2" / "prior")
    assert same_weights(dict(pipeline.prior.named_parameters()), trained)
    assert (tmp_path / "out" / "README.md").is_file()


def test_transformers_4_can_load_the_result(run_main, models, pictures, tmp_path):
    """Version 4 expects a prefix of the tensors' names that version 5 omits, and older tokenizer files."""
    shutil.copytree(models / "prior", tmp_path / "prior")
    published = tmp_path / "prior" / "text_encoder" / "model.safetensors"
    weights = {
        f"text_model.{name.removeprefix('text_model.')}": value
        for name, value in load_file(published).items()
    }
    save_file(weights, published, metadata={"format": "pt"})
    flags = {"pretrained_prior_model_name_or_path": tmp_path / "prior", "max_train_steps": 1}
    done = run_main(tiny_args(models, pictures, tmp_path / "out", **flags))
    assert done.returncode == 0, done
    expected = TESTS / "data" / "clip-tokenizer"
    for prefix in ("prior_pipeline/", "prior_"):
        saved = load_file(tmp_path / "out" / f"{prefix}text_encoder" / "model.safetensors")
        assert same_weights(saved, weights)
        tokenizer = tmp_path / "out" / f"{prefix}tokenizer"
        vocab, expected_vocab = (
            json.loads((folder / "vocab.json").read_text()) for folder in (tokenizer, expected)
        )
        assert vocab == expected_vocab
        merges, expected_merges = (
            (folder / "merges.txt").read_text().splitlines()[1:] for folder in (tokenizer, expected)
        )
        assert merges == [line for line in expected_merges if line]


# -------------------------------------------------------------------------------------- versions of diffusers


@pytest.fixture(scope="session")
def newest_diffusers(tmp_path_factory):
    """A folder for PYTHONPATH with the newest diffusers: $NEWEST_DIFFUSERS, or installed from PyPI."""
    if "NEWEST_DIFFUSERS" in os.environ:
        return os.environ["NEWEST_DIFFUSERS"]
    folder = tmp_path_factory.mktemp("newest-diffusers")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", folder, "diffusers"]
    subprocess.run(pip, check=True, capture_output=True)
    return str(folder)


LOAD_AND_GENERATE = """
import json, sys
import numpy as np
for path in {paths!r}:
    names = {{}}
    exec({snippet!r}.replace("PATH", path), names)
    assert [image.size for image in names["images"]] == [(128, 256)] * 2
    assert np.asarray(names["images"][0]).std() > 0
    from diffusers import DiffusionPipeline, __version__
    DiffusionPipeline.from_pretrained(path + "/prior_pipeline")
    weights = names["pipeline"].prior_prior.parameters()
    print("generated with", __version__, float(sum(weight.double().sum() for weight in weights)))
"""


@pytest.fixture
def trained_with_newest(finished_runs, newest_diffusers, run_script, models, pictures, tmp_path_factory):
    """A run with the newest diffusers, and its output_dir."""
    if "newest diffusers" not in finished_runs:
        output_dir = tmp_path_factory.mktemp("newest") / "out"
        args = tiny_args(
            models,
            pictures,
            output_dir,
            use_ema=True,
            validation_prompts="a red apple",
            max_train_steps=2,
            checkpointing_steps=1,
        )
        finished_runs["newest diffusers"] = run_script(args, PYTHONPATH=newest_diffusers), output_dir
    return finished_runs["newest diffusers"]


@pytest.mark.slow
def test_the_newest_diffusers_trains_the_same_weights(
    trained_with_newest, run_main, models, pictures, tmp_path
):
    done, output_dir = trained_with_newest
    assert done.returncode == 0, done.stdout + done.stderr
    flags = {"use_ema": True, "validation_prompts": "a red apple", "max_train_steps": 2}
    here = run_main(tiny_args(models, pictures, tmp_path / "out", checkpointing_steps=1, **flags))
    assert here.returncode == 0, here
    for name in ("prior", "prior_ema"):
        newest, installed = (
            load_weights(folder / "checkpoint-2" / name) for folder in (output_dir, tmp_path / "out")
        )
        assert newest.keys() == installed.keys()
        for key, value in installed.items():
            assert torch.allclose(newest[key], value, rtol=0, atol=1e-6), key
    index = json.loads((output_dir / "model_index.json").read_text())
    assert index["prior_prior"] == ["wuerstchen", "WuerstchenPrior"]
    assert (output_dir / "samples" / "step-0000002-prompt-0.png").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("line", ["up to 0.37", "from 0.38 on"])
def test_each_line_of_diffusers_loads_what_the_other_saves(
    guide, trained_with_newest, newest_diffusers, line
):
    _, by_newest = trained_with_newest
    paths = [str(guide(resolution=64).output_dir), str(by_newest)]
    snippet = SNIPPET.format(path="PATH", imports=IMPORTS[line])
    env = os.environ | ({"PYTHONPATH": newest_diffusers} if line == "from 0.38 on" else {})
    command = [sys.executable, "-c", LOAD_AND_GENERATE.format(paths=paths, snippet=snippet)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    generated = re.findall(r"generated with 0\.(\d+)\.\d+\S* (\S+)", done.stdout)
    assert len(generated) == 2
    assert all((int(minor) >= 38) == (line == "from 0.38 on") for minor, _ in generated)
    for path, (_, total) in zip(paths, generated, strict=True):
        weights = load_weights(Path(path, "prior_pipeline", "prior"))
        expected = sum(value.double().sum().item() for value in weights.values())
        assert float(total) == pytest.approx(expected, abs=1e-6)


# -------------------------------------------------------------------------------------------------- launchers


@pytest.mark.slow
def test_plain_python_uses_one_process(run_script, models, pictures, tmp_path):
    done = run_script(tiny_args(models, pictures, tmp_path / "out", max_train_steps=1))
    assert done.returncode == 0, done.stderr
    assert re.search(r"Training from step 0 to 1 on \S+: .* x 1 processes\), seed \d+\n", done.stderr)
    assert (tmp_path / "out" / "model_index.json").is_file()


@pytest.mark.slow
def test_torchrun_starts_two_ranks_of_which_one_writes(run_script, models, pictures, tmp_path):
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    args = tiny_args(models, pictures, tmp_path / "out", max_train_steps=1, checkpointing_steps=1)
    done = run_script(args, launcher=launcher, ACCELERATE_USE_CPU="true")
    assert done.returncode == 0, done.stderr
    (plan,) = re.findall(r"Training from step 0 to 1 on \S+: (.*)", done.stderr)
    assert "8 samples a step (4 x 1 micro-steps x 2 processes)" in plan
    assert (tmp_path / "out" / "model_index.json").is_file()
    random_states = sorted(path.name for path in (tmp_path / "out" / "checkpoint-1").glob("random_states_*"))
    assert random_states == ["random_states_0.pkl", "random_states_1.pkl"]


CONFIGURE = {
    "accelerate config default": ["-m", "accelerate.commands.accelerate_cli", "config", "default"],
    "write_basic_config": ["-c", "from accelerate.utils import write_basic_config; write_basic_config()"],
}


@pytest.mark.slow
@pytest.mark.parametrize("way", CONFIGURE)
def test_accelerates_default_configurations_work(run_script, models, pictures, tmp_path, way):
    home = {"HOME": str(tmp_path / "home"), "HF_HOME": str(tmp_path / "home" / "hf")}
    (tmp_path / "home").mkdir()
    configure = [sys.executable, *CONFIGURE[way]]
    subprocess.run(configure, env=os.environ | home, check=True, capture_output=True, cwd=tmp_path)
    (config,) = (tmp_path / "home").rglob("default_config.*")
    assert "mixed_precision" in config.read_text()
    args = tiny_args(models, pictures, tmp_path / "out", max_train_steps=1)
    done = run_script(args, launcher=ACCELERATE_LAUNCH, **home)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "default values" not in done.stderr, "the launcher logs this if it finds no configuration"
    assert (tmp_path / "out" / "model_index.json").is_file()


# ------------------------------------------------------------------------------------ the upload, in two runs

PROMPTS = ["a red apple \N{RED APPLE}", 'a "new" moon: it\'s dark']
BASE, DECODER, DATA = "warp-ai/wuerstchen-prior", "warp-ai/wuerstchen", "tester/emoji"
FROM_HUB = {
    "pretrained_prior_model_name_or_path": BASE,
    "pretrained_decoder_model_name_or_path": DECODER,
    "dataset_name": DATA,
    "train_data_dir": None,
}
QUICK = {"max_train_samples": 8, "max_train_steps": 2, "push_to_hub": True}
RETRY_SOON = (
    "import train_text_to_image_prior as script; script.PUSH_RETRY_DELAYS = (0.1, 0.1); script.main()"
)
PIPELINE = {
    "model_index.json",
    "scheduler/scheduler_config.json",
    *(f"text_encoder/{name}" for name in ("config.json", "model.safetensors")),
    *(
        f"tokenizer/{name}"
        for name in ("merges.txt", "tokenizer.json", "tokenizer_config.json", "vocab.json")
    ),
}
MODEL = {"config.json", "diffusion_pytorch_model.safetensors"}
PRIOR_PIPELINE = PIPELINE | {f"prior/{name}" for name in MODEL}
# All that is uploaded, except for the validation images.
EXPECTED_FILES = {
    *PIPELINE,
    *(f"{component}/{name}" for component in ("decoder", "vqgan") for name in MODEL),
    *(f"prior_{name}" for name in PRIOR_PIPELINE - {"model_index.json"}),
    *(f"prior_pipeline/{name}" for name in PRIOR_PIPELINE),
    "README.md",
    "loss.png",
}
if transformers.__version__ < "5":  # it saves a file more with a tokenizer
    tokenizers = ("prior_tokenizer", "tokenizer", "prior_pipeline/tokenizer")
    EXPECTED_FILES |= {f"{name}/special_tokens_map.json" for name in tokenizers}
SAMPLES = ["samples/step-0000002-prompt-0.png", "samples/step-0000002-prompt-1.png"]


@contextmanager
def small_hub(folder, models, pictures, xet=False):
    """A Hub with tiny models and a data set of eight images, whose folders are in `folder`, too."""
    shutil.copytree(models / "prior", folder / "prior")
    (folder / "prior" / "README.md").write_text("---\nlicense: mit\n---\n# A prior\n")
    (folder / "emoji").mkdir()
    lines = (pictures / "metadata.jsonl").read_text().splitlines()[:8]
    for line in lines:
        shutil.copy(pictures / json.loads(line)["file_name"], folder / "emoji")
    (folder / "emoji" / "metadata.jsonl").write_text("\n".join(lines))
    with HubServer(folder / "hub", tokens=TOKENS, xet=xet) as hub:
        hub.add_repo(BASE, folder / "prior")
        hub.add_repo(DECODER, models / "decoder")
        hub.add_repo(DATA, folder / "emoji", repo_type="dataset")
        yield hub


def run_process(hub, command, token=None, cwd=None, **env):
    """Runs a command whose Hub is `hub`, by default in an empty folder. Returns its exit status and output.

    An environment variable that is None is removed.
    """
    cwd = cwd or hub.folder / f"cwd-{len([*hub.folder.glob('cwd-*')])}"
    cwd.mkdir(exist_ok=True)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    env = {
        "HF_HUB_CACHE": None,
        "HF_DATASETS_CACHE": None,
        "PATH": path,
        "PYTHONPATH": str(SCRIPT.parent),
    } | env
    env = os.environ | hub.env(token) | {"HF_HUB_DISABLE_UPDATE_CHECK": "1"} | env
    done = subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        env={name: value for name, value in env.items() if value is not None},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
    )
    return SimpleNamespace(returncode=done.returncode, log=done.stdout, cwd=cwd, hub=hub)


def watch_upload(hub, output_dir):
    """A dict that receives all files of `output_dir` as they are when the upload begins."""
    before_upload = {}

    def look(method, path):
        trained = (output_dir / "checkpoint-2").exists()
        uploads = method in ("POST", "PUT") and re.search("/tester/|/lfs/", path)
        if trained and uploads and not before_upload:
            before_upload.update(read_folder(output_dir))

    hub.fail = look
    return before_upload


@pytest.fixture(scope="module")
def full_run(models, pictures, tmp_path_factory):
    """Everything is loaded from the Hub, with prompts and with every tracker, which write into --output_dir.
    The upload is to a private repo, by LFS, with --hub_token."""
    folder = tmp_path_factory.mktemp("full")
    output_dir = folder / "apples"
    # What may be in the folder already, some of it from other programs.
    for name in ("checkpoint-other/config.json", "checkpoint-other/optimizer.pt", "private/image.png"):
        (output_dir / name).parent.mkdir(parents=True, exist_ok=True)
        (output_dir / name).write_bytes(b"{}")
    args = tiny_args(
        models,
        pictures,
        output_dir,
        **QUICK | FROM_HUB,
        cache_dir=output_dir / "cache",
        checkpointing_steps=1,
        use_ema=True,
        validation_prompts=PROMPTS,
        validation_steps=1,
        report_to="all",
        hub_private_repo=True,
        hub_token=TOKEN,
    )
    with small_hub(folder, models, pictures) as hub:
        before_upload = watch_upload(hub, output_dir)
        run = run_process(hub, [sys.executable, SCRIPT, *args], WANDB_DIR=str(output_dir))
        assert run.returncode == 0, run.log
        run.args, run.folder, run.output_dir, run.before_upload = args, folder, output_dir, before_upload
        run.trained, run.repo_id = output_dir / "checkpoint-2" / "prior_ema", "tester/apples"
        run.images, run.prompt = ["grid.png", *SAMPLES], PROMPTS[0]
        yield run


@pytest.fixture(scope="module")
def minimal_run(models, pictures, tmp_path_factory):
    """Local models and images, no prompts, no trackers. The upload is by Xet, with the token that `hf auth
    login` saves."""
    folder = tmp_path_factory.mktemp("minimal")
    output_dir = folder / "plain"
    flags = {"pretrained_prior_model_name_or_path": folder / "prior", "checkpointing_steps": 2, "seed": None}
    args = tiny_args(models, pictures, output_dir, **QUICK | flags)
    with small_hub(folder, models, pictures, xet=True) as hub:
        (hub.folder / "client").mkdir()
        (hub.folder / "client" / "token").write_text(TOKEN)
        before_upload = watch_upload(hub, output_dir)
        run = run_process(hub, [sys.executable, SCRIPT, *args])
        assert run.returncode == 0, run.log
        run.args, run.folder, run.output_dir, run.before_upload = args, folder, output_dir, before_upload
        run.trained, run.repo_id = output_dir / "checkpoint-2" / "prior", "tester/plain"
        run.images, run.prompt = [], "a photo"
        yield run


@pytest.fixture(params=["full_run", pytest.param("minimal_run", marks=pytest.mark.slow)])
def pushed(request):
    """Each of the two runs."""
    return request.getfixturevalue(request.param)


def test_the_upload_list_has_every_component_of_the_pipeline(tmp_path, monkeypatch):
    """`push_to_hub` lists the folders by name; these are the ones that WuerstchenCombinedPipeline has."""
    uploads = []
    monkeypatch.setattr(script.hub, "preupload_lfs_files", lambda *args, **kwargs: None)
    monkeypatch.setattr(script.hub, "upload_folder", lambda **kwargs: uploads.append(kwargs))
    script.push_to_hub("tester/out", tmp_path, global_step=2, token=None)
    (upload,) = uploads
    folders = [pattern.removesuffix("/*") for pattern in upload["allow_patterns"] if pattern.endswith("/*")]
    parameters = inspect.signature(script.wuerstchen.WuerstchenCombinedPipeline.__init__).parameters
    assert sorted(folders) == sorted({"prior_pipeline", *parameters} - {"self"})


def test_exactly_what_a_user_needs_is_uploaded(pushed):
    files = pushed.hub.files(pushed.repo_id)
    assert set(files) == EXPECTED_FILES | set(pushed.images)
    assert {name: (pushed.output_dir / name).read_bytes() for name in files} == files
    assert len(pushed.hub.repos[pushed.repo_id]["commits"]) == 2, "an empty one, and one with all files"


def test_the_uploaded_index_names_the_uploaded_components(pushed):
    files = pushed.hub.files(pushed.repo_id)
    for prefix in ("", "prior_pipeline/"):
        index = json.loads(files[f"{prefix}model_index.json"])
        components = {name for name, value in index.items() if isinstance(value, list)}
        folders = {name.removeprefix(prefix).split("/")[0] for name in files if name.startswith(prefix)}
        assert components
        assert components <= folders


def test_no_uploaded_file_names_a_folder_of_this_machine(pushed):
    files = pushed.hub.files(pushed.repo_id)
    assert [name for name, content in files.items() if str(pushed.folder).encode() in content] == []


def test_there_were_more_files_that_could_have_been_uploaded(full_run):
    names = set(read_folder(full_run.output_dir))
    for pattern in (
        "checkpoint-1/optimizer.bin",
        "checkpoint-2/random_states_0.pkl",
        "samples/step-0000001-prompt-0.png",
        r"logs/.*tfevents.*",
        r"wandb/.*\.png",
        r"cache/.*model\.safetensors",
    ):
        assert [name for name in names if re.fullmatch(pattern, name)], pattern


def test_everything_is_on_disk_before_the_upload_begins(pushed):
    files = pushed.hub.files(pushed.repo_id)
    assert {name: pushed.before_upload.get(name) for name in files} == files


def test_no_large_file_is_sent_twice(pushed):
    """Two folders have the same weights. Small files are sent within the commit and do not count."""
    files = pushed.hub.files(pushed.repo_id)
    large = [content for name, content in files.items() if is_large(name, len(content))]
    once = sum(map(len, {hashlib.sha256(content).digest(): content for content in large}.values()))
    twice = sum(map(len, large))
    if pushed.hub.xet:  # it compresses the files by a few percent
        sent = sum(file.stat().st_size for file in pushed.hub.folder.glob("xet/**/xorbs/default.*"))
        assert 0.8 * once < sent <= once
        assert once < 0.7 * twice
    else:
        stored = [pushed.hub.folder / path[1:] for method, path, _ in pushed.hub.requests if method == "PUT"]
        assert sum(file.stat().st_size for file in stored) == once
        assert once < 0.7 * twice


def test_the_upload_has_a_progress_bar(pushed):
    after_training = pushed.log[pushed.log.rindex("Steps: 100%") :]
    assert re.search(r"(Upload \d+ LFS files|New Data Upload *): 100%\|", after_training)


def test_the_log_does_not_list_requests(pushed):
    """The URLs that files are sent to are signed: whoever reads one may write there."""
    assert pushed.hub.url not in pushed.log


def test_the_uploaded_weights_are_the_trained_ones(pushed):
    files = pushed.hub.files(pushed.repo_id)
    trained = load_weights(pushed.trained)
    for folder in ("prior_prior", "prior_pipeline/prior"):
        assert same_weights(load(files[f"{folder}/diffusion_pytorch_model.safetensors"]), trained)


def test_the_token_is_sent_to_the_hub_and_written_nowhere(pushed):
    assert TOKEN not in pushed.log
    files = read_folder(pushed.folder)
    assert {name for name, content in files.items() if TOKEN.encode() in content} <= {"hub/client/token"}
    tokens = [token for _, path, token in pushed.hub.requests if re.search("/commit/|/repos/create", path)]
    assert tokens == [f"Bearer {TOKEN}"] * 2


def test_trackers_record_the_command_line(full_run):
    """So the search for the token in their files can fail."""
    files = read_folder(full_run.output_dir)
    assert [name for name in files if name.startswith("wandb/") and b"--hub_token" in files[name]]


def test_the_repo_is_created_before_anything_else_is_loaded(full_run):
    requests = [f"{method} {path}" for method, path, _ in full_run.hub.requests]
    before = requests[: requests.index("POST /api/repos/create")]
    assert {line.split("/", 1)[1] for line in before} == {f"{DECODER}/resolve/main/model_index.json"}


@pytest.mark.parametrize(
    ("run", "private"), [("full_run", True), pytest.param("minimal_run", False, marks=pytest.mark.slow)]
)
def test_the_repo_is_private_only_on_request(request, run, private):
    run = request.getfixturevalue(run)
    assert run.hub.repos[run.repo_id]["private"] == private


# --------------------------------------------------------------------------------------------- the model card


def read_card(run):
    return run.hub.files(run.repo_id)["README.md"].decode()


def test_the_cards_code_generates_an_image_from_the_hub(pushed):
    """In an empty folder, with an empty cache, it generates the same image as the pipeline on disk."""
    (code,) = re.findall(r"```python\n(.*?)```", read_card(pushed), re.DOTALL)
    seeded = f"import torch; torch.manual_seed(7); exec({code!r})"
    home = str(pushed.folder / "elsewhere")
    done = run_process(pushed.hub, [sys.executable, "-c", seeded], TOKEN, HF_HOME=home)
    assert done.returncode == 0, done.log
    pipeline = AutoPipelineForText2Image.from_pretrained(pushed.output_dir)
    torch.manual_seed(7)
    expected = pipeline(pushed.prompt, width=128, height=128, prior_guidance_scale=4.0).images[0]
    assert np.array_equal(np.asarray(Image.open(done.cwd / "image.png")), np.asarray(expected))


@pytest.mark.slow
def test_the_cards_code_generates_images_of_the_samples_size(guide, tmp_path, monkeypatch):
    run = guide(resolution=64)
    card = (run.output_dir / "README.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    assert code.count("tester/wuerstchen-prior-naruto-model") == 1
    assert PROMPT in code
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tester").mkdir()
    (tmp_path / "tester" / "wuerstchen-prior-naruto-model").symlink_to(run.output_dir)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    exec(code, {})
    (sample,) = (run.output_dir / "samples").glob("step-0000006-*")
    assert Image.open(tmp_path / "image.png").size == Image.open(sample).size


def test_the_cards_metadata_are_those_that_the_hub_reads(full_run):
    widget = [{"text": prompt, "output": {"url": url}} for prompt, url in zip(PROMPTS, SAMPLES, strict=True)]
    assert ModelCard(read_card(full_run)).data.to_dict() == {
        "base_model": BASE,
        "datasets": [DATA],
        "license": "mit",
        "library_name": "diffusers",
        "pipeline_tag": "text-to-image",
        "tags": ["wuerstchen", "text-to-image", "diffusers", "diffusers-training"],
        "widget": widget,
    }
    assert ("POST", "/api/validate-yaml", f"Bearer {TOKEN}") in full_run.hub.requests


@pytest.mark.slow
def test_the_card_of_a_local_run_names_nothing_that_is_not_on_the_hub(minimal_run):
    card = read_card(minimal_run)
    metadata = ModelCard(card).data.to_dict()
    assert metadata["license"] == "mit", "that of the base model, whose folder has a card"
    assert metadata.keys() == {"license", "library_name", "pipeline_tag", "tags"}
    assert "fine-tuned on **local images**" in card
    state = json.loads((minimal_run.output_dir / "checkpoint-2" / "trainer_state.json").read_text())
    assert re.search(rf"\bseed[ =]{state['plan']['seed']}\b", card), "the one that was chosen at random"


def test_the_card_says_what_was_trained_on_what_for_how_long_and_how(full_run):
    card = read_card(full_run)
    assert f"**{BASE}**, fine-tuned on **{DATA}**" in card
    duration = r"For 2 steps of 4 samples, 1\.0 epochs of 8 rows, in \d+ seconds on 1 x cpu, with ```bash "
    assert re.search(duration, " ".join(card.split()))
    for setting in ("learning_rate=0.0001", "resolution=64", "use_ema ", "seed=0", "train_batch_size=4"):
        assert f"--{setting}" in card
    assert "hub_token" not in card
    for prompt in PROMPTS:
        assert f"* {prompt}\n" in card


def test_the_cards_settings_can_be_pasted_back(full_run):
    (command,) = re.findall(r"```bash\n(.*)\n```", read_card(full_run))
    launcher, launch, file, *settings = shlex.split(command)
    assert (launcher, launch, file) == ("accelerate", "launch", "train_text_to_image_prior.py")
    pasted = script.parse_args(settings)
    expected = script.parse_args([str(word) for word in full_run.args])
    local = ("output_dir", "cache_dir", "pretrained_image_encoder_name_or_path", "hub_token")
    assert {name for name in vars(pasted) if getattr(pasted, name) != getattr(expected, name)} == set(local)


def test_the_cards_images_are_the_newest_samples_and_the_loss_curve(full_run, tmp_path):
    files = full_run.hub.files(full_run.repo_id)
    assert re.findall(r"!\[.*?\]\((.*?)\)", read_card(full_run)) == ["grid.png", "loss.png"]
    samples = [np.asarray(Image.open(BytesIO(files[name]))) for name in SAMPLES]
    assert np.array_equal(np.asarray(Image.open(BytesIO(files["grid.png"]))), np.hstack(samples))
    assert not np.array_equal(*samples)
    lines = (full_run.output_dir / "loss.jsonl").read_text().splitlines(keepends=True)
    curves = []
    for count in (len(lines), len(lines) - 1):
        (tmp_path / "loss.jsonl").write_text("".join(lines[:count]))
        script.save_loss_curve(tmp_path)
        curves.append(np.asarray(Image.open(tmp_path / "loss.png").convert("RGB")))
    uploaded = np.asarray(Image.open(BytesIO(files["loss.png"])).convert("RGB"))
    assert (uploaded == (31, 119, 180)).all(axis=2).any(), "the blue line"
    assert np.array_equal(uploaded, curves[0])
    assert not np.array_equal(uploaded, curves[1]), "without the last step"


# ---------------------------------------------------------------------------------------------------- outages


@pytest.fixture(
    scope="module",
    params=[pytest.param("/commit/", marks=pytest.mark.slow), pytest.param("", marks=pytest.mark.slow)],
    ids=["commit", "all"],
)
def outage(models, pictures, tmp_path_factory, request):
    """From the last checkpoint on, the Hub answers 503 to each commit, or to every request. The token is in
    HF_TOKEN.

    "Every request" includes what the result is loaded from. There the client itself retries for two minutes.
    """
    folder = tmp_path_factory.mktemp("outage")
    flags = {"validation_prompts": PROMPTS, "checkpointing_steps": 2, "report_to": "tensorboard"}
    args = tiny_args(models, pictures, "my run", **QUICK | FROM_HUB | flags, hub_model_id="tester/later")
    with small_hub(folder, models, pictures) as hub:

        def fail(method, path):
            if request.param in path and [*folder.glob("hub/cwd-*/my run/checkpoint-2")]:
                return 503

        hub.fail = fail
        run = run_process(hub, [sys.executable, "-c", RETRY_SOON, *args], TOKEN)
        hub.fail = lambda method, path: None
        run.output_dir = run.cwd / "my run"
        yield run


def test_an_outage_that_does_not_end_is_an_error_after_everything_is_saved(outage):
    assert outage.returncode == 1, outage.log
    assert len(re.findall("WARNING .*next attempt in 0.1 seconds", outage.log)) == 2
    assert "Traceback" not in outage.log
    message = outage.log[outage.log.rindex("--push_to_hub: ") :]
    assert "503" in message.splitlines()[0]
    last_line = "The result is complete in my run; to push it later: hf upload tester/later "
    assert message.splitlines()[-1].startswith(last_line)
    assert outage.hub.files("tester/later") == {}
    assert set(read_folder(outage.output_dir)) >= EXPECTED_FILES | {"grid.png", *SAMPLES}
    assert TOKEN not in outage.log
    assert [name for name, content in read_folder(outage.cwd).items() if TOKEN.encode() in content] == []


def test_the_trackers_are_complete_after_an_outage(outage):
    folder = outage.output_dir / "logs" / "text2image-fine-tune"
    events = EventAccumulator(str(folder), {"scalars": 0, "images": 0}).Reload()
    assert [scalar.step for scalar in events.Scalars("train_loss")] == [1, 2]
    assert [image.step for image in events.Images("validation/1")] == [0, 2]


@pytest.mark.slow
def test_the_printed_command_pushes_the_same_files_later(outage):
    command = re.findall("to push it later: (.*)", outage.log)[-1]
    done = run_process(outage.hub, ["sh", "-c", command], TOKEN, cwd=outage.cwd)
    assert done.returncode == 0, done.log
    files = outage.hub.files("tester/later")
    assert set(files) == EXPECTED_FILES | {"grid.png", *SAMPLES}
    assert {name: (outage.output_dir / name).read_bytes() for name in files} == files


@pytest.mark.slow
def test_the_push_is_retried_until_an_outage_ends(models, pictures, tmp_path):
    """A connection is cut within a file, another one within the commit, and then there is a 503."""
    commit = "POST /api/models/tester/out/commit/"
    faults = [("PUT /lfs/", CUT), (commit, CUT), (commit, 503)]

    def fail(method, path):
        if faults and f"{method} {path}".startswith(faults[0][0]):
            return faults.pop(0)[1]

    with small_hub(tmp_path, models, pictures) as hub:
        hub.fail = fail
        args = tiny_args(models, pictures, tmp_path / "out", **QUICK)
        done = run_process(hub, [sys.executable, "-c", RETRY_SOON, *args], TOKEN)
    assert done.returncode == 0, done.log
    assert faults == []
    assert len(re.findall("WARNING .*next attempt in 0.1 seconds", done.log)) == 2
    files = hub.files("tester/out")
    assert set(files) == EXPECTED_FILES
    assert {name: (tmp_path / "out" / name).read_bytes() for name in files} == files
    assert TOKEN not in done.log


@pytest.mark.slow
def test_a_token_that_is_revoked_during_training_is_not_retried(models, pictures, tmp_path):
    with small_hub(tmp_path, models, pictures) as hub:
        hub.tokens = dict(TOKENS)

        def fail(method, path):
            if (tmp_path / "out" / "README.md").exists():
                hub.tokens.pop(TOKEN, None)

        hub.fail = fail
        args = tiny_args(models, pictures, tmp_path / "out", **QUICK)
        done = run_process(hub, [sys.executable, "-c", RETRY_SOON, *args], TOKEN)
    assert done.returncode == 1, done.log
    assert "next attempt" not in done.log
    assert re.search(r"--push_to_hub: .*401[^`]*to push it later: hf upload tester/out ", done.log)
    assert set(read_folder(tmp_path / "out")) >= EXPECTED_FILES


# -------------------------------------------------------------------------------------- refusals at the start

REFUSED = {  # flags, and the reason in the message
    "an unknown token": ({"hub_token": UNKNOWN_TOKEN, "hub_model_id": "tester/new"}, "401"),
    "an unknown token with a carriage return": (
        {"hub_token": f"{UNKNOWN_TOKEN}\r", "hub_model_id": "tester/new"},
        "401",
    ),
    "no token": ({"hub_model_id": "tester/new"}, "hf auth login"),
    "a read-only token, new repo": ({"hub_token": READ_TOKEN, "hub_model_id": "tester/new"}, "403"),
    "a read-only token": ({"hub_token": READ_TOKEN, "hub_model_id": "tester/existing"}, "403"),
    "another user's repo": ({"hub_token": TOKEN, "hub_model_id": "other/public"}, "403"),
    "another user's private repo": ({"hub_token": TOKEN, "hub_model_id": "other/secret"}, "403"),
    "an invalid name": ({"hub_token": TOKEN, "hub_model_id": "my run!"}, "Repo id must"),
}
RUN_EACH = """
import json, os, sys
import train_text_to_image_prior as script
messages = {}
for name, args in json.loads(os.environ["RUNS"]).items():
    try:
        script.main(args)
    except SystemExit as end:
        messages[name] = end.code
print(json.dumps(messages))
"""


@pytest.fixture(scope="module")
def refusals(models, pictures, tmp_path_factory):
    """The message of each of REFUSED, one after another in one process. The images do not exist, which is
    checked later."""
    folder = tmp_path_factory.mktemp("refusals")
    runs = {}
    for name, (flags, _) in REFUSED.items():
        args = tiny_args(models, folder / "nowhere", folder / "out", **QUICK | flags)
        runs[name] = [str(arg) for arg in args]
    with HubServer(folder / "hub", tokens=TOKENS) as hub:
        for repo_id in ("tester/existing", "other/public", "other/secret"):
            hub.add_repo(repo_id, models / "prior", private=repo_id == "other/secret")
        done = run_process(hub, [sys.executable, "-c", RUN_EACH], RUNS=json.dumps(runs))
    assert done.returncode == 0, done.log
    messages = json.loads(done.log.splitlines()[-1])
    return SimpleNamespace(messages=messages, log=done.log, folder=folder, hub=hub)


@pytest.mark.parametrize("name", REFUSED)
def test_a_repo_that_cannot_be_written_is_refused_at_the_start(refusals, name):
    flags, reason = REFUSED[name]
    repo_id = re.escape(flags["hub_model_id"])
    message = refusals.messages[name]
    assert re.fullmatch(f"--push_to_hub: --hub_model_id={repo_id}: .*{reason}.*", message)


def test_a_refusal_writes_nothing_and_does_not_show_the_token(refusals):
    assert read_folder(refusals.folder / "out").keys() == {".lock"}
    assert set(refusals.hub.repos) == {"tester/existing", "other/public", "other/secret"}
    assert {len(repo["commits"]) for repo in refusals.hub.repos.values()} == {1}
    assert [token for token in (TOKEN, READ_TOKEN, UNKNOWN_TOKEN) if token in refusals.log] == []
