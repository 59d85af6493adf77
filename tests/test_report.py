"""The report: its numbers, the failures it names, and its page in a real browser."""

from __future__ import annotations

import html.parser
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from math import log
from pathlib import Path

import pytest
import torch
from conftest import randn
from texts import EXPERTS, as_row, sentences, write_rows

from twinmerge import cli
from twinmerge.artifact.reader import Artifact
from twinmerge.data import read_tasks
from twinmerge.errors import CheckpointError, InputError, OutputError
from twinmerge.evaluation.report import draw, gather, markdown, measure
from twinmerge.evaluation.report import html as as_html
from twinmerge.evaluation.report import signatures as sig
from twinmerge.evaluation.report.page import write
from twinmerge.evaluation.report.spectra import singular_values, spectra
from twinmerge.evaluation.score import evaluate
from twinmerge.runtime.load import load
from twinmerge.runtime.router.calibration import calibration_error

# --------------------------------------------------------------------------------- signatures


def test_near_uniform_weights_are_named_from_nine_tenths_of_the_highest_entropy():
    assert sig.even_weights(0.91 * log(8), 8).name == "even-weights"
    assert sig.even_weights(0.89 * log(8), 8) is None
    assert sig.even_weights(0.0, 1) is None  # one expert: nothing to choose


def test_weights_that_never_leave_one_expert_are_named_with_that_expert():
    stuck = {"a": {"a": 0.97, "b": 0.03}, "b": {"a": 0.9, "b": 0.1}}
    assert "'a' has a weight of 0.9" in sig.one_expert(stuck).said
    assert sig.one_expert({"a": {"a": 1.0, "b": 0.0}, "b": {"a": 0.0, "b": 1.0}}) is None
    assert sig.one_expert({"a": {"a": 1.0, "b": 0.0}}) is None  # rows of one task alone


def test_a_task_whose_rows_mostly_go_elsewhere_is_named_with_where_they_go():
    found = sig.lost_tasks({"a": {"a": 10}, "b": {"a": 7, "b": 3}, "c": {}})
    assert "b 30% (most go to a)" in found.said
    assert sig.lost_tasks({"a": {"a": 6, "b": 4}}) is None


def test_over_compressed_experts_are_told_by_scores_and_else_by_errors():
    oracle, own = {"a": 0.90, "b": 0.80}, {"a": 0.91, "b": 0.90}
    found = sig.over_compressed(oracle, own, {"a": 0.99, "b": 0.1})
    assert "b 0.800 of 0.900" in found.said and "a 0.9" not in found.said
    assert sig.over_compressed(oracle, oracle, {"a": 0.99}) is None  # the error costs nothing
    assert "a 0.99" in sig.over_compressed(oracle, None, {"a": 0.99, "b": None}).said
    assert sig.over_compressed(oracle, None, {"a": 0.5, "b": None}) is None


def test_a_shared_expert_must_beat_what_it_is_beside():
    found = sig.useless_shared({"a": 0.4, "b": 0.5}, {"a": 0.5, "b": 0.4}, "the base")
    assert "0.450" in found.said and "the base" in found.said
    assert sig.useless_shared({"a": 0.6}, {"a": 0.5}, "the base") is None


def test_miscalibration_is_named_above_a_tenth_and_says_whether_the_temperature_helps():
    assert "does harm" in sig.miscalibrated(0.2, 0.1, 100).said
    assert "does harm" not in sig.miscalibrated(0.2, 0.3, 100).said
    assert sig.miscalibrated(0.1, 0.3, 100) is None


def test_tasks_are_confused_only_if_both_ways():
    both = {"a": {"a": 8, "b": 2}, "b": {"a": 1, "b": 9}}
    assert "a and b (20% and 10%)" in sig.confused_pairs(both).said
    assert sig.confused_pairs({"a": {"a": 5, "b": 5}, "b": {"b": 10}}) is None


def test_soft_weights_are_blamed_for_what_wrong_routing_does_not_explain():
    oracle, right, none = {"a": 0.8}, {"a": 0.95}, {"a": 0.0}
    found = sig.soft_weights({"a": 0.6}, oracle, right, none)
    assert "a 0.600 of 0.800 at 95%" in found.said and "sharpness" in found.do
    assert sig.soft_weights({"a": 0.76}, oracle, right, none) is None  # 5 % lost, 5 % routed wrong
    assert sig.soft_weights({"a": 0.6}, oracle, {"a": 0.5}, none) is None  # the choice's fault
    assert sig.soft_weights({"a": 0.6}, oracle, right, {"a": 0.3}) is None  # taken for new


