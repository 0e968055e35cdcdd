# SPDX-License-Identifier: Apache-2.0
"""What a run leaves on disk, at the Hub and in the trackers, and that the guide's words work on it."""

import hashlib
import json
import math
import os
import re
import shutil
import struct
import subprocess
import sys
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import TESTS, tiny_args
from diffusers import AutoPipelineForText2Image, DiffusionPipeline
from hub_server import HubServer
from huggingface_hub import ModelCard
from PIL import Image
from safetensors.torch import load_file, save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_models import save_published_encoder

import modeling_efficient_net_encoder as encoding
import train_text_to_image_prior as script
from modeling_efficient_net_encoder import EfficientNetEncoder

TOKEN = "hf_xKqTbWnVmZsLpRdFgHjY"
PROMPT = "A robot naruto, 4k photo"
# The guide's, but for the number of updates and of workers, and that it keeps an average.
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
LAUNCH = ("-m", "accelerate.commands.launch")
# The guide's words, but for the path, the device and the sizes.
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


@pytest.fixture(scope="module")
def kept():
    """What has been run in this file, so that several tests can look at it."""
    return {}


@pytest.fixture
def guide(kept, run_script, models, pictures, tmp_path_factory):
    """guide(**flags): the guide's command in a process of its own, against a Hub that has what it asks for.

    Gives its `log`, `output_dir`, wandb's folder `wandb`, and the `hub` as it is in the end.
    """

    def run(**flags):
        key = repr(flags)
        if key not in kept:
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
                done = run_script(args, launcher=LAUNCH, **env)
            log = done.stdout + done.stderr
            assert done.returncode == 0, log
            kept[key] = SimpleNamespace(log=log, output_dir=output_dir, wandb=folder / "wandb", hub=hub)
        return kept[key]

    return run


def tensors(folder):
    """The weights of a diffusers model."""
    return load_file(folder / "diffusion_pytorch_model.safetensors")


def same(left, right):
    """Whether two sets of weights are the same, bit for bit."""
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def is_the_sources(text_encoder, models):
    """Whether it is the pretrained prior's text encoder, in float32."""
    source = script.CLIPTextModel.from_pretrained(models / "prior" / "text_encoder", dtype=torch.float32)
    return {p.dtype for p in text_encoder.parameters()} == {torch.float32} and same(
        dict(text_encoder.named_parameters()), dict(source.named_parameters())
    )


# ----------------------------------------------------------------------------------------- the guide's command


def test_the_guides_command_ends_with_the_newest_checkpoints(guide):
    run = guide(resolution=64)
    checkpoints = sorted(path.name for path in run.output_dir.glob("*checkpoint*"))
    assert checkpoints == ["checkpoint-4", "checkpoint-5", "checkpoint-6"]
    assert re.search(r"WARNING.*fp16.*float32", run.log)


@pytest.mark.slow
def test_the_guides_command_at_768_pixels(guide):
    run = guide(max_train_steps=1)
    picture = run.output_dir / "samples" / "update-0000001-prompt-0.png"
    assert Image.open(picture).size == (1024, 1024)
    assert Image.open(picture).convert("RGB").getextrema() != ((0, 0),) * 3
    assert "model_index.json" in run.hub.files("tester/wuerstchen-prior-naruto-model")


def wandb_records(folder):
    """The payload of wandb's offline file: LevelDB's log format, 7 bytes before each record, blocks of 32 KiB."""
    # Accelerate 1.10 begins an offline run a second time, to put the settings in.
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


def test_wandb_has_the_pictures_with_their_captions_and_the_curves(guide):
    run = guide(resolution=64)
    records = wandb_records(run.wandb)
    shown = re.findall(rb'captions[^"]{1,8}(\["A robot[^]]*"\])', records)
    assert {json.loads(captions)[0] for captions in shown} == {PROMPT}
    media = run.wandb.glob("wandb/offline-run-*/files/media/images/*.png")
    samples = [*(run.output_dir / "samples").glob("update-*.png")]
    assert len(samples) == 3, "before the first update, after the first epoch, which update 4 ends, and at the end"
    shown, saved = ({np.asarray(Image.open(path)).tobytes() for path in paths} for paths in (media, samples))
    assert shown == saved
    for tag in (b"train_loss", b"lr", b"grad_norm", b"images_per_second"):
        assert tag in records


