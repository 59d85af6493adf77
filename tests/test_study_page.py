"""A study's tables, plots and page say what its records say, and nothing that they do not."""

from __future__ import annotations

import base64
import html
import importlib
import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from statistics import fmean, stdev
from types import SimpleNamespace
from typing import Any

import pytest

from twinmerge.errors import InputError

TASKS = ["cola", "mnli", "rte", "sst2"]
OWN = {"cola": 0.41, "mnli": 0.77, "rte": 0.62, "sst2": 0.9}
ROWS = {"cola": 1043, "mnli": 9815, "rte": 277, "sst2": 872}
RANKS = (1, 4, 16, 64)
SEEDS = (0, 1, 2)
LEFT_OUT = "left out"
TOO_SMALL = {"budget": "0.001%", "dtype": "int4"}
STATIC = {"pretrained": 0.45, "averaging": 0.6, "task arithmetic": 0.7, "TIES": 0.68}


@pytest.fixture(scope="module")
def lab():
    names = ("page", "plots", "plots_lines", "published", "readme", "shown", "tables")
    return SimpleNamespace(**{n: importlib.import_module(f"lab.page.{n}") for n in names})


# -------------------------------------------------------------------------------- made-up records


def result(level: float, shift: float = 0.0) -> dict[str, Any]:
    """As `Lab.normalised` makes it; tasks differ a little."""
    shares = {t: level * (1 + 0.02 * i) + shift for i, t in enumerate(TASKS)}
    scores = {t: share * OWN[t] for t, share in shares.items()}
    quiet = [share for t, share in shares.items() if t != "rte"]
    return {
        "scores": scores,
        "normalised": fmean(shares.values()),
        "normalised_without_noisy": fmean(quiet),
        "mean": fmean(scores.values()),
        "rows": ROWS,
    }


def sizes(share: float, count: int = len(TASKS)) -> dict[str, Any]:
    base = 45_000_000
    experts = round(count * share * base)
    return {
        "shared": 2 * base, "experts": experts, "router": 1_200_000, "base_float16": base,
        "share": share,
    }  # fmt: skip


def part_experts():
    for task, own in OWN.items():
        metric = "matthews" if task == "cola" else "accuracy"
        scored = {
            split: {"score": own + more, "metric": metric, "rows": rows, "seconds": 1.5}
            for split, more, rows in (("validation", 0.013, 200), ("test", 0.0, ROWS[task]))
        }
        yield record("experts", task, {}, **scored)
        everything = scored["validation"] | {"rows": ROWS[task]}
        yield record("experts, all validation", task, {}, **{"all validation": everything})


def part_static():
    for weight, level in ((0.2, 0.66), (0.3, 0.71), (0.4, 0.64)):
        settings = {"method": "m", "weight": weight}
        yield record("choice", "task arithmetic", settings, **result(level))
    for name, level in STATIC.items():
        settings = {"method": "m", "parameters": {"weight": 0.3}}
        yield record("static", name, settings, protocol="known-head", **result(level))
    yield record("choice", "SCE", {"method": "m", "weight": 0.5}, **result(0.5))
    for name in ("task arithmetic", "SCE"):  # of earlier coefficients
        settings = {"method": "m", "parameters": {"weight": 0.2}}
        yield record("static", name, settings, protocol="known-head", **result(0.123))


def twin_level(rank: int) -> float:
    return 1 - 0.2 / (1 + rank) ** 0.5


def part_twin():
    for number, shared in enumerate(("averaging", "task arithmetic", "TIES")):
        for rank in RANKS:
            parameters = {"weight": 0.3} if shared == "task arithmetic" else {}
            settings = {"method": "m", "parameters": parameters, "exclusive": {"rank": rank}}
            level, share = twin_level(rank) - 0.01 * number, 0.0012 * rank
            yield record(
                "twin oracle", shared, settings, protocol="oracle", bytes=sizes(share),
                **result(level),
            )  # fmt: skip
            if shared == "TIES" and rank == 64:
                yield record("twin routed", shared, settings | {"seed": 0}, **{LEFT_OUT: "no time"})
            for seed in SEEDS if shared == "averaging" or rank in (1, 16) else ():
                yield record(
                    "twin routed", shared, settings | {"seed": seed},
                    **{"known-head": result(level - 0.02, 0.001 * seed)},
                    routed=result(level - 0.04, 0.003 * seed),
                    router={
                        "kind": "mlp", "layers": [3, 6], "held_out_accuracy": 0.981,
                        "calibration_error": 0.012, "temperature": 1.31, "sharpness": 4,
                        "bytes": 1_200_000,
                    },
                    routing={"accuracy": 0.955, "tasks": {
                        task: {
                            "weights": [0.91 if i == j else 0.03 for j in range(4)],
                            "chosen": [1003 if i == j else 17 for j in range(4)], "new": 0.021,
                        } for i, task in enumerate(TASKS)
                    }},
                )  # fmt: skip


