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

from twinmerge.artifact.format import EXAMPLES, MANIFEST, ROUTER
from twinmerge.artifact.reader import Artifact
from twinmerge.artifact.tensorfile import record
from twinmerge.data import encode, pad
from twinmerge.errors import InputError, OutputError, RouterError
from twinmerge.recipe import Router as Settings
from twinmerge.runtime.load import load, load_router
from twinmerge.runtime.router import choosing, store
from twinmerge.runtime.router.choosing import Fitted, choose
from twinmerge.runtime.router.features import keys
from twinmerge.runtime.router.fit import fit_router
from twinmerge.runtime.router.mlp import RouterMLP
from twinmerge.runtime.router.rows import FOLDS
from twinmerge.runtime.router.splitting import Parts, alike, divide

QUICK = Settings(
    kind="mlp", epochs=25, hidden=24, batch_size=16, learning_rate=0.01, dropout=0.1, layer=0
)


@pytest.fixture
def artifact(bench, tmp_path) -> Path:
    """A copy without a router, to fit one in."""
    return shutil.copytree(bench.plain, tmp_path / "artifact")


@pytest.fixture(scope="module")
def network(bench, tmp_path_factory) -> Path:
    """An artifact with the paper's network as its router, which takes no input for new."""
    folder = shutil.copytree(bench.plain, tmp_path_factory.mktemp("network") / "artifact")
    fit_router(folder, bench.texts(20), changed(QUICK, coverage=1.0))
    return folder


def changed(settings: Settings, **updates) -> Settings:
    """Other settings, also ones that a recipe may not have."""
    return settings.model_copy(update=updates)


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
        torch.testing.assert_close(weights.sum(dim=1), torch.ones(20))


def test_rows_unlike_all_data_are_new_and_most_rows_of_the_experts_are_not(bench):
    model = load(bench.watchful)
    own = [text for name in EXPERTS for text in sentences(name, 20, seed=77)]
    unknown = [(" ".join(["nowhere"] * count),) for count in range(4, 14)]
    said = model.routing(**batch_of(model, own + unknown))
    assert said.new[:60].float().mean() < 0.3 and said.new[60:].all()
    assert torch.equal(said.new, said.novelty > model.router.novelty.threshold)
    left = (model.router.novelty.threshold - said.novelty).clamp(max=0).exp()
    torch.testing.assert_close(said.weights.sum(dim=1), left)
    torch.testing.assert_close(said.probabilities.sum(dim=1), torch.ones(70))
    assert not load(bench.routed).routing(**batch_of(model, unknown)).new.any()


@pytest.mark.parametrize("kind", choosing.LEARNT)
def test_every_kind_that_learns_tells_separable_tasks_apart(kind, artifact, bench):
    entry = fit_router(artifact, bench.texts(20), changed(QUICK, kind=kind, coverage=1.0))
    assert entry.kind == kind and entry.held_out_accuracy > 0.8
    model = load(artifact)
    for index, name in enumerate(EXPERTS):
        weights = model.route(**batch_of(model, sentences(name, 20, seed=77)))
        assert (weights.argmax(dim=-1) == index).float().mean() > 0.7


@pytest.mark.parametrize("kind", choosing.LEARNT)
def test_rows_that_say_nothing_about_the_expert_are_routed_by_chance(kind, artifact):
    rows = [text[:1] for text in sentences("math", 120, seed=5)]
    texts = {name: rows[place::3] for place, name in enumerate(EXPERTS)}
    assert fit_router(artifact, texts, changed(QUICK, kind=kind)).held_out_accuracy < 0.7


@pytest.mark.parametrize("kind", ["mlp", "auto"])
def test_fitting_twice_gives_the_same_bytes(kind, artifact, bench, tmp_path):
    asked = changed(QUICK, kind=kind, examples=2)
    other = shutil.copytree(artifact, tmp_path / "other")
    torch.manual_seed(1)
    fit_router(artifact, bench.texts(20), asked)
    torch.manual_seed(2)  # and torch's own generator is left alone
    before = torch.get_rng_state()
    fit_router(other, bench.texts(20), asked)
    assert torch.equal(torch.get_rng_state(), before)
    assert_same_files(artifact, other)


def test_another_seed_gives_another_router(artifact, bench):
    fit_router(artifact, bench.texts(20), QUICK)
    first = (artifact / ROUTER).read_bytes()
    fit_router(artifact, bench.texts(20), changed(QUICK, seed=1))
    assert (artifact / ROUTER).read_bytes() != first


