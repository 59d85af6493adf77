"""What the README says about quality and speed is what the result files say."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
RESULTS = sorted((ROOT / "results").glob("*.json"))


def test_the_readme_shows_what_the_result_files_say():
    done = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / "tables.py", "--check"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_table_of_the_readme_has_its_results():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for name in ("quality", "per-task", "speed", "building"):
        table = re.search(rf"<!-- {name} -->\n(.*?)<!-- /{name} -->", text, re.DOTALL)
        assert table is not None and "|" in table[1], name


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.name)
def test_a_result_says_where_it_comes_from(path):
    data = json.loads(path.read_text(encoding="utf-8"))
    made = data["provenance"]
    assert re.fullmatch(r"[0-9a-f]{12}\+?", made["commit"])
    assert {"twinmerge", "torch", "transformers"} <= set(made["versions"])
    assert {"processor", "cores", "threads"} <= set(made["hardware"])


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.name)
def test_a_result_names_no_folder_of_the_machine_that_made_it(path):
    assert not re.search(r'"[^"]*/(tmp|home|root|work|Users)/', path.read_text(encoding="utf-8"))
