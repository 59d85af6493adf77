"""What the README says about quality and speed is what the result files say, and those can be made
anew."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from statistics import fmean, stdev

import pytest

ROOT = Path(__file__).parent.parent
RESULTS = sorted((ROOT / "results").glob("**/*.json"))
RECORDS = sorted((ROOT / "results").glob("*/records.jsonl"))


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


def test_the_readme_gives_mean_and_spread_of_the_studys_records():
    """Made again from the records, not with the script's own functions."""
    lines = (ROOT / "results" / "glue-minilm" / "records.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    own = {r["name"]: r["test"]["score"] for r in records if r["part"] == "experts"}
    wanted = {"exclusive": {"rank": 16}, "method": "linear", "parameters": {}}
    mine = [
        r
        for r in records
        if r["part"].startswith("twin ") and wanted.items() <= r["settings"].items()
    ]

    def cell(protocol):
        found = [r[protocol] for r in mine if protocol in r]
        found += [r for r in mine if r.get("protocol") == protocol]
        scores = [100 * fmean(each["scores"][t] / own[t] for t in own) for each in found]
        return f"{fmean(scores):.1f}" + (f" ± {stdev(scores):.1f}" if len(scores) > 1 else "")

    line = " | ".join(
        ["| Twin-Merging on averaging, rank 16", *map(cell, ("routed", "known-head", "oracle"))]
    )
    assert line in (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.name)
def test_a_result_says_where_it_comes_from(path):
    made = json.loads(path.read_text(encoding="utf-8"))["provenance"]
    assert re.fullmatch(r"[0-9a-f]{12}\+?", made["commit"])
    assert {"twinmerge", "torch", "transformers"} <= set(made["versions"])
    assert {"processor", "cores", "threads"} <= set(made["hardware"])


@pytest.mark.parametrize("path", [*RESULTS, *RECORDS], ids=lambda path: path.name)
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
