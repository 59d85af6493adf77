"""What a router is made of, each part against a formula, a loop or scikit-learn."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import randn
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.covariance import ledoit_wolf
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from texts import sentences
from tiny import EXPERTS, expert_tensors, merge

from twinmerge.artifact.codec import decode_quantised, dequantise
from twinmerge.artifact.reader import Artifact
from twinmerge.data import Chat, encode, pad
from twinmerge.errors import InputError, UnsupportedModel
from twinmerge.recipe import Router as Settings
from twinmerge.runtime.load import load
from twinmerge.runtime.router.calibration import (
    BINS,
    calibration_error,
    fit_temperature,
    sharpened,
)
from twinmerge.runtime.router.choosing import WORSE, Fitted, choose, compare, layer_sets, train
from twinmerge.runtime.router.energies import _shares
from twinmerge.runtime.router.features import Key, keys
from twinmerge.runtime.router.novelty import Distance, Novelty, Scale, learnt, limit
from twinmerge.runtime.router.router import Router, _square, _triangle, joined
from twinmerge.runtime.router.scorers import Fixed, Linear, Projection, Prototype
from twinmerge.runtime.router.splitting import Parts, alike, crossed, divide
from twinmerge.runtime.router.statistics import Sums, precision, shrunk, statistics

SEEDS = st.integers(0, 999)


def clusters(rows: int, experts: int, width: int, seed: int = 0, apart: float = 1.0):
    """Features of `rows` rows of each expert around means of their own, under one covariance."""
    means, mix = randn(experts, width, seed=seed) * apart, randn(width, width, seed=seed + 1)
    truth = torch.arange(experts).repeat_interleave(rows)
    return means[truth] + randn(len(truth), width, seed=seed + 2) @ mix / width**0.5, truth


# ------------------------------------------------------------------------------- calibration


@pytest.mark.parametrize("temperature", [0.2, 1.0, 3.0, 20.0])
def test_a_known_temperature_is_found_again(temperature):
    calibrated = randn(6000, 4, seed=1) * 2
    draw = torch.Generator().manual_seed(2)
    truth = torch.multinomial(calibrated.softmax(dim=1), 1, generator=draw)[:, 0]
    found = fit_temperature(calibrated * temperature, truth)
    assert found == pytest.approx(temperature, rel=0.06)


@settings(deadline=None, max_examples=30)
@given(seed=SEEDS, rows=st.integers(1, 40), experts=st.integers(2, 6), scale=st.floats(0.01, 100))
def test_no_temperature_nearby_is_likelier_and_the_scale_of_logits_comes_out_in_it(
    seed, rows, experts, scale
):
    logits = randn(rows, experts, seed=seed).double()
    truth = torch.randint(experts, (rows,), generator=torch.Generator().manual_seed(seed))
    found = fit_temperature(logits.float(), truth)

    def loss(temperature: float) -> float:
        wrong = 1 / (rows + 2)
        aim = torch.full_like(logits, wrong / (experts - 1))
        aim[torch.arange(rows), truth] = 1 - wrong
        return float(-(aim * (logits / temperature).log_softmax(dim=1)).sum(dim=1).mean())

    nearby = [found * factor for factor in (0.5, 0.9, 1.1, 2)]
    assert all(loss(found) <= loss(t) + 1e-6 for t in nearby if 1e-3 < t < 1e3)
    if 0.1 < found < 5:  # far from the bounds
        assert fit_temperature((scale * logits).float(), truth) == pytest.approx(
            scale * found, rel=0.01
        )


def test_rows_that_are_all_right_do_not_ask_for_certainty():
    logits = torch.eye(2).repeat(50, 1) * 5
    truth = torch.tensor([0, 1]).repeat(50)
    sure = (logits / fit_temperature(logits, truth)).softmax(dim=1).amax(dim=1)
    assert sure.min() == pytest.approx(101 / 102, abs=1e-3)  # Platt's target


def test_without_rows_or_choice_the_temperature_is_one():
    assert fit_temperature(torch.zeros(0, 3), torch.zeros(0, dtype=torch.long)) == 1.0
    assert fit_temperature(torch.zeros(4, 1), torch.zeros(4, dtype=torch.long)) == 1.0


def test_the_calibration_error_of_four_rows_by_hand():
    probabilities = torch.tensor([[0.9, 0.1], [0.91, 0.09], [0.4, 0.6], [0.38, 0.62]])
    truth = torch.tensor([0, 1, 1, 1])
    # one bin: 1 of 2 right at 0.905 on average; another: 2 of 2 right at 0.61
    want = 2 / 4 * (0.905 - 0.5) + 2 / 4 * (1 - 0.61)
    assert calibration_error(probabilities, truth) == pytest.approx(want, abs=1e-6)


@settings(deadline=None, max_examples=30)
@given(seed=SEEDS, rows=st.integers(1, 200), experts=st.integers(1, 5), scale=st.floats(0, 30))
def test_the_calibration_error_is_that_of_a_plain_loop(seed, rows, experts, scale):
    probabilities = (randn(rows, experts, seed=seed) * scale).softmax(dim=1)
    truth = torch.randint(experts, (rows,), generator=torch.Generator().manual_seed(seed))
    want = 0.0
    top, guess = probabilities.double().numpy().max(axis=1), probabilities.numpy().argmax(axis=1)
    for low in range(BINS):
        inside = [
            row
            for row in range(rows)
            if low / BINS <= top[row] < (low + 1) / BINS or (low == BINS - 1 and top[row] >= 1)
        ]
        if inside:
            right = np.mean([guess[row] == int(truth[row]) for row in inside])
            want += len(inside) / rows * abs(right - np.mean(top[inside]))
    assert calibration_error(probabilities, truth) == pytest.approx(want, abs=1e-9)
    assert 0 <= want <= 1


@settings(deadline=None, max_examples=40)
@given(
    seed=SEEDS,
    temperature=st.floats(1e-3, 1e3),
    sharpness=st.sampled_from([1.0, 1.5, 4.0, 100.0, "top"]),
    scale=st.sampled_from([0.1, 1.0, 50.0]),
)
def test_neither_temperature_nor_sharpness_changes_which_is_highest(
    seed, temperature, sharpness, scale
):
    logits = randn(8, 5, seed=seed) * scale
    weights = sharpened((logits / temperature).softmax(dim=1), sharpness)
    torch.testing.assert_close(weights.sum(dim=1), torch.ones(8))
    highest = weights.gather(1, logits.argmax(dim=1, keepdim=True))[:, 0]
    assert torch.equal(highest, weights.amax(dim=1))  # others may be as high: rounding


def test_sharpening_is_a_power_and_top_leaves_one():
    given_ = torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.0, 0.9]])
    assert torch.equal(sharpened(given_, 1.0), given_)
    squared = given_**2 / (given_**2).sum(dim=1, keepdim=True)
    torch.testing.assert_close(sharpened(given_, 2.0), squared)
    assert torch.equal(sharpened(given_, "top"), torch.tensor([[1.0, 0, 0], [0, 0, 1.0]]))
    tiny = torch.tensor([[1e-30, 2e-30]]) / 3e-30 * torch.tensor([[1.0, 1.0]])
    assert bool(sharpened(tiny, 1000.0).isfinite().all())


def test_sharpening_does_not_give_weight_to_what_is_not_allowed():
    router = Router(Fixed(3), kind="none", sharpness=4.0)
    allowed = torch.tensor([[True, False, True]])
    routed = router({(0, "mean"): torch.zeros(1, 0)}, allowed)
    assert routed.weights.tolist() == [[0.5, 0.0, 0.5]]


# -------------------------------------------------------------------------------- statistics


@pytest.mark.parametrize(("rows", "width"), [(50, 4), (5, 30)])
def test_the_shrunk_covariance_is_scikit_learns(rows, width):
    x = randn(rows, width, seed=0).double()
    x = x - x.mean(dim=0)
    torch.testing.assert_close(shrunk(x.T @ x, x), scikit_learns(x), rtol=1e-9, atol=1e-12)


@settings(deadline=None, max_examples=40)
@given(
    seed=SEEDS,
    rows=st.integers(2, 60),
    width=st.integers(1, 24),
    scale=st.sampled_from([1e-4, 1.0, 1e4]),
    alike=st.booleans(),
)
def test_the_shrinking_is_scikit_learns_for_any_shape_and_scale(seed, rows, width, scale, alike):
    x = scale * randn(rows, width, seed=seed).double()
    if alike:  # one direction has nearly all of it
        x = x[:, :1] * randn(width, seed=seed + 1).double() + 1e-3 * x
    want = scikit_learns(x)
    got = shrunk(x.T @ x, x)
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9 * float(want.abs().max()))
    assert bool(precision(got).isfinite().all())


def scikit_learns(x: torch.Tensor) -> torch.Tensor:
    """Ledoit and Wolf's covariance, and the ridge that ours has besides."""
    found, _ = ledoit_wolf(x.numpy(), assume_centered=True)
    level = float(x.square().sum()) / x.numel()
    return torch.from_numpy(found) + 1e-6 * level * torch.eye(x.shape[1], dtype=torch.float64)


