# SPDX-License-Identifier: Apache-2.0
"""The result of a run: its folder, the model card, and the upload to the Hub, which is the server in
hub_server.py. Two runs are pushed, and most tests look at one of them."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from conftest import SCRIPT, distance, load_weights, read_wandb, run_command, same_weights, tiny_args
from diffusers import AutoPipelineForText2Image, DiffusionPipeline
from hub_server import CUT, HubServer
from huggingface_hub import ModelCard
from PIL import Image
from safetensors.torch import load, load_file, save_file
from tiny_models import save_published_encoder

import train_text_to_image_prior as script
from modeling_efficient_net_encoder import EfficientNetEncoder

TOKEN = "hf_xKqTbWnVmZsLpRdFgHjY"
READ_TOKEN = "hf_RdNlYpWcJvTgBsQhXmKz"
UNKNOWN_TOKEN = "hf_ZvCpLrWsDkGtMnBhQxFj"
TOKENS = {TOKEN: {"name": "tester", "write": True}, READ_TOKEN: {"name": "tester", "write": False}}
ACCELERATE_LAUNCH = ("-m", "accelerate.commands.launch")


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


# -------------------------------------------------------------------------------- the settings in the card

# Each flag with another value than its default, except for those that are private; the second line excludes
# the first.
SETTINGS = r"""
--pretrained_prior_model_name_or_path tester/prior --pretrained_decoder_model_name_or_path tester/decoder
--pretrained_image_encoder_name_or_path tester/encoder --cache_dir "a cache that does not exist"
--dataset_name tester/images --train_data_dir "not here" --dataset_config_name "it's \$HOME"
--image_column "my image" --caption_column captions --max_train_samples 8 --validation_split 0.1
--resolution 768 --skip_bad_rows --seed 0 --train_batch_size 4 --gradient_accumulation_steps 2
--num_train_epochs 3 --max_train_steps 6 --gradient_checkpointing --mixed_precision bf16 --allow_tf32
--use_ema --offload_ema --loss_weighting p2 --timestep_sampling stretched --caption_dropout 0.05
--learning_rate 1e-05 --lr_scheduler piecewise_constant --lr_warmup_steps 0 --lr_step_rules 1:100,0.1
--adam_weight_decay 0.01 --max_grad_norm 0.3333333333333333 --checkpointing_steps 1
--checkpoints_total_limit 2 --validation_epochs 1
--validation_steps 2 --validation_size 512 1024 --logging_dir "my logs" --report_to wandb
--tracker_project_name "a project" --push_to_hub --hub_private_repo
--validation_prompts 'a "new" moon: it'"'"'s dark' '$HOME/* `ls` \n\t' '🍎' '' '#1; {2}' -1
"""
EITHER = "--random_crop --random_flip --compile --optimizer adafactor"
OR = "--cache_latents --aspect_ratio_buckets --adam_beta1 0.8 --adam_beta2 0.9 --adam_epsilon 1e-6"
PRIVATE = f"--output_dir 'out of here' --hub_token {TOKEN} --hub_model_id a/b --local_rank 0"
PRIVATE += " --resume_from_checkpoint latest --dataloader_num_workers 3 --overwrite_output_dir"


def flags_in(words):
    return {word.removeprefix("--") for word in words if re.fullmatch("--[a-z0-9_]+", word)}


def test_the_settings_can_be_pasted_back_without_private_ones(tmp_path, monkeypatch):
    """Also if folders happen to have the names of some values."""
    all_flags = vars(script.parse_args(["--train_data_dir=images"])).keys()
    assert flags_in(shlex.split(f"{SETTINGS} {EITHER} {OR} {PRIVATE}")) == all_flags
    monkeypatch.chdir(tmp_path)
    for name in ("wandb", "captions", "4"):  # wandb itself creates the first one
        Path(name).mkdir()
    for others in (EITHER, OR):
        args = script.parse_args(shlex.split(f"{SETTINGS} {others} {PRIVATE}"))
        words = shlex.split(script.training_command(args))
        assert words[:3] == ["accelerate", "launch", "train_text_to_image_prior.py"]
        assert not flags_in(words) & flags_in(shlex.split(PRIVATE))
        assert not {TOKEN, "out of here", "a/b"} & {*words}
        assert vars(script.parse_args(words[3:] + shlex.split(PRIVATE))) == vars(args)


def test_the_settings_omit_local_paths(tmp_path):
    models = [f"pretrained_{name}_name_or_path" for name in ("prior_model", "decoder_model", "image_encoder")]
    paths = [*models, "cache_dir", "dataset_name", "train_data_dir", "output_dir", "logging_dir"]
    words = [f"--{name}={tmp_path}" for name in (*paths, "resume_from_checkpoint")]
    command = script.training_command(script.parse_args([*words, "--learning_rate=0.5"]))
    assert "--learning_rate 0.5" in command and tmp_path.name not in command
    assert not flags_in(shlex.split(command)) & {*paths}


# --------------------------------------------------- two runs that are pushed: everything on, and all off

PROMPTS = ["A robot naruto, 4k photo \N{RED APPLE}", 'a "new" moon: it\'s dark']
BASE, DECODER, DATA = "warp-ai/wuerstchen-prior", "warp-ai/wuerstchen", "lambdalabs/naruto-blip-captions"
DEFAULTS = ["pretrained_prior_model_name_or_path", "pretrained_decoder_model_name_or_path", "seed"]
DEFAULTS += ["pretrained_image_encoder_name_or_path", "train_data_dir"]
# The guide's flags, except for resolution, prompts, number of steps and of workers, and for --use_ema.
GUIDE = dict.fromkeys(DEFAULTS) | {
    "mixed_precision": "fp16",
    "dataset_name": DATA,
    "resolution": 64,
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
    "lr_warmup_steps": 0,
    "validation_prompts": PROMPTS,
    "report_to": "all",
    "push_to_hub": True,
    f"hub_token={TOKEN}": True,
}
# The guide's code, except for the path, the device, the image size, and the import from 0.38 on.
SNIPPET = """
import torch
from diffusers import AutoPipelineForText2Image
try:
    from diffusers.pipelines.wuerstchen import DEFAULT_STAGE_C_TIMESTEPS
