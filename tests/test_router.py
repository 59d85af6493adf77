"""The router: fitted on rows of the user's own, judged on rows it never saw, stored whole."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from conftest import randn
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from test_conformance import assert_same_files
from texts import BERT_TEXT, LLAMA_TEXT, sentences
from tiny import EXPERTS, opened

from twinmerge.artifact.format import MANIFEST, ROUTER
from twinmerge.artifact.reader import Artifact
from twinmerge.artifact.tensorfile import record
from twinmerge.data import encode, pad
from twinmerge.errors import InputError, OutputError, RouterError
from twinmerge.recipe import Router
from twinmerge.runtime.load import load, load_router
from twinmerge.runtime.router import fit as fitting
from twinmerge.runtime.router.fit import choose_layer, fit_router
from twinmerge.runtime.router.mlp import RouterMLP

QUICK = Router(epochs=25, hidden=24, batch_size=16, learning_rate=0.01, dropout=0.1, layer=0)


@pytest.fixture
def artifact(bench, tmp_path) -> Path:
    """A copy without a router, to fit one in."""
    return shutil.copytree(bench.plain, tmp_path / "artifact")


def batch_of(model, texts):
    return pad(model.tokenizer, encode(model.tokenizer, texts, 40).rows)


def manifest_edited(folder: Path, change) -> None:
    data = json.loads((folder / MANIFEST).read_text())
    change(data)
    (folder / MANIFEST).write_text(json.dumps(data))


# ------------------------------------------------------------------------------------ fitting


def test_new_rows_of_separable_tasks_go_to_their_own_expert(bench):
    model = bench.model
    assert model.manifest.router.held_out_accuracy > 0.8  # three experts: chance is 1 / 3
    for index, name in enumerate(EXPERTS):
        weights = model.route(**batch_of(model, sentences(name, 20, seed=77)))
        assert (weights.argmax(dim=-1) == index).float().mean() > 0.7


def test_rows_that_say_nothing_about_the_expert_are_routed_by_chance(artifact):
    rows = [text[:1] for text in sentences("math", 120, seed=5)]
    texts = {name: rows[place::3] for place, name in enumerate(EXPERTS)}
    assert fit_router(artifact, texts, QUICK).held_out_accuracy < 0.7


def test_fitting_twice_gives_the_same_bytes(artifact, bench, tmp_path):
    other = shutil.copytree(artifact, tmp_path / "other")
    torch.manual_seed(1)
    fit_router(artifact, bench.texts(20), QUICK)
    torch.manual_seed(2)  # and torch's own generator is left alone
    before = torch.get_rng_state()
    fit_router(other, bench.texts(20), QUICK)
    assert torch.equal(torch.get_rng_state(), before)
    assert_same_files(artifact, other)


def test_another_seed_gives_another_router(artifact, bench):
    fit_router(artifact, bench.texts(20), QUICK)
    first = (artifact / ROUTER).read_bytes()
    fit_router(artifact, bench.texts(20), QUICK.model_copy(update={"seed": 1}))
    assert (artifact / ROUTER).read_bytes() != first


def test_with_layer_auto_all_layers_are_tried(bench):
    fitted = Artifact(bench.routed).manifest
    assert fitted.recipe["router"]["layer"] == "auto" and fitted.router.hidden == 24
    assert sum(fitted.router.rows.values()) + fitted.router.held_out_rows == 90
    assert set(fitted.router.accuracy_by_layer) == {0, 1, 2}
    assert fitted.router.layer == choose_layer(
        fitted.router.accuracy_by_layer, fitted.router.held_out_rows
    )


def test_every_setting_reaches_the_training(artifact, bench, monkeypatch):
    seen = {}

    class Adam(torch.optim.Adam):
        def __init__(self, parameters, lr):
            seen["learning_rate"] = lr
            super().__init__(parameters, lr=lr)

    made = fitting.RouterMLP

    class Spy(made):
        def __init__(self, width, hidden, experts, dropout=0.0):
            seen["dropout"], seen["epochs"] = dropout, 0
            super().__init__(width, hidden, experts, dropout)

        def forward(self, features):
            if self.training:
                seen["batch_size"] = max(seen.get("batch_size", 0), len(features))
            else:
                seen["epochs"] += 1
            return super().forward(features)

    monkeypatch.setattr(fitting.torch.optim, "Adam", Adam)
    monkeypatch.setattr(fitting, "RouterMLP", Spy)
    asked = dict(layer=1, rows_per_task=10, hidden=7, epochs=3, learning_rate=0.02, batch_size=4)
    asked |= dict(dropout=0.25, held_out=0.3, seed=9)
    fitted = fit_router(artifact, bench.texts(20), Router(**asked))
    assert seen.pop("epochs") == 3 + 1  # one look at the held-out rows each, and a last one
    assert seen == {name: asked[name] for name in seen} and len(seen) == 3
    assert (fitted.layer, fitted.hidden, fitted.seed) == (1, 7, 9)
    assert fitted.rows == dict.fromkeys(EXPERTS, 7) and fitted.held_out_rows == 9
    assert list(fitted.accuracy_by_layer) == [1] and 1 <= fitted.epoch <= 3


def test_a_recipes_router_section_holds_when_nothing_else_is_given(artifact, bench):
    def fewer(data):
        data["recipe"]["router"] |= {"epochs": 1, "hidden": 5, "rows_per_task": 6, "layer": 2}

    manifest_edited(artifact, fewer)
    fitted = fit_router(artifact, bench.texts(20))
    assert (fitted.hidden, fitted.layer, fitted.epoch) == (5, 2, 1)
    assert sum(fitted.rows.values()) + fitted.held_out_rows == 18


def test_no_held_out_row_is_trained_on(artifact, bench, monkeypatch):
    trained, held = [], []

    class Spy(RouterMLP):
        def forward(self, features):
            (trained if self.training else held).append(features.clone())
            return super().forward(features)

    monkeypatch.setattr(fitting, "RouterMLP", Spy)
    fitted = fit_router(artifact, bench.texts(20), QUICK.model_copy(update={"epochs": 4}))
    seen = torch.cat(trained)
    assert all(len(part) == fitted.held_out_rows == 12 for part in held)
    # Features of different rows differ, so equal features would be the same row.
    assert torch.cdist(held[0], seen).min() > 1e-4
    assert len(seen.unique(dim=0)) == sum(fitted.rows.values()) == 48


@settings(deadline=None, max_examples=60)
@given(
    words=st.lists(st.sampled_from(["a b", "A  b!", "c", "C.", "d", "?", "!", "e f"]), min_size=12),
    seed=st.integers(0, 99),
    share=st.sampled_from([0.1, 0.2, 0.5]),
)
def test_equal_texts_stay_on_one_side_of_the_split(words, seed, share):
    texts = [(word,) for word in words]
    truth = torch.arange(len(texts)) % 2
    try:
        split = fitting._split(texts, truth, ("x", "y"), Router(seed=seed, held_out=share))
    except InputError as problem:  # too few that differ
        assert "after setting rows aside none are left" in str(problem)
        return
    assert sorted([*split.fit.tolist(), *split.held_out.tolist()]) == list(range(len(texts)))
    same = {"a b": 0, "A  b!": 0, "c": 1, "C.": 1, "d": 2, "?": 3, "!": 4, "e f": 5}
    sides = [{same[words[i]] for i in side.tolist()} for side in (split.fit, split.held_out)]
    assert not sides[0] & sides[1] and all(sides)


def test_a_fifth_of_every_experts_rows_is_held_out():
    truth = torch.tensor([0] * 10 + [1] * 40)
    texts = [(f"text {i}",) for i in range(50)]
    split = fitting._split(texts, truth, ("x", "y"), Router())
    assert truth[split.held_out].bincount().tolist() == [2, 8]


def test_the_confusion_counts_every_held_out_row_once(bench):
    fitted = Artifact(bench.routed).manifest.router
    counts = [n for row in fitted.confusion.values() for n in row.values()]
    assert sum(counts) == fitted.held_out_rows
    right = sum(fitted.confusion[name].get(name, 0) for name in EXPERTS)
    assert right / fitted.held_out_rows == pytest.approx(fitted.held_out_accuracy)


@pytest.mark.parametrize("size", [1, 2, 7])
def test_batches_of_one_row_do_not_break_batch_norm_nor_stop_the_training(size, artifact, bench):
    few = {name: rows[:5] for name, rows in bench.texts(5).items()}  # 12 to fit: 7 leaves 5
    asked = QUICK.model_copy(update={"batch_size": size, "epochs": 2, "hidden": 8})
    fit_router(artifact, few, asked)
    state = load_file(artifact / ROUTER)
    assert int(state["layers.1.num_batches_tracked"]) > 0
    assert all(torch.isfinite(tensor).all() for tensor in state.values())


def test_a_last_batch_of_one_row_is_passed_over(artifact, bench):
    few = {name: rows[:5] for name, rows in bench.texts(5).items()}  # 12 to fit: 11 leaves 1
    fit_router(artifact, few, QUICK.model_copy(update={"batch_size": 11, "epochs": 3}))
    assert torch.isfinite(load(artifact).route(**batch_of(load(artifact), few["math"]))).all()


# ------------------------------------------------------------------------------ which layer


@pytest.mark.parametrize(
    ("accuracy", "rows", "layer"),
    [
        ({0: 0.5, 1: 0.9, 2: 0.9}, 100, 1),  # ties: the earlier
        ({0: 0.8701, 1: 0.88, 2: 0.9}, 100, 0),  # √(0.9 · 0.1 / 100) = 0.03: from 0.87 on
        ({0: 0.8699, 1: 0.88, 2: 0.9}, 100, 1),
        ({0: 0.88, 1: 0.89, 2: 0.9}, 10_000, 2),  # 0.003: only the best
        ({0: 0.99, 1: 1.0}, 4, 1),  # at 1.0 the error is 0
        ({5: 0.0}, 7, 5),
    ],
)
def test_the_layer_is_the_earliest_within_one_standard_error_of_the_best(accuracy, rows, layer):
    assert choose_layer(accuracy, rows) == layer


def test_the_order_of_layers_does_not_matter():
    assert choose_layer({2: 0.9, 0: 0.89, 1: 0.9}, 20) == 0


# --------------------------------------------------------------------------------- features


@pytest.mark.parametrize("which", ["bench", "causal_bench"])
def test_the_feature_at_layer_k_is_the_mean_of_transformers_hidden_states(which, request):
    bench = request.getfixturevalue(which)
    model = bench.model
    inputs = batch_of(model, [("the1 math1",), ("the1 math2 math3 law1 code2",)])
    cls = BERT_TEXT.base if which == "bench" else LLAMA_TEXT.base
    plain = opened(cls, bench.routed)
    last = []
    blocks = plain.encoder.layer if which == "bench" else plain.model.layers
    hook = blocks[-1].register_forward_hook(
        lambda module, args, out: last.append(out if isinstance(out, torch.Tensor) else out[0])
    )
    with torch.no_grad():
        hidden = plain(**inputs, output_hidden_states=True).hidden_states
    hook.remove()
    mask = inputs["attention_mask"][:, :, None].float()
    layers = model.features.layers
    assert layers == 2 and len(hidden) == 3
    found = model.features.read(inputs, [0, 1, 2])
    for layer in range(3):
        # transformers' last entry comes after the final norm of a decoder; ours before it
        states = last[0] if layer == layers else hidden[layer]
        want = (states * mask).sum(dim=1) / mask.sum(dim=1)
        torch.testing.assert_close(found[layer], want, rtol=1e-5, atol=1e-6)
        alone = model.features.read(inputs, [layer])
        assert list(alone) == [layer] and torch.equal(alone[layer], found[layer])


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_a_forward_for_features_ends_at_the_wanted_layer(layer, bench):
    model = load(bench.routed)
    calls = []
    for index, block in enumerate(model.model.bert.encoder.layer):
        block.register_forward_hook(lambda *_, index=index: calls.append(index))
    model.model.bert.pooler.register_forward_hook(lambda *_: calls.append("pooler"))
    model.features.read(batch_of(model, [("the1",)]), [layer])
    assert calls == list(range(layer))


def test_layers_that_a_model_does_not_have_are_refused(bench, artifact):
    with pytest.raises(InputError, match=r"router layer 3: .* layers 0 \(the embeddings\) to 2"):
        bench.model.features.read(batch_of(bench.model, [("the1",)]), [3])
    with pytest.raises(InputError, match="router layer 9"):
        fit_router(artifact, bench.texts(6), Router(layer=9))


# ------------------------------------------------------------------------------ the stored one


@pytest.mark.parametrize("which", ["bench", "causal_bench"])
def test_routing_weights_sum_to_one_and_do_not_depend_on_batch_or_padding(which, request):
    model = request.getfixturevalue(which).model
    texts = [text for name in EXPERTS for text in sentences(name, 4, seed=8)]
    together = model.route(**batch_of(model, texts))
    torch.testing.assert_close(together.sum(dim=1), torch.ones(len(texts)))
    assert together.dtype == torch.float32 and together.shape == (12, 3)
    single = torch.cat([model.route(**batch_of(model, [text])) for text in texts])
    torch.testing.assert_close(together, single, rtol=1e-4, atol=1e-6)
    inputs = batch_of(model, texts)
    longer = {
        key: torch.cat([value, value.new_zeros(len(texts), 5)], dim=1)
        for key, value in inputs.items()
    }
    torch.testing.assert_close(model.route(**longer), together, rtol=1e-4, atol=1e-6)


def test_a_prompt_routes_alike_padded_on_the_left_and_on_the_right(causal_bench):
    model = causal_bench.model
    texts = [("math1 the1",), ("code1 code2 the1 the2 law1",)]
    before, sides = model.tokenizer.padding_side, {}
    for side in ("left", "right"):
        model.tokenizer.padding_side = side
        sides[side] = model.route(**batch_of(model, texts))
    model.tokenizer.padding_side = before
    torch.testing.assert_close(sides["left"], sides["right"], rtol=1e-4, atol=1e-6)


def test_the_weights_are_the_softmax_of_the_stored_network(bench):
    model = bench.model
    mlp, entry = load_router(Artifact(bench.routed))
    assert not mlp.training
    inputs = batch_of(model, sentences("law", 3))
    features = model.features.read(inputs, [entry.layer])[entry.layer]
    assert torch.equal(model.route(**inputs), mlp(features).softmax(dim=-1))


def test_the_network_is_three_linear_layers_of_the_papers_kind():
    mlp = RouterMLP(6, 5, 3).eval()
    linear, norm = [mlp.layers[i] for i in (0, 4, 8)], [mlp.layers[i] for i in (1, 5)]
    x = randn(4, 6, seed=0)
    h = x
    for place in range(2):
        h = torch.nn.functional.leaky_relu(norm[place](linear[place](h)))
    assert torch.equal(mlp(x), linear[2](h)) and mlp(x).shape == (4, 3)


def test_the_manifest_says_what_was_fitted_and_the_card_repeats_it(bench):
    artifact = Artifact(bench.routed)
    entry = artifact.manifest.router
    assert entry.bytes == (bench.routed / ROUTER).stat().st_size
    assert artifact.manifest.files[ROUTER] == record(bench.routed / ROUTER)
    assert entry.shared_sha256 == artifact.manifest.shared_files()
    card = (bench.routed / "README.md").read_text()
    assert f"{entry.held_out_accuracy:.1%} of {entry.held_out_rows:,} rows" in card
    assert "No router was fitted yet" in (bench.plain / "README.md").read_text()


# ----------------------------------------------------------------------------------- errors


def test_without_a_router_the_error_names_the_command_that_fits_one(bench):
    model = load(bench.plain)
    with pytest.raises(RouterError, match="twinmerge fit-router"):
        model.route(**batch_of(model, [("the1",)]))
    assert model(task="math", **batch_of(model, [("the1",)])).logits is not None


def test_a_router_of_other_experts_is_not_used(bench, tmp_path):
    folder = shutil.copytree(bench.routed, tmp_path / "artifact")

    def swap(data):
        data["router"]["experts"] = ["code", "math", "law"]

    manifest_edited(folder, swap)
    model = load(folder)
    with pytest.raises(RouterError, match=r"fitted for the experts \['code', 'math', 'law'\]"):
        model(**batch_of(model, [("the1",)]))


def test_a_router_of_another_shared_expert_is_not_used(bench, tmp_path):
    folder = shutil.copytree(bench.routed, tmp_path / "artifact")
    file = folder / "model.safetensors"
    tensors = load_file(file)
    tensors["embeddings.word_embeddings.weight"][0, 0] += 1
    save_file(tensors, file, {"format": "pt"})

    def admit(data):
        data["files"][file.name] = record(file).model_dump()

    manifest_edited(folder, admit)
    model = load(folder)
    with pytest.raises(RouterError, match="fitted on another shared expert"):
        model.route(**batch_of(model, [("the1",)]))


def test_too_few_rows_are_refused_with_the_experts_name(artifact, bench):
    texts = bench.texts(6) | {"code": sentences("code", 4)}
    with pytest.raises(InputError, match="expert 'code': expected at least 5 rows .* got 4"):
        fit_router(artifact, texts)
    with pytest.raises(InputError, match="expert 'law': expected at least 5 rows .* got 0"):
        fit_router(artifact, {name: texts["math"] for name in ("math", "code")})


def test_rows_of_an_unknown_expert_are_refused(artifact, bench):
    with pytest.raises(InputError, match="rows for 'chess', but no such expert. Known: math, code"):
        fit_router(artifact, bench.texts(6) | {"chess": sentences("law", 6)})


def test_rows_that_are_all_equal_are_refused_with_the_experts_name(artifact, bench):
    with pytest.raises(InputError, match="expert 'law': after setting rows aside none are left"):
        fit_router(artifact, bench.texts(8) | {"law": [("the1 law1",)] * 8}, QUICK)


# ----------------------------------------------------------------------------- two at a time


def test_a_second_fit_of_the_same_folder_is_told_to_wait(artifact, bench, monkeypatch):
    told = []

    def meanwhile(stage, done, total):
        if not told:
            with pytest.raises(OutputError, match="another fit-router is writing here; wait for"):
                fit_router(artifact, bench.texts(6), QUICK)
            told.append(stage)

    fit_router(artifact, bench.texts(6), QUICK, progress=meanwhile)
    assert told and load(artifact).router is not None
    fit_router(artifact, bench.texts(6), QUICK)  # the lock is gone


def test_a_router_is_not_stored_while_another_fit_runs(artifact, bench):
    mlp, entry = load_router(Artifact(bench.routed))
    with fitting._alone(artifact), pytest.raises(OutputError, match="another fit-router"):
        fitting.store_router(Artifact(artifact), mlp, entry)
    assert not [path for path in artifact.iterdir() if path.name.startswith(".")]
    fitting.store_router(Artifact(artifact), mlp, entry)
    assert load(artifact).router is not None


def test_staged_files_are_of_one_run_and_what_a_killed_run_left_goes(artifact, bench, monkeypatch):
    (artifact / f".{ROUTER}.0.fitted").write_text("left")
    (artifact / ".fit-router.lock").write_text("")
    seen = []
    for _ in range(2):
        with monkeypatch.context() as patched:
            seen += [count_steps(patched, None)]
            fit_router(artifact, bench.texts(6), QUICK)
    assert seen[0][0] != seen[1][0] and seen[0][0].startswith(f".{ROUTER}.")
    assert not [path for path in artifact.iterdir() if path.name.startswith(".")]


# ------------------------------------------------------------------- killed, and a full disk


class Killed(BaseException):
    """Not an Exception: like a signal, nothing may catch it."""


def count_steps(monkeypatch, fail_at: int | None) -> list[str]:
    """Counts what changes the folder from here on; the step `fail_at` raises instead."""
    steps: list[str] = []
    write_text, write_bytes, replace = Path.write_text, Path.write_bytes, os.replace

    def spy(call):
        def step(first, *args, **kwargs):
            steps.append(Path(first).name)
            if len(steps) - 1 == fail_at:
                raise Killed
            return call(first, *args, **kwargs)

        return step

    monkeypatch.setattr(Path, "write_text", spy(write_text))
    monkeypatch.setattr(Path, "write_bytes", spy(write_bytes))
    monkeypatch.setattr(os, "replace", spy(replace))
    return steps


STEPS = 8


def test_a_fit_writes_in_the_steps_that_the_next_test_kills(artifact, bench, monkeypatch):
    with monkeypatch.context() as patched:
        steps = count_steps(patched, None)
        fit_router(artifact, bench.texts(6), QUICK)
    assert len(steps) == STEPS and not [p for p in artifact.iterdir() if p.name.startswith(".")]


@pytest.mark.slow
@pytest.mark.parametrize("step", range(STEPS))
@pytest.mark.parametrize("had_one", [False, True], ids=["first", "second"])
def test_a_fit_killed_between_steps_leaves_a_valid_artifact(
    step, had_one, bench, tmp_path, monkeypatch
):
    folder = shutil.copytree(bench.routed if had_one else bench.plain, tmp_path / "artifact")
    before = Artifact(folder).manifest.router
    asked = QUICK.model_copy(update={"epochs": 1, "seed": 5})
    with monkeypatch.context() as patched, pytest.raises(Killed):
        count_steps(patched, step)
        fit_router(folder, bench.texts(6), asked)
    left = Artifact(folder, check=True)
    assert left.manifest.router in (None, before)
    model = load(folder)
    assert (model.router is None) == (left.manifest.router is None)
    fit_router(folder, bench.texts(6), asked)  # and the command can be run again
    assert load(folder).router is not None


@pytest.mark.parametrize("name", [ROUTER, "README.md", MANIFEST])
def test_a_full_disk_leaves_the_old_router(name, bench, tmp_path, monkeypatch):
    folder = shutil.copytree(bench.routed, tmp_path / "artifact")
    untouched = shutil.copytree(folder, tmp_path / "untouched")

    def full(call):
        def write(path, *args, **kwargs):
            if name in path.name:
                call(path, args[0][:10], **kwargs)  # a part got through
                raise OSError(errno.ENOSPC, "No space left on device")
            return call(path, *args, **kwargs)

        return write

    with monkeypatch.context() as patched:
        patched.setattr(Path, "write_text", full(Path.write_text))
        patched.setattr(Path, "write_bytes", full(Path.write_bytes))
        with pytest.raises(OutputError, match="the disk is full"):
            fit_router(folder, bench.texts(6), QUICK)
    assert_same_files(folder, untouched)