def part_ablation():
    for name, exclusive, level in (
        ("pretrained", {}, 0.45), ("shared", {}, 0.6),
        ("pretrained + dynamic", {"rank": 16}, 0.91), ("shared + dynamic", {"rank": 16}, 0.95),
        ("dynamic on cola", {"rank": 16}, 0.83), ("dynamic on sst2", {"rank": 16}, 0.87),
    ):  # fmt: skip
        settings = {"method": "m", "parameters": {}, "exclusive": exclusive, "each": {}}
        if not exclusive:
            yield record("ablation", name, settings, shared=result(level))
            continue
        yield record(
            "ablation", name, settings, oracle=result(level + 0.02), bytes=sizes(0.019),
            **{"known-head": result(level)}, routed=result(level - 0.02),
        )  # fmt: skip


def part_compression():
    kinds: list[tuple[dict[str, Any], float, float]] = []
    for dtype, size in (("float32", 2.0), ("float16", 1.0), ("int8", 0.5), ("int4", 0.27)):
        kinds += [({"rank": r, "dtype": dtype}, 0.0012 * r * size, twin_level(r)) for r in RANKS]
    for share in (0.5, 1, 2):
        level = 0.9 + 0.04 * share
        kinds.append(({"budget": f"{share}%", "dtype": "int4"}, share / 100, level))
        kinds.append(({"budget": f"{2 * share:g}%", "dtype": "float16"}, share / 50, level))
    kinds += [({"energy": e, "dtype": "float16"}, e / 5, 0.8 + e / 5) for e in (0.3, 0.6, 0.9)]
    for form, more in (("magnitude", {"scope": "tensor"}), ("magnitude", {"scope": "all"}),
                       ("dropout", {})):  # fmt: skip
        for density in (0.05, 0.1, 0.3):
            exclusive = {"form": form, "density": density, **more, "dtype": "float16"}
            kinds.append((exclusive, 3 * density, 0.7 + density - 0.1 * (form == "dropout")))
    for exclusive, share, level in kinds:
        settings = {"method": "linear", "parameters": {}, "exclusive": exclusive}
        yield record(
            "twin oracle", "averaging", settings, protocol="oracle", bytes=sizes(share),
            **result(level),
        )  # fmt: skip
    settings = {"method": "linear", "parameters": {}, "exclusive": TOO_SMALL}
    yield record("twin oracle", "averaging", settings, **{LEFT_OUT: "heads do not fit"})


def part_rival():
    yield record("rival choice", "SMILE-like", {"k": 4}, **result(0.9))
    for name, needs, share, level in (
        ("TSV-Compress", True, 0.02, 0.93), ("TSV-Compress", True, 0.08, 0.98),
        ("SMILE-like", False, 0.019, 0.9), ("SMILE-like", False, 0.077, 0.95),
        ("EMR masks", True, 0.064, 0.96), ("sign and scale", True, 0.0625, 0.97),
    ):  # fmt: skip
        size = {key: sizes(share)[key] for key in ("experts", "base_float16", "share")}
        yield record(
            "rival", name, {"size": share}, source="arXiv:0000.00000", needs_task=needs,
            protocol="oracle" if needs else "known-head", bytes=size, **result(level),
        )  # fmt: skip


def part_tasks():
    for count in (2, 3, 4):
        names = TASKS[:count]
        for name, level in (("averaging", 0.9), ("task arithmetic", 0.93), ("TIES", 0.92)):
            level -= 0.08 * count
            settings = {"names": names, "method": "m", "parameters": {"weight": 0.1 * count}}
            size = sizes(0.0001, count)
            yield record("tasks", name, settings, bytes=size, **{"known-head": result(level)})
        yield record(
            "tasks", "Twin-Merging", {"names": names, "rank": 16},
            **{"known-head": result(0.96), "oracle": result(0.97), "routing accuracy": 0.99},
            routed=result(0.96 - 0.01 * count), bytes=sizes(0.019, count),
        )  # fmt: skip


def part_unseen():
    for left_out in (["rte"], ["mnli", "rte"]):
        for name, level in (("averaging", 0.51), ("Twin-Merging", 0.57)):
            scores = {task: level + 0.01 * i for i, task in enumerate(left_out)}
            found = {"scores": scores, "mean": fmean(scores.values())}
            if name == "Twin-Merging":
                weights = {"cola": 0.7, "sst2": 0.28}
                found |= {"new": 0.125, "weights": dict.fromkeys(left_out, weights)}
            yield record("unseen", name, {"left_out": left_out}, **found)