except ImportError:
    import diffusers
    from diffusers.pipelines.deprecated import wuerstchen
    from diffusers.pipelines.deprecated.wuerstchen import DEFAULT_STAGE_C_TIMESTEPS
    diffusers.pipelines.wuerstchen = wuerstchen

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
QUICK = {"max_train_samples": 8, "max_train_steps": 2, "push_to_hub": True, "checkpointing_steps": 2}
TOKENIZER = ["merges.txt", "tokenizer.json", "tokenizer_config.json", "vocab.json"]
if transformers.__version__ < "5":  # it saves a file more
    TOKENIZER.append("special_tokens_map.json")
PIPELINE = {
    "model_index.json",
    "scheduler/scheduler_config.json",
    *(f"tokenizer/{name}" for name in TOKENIZER),
}
PIPELINE |= {"text_encoder/config.json", "text_encoder/model.safetensors"}
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


@contextmanager
def small_hub(folder, models, full_encoder, images):
    """A Hub with what the guide's command loads: tiny models and a data set of eight images."""
    shutil.copytree(models / "prior", folder / "prior")
    (folder / "encoder").mkdir()
    encoder = EfficientNetEncoder.from_pretrained(full_encoder)
    save_published_encoder(encoder, folder / "encoder" / "model_v2_stage_b.pt")
    (folder / "images").mkdir()
    lines = (images / "metadata.jsonl").read_text().splitlines()[:8]
    for line in lines:
        shutil.copy(images / json.loads(line)["file_name"], folder / "images")
    (folder / "images" / "metadata.jsonl").write_text("\n".join(lines))
    with HubServer(folder / "hub", tokens=TOKENS) as hub:
        hub.add_repo(BASE, folder / "prior")
        hub.add_repo(DECODER, models / "decoder")
        hub.add_repo("dome272/wuerstchen", folder / "encoder")
        hub.add_repo(f"datasets/{DATA}", folder / "images")
        yield hub