def test_statistics_are_those_of_a_loop():
    x, truth = clusters(7, 3, 4)
    x, truth = x[:-3], truth[:-3]  # not as many rows of each
    found = statistics(x, truth, 3)
    assert found.counts.tolist() == [7, 7, 4]
    around = []
    for expert in range(3):
        rows = x[truth == expert].double()
        torch.testing.assert_close(found.means[expert], rows.mean(dim=0))
        around.append(rows - rows.mean(dim=0))
    torch.testing.assert_close(found.mean, x.double().mean(dim=0))
    within, total = torch.cat(around), x.double() - x.double().mean(dim=0)
    torch.testing.assert_close(found.within, shrunk(within.T @ within, within))
    torch.testing.assert_close(found.total, shrunk(total.T @ total, total))


@settings(deadline=None, max_examples=40)
@given(seed=SEEDS, data=st.data(), width=st.integers(1, 20), scale=st.sampled_from([0.1, 1.0, 10]))
def test_leaving_an_expert_out_of_the_sums_is_never_having_had_its_rows(seed, data, width, scale):
    sizes = data.draw(st.lists(st.integers(1, 12), min_size=3, max_size=5))
    truth = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    x = randn(len(truth), width, seed=seed) + 3 * randn(len(sizes), width, seed=seed + 1)[truth]
    out = data.draw(st.integers(0, len(sizes) - 1))
    x[truth == out] *= scale
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    x, truth = x[order], truth[order]
    sums = Sums(x, truth, len(sizes))
    rest = truth != out
    renumbered = truth[rest] - (truth[rest] > out).long()
    cases = [(sums.statistics(out), statistics(x[rest], renumbered, len(sizes) - 1))]
    cases.append((sums.statistics(), statistics(x, truth, len(sizes))))  # it is left as it was
    for got, want in cases:
        assert torch.equal(got.counts, want.counts)
        for name in ("means", "mean", "within", "total"):
            one, other = getattr(got, name), getattr(want, name)
            close = 1e-9 * float(other.abs().max())
            torch.testing.assert_close(one, other, rtol=1e-9, atol=close, msg=name)


