# SPDX-License-Identifier: Apache-2.0
"""What is wrong with a command line ends in one line that names the flag and the way out, not in a traceback."""

import importlib.util
import json
import re
import shutil

import pytest
import torch
from conftest import tiny_args
from PIL import Image
from transformers import CLIPTextConfig, CLIPTextModel

from modeling_efficient_net_encoder import EfficientNetEncoder

LOGGED = re.compile(r"\d\d:\d\d:\d\d (INFO|WARNING) ")  # by the script itself
PROGRESS = re.compile(r"\d+%\|.*\||\d+ examples ")


def said(run):
    """The lines of a run's output, less its log, progress bars, and argparse's reminder of all flags."""
    lines, usage = [], False
    for line in run.output.splitlines():
        usage = line.startswith("usage: ") or (usage and line.startswith(" "))
        if line.strip() and not usage and not LOGGED.match(line) and not PROGRESS.search(line):
            lines.append(line)
    return lines


def assert_refused(run, *patterns):
    """The run failed with one line, its last, that has each of the patterns."""
    assert run.returncode not in (0, None), run
    assert run.returncode > 0, f"killed by a signal: {run}"
    assert "Traceback" not in run.output, run
    lines = said(run)
    assert len(lines) == 1, run
    assert run.output.rstrip().splitlines()[-1] == lines[0], run
    for pattern in patterns:
        assert re.search(pattern, lines[0]), f"{pattern} is not in: {lines[0]}"


@pytest.fixture
def refused(run_main, models, pictures, tmp_path):
    """refused(*patterns, **flags): a quick run with these flags is refused, and leaves no result behind."""

    def check(*patterns, **flags):
        flags.setdefault("output_dir", tmp_path / "out")
        assert_refused(run_main(tiny_args(models, pictures, **flags)), *patterns)
        assert not (flags["output_dir"] / "prior_pipeline").exists()

    return check


# ---------------------------------------------------------------------------------------------------- numbers

COUNTS = [
    "max_train_samples",
    "train_batch_size",
    "gradient_accumulation_steps",
    "num_train_epochs",
    "max_train_steps",
    "checkpointing_steps",
    "checkpoints_total_limit",
    "validation_epochs",
]
SIZES = ["dataloader_num_workers", "lr_warmup_steps", "seed"]
AMOUNTS = ["learning_rate", "adam_weight_decay", "adam_epsilon"]
SHARES = ["adam_beta1", "adam_beta2", "caption_dropout"]


@pytest.mark.parametrize("flag", COUNTS)
def test_counts_are_at_least_one(flag, refused):
    for value in (0, -1):
        refused(f"--{flag}: must be at least 1, not {value}", **{flag: value})
    refused(f"--{flag}: invalid int value: '2.5'", **{flag: 2.5})


@pytest.mark.parametrize("value", [0, -1])
def test_clipping_to_nothing_is_refused_since_nothing_would_be_trained(refused, value):
    refused(f"--max_grad_norm: must be at least 1e-08, not {value}", max_grad_norm=value)


@pytest.mark.parametrize("flag", SIZES)
def test_sizes_are_not_negative(flag, refused):
    refused(f"--{flag}: must be at least 0, not -1", **{flag: -1})


@pytest.mark.parametrize("flag", AMOUNTS)
def test_amounts_are_numbers_and_not_negative(flag, refused):
    for value in ("-0.1", "nan", "inf"):
        refused(f"--{flag}: must be at least 0.*, not {value}", **{flag: value})


@pytest.mark.parametrize("flag", SHARES)
def test_shares_are_below_one(flag, refused):
    for value in ("-0.1", "1", "nan"):
        refused(f"--{flag}: must be at least 0 and below 1, not {value}", **{flag: value})


def test_resolution_is_at_least_one_latent(refused):
    for value in (31, 0, -64):
        refused(f"--resolution: must be at least 32, not {value}", resolution=value)


# ------------------------------------------------------------------------------------------------------- data


def test_neither_data_argument(refused):
    refused("--dataset_name", "--train_data_dir", train_data_dir=None)


def test_with_both_data_arguments_the_name_wins_and_a_line_says_so(run_main, models, pictures, tmp_path):
    args = tiny_args(
        models, tmp_path / "not used", tmp_path / "out", dataset_name=pictures, max_train_samples=8, max_train_steps=1
    )
    run = run_main(args)
    assert run.returncode == 0, run
    assert re.search(r"WARNING .*--train_data_dir=.*not used is not used.*--dataset_name", run.output)
    assert "8 rows, 1 updates" in run.output


