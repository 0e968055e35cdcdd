# SPDX-License-Identifier: Apache-2.0
"""Arguments and setup: a wrong setting ends in one line that names the flag and the remedy, not in a
traceback, and Accelerate's environment does not override a flag."""

import importlib.util
import json
import os
import re
import shutil

import pytest
import torch
from conftest import same_weights, script
from tiny_models import save_published_encoder
from transformers import CLIPTextConfig, CLIPTextModel

from modeling_efficient_net_encoder import EfficientNetEncoder

LOGGED = re.compile(r"\d\d:\d\d:\d\d (INFO|WARNING) ")  # by the script itself
PROGRESS = re.compile(r"\d+%\|.*\||\d+ examples ")


def assert_refused(run, *patterns):
    """The run failed with one line, its last, which has each of the patterns, and has trained nothing."""
    assert run.returncode == 1 and "Traceback" not in run.output, run
    output = [line for line in run.output.splitlines() if line.strip()]
    lines = [line for line in output if not LOGGED.match(line) and not PROGRESS.search(line)]
    assert len(lines) == 1 and output[-1] == lines[0], run
    for pattern in patterns:
        assert re.search(pattern, lines[0]), f"{pattern} is not in: {lines[0]}"


@pytest.fixture
def refused(train):
    """refused(*patterns, **flags): a run with these flags is refused. It trains and writes nothing."""

    def check(*patterns, **flags):
        run = train(**flags)
        assert_refused(run, *patterns)
        written = {path.name for path in run.folder.glob("*")}
        assert written <= {".lock", "logs", "loss.jsonl", "loss.png"}
        assert "loss.jsonl" not in written or not run.losses()

    return check


# ----------------------------------------------------------------------------------------- the command line


def parse(*argv):
    return script.parse_args(["--train_data_dir=images", *argv])


POSITIVE = "max_train_samples train_batch_size gradient_accumulation_steps num_train_epochs max_train_steps "
POSITIVE += "checkpointing_steps checkpoints_total_limit validation_epochs validation_steps validation_size"
NATURAL = "dataloader_num_workers lr_warmup_steps seed"
NUMBERS = {
    "must be at least 1 .*": (POSITIVE, "0 -1"),
    "invalid int value": (f"{POSITIVE} {NATURAL} resolution", "2.5 many"),
    "must be at least 0 .*": (NATURAL, "-1"),
    "must be at least 0 and below inf": ("learning_rate adam_weight_decay adam_epsilon", "-0.1 nan inf"),
    "must be at least 0 and below 1": ("adam_beta1 adam_beta2 caption_dropout", "-0.1 1 nan"),
    "must be at least 1e-08": ("max_grad_norm", "0 -1 nan"),  # nothing would be trained
    "must be at least 1e-09": ("validation_split", "0 -1 nan"),
    "must be at least 32": ("resolution", "31 0 -64"),
}
WRONG = [
    ([f"--{flag}={value}"], f"--{flag}: {message}.*{value}")
    for message, (flags, values) in NUMBERS.items()
    for flag in flags.split()
    for value in values.split()
]
WRONG += [([f"--random_{n}", "--cache_latents"], f"--cache_latents .*--random_{n}") for n in ("crop", "flip")]
RULES = "--lr_scheduler=piecewise_constant and --lr_step_rules need each other"
WRONG += [
    (["--learnin_rate=1"], "--learnin_rate"),
    (["--lr_scheduler=cosin"], "--lr_scheduler: invalid choice: 'cosin'.*constant.*cosine"),
    (["--mixed_precision=fp8"], "--mixed_precision: invalid choice: 'fp8'.*no.*fp16.*bf16"),
    (["--lr_scheduler=piecewise_constant"], RULES),
    (["--lr_scheduler=cosine", "--lr_step_rules=1:2,0.1"], RULES),
    (["--validation_size", "1024"], "--validation_size needs pairs"),
    (["--validation_size", "1024", "1536", "64"], "--validation_size needs pairs"),
    (["--compile", "--aspect_ratio_buckets"], "--compile .*--aspect_ratio_buckets"),
    (["--offload_ema"], "--offload_ema needs --use_ema"),
    (["--report_to=tensorboard,aim"], "--report_to=tensorboard,aim: .*tensorboard.*all.*none"),
]


