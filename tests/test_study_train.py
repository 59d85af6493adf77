"""`studies/train.py`: experts that the study and a recipe can open."""

from __future__ import annotations

import gzip
import importlib
import json
from typing import Any

import pytest

from twinmerge.merging.build import build
from twinmerge.recipe import Recipe
from twinmerge.runtime.load import load

GIVEN = {
    "rank": 2, "targets": "query,value", "lr": 1e-3, "batch": 4, "epochs": 1, "rows": 12,
    "max_tokens": 16, "seed": 0, "score_only": False, "full": False, "task": None,
}  # fmt: skip

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")


@pytest.fixture(scope="module")
def train():
    return importlib.import_module("train")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A task of sentences, one of pairs with numbers, one whose classes are named in its rows."""
    folder = tmp_path_factory.mktemp("data")
    made: dict[str, Any] = {
        "cola": lambda i: {"sentence": f"sum of {i} terms", "label": i % 2},
        "stsb": lambda i: {"sentence1": f"law {i}", "sentence2": f"loop {i}", "label": i / 4},
        "banking77": lambda i: {"text": f"word {i}", "label": i % 3, "label_text": f"c{i % 3}"},
    }
    for task, row in made.items():
        (folder / task).mkdir()
        for split in ("train", "validation", "test"):
            with gzip.open(folder / task / f"{split}.jsonl.gz", "wt") as file:
                file.writelines(json.dumps(row(i)) + "\n" for i in range(16))
    return folder


@pytest.mark.parametrize("full", [False, True])
def test_experts_are_trained_scored_and_open_in_a_recipe(train, data, bench, tmp_path, full):
    base = str(bench.made.base)
    train.main(data, tmp_path, base=base, **GIVEN | {"full": full})
    for task, classes in (("cola", 2), ("stsb", 1), ("banking77", 3)):
        score = json.loads((tmp_path / task / "score.json").read_text())
        assert len(score["labels"]) == classes and score["train_rows"] == 12
        assert score["test_rows"] == 16 and score["full"] is full
        if not full:
            config = json.loads((tmp_path / task / "adapter_config.json").read_text())
            assert config["base_model_name_or_path"] == base
    models = [{"model": str(tmp_path / task), "name": task} for task in ("cola", "stsb")]
    build(Recipe.model_validate({"base_model": base, "models": models}), tmp_path / "merged")
    model = load(tmp_path / "merged")
    inputs = model.tokenizer(["sum of 3 terms"], return_tensors="pt")
    assert model(**inputs, task="cola").logits.shape == (1, 2)


def test_what_is_there_is_left_and_scored_again_when_asked(train, data, bench, tmp_path, capsys):
    given = GIVEN | {"task": ["cola"], "base": str(bench.made.base)}
    train.main(data, tmp_path, **given)
    score = tmp_path / "cola" / "score.json"
    before = json.loads(score.read_text())
    assert before["epochs"] == 1 and before["train_seconds"] >= 0
    train.main(data, tmp_path, **given)
    assert "cola: is there" in capsys.readouterr().err
    # Scored with other settings of a training that does not take place.
    train.main(data, tmp_path, **given | {"score_only": True, "lr": 7.0, "rows": 3})
    assert json.loads(score.read_text()) == before
    score.unlink()
    train.main(data, tmp_path, **given | {"score_only": True})
    unknown = json.loads(score.read_text())
    assert unknown == {key: x for key, x in before.items() if key not in train.TRAINED}


def test_an_adapter_says_the_base_that_it_is_told(train, data, bench, tmp_path):
    given = GIVEN | {"task": ["cola"], "base": str(bench.made.base), "base_name": "some/base"}
    train.main(data, tmp_path, **given)
    config = json.loads((tmp_path / "cola" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "some/base"


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"sentence": "a"}, "row 2: expected text and a number as `label`, got tuple and None"),
        ({"sentence": "a", "label": "1"}, "row 2: expected text and a number as `label`"),
        ({"sentence": 3, "label": 1}, "a row's column sentence holds 3"),
        ({"text": "a", "label": 1}, "a row has the columns text, label; expected text in sentence"),
    ],
)
def test_a_row_without_text_or_label_is_one_line(train, bench, tmp_path, row, said):
    (tmp_path / "cola").mkdir()
    with gzip.open(tmp_path / "cola" / "train.jsonl.gz", "wt") as file:
        file.writelines(json.dumps(r) + "\n" for r in ({"sentence": "b", "label": 0}, row))
    with pytest.raises(SystemExit, match=f"^error: .*{said}"):
        train.main(tmp_path, tmp_path / "out", base=str(bench.made.base), **GIVEN)


def test_an_unknown_task_is_one_line(train, data, bench, tmp_path):
    with pytest.raises(SystemExit, match="no task 'colla'; known: cola"):
        train.main(data, tmp_path, base=str(bench.made.base), **GIVEN | {"task": ["colla"]})