def test_a_missing_folder(refused, tmp_path):
    refused(r"--train_data_dir=.*nowhere: there is no such folder", train_data_dir=tmp_path / "nowhere")


def test_a_missing_data_set(refused):
    refused(r"--dataset_name=no/such-set: .*no/such-set", dataset_name="no/such-set", train_data_dir=None)


@pytest.mark.parametrize("content", [None, "notes.txt"])
def test_a_folder_without_pictures(content, refused, tmp_path):
    (tmp_path / "data").mkdir()
    if content:
        (tmp_path / "data" / content).write_text("no picture")
    refused(r"--train_data_dir=.*data: .*(no pictures|any data files)", train_data_dir=tmp_path / "data")


def test_a_wrong_column_is_told_which_there_are(refused):
    refused("--image_column=img: .*image, text, captions, group", image_column="img")
    refused("--caption_column=caption: .*image, text, captions, group", caption_column="caption")


def test_pictures_without_captions(refused, tmp_path):
    (tmp_path / "data").mkdir()
    Image.new("RGB", (64, 64)).save(tmp_path / "data" / "a.png")
    refused("--caption_column=text: .*no such column, only image", train_data_dir=tmp_path / "data")


def test_an_image_column_of_strings(refused):
    refused("--image_column=text: .*holds .*string.*, not pictures: .*Image", image_column="text")


def test_no_train_split(refused, pictures, tmp_path):
    shutil.copytree(pictures, tmp_path / "data" / "test")
    refused("--train_data_dir=.*: no .*split.* train.*test", train_data_dir=tmp_path / "data")


def test_a_broken_row_stops_the_run_and_names_itself(refused, pictures, tmp_path):
    data = shutil.copytree(pictures, tmp_path / "data")
    first = json.loads((data / "metadata.jsonl").read_text().splitlines()[0])["file_name"]
    (data / first).write_bytes(b"not a picture")
    refused(f"row 0 .*{first}.*cannot identify.*--skip_bad_rows", train_data_dir=data, max_train_steps=16)


# ---------------------------------------------------------------------------------------- settings and trackers


def test_an_unknown_tracker_is_told_which_there_are(refused):
    refused("--report_to=aim is not installed.*tensorboard.*none", report_to="aim")


@pytest.mark.parametrize(
    ("given", "taken"), [("tensorboard, wandb", "tensorboard,wandb"), ("", "none"), (" none", "none")]
)
def test_trackers_may_be_named_with_spaces_and_none_in_two_ways(given, taken):
    import train_text_to_image_prior as script

    assert script.parse_args(["--train_data_dir=unused", f"--report_to={given}"]).report_to == taken


def test_an_unknown_scheduler_is_told_which_there_are(refused):
    refused("--lr_scheduler: invalid choice: 'cosin'.*cosine.*constant", lr_scheduler="cosin")