def push(train_fresh, hub, folder, name, env, last_step, launcher=(), **flags):
    """A run that has ended well, with what was in its folder when the upload began."""
    before_upload, output_dir = {}, folder / name

    def look(method, path):
        trained = (output_dir / f"checkpoint-{last_step}").exists()
        if trained and not before_upload and method in ("POST", "PUT") and re.search("/tester/|/lfs/", path):
            before_upload.update(read_folder(output_dir))

    hub.fail = look
    run = train_fresh(launcher, hub.env() | env, output_dir=output_dir, **flags).ok()
    run.hub, run.before_upload, run.outer, run.repo = hub, before_upload, folder, hub.repos[f"tester/{name}"]
    run.files, run.prompts = run.repo.files, flags.get("validation_prompts", [])
    run.images = [f"samples/step-{last_step:07d}-prompt-{index}.png" for index in range(len(run.prompts))]
    run.trained = run.prior(last_step, "prior_ema" if flags.get("use_ema") else "prior")
    return run


@pytest.fixture(scope="module")
def guide(train_fresh, models, full_encoder, images, tmp_path_factory):
    """The guide's command: everything is loaded from the Hub, with prompts and all trackers. It writes all,
    also wandb's files and a cache, into --output_dir, and pushes to a private repo."""
    folder = tmp_path_factory.mktemp("guide")
    with small_hub(folder, models, full_encoder, images) as hub:
        env = {"WANDB_DIR": folder / "apples", "ACCELERATE_USE_CPU": "true"}
        flags = GUIDE | {"cache_dir": folder / "apples" / "cache", "hub_private_repo": True}
        yield push(train_fresh, hub, folder, "apples", env, 6, ACCELERATE_LAUNCH, **flags)


@pytest.fixture(scope="module")
def minimal(train_fresh, models, full_encoder, images, tmp_path_factory):
    """Local models and images, no prompts, no trackers, the token that `hf auth login` saves."""
    folder = tmp_path_factory.mktemp("minimal")
    with small_hub(folder, models, full_encoder, images) as hub:
        (hub.folder / "client").mkdir(parents=True)
        (hub.folder / "client" / "token").write_text(TOKEN)
        flags = {"pretrained_prior_model_name_or_path": folder / "prior", "seed": None, "report_to": "none"}
        yield push(train_fresh, hub, folder, "plain", {}, 2, **QUICK | flags)


@pytest.fixture(params=["guide", pytest.param("minimal", marks=pytest.mark.slow)])
def pushed(request):
    """Each of the two runs."""
    return request.getfixturevalue(request.param)


def test_exactly_what_a_user_needs_is_uploaded_when_all_is_on_disk(pushed):
    assert set(pushed.files) == EXPECTED_FILES | set(pushed.images)
    assert {name: pushed.before_upload.get(name) for name in pushed.files} == pushed.files
    assert {name: (pushed.folder / name).read_bytes() for name in pushed.files} == pushed.files
    assert len(pushed.repo.commits) == 2, "an empty one, and one with all files"
    assert pushed.repo.private == bool(pushed.images), "only on request"
    assert [name for name, content in pushed.files.items() if str(pushed.outer).encode() in content] == []
    for folder in ("prior_prior", "prior_pipeline/prior"):
        name = f"{folder}/diffusion_pytorch_model.safetensors"
        assert same_weights(load(pushed.files[name]), pushed.trained)


def test_there_were_more_files_that_could_have_been_uploaded(guide):
    names = "\n".join(read_folder(guide.folder))
    more = ["checkpoint-4/optimizer.bin", "checkpoint-6/prior_ema/config.json", r"logs/.*tfevents.*"]
    more += ["samples/step-0000000-prompt-0.png", r"wandb/.*\.png", r"cache/.*model\.safetensors"]
    for pattern in more:
        assert re.search(f"^{pattern}$", names, re.MULTILINE), pattern
    checkpoints = sorted(path.name for path in guide.folder.glob("*checkpoint*"))
    assert checkpoints == ["checkpoint-4", "checkpoint-5", "checkpoint-6"], "--checkpoints_total_limit=3"


def test_the_index_names_the_components_by_classes_that_every_version_has(guide):
    prior = {"prior", "text_encoder", "tokenizer", "scheduler"}
    root = {f"prior_{name}" for name in prior} | prior - {"prior"} | {"decoder", "vqgan"}
    classes = {"prior": "WuerstchenPrior", "decoder": "WuerstchenDiffNeXt", "vqgan": "PaellaVQModel"}
    for prefix, names in {"": root, "prior_pipeline/": prior}.items():
        index = json.loads(guide.files[f"{prefix}model_index.json"])
        assert {name for name, value in index.items() if isinstance(value, list)} == names
        for name in names:
            kind = name.removeprefix("prior_")
            assert kind not in classes or index[name] == ["wuerstchen", classes[kind]]
            if kind == "tokenizer":
                config = json.loads(guide.files[f"{prefix}{name}/tokenizer_config.json"])
                assert {index[name][1], config["tokenizer_class"]} <= {"CLIPTokenizer", "CLIPTokenizerFast"}


