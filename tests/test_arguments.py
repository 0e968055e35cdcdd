# SPDX-License-Identifier: Apache-2.0
"""Arguments and setup: a wrong setting ends in one line that names the flag and the remedy, not in a
traceback, and Accelerate's environment does not override a flag."""

import importlib.util
import json
import re
import shutil

import datasets
import pytest
import torch
from conftest import same_weights, tiny_args
from PIL import Image
from transformers import CLIPTextConfig, CLIPTextModel

import train_text_to_image_prior as script
from modeling_efficient_net_encoder import EfficientNetEncoder

LOGGED = re.compile(r"\d\d:\d\d:\d\d (INFO|WARNING) ")  # by the script itself
PROGRESS = re.compile(r"\d+%\|.*\||\d+ examples ")


def error_lines(run):
    """The lines of a run's output without its log, progress bars, and argparse's usage message."""
    lines, is_usage = [], False
    for line in run.output.splitlines():
        is_usage = line.startswith("usage: ") or (is_usage and line.startswith(" "))
        if line.strip() and not is_usage and not LOGGED.match(line) and not PROGRESS.search(line):
            lines.append(line)
    return lines


def assert_refused(run, *patterns):
    """The run failed with one line, its last, which has each of the patterns."""
    assert run.returncode not in (0, None), run
    assert run.returncode > 0, f"killed by a signal: {run}"
    assert "Traceback" not in run.output, run
    lines = error_lines(run)
    assert len(lines) == 1, run
    assert run.output.rstrip().splitlines()[-1] == lines[0], run
    for pattern in patterns:
        assert re.search(pattern, lines[0]), f"{pattern} is not in: {lines[0]}"


@pytest.fixture
def refused(run_main, models, pictures, tmp_path):
    """refused(*patterns, **flags): a short run with these flags is refused, and writes no result."""

    def check(*patterns, **flags):
        flags.setdefault("output_dir", tmp_path / "out")
        assert_refused(run_main(tiny_args(models, pictures, **flags)), *patterns)
        assert not (flags["output_dir"] / "prior_pipeline").exists()

    return check


# --------------------------------------------------------------------------------------------------- numbers

POSITIVE_INTEGERS = [
    "max_train_samples",
    "train_batch_size",
    "gradient_accumulation_steps",
    "num_train_epochs",
    "max_train_steps",
    "checkpointing_steps",
    "checkpoints_total_limit",
    "validation_epochs",
    "validation_steps",
]
NATURAL_NUMBERS = ["dataloader_num_workers", "lr_warmup_steps", "seed"]
NON_NEGATIVE_NUMBERS = ["learning_rate", "adam_weight_decay", "adam_epsilon"]
FRACTIONS = ["adam_beta1", "adam_beta2", "caption_dropout"]


@pytest.mark.parametrize("flag", POSITIVE_INTEGERS)
def test_positive_integers_are_at_least_one(flag, refused):
    for value in (0, -1):
        refused(f"--{flag}: must be at least 1, not {value}", **{flag: value})
    refused(f"--{flag}: invalid int value: '2.5'", **{flag: 2.5})


@pytest.mark.parametrize("value", [0, -1])
def test_clipping_gradients_to_zero_is_refused_since_nothing_would_be_trained(refused, value):
    refused(f"--max_grad_norm: must be at least 1e-08, not {value}", max_grad_norm=value)


@pytest.mark.parametrize("flag", NATURAL_NUMBERS)
def test_natural_numbers_are_not_negative(flag, refused):
    refused(f"--{flag}: must be at least 0, not -1", **{flag: -1})


@pytest.mark.parametrize("flag", NON_NEGATIVE_NUMBERS)
def test_non_negative_numbers_are_finite_and_not_negative(flag, refused):
    for value in ("-0.1", "nan", "inf"):
        refused(f"--{flag}: must be at least 0.*, not {value}", **{flag: value})


@pytest.mark.parametrize("flag", FRACTIONS)
def test_fractions_are_below_one(flag, refused):
    for value in ("-0.1", "1", "nan"):
        refused(f"--{flag}: must be at least 0 and below 1, not {value}", **{flag: value})


def test_resolution_is_at_least_one_latent(refused):
    for value in (31, 0, -64):
        refused(f"--resolution: must be at least 32, not {value}", resolution=value)


# ------------------------------------------------------------------------------------------------------ data