def test_known_rows_taken_for_new_are_named_beyond_twice_what_the_coverage_allows():
    found = sig.too_many_new({"a": 0.05, "b": 0.03}, 0.99)
    assert "a 5%" in found.said and "b" not in found.said.split(": ")[1]
    assert sig.too_many_new({"a": 0.05}, 0.95) is None


def test_unseen_rows_that_are_not_noticed_are_named_least_first():
    found = sig.not_noticed({"x": 0.6, "y": 0.1, "z": 0.2})
    assert found.said.startswith("30%") and "y (10%), z (20%), x (60%)" in found.said
    assert sig.not_noticed({"x": 0.9, "y": 0.2}) is None and sig.not_noticed({}) is None


def test_cut_rows_few_rows_and_rows_unlike_the_routers_are_remarked():
    assert "a 10%" in sig.cut_rows({"a": 10, "b": 5}, {"a": 100, "b": 100}).said
    assert sig.cut_rows({"a": 5}, {"a": 100}) is None
    assert not sig.few_rows({"a": 49}).serious and sig.few_rows({"a": 50}) is None
    assert sig.shifted(0.7, 0.9).name == "shifted"
    assert sig.shifted(0.85, 0.9) is None and sig.shifted(0.1, None) is None


def test_the_page_of_documentation_lists_every_signature():
    source = Path(sig.__file__).read_text()
    names = re.findall(r'return Signature\(\s*"([\w-]+)"', source)
    page = (Path(__file__).parent.parent / "docs" / "report.md").read_text()
    listed = re.findall(r"^\| (`[^|]+`) \|", page.split("## Failure signatures")[1], re.M)
    assert sorted(re.findall(r"`([\w-]+)`", " ".join(listed))) == sorted(names)


# ---------------------------------------------------------------------------------- measures


def test_reliability_bins_add_up_to_the_expected_calibration_error():
    probabilities = (2 * randn(200, 4, seed=0)).softmax(dim=1)
    truth = randn(200, 4, seed=1).argmax(dim=1)
    bins = measure.reliability(probabilities, truth)
    assert sum(b.rows for b in bins) == 200
    assert all(b.low <= b.confidence <= b.high for b in bins)
    error = sum(b.rows * abs(b.right - b.confidence) for b in bins) / 200
    assert error == pytest.approx(calibration_error(probabilities, truth))


def test_probabilities_without_their_temperature_are_those_of_the_logits():
    logits = 3 * randn(20, 5, seed=0)
    heated = measure.heated((logits / 7.0).softmax(dim=1), 7.0)
    torch.testing.assert_close(heated.float(), logits.softmax(dim=1), atol=1e-5, rtol=1e-4)


def test_a_coverage_curve_keeps_the_least_odd_first_and_equals_together():
    odd = torch.tensor([3.0, 1.0, 2.0, 2.0])
    right = torch.tensor([False, True, True, False])
    curve = measure.coverage_curve(odd, right)
    assert curve == [(0.25, 1.0), (0.75, pytest.approx(2 / 3)), (1.0, 0.5)]
    assert measure.at_share(curve, 0.5) == curve[1]
    many = measure.coverage_curve(torch.arange(500.0), torch.ones(500, dtype=torch.bool))
    assert len(many) == 60 and many[-1] == (1.0, 1.0)


def test_unseen_rows_are_counted_above_the_quantile_of_the_seen():
    seen = torch.arange(100.0)
    assert measure.noticed_at(seen, torch.tensor([50.0, 95.0, 200.0, 300.0]), 0.9) == 0.75


def test_entropy_leaves_rows_without_weights_out():
    assert measure.entropy(torch.tensor([[0.5, 0.5], [0.0, 0.0]])) == pytest.approx(log(2))
    assert measure.entropy(torch.zeros(2, 3)) == 0.0


def test_singular_values_of_factors_are_those_of_their_product():
    a, b = randn(3, 8, seed=0), randn(5, 3, seed=1)
    want = torch.linalg.svdvals((b @ a).double())[:3]
    torch.testing.assert_close(singular_values(a, b), want, rtol=1e-5, atol=1e-6)