def test_the_upload_has_a_progress_bar_and_the_log_lists_no_requests(guide):
    """The URLs that files are sent to are signed: whoever reads one may write there."""
    after_training = guide.output[guide.output.rindex("Steps: 100%") :]
    assert re.search(r"(Upload \d+ LFS files|New Data Upload *): 100%\|", after_training)
    assert guide.hub.url not in guide.output


def test_the_token_is_sent_to_the_hub_and_written_nowhere(pushed):
    """In no byte that is written, printed or uploaded, including working folder, trackers and caches."""
    assert TOKEN not in pushed.output
    paths = [path for folder in (pushed.outer, pushed.place) for path in folder.rglob("*") if path.is_file()]
    found = {path.name for path in paths if TOKEN.encode() in path.read_bytes()}
    assert found <= {"token"}, "of hf auth login"
    tokens = [token for _, path, token in pushed.hub.requests if re.search("/commit/|/repos/create", path)]
    assert tokens == [f"Bearer {TOKEN}"] * 2
    if pushed.images:
        records = b"".join(record.SerializeToString() for record in read_wandb(pushed.folder))
        assert b"--hub_token" in records, "wandb records the command line, so this can fail"
        (settings,) = (pushed.folder / "logs").rglob("hparams.yml")
        assert "seed" in settings.read_text()


def test_the_repo_is_created_before_anything_is_loaded(guide):
    requests = [f"{method} {path}" for method, path, _ in guide.hub.requests]
    before = requests[: requests.index("POST /api/repos/create")]
    assert not [line for line in before if "/resolve/" in line or "/tree/" in line]
    assert ("POST", "/api/validate-yaml", f"Bearer {TOKEN}") in guide.hub.requests


# --------------------------------------------------------------------------------------------- the model card


@pytest.mark.slow
@pytest.mark.parametrize("pushed", ["minimal"], indirect=True)
def test_the_cards_code_generates_an_image_from_the_hub(pushed, tmp_path):
    """In an empty folder, with an empty cache, it generates the image that the pipeline on disk does, of the
    samples' size: 64 pixels are latents of 2 x 2, for which the decoder has no size; 3 x 3 is the nearest."""
    (code,) = re.findall(r"```python\n(.*?)```", pushed.files["README.md"].decode(), re.DOTALL)
    seeded = f"import torch; torch.manual_seed(7); exec({code!r})"
    env = pushed.hub.env(TOKEN) | {"HF_HOME": tmp_path / "home", "CUDA_VISIBLE_DEVICES": ""}
    done = run_command([sys.executable, "-c", seeded], env, tmp_path)
    assert done.returncode == 0, done.stdout
    pipeline = AutoPipelineForText2Image.from_pretrained(pushed.folder)
    assert script.decoder_image_size(pipeline.decoder_pipe, 64) == 128
    assert all(Image.open(path).size == (128, 128) for path in (pushed.folder / "samples").glob("step-*"))
    torch.manual_seed(7)
    expected = pipeline(
        [*pushed.prompts, "a photo"][0], width=128, height=128, prior_guidance_scale=4.0
    ).images[0]
    assert np.array_equal(np.asarray(Image.open(tmp_path / "image.png")), np.asarray(expected))


def test_the_card_says_what_was_trained_on_what_and_how(guide):
    card = guide.files["README.md"].decode()
    assert {name: value for name, value in ModelCard(card).data.to_dict().items() if value} == {
        "base_model": BASE,
        "datasets": [DATA],
        "library_name": "diffusers",
        "pipeline_tag": "text-to-image",
        "tags": ["wuerstchen", "text-to-image", "diffusers", "diffusers-training"],
    }
    text = " ".join(card.split())
    assert f"**{BASE}**, fine-tuned on **{DATA}**." in text
    length = "For 6 steps of 16 samples, 12.0 epochs of 8 rows"
    assert f"{length}, on 1 x cpu: ```bash" in text
    (command,) = re.findall(r"```bash\n(.*)\n```", card)
    pasted = vars(script.parse_args(shlex.split(command)[3:]))
    seed = json.loads((guide.folder / "checkpoint-6" / "trainer_state.json").read_text())["plan"]["seed"]
    assert pasted["seed"] == seed, "the one that was chosen at random"
    public = GUIDE | {"learning_rate": 1e-5, "hub_private_repo": True}
    for name in public.keys() - {*DEFAULTS, f"hub_token={TOKEN}", "dataloader_num_workers"}:
        assert pasted[name] == public[name], name