def test_the_hub_gets_what_a_user_needs_and_no_more(guide):
    run = guide(resolution=64)
    files = run.hub.files("tester/wuerstchen-prior-naruto-model")
    folders = {"samples", "prior_pipeline", "decoder", "scheduler", "text_encoder", "tokenizer", "vqgan"}
    folders |= {f"prior_{name}" for name in ("prior", "scheduler", "text_encoder", "tokenizer")}
    assert {name.split("/")[0] for name in files if "/" in name} == folders
    assert {name for name in files if "/" not in name} == {"README.md", "model_index.json", "grid.png", "loss.png"}
    assert "prior_pipeline/prior/diffusion_pytorch_model.safetensors" in files
    assert not [name for name in files if re.search(r"checkpoint|optimizer|random_states|trainer_state|logs", name)]
    for name, content in files.items():
        assert (run.output_dir / name).read_bytes() == content, name
    metadata = ModelCard(files["README.md"].decode()).data.to_dict()
    assert metadata["base_model"] == "warp-ai/wuerstchen-prior"
    assert metadata["datasets"] == ["lambdalabs/naruto-blip-captions"]
    assert metadata["library_name"] == "diffusers"
    assert metadata["pipeline_tag"] == "text-to-image"
    assert ("POST", "/api/validate-yaml") in [request[:2] for request in run.hub.requests]
    assert {token for method, path, token in run.hub.requests if "/commit/" in path} == {f"Bearer {TOKEN}"}


def test_the_token_is_nowhere_but_in_requests_to_the_hub(guide, tmp_path_factory):
    """In no byte of what is written, printed or uploaded, its working folder and caches included."""
    run = guide(resolution=64)
    assert TOKEN not in run.log
    places = [run.output_dir, run.wandb, run.hub.folder, *tmp_path_factory.getbasetemp().glob("cwd*")]
    files = [path for place in places for path in place.rglob("*") if path.is_file()]
    assert b"--hub_token" in wandb_records(run.wandb), "wandb writes down the command line, so this can fail"
    assert [str(path) for path in files if TOKEN.encode() in path.read_bytes()] == []


@pytest.mark.parametrize("tracker", ["tensorboard", "none"])
def test_the_token_stays_out_of_other_trackers(run_main, models, pictures, tmp_path, tracker):
    args = tiny_args(models, pictures, tmp_path / "out", hub_token=TOKEN, report_to=tracker, max_train_steps=1)
    args[args.index("--hub_token") : args.index("--hub_token") + 2] = [f"--hub_token={TOKEN}"]
    done = run_main(args)
    assert done.returncode == 0, done
    assert TOKEN not in done.output
    assert [path for path in tmp_path.rglob("*") if path.is_file() and TOKEN.encode() in path.read_bytes()] == []


def test_the_cards_code_runs_as_printed(guide, tmp_path, monkeypatch):
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
    drawn = Image.open(tmp_path / "picture.png")
    (sample,) = (run.output_dir / "samples").glob("update-0000006-*")
    assert drawn.size == Image.open(sample).size


# ------------------------------------------------------------------------------------------- what is saved


def test_the_guides_snippet_draws_with_the_trained_prior(guide, models):
    run = guide(resolution=64)
    names = {}
    line = "up to 0.37" if script.diffusers.__version__ < "0.38" else "from 0.38 on"
    exec(SNIPPET.format(path=str(run.output_dir), imports=IMPORTS[line]), names)
    assert [image.size for image in names["images"]] == [(128, 256)] * 2
    assert not np.array_equal(*map(np.asarray, names["images"]))

    pipeline = names["pipeline"]
    trained = tensors(run.output_dir / "checkpoint-6" / "prior_ema")
    assert {value.dtype for value in trained.values()} == {torch.float32}
    assert same(dict(pipeline.prior_prior.named_parameters()), trained)
    assert not same(trained, tensors(models / "prior" / "prior"))
    assert is_the_sources(pipeline.prior_text_encoder, models)
    decoder = tensors(models / "decoder" / "decoder")
    assert same(dict(pipeline.decoder.named_parameters()), decoder)


def test_the_prior_pipeline_loads_by_itself(guide, models):
    run = guide(resolution=64)
    pipeline = DiffusionPipeline.from_pretrained(run.output_dir / "prior_pipeline")
    assert type(pipeline).__name__ == "WuerstchenPriorPipeline"
    assert same(dict(pipeline.prior.named_parameters()), tensors(run.output_dir / "checkpoint-6" / "prior_ema"))
    assert is_the_sources(pipeline.text_encoder, models)
    assert (pipeline.config.latent_mean, pipeline.config.latent_std) == (42.0, 1.0)
    embeds = pipeline("a bird", width=128, height=128, output_type="pt").image_embeddings
    assert embeds.shape == (1, 16, 3, 3)
    assert embeds.isfinite().all()