def test_neither_data_argument_is_refused(refused):
    refused("--dataset_name", "--train_data_dir", train_data_dir=None)


def test_dataset_name_has_precedence_over_train_data_dir_with_a_warning(run_main, models, pictures, tmp_path):
    flags = {"dataset_name": pictures, "max_train_samples": 8, "max_train_steps": 1}
    run = run_main(tiny_args(models, tmp_path / "not used", tmp_path / "out", **flags))
    assert run.returncode == 0, run
    assert re.search(r"WARNING .*--train_data_dir=.*not used is ignored.*--dataset_name", run.output)
    assert re.search(r"Training from step 0 to 1 on cpu: 8 rows, ", run.output)


def test_missing_folder_is_refused(refused, tmp_path):
    refused(r"--train_data_dir=.*nowhere: there is no such folder", train_data_dir=tmp_path / "nowhere")


def test_missing_data_set_is_refused(refused):
    refused(r"--dataset_name=no/such-set: .*no/such-set", dataset_name="no/such-set", train_data_dir=None)


@pytest.mark.parametrize("file", [None, "notes.txt"])
def test_folder_without_images_is_refused(file, refused, tmp_path):
    (tmp_path / "data").mkdir()
    if file:
        (tmp_path / "data" / file).write_text("no image")
    refused(r"--train_data_dir=.*data: .*(no images|any data files)", train_data_dir=tmp_path / "data")


def test_unknown_column_is_refused_with_the_columns_listed(refused):
    refused("--image_column=img: .*image, text, captions, group", image_column="img")
    refused("--caption_column=caption: .*image, text, captions, group", caption_column="caption")


def test_images_without_captions_are_refused_with_an_example(run_main, models, tmp_path):
    (tmp_path / "data").mkdir()
    Image.new("RGB", (64, 64)).save(tmp_path / "data" / "a.png")
    run = run_main(tiny_args(models, tmp_path / "data", tmp_path / "out"))
    assert run.returncode == 1, run
    *_, reason, advice, first, second, text_files = run.output.splitlines()
    assert reason == "--caption_column=text: there is no such column, only image"
    assert advice == "Write the captions to metadata.jsonl in that folder, a line for each image:"
    for line in (first, second):
        assert json.loads(line).keys() == {"file_name", "text"}
    assert ".txt" in text_files


def test_image_column_of_strings_is_refused(refused):
    refused("--image_column=text: .*holds .*string.*, not images", image_column="text")


def test_image_column_of_other_structs_is_refused(refused, tmp_path):
    rows = {"image": [{"data": b"no image", "label": 1}], "text": ["a cat"]}
    (tmp_path / "data").mkdir()
    datasets.Dataset.from_dict(rows).to_parquet(tmp_path / "data" / "rows.parquet")
    refused("--image_column=image: .*holds .*label.*, not images", train_data_dir=tmp_path / "data")


def test_data_set_without_a_train_split_is_refused(refused, pictures, tmp_path):
    shutil.copytree(pictures, tmp_path / "data" / "test")
    refused("--train_data_dir=.*: .*no .*split.* train.*test", train_data_dir=tmp_path / "data")