def part_routing():
    for count in (2, 3, 4):
        names = TASKS[:count]
        weights = {name: (i + 1) / sum(range(1, count + 1)) for i, name in enumerate(names)}
        yield record("routing", "rte", {"names": names}, weights=weights, new=0.05)


def part_grouped():
    for groups, level in ((None, 0.957), (20, 0.941)):
        loss = {
            "merges": 71, "weight_error_mean": 0.03, "weight_error_largest": 0.4,
            "agreement": 0.981, "value_difference_mean": None, "logit_difference_largest": 1.2,
        }  # fmt: skip
        reports = {
            name: {"normalised": level - more, "tasks": {t: {"rows": n} for t, n in ROWS.items()}}
            for name, more in (("routed", 0.01), ("known-head", 0.0))
        }
        yield record(
            "grouped", "20" if groups else "exact", {"groups": groups, "by": groups and "weights"},
            seconds={"total": 31.5}, loss=loss if groups else None, protocols=reports,
        )  # fmt: skip


def part_cost():
    inner = {"bytes": {"all": 90_123_456, "formula": {"twin": 1.25, "experts": 8}}, "turns": 3}
    yield record("cost", "averaging", {"rank": 16}, **inner, said={"bytes": "On disk."})
    logits = {"one-hot": 1.5e-6, "mixed": 2e-6, "largest logit": 7.25}
    yield record("paths", "averaging", {}, shared=1.2e-7, logits={"cola": logits})


def part_better():
    """Named as `Search.score` and `Search.report` name them."""
    for budget in (0.0035, 0.035):
        ways = (("plain", "float16", 0.93), ("int4 factors", "int4", 0.96 + budget))
        for title, dtype, level in ways:
            settings = {"budget": budget, "factors": dtype}
            size = sizes(budget) | {"largest": 158_000}
            yield record("better", title, settings, bytes=size, validation=result(level))
        settings = {"budget": budget, "factors": "int4", "ranks": "basis"}
        yield record("better", "int4 factors + shared basis", settings, **{LEFT_OUT: "too large"})
        for start, (title, dtype, level) in zip(("kept", "the paper's"), ways[::-1], strict=True):
            settings = {"budget": budget, "factors": dtype}
            size = sizes(budget) | {"largest": 158_000}
            yield record(
                "better", f"{start}: {title}", settings, bytes=size,
                validation=result(level), test=result(level - 0.01),
            )  # fmt: skip


PARTS = {
    "expert quality": part_experts,
    "static merges": part_static,
    "Twin-Merging under oracle": part_twin,
    "ablation": part_ablation,
    "compression": part_compression,
    "rivals": part_rival,
    "more tasks": part_tasks,
    "unseen tasks": part_unseen,
    "routing with few experts": part_routing,
    "grouped variant": part_grouped,
    "cost": part_cost,
    "better than the paper": part_better,
}


def record(part: str, name: str, settings: dict[str, Any], /, **found: Any) -> dict[str, Any]:
    return {"part": part, "name": name, "settings": settings, "commit": "0123456789ab"} | found


def study(folder: Path, *without: str) -> tuple[Path, list[dict[str, Any]]]:
    """A study's folder of made-up records, and these."""
    folder.mkdir(parents=True, exist_ok=True)
    settings = {
        "title": "made <b>up", "choose_rows": 200, "test_rows": None, "router_rows": 1000,
        "max_tokens": 96, "seeds": SEEDS, "ranks": RANKS, "noisy": ["rte"], "experts": TASKS,
    }  # fmt: skip
    made = {
        "commit": "0123456789ab", "versions": {"torch": "2", "transformers": "5"}, "python": "3",
        "hardware": {"processor": "none", "cores": 2, "threads": 1},
    }  # fmt: skip
    (folder / "study.json").write_text(json.dumps({"settings": settings, "provenance": made}))
    records = [r for name, part in PARTS.items() if name not in without for r in part()]
    text = "".join(json.dumps(each) + "\n" for each in records)
    (folder / "records.jsonl").write_text(text)
    return folder, json.loads(json.dumps(records))


@pytest.fixture(scope="module")
def whole(tmp_path_factory, lab):
    """Folder, records, and what was written to it."""
    folder, records = study(tmp_path_factory.mktemp("study"))
    return SimpleNamespace(folder=folder, records=records, written=lab.page.write(folder))


# ------------------------------------------------------------------------------------ what is said