def test_spectra_are_of_the_largest_matrices_one_of_each_shape(bench):
    artifact = Artifact(bench.plain)
    found = spectra(artifact)
    shapes = [each.shape for each in found]
    assert len(set(shapes)) == len(shapes) > 1
    assert shapes == sorted(shapes, key=lambda shape: -shape[0] * shape[1])
    with artifact.expert("math") as file:
        product = file[found[0].name + ".b"] @ file[found[0].name + ".a"]
    want = torch.linalg.svdvals(product.double())[: len(found[0].values["math"])]
    torch.testing.assert_close(
        torch.tensor(found[0].values["math"]).double(), want, rtol=1e-4, atol=1e-6
    )


def test_a_chart_draws_every_point_within_its_box_and_escapes_names():
    svg = draw.chart(
        {"<a>": [(0.0, 0.0), (1.0, 1.0)]}, title='a "title"', x="x", y="y & z", diagonal=True
    )
    assert "<a>" not in svg and "&lt;a&gt;" in svg and "y &amp; z" in svg and "&quot;title" in svg
    ends = re.findall(r'<circle[^>]*cx="([\d.]+)" cy="([\d.]+)"', svg)
    assert len(ends) == 2
    assert all(0 <= float(x) <= draw.WIDTH and 0 <= float(y) <= draw.HEIGHT for x, y in ends)


@pytest.mark.parametrize("low, high", [(0, 1), (0.85, 1), (1, 16), (0, 0.031), (0, 7e-7), (1, 1)])
def test_axes_have_a_few_round_ticks_inside_their_range(low, high):
    ticks = draw._ticks(float(low), float(high))
    assert 1 <= len(ticks) <= 7 and ticks == sorted(ticks)
    assert all(low - 1e-9 <= tick <= high + 1e-9 for tick in ticks)


# ------------------------------------------------------------------------------- on an artifact


@pytest.fixture(scope="module")
def unseen():
    """Rows of a task that no expert saw; its name must be escaped."""
    words = [f"other{i} the{i % 20}" for i in range(12)]
    return {"<b>odd|task</b>": [{"text": text} for text in words]}


@pytest.fixture(scope="module")
def found(bench, unseen):
    rows, _ = read_tasks(bench.data, EXPERTS, "test")
    return gather(bench.model, rows, unseen=unseen, data="<data>", split="test")


def test_a_report_holds_what_eval_says_of_the_same_rows(bench, found):
    rows, _ = read_tasks(bench.data, EXPERTS, "test")
    for protocol, report in found.reports.items():
        want = evaluate(bench.model, rows, protocol)
        assert {n: t.score for n, t in report.tasks.items()} == {
            n: t.score for n, t in want.tasks.items()
        }
    routed = found.reports["routed"]
    assert found.routing.accuracy == pytest.approx(routed.routing_accuracy)
    for name, task in routed.tasks.items():
        assert found.routing.accuracies[name] == pytest.approx(task.routing_accuracy)
        assert found.routing.new[name] == pytest.approx(task.new)
        assert sum(found.routing.confusion[name].values()) == task.rows
    assert found.routing.curves["confidence"][-1] == (1.0, pytest.approx(found.routing.accuracy))


def test_the_numbers_are_json_and_the_base_is_found_where_the_manifest_says(bench, found):
    numbers = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert numbers["routing"]["confusion"] == found.routing.confusion
    assert set(numbers["base"]) == set(EXPERTS)
    assert {each["name"] for each in numbers["signatures"]} >= {"few-rows"}  # 12 a task


def test_unseen_tasks_have_weights_but_no_place_in_the_confusion(found, unseen):
    (name,) = unseen
    assert name in found.routing.weights and name not in found.routing.confusion
    assert found.routing.noticed.keys() == {name} and found.routing.unseen == (name,)
    assert found.unseen_rows == {name: 12}
    for told in found.routing.told:
        assert told.at == told.tasks[name]  # one unseen task is all of them