@pytest.mark.slow
def test_the_card_of_a_local_run_names_nothing_that_is_not_on_the_hub(minimal):
    card = minimal.files["README.md"].decode()
    metadata = {name: value for name, value in ModelCard(card).data.to_dict().items() if value}
    assert metadata.keys() == {"library_name", "pipeline_tag", "tags"}
    assert "fine-tuned on **local images**" in card
    assert re.findall(r"!\[.*?\]\((.*?)\)", card) == ["loss.png"]


def test_the_cards_images_are_the_last_samples_and_the_loss_curve(guide, tmp_path):
    shown = re.findall(r"!\[.*?\]\((.*?)\)", guide.files["README.md"].decode())
    assert shown == [*guide.images, "loss.png"] and len(guide.images) == 2
    lines = (guide.folder / "loss.jsonl").read_text().splitlines(keepends=True)
    uploaded = np.asarray(Image.open(guide.folder / "loss.png"))
    for count in (len(lines), len(lines) - 1):
        (tmp_path / "loss.jsonl").write_text("".join(lines[:count]))
        script.save_loss_curve(tmp_path)
        curve = np.asarray(Image.open(tmp_path / "loss.png"))
        assert np.array_equal(uploaded, curve) == (count == len(lines)), "not without the last step"


# -------------------------------------------------------------------------------- the result and its loading


def test_the_guides_snippet_and_the_prior_pipeline_have_the_trained_prior(guide, models):
    names = {}
    exec(SNIPPET.format(path=str(guide.folder)), names)
    assert [image.size for image in names["images"]] == [(128, 256)] * 2
    assert not np.array_equal(*map(np.asarray, names["images"]))
    pipeline = names["pipeline"]
    assert {value.dtype for value in guide.trained.values()} == {torch.float32}
    assert same_weights(dict(pipeline.prior_prior.named_parameters()), guide.trained)
    assert not same_weights(guide.trained, load_weights(models / "prior" / "prior"))
    assert is_pretrained_text_encoder(pipeline.prior_text_encoder, models)
    decoder = load_weights(models / "decoder" / "decoder")
    assert same_weights(dict(pipeline.decoder.named_parameters()), decoder)

    pipeline = DiffusionPipeline.from_pretrained(guide.folder / "prior_pipeline")
    assert type(pipeline).__name__ == "WuerstchenPriorPipeline"
    assert same_weights(dict(pipeline.prior.named_parameters()), guide.trained)
    assert is_pretrained_text_encoder(pipeline.text_encoder, models)
    assert (pipeline.config.latent_mean, pipeline.config.latent_std) == (42.0, 1.0)
    embeds = pipeline("a bird", width=128, height=128, output_type="pt").image_embeddings
    assert embeds.shape == (1, 16, 3, 3)
    assert embeds.isfinite().all()


def test_transformers_4_can_load_the_result(train, models, tmp_path):
    """Version 4 expects a prefix of the tensors' names that version 5 omits, and older tokenizer files."""
    shutil.copytree(models / "prior", tmp_path / "prior")
    published = tmp_path / "prior" / "text_encoder" / "model.safetensors"
    weights = load_file(published).items()
    weights = {f"text_model.{name.removeprefix('text_model.')}": value for name, value in weights}
    save_file(weights, published, metadata={"format": "pt"})
    run = train(pretrained_prior_model_name_or_path=tmp_path / "prior", max_train_steps=1).ok()
    for prefix in ("prior_pipeline/", "prior_"):
        assert same_weights(load_file(run.folder / f"{prefix}text_encoder" / "model.safetensors"), weights)

    def read_tokenizer(folder):
        _, *merges = (folder / "merges.txt").read_text().split("\n")
        return json.loads((folder / "vocab.json").read_text()), [line for line in merges if line]

    for name in ("prior_pipeline/tokenizer", "prior_tokenizer", "tokenizer"):
        assert read_tokenizer(run.folder / name) == read_tokenizer(models / "decoder" / "tokenizer")