def parsed(markdown: str) -> dict[str, dict[str, dict[str, str]]]:
    """Caption -> first cell of a row -> column -> text."""
    found = {}
    for caption, block in re.findall(r"^([^|\n].*):\n\n((?:\|.*\n)+)", markdown, re.M):
        rows = [
            [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
            for line in block.splitlines()
        ]
        assert len({len(row) for row in rows}) == 1, caption
        found[caption] = {row[0]: dict(zip(rows[0], row, strict=True)) for row in rows[2:]}
    return found


def table_of(markdown: str, start: str) -> dict[str, dict[str, str]]:
    (found,) = (rows for caption, rows in parsed(markdown).items() if caption.startswith(start))
    return found


def percent(value: float) -> str:
    return f"{100 * value:.2f}"


def of(records: list[dict[str, Any]], part: str, name: str | None = None) -> list[dict[str, Any]]:
    return [r for r in records if r["part"] == part and name in (None, r["name"])]


def with_router(share: float) -> float:
    """In percent; of the made-up sizes."""
    size = sizes(share)
    return 100 * (share + size["router"] / len(TASKS) / size["base_float16"])


def test_the_main_table_shows_the_records_with_mean_and_spread_over_seeds(whole):
    text = (whole.folder / "tables.md").read_text()
    table = table_of(text, "Normalised scores, % (mean over tasks")
    assert len(table) == len(STATIC) + 3 * len(RANKS)
    for each in of(whole.records, "static"):
        if each["settings"]["parameters"] != {"weight": 0.3}:
            continue
        row = table[each["name"]]
        assert row["known-head"] == percent(each["normalised"])
        assert row["known-head, without rte"] == percent(each["normalised_without_noisy"])
        assert row["routed"] == row["seeds"] == "–"
    for each in of(whole.records, "twin oracle"):
        exclusive = each["settings"]["exclusive"]
        if exclusive.keys() != {"rank"}:
            continue
        row = table[f"Twin-Merging on {each['name']}, rank {exclusive['rank']}"]
        assert row["oracle"] == percent(each["normalised"])
        assert float(row["bytes of an expert, % of base"]) == pytest.approx(
            100 * each["bytes"]["share"], rel=5e-3
        )
        seeds = [
            r
            for r in of(whole.records, "twin routed", each["name"])
            if r["settings"]["exclusive"] == exclusive and LEFT_OUT not in r
        ]
        larger = row["with its part of the router, % of base"]
        if seeds:
            want = with_router(each["bytes"]["share"])
            assert float(larger) == pytest.approx(want, rel=5e-3)
        else:
            assert larger == "–"
        for protocol in ("known-head", "routed"):
            values = [r[protocol]["normalised"] for r in seeds]
            want = f"{percent(fmean(values))} ± {percent(stdev(values))}" if seeds else "–"
            assert row[protocol] == want
        assert row["seeds"] == (str(len(seeds)) if seeds else "–")


def test_other_tables_show_the_records_too(whole):
    text = (whole.folder / "tables.md").read_text()
    experts = table_of(text, "Each expert alone")
    for each in of(whole.records, "experts"):
        row = experts[each["name"]]
        assert row["test"] == f"{each['test']['score']:.3f}"
        assert row["validation"] == f"{each['validation']['score']:.3f}"
        assert row["test rows"] == f"{each['test']['rows']:,}"
        assert (row["± of test"] == "–") == (each["test"]["metric"] != "accuracy")
    chosen = table_of(text, "Coefficients")["task arithmetic"]
    best = of(whole.records, "choice")[1]
    assert chosen["chosen"] == "weight 0.3" and chosen["tried"] == "3"
    tried = table_of(text, "What was tried for rivals")["SMILE-like"]
    assert tried["tried"] == "k 4"
    assert tried["normalised, validation"] == percent(
        of(whole.records, "rival choice")[0]["normalised"]
    )
    assert chosen["normalised, validation"] == percent(best["normalised"])
    shares = table_of(text, "Share of the expert's own score")
    for each in of(whole.records, "static"):
        for task in TASKS if each["settings"]["parameters"] == {"weight": 0.3} else ():
            assert shares[each["name"]][task] == percent(each["scores"][task] / OWN[task])
    ablation = table_of(text, "Normalised scores, %, 12,007 rows of 4 tasks of the test split; not")
    for each in of(whole.records, "ablation"):
        for protocol in {"shared", "oracle", "known-head", "routed"} & each.keys():
            assert ablation[each["name"]][protocol] == percent(each[protocol]["normalised"])
        if "bytes" in each:
            larger = float(ablation[each["name"]]["with its part of the router, % of base"])
            assert larger == pytest.approx(with_router(0.019), rel=5e-3)
    both = [r["routed"]["normalised"] for r in of(whole.records, "ablation")[-2:]]
    assert ablation["dynamic, mean of these 2"]["routed"] == percent(fmean(both))
    compression = table_of(text, "Normalised scores, %, oracle, 12,007")
    kept = of(whole.records, "twin oracle")[3 * len(RANKS) : -1]
    shown = {row["oracle"] for row in compression.values()}
    assert shown <= {percent(each["normalised"]) for each in kept}
    assert compression["magnitude, density 0.05, scope all"]["stored as"] == "float16"


def test_rivals_stand_among_ours_by_bytes_and_say_whether_they_need_the_task(whole):
    table = table_of((whole.folder / "tables.md").read_text(), "Normalised scores, %, by bytes")
    for each in of(whole.records, "rival"):
        row = table[f"{each['name']}, size {each['settings']['size']:g} (our implementation)"]
        assert row["needs the task id"] == ("yes" if each["needs_task"] else "its head")
        assert row["normalised"] == percent(each["normalised"])
        assert row["source"] == each["source"] and row["protocol"] == each["protocol"]
    block = (whole.folder / "tables.md").read_text().split("## Rivals at equal bytes")[1]
    block = block.split("What was tried for rivals")[0]
    lines = [line.rstrip(" |") for line in block.splitlines() if line.startswith("| ")][2:]
    sizes = [float(line.split(" | ")[-1]) for line in lines]
    assert sizes == sorted(sizes) and any("int4" in name for name in table)


def test_what_comes_after_the_main_table_is_the_records_too(whole):
    text, records = (whole.folder / "tables.md").read_text(), whole.records
    tasks = table_of(text, "Normalised scores, %, by number of tasks")
    for each in of(records, "tasks"):
        row = tasks[str(len(each["settings"]["names"]))]
        if each["name"] == "Twin-Merging":
            size = each["bytes"]
            assert row["all bytes"] == f"{size['shared'] + size['experts'] + size['router']:,}"
        for protocol in {"oracle", "known-head", "routed"} & each.keys():
            assert row[f"{each['name']}, {protocol}"] == percent(each[protocol]["normalised"])
    assert [row["added"] for row in tasks.values()] == ["cola, mnli", "rte", "sst2"]
    unseen = table_of(text, "Mean score (not normalised")
    for each in of(records, "unseen"):
        column = " + ".join(each["settings"]["left_out"])
        assert unseen[each["name"]][column] == percent(each["mean"])
    confusion = table_of(text, "Rows by task and the expert found likeliest")
    weights = table_of(text, "Mean weights by task")
    for task in TASKS:
        routed = of(records, "twin routed")[0]["routing"]["tasks"][task]
        for place, name in enumerate(TASKS):
            assert confusion[task][name] == f"{routed['chosen'][place]:,}"
            assert weights[task][name] == f"{routed['weights'][place]:.2f}"
    few = table_of(text, "Mean weights of a task's test rows where only some")
    for each in of(records, "routing"):
        row = few[f"rte, of {' + '.join(each['settings']['names'])}"]
        assert {n: row[n] for n in TASKS} == {
            n: f"{each['weights'][n]:.2f}" if n in each["weights"] else "–" for n in TASKS
        }
    groups = table_of(text, "Normalised scores, %, and time")["20 groups by weights"]
    last = of(records, "grouped")[1]
    assert groups["routed"] == percent(last["protocols"]["routed"]["normalised"])
    assert groups["same class, %"] == percent(0.981) and groups["merges"] == "71"
    cost = table_of(text, "bytes. On disk")
    assert {name: row["value"] for name, row in cost.items()} == {
        "all": "90,123,456", "formula / twin": "1.25", "formula / experts": "8",
    }  # fmt: skip
    assert table_of(text, "averaging: rank 16")["turns"]["value"] == "3"
    logits = table_of(text, "Largest differences of logits")["cola"]
    assert logits == {"task": "cola", "one-hot": "1.5e-06", "mixed": "2e-06",
                      "largest logit": "7.25"}  # fmt: skip
    made = table_of(text, "Settings of these")
    assert made["3"]["TIES"] == "parameters weight 0.3" and made["2"]["Twin-Merging"] == "rank 16"


def test_what_may_be_better_is_shown_by_way_and_what_was_kept_beside_the_papers_cut(whole):
    text = (whole.folder / "tables.md").read_text().split("## Better than the paper")[1]
    tried, kept, left = re.findall(r"^[^|\n].*:\n\n((?:\|.*\n)+)", text, re.M)[:3]
    assert (
        "all validation rows of each" in text
        and "and all where it is to be better" in (whole.folder / "tables.md").read_text()
    )
    records = of(whole.records, "better")

    def rows(table: str) -> list[list[str]]:
        return [[c.strip() for c in line.split("|")[1:-1]] for line in table.splitlines()[2:]]

    percents = {"0.0035": "0.35", "0.035": "3.5"}
    budget = [percents[str(r["settings"]["budget"])] for r in records]
    size = [f"{100 * r['settings']['budget']:.3g}" for r in records]
    assert rows(tried) == [
        [r["name"], budget[i], f"factors {r['settings']['factors']}", size[i], "158,000",
         percent(r["validation"]["normalised"])]
        for i, r in enumerate(records) if "validation" in r and "test" not in r
    ]  # fmt: skip
    assert rows(kept) == [
        [why, budget[i], way, f"factors {r['settings']['factors']}", size[i], "158,000",
         percent(r["validation"]["normalised"]), percent(r["test"]["normalised"])]
        for i, r in enumerate(records) if "test" in r
        for why, way in [r["name"].split(": ")]
    ]  # fmt: skip
    assert [row[0] for row in rows(kept)] == ["kept", "the paper's"] * 2
    want = ["int4 factors + shared basis", "0.35", "factors int4, ranks basis", "too large"]
    assert rows(left)[0] == want and len(rows(left)) == 2


def test_records_are_named_as_the_search_names_them(lab, tmp_path):
    """Of a search whose ways are not made: names, settings and what is kept are its own."""
    better = importlib.import_module("lab.better.better")
    records = importlib.import_module("lab.records").Records(tmp_path, {})
    made = SimpleNamespace(ranks=(1, 1, 1), error=0.5, corrected=0, sizes=lambda base: sizes(0.003))
    cutter = SimpleNamespace(
        lab=SimpleNamespace(records=records), made=lambda way, budget: made,
        sources=SimpleNamespace(base_float16=1),
    )  # fmt: skip
    search = better.Search(cutter, lambda text: None, 0.0035)
    levels = iter((0.9, 0.95, 0.89, 0.94))
    search.measured = lambda made, split: result(next(levels))
    plain, int4 = better.Way(), better.Way(factors="int4")
    for way in (plain, int4):
        search.score(way)
    search.report(plain)
    names = [record["name"] for record in records.all()]
    assert names == ["plain", "int4 factors", "kept: int4 factors", "the paper's: plain"]
    folder, _ = study(tmp_path / "shown", *PARTS)
    (folder / "records.jsonl").write_text((tmp_path / "records.jsonl").read_text())
    text = lab.tables.tables(folder)
    assert "| kept | 0.35 | int4 factors |" in text and "| the paper's | 0.35 | plain |" in text


def test_coefficients_that_were_not_chosen_are_not_shown_and_a_lack_is_named(whole):
    text = (whole.folder / "tables.md").read_text()
    assert text.count("\n| task arithmetic | –") == 1 and "\n| SCE | –" not in text
    assert percent(0.123) not in text and percent(result(0.123)["normalised"]) not in text
    assert "best on validation rows: SCE (weight 0.5)." in text
    assert "on validation rows: SCE (weight 0.5)." in (whole.folder / "report.html").read_text()


def test_ranks_without_a_record_are_named_below_the_main_table(whole, tmp_path, lab):
    text = (whole.folder / "tables.md").read_text()
    line = (
        "Ranks without a record under known-head and routed: on task arithmetic 4, 64; "
        "on TIES 4, 64."
    )
    after = text.split("Normalised scores, % (mean over tasks")[1].split("Coefficients with")[0]
    assert line in after and text.rstrip().endswith(line)
    assert line in (whole.folder / "report.html").read_text()


def test_shared_experts_of_old_coefficients_and_storage_give_way_to_newer_ones(tmp_path, lab):
    folder, records = study(tmp_path)
    old = [r for r in records if r["part"].startswith("twin") and r["name"] == "task arithmetic"]
    stale = [
        r | {"settings": r["settings"] | {"parameters": {"weight": 0.2}}} | result(0.01)
        for r in old
    ]  # fmt: skip
    lines = "".join(json.dumps(each) + "\n" for each in (*stale, *records))
    (folder / "records.jsonl").write_text(lines)
    want = study(tmp_path / "plain")[0]
    main = "Normalised scores, % (mean over tasks"
    both = [table_of(lab.tables.tables(each), main) for each in (folder, want)]
    assert list(both[0].values()) != [] and {**both[0]} == both[1]
    again = [r | {"settings": r["settings"] | {"stored": "float16"}} for r in old]
    lines = "".join(json.dumps(each) + "\n" for each in (*records, *again))
    (folder / "records.jsonl").write_text(lines)
    assert table_of(lab.tables.tables(folder), main) == both[1]


def test_the_readmes_tables_show_each_method_once_with_its_chosen_coefficients(whole, lab):
    said = lab.readme.quality(whole.folder, lambda made: f"made of {made['commit']}")
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in said.splitlines()[2:-2]]
    names = [row[0] for row in rows]
    assert len(set(names)) == len(names) and set(STATIC) < set(names) and "SCE" not in names
    by_name = {row[0]: row[1:] for row in rows}
    assert by_name["task arithmetic"][1] == f"{100 * result(0.7)['normalised']:.1f}"
    static = [float(row[2]) for row in rows if row[0] in STATIC]
    assert static == sorted(static) and len(static) == len(STATIC)
    (oracle,) = [
        r["normalised"]
        for r in of(whole.records, "twin oracle", "averaging")
        if r["settings"]["exclusive"] == {"rank": 16}
    ]
    twin = by_name["Twin-Merging on averaging, rank 16"]
    assert twin[2] == f"{100 * oracle:.1f}" and " ± " in twin[0] and " ± " in twin[1]
    assert "made of 0123456789ab" in said and f"of {len(SEEDS)} seeds" in said
    assert f"{sum(ROWS.values()):,} test rows" in said
    by_task = lab.readme.per_task(whole.folder)
    assert by_task.startswith(f"|  | {' | '.join(TASKS)} |")
    assert f"| experts | {' | '.join(f'{100 * OWN[t]:.1f}' for t in TASKS)} |" in by_task


