"""The ways to make the shared expert: one suite for all of them, then what each promises."""

import pytest
import torch
from conftest import randn
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from twinmerge.errors import RecipeError
from twinmerge.merging import shared
from twinmerge.merging.shared import METHODS, Option, coefficients, get, merge
from twinmerge.merging.shared.dare import keep_mask

ALL = sorted(METHODS)
AROUND_THE_BASE = sorted(set(METHODS) - {"linear"})
"""Methods that add to the base: no weight, no change."""


def generators(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def merged(name: str, base: Tensor, experts: Tensor, **parameters) -> Tensor:
    seeds = range(len(experts))
    return merge(name, base, experts, parameters, generators(*seeds) if get(name).random else None)


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("name", ALL)
def test_the_order_of_experts_does_not_matter(name, normalize):
    base, experts, order = randn(6, 5, seed=0), randn(3, 6, 5, seed=1), [2, 0, 1]
    weight, density = [0.2, 0.5, 0.9], [0.4, 0.6, 0.8]
    per_expert = {"weight": weight, "density": density}
    known = get(name).options.keys() & per_expert.keys()
    one = {key: per_expert[key] for key in known}
    other = {key: [per_expert[key][i] for i in order] for key in known}
    random = get(name).random
    torch.testing.assert_close(
        merge(
            name,
            base,
            experts,
            {**one, "normalize": normalize},
            generators(0, 1, 2) if random else None,
        ),
        merge(
            name,
            base,
            experts[order],
            {**other, "normalize": normalize},
            generators(*order) if random else None,
        ),
    )


@pytest.mark.parametrize("name", ALL)
def test_experts_that_agree_are_what_their_average_is(name):
    base, expert = randn(4, 4, seed=0), randn(4, 4, seed=1)
    got = merged(name, base, torch.stack([expert] * 3), normalize=True)
    torch.testing.assert_close(got, expert)


@pytest.mark.parametrize("name", ALL)
def test_a_tensor_that_no_expert_changed_stays_exactly_the_bases(name):
    base = randn(4, 4, seed=0)
    parameters = {"weight": [0.1, 0.2, 0.4], "density": 0.5}
    known = {key: parameters[key] for key in parameters if key in get(name).options}
    assert torch.equal(merged(name, base, torch.stack([base] * 3), **known), base)


@pytest.mark.parametrize("name", AROUND_THE_BASE)
def test_zero_weights_give_the_base(name):
    base, experts = randn(4, 4, seed=0), randn(3, 4, 4, seed=1)
    assert torch.equal(merged(name, base, experts, weight=0), base)


@pytest.mark.parametrize("shape", [(), (1,), (7,), (3, 4), (2, 3, 2), (0, 4)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ALL)
def test_shape_and_dtype_are_kept(name, dtype, shape):
    base, experts = randn(3, *shape, seed=0, dtype=dtype).split([1, 2])
    base = base[0]
    density = {"density": 0.5} if "density" in get(name).options else {}
    for options in ({}, {"weight": [0.5, 1], **density}):
        got = merged(name, base, experts, **options)
        assert got.shape == base.shape and got.dtype == dtype
        assert got.isfinite().all()


@pytest.mark.parametrize("name", ALL)
def test_the_number_of_threads_changes_no_bit(name):
    base, experts = randn(300, 301, seed=0), randn(2, 300, 301, seed=1)
    wanted = {"density": 0.5, "rescale": True, "normalize": True}
    parameters = {key: wanted[key] for key in wanted if key in get(name).options}
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 4):
            torch.set_num_threads(threads)
            results.append(merged(name, base, experts, **parameters))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@pytest.mark.parametrize("name", ALL)
def test_the_inputs_are_left_as_they_are(name):
    base, experts = randn(4, 4, seed=0), randn(2, 4, 4, seed=1)
    merged(name, base, experts)
    assert torch.equal(base, randn(4, 4, seed=0)) and torch.equal(experts, randn(2, 4, 4, seed=1))


@pytest.mark.parametrize("name", ALL)
def test_int8_mask_changes_no_number(name):
    if "int8_mask" in get(name).options:
        base, experts = randn(4, 4, seed=0), randn(2, 4, 4, seed=1)
        with_mask = merged(name, base, experts, int8_mask=True)
        assert torch.equal(with_mask, merged(name, base, experts))


@settings(deadline=None, max_examples=25)
@given(
    weight=st.lists(st.floats(0.1, 2), min_size=1, max_size=4),
    normalize=st.booleans(),
    lambda_=st.floats(-2, 2),
    seed=st.integers(0, 99),
)
@pytest.mark.parametrize("name", ["linear", "task_arithmetic"])
def test_coefficients_say_what_the_method_does(name, weight, normalize, lambda_, seed):
    parameters = {"weight": weight, "normalize": normalize, "lambda": lambda_}
    parameters = {key: parameters[key] for key in parameters if key in get(name).options}
    base, experts = (randn(*s, 3, 2, seed=seed).double() for s in ((), (len(weight),)))
    c = coefficients(name, parameters, len(weight))
    if c is None:
        assert name == "linear" and not normalize
        return
    want = base + torch.einsum("e,eoi->oi", c, experts - base)
    torch.testing.assert_close(merged(name, base, experts, **parameters), want)


def test_weights_that_sum_to_one_have_coefficients_and_others_have_none():
    assert coefficients("linear", {"weight": [0.25, 0.75], "normalize": False}, 2) is not None
    assert coefficients("linear", {"weight": [0.25, 0.5], "normalize": False}, 2) is None
    assert coefficients("ties", {}, 2) is None


def test_an_average_over_weights_that_sum_to_zero_is_refused():
    base, experts = randn(2, seed=0), randn(2, 2, seed=1)
    with pytest.raises(ValueError, match="sum to 0, so they cannot be normalised"):
        merged("linear", base, experts, weight=[1, -1])
    merged("linear", base, experts, weight=[1, -1], normalize=False)


def test_options_are_read_from_the_signature():
    assert get("dare_ties").random and not get("ties").random
    assert get("ties").options == {
        "weight": Option("weight", 1.0, True, float),
        "density": Option("density", 1.0, True, float),
        "normalize": Option("normalize", True, False, bool),
        "rescale": Option("rescale", False, False, bool),
        "lambda": Option("lambda", 1.0, False, float),
        "int8_mask": Option("int8_mask", False, False, bool),
    }


@pytest.mark.parametrize("name", ALL)
def test_a_method_names_its_paper_and_says_what_it_computes(name):
    method = get(name)
    assert method.name == name and method.paper.startswith("https://arxiv.org/abs/")
    assert method.fn.__doc__ is not None and "W_s" in method.fn.__doc__
    assert f"    {name} " in (shared.__doc__ or "")


def test_wrong_requests_are_told_before_anything_is_computed():
    base, experts = randn(2, seed=0), randn(2, 2, seed=1)
    with pytest.raises(RecipeError, match="no method 'tise'. Did you mean 'ties'. Known: dare_lin"):
        get("tise")
    with pytest.raises(RecipeError, match="parameters.wieght: unknown key for ties. Did you mean"):
        merge("ties", base, experts, {"wieght": 1.0})
    with pytest.raises(RecipeError, match="one number for each of the 2 experts, got 3"):
        merge("ties", base, experts, {"weight": [1.0, 2.0, 3.0]})
    with pytest.raises(RecipeError, match="parameters.lambda: one number for all experts"):
        merge("ties", base, experts, {"lambda": [1.0, 2.0]})
    with pytest.raises(ValueError, match="needs one torch.Generator for each of the 2 .* got none"):
        merge("dare_ties", base, experts)


@pytest.mark.parametrize(("density", "kept"), [(0, 0), (0.01, 1), (0.3, 3), (0.9, 9), (1, 10)])
def test_ties_keeps_the_largest_share_of_a_change(density, kept):
    base, expert = torch.zeros(10), torch.tensor([1.0, -2, 3, -4, 5, -6, 7, -8, 9, -10])
    got = merged("ties", base, expert[None], density=density)
    assert torch.equal(got, torch.where(expert.abs() > 10 - kept, expert, 0))


def test_of_entries_equally_large_ties_keeps_the_first():
    got = merged("ties", torch.zeros(6), torch.tensor([[1.0, -1, 2, 1, 1, 1]]), density=0.5)
    assert got.tolist() == [1, -1, 2, 0, 0, 0]


def test_ties_merges_only_what_agrees_with_the_elected_sign():
    experts = torch.tensor([[3.0, 1, -1, 0], [-1.0, 2, 1, 0], [-1.0, 0, 0, 0]])
    # entry 2 is a draw, which counts as positive
    assert merged("ties", torch.zeros(4), experts).tolist() == [3, 1.5, 1, 0]
    assert merged("ties", torch.zeros(4), experts, normalize=False).tolist() == [3, 3, 1, 0]


@pytest.mark.parametrize("name", ["ties", "dare_linear"])
def test_rescale_keeps_the_l1_norm_of_a_change(name):
    base, expert = randn(40, 50, seed=0), randn(40, 50, seed=1)
    delta = merged(name, base, expert[None], density=0.3, rescale=True) - base
    torch.testing.assert_close(delta.abs().sum(), (expert - base).abs().sum())
    kept = delta != 0
    factor = (delta / (expert - base))[kept]
    torch.testing.assert_close(factor, factor[:1].expand_as(factor), rtol=1e-3, atol=1e-3)
    if name == "dare_linear":  # the paper's factor, up to chance
        assert 0.9 / 0.3 < factor[0] < 1.1 / 0.3


@pytest.mark.parametrize("density", [0.05, 0.5, 0.9])
def test_dare_keeps_each_entry_with_probability_density(density):
    masks = [keep_mask(torch.Size([200, 100]), density, g) for g in generators(0, 1)]
    sigma = (density * (1 - density) / 20_000) ** 0.5
    for mask in masks:
        assert abs(mask.float().mean() - density) < 4 * sigma
        assert (mask.float().mean(dim=0) - density).abs().max() < 5 * sigma * 10
    # two experts drop independently: both keep an entry with probability density²
    both = (masks[0] & masks[1]).float().mean()
    assert abs(both - density**2) < 4 * (density**2 * (1 - density**2) / 20_000) ** 0.5


def test_dare_drops_the_same_entries_whatever_dtype_the_maths_runs_in():
    base, expert = torch.zeros(500), torch.ones(1, 500)
    single = merged("dare_linear", base, expert, density=0.4)
    double = merged("dare_linear", base.double(), expert.double(), density=0.4)
    assert torch.equal(single != 0, double != 0)