def test_saved_layouts_name_classes_that_every_version_knows(guide):
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


def test_no_weights_are_on_disk_twice(guide):
    """The root's prior and prior_pipeline's are one file with two names."""
    run = guide(resolution=64)
    files = [path for path in run.output_dir.rglob("*.safetensors") if "checkpoint-" not in str(path)]
    inodes = {}
    for file in files:
        inodes.setdefault(hashlib.sha256(file.read_bytes()).digest(), set()).add(file.stat().st_ino)
    assert len(files) == 7
    assert len(inodes) == 5
    assert all(len(of_content) == 1 for of_content in inodes.values())


# --------------------------------------------------------------------------------------- validation pictures


@pytest.fixture(scope="module")
def published_sizes(models):
    """A pipeline whose decoder has the published shape, without the weights."""
    with torch.device("meta"):
        decoder = script.wuerstchen.WuerstchenDiffNeXt(
            patch_size=2, c_hidden=[320, 640, 1280, 1280], blocks=[1, 1, 1, 1]
        )
    prior = script.wuerstchen.WuerstchenPriorPipeline.from_pretrained(models / "prior")
    parts = script.wuerstchen.WuerstchenDecoderPipeline.from_pretrained(models / "decoder").components
    return script.wuerstchen.WuerstchenCombinedPipeline(
        **parts | {"decoder": decoder}, **{f"prior_{name}": part for name, part in prior.components.items()}
    )


@pytest.mark.parametrize(("resolution", "pixels"), [(768, 1024), (512, 640)])
def test_pictures_have_the_size_of_what_is_trained(published_sizes, resolution, pixels):
    assert encoding.picture_size(published_sizes.decoder_pipe, resolution) == pixels


@pytest.mark.parametrize("resolution", range(32, 1600, 96))
def test_every_resolution_gets_a_size_that_can_be_drawn_near_by(published_sizes, resolution):
    pixels = encoding.picture_size(published_sizes.decoder_pipe, resolution)
    side = math.ceil(pixels / 42.67)  # as the prior's pipeline has it
    drawn = int(side * 10.67)  # as the decoder's has it
    assert drawn % 16 == 0, "patches of 2 are halved three times"
    assert drawn > 0
    assert pixels % 128 == 0
    assert abs(side - resolution / 32) <= 2.5, "three latents are 128 pixels"


def test_the_decoder_draws_what_it_is_asked_for_and_could_not_draw_the_trained_size(models, guide):
    """64 pixels are latents of 2 a side, which come out as 3."""
    run = guide(resolution=64)
    assert {Image.open(path).size for path in (run.output_dir / "samples").glob("update-*")} == {(128, 128)}
    pipeline = AutoPipelineForText2Image.from_pretrained(run.output_dir)
    assert encoding.picture_size(pipeline.decoder_pipe, 64) == 128
    with pytest.raises(RuntimeError):
        pipeline("a bird", width=85, height=85, prior_timesteps=[1.0, 0.0], num_inference_steps=1)


# -------------------------------------------------------------------------------------------------- trackers


@pytest.fixture
def board(kept, run_main, models, pictures, tmp_path_factory):
    """A run that TensorBoard was told of: output_dir and what it shows."""
    if "board" not in kept:
        output_dir = tmp_path_factory.mktemp("board") / "out"
        args = tiny_args(
            models,
            pictures,
            output_dir,
            report_to="tensorboard",
            validation_prompts=["a red apple", "new moon"],
            validation_epochs=1,
            max_train_samples=8,
            max_train_steps=5,
            gradient_accumulation_steps=2,
            train_batch_size=2,
            hub_token=TOKEN,
        )
        done = run_main(args)
        assert done.returncode == 0, done
        events = EventAccumulator(
            str(output_dir / "logs" / "text2image-fine-tune"), {"scalars": 0, "images": 0, "tensors": 0}
        )
        kept["board"] = output_dir, events.Reload()
    return kept["board"]


@pytest.mark.parametrize("tag", ["train_loss", "lr", "grad_norm"])
def test_tensorboard_has_each_number_once_an_update(board, tag):
    _, events = board
    scalars = events.Scalars(tag)
    assert [scalar.step for scalar in scalars] == [1, 2, 3, 4, 5]
    assert all(math.isfinite(scalar.value) and scalar.value > 0 for scalar in scalars)