def test_a_row_each_has_the_covariance_of_all():
    found = statistics(randn(4, 3, seed=0), torch.arange(4), 4)
    assert torch.equal(found.within, found.total)
    assert bool(precision(found.within).isfinite().all())


@settings(deadline=None, max_examples=25)
@given(seed=SEEDS, n=st.integers(1, 30))
def test_packing_a_symmetric_matrix_loses_no_bit(seed, n):
    matrix = randn(n, n, seed=seed)
    matrix = matrix + matrix.T
    packed = _triangle(matrix)
    assert packed.shape == (n * (n + 1) // 2,)
    assert torch.equal(_square(packed), matrix)


def test_a_stored_router_gives_the_same_bits_as_the_fitted_one():
    x, truth = clusters(9, 3, 12)
    scorer = Prototype.fitted(x, truth, 3)
    key: Key = (1, "mean")
    novelty = Novelty.of({key: Distance.of(statistics(x, truth, 3))})
    novelty.set(novelty.distances_of({key: x}), 0.9)
    router = Router(scorer, (1,), kind="prototype", novelty=novelty)
    other = Router(Prototype(12, 3), (1,), kind="prototype", novelty=Novelty({1: 12}, 3, 0.0))
    tensors = router.tensors()
    assert all(tensor.dtype == torch.float32 for tensor in tensors.values())
    other.load_tensors(tensors)
    assert torch.equal(other.logits({key: x}), router.logits({key: x}))
    assert torch.equal(other({key: x}).novelty, router({key: x}).novelty)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("kind", ["prototype", "prompts", "linear", "mlp"])
def test_features_that_are_not_finite_are_told_before_any_kind_is_trained(kind, value):
    x, truth = clusters(6, 2, 4)
    x[3, 2] = value
    with pytest.raises(InputError, match="router features: NaN or infinity .* float32, or read"):
        train(kind, x, truth, torch.arange(12), 2, Settings(epochs=2))


@pytest.mark.parametrize("kind", ["prototype", "prompts", "linear", "mlp"])
def test_features_that_are_all_alike_are_told_before_any_kind_is_trained(kind):
    x, truth = torch.ones(12, 4), torch.arange(2).repeat(6)
    with pytest.raises(InputError, match="all rows give the same features"):
        train(kind, x, truth, torch.arange(12), 2, Settings(epochs=2))


@pytest.mark.parametrize("kind", ["prototype", "linear", "mlp"])
def test_features_without_variance_beside_others_do_no_harm(kind):
    x, truth = clusters(20, 3, 5, apart=4)
    padded = torch.cat([x, torch.full((len(x), 2), 7.0)], dim=1)
    asked = Settings(epochs=30, batch_size=16, learning_rate=0.01)
    scorer, _ = train(kind, padded, truth, torch.arange(len(x)), 3, asked)
    logits = scorer.eval()(padded)
    assert bool(logits.isfinite().all())
    assert float((logits.argmax(dim=1) == truth).float().mean()) > 0.9


# ----------------------------------------------------------------------------------- scorers


@settings(deadline=None, max_examples=15)
@given(seed=SEEDS, experts=st.integers(2, 4), width=st.integers(2, 8))
def test_prototypes_decide_as_scikit_learns_discriminant_analysis(seed, experts, width):
    x, truth = clusters(12, experts, width, seed=seed)

    class Ours:
        def fit(self, rows):
            self.covariance_ = statistics(x, truth, experts).within.numpy()

    theirs = LinearDiscriminantAnalysis(
        solver="lsqr", covariance_estimator=Ours(), priors=[1 / experts] * experts
    )
    theirs.fit(x.double().numpy(), truth.numpy())
    new = randn(40, width, seed=seed + 9)
    want = torch.from_numpy(theirs.decision_function(new.double().numpy()))
    ours = Prototype.fitted(x, truth, experts)(new).double()
    # theirs gives one number for two classes, ours up to what all classes have in common
    got = ours[:, 1] - ours[:, 0] if experts == 2 else ours - ours.mean(dim=1, keepdim=True)
    want = want if experts == 2 else want - want.mean(dim=1, keepdim=True)
    # sklearn takes the class covariance within `Ours` once per class: the same each time
    torch.testing.assert_close(got, want, rtol=2e-3, atol=2e-3 * float(want.abs().max()))


def test_few_rows_do_not_count_against_an_expert():
    """Rows of noise: with means of 4 and of 400 rows, each is as likely to be the nearest."""
    width, chosen = 16, []
    for seed in range(30):
        x = randn(404 + 200, width, seed=seed)
        truth = (torch.arange(404) >= 400).long()
        logits = Prototype.fitted(x[:404], truth, 2)(x[404:])
        chosen.append(logits.argmax(dim=1).float().mean())
    assert torch.stack(chosen).mean() == pytest.approx(0.5, abs=0.1)


@pytest.mark.parametrize("experts", [2, 3, 5])
@pytest.mark.parametrize("strength", [0.1, 1.0, 30.0])
def test_linear_gives_scikit_learns_probabilities(experts, strength):
    x, truth = clusters(15, experts, 4)
    x = x * torch.tensor([1.0, 10.0, 0.1, 3.0]) + 5
    scaler = StandardScaler().fit(x.double().numpy())
    scaler.scale_ *= (len(x) / (len(x) - 1)) ** 0.5  # ours: the spread of a sample
    theirs = LogisticRegression(C=1 / strength, max_iter=500)
    theirs.fit(scaler.transform(x.double().numpy()), truth.numpy())
    want = theirs.predict_proba(scaler.transform(x.double().numpy()))
    linear = Linear.fitted(x, truth, experts, strength)
    assert linear.layer.weight.shape == (experts, 4)
    got = linear(x).softmax(dim=1).double()
    torch.testing.assert_close(got, torch.from_numpy(want), rtol=1e-3, atol=1e-4)


def test_a_projection_compares_shares_with_what_made_up_inputs_give():
    projection = Projection(4, 2)  # two blocks, two experts: block by block
    projection.usual.copy_(torch.tensor([0.1, 0.2, 0.3, 0.4]))
    projection.spread.copy_(torch.tensor([0.1, 0.1, 0.2, 0.2]))
    logits = projection(torch.tensor([[0.2, 0.2, 0.3, 0.2]]))
    torch.testing.assert_close(logits, torch.tensor([[(1 + 0) / 2, (0 - 1) / 2]]))


# ----------------------------------------------------------------------------------- novelty

MEAN: Key = (1, "mean")


def learnt_from(features, truth, own, experts, looks=((MEAN,),)):
    """From the rows `own`, and checked on the others."""
    known, check = ({key: x[rows] for key, x in features.items()} for rows in (own, ~own))
    return learnt(known, truth[own], check, truth[~own], experts, 0.95, looks)


def test_the_distances_are_the_relative_and_the_plain_mahalanobis_distance():
    x, truth = clusters(30, 3, 6)
    found = statistics(x, truth, 3)
    new = (randn(10, 6, seed=9) * 3).double()
    near, far = torch.linalg.inv(found.within), torch.linalg.inv(found.total)
    want = []
    for row in new:
        nearest = min(float((row - m) @ near @ (row - m)) for m in found.means)
        want.append([nearest - float((row - found.mean) @ far @ (row - found.mean)), nearest])
    novelty = Novelty.of({(0, "mean"): Distance.of(found)})
    got = novelty.distances_of({(0, "mean"): new.float()})[:, 0].double()
    torch.testing.assert_close(got, torch.tensor(want).double(), rtol=1e-3, atol=1e-2)


def test_the_score_is_the_log_sum_of_scaled_distances_and_what_is_far_from_all_is_above_any():
    x, truth = clusters(60, 3, 6)
    features = {(0, "last"): x, (2, "last"): x.square()}
    novelty = Novelty.of({k: Distance.of(statistics(f, truth, 3)) for k, f in features.items()})
    assert novelty.keys == tuple(features) and novelty.pooling == "last"
    distances = novelty.distances_of(features)
    novelty.set(distances, 0.9)
    scaled = (distances - distances.mean(0)) / distances.std(0)
    relative, plain = scaled[..., 0].exp().sum(dim=1).log(), scaled[..., 1].mean(dim=1)
    offset = plain.max() - novelty.threshold
    want = torch.maximum(relative, plain - offset)
    torch.testing.assert_close(novelty(features), want, rtol=1e-3, atol=1e-3)
    assert novelty.threshold == pytest.approx(
        float(relative.quantile(0.9, interpolation="higher")), rel=1e-4
    )
    assert int((relative > novelty.threshold).sum()) <= 18  # a tenth of 180
    far = {key: f[:3] + 1e3 for key, f in features.items()}
    assert bool(novelty.is_new(novelty(far)).all())


def test_what_stands_out_in_one_layer_of_several_is_new():
    """Also where the mean over layers is one that many rows have."""
    novelty = Novelty(dict.fromkeys(range(4), 3), 2, threshold=0.0)
    usual = randn(400, 4, 2, seed=0)
    novelty.set(usual, 0.99)
    odd = torch.zeros(4, 4, 2)
    odd[range(4), range(4), 0] = 4.2  # each in a layer of its own
    assert bool(novelty.is_new(novelty.judged(odd)).all())
    scaled = (usual[..., 0] - usual[..., 0].mean(dim=0)) / usual[..., 0].std(dim=0)
    assert odd[..., 0].mean(dim=1).max() < scaled.mean(dim=1).quantile(0.99)
    assert not novelty.is_new(novelty.judged(torch.zeros(1, 4, 2))).any()


def test_a_row_is_new_above_the_threshold_only():
    novelty = Novelty({0: 3}, 2, threshold=1.5)
    assert novelty.is_new(torch.tensor([1.4, 1.5, 1.6])).tolist() == [False, False, True]
    x, truth = clusters(5, 2, 3)
    unset = Novelty.of({(0, "mean"): Distance.of(statistics(x, truth, 2))})
    assert not unset.is_new(torch.tensor([1e30])).any()


def test_an_expert_far_from_the_others_is_noticed_when_left_out_and_a_twin_is_not():
    x, truth = clusters(60, 4, 5, apart=3)
    x[truth == 3, 0] += 200 * randn(5, seed=4)[0].sign()
    x[truth == 2] = x[truth == 1] + 0.01 * randn(60, 5, seed=5)
    even = torch.arange(len(x)) % 2 == 0
    _, shares = learnt_from({MEAN: x}, truth, even, 4)
    assert len(shares) == 4 and shares[3] == 1.0 and shares[2] < 0.2 and shares[1] < 0.2


def test_an_expert_without_held_out_rows_is_not_said_to_be_noticed():
    x, truth = clusters(10, 3, 4)
    held = truth != 1
    _, shares = learnt({MEAN: x}, truth, {MEAN: x[held]}, truth[held], 3, 0.9, [[MEAN]])
    assert set(shares) == {0, 2}


@pytest.mark.parametrize("telling", ["last", "mean"])
@pytest.mark.parametrize("first", ["last", "mean"])
def test_the_look_that_notices_most_of_left_out_experts_is_taken(telling, first):
    """Of two layers each: one pooling has clusters far apart, the other noise."""
    second = "mean" if first == "last" else "last"
    looks = [keys((1, 2), first), keys((1, 2), second)]
    features: dict[Key, torch.Tensor] = {}
    for layer in (1, 2):
        x, truth = clusters(40, 4, 6, seed=10 * layer, apart=8)
        features |= {(layer, "last"): randn(*x.shape, seed=layer + 7), (layer, "mean"): x}
        if telling == "last":
            mean, last = (layer, "mean"), (layer, "last")
            features[mean], features[last] = features[last], features[mean]
    even = torch.arange(160) % 2 == 0
    novelty, shares = learnt_from(features, truth, even, 4, looks)
    assert novelty.keys == keys((1, 2), telling) and min(shares.values()) > 0.9
    noise = [look for look in looks if look[0][1] != telling]
    unheard = learnt_from(features, truth, even, 4, noise)[1]
    assert sum(unheard.values()) < 0.5 * sum(shares.values())
    # It is made of all experts' rows, and its threshold is that of the others.
    novelty_alone, _ = learnt_from(features, truth, even, 4, [keys((1, 2), telling)])
    assert novelty.threshold == novelty_alone.threshold
    own = novelty({key: features[key][~even] for key in novelty.keys})
    assert int(novelty.is_new(own).sum()) <= 4  # a twentieth of 80
    assert bool(novelty.is_new(novelty({key: -f[:9] + 30 for key, f in features.items()})).all())


def test_of_looks_that_notice_the_same_the_first_is_taken():
    x, truth = clusters(40, 3, 6, apart=8)
    features: dict[Key, torch.Tensor] = {(1, "last"): x, (1, "mean"): x}
    even = torch.arange(120) % 2 == 0
    for looks in ([[(1, "last")], [MEAN]], [[MEAN], [(1, "last")]]):
        novelty, shares = learnt_from(features, truth, even, 3, looks)
        assert novelty.keys == tuple(looks[0]) and len(shares) == 3


@pytest.mark.parametrize("coverage", [0.5, 0.9, 0.99])
@pytest.mark.parametrize("count", [4, 20, 99, 400])
def test_another_row_stays_below_the_limit_as_often_as_asked(count, coverage):
    """Over many draws; of few rows the bound is that of normal scores, which these are."""
    scores = torch.randn(2000, count, generator=torch.Generator().manual_seed(0))
    others = torch.randn(2000, generator=torch.Generator().manual_seed(1))
    below = [float(o) <= limit(own, coverage) for own, o in zip(scores, others, strict=True)]
    share = sum(below) / len(below)
    assert coverage - 0.03 < share < coverage + (0.11 if count < 20 else 0.03)


def test_the_limit_is_a_score_where_there_are_enough_and_never_below_all_where_not():
    scores = torch.arange(1.0, 100.0)
    assert limit(scores, 0.95) == 95 and limit(scores, 0.99) == 99
    heavy = torch.tensor([0.0] * 9 + [100.0])
    assert limit(heavy, 0.95) >= 100 and limit(torch.tensor([3.0]), 0.9) == 3


def test_what_cannot_be_scaled_is_refused():
    with pytest.raises(InputError, match="finite features of at least one row"):
        Scale.of(torch.zeros(0, 1, 2), 0.9)
    with pytest.raises(InputError, match="finite features"):
        Scale.of(torch.full((3, 1, 2), float("nan")), 0.9)


def test_an_expert_left_out_of_a_layer_that_it_alone_varies_in_is_judged_by_the_others():
    x, truth = clusters(40, 3, 6, apart=8)
    flat = torch.where((truth == 1)[:, None], x, 0.0)
    features: dict[Key, torch.Tensor] = {(0, "mean"): flat, MEAN: x}
    even = torch.arange(120) % 2 == 0
    _, shares = learnt_from(features, truth, even, 3, [[(0, "mean"), MEAN]])
    assert set(shares) == {0, 1, 2} and shares[1] > 0.9


def test_of_two_experts_none_is_left_out_and_the_first_look_is_taken():
    """The rows of one alone have no relative distance."""
    x, truth = clusters(40, 2, 6, apart=8)
    features: dict[Key, torch.Tensor] = {(1, "last"): randn(80, 6, seed=3), MEAN: x}
    even = torch.arange(80) % 2 == 0
    for looks in ([[(1, "last")], [MEAN]], [[MEAN], [(1, "last")]]):
        novelty, shares = learnt_from(features, truth, even, 2, looks)
        assert shares == {} and novelty.keys == tuple(looks[0])
        assert novelty.threshold < float("inf")


# --------------------------------------------------------------------------------- splitting

LONG = "the cat sat on the mat and looked at all the birds outside the window"


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (("A cat sat.",), ("a CAT, sat!",)),
        (("  a   cat sat",), ("a cat sat",)),
        ((LONG,), (LONG.replace("mat", "rug"),)),
        ((LONG,), (LONG + " for an hour",)),
        ((LONG + " and then it slept",), ("well, " + LONG,)),
        (("the cat is on the mat", "yes"), ("The cat is on the mat.", "no it is not")),
        (("yes", "the cat is on the mat"), ("no", "the cat is on the mat")),
        (("where is the cat now", "it sat"), ("where is the cat now",)),
        (("?!",), (" ?!",)),
        (("",), ("",)),
        (("ÉTÉ à Paris",), ("été à paris",)),
    ],
)
def test_rows_that_are_nearly_alike_are_in_one_group(one, other):
    groups = alike([one, ("something else altogether",), other])
    assert groups[0] == groups[2] != groups[1]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (("a cat sat",), ("a dog sat",)),
        (("yes", "a cat sat here"), ("yes", "a dog ran there")),  # a word says little
        ((LONG,), ("birds window outside the all at looked and mat the on sat cat",)),
        (("?",), ("!",)),
        (("one two three four five six seven",), ("one two three four nine ten eleven twelve",)),
    ],
)
def test_rows_that_are_not_alike_are_not(one, other):
    groups = alike([one, other])
    assert groups[0] != groups[1]


