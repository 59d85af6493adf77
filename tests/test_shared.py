"""The ways to make the shared expert: one suite for all of them, then what each promises.

Where a method is no part of a check, an attribute of it or one of its parameters says why.
"""

import pytest
import torch
from conftest import randn
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from twinmerge.errors import RecipeError
from twinmerge.merging import shared
from twinmerge.merging.shared import METHODS, Option, SharedMethod, blocks, coefficients, get, merge
from twinmerge.merging.shared.blocks import largest
from twinmerge.merging.shared.dare import Drawn
from twinmerge.merging.shared.della import chances
from twinmerge.merging.shared.singular_vectors import orthonormal

ALL = sorted(METHODS)
MATRICES = [name for name in ALL if METHODS[name].fn.__module__.endswith("singular_vectors")]
"""They see a matrix as a whole, and take its directions apart."""

PLENTY = {
    "weight": [0.2, 0.5, 0.9],
    "density": [0.4, 0.6, 0.8],
    "epsilon": [0.1, 0.2, 0.15],
    "gamma": [0.01, 0.1, 0.2],
    "normalize": True,
    "rescale": True,
    "filter_wise": True,
    "select_topk": 0.6,
    "common_space_fraction": 0.5,
}
"""Of every parameter that changes what is done, a value at which it does."""


def known(method: SharedMethod, parameters: dict, experts: int = 3) -> dict:
    """Those of them that the method has, for that many experts."""
    return {
        key: value[:experts] if isinstance(value, list) else value
        for key, value in parameters.items()
        if key in method.options
    }


def several(method: SharedMethod) -> int:
    """Three experts, or as many as it takes."""
    return min(3, method.experts[1] or 3)


