"""Truncated SVDs: right on every finite matrix, and never an unconverged one."""

from __future__ import annotations

import pytest
import torch
from conftest import randn
from hypothesis import given, settings
from hypothesis import strategies as st

from twinmerge.merging import linalg
from twinmerge.merging.linalg import SVD, ProductSVD, numerical_rank, svd, truncated_svd


def orthogonal(n: int, seed: int = 0) -> torch.Tensor:
    return torch.linalg.qr(randn(n, n, seed=seed).double()).Q.float()


def with_spectrum(out: int, in_: int, s: torch.Tensor, seed: int = 0) -> torch.Tensor:
    """A matrix with these singular values, in float64."""
    u = torch.linalg.qr(randn(out, len(s), seed=seed).double()).Q
    v = torch.linalg.qr(randn(in_, len(s), seed=seed + 1).double()).Q
    return (u * s.double()) @ v.T


def sparse_rows(out: int, in_: int, used: int, seed: int = 0) -> torch.Tensor:
    """What fine-tuning does to an embedding table: most rows were never touched."""
    table = torch.zeros(out, in_)
    rows = torch.randperm(out, generator=torch.Generator().manual_seed(seed))[:used]
    table[rows] = randn(used, in_, seed=seed)
    return table


MATRICES = {
    "random tall": randn(40, 17, seed=0),
    "random wide": randn(17, 40, seed=1),
    "square": randn(23, 23, seed=2),
    "flat spectrum": randn(160, 160, seed=3),
    "identity": torch.eye(31),
    "identity, wide": torch.eye(20, 31),
    "orthogonal": orthogonal(31),
    "pairs of equal singular values": with_spectrum(
        30, 20, torch.arange(10, 0, -1).repeat_interleave(2)
    ).float(),
    "zero": torch.zeros(9, 6),
    "zero rows": torch.cat([torch.zeros(5, 8), randn(7, 8, seed=4), torch.zeros(3, 8)]),
    "zero columns": torch.cat([torch.zeros(8, 5), randn(8, 7, seed=5)], dim=1),
    "one entry": torch.zeros(7, 9).index_put(
        (torch.tensor(3), torch.tensor(4)), torch.tensor(-2.0)
    ),
    "one row": randn(1, 12, seed=6),
    "one column": randn(12, 1, seed=7),
    "one number": torch.full((1, 1), -3.0),
    "rank 3 of 20": randn(30, 3, seed=8) @ randn(3, 20, seed=9),
    "rank 1": torch.ones(14, 11),
    "tiny": 1e-30 * randn(12, 10, seed=10),
    "huge": 1e30 * randn(12, 10, seed=11),
    "both scales": torch.diag(torch.tensor([1e20, 1.0, 1e-20])),
    "denormal": torch.full((4, 4), 1e-42),
    "rows never touched": sparse_rows(514, 768, used=384),
}