def test_what_is_alike_through_others_is_in_one_group():
    words = LONG.split()
    chain = [(" ".join(words[i : i + 9]),) for i in range(0, len(words) - 8, 2)]
    groups = alike([*chain, ("nothing of that kind here",)])
    assert len(set(groups.tolist())) == 2 and len(set(groups[:-1].tolist())) == 1
    assert alike([chain[0], chain[-1]]).unique().numel() == 2  # not without those between


def test_phrases_that_very_many_rows_share_do_not_make_them_alike():
    rows = [(f"what do you think about thing{i} or maybe other{i}",) for i in range(80)]
    assert alike(rows).unique().numel() == 80


def test_chats_are_compared_by_what_was_said():
    def chat(*said: str) -> Chat:
        return Chat(tuple({"role": "user", "content": each} for each in said))

    groups = alike([chat("Hi there you two", "ok"), chat("hi there, you two", "no"), chat("bye")])
    assert groups[0] == groups[1] != groups[2]


def test_no_rows_are_no_groups():
    assert alike([]).tolist() == []


@settings(deadline=None, max_examples=80)
@given(data=st.data(), seed=st.integers(0, 99))
def test_parts_cover_all_rows_once_and_cut_no_group(data, seed):
    experts = data.draw(st.integers(1, 4))
    sizes = data.draw(st.lists(st.integers(5, 40), min_size=experts, max_size=experts))
    truth = torch.tensor([t for t, size in enumerate(sizes) for _ in range(size)])
    most = data.draw(st.sampled_from([3, 20, 200]))
    groups = torch.tensor([data.draw(st.integers(0, most)) for _ in truth])
    shares = data.draw(st.sampled_from([(0.2, 0.2), (0.1, 0.4), (0.01, 0.01)]))
    names = [f"e{i}" for i in range(experts)]
    try:
        parts = divide(groups, truth, names, shares, seed)
    except InputError as problem:
        assert "after setting rows aside none are left" in str(problem)
        return
    every = torch.cat([parts.train, parts.calibration, parts.held_out])
    assert sorted(every.tolist()) == list(range(len(truth)))
    own = [set(groups[p].tolist()) for p in (parts.train, parts.calibration, parts.held_out)]
    assert not own[0] & own[1] and not own[0] & own[2] and not own[1] & own[2]
    assert len(parts.calibration) and len(parts.held_out)
    assert truth[parts.train].unique().numel() == experts


