# SPDX-License-Identifier: Apache-2.0
"""The benchmark runs, tiny, and reports what it should. No test checks how fast anything is."""

import json
import math
import re
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
# Nothing is compiled on a CPU, so one compiled row is enough.
REQUESTED = [name for name in ROWS if not name.endswith("-compile") or name == "guide-compile"]
TRAINED = {
    "reference-guide",
    "reference-bf16-16",
    "guide",
    "guide-cached",
    "bf16-16",
    "bf16-16-cached",
    "bf16-32-cached",
    "guide-8bit-adam",
}
TRAINING_COLUMNS = {"images_per_second", "ratio", "share_of_ceiling", "peak_gib", "loss"}


def run_benchmark(folder, *args, **env):
    """Runs the program as a user does, without a GPU; returns its output and results.json."""
    command = [sys.executable, TESTS / "benchmarks" / "benchmark.py"]
    command += ["--out", folder / "out", "--work", folder / "work"]
    environment = {"CUDA_VISIBLE_DEVICES": "", "HF_HOME": str(folder / "home"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, *args], capture_output=True, text=True, timeout=300, env=environment | env
    )
    assert done.returncode == 0, done.stderr
    return done.stdout, json.loads((folder / "out" / "results.json").read_text())


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """The folder, the output and results.json of a benchmark of all rows."""
    folder = tmp_path_factory.mktemp("benchmark")
    return folder, *run_benchmark(folder, "--rows", *REQUESTED)


@pytest.fixture
def measured_copy(measured, tmp_path):
    shutil.copytree(measured[0], tmp_path, dirs_exist_ok=True)
    return tmp_path


def read_cells(printed):
    """The first table: each row's cells by column."""
    lines = [line.strip("| ").split(" | ") for line in printed.splitlines() if line.startswith("| ")]
    columns = lines[0]
    return {line[0]: dict(zip(columns, line, strict=False)) for line in lines[1 : lines.index(["what"])]}


def test_every_row_is_measured(measured):
    _, _, results = measured
    assert set(results["rows"]) == set(REQUESTED) - set(results["rejected"])
    assert {*TRAINED, "encoding", "loader", "growth"} <= set(results["rows"])
    for name, row in results["rows"].items():
        assert "error" not in row, (name, row)
        for what, value in row.items():
            if what == "remark":
                assert "--compile is ignored" in value and name.endswith(("-compile", "gradients"))
                continue
            may_be_zero = what == "skipped_steps"
            assert math.isfinite(value) and (value > 0 or (may_be_zero and value == 0)), (name, what, value)
    for name in results["rows"].keys() & TRAINING.keys():
        assert results["rows"][name].keys() >= TRAINING_COLUMNS
        assert ("first_step_s" in results["rows"][name]) == (not name.startswith("reference"))
    assert results["rows"]["reference-guide"]["ratio"] == 1
    assert results["torch"] == torch.__version__ and results["ceiling_tflops"] > 0
    assert len(results["rows"]["encoding"]) == 5 and len(results["rows"]["growth"]) == 5
    assert "remark" in results["rows"]["guide-compile"]
    errors = {what: value for what, value in results["rows"]["gradients"].items() if "error" in what}
    assert len(errors) == 2 and all(1e-4 < error < 3e-2 for error in errors.values()), "bf16 keeps 8 bits"


def test_the_table_shows_what_was_measured(measured):
    _, printed, results = measured
    cells = read_cells(printed)
    assert set(cells) == results["rows"].keys() & TRAINING.keys()
    for name, row in cells.items():
        assert row["images/s"] == f"{results['rows'][name]['images_per_second']:.1f}"
        assert row["ratio"] == f"{results['rows'][name]['ratio']:.2f}"
    assert "| growth: a batch from 10,000 cached rows, ms |" in printed
    assert results["torch"] in printed and results["date"] in printed


def test_rows_whose_flags_the_script_rejects_are_not_run(measured_copy):
    """Those of --use_8bit_adam, in a process that does not find bitsandbytes."""
    shutil.rmtree(measured_copy / "out")
    (measured_copy / "sitecustomize.py").write_text("import sys\nsys.modules['bitsandbytes'] = None\n")
    rows = ["guide-8bit-adam", "loader"]
    printed, results = run_benchmark(measured_copy, "--rows", *rows, PYTHONPATH=str(measured_copy))
    assert results["rows"].keys() == {"loader"} and results["rejected"].keys() == {"guide-8bit-adam"}
    assert "* not run: guide-8bit-adam (--optimizer=adamw8bit needs bitsandbytes" in printed


def test_a_row_that_fails_is_reported_and_the_others_stay(measured, measured_copy):
    _, _, before = measured
    shutil.rmtree(measured_copy / "work" / "encoder")
    printed, after = run_benchmark(measured_copy, "--rows", "guide", "loader")
    assert "--pretrained_image_encoder_name_or_path" in after["rows"]["guide"]["error"]
    assert read_cells(printed)["guide"]["images/s"] == "-" and "failed: SystemExit" in printed
    assert "Traceback" in (measured_copy / "out" / "guide.log").read_text()
    assert after["rows"]["bf16-16"] == before["rows"]["bf16-16"]


def test_the_operations_are_those_that_pytorch_counts():
    """Forward on one image, with attention as plain matrix products, which PyTorch's counter sees."""
    prior = make_prior()
    prior.set_default_attn_processor()
    latents, prompt_embeds = torch.zeros(1, 16, 6, 6), torch.zeros(1, 77, PRIOR_TEXT_WIDTH)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        prior(latents, torch.zeros(1), prompt_embeds)
    expected = 3 * counter.get_total_flops()
    assert tflop_per_image(dict(prior.config), 6) * 1e12 == pytest.approx(expected, rel=1e-9)


def test_the_published_sizes_take_the_known_number_of_operations():
    assert tflop_per_image({"c_in": 16} | REAL_PRIOR, 24) == pytest.approx(3.461, rel=1e-3)


def test_growth_is_measured_for_each_size():
    sizes = {"rows": [100, 2000], "steps": [10, 3000], "checkpoints": [1, 30], "prompts": [1, 3]}
    command = [sys.executable, TESTS / "benchmarks" / "growth.py"]
    for kind, counts in sizes.items():
        command += [f"--{kind}", *map(str, counts)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    rows = re.findall(r"^\| ([\d,]+) (\w+) \| (.+) \| (\S+) \| (\S+) \|$", done.stdout, re.MULTILINE)
    found = {(kind, int(count.replace(",", ""))) for count, kind, *_ in rows}
    assert found == {(kind, count) for kind, counts in sizes.items() for count in counts}
    assert len(rows) == 2 * (6 + 3 + 1 + 1) and all(float(seconds) > 0 for *_, seconds, _ in rows)