def assert_is_svd(found: SVD, matrix: torch.Tensor, rank: int | None = None) -> None:
    """Right singular values, orthonormal vectors, and a product that is what is claimed."""
    exact = torch.linalg.svdvals(matrix.double())
    rank = len(found.s) if rank is None else rank
    scale = float(exact[0]) or 1.0
    assert found.u.shape == (matrix.shape[0], rank) and found.vh.shape == (rank, matrix.shape[1])
    assert (found.s[:-1] >= found.s[1:]).all() and (found.s >= 0).all()
    torch.testing.assert_close(found.s.double() / scale, exact[:rank] / scale, rtol=0, atol=2e-6)
    norm = float(exact.norm()) or 1.0
    tail = exact[rank:].norm() / norm
    product = (found.u.double() * found.s.double()) @ found.vh.double()
    error = (matrix.double() - product).norm() / norm
    torch.testing.assert_close(error, tail, rtol=1e-4, atol=3e-6)
    kept = found.s.double() > 1e-5 * scale
    for vectors in (found.u.double().T[kept], found.vh.double()[kept]):
        gram = vectors @ vectors.T
        torch.testing.assert_close(gram, torch.eye(len(gram)).double(), rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", MATRICES)
def test_svd_is_torchs_in_float64(name):
    assert_is_svd(svd(MATRICES[name]), MATRICES[name])


@pytest.mark.parametrize("name", MATRICES)
def test_truncation_keeps_the_leading_triplets(name):
    matrix = MATRICES[name]
    for rank in {1, (1 + min(matrix.shape)) // 2, min(matrix.shape)}:
        found = truncated_svd(matrix, rank)
        # Zero rows have no triplets: fewer come than were asked for, and nothing is lost.
        assert len(found.s) == rank or found.s.numel() >= torch.linalg.matrix_rank(matrix)
        if rank + linalg.OVERSAMPLE > linalg.ITERATE_BELOW_SHARE * min(matrix.shape):
            assert_is_svd(found, matrix)


@settings(deadline=None, max_examples=40)
@given(out=st.integers(1, 24), in_=st.integers(1, 24), seed=st.integers(0, 999), data=st.data())
def test_truncation_error_is_exactly_the_discarded_singular_values(out, in_, seed, data):
    matrix = randn(out, in_, seed=seed)
    rank = data.draw(st.integers(1, min(out, in_)))
    found = truncated_svd(matrix, rank)
    error = (matrix - (found.u * found.s) @ found.vh).norm()
    tail = torch.linalg.svdvals(matrix)[rank:].norm()
    torch.testing.assert_close(error, tail, rtol=1e-4, atol=1e-4)


SPECTRA = {
    "flat": torch.ones(200),
    "random": torch.linalg.svdvals(randn(200, 200, seed=0)),
    "1/k": 1 / torch.arange(1, 201),
    "1/sqrt k": torch.arange(1, 201).rsqrt(),
    "steep": 0.8 ** torch.arange(200.0),
    "a step at the rank": torch.cat([torch.ones(8), torch.full((192,), 0.5)]),
    "a step beyond the rank": torch.cat([torch.ones(30), torch.full((170,), 1e-3)]),
    "rank 3": torch.cat([torch.ones(3), torch.zeros(197)]),
}


@pytest.mark.parametrize("shape", [(260, 200), (200, 260)])
@pytest.mark.parametrize("name", SPECTRA)
def test_subspace_iteration_comes_within_a_thousandth_of_eckart_young(name, shape):
    matrix, rank = with_spectrum(*shape, SPECTRA[name]).float(), 8
    assert rank + linalg.OVERSAMPLE <= linalg.ITERATE_BELOW_SHARE * min(shape)
    found = truncated_svd(matrix, rank)
    tail = SPECTRA[name][rank:].double().norm()
    product = (found.u.double() * found.s.double()) @ found.vh.double()
    error = (matrix.double() - product).norm()
    assert found.s.shape == (rank,)
    assert float(error) <= float(tail) * (1 + 1e-3) + 1e-5 * float(matrix.norm())
    gram = found.u.T @ found.u
    torch.testing.assert_close(gram, torch.eye(rank), rtol=0, atol=1e-4)


def test_what_does_not_converge_goes_to_the_exact_svd(monkeypatch):
    matrix, calls = randn(200, 200, seed=0), []
    monkeypatch.setattr(linalg, "MAX_ITERATIONS", 1)
    monkeypatch.setattr(linalg, "svd", lambda m: calls.append(m.shape) or svd(m))
    assert_is_svd(truncated_svd(matrix, 4), matrix)
    assert calls == [(200, 200)]


@pytest.mark.parametrize("scale", [1e-30, 1e30, 1e36])
def test_scales_far_from_one_neither_underflow_nor_overflow_in_a_truncation(scale):
    matrix = randn(200, 200, seed=0)
    tail = torch.linalg.svdvals(matrix.double())[4:].norm()
    found = truncated_svd(matrix * scale, 4)
    product = (found.u.double() * found.s.double()) @ found.vh.double() / scale
    assert tail <= (matrix.double() - product).norm() <= tail * (1 + 1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_sixteen_bits_are_computed_in_float32_and_float64_stays(dtype):
    matrix = randn(20, 12, seed=0, dtype=dtype)
    for found in (svd(matrix), truncated_svd(matrix, 5)):
        want = torch.float64 if dtype == torch.float64 else torch.float32
        assert found.u.dtype == found.s.dtype == found.vh.dtype == want
    assert_is_svd(svd(matrix), matrix)


def test_float64_is_right_to_float64():
    matrix = randn(40, 30, seed=0).double()
    found = svd(matrix)
    product = (found.u * found.s) @ found.vh
    torch.testing.assert_close(product, matrix, rtol=0, atol=1e-12)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_infinity_are_refused(bad):
    for shape, rank in [((4, 5), 2), ((200, 210), 3)]:
        matrix = randn(*shape, seed=0)
        matrix[1, 2] = bad
        with pytest.raises(ValueError, match="NaN or infinity"):
            svd(matrix)
        with pytest.raises(ValueError, match="NaN or infinity"):
            truncated_svd(matrix, rank)


@pytest.mark.parametrize("rank", [0, 5, -1])
def test_a_rank_that_the_matrix_does_not_have_is_refused(rank):
    with pytest.raises(ValueError, match=rf"rank must be in 1..4 for a \(4, 6\) .* got {rank}"):
        truncated_svd(torch.ones(4, 6), rank)


# ------------------------------------------------------------------------------ the ladder


def raises(matrix, full_matrices):
    raise torch.linalg.LinAlgError("The algorithm failed to converge")


def gives_nan(matrix, full_matrices):
    parts = LAPACK(matrix, full_matrices=full_matrices)
    return parts[0], parts[1] * float("nan"), parts[2]


LAPACK = torch.linalg.svd


@pytest.mark.parametrize("failure", [raises, gives_nan])
@pytest.mark.parametrize("name", ["random tall", "random wide", "zero rows", "identity", "tiny"])
def test_a_failing_lapack_is_tried_in_float64(name, failure, monkeypatch):
    tried = []

    def fails_in_float32(matrix, full_matrices):
        tried.append(matrix.dtype)
        call = LAPACK if matrix.dtype == torch.float64 else failure
        return call(matrix, full_matrices=full_matrices)

    monkeypatch.setattr(torch.linalg, "svd", fails_in_float32)
    found = svd(MATRICES[name])
    assert tried == [torch.float32, torch.float64]
    monkeypatch.undo()
    assert_is_svd(found, MATRICES[name])
    assert found.s.dtype == torch.float32


@pytest.mark.parametrize("failure", [raises, gives_nan])
@pytest.mark.parametrize("name", sorted(set(MATRICES) - {"both scales", "denormal"}))
def test_a_lapack_that_always_fails_leaves_the_gram_matrix(name, failure, monkeypatch):
    monkeypatch.setattr(torch.linalg, "svd", failure)
    found = svd(MATRICES[name])
    monkeypatch.undo()
    assert_is_svd(found, MATRICES[name])


@pytest.mark.parametrize("failure", [raises, gives_nan])
def test_a_truncation_survives_a_failing_lapack_too(failure, monkeypatch):
    matrix = randn(200, 210, seed=0)
    monkeypatch.setattr(torch.linalg, "svd", failure)
    found = truncated_svd(matrix, 4)
    monkeypatch.undo()
    assert_is_svd(found, matrix, 4)


# ----------------------------------------------------------------- large tables, and LoRA


def test_a_position_table_with_untouched_rows_is_cut_exactly():
    # On this very shape a bare gesdd was seen to fail.
    matrix = 1e-3 * sparse_rows(514, 768, used=384, seed=1)
    assert_is_svd(truncated_svd(matrix, 76), matrix, 76)


def test_a_word_table_with_most_rows_untouched_is_cut_exactly():
    table = sparse_rows(50_000, 768, used=300)
    rows = table.any(dim=1)
    exact = torch.linalg.svdvals(table[rows])
    found = truncated_svd(table, 100)
    assert found.u.shape == (50_000, 100) and not found.u[~rows].any()
    torch.testing.assert_close(found.s, exact[:100], rtol=1e-4, atol=1e-4)
    error = (table - (found.u * found.s) @ found.vh).norm()
    torch.testing.assert_close(error, exact[100:].norm(), rtol=1e-4, atol=0)


@settings(deadline=None, max_examples=25)
@given(
    ranks=st.lists(st.integers(1, 4), min_size=1, max_size=3),
    out=st.integers(1, 20),
    in_=st.integers(1, 20),
    seed=st.integers(0, 99),
)
def test_the_svd_of_stacked_factors_is_that_of_the_dense_product(ranks, out, in_, seed):
    b, a = randn(out, sum(ranks), seed=seed), randn(sum(ranks), in_, seed=seed + 1)
    product = ProductSVD(b, a)
    for c in (torch.ones(sum(ranks)), randn(sum(ranks), seed=seed + 2), torch.zeros(sum(ranks))):
        found = product.svd(c)
        assert_is_svd(found, (b.double() * c.double()) @ a.double())
        assert len(found.s) <= sum(ranks) and found.s.dtype == torch.float32


def test_a_product_that_cancels_has_no_rank():
    b, a = randn(20, 3, seed=0), randn(3, 16, seed=1)
    product = ProductSVD(torch.cat([b, b], dim=1), torch.cat([a, a]))
    found = product.svd(torch.tensor([1.0, 1, 1, -1, -1, -1]))
    assert float(found.s[0]) < 1e-12


@pytest.mark.parametrize("name", ["random tall", "flat spectrum", "zero rows", "identity"])
def test_the_same_matrix_gives_the_same_bits_twice(name):
    matrix = MATRICES[name]
    for call in (svd, lambda m: truncated_svd(m, 3)):
        one, other = call(matrix), call(matrix.clone())
        assert torch.equal(one.u, other.u) and torch.equal(one.s, other.s)
        assert torch.equal(one.vh, other.vh)


def test_randomness_elsewhere_neither_matters_nor_is_touched():
    matrix = randn(200, 200, seed=0)
    one = truncated_svd(matrix, 3)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    other = truncated_svd(matrix, 3)
    assert torch.equal(one.s, other.s) and torch.equal(torch.get_rng_state(), before)


def test_numerical_rank_counts_what_stands_above_rounding():
    matrix = randn(50, 5, seed=0) @ randn(5, 40, seed=1)
    assert numerical_rank(svd(matrix).s, 50, 40) == 5
    assert numerical_rank(torch.zeros(3), 5, 3) == 0
    assert numerical_rank(torch.zeros(0), 5, 3) == 0
    assert numerical_rank(torch.ones(3), 5, 3) == 3


def test_small_singular_values_of_a_tall_table_are_no_rounding():
    u = torch.linalg.qr(randn(50_000, 8, seed=0)).Q
    v = torch.linalg.qr(randn(64, 8, seed=1)).Q
    s = torch.tensor([1.0] + [0.005] * 7)
    found = svd((u * s) @ v.T)
    assert numerical_rank(found.s, 50_000, 64) == 8
