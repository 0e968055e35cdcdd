# SPDX-License-Identifier: Apache-2.0
"""The benchmark runs, tiny, and reports what it should. No test checks how fast anything is."""

import json
import math
import shutil
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import TESTS, run_command, script
from tiny_models import PRIOR_TEXT_WIDTH, make_prior
from torch.utils.flop_counter import FlopCounterMode

sys.path.append(str(TESTS / "benchmarks"))

from benchmark import BASE, OTHER, REAL_PRIOR, ROWS, SIZES, TRAINING, make_flags
from measures import tflop_per_image

pytestmark = pytest.mark.slow
# One row of each kind: nothing is compiled on a CPU, and the others differ in flags only.
REQUESTED = [BASE, "bf16-16", "guide-compile", *OTHER]
COLUMNS = {"images_per_second", "ratio", "share_of_ceiling", "peak_gib", "loss"}


def run_benchmark(folder, *rows, **env):
    """Runs the program as a user does, without a GPU; returns its output and results.json."""
    command = [sys.executable, TESTS / "benchmarks" / "benchmark.py", "--rows", *rows]
    env = {"CUDA_VISIBLE_DEVICES": "", "HF_HOME": folder / "home"} | env
    done = run_command([*command, "--out", folder / "out", "--work", folder / "work"], env=env, timeout=1500)
    assert done.returncode == 0, done.stdout
    return done.stdout, json.loads((folder / "out" / "results.json").read_text())


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """The folder, the output and results.json of a benchmark of all rows."""
    folder = tmp_path_factory.mktemp("benchmark")
    return folder, *run_benchmark(folder, *REQUESTED)


def read_cells(printed):
    """The first table: each row's cells by column."""
    lines = [line.strip("| ").split(" | ") for line in printed.splitlines() if line.startswith("| ")]
    rows = lines[1 : lines.index(["what"])]
    return {row[0]: dict(zip(lines[0], row, strict=False)) for row in rows}


def test_every_row_is_measured_and_shown(measured):
    _, printed, results = measured
    rows = results["rows"]
    assert set(rows) == set(REQUESTED)
    for name, row in rows.items():
        assert "error" not in row, (name, row)
        assert ("remark" in row) == (name == "guide-compile")
        for what, value in row.items():
            if what == "skipped_steps":
                assert value >= 0
            elif what != "remark":
                assert math.isfinite(value) and value > 0, (name, what, value)
    assert "--compile is ignored" in rows["guide-compile"]["remark"] and rows["reference-guide"]["ratio"] == 1
    assert len(rows["encoding"]) == 5 and results["ceiling_tflops"] > 0
    cells = read_cells(printed)
    assert set(cells) == rows.keys() & TRAINING.keys()
    for name, shown in cells.items():
        assert rows[name].keys() >= COLUMNS
        assert ("first_step_s" in rows[name]) == (not name.startswith("reference"))
        assert shown["images/s"] == f"{rows[name]['images_per_second']:.1f}"
        assert shown["ratio"] == f"{rows[name]['ratio']:.2f}"
    assert "| encoding: --cache_latents, rows/s |" in printed
    assert f"PyTorch {torch.__version__}" in printed and results["date"] in printed


def test_the_flags_of_every_row_are_the_scripts(tmp_path):
    pytest.importorskip("bitsandbytes")
    size = SimpleNamespace(**{name: real for name, (_, real) in SIZES.items()})
    for _, flags in ROWS.values():
        script.parse_args(make_flags(size, tmp_path, tmp_path, flags))


def test_rows_that_fail_are_reported_and_the_others_stay(measured, tmp_path):
    """That of --use_8bit_adam in a process that does not find bitsandbytes, and one without a model."""
    shutil.copytree(measured[0], tmp_path, dirs_exist_ok=True)
    shutil.rmtree(tmp_path / "work" / "encoder")
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys.modules['bitsandbytes'] = None\n")
    printed, after = run_benchmark(tmp_path, "guide-8bit-adam", "guide", PYTHONPATH=tmp_path)
    for name, reason in (
        ("guide-8bit-adam", "--optimizer=adamw8bit needs bitsandbytes"),
        ("guide", "--pretrained_image_encoder_name_or_path"),
    ):
        assert reason in after["rows"][name]["error"]
        assert read_cells(printed)[name]["images/s"] == "-" and "failed: exit status" in printed
    assert after["rows"]["bf16-16"] == measured[2]["rows"]["bf16-16"]


def test_the_operations_are_those_that_pytorch_counts():
    """Forward on one image, with attention as plain matrix products, which PyTorch's counter sees."""
    prior = make_prior()
    prior.set_default_attn_processor()
    latents, prompt_embeds = torch.zeros(1, 16, 6, 6), torch.zeros(1, 77, PRIOR_TEXT_WIDTH)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        prior(latents, torch.zeros(1), prompt_embeds)
    expected = 3 * counter.get_total_flops()
    assert tflop_per_image(dict(prior.config), 6) * 1e12 == pytest.approx(expected, rel=1e-9)
    assert tflop_per_image({"c_in": 16} | REAL_PRIOR, 24) == pytest.approx(3.461, rel=1e-3), "as published"
