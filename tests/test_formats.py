"""Artifacts of every format version that was ever released are read as on the day they were made.

`tests/formats/v<N>` was written by a release that knew version N and is never written again;
`v<N>-answers.json` holds what that release answered.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from twinmerge.artifact.format import FORMAT_VERSION
from twinmerge.artifact.reader import Artifact
from twinmerge.cli import app
from twinmerge.runtime.load import load
from twinmerge.runtime.router.fit import fit_router

FORMATS = Path(__file__).parent / "formats"
VERSIONS = sorted(path.name for path in FORMATS.iterdir() if path.is_dir())


@pytest.fixture(params=VERSIONS)
def version(request) -> str:
    return request.param


def answers(version: str) -> tuple[dict[str, torch.Tensor], torch.Tensor, torch.Tensor]:
    """Inputs, weights and logits; null stands for -inf."""
    stored = json.loads((FORMATS / f"{version}-answers.json").read_text())
    ids = torch.tensor(stored["input_ids"])
    logits = [[-torch.inf if x is None else x for x in row] for row in stored["logits"]]
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return inputs, torch.tensor(stored["weights"]), torch.tensor(logits)


def test_an_old_artifact_routes_and_answers_as_it_did(version):
    inputs, weights, logits = answers(version)
    output = load(FORMATS / version)(**inputs)
    torch.testing.assert_close(output.weights, weights, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(output.logits, logits, rtol=1e-5, atol=1e-5)
    assert not output.routed.new.any()  # none of these looked for what is new


def test_an_old_artifact_is_densely_merged_as_well(version):
    inputs, weights, logits = answers(version)
    twin = load(FORMATS / version)
    for row, weight in enumerate(weights):
        one = {name: value[row : row + 1] for name, value in inputs.items()}
        got = twin.merged(weight)(**one).logits[0]
        torch.testing.assert_close(got, logits[row, : len(got)], rtol=1e-5, atol=1e-5)


def test_an_old_artifact_is_inspected(version):
    result = CliRunner().invoke(app, ["inspect", str(FORMATS / version), "--tensors"])
    assert result.exit_code == 0, result.output
    assert all(name in result.output for name in ("math", "code", "law"))
    assert "embeddings.word_embeddings.weight" in result.output


def test_what_a_manifest_of_version_1_does_not_say_follows_from_its_ranks():
    manifest = Artifact(FORMATS / "v1").manifest
    assert manifest.format_version == FORMAT_VERSION
    for record in manifest.tensors:
        for share in record.experts.values():
            assert share.storage == ("factors" if record.kind == "matrix" else "whole")
            assert share.entries is None and share.bound is None


def test_a_router_of_before_version_3_reads_one_layer_and_is_taken_as_it_is(version):
    old = json.loads((FORMATS / version / "manifest.json").read_text())["router"]
    entry = Artifact(FORMATS / version).manifest.router
    assert (entry.kind, entry.layers, entry.pooling) == ("mlp", (old["layer"],), "mean")
    assert (entry.temperature, entry.sharpness, entry.novelty) == (1.0, 1.0, None)
    assert (entry.rows, entry.epoch, entry.hidden) == (old["rows"], old["epoch"], old["hidden"])
    assert entry.held_out_accuracy == old["held_out_accuracy"]
    assert entry.calibration_error is None and not entry.refitted
    tried = {str(each.layers[0]): each.accuracy for each in entry.tried}
    assert tried == old["accuracy_by_layer"] and len(tried) == 3
    assert all((each.kind, each.loss) == ("mlp", None) for each in entry.tried)


def test_an_old_artifact_is_written_back_as_one_of_the_version_whose_fields_it_has(
    version, tmp_path
):
    shutil.copytree(FORMATS / version, tmp_path / version)
    before = Artifact(tmp_path / version).manifest
    (tmp_path / version / "manifest.json").write_text(before.to_json())
    assert json.loads(before.to_json())["format_version"] == FORMAT_VERSION
    assert Artifact(tmp_path / version).manifest == before


def test_an_old_artifact_is_saved_with_its_router_and_answers_as_before(version, tmp_path):
    inputs, weights, logits = answers(version)
    output = load(load(FORMATS / version).save_pretrained(tmp_path / "copy"))(**inputs)
    torch.testing.assert_close(output.weights, weights, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(output.logits, logits, rtol=1e-5, atol=1e-5)


def test_a_router_is_fitted_anew_into_an_old_artifact(version, bench, tmp_path):
    shutil.copytree(FORMATS / version, tmp_path / version)
    entry = fit_router(tmp_path / version, bench.texts(10))
    assert entry.kind == "mlp"  # its recipe names no kind, and settings that only an mlp has
    assert load(tmp_path / version).router.layers == entry.layers