@pytest.fixture
def write_metadata(pictures, tmp_path):
    """write_metadata(edit): a folder of the first six images, and its rows as `edit` changes them."""
    rows = [json.loads(line) for line in (pictures / "metadata.jsonl").read_text().splitlines()][:6]
    folder = tmp_path / "data"
    folder.mkdir()
    for row in rows:
        shutil.copy(pictures / row["file_name"], folder)

    def write(edit):
        edit(rows)
        (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
        return folder

    return write


@pytest.fixture
def no_models(monkeypatch):
    """Fails if a model is loaded."""

    def fail(*args, **kwargs):
        raise AssertionError("a model is loaded")

    for name in ("load_encoders", "load_prior"):
        monkeypatch.setattr(script, name, fail)


def test_missing_images_and_captions_end_the_run_before_models_are_loaded(
    write_metadata, refused, train, no_models, monkeypatch
):
    def edit(rows):
        rows[1]["file_name"] = "nowhere.png"
        rows[4]["text"] = None

    folder = write_metadata(edit)
    image = r"the image \(.*/data/nowhere.png\) is missing or empty"
    reason = f"2 of 6 rows cannot be used, the first: row 1: {image}"
    refused(f"^{reason}; fix them, or skip such rows with --skip_bad_rows$", train_data_dir=folder)
    monkeypatch.undo()
    run = train(train_data_dir=folder, skip_bad_rows=True)
    assert run.returncode == 0 and re.search(f"WARNING .*{reason}\n", run.output), run


def test_images_that_the_metadata_does_not_name_are_counted(write_metadata, train, tmp_path):
    def edit(rows):
        del rows[3:]

    folder = write_metadata(edit)
    for hidden in (".thumbnails", "__MACOSX"):
        (folder / hidden).mkdir()
        shutil.copy(next(folder.glob("*.jpg")), folder / hidden / "hidden.jpg")
    run = train(train_data_dir=folder)
    assert run.returncode == 0 and "3 of 6 images in" in run.output, run
    for file in {path.name for path in folder.glob("*.*")} - {"metadata.jsonl"}:
        (folder / file).unlink() if file > "0003" else None
    run = train(train_data_dir=folder, output_dir=tmp_path / "again")
    assert run.returncode == 0 and "are not used" not in run.output, run


def test_captions_and_prompts_that_are_cut_are_counted(write_metadata, train):
    """The text encoder's 77 tokens include those of the beginning and the end."""

    def edit(rows):
        rows[1]["text"] = " ".join(["apple"] * 75)
        rows[2]["text"] = " ".join(["apple"] * 76)
        rows[5]["text"] = " ".join(["pear"] * 200)

    run = train(train_data_dir=write_metadata(edit), validation_prompts=["moon", "moon " * 80])
    assert run.returncode == 0, run
    assert "2 of 6 captions are longer than the text encoder's 77 tokens and are cut" in run.output
    assert "1 of 2 --validation_prompts are longer than the text encoder's 77 tokens" in run.output
    run = train(validation_prompts="moon")
    assert run.returncode == 0 and "tokens" not in run.output, run


def test_sizes_that_are_rarely_meant_are_reported(train):
    run = train(resolution=80, max_train_samples=3)
    assert "--resolution=80 is not a multiple of 32: images become 3 x 3 latents, as with 96" in run.output
    assert "There are fewer rows, 3, than samples in a step, 4" in run.output
    run = train(max_train_samples=4)
    assert run.returncode == 0 and "WARNING" not in run.output, run


def test_help_shows_every_flag_with_its_default(capsys):
    with pytest.raises(SystemExit) as ended:
        script.parse_args(["--help"])
    assert ended.value.code == 0
    first, *entries = re.split(r"\n  (?=--)", capsys.readouterr().out)
    assert len(first.split("\n\n")[0]) < 150, "the usage does not repeat the flags"
    entries = {entry.split()[0]: "".join(entry.split("\n\n")[0].split()) for entry in entries}
    defaults = vars(script.parse_args(["--train_data_dir=x"])) | {"train_data_dir": None}
    assert entries.keys() == {f"--{name}" for name in defaults}
    for name, value in defaults.items():
        shown = value is not None and value is not False
        assert (f"(default:{value})" in entries[f"--{name}"]) == shown, name


def test_unreadable_row_ends_the_run_with_its_number_and_file(refused, pictures, tmp_path):
    data = shutil.copytree(pictures, tmp_path / "data")
    first = json.loads((data / "metadata.jsonl").read_text().splitlines()[0])["file_name"]
    (data / first).write_bytes(b"not an image")
    refused(f"row 0 .*{first}.*cannot identify.*--skip_bad_rows", train_data_dir=data, max_train_steps=16)


# ------------------------------------------------------------------------------------- settings and trackers


def test_unknown_tracker_is_refused_with_the_known_ones_listed(refused):
    refused("--report_to=aim is not installed.*tensorboard.*none", report_to="aim")


@pytest.mark.parametrize(
    ("given", "parsed"), [("tensorboard, wandb", "tensorboard,wandb"), ("", "none"), (" none", "none")]
)
def test_report_to_may_contain_spaces_or_be_empty(given, parsed):
    assert script.parse_args(["--train_data_dir=unused", f"--report_to={given}"]).report_to == parsed


def test_unknown_lr_scheduler_is_refused_with_the_known_ones_listed(refused):
    refused("--lr_scheduler: invalid choice: 'cosin'.*cosine.*constant", lr_scheduler="cosin")


@pytest.mark.parametrize(
    "flags", [{"lr_scheduler": "piecewise_constant"}, {"lr_scheduler": "cosine", "lr_step_rules": "1:2,0.1"}]
)
def test_piecewise_constant_and_its_rules_need_each_other(flags, refused):
    refused("--lr_scheduler=piecewise_constant and --lr_step_rules need each other", **flags)


def test_8bit_adam_without_bitsandbytes_is_refused(refused, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    refused("--optimizer=adamw8bit needs bitsandbytes.*pip install", use_8bit_adam=True)


@pytest.mark.parametrize("optimizer", ["adamw", "adafactor"])
def test_8bit_adam_and_another_optimizer_are_refused(refused, optimizer):
    flags = {"use_8bit_adam": True, "optimizer": optimizer}
    refused(f"--use_8bit_adam means --optimizer=adamw8bit, not {optimizer}", **flags)


def test_use_8bit_adam_is_a_name_of_the_optimizer():
    for flag in ("--use_8bit_adam", "--optimizer=adamw8bit"):
        args = script.parse_args(["--train_data_dir=unused", flag])
        assert args.optimizer == "adamw8bit" and args.use_8bit_adam, "whichever was given"
        assert script.parse_args(["--train_data_dir=unused", *script.public_args(args).split()]) == args
    assert script.parse_args(["--train_data_dir=unused"]).optimizer == "adamw"


@pytest.mark.parametrize("flag", ["adam_beta1", "adam_beta2", "adam_epsilon"])
def test_settings_that_adafactor_does_not_have_are_refused(refused, flag):
    refused(f"--{flag} has no meaning for --optimizer=adafactor", optimizer="adafactor", **{flag: 0.5})


def test_offloading_an_average_that_is_not_kept_is_refused(refused):
    refused("--offload_ema needs --use_ema", offload_ema=True)


def test_output_dir_that_is_a_file_is_refused(refused, tmp_path):
    (tmp_path / "file").write_text("")
    refused("--output_dir=.*file: .*[Ee]xists", output_dir=tmp_path / "file")


# --------------------------------------------------------------------------------- Accelerate's configuration


def test_accumulation_steps_in_the_environment_do_not_override_the_flag(train):
    """`accelerate launch` exports its configuration's number."""
    flags = {"gradient_accumulation_steps": 2, "max_train_steps": 3, "lr_warmup_steps": 0}
    expected = train(**flags)
    run = train(env={"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "3"}, **flags)
    assert expected.returncode == run.returncode == 0, (expected, run)
    for each in (expected, run):
        assert len(each.record["steps"]) == 3 * 2
        assert len(each.record["clipped"]) == 3
    assert run.logged("train_loss") == expected.logged("train_loss")
    assert run.logged("grad_norm") == expected.logged("grad_norm")
    assert same_weights(run.prior(), expected.prior())


# ---------------------------------------------------------------------------------------------------- models


def model_flag(model):
    infix = "" if model == "image_encoder" else "_model"
    return f"pretrained_{model}{infix}_name_or_path"


@pytest.mark.parametrize("model", ["prior", "decoder", "image_encoder"])
def test_missing_model_is_refused(model, refused, tmp_path):
    flag = model_flag(model)
    refused(f"--{flag}=.*nowhere: .*nowhere", **{flag: tmp_path / "nowhere"})


@pytest.mark.parametrize("model", ["prior", "decoder", "image_encoder"])
def test_model_that_is_nowhere_without_a_connection_is_refused(model, run_main, models, pictures, tmp_path):
    flag = model_flag(model)
    run = run_main(tiny_args(models, pictures, tmp_path / "out", **{flag: "nobody/nothing"}))
    reason = "it is not a local folder, not in the cache, and the Hub cannot be reached"
    assert run.returncode == 1 and "Traceback" not in run.output, run
    assert run.output.splitlines()[-1] == f"--{flag}=nobody/nothing: {reason}"


@pytest.mark.parametrize("model", ["prior", "image_encoder"])
def test_folder_of_another_model_is_refused(model, refused, models):
    flag = model_flag(model)
    refused(f"--{flag}=", **{flag: models / "decoder"})


def test_prior_given_as_decoder_is_refused(refused, models):
    flag = model_flag("decoder")
    refused(f"--{flag}=.*", **{flag: models / "prior"})


def test_prior_that_does_not_match_its_text_encoder_is_refused(refused, models, tmp_path):
    shutil.copytree(models / "prior", tmp_path / "prior")
    config = json.loads((tmp_path / "prior" / "text_encoder" / "config.json").read_text())
    config |= {"hidden_size": 64, "intermediate_size": 64, "projection_dim": 64}
    CLIPTextModel(CLIPTextConfig(**config)).save_pretrained(tmp_path / "prior" / "text_encoder")
    flag = model_flag("prior")
    refused(f"--{flag}=.*text encoder.* 64 .*c_cond=32", **{flag: tmp_path / "prior"})


def test_image_encoder_with_other_latent_channels_is_refused(refused, tmp_path):
    EfficientNetEncoder(c_latent=4).save_pretrained(tmp_path / "encoder")
    flag = model_flag("image_encoder")
    refused(f"--{flag}=.*c_latent=4.*c_in=16", **{flag: tmp_path / "encoder"})


def test_image_encoder_file_of_something_else_is_refused(refused, tmp_path):
    torch.save({"state_dict": {}}, tmp_path / "other.pt")
    flag = model_flag("image_encoder")
    refused(f"--{flag}=.*other.pt: .*effnet_state_dict", **{flag: tmp_path / "other.pt"})


# ---------------------------------------------------------------------------------------------- earlier runs

EARLIER = []  # the output folder of the run below, when it has been made


@pytest.fixture
def earlier(run_main, models, pictures, tmp_path, tmp_path_factory):
    """A copy of the output folder of a run of two steps without --use_ema, with checkpoint-2."""
    if not EARLIER:
        output_dir = tmp_path_factory.mktemp("earlier") / "run"
        run = run_main(tiny_args(models, pictures, output_dir, max_train_steps=2, checkpointing_steps=2))
        assert run.returncode == 0, run
        EARLIER.append(output_dir)
    return shutil.copytree(EARLIER[0], tmp_path / "earlier")


@pytest.fixture
def refused_after(run_main, models, pictures, earlier):
    """refused_after(*patterns, **flags): these flags are refused in the earlier run's output folder, in which
    no file changes."""

    def modification_times():
        files = [path for path in earlier.rglob("*") if path.is_file() and path.name != ".lock"]
        return {path: path.stat().st_mtime_ns for path in files}

    def check(*patterns, **flags):
        before = modification_times()
        settings = {"max_train_steps": 4, **flags}
        assert_refused(run_main(tiny_args(models, pictures, earlier, **settings)), *patterns)
        assert modification_times() == before

    return check


def test_missing_checkpoint_is_refused(refused, refused_after, tmp_path):
    refused("--resume_from_checkpoint=.*nowhere.* no ", resume_from_checkpoint=tmp_path / "nowhere")
    refused_after("--resume_from_checkpoint=checkpoint-7.* no ", resume_from_checkpoint="checkpoint-7")


def test_output_dir_of_an_earlier_run_is_refused_unless_resumed_or_overwritten(refused_after, earlier):
    ways = "--resume_from_checkpoint=latest.*--overwrite_output_dir"
    refused_after(f"--output_dir={re.escape(str(earlier))} contains checkpoint.*{ways}")


def test_ema_is_refused_when_the_resumed_run_had_none(refused_after):
    refused_after("--use_ema.*checkpoint-2.*no prior_ema", resume_from_checkpoint="latest", use_ema=True)


@pytest.mark.parametrize(
    ("flag", "value", "difference"),
    [
        ("train_batch_size", 2, "its run had 4 samples a step .* this one 2 "),
        ("gradient_accumulation_steps", 2, "its run had 4 samples a step .* this one 8 "),
        ("max_train_samples", 32, "num_rows=64.* 32"),
        ("seed", 1, "seed=0.* 1"),
    ],
)
def test_resuming_with_another_sample_plan_is_refused_with_the_difference(
    flag, value, difference, refused_after
):
    refused_after(f"checkpoint-2.*{difference}", resume_from_checkpoint="latest", **{flag: value})


def test_overwriting_deletes_nothing_if_the_run_cannot_start(refused_after, tmp_path):
    refused_after(
        "--train_data_dir=.*nowhere", overwrite_output_dir=True, train_data_dir=tmp_path / "nowhere"
    )


def test_report_to_none_writes_no_tracker_files(earlier):
    # The earlier run had --report_to none.
    assert (earlier / "prior_pipeline").is_dir()
    assert not list(earlier.rglob("events.out.*"))