def test_with_layer_auto_all_layers_are_tried_and_several_at_once(bench):
    fitted = Artifact(bench.routed).manifest
    assert fitted.recipe["router"]["layer"] == "auto" and fitted.router.kind == "prototype"
    # Of 30 rows each, 6 calibrate; the others train the router that is stored.
    assert fitted.router.rows == dict.fromkeys(EXPERTS, 24) and fitted.router.refitted
    # These are few, so each of them is scored once, by a router of the others.
    assert (fitted.router.calibration_rows, fitted.router.held_out_rows) == (18, 72)
    assert [each.layers for each in fitted.router.tried] == [(0,), (1,), (2,), (0, 1, 2)]
    chosen = [each for each in fitted.router.tried if each.layers == fitted.router.layers]
    assert [each.accuracy for each in chosen] == [fitted.router.held_out_accuracy]
    assert min(each.loss for each in fitted.router.tried) <= chosen[0].loss
    assert fitted.router.reason.startswith(("lowest loss on held-out rows", "cheapest of"))


def test_every_setting_reaches_the_training(artifact, bench, monkeypatch):
    seen, networks = {}, []

    class Adam(torch.optim.Adam):
        def __init__(self, parameters, lr):
            seen["learning_rate"] = lr
            super().__init__(parameters, lr=lr)

    made = choosing.RouterMLP

    class Spy(made):
        def __init__(self, width, hidden, experts, dropout=0.0):
            seen["dropout"] = dropout
            self.passes = {True: 0, False: 0}  # while training, and not
            networks.append(self)
            super().__init__(width, hidden, experts, dropout)

        def forward(self, features):
            if self.training:
                seen["batch_size"] = max(seen.get("batch_size", 0), len(features))
            self.passes[self.training] += 1
            return super().forward(features)

    monkeypatch.setattr(choosing.torch.optim, "Adam", Adam)
    monkeypatch.setattr(choosing, "RouterMLP", Spy)
    asked = dict(layer=1, rows_per_task=10, hidden=7, epochs=3, learning_rate=0.02, batch_size=4)
    asked |= dict(dropout=0.25, held_out=0.3, calibration=0.1, seed=9, refit=False)
    asked |= dict(kind="mlp", pooling="last", temperature=3.0, sharpness=4.0, coverage=0.9)
    fitted = fit_router(artifact, bench.texts(20), Settings(**asked))
    compared, stored = networks
    # One look at the calibration rows each, and in the end one at the held-out ones (the
    # temperature is given). What is stored is trained as long as was best.
    batches = 5  # of 18 rows
    assert compared.passes == {True: 3 * batches, False: 3 + 1}
    assert stored.passes == {True: fitted.epoch * batches, False: 1}
    assert seen == {name: asked[name] for name in seen} and len(seen) == 3
    assert (fitted.kind, fitted.layers, fitted.hidden, fitted.seed) == ("mlp", (1,), 7, 9)
    assert (fitted.pooling, fitted.temperature, fitted.sharpness) == ("last", 3.0, 4.0)
    assert fitted.novelty.coverage == 0.9 and not fitted.refitted
    assert fitted.rows == dict.fromkeys(EXPERTS, 6) and fitted.held_out_rows == 9
    assert fitted.calibration_rows == 3
    assert [each.layers for each in fitted.tried] == [(1,)] and 1 <= fitted.epoch <= 3


def test_a_linear_routers_strength_pulls_its_weights_towards_zero(artifact, bench):
    size = []
    for strength in (0.1, 1000.0):
        fit_router(artifact, bench.texts(10), changed(QUICK, kind="linear", strength=strength))
        size.append(float(load_file(artifact / ROUTER)["layer.weight"].norm()))
    assert size[0] > 10 * size[1]


def test_a_recipes_router_section_holds_when_nothing_else_is_given(artifact, bench):
    def fewer(data):
        data["recipe"]["router"] |= {
            "kind": "mlp", "epochs": 1, "hidden": 5, "rows_per_task": 6, "layer": 2
        }  # fmt: skip

    manifest_edited(artifact, fewer)
    fitted = fit_router(artifact, bench.texts(20))
    assert (fitted.hidden, fitted.layers, fitted.epoch) == (5, (2,), 1)
    # Of 6 rows each, 1 calibrates.
    assert (sum(fitted.rows.values()), fitted.calibration_rows) == (15, 3)