def test_tensorboard_shows_the_pictures_of_samples_and_their_prompts(board):
    output_dir, events = board
    samples = {path.name for path in (output_dir / "samples").glob("update-*")}
    assert samples == {f"update-{update:07d}-prompt-{i}.png" for update in (0, 2, 4, 5) for i in (0, 1)}
    for index, prompt in enumerate(("a red apple", "new moon")):
        images = events.Images(f"validation/{index}")
        assert [image.step for image in images] == [0, 2, 4, 5]
        for image in images:
            file = output_dir / "samples" / f"update-{image.step:07d}-prompt-{index}.png"
            shown = Image.open(BytesIO(image.encoded_image_string))
            assert np.array_equal(np.asarray(shown), np.asarray(Image.open(file)))
        texts = events.Tensors(f"validation/{index}/text_summary")
        assert [text.tensor_proto.string_val[0].decode() for text in texts] == [prompt] * 4


def test_tensorboard_has_the_settings_without_the_token(board):
    output_dir, _ = board
    (settings,) = (output_dir / "logs").rglob("hparams.yml")
    text = settings.read_text()
    assert re.search(r"^learning_rate: 0.0001$", text, re.MULTILINE)
    assert re.search(r"^seed: 0$", text, re.MULTILINE)
    assert "hub_token" not in text
    assert [path for path in output_dir.rglob("*") if path.is_file() and TOKEN.encode() in path.read_bytes()] == []


# ------------------------------------------------------------------------------------------ what may break


def test_a_decoder_that_cannot_be_loaded_costs_only_pictures(run_main, models, pictures, tmp_path):
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
    assert re.search(r"WARNING.*No validation pictures at update 2", done.output)
    assert re.search(r"WARNING.*prior_pipeline", done.output)
    pipeline = DiffusionPipeline.from_pretrained(tmp_path / "out" / "prior_pipeline")
    trained = tensors(tmp_path / "out" / "checkpoint-2" / "prior")
    assert same(dict(pipeline.prior.named_parameters()), trained)
    assert (tmp_path / "out" / "README.md").is_file()


# ----------------------------------------------------------------------------------- versions of diffusers


@pytest.fixture(scope="session")
def newest_diffusers(tmp_path_factory):
    """A folder to put on PYTHONPATH that has the newest diffusers; $NEWEST_DIFFUSERS, or fetched from PyPI."""
    if "NEWEST_DIFFUSERS" in os.environ:
        return os.environ["NEWEST_DIFFUSERS"]
    folder = tmp_path_factory.mktemp("newest-diffusers")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", folder, "diffusers"]
    subprocess.run(pip, check=True, capture_output=True)
    return str(folder)


LOAD = """
import json, sys
import numpy as np
for path in {paths!r}:
    names = {{}}
    exec({snippet!r}.replace("PATH", path), names)
    assert [image.size for image in names["images"]] == [(128, 256)] * 2
    assert np.asarray(names["images"][0]).std() > 0
    from diffusers import DiffusionPipeline, __version__
    DiffusionPipeline.from_pretrained(path + "/prior_pipeline")
    print("drawn with", __version__, float(sum(p.double().sum() for p in names["pipeline"].prior_prior.parameters())))
"""


@pytest.fixture
def trained_with_newest(kept, newest_diffusers, run_script, models, pictures, tmp_path_factory):
    """The output_dir of a run with the newest diffusers, and its log."""
    if "newest" not in kept:
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
        kept["newest"] = run_script(args, PYTHONPATH=newest_diffusers), output_dir
    return kept["newest"]


@pytest.mark.slow
def test_the_newest_diffusers_trains_the_same(trained_with_newest, run_main, models, pictures, tmp_path):
    done, output_dir = trained_with_newest
    assert done.returncode == 0, done.stdout + done.stderr
    flags = {"use_ema": True, "validation_prompts": "a red apple", "max_train_steps": 2, "checkpointing_steps": 1}
    here = run_main(tiny_args(models, pictures, tmp_path / "out", **flags))
    assert here.returncode == 0, here
    for name in ("prior", "prior_ema"):
        theirs, ours = (tensors(folder / "checkpoint-2" / name) for folder in (output_dir, tmp_path / "out"))
        assert theirs.keys() == ours.keys()
        for key, value in ours.items():
            assert torch.allclose(theirs[key], value, rtol=0, atol=1e-6), key
    index = json.loads((output_dir / "model_index.json").read_text())
    assert index["prior_prior"] == ["wuerstchen", "WuerstchenPrior"]
    assert (output_dir / "samples" / "update-0000002-prompt-0.png").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("line", ["up to 0.37", "from 0.38 on"])