def test_8bit_adam_without_bitsandbytes(refused, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    refused("--use_8bit_adam needs bitsandbytes.*pip install", use_8bit_adam=True)


def test_an_output_dir_that_is_a_file(refused, tmp_path):
    (tmp_path / "file").write_text("")
    refused("--output_dir=.*file: .*[Ee]xists", output_dir=tmp_path / "file")


# ------------------------------------------------------------------------------------------------------ models


@pytest.mark.parametrize("part", ["prior", "decoder", "image_encoder"])
def test_a_missing_model(part, refused, tmp_path):
    flag = f"pretrained_{part}_name_or_path" if part == "image_encoder" else f"pretrained_{part}_model_name_or_path"
    refused(f"--{flag}=.*nowhere: .*nowhere", **{flag: tmp_path / "nowhere"})


@pytest.mark.parametrize("part", ["prior", "image_encoder"])
def test_a_folder_that_holds_another_model(part, refused, models, tmp_path):
    flag = f"pretrained_{part}_name_or_path" if part == "image_encoder" else f"pretrained_{part}_model_name_or_path"
    refused(f"--{flag}=", **{flag: models / "decoder"})


def test_a_prior_in_the_decoders_place(refused, models):
    refused("--pretrained_decoder_model_name_or_path=.*", pretrained_decoder_model_name_or_path=models / "prior")


def test_a_prior_that_does_not_fit_its_text_encoder(refused, models, tmp_path):
    shutil.copytree(models / "prior", tmp_path / "prior")
    config = json.loads((tmp_path / "prior" / "text_encoder" / "config.json").read_text())
    config |= {"hidden_size": 64, "intermediate_size": 64, "projection_dim": 64}
    CLIPTextModel(CLIPTextConfig(**config)).save_pretrained(tmp_path / "prior" / "text_encoder")
    refused(
        "--pretrained_prior_model_name_or_path=.*text encoder.* 64 .*c_cond=32",
        pretrained_prior_model_name_or_path=tmp_path / "prior",
    )


def test_an_encoder_with_other_latents(refused, tmp_path):
    EfficientNetEncoder(c_latent=4).save_pretrained(tmp_path / "encoder")
    refused(
        "--pretrained_image_encoder_name_or_path=.*c_latent=4.*c_in=16",
        pretrained_image_encoder_name_or_path=tmp_path / "encoder",
    )


def test_an_encoder_file_of_something_else(refused, tmp_path):
    torch.save({"state_dict": {}}, tmp_path / "other.pt")
    refused(
        "--pretrained_image_encoder_name_or_path=.*other.pt: .*effnet_state_dict",
        pretrained_image_encoder_name_or_path=tmp_path / "other.pt",
    )


# ------------------------------------------------------------------------------------------------ earlier runs

EARLIER = []  # the run below, once made


@pytest.fixture
def earlier(run_main, models, pictures, tmp_path, tmp_path_factory):
    """A copy of the `output_dir` of a run of two updates without an average, with checkpoint-2."""
    if not EARLIER:
        output_dir = tmp_path_factory.mktemp("earlier") / "run"
        run = run_main(tiny_args(models, pictures, output_dir, max_train_steps=2, checkpointing_steps=2))
        assert run.returncode == 0, run
        EARLIER.append(output_dir)
    return shutil.copytree(EARLIER[0], tmp_path / "earlier")


@pytest.fixture
def refused_after(run_main, models, pictures, earlier):
    """refused_after(*patterns, **flags): these flags are refused in the earlier run's folder, which stays as it is."""

    def state():
        return {path: path.stat().st_mtime_ns for path in earlier.rglob("*") if path.is_file()}

    def check(*patterns, **flags):
        before = state()
        settings = {"max_train_steps": 4, **flags}
        assert_refused(run_main(tiny_args(models, pictures, earlier, **settings)), *patterns)
        assert state() == before

    return check


def test_a_missing_checkpoint(refused, refused_after, tmp_path):
    refused("--resume_from_checkpoint=.*nowhere.* no ", resume_from_checkpoint=tmp_path / "nowhere")
    refused_after("--resume_from_checkpoint=checkpoint-7.* no ", resume_from_checkpoint="checkpoint-7")


def test_an_earlier_runs_folder_without_a_word_about_it(refused_after, earlier):
    ways = "--resume_from_checkpoint=latest.*--overwrite_output_dir"
    refused_after(f"--output_dir={re.escape(str(earlier))} holds checkpoint.*{ways}")


def test_an_average_where_the_earlier_run_kept_none(refused_after):
    refused_after("--use_ema.*checkpoint-2.*no average", resume_from_checkpoint="latest", use_ema=True)


@pytest.mark.parametrize(
    ("flag", "value", "differs"),
    [
        ("train_batch_size", 2, "train_batch_size=4.* 2"),
        ("gradient_accumulation_steps", 2, "gradient_accumulation_steps=1.* 2"),
        ("max_train_samples", 32, "rows=64.* 32"),
        ("seed", 1, "seed=0.* 1"),
    ],
)
def test_resuming_with_other_samples_says_what_differs(flag, value, differs, refused_after):
    refused_after(f"checkpoint-2.*{differs}", resume_from_checkpoint="latest", **{flag: value})


def test_overwriting_deletes_nothing_for_a_run_that_cannot_start(refused_after, tmp_path):
    refused_after("--train_data_dir=.*nowhere", overwrite_output_dir=True, train_data_dir=tmp_path / "nowhere")


def test_none_as_tracker_works_and_writes_no_log(earlier):
    # The earlier run had --report_to none.
    assert (earlier / "prior_pipeline").is_dir()
    assert not list(earlier.rglob("events.out.*"))