def test_no_row_that_checks_is_trained_on_before(artifact, bench, networks):
    fitted = fit_router(artifact, bench.texts(20), changed(QUICK, epochs=4, refit=False))
    compared, stored = networks
    *calibration, held = compared.checked  # of each epoch, and for the temperature
    assert len(held) == fitted.held_out_rows == 12 and len(calibration) == 5
    assert all(torch.equal(part, calibration[0]) for part in calibration)
    assert len(calibration[0]) == fitted.calibration_rows == 12
    for network, epochs in ((compared, 4), (stored, fitted.epoch)):
        # Features of different rows differ, so equal features would be the same row.
        seen = torch.cat(network.trained)
        assert apart(held, seen).min() > 1e-4 and apart(calibration[0], seen).min() > 1e-4
        assert len(seen.unique(dim=0)) == sum(fitted.rows.values()) == 36
        assert len(network.trained) == epochs * 3  # of 16, 16 and 4 rows
    assert apart(held, calibration[0]).min() > 1e-4
    (last,) = stored.checked  # for its temperature: the held-out rows are not looked at again
    assert torch.equal(last, calibration[0])


def test_by_turns_no_row_is_scored_by_what_was_trained_on_it(artifact, bench, networks):
    """Few rows: each but the calibrating is held out once, and the stored router has them all."""
    fitted = fit_router(artifact, bench.texts(20), changed(QUICK, epochs=4, refit=True))
    *compared, stored = networks
    calibration, own = compared[0].checked[0], torch.cat(stored.trained).unique(dim=0)
    assert len(compared) == FOLDS and len(calibration) == fitted.calibration_rows == 12
    assert len(own) == sum(fitted.rows.values()) == fitted.held_out_rows == 60 - 12
    assert apart(calibration, own).min() > 1e-4
    for network in compared:
        *looks, held = network.checked
        seen = torch.cat(network.trained)
        assert len(looks) == 5 and all(torch.equal(part, calibration) for part in looks)
        assert apart(held, seen).min() > 1e-4 and apart(calibration, seen).min() > 1e-4
        assert len(held) + len(seen.unique(dim=0)) == len(own)
    held = torch.cat([network.checked[-1] for network in compared])
    assert len(held) == len(held.unique(dim=0)) == len(own)
    assert not apart(held, own).amin(dim=1).any() and not apart(own, held).amin(dim=1).any()
    assert len(stored.trained) == fitted.epoch * 3  # of 16 rows each
    assert len(stored.checked) == 1 and torch.equal(stored.checked[0], calibration)


@pytest.mark.parametrize("kind", [*choosing.LEARNT, "auto"])
@pytest.mark.parametrize("rows", [10, 25])
def test_few_rows_are_all_held_out_by_turns_unless_nothing_is_trained_again(
    kind, rows, artifact, bench
):
    asked = changed(QUICK, kind=kind, epochs=2)
    fitted = fit_router(artifact, bench.texts(rows), asked)
    assert fitted.refitted and fitted.calibration_rows == 3 * rows // 5
    assert fitted.held_out_rows == 3 * rows - fitted.calibration_rows == sum(fitted.rows.values())
    again = fit_router(artifact, bench.texts(rows), changed(asked, refit=False))
    assert not again.refitted and again.calibration_rows == fitted.calibration_rows
    assert again.held_out_rows == 3 * rows // 5
    assert sum(again.rows.values()) == 3 * rows - again.calibration_rows - again.held_out_rows
    for entry in (fitted, again):
        counts = [n for row in entry.confusion.values() for n in row.values()]
        assert sum(counts) == entry.held_out_rows


def test_with_many_rows_those_held_out_are_enough(artifact, bench, monkeypatch):
    monkeypatch.setattr("twinmerge.runtime.router.rows.CROSSED", 12)
    fitted = fit_router(artifact, bench.texts(20), changed(QUICK, kind="prototype"))
    assert fitted.refitted and fitted.held_out_rows == 12 and sum(fitted.rows.values()) == 48


@pytest.fixture
def networks(monkeypatch):
    """Those that a fit makes, one after the other, with what each is `trained` and `checked` on."""
    made = []

    class Spy(RouterMLP):
        def __init__(self, *args):
            super().__init__(*args)
            self.trained, self.checked = [], []
            made.append(self)

        def forward(self, features):
            (self.trained if self.training else self.checked).append(features.clone())
            return super().forward(features)

    monkeypatch.setattr(choosing, "RouterMLP", Spy)
    return made