def test_what_one_line_of_diffusers_saves_the_other_loads(guide, trained_with_newest, newest_diffusers, line):
    _, by_newest = trained_with_newest
    paths = [str(guide(resolution=64).output_dir), str(by_newest)]
    snippet = SNIPPET.format(path="PATH", imports=IMPORTS[line])
    env = os.environ | ({"PYTHONPATH": newest_diffusers} if line == "from 0.38 on" else {})
    code = LOAD.format(paths=paths, snippet=snippet)
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    drawn = re.findall(r"drawn with 0\.(\d+)\.\d+\S* (\S+)", done.stdout)
    assert len(drawn) == 2
    assert all((int(minor) >= 38) == (line == "from 0.38 on") for minor, _ in drawn)
    for path, (_, total) in zip(paths, drawn, strict=True):
        weights = tensors(Path(path, "prior_pipeline", "prior"))
        assert float(total) == pytest.approx(sum(value.double().sum().item() for value in weights.values()), abs=1e-6)


# ------------------------------------------------------------------------------------------------- launchers


def test_it_runs_under_plain_python_and_says_on_what(run_script, models, pictures, tmp_path):
    done = run_script(tiny_args(models, pictures, tmp_path / "out", max_train_steps=1))
    assert done.returncode == 0, done.stderr
    assert "'processes': 1" in done.stderr
    assert (tmp_path / "out" / "model_index.json").is_file()


@pytest.mark.slow
def test_torchrun_starts_two_ranks_and_one_of_them_writes(run_script, models, pictures, tmp_path):
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    args = tiny_args(models, pictures, tmp_path / "out", max_train_steps=1, checkpointing_steps=1)
    done = run_script(args, launcher=launcher, ACCELERATE_USE_CPU="true")
    assert done.returncode == 0, done.stderr
    assert "'processes': 2" in done.stderr
    assert done.stderr.count("1 updates of 8 samples") == 1
    assert (tmp_path / "out" / "model_index.json").is_file()
    random_states = sorted(path.name for path in (tmp_path / "out" / "checkpoint-1").glob("random_states_*"))
    assert random_states == ["random_states_0.pkl", "random_states_1.pkl"]


CONFIGURE = {
    "accelerate config default": ["-m", "accelerate.commands.accelerate_cli", "config", "default"],
    "write_basic_config": ["-c", "from accelerate.utils import write_basic_config; write_basic_config()"],
}


@pytest.mark.slow
@pytest.mark.parametrize("way", CONFIGURE)
def test_it_runs_with_each_of_accelerates_configurations(run_script, models, pictures, tmp_path, way):
    home = {"HOME": str(tmp_path / "home"), "HF_HOME": str(tmp_path / "home" / "hf")}
    (tmp_path / "home").mkdir()
    configure = [sys.executable, *CONFIGURE[way]]
    subprocess.run(configure, env=os.environ | home, check=True, capture_output=True, cwd=tmp_path)
    (config,) = (tmp_path / "home").rglob("default_config.*")
    assert "mixed_precision" in config.read_text()
    done = run_script(tiny_args(models, pictures, tmp_path / "out", max_train_steps=1), launcher=LAUNCH, **home)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "default values" not in done.stderr, "the launcher says so when it finds no configuration"
    assert (tmp_path / "out" / "model_index.json").is_file()


def test_transformers_4_finds_what_it_knows_in_the_result(run_main, models, pictures, tmp_path):
    """Version 4 looks for a prefix of tensors' names that 5 takes off, and for the tokenizer's old files."""
    shutil.copytree(models / "prior", tmp_path / "prior")
    published = tmp_path / "prior" / "text_encoder" / "model.safetensors"
    state = {f"text_model.{name.removeprefix('text_model.')}": value for name, value in load_file(published).items()}
    save_file(state, published, metadata={"format": "pt"})
    flags = {"pretrained_prior_model_name_or_path": tmp_path / "prior", "max_train_steps": 1}
    assert run_main(tiny_args(models, pictures, tmp_path / "out", **flags)).returncode == 0
    for folder in ("prior_pipeline/", "prior_"):
        saved = load_file(tmp_path / "out" / f"{folder}text_encoder" / "model.safetensors")
        assert same(saved, state)
        old = tmp_path / "out" / f"{folder}tokenizer"
        assert json.loads((old / "vocab.json").read_text()) == json.loads(
            (TESTS / "data" / "clip-tokenizer" / "vocab.json").read_text()
        )
        merges = [
            (file / "merges.txt").read_text().splitlines()[1:] for file in (old, TESTS / "data" / "clip-tokenizer")
        ]
        assert merges[0] == [line for line in merges[1] if line]
