# SPDX-License-Identifier: Apache-2.0
"""The benchmark runs, tiny, and tells what it should; how fast anything is, no test asks."""

import json
import math
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import TESTS
from tiny_models import PRIOR_TEXT_WIDTH, make_prior
from torch.utils.flop_counter import FlopCounterMode

sys.path.append(str(TESTS / "benchmarks"))

from benchmark import REAL_PRIOR, ROWS, TRAINING
from measures import tflop_per_image

pytestmark = pytest.mark.slow
# Nothing is compiled on a CPU, so one row of those is enough.
ASKED = [name for name in ROWS if not name.endswith("-compile") or name == "guide-compile"]
TRAINED = {"reference-guide", "reference-bf16-16", "guide", "guide-cached", "bf16-16", "bf16-16-cached"}
TRAINED |= {"bf16-32-cached", "guide-8bit-adam"}


def run_benchmark(folder, *args):
    """The program as a user starts it, without a GPU; what it prints."""
    command = [
        sys.executable,
        TESTS / "benchmarks" / "benchmark.py",
        "--out",
        folder / "out",
        "--work",
        folder / "work",
    ]
    environment = {"CUDA_VISIBLE_DEVICES": "", "HF_HOME": str(folder / "home"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, *args], capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout, json.loads((folder / "out" / "results.json").read_text())


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """A folder, what all rows printed, and results.json."""
    folder = tmp_path_factory.mktemp("benchmark")
    return folder, *run_benchmark(folder, "--rows", *ASKED)


def cells_of(printed):
    """The first table: each row's cells by the names of their columns."""
    lines = [line.strip("| ").split(" | ") for line in printed.splitlines() if line.startswith("| ")]
    columns = lines[0]
    return {line[0]: dict(zip(columns, line, strict=False)) for line in lines[1 : lines.index(["what"])]}


def test_every_row_is_measured(measured):
    _, _, results = measured
    assert set(results["rows"]) == set(ASKED) - set(results["left_out"])
    assert {*TRAINED, "encoding", "loader", "growth"} <= set(results["rows"])
    for name, row in results["rows"].items():
        assert "error" not in row, (name, row)
        for what, value in row.items():
            if what == "remark":
                assert "--compile is left out" in value and name.endswith(("-compile", "gradients"))
                continue
            may_be_zero = what == "skipped_updates"
            assert math.isfinite(value) and (value > 0 or (may_be_zero and value == 0)), (name, what, value)
    for name in results["rows"].keys() & TRAINING.keys():
        assert {"images_per_second", "ratio", "share_of_ceiling", "peak_gib", "loss"} <= results["rows"][name].keys()
        assert ("first_update_s" in results["rows"][name]) == (not name.startswith("reference"))
    assert results["rows"]["reference-guide"]["ratio"] == 1
    assert results["torch"] == torch.__version__ and results["ceiling_tflops"] > 0
    assert len(results["rows"]["encoding"]) == 5 and len(results["rows"]["growth"]) == 5
    assert "remark" in results["rows"]["guide-compile"]
    errors = {what: value for what, value in results["rows"]["gradients"].items() if "error" in what}
    assert len(errors) == 2 and all(1e-4 < error < 3e-2 for error in errors.values()), "bf16 keeps 8 bits"


def test_the_table_tells_what_was_measured(measured):
    _, printed, results = measured
    cells = cells_of(printed)
    assert set(cells) == results["rows"].keys() & TRAINING.keys()
    for name, row in cells.items():
        assert row["images/s"] == f"{results['rows'][name]['images_per_second']:.1f}"
        assert row["ratio"] == f"{results['rows'][name]['ratio']:.2f}"
    assert "| growth: a batch from 10,000 cached rows, ms |" in printed
    assert results["torch"] in printed and results["date"] in printed


def test_rows_whose_flags_the_script_refuses_are_left_out(measured):
    _, printed, results = measured
    for name, reason in results["left_out"].items():
        assert name not in results["rows"]
        assert f"* left out: {name} ({reason})" in printed


def test_a_row_that_fails_is_told_and_the_others_stay(measured, tmp_path):
    folder, _, before = measured
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    shutil.rmtree(tmp_path / "work" / "encoder")
    printed, after = run_benchmark(tmp_path, "--rows", "guide", "loader")
    assert "--pretrained_image_encoder_name_or_path" in after["rows"]["guide"]["error"]
    assert cells_of(printed)["guide"]["images/s"] == "-" and "failed: SystemExit" in printed
    assert "Traceback" in (tmp_path / "out" / "guide.log").read_text()
    assert after["rows"]["bf16-16"] == before["rows"]["bf16-16"]


def test_operations_are_those_that_pytorch_counts():
    """Forward on one picture, with attention as plain matrix products, which PyTorch's counter sees."""
    prior = make_prior()
    prior.set_default_attn_processor()
    picture, text = torch.zeros(1, 16, 6, 6), torch.zeros(1, 77, PRIOR_TEXT_WIDTH)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        prior(picture, torch.zeros(1), text)
    assert tflop_per_image(dict(prior.config), 6) * 1e12 == pytest.approx(3 * counter.get_total_flops(), rel=1e-9)


def test_the_real_sizes_take_as_many_operations_as_is_known():
    assert tflop_per_image({"c_in": 16} | REAL_PRIOR, 24) == pytest.approx(3.461, rel=1e-3)