def apart(one, other):
    """Distances between rows, zero for equal ones: not by products, which lose small ones."""
    return torch.cdist(one, other, compute_mode="donot_use_mm_for_euclid_dist")


def divided(texts, truth, **shares) -> Parts:
    asked = Settings(**shares)
    share = asked.calibration, asked.held_out
    return divide(alike(texts), truth, ("x", "y"), share, asked.seed)


@settings(deadline=None, max_examples=60)
@given(
    words=st.lists(st.sampled_from(["a b", "A  b!", "c", "C.", "d", "?", "!", "e f"]), min_size=12),
    seed=st.integers(0, 99),
    share=st.sampled_from([0.1, 0.2, 0.5]),
)
def test_equal_texts_stay_in_one_part(words, seed, share):
    texts = [(word,) for word in words]
    truth = torch.arange(len(texts)) % 2
    try:
        parts = divided(texts, truth, seed=seed, held_out=share)
    except InputError as problem:  # too few that differ
        assert "after setting rows aside none are left" in str(problem)
        return
    rows = [part.tolist() for part in (parts.train, parts.calibration, parts.held_out)]
    assert sorted(row for part in rows for row in part) == list(range(len(texts)))
    same = {"a b": 0, "A  b!": 0, "c": 1, "C.": 1, "d": 2, "?": 3, "!": 4, "e f": 5}
    one, two, three = ({same[words[row]] for row in part} for part in rows)
    assert one and two and three and not (one & two or one & three or two & three)


def test_a_fifth_of_every_experts_rows_calibrates_and_a_fifth_is_held_out():
    truth = torch.tensor([0] * 10 + [1] * 40)
    parts = divided([(f"text {i}",) for i in range(50)], truth)
    assert truth[parts.held_out].bincount().tolist() == [2, 8]
    assert truth[parts.calibration].bincount().tolist() == [2, 8]
    assert truth[parts.train].bincount().tolist() == [6, 24]


def test_the_confusion_counts_every_held_out_row_once(bench):
    fitted = Artifact(bench.routed).manifest.router
    counts = [n for row in fitted.confusion.values() for n in row.values()]
    assert sum(counts) == fitted.held_out_rows
    right = sum(fitted.confusion[name].get(name, 0) for name in EXPERTS)
    assert right / fitted.held_out_rows == pytest.approx(fitted.held_out_accuracy)


@pytest.mark.parametrize("size", [1, 2, 7])
def test_batches_of_one_row_do_not_break_batch_norm_nor_stop_the_training(size, artifact, bench):
    few = {name: rows[:5] for name, rows in bench.texts(5).items()}  # 9 to fit, and 12 again
    fit_router(artifact, few, changed(QUICK, batch_size=size, epochs=2, hidden=8))
    state = load_file(artifact / ROUTER)
    assert int(state["layers.1.num_batches_tracked"]) > 0
    assert all(torch.isfinite(tensor).all() for tensor in state.values())


@pytest.mark.parametrize("size", [8, 11])
def test_a_last_batch_of_one_row_is_passed_over(size, artifact, bench):
    few = {name: rows[:5] for name, rows in bench.texts(5).items()}  # 8 leaves 1 of 9, 11 of 12
    fit_router(artifact, few, changed(QUICK, batch_size=size, epochs=3))
    assert torch.isfinite(load(artifact).route(**batch_of(load(artifact), few["math"]))).all()


# ------------------------------------------------------------------------------ which router


def fitted_with(losses, *layers: int, kind: str = "prototype") -> Fitted:
    """A router that was tried, by its losses on the held-out rows."""
    losses = torch.tensor(losses, dtype=torch.float64)
    logits = torch.zeros(len(losses), 3)
    return Fitted(kind, layers, logits, logits, losses, 0.5, None)


BEST = [0.5, 1.5] * 8
TWO = [[1.0, -0.92] * 8, [1.0, -0.3] * 8]
"""Differences to it whose means are 0.04 and 0.35, with standard errors of 0.248 and 0.168."""


