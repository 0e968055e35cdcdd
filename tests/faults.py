# SPDX-License-Identifier: Apache-2.0
"""Puts small faults into the training script, one at a time, and says whether its tests notice them.

    python tests/faults.py                       # all of faults.json, an hour on one core
    python tests/faults.py latents-wrong-sign    # this one

In faults.json, `old` occurs once in the script and is replaced by `new`; `tests` are pytest's arguments for
the tests that should notice. They run in a copy of the project. The exit status is 0 if all were noticed.
"""

import argparse
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

TESTS = Path(__file__).resolve().parent
SCRIPT = "train_text_to_image_prior.py"
PYTEST = ["-m", "pytest", "-x", "-q", "-n", "0", "-m", "slow or not slow", "-p", "no:cacheprovider"]
IGNORED = shutil.ignore_patterns(".git", ".venv*", "__pycache__")


def try_fault(fault: dict) -> tuple[str, str]:
    """The result, and the first test that failed or else pytest's last line."""
    with tempfile.TemporaryDirectory(prefix="fault-") as folder:
        project = shutil.copytree(TESTS.parent, Path(folder, "project"), ignore=IGNORED)
        text = (project / SCRIPT).read_text(encoding="utf-8")
        if text.count(fault["old"]) != 1:
            return "does not apply", f"the old text occurs {text.count(fault['old'])} times"
        (project / SCRIPT).write_text(text.replace(fault["old"], fault["new"]), encoding="utf-8")
        command = [sys.executable, *PYTEST, f"--basetemp={folder}/tmp", *shlex.split(fault["tests"])]
        env = os.environ | {"OMP_NUM_THREADS": "1"}
        try:
            run = subprocess.run(command, cwd=project, env=env, capture_output=True, text=True, timeout=600)
        except subprocess.TimeoutExpired as error:
            return "noticed", f"no end in {error.timeout} s"
    failed = re.search(r"^(?:FAILED|ERROR) (?:tests/)?(.*?)(?: - .*)?$", run.stdout, re.MULTILINE)
    result = {0: "NOT NOTICED", 1: "noticed"}.get(run.returncode, "tests did not run")
    return result, failed[1] if failed else run.stdout.strip().rpartition("\n")[2]


def main():
    faults = {
        fault["name"]: fault for fault in json.loads((TESTS / "faults.json").read_text(encoding="utf-8"))
    }
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="faults; all by default")
    args = parser.parse_args()
    results = []
    for name in args.names or faults:
        result, detail = try_fault(faults[name])
        results.append(result)
        print(f"{name:32} {result:14} {detail}", flush=True)
    print(f"{results.count('noticed')} of {len(results)} noticed")
    sys.exit(results.count("noticed") < len(results))


if __name__ == "__main__":
    main()