class _Page(html.parser.HTMLParser):
    """Tags that open, with their attributes; raises on a tag that closes what is not open."""

    VOID = {"meta", "line", "polyline", "circle"}

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)
        assert not self.open, self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_is_whole_needs_nothing_else_and_escapes_what_others_wrote(found):
    text = as_html(found)
    page = _Page(text)
    assert "<b>odd" not in text and "&lt;b&gt;odd" in text and "&lt;data&gt;" in text
    assert not re.search(r"""(src|href)=["'](?!#)""", text) and "url(" not in text
    assert "http://" not in text and "https://" not in text
    for tag, attributes in page.tags:
        if tag == "svg":
            assert attributes["role"] == "img" and attributes["aria-label"]
        if tag == "th":
            assert attributes["scope"] in ("row", "col")
    ids = {a["id"] for _, a in page.tags if "id" in a}
    links = {a["href"][1:] for tag, a in page.tags if tag == "a"}
    assert links and links <= ids


def test_markdown_says_the_same_as_the_page(found):
    text, page = markdown(found), as_html(found)
    assert "<b>" not in text and "&lt;b>odd\\|task" in text
    for heading in re.findall(r"<h2>(.*?)</h2>", page):
        assert f"## {heading}" in text
    for each in found.signatures:
        assert each.title in text and each.title in page
    tables = re.findall(r"(?:^\|.*\n)+", text, re.M)
    assert len(tables) == page.count("<table>")
    for table in tables:  # a bar in a name is no column
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}) == 1


def test_nothing_wrong_is_said_in_words_too(found):
    well = replace(found, signatures=())
    assert "None was seen" in as_html(well) and "None was seen" in markdown(well)


def test_without_a_router_the_rest_is_measured_and_the_page_says_why(bench):
    rows, _ = read_tasks(bench.data, EXPERTS, "test")
    found = gather(load(bench.plain), {name: table[:4] for name, table in rows.items()})
    assert found.routing is None and set(found.reports) == {"oracle", "shared"}
    for text in (as_html(found), markdown(found)):
        assert "Nothing was routed" in text and "fit-router" in text


def test_a_model_that_generates_has_its_routing_measured_without_labels(causal_bench):
    rows = {name: [as_row(text) for text in sentences(name, 6, seed=9)] for name in EXPERTS}
    found = gather(causal_bench.model, rows)
    assert found.reports == {} and found.routing.accuracy > 0.5
    assert "no heads" in as_html(found)
    with pytest.raises(InputError, match="task 'x': expected at least one row"):
        gather(causal_bench.model, rows, unseen={"x": []})
    with pytest.raises(InputError, match="no heads"):
        gather(causal_bench.model, rows, base="anywhere")


def test_experts_of_the_recipe_give_normalised_scores(bench):
    from twinmerge.recipe import load_recipe

    rows, _ = read_tasks(bench.data, EXPERTS, "test")
    recipe = load_recipe(bench.recipe).resolved(bench.recipe.parent)
    found = gather(bench.model, rows, recipe=recipe)
    assert set(found.reference) == set(EXPERTS)
    assert found.reports["oracle"].normalised() is not None
    assert "Normalised" in as_html(found)
    with pytest.raises((CheckpointError, InputError), match="nowhere"):
        gather(bench.model, rows, base="nowhere/there")


def test_a_report_that_cannot_be_written_says_where(found, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot be written"):
        write(found, tmp_path / "file" / "page.html")


# -------------------------------------------------------------------------------- command line


def call(monkeypatch, capfd, *words: object) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["twinmerge", *map(str, words)])
    capfd.readouterr()
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return ended.value.code or 0, *capfd.readouterr()


