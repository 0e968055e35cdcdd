# SPDX-License-Identifier: Apache-2.0
"""For maintainers: the script's tables of contents are true, its landmarks are there, and it stays small.

An edit of a place that the docstring lists does not fail here: limits leave it out, and what only it uses."""

import ast
import re

import pytest
from conftest import SCRIPT, TESTS, script

TREE = ast.parse(SCRIPT.read_text(encoding="utf-8"))
LINES = SCRIPT.read_text(encoding="utf-8").splitlines()
DOCSTRING = ast.get_docstring(TREE)
DEFINED = (ast.FunctionDef, ast.ClassDef)
DEFINITIONS = {node.name: node for node in TREE.body if isinstance(node, DEFINED)}
HEADINGS = {m[1]: i for i, line in enumerate(LINES, 1) if (m := re.match(r"# [-=]{3,} (Part \d|\w+)", line))}
TO_EDIT = re.findall(r"`(\w+)`", re.search(r"Where to edit:.*?\n\n", DOCSTRING, re.DOTALL)[0])
SOURCES = {name: LINES[node.lineno - 1 : node.end_lineno] for name, node in DEFINITIONS.items()}


def lines_outside(names):
    spans = [range(DEFINITIONS[name].lineno, DEFINITIONS[name].end_lineno + 1) for name in names]
    return [line for number, line in enumerate(LINES, 1) if not any(number in span for span in spans)]


USED = set(re.findall(r"\w+", re.sub(r"(?m)^(def|class) \w+", "", "\n".join(lines_outside(TO_EDIT)))))
OURS = DEFINITIONS.keys() & USED - {*TO_EDIT}  # without helpers that only an edited place calls
REST = lines_outside(DEFINITIONS.keys() - OURS)


def test_both_tables_of_contents_list_the_sections_and_their_definitions_in_order():
    contents = []
    for part, table in re.findall(r"^(Part \d) .*?:\n\n(.*?)\n\n", DOCSTRING, re.MULTILINE | re.DOTALL):
        sections = re.findall(r"^    (\w+) +(.*(?:\n {8}.*)*)", table, re.MULTILINE)
        contents += [(part, []), *((section, re.findall(r"\w+", names)) for section, names in sections)]
    assert [name for name, _ in contents] == list(HEADINGS)
    bounds = [*HEADINGS.values(), len(LINES)]
    for (section, names), start, end in zip(contents, bounds, bounds[1:], strict=False):
        lines = [start, *(DEFINITIONS[name].lineno for name in names), end]
        assert lines == sorted(lines), section
    assert LINES[-2:] == ['if __name__ == "__main__":', "    main()"]


def test_places_to_edit_and_the_guides_landmarks_keep_their_names():
    guide = "parse_args main tokenize_captions preprocess_train log_validation save_model_card"
    assert {*TO_EDIT, *re.findall(r"\w+", guide)} <= DEFINITIONS.keys() and len(TO_EDIT) >= 11


def test_landmarks_in_places_to_edit_are_there_while_the_code_is_ours():
    optimizer, loss = ("\n".join(SOURCES[name]) for name in ("make_optimizer", "diffusion_loss"))
    assert "import AdamW8bit as optimizer_cls" in optimizer or "args.optimizer" not in optimizer
    line = "pred_noise = prior(noisy_latents, timesteps, prompt_embeds)"
    assert line in loss or "prior(noisy_" not in loss


def test_the_loss_is_defined_once_for_training_and_held_out_rows():
    rest = "\n".join(REST)
    assert "mse_loss(" not in rest and "pred_noise" not in rest
    callers = [name for name in SOURCES if " diffusion_loss(*inputs" in "\n".join(SOURCES[name])]
    assert callers == ["compute_held_out_loss", "main"]


def test_the_script_is_within_its_limits():
    long = {name: len(SOURCES[name]) for name in OURS if len(SOURCES[name]) > 60}
    assert long.keys() <= {"main", "parse_args"} and long["main"] <= 165, long
    assert len(OURS | {*TO_EDIT}) <= 100
    assert [line for line in REST if len(line) > 110] == []


def test_the_readmes_flags_are_the_scripts(capsys):
    with pytest.raises(SystemExit):
        script.parse_args(["--help"])
    flags = re.findall(r"^  (--\w+)", capsys.readouterr().out, re.MULTILINE)
    readme = SCRIPT.with_name("README.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`(--\w+)", readme))
    others = {"--help", "--hub_private_repo", "--nproc_per_node", "--nnodes", "--node_rank", "--master_addr"}
    assert len(flags) > 55 and len(named) > 40 and named <= {*flags, *others}, named - {*flags}


def test_the_encoder_has_its_file_to_itself():
    source = SCRIPT.with_name("modeling_efficient_net_encoder.py").read_text(encoding="utf-8")
    definitions = [node.name for node in ast.parse(source).body if isinstance(node, DEFINED)]
    assert definitions == ["EfficientNetEncoder"] and len(source.splitlines()) <= 110


def test_tests_do_not_share_names_or_import_each_other():
    trees = [ast.parse(file.read_text(encoding="utf-8")) for file in TESTS.glob("test_*.py")]
    nodes = [node for tree in trees for node in ast.walk(tree)]
    names = [node.name for node in nodes if isinstance(node, DEFINED) and node.name.startswith("test_")]
    modules = [node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)]
    assert sorted(names) == sorted(set(names)) and not [name for name in modules if name.startswith("test_")]