def test_rows_of_their_own_are_divided_by_the_shares_expert_by_expert():
    truth = torch.tensor([0] * 10 + [1] * 40)
    parts = divide(torch.arange(50), truth, ("x", "y"), (0.1, 0.2), seed=0)
    assert truth[parts.held_out].bincount().tolist() == [2, 8]
    assert truth[parts.calibration].bincount().tolist() == [1, 4]
    assert torch.equal(
        divide(torch.arange(50), truth, ("x", "y"), (0.1, 0.2), seed=0).train, parts.train
    )
    assert not torch.equal(
        divide(torch.arange(50), truth, ("x", "y"), (0.1, 0.2), seed=1).train, parts.train
    )


@pytest.mark.parametrize("seed", range(8))
def test_a_large_group_of_copies_trains_and_does_not_fill_what_is_held_out(seed):
    groups = torch.tensor([0] * 24 + list(range(1, 17)))
    parts = divide(groups, torch.zeros(40, dtype=torch.long), ("x",), (0.2, 0.2), seed)
    assert len(parts.held_out) == len(parts.calibration) == 8 and len(parts.train) == 24


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_by_turns_every_row_is_scored_once_by_what_saw_no_row_like_it(seed):
    draw = torch.Generator().manual_seed(seed)
    groups, truth = torch.randint(40, (120,), generator=draw), torch.arange(120) % 3
    parts = divide(groups, truth, ("x", "y", "z"), (0.2, 0.2), seed)
    pairs = crossed(parts, groups, truth, 5, seed)
    assert len(pairs) == 5
    expected = torch.cat([parts.train, parts.held_out]).sort().values
    assert torch.equal(torch.cat([held for _, held in pairs]).sort().values, expected)
    for own, held in pairs:
        assert torch.equal(torch.cat([own, held]).sort().values, expected)
        assert not set(groups[own].tolist()) & set(groups[held].tolist())
        assert set(truth[own].tolist()) == {0, 1, 2}
    sizes = [len(held) for _, held in pairs]
    assert max(sizes) - min(sizes) < 0.5 * max(sizes)
    again = crossed(parts, groups, truth, 5, seed)
    assert all(
        torch.equal(a, b)
        for one, two in zip(pairs, again, strict=True)
        for a, b in zip(one, two, strict=True)
    )