@pytest.mark.parametrize(
    ("more", "layer"),
    [
        ([0.0] * 16, 0),  # ties: the earlier
        (TWO[0], 0),  # within one standard error
        (TWO[1], 1),
        ([0.001] * 16, 1),  # worse by little, but in every row
    ],
)
def test_the_router_is_the_earliest_within_one_standard_error_of_the_best(more, layer):
    early = fitted_with([a + b for a, b in zip(BEST, more, strict=True)], 0)
    late = fitted_with(BEST, 1)
    for tried in ([early, late], [late, early]):  # the order does not matter
        chosen, reason = choose(tried)
        assert chosen.layers == (layer,)
        if chosen.losses.mean() > late.losses.mean():
            assert reason.startswith("cheapest of 2 (of 2 tried)")
            assert "the lowest (prototype on layer 1, 50.0% right)" in reason


def test_of_one_held_out_row_nothing_but_the_loss_is_known():
    assert choose([fitted_with([0.2], 0), fitted_with([0.1], 1)])[0].layers == (1,)


def test_what_was_asked_for_is_chosen_for_that_reason():
    assert choose([fitted_with([7.0], 5)])[1] == "asked for"


def test_an_early_layer_counts_more_than_a_simple_kind_and_that_more_than_few_layers():
    mlp = fitted_with(BEST, 0, kind="mlp")
    linear, both = fitted_with(BEST, 1, kind="linear"), fitted_with(BEST, 0, 1)
    for tried, chosen in (([linear, mlp], mlp), ([linear, both], both), ([both, mlp], mlp)):
        assert choose(tried)[0] is chosen and choose(tried[::-1])[0] is chosen
    one = fitted_with(BEST, 1)
    assert choose([both, one])[0] is one


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
    found = model.features.read(inputs, keys(range(3)))
    for layer in range(3):
        # transformers' last entry comes after the final norm of a decoder; ours before it
        states = last[0] if layer == layers else hidden[layer]
        want = (states * mask).sum(dim=1) / mask.sum(dim=1)
        key = (layer, "mean")
        torch.testing.assert_close(found[key], want, rtol=1e-5, atol=1e-6)
        alone = model.features.read(inputs, [key])
        assert list(alone) == [key] and torch.equal(alone[key], found[key])


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_a_forward_for_features_ends_at_the_wanted_layer(layer, bench):
    model = load(bench.routed)
    calls = []
    for index, block in enumerate(model.model.bert.encoder.layer):
        block.register_forward_hook(lambda *_, index=index: calls.append(index))
    model.model.bert.pooler.register_forward_hook(lambda *_: calls.append("pooler"))
    model.features.read(batch_of(model, [("the1",)]), keys([layer]))
    assert calls == list(range(layer))


def test_layers_that_a_model_does_not_have_are_refused(bench, artifact):
    with pytest.raises(InputError, match=r"router layer 3: .* layers 0 \(the embeddings\) to 2"):
        bench.model.features.read(batch_of(bench.model, [("the1",)]), keys([3]))
    with pytest.raises(InputError, match="router layer 9"):
        fit_router(artifact, bench.texts(6), Settings(layer=9))


# ------------------------------------------------------------------------------ the stored one


@pytest.mark.parametrize("which", ["bench", "causal_bench"])
def test_routing_weights_sum_to_one_and_do_not_depend_on_batch_or_padding(which, request):
    model = request.getfixturevalue(which).model
    texts = [text for name in EXPERTS for text in sentences(name, 4, seed=8)]
    said = model.routing(**batch_of(model, texts))
    together = model.route(**batch_of(model, texts))
    assert torch.equal(said.weights, together)
    torch.testing.assert_close(said.probabilities.sum(dim=1), torch.ones(len(texts)))
    torch.testing.assert_close(together.sum(dim=1), torch.ones(len(texts)))
    assert together.dtype == torch.float32 and together.shape == (12, 3)
    single = torch.cat([model.route(**batch_of(model, [text])) for text in texts])
    torch.testing.assert_close(together, single, rtol=1e-4, atol=1e-5)
    inputs = batch_of(model, texts)
    longer = {
        key: torch.cat([value, value.new_zeros(len(texts), 5)], dim=1)
        for key, value in inputs.items()
    }
    torch.testing.assert_close(model.route(**longer), together, rtol=1e-4, atol=1e-5)


def test_a_prompt_routes_alike_padded_on_the_left_and_on_the_right(causal_bench):
    model = causal_bench.model
    texts = [("math1 the1",), ("code1 code2 the1 the2 law1",)]
    before, sides = model.tokenizer.padding_side, {}
    for side in ("left", "right"):
        model.tokenizer.padding_side = side
        sides[side] = model.route(**batch_of(model, texts))
    model.tokenizer.padding_side = before
    torch.testing.assert_close(sides["left"], sides["right"], rtol=1e-4, atol=1e-6)


