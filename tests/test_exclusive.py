"""Exclusive knowledge: how much is kept, and how far that is from the whole."""

from __future__ import annotations

import pytest
import torch
from conftest import randn
from hypothesis import given, settings
from hypothesis import strategies as st

from twinmerge.merging.exclusive import Cut, factorize, factorize_svd, matrix_shape
from twinmerge.merging.linalg import svd

DIAGONAL = torch.diag(torch.tensor([4.0, 3.0, 2.0, 1.0, 0.0]))  # energies 16, 9, 4, 1, 0


def relative_error(delta: torch.Tensor, factors) -> float:
    rest = delta.double() - factors.b.double() @ factors.a.double()
    return float(rest.norm() / delta.double().norm())


@pytest.mark.parametrize(
    ("cut", "rank"),
    [
        (Cut(rank=1), 1),
        (Cut(rank=3), 3),
        (Cut(rank=99), 4),  # as many as there are
        (Cut(share=0.1), 1),  # at least one
        (Cut(share=0.4), 2),
        (Cut(share=0.59), 2),  # rounded down
        (Cut(share=0.6), 3),
        (Cut(share=1.0), 4),
        (Cut(energy=0.01), 1),
        (Cut(energy=16 / 30), 1),
        (Cut(energy=0.54), 2),
        (Cut(energy=25 / 30), 2),
        (Cut(energy=0.9), 3),
        (Cut(energy=1.0), 4),
        (Cut(full=True), 4),
        (Cut(none=True), 0),
    ],
)
def test_a_cut_keeps_what_it_says(cut, rank):
    factors = factorize(DIAGONAL, cut)
    assert factors.rank == rank
    assert factors.a.shape == (rank, 5) and factors.b.shape == (5, rank)
    tail = torch.tensor([4.0, 3.0, 2.0, 1.0, 0.0])[rank:].norm() / 30**0.5
    assert factors.error == pytest.approx(float(tail), abs=1e-6)
    again = factorize_svd(svd(DIAGONAL), cut, (5, 5))
    assert again.rank == rank and again.error == pytest.approx(float(tail), abs=1e-6)


@pytest.mark.parametrize(("share", "of", "rank"), [(0.29, 100, 29), (0.1, 70, 7), (0.3, 10, 3)])
def test_a_share_is_not_one_less_because_of_rounding(share, of, rank):
    assert Cut(share=share).limit(of, 2 * of) == rank
    assert Cut(share=share).limit(2 * of, of) == rank


@settings(deadline=None, max_examples=40)
@given(
    out=st.integers(1, 20),
    in_=st.integers(1, 20),
    seed=st.integers(0, 999),
    cut=st.one_of(
        st.builds(Cut, rank=st.integers(1, 20)),
        st.builds(Cut, share=st.floats(0.01, 1)),
        st.builds(Cut, energy=st.floats(0.01, 1)),
        st.just(Cut(full=True)),
        st.just(Cut(none=True)),
    ),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
def test_the_error_is_that_of_the_factors_as_stored(out, in_, seed, cut, dtype):
    delta = randn(out, in_, seed=seed)
    factors = factorize(delta, cut, dtype)
    assert factors.a.dtype == factors.b.dtype == dtype
    assert factors.a.shape[0] == factors.b.shape[1] == factors.rank <= cut.limit(out, in_)
    # Of squares: it is what the singular values that are kept leave of 1, to float32's digits.
    assert factors.error**2 == pytest.approx(relative_error(delta, factors) ** 2, abs=1e-6)
    if cut.full and dtype == torch.float32:
        assert factors.error < 1e-6
    if cut.energy is not None and dtype == torch.float32:
        assert factors.error**2 <= 1 - cut.energy + 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_factors_in_sixteen_bits_share_the_scale_evenly(dtype):
    delta = 1e-4 * randn(30, 20, seed=0)
    factors = factorize(delta, Cut(full=True), dtype)
    assert factors.error < 2**-7
    assert float(factors.a.float().norm()) == pytest.approx(
        float(factors.b.float().norm()), rel=1e-2
    )
    assert float(factors.a.abs().max()) > 1e-3  # far from float16's smallest numbers


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_delta_of_any_float_dtype_is_factored(dtype):
    factors = factorize(randn(12, 8, seed=0, dtype=dtype), Cut(full=True))
    assert factors.error < 1e-6 and factors.a.dtype == torch.float32


@pytest.mark.parametrize(
    "cut", [Cut(rank=3), Cut(share=0.5), Cut(energy=0.9), Cut(full=True), Cut(none=True)]
)
def test_no_difference_is_rank_zero_without_an_error(cut):
    for factors in (
        factorize(torch.zeros(6, 4), cut),
        factorize_svd(svd(torch.zeros(6, 4)), cut, (6, 4)),
    ):
        assert factors.rank == 0 and factors.error == 0.0
        assert factors.a.shape == (0, 4) and factors.b.shape == (6, 0)


def test_rank_is_not_spent_on_rounding():
    delta = randn(40, 2, seed=0) @ randn(2, 30, seed=1)
    for cut in (Cut(full=True), Cut(rank=16), Cut(energy=1.0), Cut(share=0.9)):
        assert factorize(delta, cut).rank == 2


def test_nan_is_refused():
    delta = randn(6, 5, seed=0)
    delta[0, 0] = float("nan")
    with pytest.raises(ValueError, match="NaN or infinity"):
        factorize(delta, Cut(rank=2))


@pytest.mark.parametrize(
    ("shape", "matrix"),
    [
        ((), None),
        ((7,), None),
        ((1, 7), None),
        ((7, 1), None),
        ((3, 7), (3, 7)),
        ((1, 5, 7), (5, 7)),
        ((1, 1, 7), None),
        ((1, 1, 5, 7), (5, 7)),
        ((6, 5, 2, 2), (6, 20)),
        ((6, 1, 1), None),
        ((0, 4), None),
    ],
)
def test_a_tensor_is_seen_as_out_times_rest(shape, matrix):
    assert matrix_shape(shape) == matrix


def test_full_and_energy_keep_what_a_tall_table_holds():
    u = torch.linalg.qr(randn(20_000, 4, seed=0)).Q
    v = torch.linalg.qr(randn(32, 4, seed=1)).Q
    delta = (u * torch.tensor([1.0, 0.01, 0.01, 0.01])) @ v.T
    for cut in (Cut(full=True), Cut(energy=1.0), Cut(rank=32)):
        assert factorize(delta, cut).error < 1e-5