def test_what_was_left_out_is_listed_with_the_reason_and_not_drawn(whole):
    text = (whole.folder / "tables.md").read_text().split("## Compression")[1].split("\n## ")[0]
    assert "| averaging, budget 0.001%, int4 | heads do not fit |" in text
    assert "no time" not in text


def test_bytes_beside_rivals_have_the_router_where_one_is_needed(whole, lab):
    text = (whole.folder / "tables.md").read_text()
    assert "float16 storage" in next(c for c in parsed(text) if "by bytes" in c)
    block = text.split("Normalised scores, %, by bytes")[1].splitlines()
    lines = [line for line in block if line.startswith("| Twin-Merging on averaging, rank 16 |")]
    shown = {line.split(" | ")[3]: float(line.rstrip(" |").split(" | ")[-1]) for line in lines}
    share = 0.0012 * 16
    assert shown["oracle"] == pytest.approx(100 * share, rel=5e-3)
    for protocol in ("known-head", "routed"):
        assert shown[protocol] == pytest.approx(with_router(share), rel=5e-3)
    drawn = {}
    lines_of = lab.plots_lines.draw_lines
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            lab.plots_lines, "draw_lines",
            lambda axes, lines, *more: (drawn.update({x.label: x for x in lines}),
                                        lines_of(axes, lines, *more)),
        )  # fmt: skip
        lab.plots_lines.score_by_bytes(lab.shown.Study.of_folder(whole.folder))
    for protocol, want in (("oracle", lambda s: 100 * s), ("routed", with_router)):
        places = [x for x, _ in drawn[f"Twin-Merging, {protocol}"].points]
        assert places == pytest.approx([want(0.0012 * rank) for rank in RANKS])