def test_the_weights_are_the_sharpened_softmax_of_the_stored_network(network):
    model, router = load(network), load_router(Artifact(network))
    assert isinstance(router.scorer, RouterMLP) and not router.scorer.training
    inputs = batch_of(model, sentences("law", 3))
    features = model.features.read(inputs, router.keys)[router.keys[0]]
    probabilities = (router.scorer(features) / router.temperature).softmax(dim=-1)
    assert router.temperature != 1 and torch.equal(
        model.routing(**inputs).probabilities, probabilities
    )
    model.router.sharpness = 2.0
    squares = probabilities.square()
    want = squares / squares.sum(dim=1, keepdim=True)
    torch.testing.assert_close(model.route(**inputs), want)
    model.router.sharpness = "top"
    top = model.route(**inputs)
    assert top.sort(dim=1).values.tolist() == [[0.0, 0.0, 1.0]] * 3
    assert torch.equal(top.argmax(dim=1), probabilities.argmax(dim=1))


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
    assert (entry.kind, entry.layers) == (bench.model.router.kind, bench.model.router.layers)
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
    with pytest.raises(InputError, match="expert 'law': expected rows to fit a router, got 0"):
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
            with pytest.raises(OutputError, match="another command is changing this"):
                fit_router(artifact, bench.texts(6), QUICK)
            told.append(stage)

    fit_router(artifact, bench.texts(6), QUICK, progress=meanwhile)
    assert told and load(artifact).router is not None
    fit_router(artifact, bench.texts(6), QUICK)  # the lock is gone


def test_a_router_is_not_stored_while_another_fit_runs(artifact, bench):
    source = Artifact(bench.routed)
    router, entry = load_router(source), source.manifest.router
    with store.alone(artifact), pytest.raises(OutputError, match="another command"):
        store.store_router(Artifact(artifact), router, entry)
    assert not [path for path in artifact.iterdir() if path.name.startswith(".")]
    store.store_router(Artifact(artifact), router, entry)
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


STEPS = 10
KEPT = changed(QUICK, examples=2, epochs=1, seed=5)


def test_a_fit_writes_in_the_steps_that_the_next_test_kills(artifact, bench, monkeypatch):
    with monkeypatch.context() as patched:
        steps = count_steps(patched, None)
        fit_router(artifact, bench.texts(6), KEPT)
    assert len(steps) == STEPS and not [p for p in artifact.iterdir() if p.name.startswith(".")]


@pytest.mark.slow
@pytest.mark.parametrize("step", range(STEPS))
@pytest.mark.parametrize("had_one", [False, True], ids=["first", "second"])
def test_a_fit_killed_between_steps_leaves_a_valid_artifact(
    step, had_one, bench, tmp_path, monkeypatch
):
    folder = shutil.copytree(bench.plain, tmp_path / "artifact")
    if had_one:
        fit_router(folder, bench.texts(6), changed(KEPT, seed=0))
    before = Artifact(folder).manifest.router
    with monkeypatch.context() as patched, pytest.raises(Killed):
        count_steps(patched, step)
        fit_router(folder, bench.texts(6), KEPT)
    left = Artifact(folder, check=True)
    assert left.manifest.router in (None, before)
    model = load(folder)
    assert (model.router is None) == (left.manifest.router is None)
    assert len(left.examples()) == (3 if left.manifest.router else 0)
    fit_router(folder, bench.texts(6), KEPT)  # and the command can be run again
    assert load(folder).router is not None and len(Artifact(folder).examples()) == 3


@pytest.mark.parametrize("name", [ROUTER, EXAMPLES, "README.md", MANIFEST])
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
            fit_router(folder, bench.texts(6), KEPT)
    assert_same_files(folder, untouched)


def test_layers_that_say_the_same_of_every_row_are_not_tried(artifact, bench):
    """The embedding of a BERT's first token is the same whatever the text."""
    fitted = fit_router(artifact, bench.texts(12), Settings(pooling="first"))
    assert fitted.tried and all(0 not in each.layers for each in fitted.tried)
    with pytest.raises(InputError, match="all rows give the same features"):
        fit_router(artifact, bench.texts(12), Settings(pooling="first", layer=0))