@pytest.mark.parametrize(("argv", "pattern"), WRONG, ids=[ascii(" ".join(argv)) for argv, _ in WRONG])
def test_a_wrong_flag_is_refused_by_its_name(argv, pattern, capsys):
    with pytest.raises(SystemExit) as ended:
        parse(*argv)
    assert ended.value.code == 2
    assert re.search(f"error: .*{pattern}", capsys.readouterr().err.splitlines()[-1])


def test_no_data_and_a_missing_library_are_refused_by_their_flags(capsys, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    eight_bit = "--optimizer=adamw8bit needs bitsandbytes: `pip install"
    for call, message in (
        (lambda: script.parse_args([]), "give --dataset_name or --train_data_dir"),
        (lambda: parse("--use_8bit_adam"), eight_bit),
    ):
        with pytest.raises(SystemExit):
            call()
        assert message in capsys.readouterr().err.splitlines()[-1]


DEFAULTS = """--pretrained_decoder_model_name_or_path=warp-ai/wuerstchen
--pretrained_prior_model_name_or_path=warp-ai/wuerstchen-prior --image_column=image --caption_column=text
--validation_epochs=5 --resolution=512 --train_batch_size=1 --num_train_epochs=100 --learning_rate=1e-4
--gradient_accumulation_steps=1 --lr_scheduler=constant --lr_warmup_steps=500 --dataloader_num_workers=0
--adam_beta1=0.9 --adam_beta2=0.999 --adam_weight_decay=0 --adam_epsilon=1e-8 --max_grad_norm=1
--logging_dir=logs --report_to=tensorboard --local_rank=-1 --checkpointing_steps=500
--tracker_project_name=text2image-fine-tune --output_dir=wuerstchen-model-finetuned
--pretrained_image_encoder_name_or_path=dome272/wuerstchen --optimizer=adamw --loss_weighting=none
--timestep_sampling=uniform --caption_dropout=0"""  # from the image encoder on flags of ours
NONE = """dataset_name dataset_config_name max_train_samples validation_prompts cache_dir seed max_train_steps
hub_token hub_model_id mixed_precision checkpoints_total_limit resume_from_checkpoint"""
OFF = "gradient_checkpointing allow_tf32 use_ema push_to_hub"


def test_the_references_flags_keep_their_names_and_defaults():
    assert parse(*DEFAULTS.split()) == parse()
    assert {name for name, value in vars(parse()).items() if value is None} >= {*NONE.split()}
    on = vars(parse(*(f"--{flag}" for flag in OFF.split())))
    assert all(on[flag] is True and vars(parse())[flag] is False for flag in OFF.split())


@pytest.mark.parametrize(
    ("argv", "value"),
    [
        ("--validation_prompts=owl", ["owl"]),
        ("--local-rank=3", 3),  # as launchers spell it
        ("--output_dir=~/run", os.path.expanduser("~/run")),
        ("--train_data_dir=~/images", os.path.expanduser("~/images")),
        ("--pretrained_prior_model_name_or_path=~", os.path.expanduser("~")),
        *((f"--{flag}=0", 0) for flag in ("seed", "lr_warmup_steps", "caption_dropout", "learning_rate")),
        *((f"--{flag}=1", 1) for flag in POSITIVE.split()[:-1]),
        ("--resolution=32", 32),
    ],
)
def test_a_flag_is_parsed_to_what_it_means(argv, value):
    name = argv[2:].split("=")[0].replace("-", "_")
    assert getattr(parse(argv), name) == value


def test_other_names_of_flags_mean_the_same():
    assert parse("--validation_prompt=owl") == parse("--validation_prompts=owl"), "the first is the guide's"
    pytest.importorskip("bitsandbytes")
    assert parse("--use_8bit_adam") == parse("--optimizer=adamw8bit") != parse()


def test_help_shows_every_flag_with_its_default_in_ascii(capsys):
    with pytest.raises(SystemExit) as ended:
        parse("--help")
    assert ended.value.code == 0
    text = capsys.readouterr().out
    entries = re.split(r"\n  (?=--)", text.split("models, each")[1])[1:]
    entries = {entry.split()[0].strip(","): "".join(entry.split("\n\n")[0].split()) for entry in entries}
    defaults = vars(parse()) | {"train_data_dir": None, "use_8bit_adam": None}
    assert entries.keys() == {f"--{name}" for name in defaults} and text.isascii()
    for name, value in defaults.items():
        assert f"(default:{value})" in entries[f"--{name}"], name


# ------------------------------------------------------------------------------------------------------ data


@pytest.mark.parametrize(
    ("flags", "pattern"),
    [
        ({"train_data_dir": "nowhere"}, "^--train_data_dir=nowhere: .*No such file or directory"),
        ({"train_data_dir": "."}, "^--train_data_dir=.: .*no captioned images"),
        ({"dataset_name": "no/such-set"}, "^--dataset_name=no/such-set: .*no/such-set"),
        ({"image_column": "text"}, "^--image_column=text: .*string.*, not images"),
    ],
)
def test_data_or_a_column_that_is_not_there_is_refused(refused, flags, pattern):
    """More of them are in test_folders.py."""
    refused(pattern, patch=forbid_models, **flags)


def test_dataset_name_has_precedence_over_train_data_dir(train, images):
    flags = {"dataset_name": images, "train_data_dir": "unused", "max_train_samples": 8, "max_train_steps": 1}
    run = train(**flags)
    assert run.returncode == 0 and re.search(r"\b8 rows\b", run.output), run


def forbid_models():
    script.load_encoders = script.load_prior = script.load_decoder = None


def test_bad_rows_end_the_run_before_models_are_loaded_or_are_left_out(images, refused, train, tmp_path):
    folder = shutil.copytree(images, tmp_path / "data")
    lines = (images / "metadata.jsonl").read_text().splitlines()[:5]
    (folder / "metadata.jsonl").write_text("\n".join([lines[0], '{"file_name": "nowhere.png"}', *lines[1:]]))
    reason = (
        r"1 of 6 rows cannot be used, the first: row 1 \(.*/data/nowhere.png\): .*No such file or direc.*"
    )
    refused(f"^{reason}; fix them, or skip .*--skip_bad_rows$", patch=forbid_models, train_data_dir=folder)
    run = train(train_data_dir=folder, skip_bad_rows=True)
    assert run.returncode == 0 and re.search(f"WARNING .*{reason}\n", run.output), run
    assert re.search(r"\b5 rows\b", run.output)


def test_settings_that_are_rarely_meant_are_reported(train):
    run = train(max_train_samples=3, max_train_steps=1, validation_prompts="moon " * 80).ok()
    assert re.search("WARNING .*Of 4 captions and prompts 1 are cut to 77 tokens, 0 empty", run.output), run
    epochs = {"max_train_samples": 8, "gradient_accumulation_steps": 2, "num_train_epochs": 3}
    run = train(**epochs, max_train_steps=None, lr_scheduler="cosine", lr_warmup_steps=2).ok()
    assert "WARNING [RANK" not in run.output and max(run.losses()) == 3, "steps of eight samples"


# ------------------------------------------------------------------------------------------ models and output


FLAGS = {"prior": "prior_model", "decoder": "decoder_model", "encoder": "image_encoder"}
BROKEN = {  # files of models; test_models.py has pointers in place of weights
    "prior/text_encoder/model.safetensors": ["truncated"],
    "prior/tokenizer/tokenizer.json": ["truncated"],
    "prior/prior/diffusion_pytorch_model.safetensors": ["truncated"],
    "decoder/decoder/diffusion_pytorch_model.safetensors": ["truncated"],
    "decoder/vqgan/config.json": ["truncated", "pointer"],
    "decoder/text_encoder/model.safetensors": ["truncated"],
    "decoder/model_index.json": ["truncated", "pointer"],
    "encoder/diffusion_pytorch_model.safetensors": ["truncated"],
    "encoder/model_v2_stage_b.pt": ["truncated", "pointer"],
}
POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 123456\n"


@pytest.mark.parametrize(("path", "kind"), [(path, kind) for path in BROKEN for kind in BROKEN[path]])
def test_a_model_with_a_broken_file_is_refused(train, models, full_encoder, tmp_path, path, kind):
    """Also the decoder of a run without prompts: its result needs it."""
    name, file = path.split("/")[0], tmp_path / path
    shutil.copytree(models / name, tmp_path / name)
    if file.suffix == ".pt":
        save_published_encoder(EfficientNetEncoder.from_pretrained(full_encoder), file)
    content = file.read_bytes()
    file.write_bytes(POINTER.encode() if kind == "pointer" else content[: len(content) // 2])
    flag, value = f"pretrained_{FLAGS[name]}_name_or_path", file if file.suffix == ".pt" else tmp_path / name
    run = train(**{flag: value})
    reason = f"{file} is a Git LFS pointer" if kind == "pointer" else ""
    assert run.error().startswith(f"--{flag}={value}: {reason}"), run
    assert not (run.folder / "loss.jsonl").exists() and not (run.folder / "logs").exists()


@pytest.mark.parametrize(("name", "other"), zip(FLAGS, ["decoder", "prior", "decoder"], strict=True))
def test_another_model_or_none_is_refused(refused, train, models, name, other):
    flag = f"pretrained_{FLAGS[name]}_name_or_path"
    refused(f"^--{flag}=.*{other}: ", **{flag: models / other})
    refused(f"^--{flag}=/nowhere: .*nowhere", **{flag: "/nowhere"})
    error = train(**{flag: "nobody/nothing"}).error()  # a library may warn, as well
    reason = "it is not a local folder, not in the cache, and the Hub cannot be reached"
    assert error == f"--{flag}=nobody/nothing: {reason}"


def test_encoders_that_do_not_fit_are_refused(refused, models, tmp_path):
    shutil.copytree(models / "prior", tmp_path / "prior")
    config = json.loads((tmp_path / "prior" / "text_encoder" / "config.json").read_text())
    config |= {"hidden_size": 64, "intermediate_size": 64, "projection_dim": 64}
    CLIPTextModel(CLIPTextConfig(**config)).save_pretrained(tmp_path / "prior" / "text_encoder")
    flag = "pretrained_prior_model_name_or_path"
    refused(rf"^--{flag}=.*\[16, 32\].*\[16, 64\]", **{flag: tmp_path / "prior"})
    EfficientNetEncoder(c_latent=4).save_pretrained(tmp_path / "encoder")
    other = "pretrained_image_encoder_name_or_path"
    refused(rf"^--{flag}=.*\[16, 32\].*\[4, 32\]", **{other: tmp_path / "encoder"})
    torch.save({"state_dict": {}}, tmp_path / "other.pt")
    refused(f"^--{other}=.*other.pt: .*effnet_state_dict", **{other: tmp_path / "other.pt"})


def test_an_output_dir_that_is_a_file_is_refused(train, tmp_path):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "run"):
        run = train(output_dir=folder, patch=forbid_models)
        assert_refused(run, f"^--output_dir={folder}: .*(File exists|Not a directory)")


# --------------------------------------------------------------------------------- Accelerate's configuration


@pytest.mark.slow
def test_accumulation_steps_in_the_environment_do_not_override_the_flag(train):
    """`accelerate launch` exports its configuration's number."""
    flags = {"gradient_accumulation_steps": 2, "max_train_steps": 3, "record": True}
    env = {"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "3"}
    expected, run = train(**flags).ok(), train(env=env, **flags).ok()
    for each in (expected, run):
        assert (len(each.record["steps"]), len(each.record["clipped"])) == (3 * 2, 3)
    assert run.logged("train_loss") == expected.logged("train_loss")
    assert run.logged("grad_norm") == expected.logged("grad_norm")
    assert same_weights(run.prior(), expected.prior())


# ---------------------------------------------------------------------------------------------- earlier runs


@pytest.mark.parametrize(
    ("flag", "value", "pattern"),
    [
        ("resume_from_checkpoint", "checkpoint-7", "^--resume_from_checkpoint=checkpoint-7: .*no complete"),
        ("resume_from_checkpoint", "/nowhere", "^--resume_from_checkpoint=/nowhere: .*no complete"),
        ("train_batch_size", 2, "checkpoint-2 .*samples_per_step=4, not 2$"),
        ("gradient_accumulation_steps", 2, "checkpoint-2 .*samples_per_step=4, not 8$"),
        ("max_train_samples", 32, "checkpoint-2 .*num_rows=64, not 32$"),
        ("seed", 1, "checkpoint-2 .*seed=0, not 1$"),
        ("aspect_ratio_buckets", True, "checkpoint-2 .*buckets=False, not "),
    ],
)
def test_another_plan_of_samples_is_refused_and_no_file_changes(train, tmp_path, flag, value, pattern):
    run = train(max_train_steps=2, checkpointing_steps=2, report_to="none").ok()
    assert not list(run.folder.rglob("events.out.*")), "of --report_to=none"
    folder = shutil.copytree(run.folder, tmp_path / "earlier")

    def times():
        files = [path for path in folder.rglob("*") if path.is_file() and path.name != ".lock"]
        return {path: path.stat().st_mtime_ns for path in files}

    before, flags = times(), {"output_dir": folder, "max_train_steps": 4, "resume_from_checkpoint": "latest"}
    assert_refused(train(**flags | {flag: value}), pattern)
    assert times() == before