def generators(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def merged(name: str, base: Tensor, experts: Tensor, **parameters) -> Tensor:
    seeds = range(len(experts))
    return merge(name, base, experts, parameters, generators(*seeds) if get(name).random else None)


@pytest.mark.parametrize("more", [{}, {"normalize": False}, {"rescale": False}])
@pytest.mark.parametrize("shape", [(6, 5), (12,), (4, 3, 2, 2)])
@pytest.mark.parametrize("name", ALL)
def test_the_order_of_experts_does_not_matter(name, shape, more):
    method = get(name)
    if method.ordered or not more.keys() <= method.options.keys():
        return
    base, experts = randn(*shape, seed=0).double(), randn(3, *shape, seed=1).double()
    order = [2, 0, 1]
    one = known(method, PLENTY) | more
    other = {
        key: [value[i] for i in order] if isinstance(value, list) else value
        for key, value in one.items()
    }
    draw = generators if method.random else lambda *seeds: None
    torch.testing.assert_close(
        merge(name, base, experts, one, draw(0, 1, 2)),
        merge(name, base, experts[order], other, draw(*order)),
    )


@pytest.mark.parametrize("name", sorted(name for name in ALL if METHODS[name].ordered))
def test_where_the_order_matters_the_other_end_is_the_other_order(name):
    base, experts = randn(6, 5, seed=0), randn(2, 6, 5, seed=1)
    torch.testing.assert_close(
        merged(name, base, experts, t=0.3), merged(name, base, experts[[1, 0]], t=0.7)
    )


@pytest.mark.parametrize("shape", [(16,), (4, 4)])
@pytest.mark.parametrize("name", ALL)
def test_experts_that_agree_are_what_their_average_is(name, shape):
    if name in MATRICES and len(shape) > 1:
        return
    method = get(name)
    base, expert = randn(*shape, seed=0), randn(*shape, seed=1)
    experts = expert.expand(several(method), *shape)
    got = merged(name, base, experts, **known(method, {"normalize": True}))
    torch.testing.assert_close(got, expert)


@pytest.mark.parametrize("shape", [(16,), (4, 4), (3, 2, 2, 2)])
@pytest.mark.parametrize("name", ALL)
def test_a_tensor_that_no_expert_changed_stays_exactly_the_bases(name, shape):
    method, base = get(name), randn(*shape, seed=0)
    experts = base.expand(several(method), *shape)
    for parameters in ({}, PLENTY, {"lambda": 0.7}):
        options = known(method, parameters, len(experts))
        assert torch.equal(merged(name, base, experts, **options), base)


@pytest.mark.parametrize("name", ALL)
def test_zero_weights_give_the_base(name):
    base, experts = randn(4, 4, seed=0), randn(3, 4, 4, seed=1)
    for factor in {"weight", "lambda"} & get(name).options.keys():
        if (name, factor) != ("linear", "weight"):  # whose weights cannot all be 0
            assert torch.equal(merged(name, base, experts, **{factor: 0}), base)


@pytest.mark.parametrize("name", sorted(n for n in ALL if "lambda" in METHODS[n].options))
def test_lambda_is_a_factor_on_the_change(name):
    base, experts = randn(6, 5, seed=0).double(), randn(3, 6, 5, seed=1).double()
    options = known(get(name), PLENTY)
    once = merged(name, base, experts, **options) - base
    twice = merged(name, base, experts, **options, **{"lambda": 2.5}) - base
    torch.testing.assert_close(twice, 2.5 * once)


@pytest.mark.parametrize("name", ALL)
def test_the_unit_of_the_weights_does_not_matter(name):
    """Powers of 2: every rounding is the same. Limits such as mergekit's 1e-6 are far below."""
    method = get(name)
    base, experts = randn(6, 5, seed=0), randn(several(method), 6, 5, seed=1)
    options = known(method, PLENTY, len(experts))
    once = merged(name, base, experts, **options)
    torch.testing.assert_close(merged(name, 64 * base, 64 * experts, **options), 64 * once)


@pytest.mark.parametrize("shape", [(), (1,), (7,), (3, 4), (2, 3, 2), (0, 4), (4, 0), (1, 5)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ALL)
def test_shape_and_dtype_are_kept(name, dtype, shape):
    method = get(name)
    least, most = method.experts
    for count in range(least, (most or 3) + 1):
        base, experts = randn(count + 1, *shape, seed=0, dtype=dtype).split([1, count])
        for parameters in ({}, PLENTY):
            options = known(method, parameters, count)
            got = merged(name, base[0], experts, **options)
            assert got.shape == shape and got.dtype == dtype
            assert got.isfinite().all()


@pytest.mark.parametrize("name", ALL)
def test_views_merge_as_their_copies_do(name):
    method = get(name)
    base, experts = randn(5, 6, seed=0).T, randn(several(method), 5, 6, seed=1).transpose(1, 2)
    options = known(method, PLENTY, len(experts))
    got = merged(name, base, experts, **options)
    want = merged(name, base.contiguous(), experts.contiguous(), **options)
    assert torch.equal(got, want)


@pytest.mark.parametrize("name", ALL)
def test_the_number_of_threads_changes_no_bit(name):
    method = get(name)
    shape = (60, 61) if name in MATRICES else (520, 521)  # more than one block
    base, experts = randn(*shape, seed=0), randn(several(method), *shape, seed=1)
    options = known(method, PLENTY, len(experts))
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 4):
            torch.set_num_threads(threads)
            results.append(merged(name, base, experts, **options))
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@pytest.mark.parametrize("size", [16, 48, 2**20])
@pytest.mark.parametrize("name", ALL)
def test_the_size_of_a_block_changes_nothing(name, size, monkeypatch):
    method = get(name)
    base, experts = randn(10, 16, seed=0), randn(several(method), 10, 16, seed=1)
    options = known(method, PLENTY, len(experts))
    want = merged(name, base, experts, **options)
    monkeypatch.setattr(blocks, "BLOCK", size)
    torch.testing.assert_close(merged(name, base, experts, **options), want)


class LargeTensors(TorchDispatchMode):
    """Counts how often a tensor of its own of at least so many bytes is made."""

    def __init__(self, least: int) -> None:
        super().__init__()
        self.least, self.made = least, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        given = {storage(x) for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        for x in tree_leaves(result):
            if isinstance(x, Tensor) and storage(x) not in given:
                self.made += x.untyped_storage().nbytes() >= self.least
        return result


def storage(x: Tensor) -> int:
    return x.untyped_storage().data_ptr()


@pytest.mark.parametrize("name", sorted(set(ALL) - set(MATRICES)))
def test_nothing_of_the_size_of_a_tensor_is_made_but_the_result(name, monkeypatch):
    monkeypatch.setattr(blocks, "BLOCK", 2**14)
    method = get(name)
    base, experts = randn(512, 512, seed=0), randn(several(method), 512, 512, seed=1)
    options = known(method, PLENTY, len(experts))
    for more in ({}, {"normalize": False} if "normalize" in options else {}):
        with LargeTensors(base.nbytes) as large:
            merged(name, base, experts, **options | more)
        assert large.made == 1


@pytest.mark.parametrize("name", sorted(name for name in ALL if METHODS[name].blockwise))
def test_a_blockwise_method_may_be_run_on_pieces(name):
    base, experts = randn(40, seed=0), randn(3, 40, seed=1)
    options = known(get(name), PLENTY)
    pieces = [
        merged(name, base[cut], experts[:, cut], **options)
        for cut in (slice(0, 7), slice(7, 39), slice(39, 40))
    ]
    assert torch.equal(torch.cat(pieces), merged(name, base, experts, **options))


@pytest.mark.parametrize("name", ALL)
def test_the_inputs_are_left_as_they_are(name):
    method = get(name)
    base, experts = randn(4, 4, seed=0), randn(several(method), 4, 4, seed=1)
    before = base.clone(), experts.clone()
    result = merged(name, base, experts, **known(method, PLENTY, len(experts)))
    assert torch.equal(base, before[0]) and torch.equal(experts, before[1])
    result.fill_(0)  # and the result is a tensor of its own
    assert torch.equal(base, before[0]) and torch.equal(experts, before[1])


@pytest.mark.parametrize("name", ALL)
def test_int8_mask_changes_no_number(name):
    if "int8_mask" in get(name).options:
        base, experts = randn(4, 4, seed=0), randn(2, 4, 4, seed=1)
        options = known(get(name), PLENTY, 2)
        with_mask = merged(name, base, experts, **options, int8_mask=True)
        assert torch.equal(with_mask, merged(name, base, experts, **options))


@pytest.mark.parametrize("name", ALL)
def test_too_many_experts_and_too_few_are_refused(name):
    least, most = get(name).experts
    base = randn(2, seed=0)
    for count in (least - 1, most + 1 if most else 0):
        if count > 0:
            with pytest.raises(RecipeError, match=f"merge_method: {name} takes {least} .* {count}"):
                merged(name, base, randn(count, 2, seed=1))


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
    assert method.name == name
    assert method.paper.startswith(("https://arxiv.org/abs/", "https://doi.org/"))
    assert method.fn.__doc__ is not None and "W_s" in method.fn.__doc__
    assert f"    {name} " in (shared.__doc__ or "")


def test_wrong_requests_are_told_before_anything_is_computed():
    base, experts = randn(2, seed=0), randn(2, 2, seed=1)
    with pytest.raises(RecipeError, match="no method 'tise'. Did you mean 'ties'. Known: breadcr"):
        get("tise")
    with pytest.raises(RecipeError, match="parameters.wieght: unknown key for ties. Did you mean"):
        merge("ties", base, experts, {"wieght": 1.0})
    with pytest.raises(RecipeError, match="one number for each of the 2 experts, got 3"):
        merge("ties", base, experts, {"weight": [1.0, 2.0, 3.0]})
    with pytest.raises(RecipeError, match="parameters.lambda: one number for all experts"):
        merge("ties", base, experts, {"lambda": [1.0, 2.0]})
    with pytest.raises(RecipeError, match="density 0.9 and epsilon 0.15. Give a smaller epsilon"):
        merged("della", base, experts, density=0.9)
    with pytest.raises(
        RecipeError, match="common_space_fraction: .* between 0 and 1, got 1.5. 0.8"
    ):
        merged("iso_cts", base, experts, common_space_fraction=1.5)
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
    one, other = (Drawn(g, lambda block: density) for g in generators(0, 1))
    masks = [drawn(torch.ones(20_000), 0).view(200, 100) for drawn in (one, other)]
    sigma = (density * (1 - density) / 20_000) ** 0.5
    for mask in masks:
        assert abs(mask.float().mean() - density) < 4 * sigma
        assert (mask.float().mean(dim=0) - density).abs().max() < 5 * sigma * 10
    # two experts drop independently: both keep an entry with probability density²
    both = (masks[0] & masks[1]).float().mean()
    assert abs(both - density**2) < 4 * (density**2 * (1 - density**2) / 20_000) ** 0.5
    # the same in two blocks, and the second time round
    again = torch.cat([one(torch.ones(7_001), 0), one(torch.ones(12_999), 7_001)])
    assert torch.equal(again, masks[0].flatten())


@pytest.mark.parametrize("name", ["dare_linear", "della_linear"])
def test_the_same_entries_are_dropped_whatever_dtype_the_maths_runs_in(name):
    base, expert = torch.zeros(500), torch.arange(1.0, 501)[None]
    single = merged(name, base, expert, density=0.4)
    double = merged(name, base.double(), expert.double(), density=0.4)
    assert torch.equal(single != 0, double != 0)


@settings(deadline=None, max_examples=60)
@given(
    values=st.lists(st.sampled_from([0.0, 1e-30, 1.0, 1 + 2**-22, 2.0, 3e30]), min_size=1),
    share=st.floats(0, 1),
    block=st.integers(1, 9),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_the_largest_are_those_that_a_stable_sort_puts_first(values, share, block, dtype):
    x = torch.tensor(values, dtype=dtype)
    x[::2] *= -1
    count = int(share * len(x))
    found = largest(x.split(block), len(x), count)
    starts = range(0, len(x), block)
    masks = [found(part, start) for start, part in zip(starts, x.split(block), strict=True)]
    want = torch.zeros(len(x), dtype=torch.bool)
    want[x.abs().argsort(descending=True, stable=True)[:count]] = True
    assert torch.equal(torch.cat(masks), want)


# -------------------------------------------------------------- breadcrumbs, DELLA, slerp, SCE


@pytest.mark.parametrize(
    ("density", "gamma", "kept"),
    [(0.3, 0.1, [7, 8, 9]), (0.3, 0.2, [6, 7, 8]), (0.9, 0.4, range(1, 10)), (0, 0.1, [])],
)
def test_breadcrumbs_keeps_the_largest_but_for_the_very_largest(density, gamma, kept):
    expert = torch.tensor([1.0, -2, 3, -4, 5, -6, 7, -8, 9, -10])
    got = merged("breadcrumbs", torch.zeros(10), expert[None], density=density, gamma=gamma)
    assert [abs(x) for x in got.tolist() if x] == list(kept)


def test_a_density_of_one_drops_no_outliers_either():
    base, expert = randn(10, seed=0), randn(1, 10, seed=1)
    got = merged("breadcrumbs", base, expert, density=1, gamma=0.3)
    torch.testing.assert_close(got, expert[0])


def test_della_keeps_large_entries_rather_than_small_ones():
    block = torch.tensor([3.0, -1, 2, 0, 5, 0, -0.5, 1])  # two rows of four
    p = chances(block, row=4, rest=1, density=0.5, epsilon=0.3)
    want = [0.8, 0.4, 0.6, 0.2, 0.8, 0.2, 0.4, 0.6]
    torch.testing.assert_close(p, torch.tensor(want))
    # entries of one row may stand apart, as a kernel's input channels do
    apart = chances(block.view(2, 4).T.flatten(), row=4, rest=2, density=0.5, epsilon=0.3)
    torch.testing.assert_close(apart, torch.tensor(want).view(2, 4).T.flatten())
    assert chances(block, row=1, rest=1, density=0.3, epsilon=0.1).allclose(torch.tensor(0.3))


def test_slerp_between_unit_vectors_stays_on_the_circle():
    base, expert = torch.tensor([1.0, 0.0]), torch.tensor([[0.0, 1.0]])
    for t in (0.0, 0.25, 0.5, 1.0):
        angle = torch.tensor(t * torch.pi / 2)
        want = torch.stack([angle.cos(), angle.sin()])
        torch.testing.assert_close(merged("slerp", base, expert, t=t), want)


def test_slerp_of_two_experts_leaves_the_base_out():
    base, experts = randn(4, 4, seed=0), randn(2, 4, 4, seed=1)
    for t, end in ((0, experts[0]), (1, experts[1])):
        torch.testing.assert_close(merged("slerp", base, experts, t=t), end)
    elsewhere = merged("slerp", randn(4, 4, seed=2), experts)
    assert torch.equal(merged("slerp", base, experts), elsewhere)


@pytest.mark.parametrize("filter_wise", [False, True])
def test_model_stock_goes_as_far_as_experts_agree(filter_wise):
    base, delta = randn(4, 6, seed=0), randn(4, 6, seed=1)
    agree = merged("model_stock", base, base + torch.stack([delta] * 3), filter_wise=filter_wise)
    torch.testing.assert_close(agree, base + delta)
    opposed = merged("model_stock", base, base + torch.stack([delta, -delta]))
    assert torch.equal(opposed, base)
    right = torch.zeros(2, 4, 6)  # at right angles, nothing of either is trusted
    right[0, :, 0] = right[1, :, 1] = 1
    torch.testing.assert_close(merged("model_stock", base, base + right), base)


def test_sce_keeps_what_varies_and_weighs_by_energy():
    experts = torch.tensor([[3.0, 1, 0, 2], [1, 1, 0, -2]])
    # variances 1, 0, 0, 4: of the two that vary the half is the last, where the signs draw
    got = merged("sce", torch.zeros(4), experts, select_topk=0.5)
    assert got.tolist() == [0, 0, 0, 2]
    energy = torch.tensor([14.0, 6.0])  # of 3, 1, 0, 2 and 1, 1, 0, -2
    first = (energy / energy.sum() * experts[:, 0]).sum()
    torch.testing.assert_close(
        merged("sce", torch.zeros(4), experts), torch.stack([first, *torch.tensor([1.0, 0, 2])])
    )


# ------------------------------------------------------------------------- singular vectors


def matrices(*bounds: tuple[int, int], size: int = 12) -> Tensor:
    """Task matrices that use the given directions, of a common orthonormal basis each side."""
    left, right = (torch.linalg.qr(randn(size, size, seed=seed).double()).Q for seed in (1, 2))
    return torch.stack([left[:, a:b] * range_(a, b) @ right[:, a:b].T for a, b in bounds])


def range_(a: int, b: int) -> Tensor:
    """Singular values that tell the directions apart."""
    return torch.arange(a + 1.0, b + 1.0, dtype=torch.float64)


@pytest.mark.parametrize("shape", [(6, 5), (5, 7), (4, 2, 3, 3)])
def test_tsv_m_gives_a_single_expert_back(shape):
    base, expert = randn(*shape, seed=0), randn(1, *shape, seed=1)
    torch.testing.assert_close(merged("tsv_m", base, expert), expert[0], rtol=1e-4, atol=1e-5)


def test_orthogonal_task_matrices_merge_without_interference():
    base = randn(12, 12, seed=0).double()
    deltas = matrices((0, 4), (4, 8), (8, 12))
    got = merged("tsv_m", base, base + deltas)
    torch.testing.assert_close(got, base + deltas.sum(dim=0))


def test_tsv_m_keeps_an_even_share_of_directions_and_counts_shared_ones_once():
    base = torch.zeros(12, 12, dtype=torch.float64)
    deltas = matrices((0, 12))
    # two alike: the six leading directions, once
    want = torch.linalg.svd(deltas[0])
    want = want.U[:, :6] * want.S[:6] @ want.Vh[:6]
    torch.testing.assert_close(merged("tsv_m", base, deltas.expand(2, 12, 12)), want)


@pytest.mark.parametrize("name", ["iso_c", "iso_cts"])
@pytest.mark.parametrize("shape", [(8, 8), (6, 9), (9, 2, 3)])
def test_iso_makes_the_spectrum_flat(name, shape):
    base, experts = randn(*shape, seed=0).double(), randn(3, *shape, seed=1).double()
    got = (merged(name, base, experts) - base).reshape(shape[0], -1)
    s = torch.linalg.svdvals(got)
    torch.testing.assert_close(s, s[:1].expand_as(s))
    if name == "iso_c":
        whole = torch.linalg.svdvals((experts - base).sum(dim=0).reshape(shape[0], -1))
        torch.testing.assert_close(s[0], whole.mean())


def test_iso_c_leaves_the_rows_that_no_expert_trained_exactly_the_bases():
    base, experts = randn(9, 6, seed=0), randn(3, 9, 6, seed=1)
    experts[:, 4:] = base[4:]
    for name in MATRICES:
        got = merged(name, base, experts)
        assert torch.equal(got[4:], base[4:]) and not torch.equal(got[:4], base[:4])


@pytest.mark.parametrize("count", [1, 3])
def test_iso_cts_is_iso_c_where_all_is_common(count):
    base, experts = randn(9, 6, seed=0).double(), randn(count, 9, 6, seed=1).double()
    want = merged("iso_c", base, experts)
    torch.testing.assert_close(merged("iso_cts", base, experts, common_space_fraction=1), want)
    if count == 1:  # then the rest of the expert's own is what was not common
        for fraction in (0.0, 0.3, 0.8):
            got = merged("iso_cts", base, experts, common_space_fraction=fraction)
            torch.testing.assert_close(got, want)


def test_iso_cts_gives_every_task_directions_of_its_own():
    """A task that the sum drowns out: iso_cts keeps its directions where the sum's first do not."""
    loud, quiet = matrices((6, 12))[0], matrices((0, 2))[0]
    base = torch.zeros(12, 12, dtype=torch.float64)
    got = merged("iso_cts", base, torch.stack([loud, quiet]), common_space_fraction=0.5)
    u, _, vh = torch.linalg.svd(quiet)
    kept = (u[:, :2].T @ got @ vh[:2].T).diagonal()
    torch.testing.assert_close(kept, torch.linalg.matrix_norm(got, 2).expand(2))


def test_a_task_of_low_rank_brings_no_directions_of_rounding():
    base = randn(24, 20, seed=0)
    factors = zip(randn(3, 24, 2, seed=1), randn(3, 2, 20, seed=2), strict=True)
    experts = torch.stack([base + b @ a for b, a in factors])
    for name in MATRICES:
        delta = merged(name, base, experts).double() - base
        rank = int((torch.linalg.svdvals(delta) > 1e-4 * torch.linalg.matrix_norm(delta, 2)).sum())
        assert rank == 6, name


@pytest.mark.parametrize("shape", [(96, 96), (192, 96), (96, 2, 60)])
@pytest.mark.parametrize("name", MATRICES)
def test_the_dtype_of_the_maths_does_not_matter(name, shape):
    """Where T divides the short side, the directions of all tasks fill the space."""
    base, deltas = randn(*shape, seed=0), randn(8, *shape, seed=1)
    experts = base + 0.02 * deltas
    double = merged(name, base.double(), experts.double()) - base
    single = merged(name, base, experts).double() - base
    # what is left is the rounding of the result
    assert (single - double).norm() < 1e-6 * base.norm()


@pytest.mark.parametrize("angle", [1e-3, 1e-4, 3e-5])
def test_directions_that_come_close_are_told_apart_in_either_dtype(angle):
    """As the closest of many tasks' do: 8 fine-tunes of a 384 × 384 matrix come to 1e-4."""
    one, other = matrices((0, 48), (48, 96), size=96)
    (u, *_), (w, s, vh) = (torch.linalg.svd(x, full_matrices=False) for x in (one, other))
    w[:, 0] = torch.nn.functional.normalize(u[:, 0] + angle * w[:, 0], dim=0)
    experts = torch.stack([one, w * s @ vh])
    base = torch.zeros(96, 96)
    double = merged("tsv_m", base.double(), experts)
    assert torch.linalg.matrix_rank(double, rtol=1e-5) == 96
    single = merged("tsv_m", base, experts.float()).double()
    assert (single - double).norm() < 1e-2 * double.norm()


def low_rank(count: int, drift: float, shared: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """A base, its task matrices of rank 4 in float64, and the experts with float32's rounding."""
    base, b = randn(96, 80, seed=0), randn(count, 96, 4, seed=1).double()
    a = randn(1 if shared else count, 4, 80, seed=2).double()
    deltas = b @ a * drift / 2
    return base, deltas, (base + deltas).float()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("count", [2, 5])
@pytest.mark.parametrize("drift", [0.1, 0.01, 0.001])
@pytest.mark.parametrize("name", MATRICES)
def test_the_rounding_of_float32_weights_counts_as_no_direction(name, drift, count, dtype):
    base, deltas, experts = low_rank(count, drift)
    got = merged(name, base.to(dtype), experts.to(dtype)).double() - base
    want = merged(name, torch.zeros_like(deltas[0]), deltas)
    assert (got - want).norm() < 1e-6 * base.norm() + 1e-4 * want.norm()


@pytest.mark.parametrize("drift", [0.1, 0.001])
def test_directions_that_tasks_share_up_to_rounding_count_once(drift):
    base, deltas, experts = low_rank(2, drift, shared=True)
    got = merged("tsv_m", base, experts).double() - base
    want = merged("tsv_m", torch.zeros_like(deltas[0]), deltas)
    assert (got - want).norm() < 1e-6 * base.norm() + 1e-3 * want.norm()


@pytest.mark.parametrize(
    ("count", "fraction", "own"),
    [(2, 0.5, 3), (5, 0.5, 1), (8, 0.6, 1), (8, 0.7, 0), (8, 0, 1), (7, 0, 1), (12, 0.2, 1)],
)
def test_iso_cts_shares_directions_out_to_the_nearest_but_no_more_than_there_are(
    count, fraction, own
):
    """Of 12: 6 / 2, 6 / 5, 5 / 8, 4 / 8 (to even), 12 / 8 and 12 / 7 (2 are too many), 10 / 12."""
    deltas = randn(count, 12, 12, seed=1).double()
    u, s, vh = torch.linalg.svd(deltas.sum(dim=0))
    common = u[:, : 12 - count * own]
    tasks = torch.linalg.svd(deltas - common @ common.T @ deltas)
    left = torch.cat([common, *tasks.U[:, :, :own]], dim=1)
    right = torch.cat([vh[: common.shape[1]], *tasks.Vh[:, :own]])
    mean = torch.cat([s[: common.shape[1]], *tasks.S[:, :own]]).mean()
    (p, _, q), (v, _, w) = torch.linalg.svd(left), torch.linalg.svd(right)
    got = merged("iso_cts", torch.zeros_like(u), deltas, common_space_fraction=fraction)
    torch.testing.assert_close(got, mean * p @ q @ v @ w)


@pytest.mark.parametrize("shape", [(8, 3), (3, 8), (5, 5)])
def test_the_nearest_orthonormal_matrix_is_orthonormal_or_a_partial_isometry(shape):
    x = randn(*shape, seed=0).double()
    q = orthonormal(x)
    gram = q.T @ q if shape[0] >= shape[1] else q @ q.T
    torch.testing.assert_close(gram, torch.eye(min(shape), dtype=torch.float64))
    twice = orthonormal(torch.cat([x[:, :1], x[:, :1]], dim=1))
    torch.testing.assert_close(twice @ torch.ones(2).double(), x[:, 0] / x[:, 0].norm() * 2**0.5)
