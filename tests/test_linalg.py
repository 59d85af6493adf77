"""Truncated SVDs: right on every finite matrix, and never an unconverged one."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from conftest import randn
from hypothesis import given, settings
from hypothesis import strategies as st

from twinmerge.merging import krylov, linalg
from twinmerge.merging.linalg import (
    SVD,
    ProductSVD,
    numerical_rank,
    spectrum,
    svd,
    truncated_svd,
)


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
        if rank > linalg.ITERATE_BELOW_SHARE * min(matrix.shape):
            assert_is_svd(found, matrix)
            assert found.missed == 0


@settings(deadline=None, max_examples=40)
@given(out=st.integers(1, 24), in_=st.integers(1, 24), seed=st.integers(0, 999), data=st.data())
def test_truncation_error_is_exactly_the_discarded_singular_values(out, in_, seed, data):
    matrix = randn(out, in_, seed=seed)
    rank = data.draw(st.integers(1, min(out, in_)))
    found = truncated_svd(matrix, rank)
    error = (matrix - (found.u * found.s) @ found.vh).norm()
    tail = torch.linalg.svdvals(matrix)[rank:].norm()
    torch.testing.assert_close(error, tail, rtol=1e-4, atol=1e-4)


# ------------------------------------------------------------------------------ iteration

INDEX = torch.arange(1.0, 201)
SPECTRA = {
    "flat": torch.ones(200),
    "random": torch.linalg.svdvals(randn(200, 200, seed=0)),
    "1/k": 1 / INDEX,
    "1/sqrt k": INDEX.rsqrt(),
    "k^-1.5": INDEX**-1.5,
    "steep": 0.8**INDEX,
    "a wide range": 10 ** (-8 * INDEX / 200),
    "a step at the rank": torch.cat([torch.ones(8), torch.full((192,), 0.5)]),
    "a cliff at the rank": torch.cat([torch.ones(8), torch.full((192,), 1e-4)]),
    "a small step at the rank": torch.cat([torch.ones(8), torch.full((192,), 0.99)]),
    "a step beyond the rank": torch.cat([torch.ones(30), torch.full((170,), 1e-3)]),
    "triples": (1 / torch.arange(1.0, 68)).repeat_interleave(3)[:200],
    "forty equal, then less": torch.cat([torch.ones(40), torch.full((160,), 0.7)]),
    "low rank and noise": torch.linalg.svdvals(
        0.3 * randn(200, 12, seed=1) @ randn(12, 200, seed=2) + randn(200, 200, seed=3)
    ),
    "rank 3": torch.cat([torch.ones(3), torch.zeros(197)]),
}


def assert_is_honest(found: SVD, matrix: torch.Tensor, rank: int) -> float:
    """The optimum lies within [found, found + missed]; returns the excess error, relative."""
    energy = torch.linalg.svdvals(matrix.double()).square()
    optimum, captured = float(energy[:rank].sum()), float(found.s.double().square().sum())
    rounding = 1e-6 * optimum
    assert captured <= optimum + rounding
    assert optimum <= captured + found.missed + rounding
    product = (found.u.double() * found.s.double()) @ found.vh.double()
    error = float((matrix.double() - product).norm())
    tail = float(energy[rank:].sum()) ** 0.5
    norm = float(energy.sum()) ** 0.5
    assert error <= tail * (1 + 2e-3) + 1e-5 * norm
    # What is reported is no empty promise either.
    assert found.missed <= 5e-3 * tail**2 + 1e-6 * norm**2
    for vectors in (found.u.T, found.vh):
        torch.testing.assert_close(vectors @ vectors.T, torch.eye(rank), rtol=0, atol=1e-4)
    return error / max(tail, 1e-5 * norm) - 1


@pytest.mark.parametrize("shape", [(260, 200), (200, 260)])
@pytest.mark.parametrize("name", SPECTRA)
def test_iteration_is_near_the_optimum_and_says_how_near(name, shape):
    matrix = with_spectrum(*shape, SPECTRA[name]).float()
    for rank in (1, 8, 20):
        found = truncated_svd(matrix, rank)
        assert found.s.shape == (rank,)
        assert_is_honest(found, matrix, rank)
        shorter = found.cut(1)
        assert float(shorter.s) ** 2 + shorter.missed >= float(SPECTRA[name][0]) ** 2 * (1 - 1e-6)


@pytest.mark.parametrize("name", ["random", "1/sqrt k", "k^-1.5", "low rank and noise"])
def test_ordinary_spectra_need_no_exact_svd(name, monkeypatch):
    matrix = with_spectrum(260, 200, SPECTRA[name]).float()
    monkeypatch.setattr(linalg, "_dense", None)
    for rank in (1, 8):
        assert truncated_svd(matrix, rank).missed > 0


def hidden_from_the_start(
    s: torch.Tensor, top: float, component: float, width: int
) -> torch.Tensor:
    """(260, 200) with singular values `top` and `s`; `top` is next to orthogonal to the start."""
    start = krylov._start(200, width + krylov.COLUMNS)[:, :width].double()
    inside = torch.linalg.qr(start).Q
    v = randn(200, 1, seed=5).double()
    v = v - inside @ (inside.T @ v)
    v = v / v.norm() + component * inside[:, :1]
    right = torch.linalg.qr(torch.cat([v, randn(200, 199, seed=6).double()], dim=1)).Q
    left = torch.linalg.qr(randn(260, 200, seed=7).double()).Q
    return ((left * torch.cat([torch.tensor([top]), s]).double()) @ right.T).float()


@pytest.mark.parametrize("component", [1e-3, 1e-6, 0.0])
@pytest.mark.parametrize(
    ("name", "top"),
    [
        ("1/k", 1.1),
        ("1/k", 3.0),
        ("1/sqrt k", 1.1),
        ("1/sqrt k", 3.0),
        ("steep", 1.0),
        ("steep", 10.0),
        ("random", 60.0),
        ("random", 300.0),
        ("a step at the rank", 1.5),
    ],
)
def test_a_singular_vector_that_hides_from_the_start_is_found(name, top, component):
    matrix = hidden_from_the_start(SPECTRA[name][:199], top, component, width=16)
    found = truncated_svd(matrix, 8)
    assert float(found.s[0]) == pytest.approx(float(torch.linalg.svdvals(matrix)[0]), rel=2e-2)
    assert_is_honest(found, matrix, 8)


def test_workers_side_by_side_find_the_same_bits():
    matrix = with_spectrum(260, 200, SPECTRA["1/sqrt k"]).float()
    found = truncated_svd(matrix, 8)

    def work(number: int) -> SVD:
        torch.set_num_threads(1)  # as the workers of a build do
        return truncated_svd(matrix.clone(), 8)

    with ThreadPoolExecutor(3) as workers:
        for other in workers.map(work, range(6)):
            assert torch.equal(found.u, other.u) and torch.equal(found.vh, other.vh)
            assert torch.equal(found.s, other.s) and found.missed == other.missed


def test_float64_is_iterated_in_float64():
    matrix = with_spectrum(260, 200, SPECTRA["steep"])
    found = truncated_svd(matrix, 8)
    assert found.missed > 0 and found.u.dtype == torch.float64
    torch.testing.assert_close(found.s, SPECTRA["steep"][:8].double(), rtol=1e-9, atol=0)


def test_rows_of_zeros_are_set_aside_and_stay_zero():
    matrix = sparse_rows(900, 200, used=300)
    found = truncated_svd(matrix, 8)
    rows = matrix.any(dim=1)
    assert found.u.shape == (900, 8) and not found.u[~rows].any() and found.missed > 0
    assert_is_honest(found, matrix, 8)


def exact_calls(monkeypatch) -> list[torch.Size]:
    calls, dense = [], linalg._dense
    monkeypatch.setattr(linalg, "_dense", lambda m, r: calls.append(m.shape) or dense(m, r))
    return calls


def test_what_does_not_converge_goes_to_the_exact_svd(monkeypatch):
    matrix, calls = randn(200, 200, seed=0), exact_calls(monkeypatch)
    monkeypatch.setattr(krylov, "LARGEST_SPACE", 0.3)
    found = truncated_svd(matrix, 4)
    assert_is_svd(found, matrix)
    assert calls == [(200, 200)] and found.missed == 0


@pytest.mark.parametrize("name", ["cholesky_ex", "eigh"])
def test_a_failing_small_problem_is_no_end(name, monkeypatch):
    matrix = randn(200, 210, seed=0)

    def fails(*args, **kwargs):
        raise torch.linalg.LinAlgError("did not converge")

    monkeypatch.setattr(torch.linalg, name, fails)
    found = truncated_svd(matrix, 4)
    monkeypatch.undo()
    assert_is_svd(found, matrix)


@pytest.mark.parametrize("scale", [1e-30, 1e30, 1e36])
def test_scales_far_from_one_neither_underflow_nor_overflow_in_a_truncation(scale):
    matrix = randn(200, 200, seed=0)
    tail = torch.linalg.svdvals(matrix.double())[4:].norm()
    found = truncated_svd(matrix * scale, 4)
    product = (found.u.double() * found.s.double()) @ found.vh.double() / scale
    assert tail <= (matrix.double() - product).norm() <= tail * (1 + 2e-3)
    assert 0 < found.missed / scale**2 <= 5e-3 * float(tail) ** 2


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
    for rank in (4, 60):
        found = truncated_svd(matrix, rank)
        with monkeypatch.context() as context:
            context.setattr(torch.linalg, "svd", LAPACK)
            assert_is_honest(found, matrix, rank)


@pytest.mark.parametrize("shape", [(300, 100), (100, 300), (100, 100)])
def test_a_failing_gram_matrix_leaves_lapack(shape, monkeypatch):
    matrix = randn(*shape, seed=0)

    def fails(matrix):
        raise torch.linalg.LinAlgError("did not converge")

    for rank in (30, 100):
        with monkeypatch.context() as context:
            context.setattr(torch.linalg, "eigh", fails)
            found = truncated_svd(matrix, rank)
        assert_is_svd(found, matrix)


def test_when_nothing_converges_that_is_said(monkeypatch):
    monkeypatch.setattr(torch.linalg, "svd", gives_nan)
    monkeypatch.setattr(linalg, "_gram", lambda m, r: gives_nan(m, False))
    with pytest.raises(torch.linalg.LinAlgError, match=r"no driver converged on a \(20, 30\)"):
        svd(randn(20, 30, seed=0))


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


@pytest.mark.parametrize("name", MATRICES)
def test_the_spectrum_is_all_singular_values(name):
    matrix = MATRICES[name]
    found, exact = spectrum(matrix), torch.linalg.svdvals(matrix.double())
    assert found.shape == (min(matrix.shape),) and found.dtype == torch.float32
    assert (found[:-1] >= found[1:]).all() and (found >= 0).all()
    scale = float(exact[0]) or 1.0
    torch.testing.assert_close(found.double() / scale, exact / scale, rtol=0, atol=1e-6)


def test_the_spectrum_of_float64_is_right_to_float64_and_failures_are_survived(monkeypatch):
    exact = 10.0 ** -torch.arange(20.0, dtype=torch.float64)
    matrix = with_spectrum(30, 20, exact)
    assert spectrum(matrix).dtype == torch.float64
    torch.testing.assert_close(spectrum(matrix), exact, rtol=0, atol=1e-14)

    def fails(matrix):
        raise torch.linalg.LinAlgError("did not converge")

    monkeypatch.setattr(torch.linalg, "eigvalsh", fails)
    rows = MATRICES["rows never touched"][:, :400]
    exact = torch.linalg.svdvals(rows)
    torch.testing.assert_close(spectrum(rows), exact, rtol=0, atol=1e-4)
    with pytest.raises(ValueError, match="NaN or infinity"):
        spectrum(torch.full((3, 3), float("nan")))


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