def test_torch_dynamo_leaves_no_local_path_in_the_result(train, models):
    compiled = train(env={"ACCELERATE_DYNAMO_BACKEND": "EAGER"}, max_train_steps=1, report_to="none").ok()
    plain = train(max_train_steps=1, report_to="none")
    assert distance(compiled.prior(), plain.prior()) < 1e-6
    files = [path for run in (compiled, plain) for path in run.folder.rglob("*.json")]
    assert len(files) > 20
    assert [path for path in files if str(models) in path.read_text()] == []


# -------------------------------------------------------------------------------------- versions of diffusers


@pytest.fixture(scope="module")
def newest_diffusers(tmp_path_factory):
    """A folder for PYTHONPATH with the newest diffusers: $NEWEST_DIFFUSERS, or installed from PyPI."""
    if "NEWEST_DIFFUSERS" in os.environ:
        return os.environ["NEWEST_DIFFUSERS"]
    folder = tmp_path_factory.mktemp("newest-diffusers")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", folder, "diffusers"]
    subprocess.run(pip, check=True, capture_output=True)
    return str(folder)


LOAD_AND_GENERATE = """
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


@pytest.mark.slow
def test_each_version_of_diffusers_trains_alike_and_loads_what_the_other_saves(
    newest_diffusers, train, train_fresh
):
    flags = {"use_ema": True, "validation_prompts": PROMPTS[:1], "max_train_steps": 2}
    newest = train_fresh(env={"PYTHONPATH": newest_diffusers}, **flags).ok()
    here = train(**flags | newest.encoder).ok()
    for name in ("prior", "prior_ema"):
        assert distance(newest.prior(2, name), here.prior(2, name)) < 1e-6
    index = json.loads((newest.folder / "model_index.json").read_text())
    assert index["prior_prior"] == ["wuerstchen", "WuerstchenPrior"]
    paths = [str(here.folder), str(newest.folder)]
    for env in ({}, {"PYTHONPATH": newest_diffusers}):
        code = LOAD_AND_GENERATE.format(paths=paths, snippet=SNIPPET.format(path="PATH"))
        done = run_command([sys.executable, "-c", code], env)
        assert done.returncode == 0, done.stdout
        totals = re.findall(r"generated with \S+ (\S+)", done.stdout)
        for run, total in zip((here, newest), totals, strict=True):
            expected = sum(value.double().sum().item() for value in run.prior().values())
            assert float(total) == pytest.approx(expected, abs=1e-6)


# ------------------------------------------------------------------------------------- outages and refusals

# The Hub's client waits longer before each retry.
SHORT_SLEEP = "import time\ntime.sleep = lambda seconds, sleep=time.sleep: sleep(min(seconds, 0.1))"
TRY_TWICE_BEFORE = """
import sys
argv = sys.argv[1:]
for _ in range(2):
    try:
        script.main(argv)
    except SystemExit as end:
        print(end)
