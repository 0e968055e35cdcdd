# SPDX-License-Identifier: Apache-2.0
"""Arguments and setup: a wrong setting ends in one line that names the flag and the remedy, not in a
traceback, and Accelerate's environment does not override a flag."""

import importlib.util
import json
import os
import re
import shutil

import datasets
import pytest
import torch
from conftest import same_weights, script
from PIL import Image
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
WRONG += [([f"--{flag}="], f"--{flag} is empty") for flag in ("train_data_dir", "hub_token", "output_dir")]
WRONG += [
    ([f"--adam_{n}=0.5", "--optimizer=adafactor"], f"--adam_{n}") for n in ("beta1", "beta2", "epsilon")
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
    (["--validation_prompts", "an owl", "half an emoji \ud83e"], "--validation_prompts are not UTF-8"),
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
        ("--report_to=tensorboard, wandb", "tensorboard,wandb"),
        ("--report_to=", "none"),
        ("--report_to= none", "none"),
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


NO_CAPTIONS = r"has no captioned images.*metadata.jsonl.*\"file_name\": .*\"text\": .*txt"
SPLIT = "no rows in a split named train, only in test"
FOUND = ["metadata.csv", "a.png"]
DATA = [
    (None, {}, "^--train_data_dir=.*/data: .*No such file or directory"),
    ([], {}, f"^--train_data_dir=.*/data: .*{NO_CAPTIONS}"),
    (["notes.txt"], {}, f"^--train_data_dir=.*/data: .*{NO_CAPTIONS}"),
    (["a.png", "b.jpg"], {}, f"^--train_data_dir=.*/data: .*{NO_CAPTIONS}"),
    (["test/a.png", "test/a.txt"], {}, f"^--train_data_dir=.*/data: .*{SPLIT}"),
    (FOUND, {"image_column": "img"}, "^--image_column=img: .*image.*text"),
    (FOUND, {"image_column": "text"}, "^--image_column=text: .*string.*, not images"),
    (FOUND, {"caption_column": "caption"}, "^--train_data_dir=.* no column caption, only .*text"),
    (["rows.parquet"], {}, "^--image_column=image: .*label.*, not images"),
    (None, {"dataset_name": "no/such-set"}, "^--dataset_name=no/such-set: .*no/such-set"),
]


@pytest.mark.parametrize(("files", "flags", "pattern"), DATA)
def test_a_folder_or_column_without_rows_to_train_on_is_refused(refused, tmp_path, files, flags, pattern):
    (tmp_path / "data").mkdir() if files is not None else None
    for file in files or []:
        path = tmp_path / "data" / file
        path.parent.mkdir(exist_ok=True)
        if path.suffix == ".parquet":
            rows = {"image": [{"data": b"no image", "label": 1}], "text": ["a cat"]}
            datasets.Dataset.from_dict(rows).to_parquet(path)
        elif path.suffix in (".txt", ".csv"):
            path.write_text("file_name,text\na.png,a cat\n")
        else:
            Image.new("RGB", (64, 64)).save(path)
    refused(pattern, **{"train_data_dir": tmp_path / "data"} | flags)


def test_dataset_name_has_precedence_over_train_data_dir(train, images):
    flags = {"dataset_name": images, "train_data_dir": "unused", "max_train_samples": 8, "max_train_steps": 1}
    run = train(**flags)
    assert run.returncode == 0 and re.search(r"\b8 rows\b", run.output), run


@pytest.fixture
def six_rows(images, tmp_path):
    """six_rows(changes, number=6): a folder of the first six images, and of that many rows with changes."""

    def write(changes, number=6):
        rows = [json.loads(line) for line in (images / "metadata.jsonl").read_text().splitlines()][:6]
        folder = tmp_path / "six"
        folder.mkdir()
        for row in rows:
            shutil.copy(images / row["file_name"], folder)
        rows = [row | changes.get(index, {}) for index, row in enumerate(rows[:number])]
        (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
        return folder

    return write


def forbid_models():
    script.load_encoders = script.load_prior = script.load_decoder = None


def test_missing_images_and_captions_end_the_run_before_models_are_loaded(six_rows, refused, train):
    folder = six_rows({1: {"file_name": "nowhere.png"}, 4: {"text": None}})
    reason = r"2 of 6 rows cannot be used, the first: row 1 \(.*/six/nowhere.png\): .*No such file or direc.*"
    refused(f"^{reason}; fix them, or skip .*--skip_bad_rows$", patch=forbid_models, train_data_dir=folder)
    run = train(train_data_dir=folder, skip_bad_rows=True)
    assert run.returncode == 0 and re.search(f"WARNING .*{reason}\n", run.output), run
    assert re.search(r"\b4 rows\b", run.output)


def test_an_unreadable_row_ends_the_run_with_its_number_and_file(refused, six_rows):
    folder = six_rows({2: {"file_name": "metadata.jsonl"}})
    refused(r"^row 2: .*metadata.jsonl.*cannot identify.*--skip_bad_rows$", train_data_dir=folder)


def test_what_is_rarely_meant_is_reported(six_rows, train):
    """The text encoder's 77 tokens include those of the beginning and the end."""
    texts = {0: " ".join(["apple"] * 75), 1: " ".join(["apple"] * 76), 2: "", 3: " ".join(["pear"] * 200)}
    folder = six_rows({row: {"text": text} for row, text in texts.items()}, number=4)
    for hidden in (".thumbnails", "__MACOSX"):
        shutil.copytree(folder, folder / hidden, ignore=shutil.ignore_patterns(".*", "__*", "*.jsonl"))
    flags = {"lr_scheduler": "cosine", "lr_warmup_steps": 3, "train_batch_size": 5, "resolution": 80}
    run = train(train_data_dir=folder, validation_prompts=["moon", "moon " * 80], **flags)
    assert run.returncode == 0 and "Found 4 captioned images in" in run.output, run
    for line in (
        "2 images without captions are not used: .*/six/0004",
        "Of 6 captions and prompts 3 are cut to 77 tokens, 1 empty",
        "--resolution=80 is rounded up to a multiple of 32",
        "more samples than there are rows",
        "--lr_warmup_steps=3 is not shorter than the run",
    ):
        assert re.search(f"WARNING .*{line}", run.output), (line, run)
    run = train(max_train_samples=4, lr_scheduler="cosine", lr_warmup_steps=2, validation_prompts="moon")
    assert run.returncode == 0 and "WARNING" not in run.output, run


# ------------------------------------------------------------------------------------------ models and output


MODELS = {  # a file of each model, and the folder of another one
    "prior_model": ("prior/text_encoder/model.safetensors", "decoder"),
    "decoder_model": ("decoder/vqgan/diffusion_pytorch_model.safetensors", "prior"),
    "image_encoder": ("encoder/diffusion_pytorch_model.safetensors", "decoder"),
}
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a21\nsize 12345\n"


@pytest.mark.parametrize("model", MODELS)
def test_a_model_that_cannot_be_loaded_is_refused_before_training(model, refused, train, models, tmp_path):
    flag, (file, other) = f"pretrained_{model}_name_or_path", MODELS[model]
    refused(f"^--{flag}=.*nowhere: .*nowhere", **{flag: tmp_path / "nowhere"})
    refused(f"^--{flag}=.*{other}: ", **{flag: models / other})
    folder = shutil.copytree(models / file.split("/")[0], tmp_path / "clone")
    (tmp_path / "clone" / file.split("/", 1)[1]).write_text(POINTER)
    refused(f"^--{flag}=.*safetensors is a Git LFS pointer: run `git lfs pull`", **{flag: folder})
    run = train(**{flag: "nobody/nothing"})  # a library may warn, as well
    reason = "it is not a local folder, not in the cache, and the Hub cannot be reached"
    assert run.returncode == 1 and "Traceback" not in run.output, run
    assert run.output.splitlines()[-1] == f"--{flag}=nobody/nothing: {reason}"


def test_encoders_that_do_not_fit_are_refused(refused, models, tmp_path):
    shutil.copytree(models / "prior", tmp_path / "prior")
    config = json.loads((tmp_path / "prior" / "text_encoder" / "config.json").read_text())
    config |= {"hidden_size": 64, "intermediate_size": 64, "projection_dim": 64}
    CLIPTextModel(CLIPTextConfig(**config)).save_pretrained(tmp_path / "prior" / "text_encoder")
    flag = "pretrained_prior_model_name_or_path"
    refused(f"^--{flag}=.*c_cond=32.* 64", **{flag: tmp_path / "prior"})
    EfficientNetEncoder(c_latent=4).save_pretrained(tmp_path / "encoder")
    other = "pretrained_image_encoder_name_or_path"
    refused(f"^--{flag}=.*c_in=16.* 4", **{other: tmp_path / "encoder"})
    torch.save({"state_dict": {}}, tmp_path / "other.pt")
    refused(f"^--{other}=.*other.pt: .*effnet_state_dict", **{other: tmp_path / "other.pt"})


def test_an_output_dir_that_is_a_file_is_refused(train, tmp_path):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "run"):
        run = train(output_dir=folder, patch=forbid_models)
        assert_refused(run, f"^--output_dir={folder}: .*(File exists|Not a directory)")


# --------------------------------------------------------------------------------- Accelerate's configuration


def test_accumulation_steps_in_the_environment_do_not_override_the_flag(train):
    """`accelerate launch` exports its configuration's number."""
    flags = {"gradient_accumulation_steps": 2, "max_train_steps": 3, "record": True}
    expected, run = train(**flags), train(env={"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "3"}, **flags)
    assert expected.returncode == run.returncode == 0, (expected, run)
    for each in (expected, run):
        assert (len(each.record["steps"]), len(each.record["clipped"])) == (3 * 2, 3)
    assert run.logged("train_loss") == expected.logged("train_loss")
    assert run.logged("grad_norm") == expected.logged("grad_norm")
    assert same_weights(run.prior(), expected.prior())


def test_a_precision_of_accelerates_configuration_that_is_not_supported_is_refused(refused):
    line = "^accelerate config: mixed_precision=fp8 is not supported; choose no, fp16 or bf16$"
    refused(line, env={"ACCELERATE_MIXED_PRECISION": "fp8"})


# ---------------------------------------------------------------------------------------------- earlier runs


WAYS = "--resume_from_checkpoint=latest.*--overwrite_output_dir"


@pytest.mark.parametrize(
    ("flag", "value", "pattern"),
    [
        ("resume_from_checkpoint", None, f"^--output_dir=.*earlier contains .*checkpoint-2.*{WAYS}"),
        ("resume_from_checkpoint", "checkpoint-7", "^--resume_from_checkpoint=checkpoint-7: .*no complete"),
        ("resume_from_checkpoint", "/nowhere", "^--resume_from_checkpoint=/nowhere: .*no complete"),
        ("use_ema", True, "^--use_ema: .*checkpoint-2 has no prior_ema"),
        ("train_batch_size", 2, "checkpoint-2 .*another samples_per_step=4, this one 2$"),
        ("gradient_accumulation_steps", 2, "checkpoint-2 .*another samples_per_step=4, this one 8$"),
        ("max_train_samples", 32, "checkpoint-2 .*another num_rows=64, this one 32$"),
        ("seed", 1, "checkpoint-2 .*another seed=0, this one 1$"),
        ("caption_column", "captions", "checkpoint-2 .*another rows_hash$"),
        ("aspect_ratio_buckets", True, "checkpoint-2 .*another buckets=False, this one "),
        ("optimizer", "adafactor", "checkpoint-2 .*another optimizer=adamw, this one adafactor$"),
        (
            "train_data_dir",
            "/nowhere",
            "^--train_data_dir=/nowhere: ",
        ),  # --overwrite_output_dir deletes nothing
    ],
)
def test_what_does_not_go_with_an_earlier_run_changes_no_file(train, tmp_path, flag, value, pattern):
    run = train(max_train_steps=2, checkpointing_steps=2, report_to="none")
    assert run.returncode == 0, run
    assert not list(run.folder.rglob("events.out.*")), "of --report_to=none"
    folder = shutil.copytree(run.folder, tmp_path / "earlier")

    def times():
        files = [path for path in folder.rglob("*") if path.is_file() and path.name != ".lock"]
        return {path: path.stat().st_mtime_ns for path in files}

    before, flags = times(), {"output_dir": folder, "max_train_steps": 4}
    flags |= (
        {"overwrite_output_dir": True} if flag == "train_data_dir" else {"resume_from_checkpoint": "latest"}
    )
    assert_refused(train(**flags | {flag: value}), pattern)
    assert times() == before