def test_the_page_says_what_no_answer_costs_under_routed(whole):
    for name in ("tables.md", "report.html"):
        assert "(cola)" in (whole.folder / name).read_text()


def test_the_papers_numbers_are_as_printed_and_ours_beside_them_are_known_head(whole, lab):
    block = (whole.folder / "tables.md").read_text().split("## Beside the paper's numbers")[1]
    assert "RoBERTa-base" in block and "true task's biases" in block
    rows = [line.split(" | ") for line in block.splitlines() if line.startswith("| ")][2:]
    want = [[f"| {p.method}", p.tables, f"{p.score:.2f}"] for p in lab.published.PUBLISHED]
    assert [row[:3] for row in rows] == want
    known = {percent(r["normalised"]) for r in of(whole.records, "static")}
    assert {row[3] for row in rows[:3]} <= known
    by_name = {row[0]: row for row in rows}
    assert by_name["| Twin-Merging, 90 % compressed"][4].startswith("Twin-Merging on task arithm")
    assert by_name["| Ties-Merging (w/ DARE)"][3] == "–"  # of which there is no record
    for row, shared, rank in (  # 16 is the largest rank that all shared experts have
        ("Twin-Merging (Rank-1)", "task arithmetic", 1),
        ("Twin-Merging, 90 % compressed", "task arithmetic", 16),
        ("Twin-Merging + Weight Average", "averaging", 16),
        ("Twin-Merging + Ties-Merging", "TIES", 16),
    ):
        seeds = [
            r["known-head"]["normalised"]
            for r in of(whole.records, "twin routed", shared)
            if r["settings"]["exclusive"] == {"rank": rank}
        ]
        value, name = by_name[f"| {row}"][3:]
        assert value == f"{percent(fmean(seeds))} ± {percent(stdev(seeds))}"
        assert name == f"Twin-Merging on {shared}, rank {rank} |"


