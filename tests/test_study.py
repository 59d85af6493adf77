"""The text study as a command: every part, on tiny experts, goes on where it stopped."""

from __future__ import annotations

import importlib
import itertools
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from texts import EXPERTS, write_rows

from twinmerge.data import read_rows
from twinmerge.errors import RecipeError

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")


@pytest.fixture(scope="module")
def glue():
    return importlib.import_module("glue")


@pytest.fixture(scope="module")
def places(bench, tmp_path_factory):
    """Experts, data and base as the command takes them."""
    experts, data = tmp_path_factory.mktemp("experts"), tmp_path_factory.mktemp("data")
    for name in EXPERTS:
        shutil.copytree(bench.made.experts[name], experts / name)
    shutil.copytree(bench.data, data, dirs_exist_ok=True)
    for path in (data / "law").iterdir():  # see test_study_parts: else it has no score
        write_rows(path, [row for i, row in enumerate(read_rows(path)) if i % 5 != 4])
    return {"experts": [experts], "data": [data], "base": str(bench.made.base)}


def run(glue: Any, out: Path, **more: Any) -> None:
    given = {"part": None, "work": out / "work", "title": "tiny", "noisy": "", "tables": False}
    given |= {"choose_rows": 6, "test_rows": 8, "router_rows": 30, "max_tokens": 24}
    glue.main(out=out, quick=True, **given | more)


@pytest.mark.slow
def test_every_part_of_a_quick_study_runs_and_a_second_run_measures_nothing(
    glue, places, tmp_path, monkeypatch, capsys
):
    static = sys.modules["lab.static"]
    for name in set(static.STATIC) - {"averaging", "task arithmetic", "TIES"}:
        monkeypatch.delitem(static.STATIC, name)
    ladders = {"weight": (0.3,), "density": (0.2,), "lambda": (1.0,)}
    monkeypatch.setattr(static, "LADDERS", ladders)
    compression = sys.modules["lab.compression"]
    few = [{"rank": 1, "dtype": "int4"}, {"budget": "1%"}, {"form": "dropout", "density": 0.1}]
    monkeypatch.setattr(compression, "settings", lambda lab: few)
    run(glue, tmp_path / "out", **places)
    written = capsys.readouterr().out.split()
    assert all(Path(path).is_file() for path in written)
    assert {Path(path).name for path in written} >= {"tables.md", "report.html"}
    lines = (tmp_path / "out" / "records.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    parts = {record["part"] for record in records}
    wanted = {"experts", "static", "twin oracle", "twin routed", "ablation", "rival", "tasks"}
    assert parts >= wanted | {"unseen", "routing", "grouped", "cost"}
    assert all(record["commit"] and "settings" in record for record in records)
    monkeypatch.setattr(glue, "write", lambda out: [])  # tables of the same records again
    run(glue, tmp_path / "out", **places)
    assert (tmp_path / "out" / "records.jsonl").read_text().splitlines() == lines


def test_coefficients_are_searched_until_their_neighbours_are_worse(glue, monkeypatch):
    static = sys.modules["lab.static"]
    asked = []

    def score(lab, name, parameters, say):
        asked.append(dict(parameters))
        return -((parameters["density"] - 0.65) ** 2) - (parameters["lambda"] - 3.0) ** 2

    monkeypatch.setattr(static, "score", score)
    found = static.chosen(None, "TIES", print)
    assert found == {"density": 0.65, "lambda": 3.0}
    assert len(asked) == len({tuple(each.values()) for each in asked})
    assert static.chosen(None, "averaging", print) == {}


def test_every_step_of_a_search_is_a_recipe(glue, places, tmp_path):
    static, lab = sys.modules["lab.static"], sys.modules["lab.lab"]
    experts = {name: places["experts"][0] / name for name in EXPERTS}
    none = {"settings": lab.Settings(), "records": None, "data": {}, "work": tmp_path}
    tiny = lab.Lab(list(EXPERTS), experts, base=places["base"], **none)
    tried = 0
    for method in static.STATIC.values():
        ladders = (static.LADDERS[name] for name in method.start)
        for values in itertools.product(*ladders):
            parameters = dict(zip(method.start, values, strict=True))
            if static.possible(method, parameters):
                tiny.recipe(method.method, parameters | method.fixed)
                tried += 1
            elif parameters["density"] < 1:  # of 1, DELLA keeps all; no step leads there
                with pytest.raises(RecipeError, match="epsilon"):
                    tiny.recipe(method.method, parameters | method.fixed)
        assert static.possible(method, method.start)
    assert tried > 200


def test_other_weights_or_rows_are_another_study(glue, places, tmp_path):
    inputs = sys.modules["lab.inputs"].inputs
    experts = {name: places["experts"][0] / name for name in EXPERTS}
    rows = {name: places["data"][0] / name for name in EXPERTS}
    before = inputs(places["base"], experts, rows)
    assert inputs(places["base"], experts, rows) == before
    shutil.copytree(rows["math"], tmp_path / "math")
    with open(tmp_path / "math" / "train.jsonl", "a") as file:
        file.write("\n")
    after = inputs(places["base"], experts, rows | {"math": tmp_path / "math"})
    assert after["rows"]["math"] != before["rows"]["math"]
    assert after["experts"] == before["experts"] and after["base"] == before["base"]
    changed = inputs(places["base"], experts | {"code": experts["law"]}, rows)
    assert changed["experts"]["code"] == before["experts"]["law"] != before["experts"]["code"]


def test_a_study_goes_on_only_with_the_settings_that_it_began_with(glue, places, tmp_path):
    records, settings = sys.modules["lab.records"], {"rows": 3, "seeds": (0, 1)}
    records.Records(tmp_path, settings)
    records.Records(tmp_path, settings)
    with pytest.raises(Exception, match="rows 3; now it is 4"):
        records.Records(tmp_path, settings | {"rows": 4})


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"experts": None}, "--experts: missing"),
        ({"experts": [Path("nowhere")]}, "nowhere: expected a folder"),
        ({"data": None}, "--data: missing"),
        ({"base": None}, "--base: missing"),
        ({"noisy": "meth"}, "--noisy meth: no such task here. Known: code, law, math"),
    ],
)
def test_bad_input_is_one_line(glue, places, tmp_path, change, says):
    with pytest.raises(SystemExit, match=says):
        run(glue, tmp_path / "out", **{**places, **change})
    assert not (tmp_path / "out").exists()


def test_experts_without_rows_are_named(glue, places, tmp_path):
    shutil.copytree(places["data"][0], tmp_path / "data")
    shutil.rmtree(tmp_path / "data" / "math")
    with pytest.raises(SystemExit, match="expert 'math': no rows"):
        run(glue, tmp_path / "out", **{**places, "data": [tmp_path / "data"]})


def test_a_broken_record_is_named(glue, tmp_path):
    records = sys.modules["lab.records"]
    kept = records.Records(tmp_path, {})
    kept.once("part", "name", {}, lambda: {"value": 1})
    with open(kept.file, "a") as file:
        file.write('{"part": "hal')
    with pytest.raises(Exception, match="line 2: expected a JSON object"):
        kept.all()