sys.argv[1:] = argv  # without the token's mask
"""


@pytest.mark.slow
def test_a_push_that_fails_is_an_error_and_the_command_pushes_later(train_fresh, models, images, tmp_path):
    """After training the Hub answers 503, or the token is not known any more, or the connection is cut: three
    runs in one process. The fourth pushes what they have written."""
    flags = QUICK | {"validation_prompts": PROMPTS, "output_dir": tmp_path / "out", "hub_token": TOKEN}
    flags |= {"report_to": "tensorboard,wandb"}
    expected = EXPECTED_FILES | {f"samples/step-0000002-prompt-{index}.png" for index in (0, 1)}
    faults = []
    with HubServer(tmp_path / "hub") as hub:

        def fail(method, path):
            if path == "/api/repos/create":  # a run starts
                faults.append(["503", "401", "cut", "none"][len(faults)])
                hub.tokens = dict(TOKENS)
                (tmp_path / "out" / "README.md").unlink(missing_ok=True)
            if not (tmp_path / "out" / "README.md").exists():
                return None
            if faults[-1] == "401":
                hub.tokens.pop(TOKEN, None)
            return {"503": "/commit/" in path and 503, "cut": method == "PUT" and CUT}.get(faults[-1])

        hub.fail = fail
        patch = SHORT_SLEEP + TRY_TWICE_BEFORE
        run = train_fresh(env=hub.env(), patch=patch, overwrite_output_dir=True, **flags)
        assert faults == ["503", "401", "cut"] and run.returncode == 1, run
        assert "Traceback" not in run.output and TOKEN not in run.output, run
        reasons = re.findall("^--push_to_hub=True: (.*)", run.output, re.MULTILINE)
        assert len(reasons) == 3 and "503" in reasons[0] and "401" in reasons[1], run
        assert run.output.count("to publish: the same command with --resume_from_checkpoint=latest") == 3
        repo = hub.repos["tester/out"]
        assert repo.files == {} and set(read_folder(run.folder)) >= expected
        assert list(run.logged("train_loss")) == [1, 2], "the trackers are complete"
        assert list(run.logged("validation/1")) == [0, 2]
        files = [path for folder in (run.folder, run.place) for path in folder.rglob("*")]
        assert not any(TOKEN.encode() in path.read_bytes() for path in files if path.is_file())

        train_fresh(env=hub.env(), resume_from_checkpoint="latest", **flags).ok()
        assert set(repo.files) == expected
        assert {name: (run.folder / name).read_bytes() for name in repo.files} == repo.files
        assert same_weights(load(repo.files["prior_prior/diffusion_pytorch_model.safetensors"]), run.prior(2))


REFUSED = {  # flags, and the reason in the message
    "an unknown token": ({"hub_token": UNKNOWN_TOKEN, "hub_model_id": "tester/new"}, "401"),
    "a carriage return": ({"hub_token": f"{UNKNOWN_TOKEN}\r", "hub_model_id": "tester/new"}, "401"),
    "no token": ({"hub_model_id": "tester/new"}, "hf auth login"),
    "a read-only token, new repo": ({"hub_token": READ_TOKEN, "hub_model_id": "tester/new"}, "403"),
    "a read-only token": ({"hub_token": READ_TOKEN, "hub_model_id": "tester/existing"}, "403"),
    "another user's repo": ({"hub_token": TOKEN, "hub_model_id": "other/public"}, "403"),
    "another user's private repo": ({"hub_token": TOKEN, "hub_model_id": "other/secret"}, "403"),
    "an invalid name": ({"hub_token": TOKEN, "hub_model_id": "my run!"}, "Repo id must"),
}
RUN_EACH = """
import json, os
import train_text_to_image_prior as script
messages = {}
for name, args in json.loads(os.environ["RUNS"]).items():
    try:
        script.main(args)
    except SystemExit as end:
        messages[name] = end.code
print(json.dumps(messages))
"""


@pytest.mark.slow
def test_a_repo_that_cannot_be_written_is_refused_at_the_start(models, tmp_path):
    """In one process after another. The images do not exist, which is checked later."""
    folders = (models, tmp_path / "nowhere", tmp_path / "out")
    runs = {name: tiny_args(*folders, **QUICK | flags) for name, (flags, _) in REFUSED.items()}
    with HubServer(tmp_path / "hub", tokens=TOKENS) as hub:
        for repo_id in ("tester/existing", "other/public", "other/secret"):
            hub.add_repo(repo_id, models / "prior", private=repo_id == "other/secret")
        env = hub.env() | {"RUNS": json.dumps(runs, default=str), "PYTHONPATH": SCRIPT.parent}
        done = run_command([sys.executable, "-c", RUN_EACH], env)
    assert done.returncode == 0, done.stdout
    messages = json.loads(done.stdout.splitlines()[-1])
    for name, (flags, reason) in REFUSED.items():
        pattern = f"--hub_model_id={re.escape(flags['hub_model_id'])}: .*{reason}.*"
        assert re.fullmatch(pattern, messages[name]), name
    assert read_folder(tmp_path / "out").keys() == {".lock"}
    assert set(hub.repos) == {"tester/existing", "other/public", "other/secret"}
    assert {len(repo.commits) for repo in hub.repos.values()} == {1}
    assert [token for token in (TOKEN, READ_TOKEN, UNKNOWN_TOKEN) if token in done.stdout] == []