# ---------------------------------------------------------------------------- what is left unsaid


def test_what_was_not_measured_is_left_out_and_named_at_the_end(tmp_path, lab):
    for name in ("compression", "rivals", "unseen tasks", "routing with few experts", "cost"):
        folder, _ = study(tmp_path / name, name)
        last = lab.tables.tables(folder).rstrip().splitlines()[-1]
        assert last.startswith("Not measured") and re.search(rf"\b{name}[;.]", last)
    folder, _ = study(tmp_path / "none", *PARTS)
    text = lab.tables.tables(folder)
    assert "|" not in text and all(name in text for name in PARTS)
    assert lab.plots.plots(folder) == [] and "better than the paper" in lab.page.page(folder)


def test_a_static_merge_that_lacks_is_named(whole):
    last = (whole.folder / "tables.md").read_text().rstrip().splitlines()[-1]
    assert "static merges (DARE + task arithmetic /" in last and "averaging" not in last


def test_a_folder_that_is_no_study_is_refused(tmp_path, lab):
    with pytest.raises(InputError, match=r"study\.json"):
        lab.page.write(tmp_path)


# ----------------------------------------------------------------------------------------- files


def test_all_files_are_written_and_twice_the_same(whole, tmp_path, lab):
    names = {path.relative_to(whole.folder).as_posix() for path in whole.written}
    pictures = ("static", "ranks", "bytes", "compression", "tasks", "weights", "few-experts")
    assert names == {"tables.md", "report.html"} | {
        f"plots/{name}.{suffix}" for name in pictures for suffix in ("png", "svg")
    }
    folder, _ = study(tmp_path)
    for path in lab.page.write(folder):
        assert path.read_bytes() == (whole.folder / path.relative_to(folder)).read_bytes(), path


