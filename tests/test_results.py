"""What the README says about quality and speed is what the result files say, and those can be made
anew."""

from __future__ import annotations

import json
import os
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
    for name in ("quality", "per-task", "speed", "building", "svd"):
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


@pytest.mark.slow
def test_the_build_benchmark_runs_and_leaves_what_other_parts_found(tmp_path, monkeypatch):
    out = tmp_path / "build.json"
    before = {"commit": "0" * 12, "rows": []}
    out.write_text(json.dumps({"provenance": {}, "budget": before}))
    small = ["--point", "0.002:64", "--repeats", "1"]
    done = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / "build.py", "--part", "linear", *small]
        + ["--work", tmp_path, "--out", out],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(out.read_text(encoding="utf-8"))
    assert found["budget"] == before
    (row,) = found["linear"]["rows"]
    runs = row["runs"]
    assert {"read and write", "twinmerge", "mergekit", "twinmerge cold"} <= set(runs)
    assert 0 < runs["twinmerge"]["seconds"] and 0 < runs["twinmerge"]["peak_resident_bytes"]
    assert row["largest_difference"] < 1e-6  # the same merge: sums in another order at most
    assert [path.name for path in tmp_path.iterdir()] == ["build.json"]

    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import tables

    monkeypatch.setattr(tables, "read", lambda name: found if name == "build" else None)
    assert "| linear, float32 | 0.00 |" in tables.building()
