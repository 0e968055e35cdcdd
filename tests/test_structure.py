# SPDX-License-Identifier: Apache-2.0
"""The script's structure: its table of contents is true, and its landmarks are there."""

import ast
import re
from pathlib import Path

import pytest
from conftest import SCRIPT, script

ENCODER = SCRIPT.with_name("modeling_efficient_net_encoder.py")
README = SCRIPT.with_name("README.md")
SOURCE = SCRIPT.read_text(encoding="utf-8")
TREE = ast.parse(SOURCE)
DEFINITIONS = {node.name: node for node in TREE.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
SECTION = re.compile(r"^# -{3,} (?:--)?(\w+)", re.MULTILINE)


def read_contents():
    """The docstring's table of contents: {first word of a section's name: the names listed for it}."""
    table = re.search(r"is the summary:\n\n(.*?)\n\n", ast.get_docstring(TREE), re.DOTALL).group(1)
    contents = {}
    for line in table.splitlines():
        section, names = re.fullmatch(r" *(\w+(?: \w+)?) {2,}(.*?)(?: \(need not be read\))?", line).groups()
        contents[section.split()[0]] = names.split(", ")
    return contents


def test_the_table_of_contents_lists_the_sections_in_their_order():
    headings = [match.group(1).removesuffix("_latents") for match in SECTION.finditer(SOURCE)]
    assert list(read_contents()) == headings


def test_each_name_in_the_table_of_contents_is_defined_in_its_section_in_that_order():
    starts = {match.group(1).removesuffix("_latents"): match.start() for match in SECTION.finditer(SOURCE)}
    ends = dict(zip(starts, [*list(starts.values())[1:], len(SOURCE)], strict=True))
    for section, names in read_contents().items():
        lines = [DEFINITIONS[name].lineno for name in names]
        first, last = (SOURCE[:position].count("\n") + 1 for position in (starts[section], ends[section]))
        assert all(first < line <= last for line in lines), section
        assert lines == sorted(lines), section


def test_the_places_to_edit_exist():
    text = re.search(r"Where to edit:(.*?)\n\n", ast.get_docstring(TREE), re.DOTALL).group(1)
    names = re.findall(r"`(\w+)`", text)
    assert len(names) >= 6
    assert set(names) <= DEFINITIONS.keys()


@pytest.mark.parametrize(
    "name",
    ["parse_args", "main", "tokenize_captions", "preprocess_train", "save_model_card", "optimizer_cls"],
)
def test_the_guides_landmarks_keep_their_names(name):
    assert re.search(rf"\b(def {name}\(|as {name}\b|{name} = )", SOURCE)


def test_the_loss_is_defined_once_in_the_guides_words():
    lines = [line.strip() for line in SOURCE.splitlines()]
    assert lines.count("pred_noise = prior(noisy_latents, timesteps, prompt_embeds)") == 1
    assert SOURCE.count("F.mse_loss(") == 1
    assert SOURCE.count(" diffusion_loss(") == 3, "its definition, the training step and the held-out loss"
    assert hasattr(script.Validator, "log_validation")


def test_functions_fit_on_a_screen():
    functions = [node for node in ast.walk(TREE) if isinstance(node, ast.FunctionDef)]
    lengths = {node.name: node.end_lineno - node.lineno + 1 for node in functions}
    long = {name: length for name, length in lengths.items() if length > 60}
    assert long.keys() == {"main", "parse_args"}, long
    assert lengths["main"] <= 180


def test_the_encoder_has_its_file_to_itself():
    tree = ast.parse(ENCODER.read_text(encoding="utf-8"))
    names = [node.name for node in tree.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))]
    assert names == ["EfficientNetEncoder"]
    assert len(ENCODER.read_text(encoding="utf-8").splitlines()) <= 110


def test_every_flag_is_in_the_readme():
    flags = set(re.findall(r'add\(\s*"--(\w+)"', SOURCE))
    assert len(flags) > 50
    readme = README.read_text(encoding="utf-8")
    assert {flag for flag in flags if f"`--{flag}" not in readme} == set()


def test_tests_do_not_share_names_or_import_each_other():
    names = []
    for file in Path(__file__).parent.glob("test_*.py"):
        tree = ast.parse(file.read_text(encoding="utf-8"))
        names += [node.name for node in tree.body if getattr(node, "name", "").startswith("test_")]
        imports = [node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
        assert not any(module and module.startswith("test_") for module in imports), file.name
    assert sorted(names) == sorted(set(names))