def test_an_expert_whose_rows_are_all_alike_has_no_turns():
    """Where they are scored, nothing of that expert would be left to train on."""
    truth = torch.arange(60) % 2
    groups = torch.where(truth == 0, torch.arange(60), 60)
    some = torch.arange(60)
    parts = Parts(some[:40], some[40:50], some[50:])
    (pair,) = crossed(parts, groups, truth, 5, 0)
    assert torch.equal(pair[0], parts.train) and torch.equal(pair[1], parts.held_out)


# ---------------------------------------------------------------------------------- choosing


def made_up(kind: str, layers: tuple[int, ...], losses: list[float]) -> Fitted:
    loss = torch.tensor(losses, dtype=torch.float64)
    logits = torch.zeros(len(loss), 2)
    return Fitted(kind, layers, logits, logits, loss, 0.9, None)


def spread(mean: float, gap: float) -> list[float]:
    """100 losses around a mean; against constant ones, one standard error is about gap / 10."""
    return [mean + gap, mean - gap] * 50


def test_the_cheapest_within_one_standard_error_is_chosen():
    best = made_up("mlp", (4,), [0.5] * 100)
    near = made_up("prototype", (2,), spread(0.509, 0.1))  # one standard error: 0.01005
    far = made_up("prototype", (0,), spread(0.511, 0.1))
    chosen, reason = choose([far, near, best])
    assert chosen is near
    assert "cheapest of 2 (of 3 tried)" in reason and "mlp on layer 4, 90.0% right" in reason