def test_the_page_has_the_tables_and_needs_nothing_else(whole):
    text = (whole.folder / "report.html").read_text()
    assert "<b>up" not in text and "made &lt;b&gt;up" in text
    assert not re.search(r"""(src|href)=["'](?!#|data:)""", text)
    assert "http:" not in text and "https:" not in text
    assert not re.search(r"url\(|@import|<link|<iframe|<script[^>]", text)
    markdown = (whole.folder / "tables.md").read_text()
    assert text.count("<table>") == len(parsed(markdown))
    for heading in re.findall(r"<h2>(.*?)</h2>", text):
        assert f"## {html.unescape(heading)}" in markdown or heading == "Not measured"
    svgs = re.findall(r'src="data:image/svg\+xml;base64,([^"]*)"', text)
    kept = {path.read_bytes() for path in whole.written if path.suffix == ".svg"}
    assert {base64.b64decode(svg) for svg in svgs} == kept


@pytest.mark.slow
def test_the_page_runs_in_a_browser_and_nothing_is_wider_than_a_phone(whole, tmp_path):
    names = ("chromium", "chromium-browser", "google-chrome")
    browser = next(filter(None, map(shutil.which, names)), None)
    if browser is None:
        pytest.skip(f"no browser: none of {', '.join(names)} is installed (make browser)")
    script = """
      addEventListener("load", () => { document.documentElement.dataset.told = JSON.stringify({
        wide: document.documentElement.scrollWidth - innerWidth,
        seen: [...document.images].every((each) => each.complete && each.naturalWidth > 0),
      }); });
    """
    page = (whole.folder / "report.html").read_text()
    (tmp_path / "page.html").write_text(page.replace("</script>", f"{script}</script>"))
    done = subprocess.run(
        [
            browser, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run",
            "--disable-background-networking", "--hide-scrollbars",
            f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", "--window-size=390,2000",
            (tmp_path / "page.html").as_uri(),
        ],
        capture_output=True, text=True, timeout=120, cwd=tmp_path, env=os.environ,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    root = re.search(r"<html[^>]*>", done.stdout)[0]
    assert 'data-ready="yes"' in root and "data-error" not in root
    told = json.loads(html.unescape(re.search(r'data-told="([^"]*)"', root)[1]))
    assert told["wide"] <= 0 and told["seen"]
