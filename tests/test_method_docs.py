"""The pages of docs/methods are true: their recipes build, their tables are complete.

A recipe's `merge_method: x    # or y, z` stands for one recipe of each. Paths in it are the tiny
Llamas of `tiny.py`.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from test_docs import ROOT, anchors, blocks, quoted, table
from tiny import shared_tensors

from twinmerge.merging.build import build
from twinmerge.merging.shared import METHODS
from twinmerge.recipe import Recipe

PAGES = {path.name: path.read_text() for path in sorted((ROOT / "docs/methods").glob("*.md"))}
LONGEST = 80
"""Lines of a page: one or two screens."""


def recipes(page: str) -> dict[str, str]:
    """Method -> the recipe that shows it."""
    shown = {}
    for block in blocks(page):
        line = re.search(r"^merge_method: (\w+)(?: +# or ([\w, ]+))?$", block.text, re.M)
        assert block.language == "yaml" and line, f"line {block.line}: no recipe"
        for method in (line[1], *filter(None, (line[2] or "").split(", "))):
            shown[method] = block.text.replace(line[0], f"merge_method: {method}")
    return shown


RECIPES = [
    (name, method, recipe)
    for name, page in PAGES.items()
    for method, recipe in recipes(page).items()
]


def test_every_method_is_shown_on_one_page():
    assert sorted(method for _, method, _ in RECIPES) == sorted(METHODS)


@pytest.mark.parametrize(("page", "method", "text"), RECIPES, ids=[row[1] for row in RECIPES])
def test_every_recipe_of_the_pages_builds(page, method, text, zoo, tmp_path):
    made = zoo.made("llama")
    recipe = Recipe.from_yaml(text)
    manifest = build(recipe.resolved(Path(made.base).parent), tmp_path / "out", written=recipe)
    assert [expert.name for expert in manifest.experts] == [model.name for model in recipe.models]
    merged = shared_tensors(tmp_path / "out")
    assert all(tensor.isfinite().all() for tensor in merged.values())
    base = shared_tensors(Path(made.base))
    assert any(not torch.equal(merged[name], base[name]) for name in base)


@pytest.mark.parametrize("page", PAGES)
def test_every_parameter_is_described_with_its_defaults_and_no_other(page):
    text, shown = PAGES[page], recipes(PAGES[page])
    rows = {quoted(row[0])[0]: row for row in table(text, "parameter")}
    assert set(rows) == {name for method in shown for name in METHODS[method].options}
    for name, (_, default, meaning) in rows.items():
        options = {m: METHODS[m].options[name] for m in shown if name in METHODS[m].options}
        written = dict(re.findall(r"(?:`(\w+)`|others): `([^`]+)`", default))
        for method, option in options.items():
            alone = quoted(default)[0] if not written else written.get(method, written.get(""))
            assert alone == json.dumps(option.default), f"{name} of {method}"
        assert meaning.startswith("per expert") == any(o.per_expert for o in options.values()), name


@pytest.mark.parametrize("page", PAGES)
def test_every_page_is_short_names_its_papers_and_links_to_what_is_there(page):
    text = PAGES[page]
    assert text.count("\n") <= LONGEST
    for method in recipes(text):
        assert f"]({METHODS[method].paper})" in text
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if not re.match(r"[a-z]+:", target):
            name, _, heading = target.partition("#")
            path = ROOT / "docs/methods" / name
            assert path.is_file(), target
            assert not heading or heading in anchors(path.read_text()), target