def test_report_writes_both_files_and_prints_what_to_look_at(bench, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    rows = [{"text": f"other{i}"} for i in range(3)]
    write_rows(tmp_path / "new" / "odd" / "test.jsonl", rows)
    write_rows(tmp_path / "new" / "math" / "test.jsonl", rows)
    code, out, err = call(
        monkeypatch, capfd, "report", bench.routed, bench.data, "--rows", 3, "--unseen", "new"
    )
    assert code == 0 and "Few rows" in out and "routed-report.html" in out
    assert "'math' is an expert" in err
    assert (tmp_path / "routed-report.html").read_text().startswith("<!doctype html>")
    assert (tmp_path / "routed-report.md").read_text().startswith("# routed")
    code, out, _ = call(
        monkeypatch, capfd, "report", bench.routed, bench.data, "--rows", 3, "--json",
        "--to", "sub/page.html",
    )  # fmt: skip
    numbers = json.loads(out)
    assert code == 0 and numbers["rows"] == dict.fromkeys(EXPERTS, 3)
    assert all(Path(file).is_file() for file in numbers["written"])


def test_report_refuses_a_name_that_is_no_page_and_a_folder_without_rows(
    bench, tmp_path, monkeypatch, capfd
):
    code, out, err = call(monkeypatch, capfd, "report", bench.routed, bench.data, "--to", "x.pdf")
    assert code == 1 and out == "" and "ends in .html" in err
    (tmp_path / "none").mkdir()
    code, out, err = call(
        monkeypatch, capfd, "report", bench.routed, bench.data, "--unseen", tmp_path / "none"
    )
    assert code == 1 and out == "" and "no rows of other tasks" in err


# ------------------------------------------------------------------------------------- browser

FLAGS = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run"),
    *("--disable-background-networking", "--hide-scrollbars"),
]


def browse(page: Path, folder: Path, *flags: str) -> str:
    """What headless Chromium prints of a page, opened with a profile of its own."""
    names = ("chromium", "chromium-browser", "google-chrome")
    browser = next(filter(None, map(shutil.which, names)), None)
    if browser is None:
        pytest.skip(f"no browser: none of {', '.join(names)} is installed (make browser)")
    profile = folder / f"profile-{len(os.listdir(folder))}"
    done = subprocess.run(
        [browser, *FLAGS, f"--user-data-dir={profile}", *flags, page.as_uri()],
        capture_output=True, text=True, timeout=120, cwd=folder,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def root_of(dom: str) -> str:
    return re.search(r"<html[^>]*>", dom)[0]


@pytest.mark.slow
def test_the_page_runs_in_a_browser_without_a_script_error(found, tmp_path):
    page, _ = write(found, tmp_path / "page.html")
    root = root_of(browse(page, tmp_path, "--dump-dom"))
    assert 'data-ready="yes"' in root and "data-error" not in root
    # the script's own errors would be seen: the same page with one more line that fails
    broken = page.read_text().replace("</script>", "nothing.there();</script>")
    (tmp_path / "broken.html").write_text(broken)
    assert "data-error" in root_of(browse(tmp_path / "broken.html", tmp_path, "--dump-dom"))


@pytest.mark.slow
def test_tables_sort_tips_show_and_nothing_is_wider_than_a_phone(found, tmp_path):
    page, _ = write(found, tmp_path / "page.html")
    script = """
      const table = document.querySelector("#routing table");
      const head = table.tHead.rows[0].cells[1], values = () =>
        [...table.tBodies[0].rows].map((row) => Number(row.cells[1].dataset.v));
      head.querySelector("button").click(); const up = values();
      head.querySelector("button").click(); const down = values();
      const at = document.querySelector("circle[data-tip]");
      at.dispatchEvent(new PointerEvent("pointerover", { bubbles: true }));
      const said = document.getElementById("tip");
      document.documentElement.dataset.told = JSON.stringify({
        up, down, tip: !said.hidden && said.textContent === at.dataset.tip,
        wide: document.documentElement.scrollWidth - innerWidth,
      });
    """
    (tmp_path / "asked.html").write_text(
        page.read_text().replace("</script>", f"{script}</script>")
    )
    root = root_of(
        browse(tmp_path / "asked.html", tmp_path, "--dump-dom", "--window-size=390,2000")
    )
    assert "data-error" not in root
    told = json.loads(html.unescape(re.search(r'data-told="([^"]*)"', root)[1]))
    assert told["up"] == sorted(told["up"]) and told["down"] == sorted(told["up"], reverse=True)
    assert len(set(told["up"])) > 1 and told["tip"] and told["wide"] <= 0


@pytest.mark.slow
@pytest.mark.parametrize("size", ["1280,2400", "390,2400"])
def test_a_picture_of_the_page_can_be_taken(found, tmp_path, size):
    page, _ = write(found, tmp_path / "page.html")
    picture = tmp_path / "page.png"
    browse(page, tmp_path, f"--window-size={size}", f"--screenshot={picture}")
    assert picture.read_bytes().startswith(b"\x89PNG") and picture.stat().st_size > 5_000