def test_what_few_rows_cannot_tell_apart_must_not_seem_much_worse_either():
    best = made_up("prototype", (4,), [0.5] * 100)
    seems = made_up("prototype", (0,), spread(0.5 + 1.1 * WORSE, 2.0))  # one standard error: 0.2
    assert choose([seems, best])[0] is best
    seems = made_up("prototype", (0,), spread(0.5 + 0.9 * WORSE, 2.0))
    assert choose([seems, best])[0] is seems


def test_differences_are_taken_row_by_row():
    """Losses that vary much, but together: the standard error of the difference is small."""
    rows = [float(i % 10) for i in range(100)]
    best = made_up("linear", (2,), rows)
    worse = made_up("prototype", (1,), [loss + 0.1 + 0.01 * (i % 2) for i, loss in enumerate(rows)])
    chosen, reason = choose([worse, best])
    assert chosen is best and reason == "lowest loss on held-out rows of 2 tried"


@pytest.mark.parametrize(
    ("cheap", "dear"),
    [
        (("mlp", (1,)), ("prototype", (2,))),  # an early layer before all
        (("prototype", (2,)), ("linear", (2,))),
        (("linear", (2,)), ("mlp", (2,))),
        (("prototype", (2,)), ("prototype", (0, 1, 2))),
        (("linear", (0, 2)), ("mlp", (2,))),
    ],
)
def test_cheap_is_an_early_layer_then_a_simple_kind_then_few_layers(cheap, dear):
    one, other = made_up(*cheap, [0.5] * 9), made_up(*dear, [0.5] * 9)
    assert choose([one, other])[0] is one and choose([other, one])[0] is one


def test_of_one_there_is_no_choice():
    one = made_up("mlp", (1,), [0.3])
    assert choose([one]) == (one, "asked for")


def test_what_is_tried_are_all_layers_and_three_at_once_where_they_are_narrow():
    assert layer_sets(4, 16, "auto") == [
        *((layer,) for layer in range(5)),
        *((0, 1, 2), (0, 1, 3), (0, 2, 4)),
    ]
    assert layer_sets(4, 4096, "auto") == [(layer,) for layer in range(5)]
    assert layer_sets(4, 16, 3) == [(3,)] and layer_sets(4, 16, [0, 3]) == [(0, 3)]
    deep = layer_sets(80, 4096, "auto")
    assert deep[0] == (0,) and deep[-1] == (80,) and len(deep) <= 14


def test_comparing_all_kinds_takes_the_slower_ones_to_the_best_layers_only():
    x, truth = clusters(40, 3, 4, apart=3)
    noise = randn(len(x), 4, seed=50)
    features = {0: noise, 1: x, 2: noise + 0.5 * x, 3: noise + 0.3 * x, 4: noise + 0.1 * x}
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    parts = Parts(order[:60], order[60:90], order[90:])
    asked = Settings(kind="auto", epochs=3)
    sets, pairs = [(i,) for i in range(5)], [(parts.train, parts.held_out)]
    tried, chosen, reason = compare(features, truth, parts.calibration, pairs, 3, sets, asked)
    kinds = [each.kind for each in tried]
    assert kinds == ["prototype"] * 5 + ["linear"] * 3 + ["mlp"] * 3
    assert {each.layers for each in tried[5:8]} == {(1,), (2,), (3,)}
    assert chosen.layers == (1,) and chosen.accuracy > 0.9 and reason
    best = min(float(each.losses.mean()) for each in tried)
    assert float(chosen.losses.mean()) <= best + 0.2


def test_a_network_alone_is_tried_where_prototypes_do_best():
    x, truth = clusters(40, 3, 4, apart=3)
    noise = randn(len(x), 4, seed=50)
    features = {0: noise, 1: x, 2: noise + 0.5 * x, 3: noise + 0.3 * x, 4: noise + 0.1 * x}
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    pairs, asked = [(order[:60], order[90:])], Settings(kind="mlp", epochs=2)
    sets = [(i,) for i in range(5)]
    tried, _, _ = compare(features, truth, order[60:90], pairs, 3, sets, asked)
    assert {each.kind for each in tried} == {"mlp"}
    assert {each.layers for each in tried} == {(1,), (2,), (3,)}
    tried, _, reason = compare(features, truth, order[60:90], pairs, 3, sets[:1], asked)
    assert [(each.kind, each.layers) for each in tried] == [("mlp", (0,))] and reason == "asked for"


# ---------------------------------------------------------------------------------- energies


def test_shares_are_mean_over_kept_tokens_and_do_not_change_with_the_scale_of_x():
    x = randn(3, 5, 8, seed=0)
    basis = torch.linalg.qr(randn(8, 3, seed=1)).Q
    wide = torch.stack([basis, torch.nn.functional.pad(basis[:, :1], (0, 2))])
    mask = torch.tensor([[1] * 5, [1, 1, 1, 0, 0], [0, 0, 0, 1, 1]])
    got = _shares(x, wide, mask)
    for row in range(3):
        tokens = x[row][mask[row].bool()]
        for expert, space in enumerate((basis, basis[:, :1])):
            inside = (tokens @ space).square().sum(dim=1) / tokens.square().sum(dim=1)
            torch.testing.assert_close(got[row, expert], inside.mean())
    torch.testing.assert_close(_shares(x * 1000, wide, mask), got)
    broken = x.clone()
    broken[1, 3:] = float("nan")  # what stands at padded positions may be anything
    assert torch.equal(_shares(broken, wide, mask), got)
    assert torch.equal(_shares(torch.zeros(1, 2, 8), wide, None), torch.zeros(1, 2))
    full = torch.eye(8)[None]
    torch.testing.assert_close(_shares(x, full, None), torch.ones(3, 1))


@pytest.mark.parametrize("dtype", ["float32", "int8", "int4"])
def test_energies_are_those_of_the_stored_factors(dtype, bench, tmp_path):
    exclusive = {"rank": 3, "dtype": dtype}
    made = bench.made
    merge(made.base, made.experts, tmp_path / "out", exclusive=exclusive)
    model = load(tmp_path / "out")
    rows = [text for name in EXPERTS for text in sentences(name, 2, seed=3)]
    inputs = pad(model.tokenizer, encode(model.tokenizer, rows, 40).rows)
    mask = inputs["attention_mask"].bool()
    seen: dict[str, torch.Tensor] = {}
    names = [n for n in dict(model.model.named_modules()) if n.startswith("bert.encoder.layer.")]
    for name in names:
        model.model.get_submodule(name).register_forward_pre_hook(
            lambda module, args, name=name: seen.update({name: args[0]}) if args else None
        )
    with torch.no_grad():
        model(**inputs, weights=[0.0, 0.0, 0.0], head="math")
    got = model.energies.read(inputs, (1, 2))
    stored = {name: right_factors(tmp_path / "out", name) for name in EXPERTS}
    for block in (1, 2):
        shares = []
        matrices = [n for n in stored["math"] if n.startswith(f"encoder.layer.{block - 1}.")]
        assert len(matrices) == 6
        for name in matrices:
            x = seen["bert." + name.removesuffix(".weight")]
            each = []
            for expert in EXPERTS:
                q = torch.linalg.qr(stored[expert][name].T.double()).Q.float()
                share = (x @ q).square().sum(dim=-1) / x.square().sum(dim=-1)
                each.append((share * mask).sum(dim=1) / mask.sum(dim=1))
            shares.append(torch.stack(each, dim=1))
        want = torch.stack(shares).mean(dim=0)
        torch.testing.assert_close(got[block, "mean"], want, rtol=1e-3, atol=1e-4)
    first = got[1, "mean"]
    assert bool((first > 0).all()) and bool((first < 1).all())


def right_factors(folder: Path, expert: str) -> dict[str, torch.Tensor]:
    """A (rank, in) of every matrix, from the expert's file and the manifest alone."""
    tensors, found = expert_tensors(folder, expert), {}
    for entry in Artifact(folder).manifest.tensors:
        share = entry.experts.get(expert)
        if f"{entry.name}.a" in tensors:
            found[entry.name] = tensors[f"{entry.name}.a"]
        elif f"{entry.name}.a.q" in tensors:
            parts = {part: tensors[f"{entry.name}.a.{part}"] for part in ("q", "scale")}
            bits = 8 if parts["q"].dtype == torch.int8 else 4
            assert share is not None and entry.matrix is not None
            rows = decode_quantised(parts, len(parts["q"]), entry.matrix[1], bits)
            found[entry.name] = dequantise(rows)
    return found


def test_there_are_no_energies_where_experts_are_kept_otherwise_than_in_factors(bench, tmp_path):
    made = bench.made
    for name, exclusive in {
        "none": {"rank": "none"},
        "magnitude": {"form": "magnitude", "density": 0.1},
    }.items():
        merge(made.base, made.experts, tmp_path / name, exclusive=exclusive)
        model = load(tmp_path / name)
        inputs = pad(model.tokenizer, encode(model.tokenizer, [("the1 math1",)], 40).rows)
        with pytest.raises(UnsupportedModel, match="block 1 holds no factors .* Use another kind"):
            model.energies.read(inputs, (1,))


def test_layers_side_by_side_keep_the_order_that_was_asked_for():
    features = {(1, "mean"): torch.ones(2, 1), (2, "mean"): torch.zeros(2, 2)}
    features[1, "last"] = torch.full((2, 1), 7.0)
    assert joined(features, keys((2, 1))).tolist() == [[0, 0, 1]] * 2
    assert joined(features, ((1, "last"), (2, "mean"))).tolist() == [[7, 0, 0]] * 2
    assert joined({(5, "first"): torch.ones(2, 3)}, ()).tolist() == [[1] * 3] * 2
