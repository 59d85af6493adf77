"""Quantised rows and sparse tensors come back as they went in, to the stated error."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from conftest import randn
from hypothesis import given, settings
from hypothesis import strategies as st

from twinmerge.artifact.codec import (
    GROUP,
    LARGEST,
    Quantised,
    Sparse,
    decode_quantised,
    decode_sparse,
    dequantise,
    dequantise_columns,
    encode_sparse,
    quantise,
    row_bytes,
    sparse_bytes,
)
from twinmerge.errors import CorruptArtifact

quick = settings(deadline=None, max_examples=60)
BITS = st.sampled_from([8, 4])
WIDTHS = st.one_of(st.integers(0, 9), st.sampled_from([63, 64, 65, 127, 128, 129, 200]))


def rows(rank: int, n: int, seed: int, scale: float = 1.0) -> torch.Tensor:
    """Rows whose entries differ by orders of magnitude; some groups are zero."""
    spread = torch.exp(2 * randn(rank, n, seed=seed + 1))
    x = scale * randn(rank, n, seed=seed) * spread
    x[:, : GROUP * (seed % 2)] = 0
    return x


def each_scale(x: Quantised) -> torch.Tensor:
    return x.scale.double().repeat_interleave(GROUP, dim=1)[:, : x.n]


def by_hand(x: Quantised) -> torch.Tensor:
    """The format as its page has it, entry by entry."""
    q, scale = x.q.tolist(), x.scale.double().tolist()

    def entry(r: int, i: int) -> float:
        value = q[r][i] if x.bits == 8 else ((q[r][i // 2] >> 4 * (i % 2)) & 15) - 8
        return value * scale[r][i // 64]

    values = [[entry(r, i) for i in range(x.n)] for r in range(len(q))]
    return torch.tensor(values, dtype=torch.float64).view(len(q), x.n)


@quick
@given(rank=st.integers(0, 3), n=WIDTHS, bits=BITS, seed=st.integers(0, 999))
def test_an_entry_is_off_by_at_most_half_the_scale_of_its_group(rank, n, bits, seed):
    x = rows(rank, n, seed)
    coded = quantise(x, bits)
    back = dequantise(coded, torch.float64)
    assert back.shape == x.shape
    assert ((x.double() - back).abs() <= 0.5001 * each_scale(coded)).all()
    assert (back[x == 0] == 0).all()
    assert torch.equal(back, by_hand(coded))


@quick
@given(rank=st.integers(1, 3), n=WIDTHS, bits=BITS, seed=st.integers(0, 999))
def test_rows_take_the_stated_bytes_and_the_same_bits_every_time(rank, n, bits, seed):
    x = rows(rank, n, seed)
    one, other = quantise(x, bits), quantise(x.clone(), bits)
    assert torch.equal(one.q, other.q) and torch.equal(one.scale, other.scale)
    assert one.q.nbytes + one.scale.nbytes == rank * row_bytes(n, bits)
    read = decode_quantised({"q": one.q, "scale": one.scale}, rank, n, bits)
    assert torch.equal(dequantise(read), dequantise(one))
    cut = quantise(x[:1], bits)  # a row knows nothing of the others
    assert torch.equal(cut.q, one.q[:1]) and torch.equal(cut.scale, one.scale[:1])


@quick
@given(n=WIDTHS, bits=BITS, seed=st.integers(0, 999))
def test_what_was_quantised_once_is_not_changed_by_doing_it_again(n, bits, seed):
    back = dequantise(quantise(rows(2, n, seed), bits))
    # Where a scale was rounded up, the second one may be smaller and closer: the error bound holds.
    again = quantise(back, bits)
    assert ((dequantise(again) - back).abs() <= 0.5001 * each_scale(again)).all()


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("size", [1e-45, 3e-41, 1e-38, 1e-30, 1e30, 3e38])
def test_the_bound_holds_at_both_ends_of_float32(bits, size):
    x = size * torch.tensor([[1.0, -1.0, 0.5, 0.0, -0.25] * 20])
    assert x.isfinite().all()
    coded = quantise(x, bits)
    assert coded.scale.isfinite().all() and (coded.scale > 0).all()
    # Products below the smallest float32 are exact in float64.
    assert ((x.double() - by_hand(coded)).abs() <= 0.5001 * each_scale(coded)).all()


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_largest_numbers_come_back_finite(bits, dtype):
    x = torch.finfo(torch.float32).max * torch.tensor([[1.0, -1.0, 0.997, 0.0, -0.25]])
    coded = quantise(x, bits)
    back = dequantise(coded, dtype)
    assert back.isfinite().all()
    assert ((x.double() - back.double()).abs() <= 1.01 * each_scale(coded)).all()


@pytest.mark.parametrize("bits", [8, 4])
def test_a_group_of_zeros_has_scale_zero_and_stays_zero(bits):
    x = torch.zeros(2, 130)
    x[0, 70] = 3.0
    coded = quantise(x, bits)
    assert (coded.scale > 0).tolist() == [[False, True, False], [False] * 3]
    assert torch.equal(dequantise(coded) != 0, x != 0)


@pytest.mark.parametrize("bits", [8, 4])
def test_the_largest_entry_of_a_group_uses_the_largest_number(bits):
    coded = quantise(torch.tensor([[127.0, -127.0, 1.0]]), bits)
    assert float(dequantise(coded)[0, 0]) == pytest.approx(127.0, rel=1 / 128)
    q = coded.q if bits == 8 else torch.tensor([[(int(coded.q[0, 0]) & 15) - 8]])
    assert int(q[0, 0]) in (LARGEST[bits], LARGEST[bits] - 1)


@quick
@given(
    n=st.integers(1, 140), bits=BITS, seed=st.integers(0, 999), count=st.integers(0, 9),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]),
)  # fmt: skip
def test_columns_are_those_of_the_whole_in_any_type(n, bits, seed, count, dtype):
    coded = quantise(rows(3, n, seed), bits)
    columns = torch.randint(0, n, (count,), generator=torch.Generator().manual_seed(seed))
    whole = dequantise(coded, dtype)
    assert whole.dtype == dtype
    assert torch.equal(dequantise_columns(coded, columns, dtype), whole[:, columns])
    assert torch.equal(whole, dequantise(coded, torch.float64).to(dtype))


def test_half_precision_goes_in_as_it_is():
    x = randn(2, 70, seed=0)
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        one, other = quantise(x.to(dtype), 8), quantise(x.to(dtype).float(), 8)
        assert torch.equal(one.q, other.q) and torch.equal(one.scale, other.scale)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_is_not_quantised(bad):
    with pytest.raises(ValueError, match="finite entries"):
        quantise(torch.tensor([[1.0, bad]]), 8)
    with pytest.raises(ValueError, match=r"bits must be one of \[4, 8\], got 5"):
        quantise(torch.ones(1, 2), 5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda q, s: {"q": q[:1]}, r"t.a.q: expected torch.uint8 \(2, 35\) .*got .*\(1, 35\)"),
        (lambda q, s: {"q": q.view(torch.int8)}, r"t.a.q: expected torch.uint8 .*got torch.int8"),
        (lambda q, s: {"q": q[:, 1:]}, r"t.a.q: expected .* for 2 int4 rows of 70 entries, got"),
        (lambda q, s: {"scale": s[:, :1]}, r"t.a.scale: expected torch.bfloat16 \(2, 2\)"),
        (lambda q, s: {"scale": s.float()}, r"t.a.scale: expected torch.bf.* got torch.float32"),
        (lambda q, s: {"scale": s * float("nan")}, "t.a.scale: expected finite scales of at"),
        (lambda q, s: {"scale": -s}, "t.a.scale: expected finite scales of at least 0"),
    ],
)
def test_quantised_parts_that_do_not_fit_are_named(change, message):
    coded = quantise(rows(2, 70, seed=0), 4)
    parts = {"q": coded.q, "scale": coded.scale} | change(coded.q, coded.scale)
    with pytest.raises(CorruptArtifact, match=message):
        decode_quantised(parts, 2, 70, 4, "t.a")


# ------------------------------------------------------------------------------ sparse tensors


def scattered(shape: tuple[int, ...], entries: int, seed: int, dtype=torch.float32) -> Sparse:
    size = torch.Size(shape).numel()
    order = torch.randperm(size, generator=torch.Generator().manual_seed(seed))
    index = order[:entries].sort().values
    return Sparse(randn(entries, seed=seed, dtype=dtype), index, shape)


@quick
@given(
    shape=st.lists(st.integers(1, 9), min_size=1, max_size=3).map(tuple),
    share=st.floats(0, 1),
    seed=st.integers(0, 999),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
def test_a_sparse_tensor_comes_back_bit_for_bit_in_the_smaller_form(shape, share, seed, dtype):
    size = torch.Size(shape).numel()
    x = scattered(shape, round(share * size), seed, dtype)
    parts = encode_sparse(x)
    form = "mask" if -(-size // 8) < 4 * len(x.index) else "index"
    assert set(parts) == {"values", form}
    assert sum(p.nbytes for p in parts.values()) == sparse_bytes(len(x.index), size, dtype.itemsize)
    back = decode_sparse(parts, shape)
    assert torch.equal(back.values, x.values) and back.values.dtype == dtype
    assert torch.equal(back.index, x.index) and back.shape == shape
    dense = torch.zeros(size, dtype=dtype)
    dense[x.index] = x.values
    assert torch.equal(back.dense(), dense.view(shape))


def test_a_mask_is_what_numpy_packs_with_the_first_entry_in_the_lowest_bit():
    x = scattered((3, 7), 11, seed=0)
    bits = np.zeros(21, dtype=np.uint8)
    bits[x.index.numpy()] = 1
    mask = encode_sparse(x)["mask"].numpy()
    np.testing.assert_array_equal(mask, np.packbits(bits, bitorder="little"))


@pytest.mark.parametrize("entries", [0, 12])
def test_nothing_and_everything_are_sparse_tensors_too(entries):
    x = scattered((3, 4), entries, seed=0)
    parts = encode_sparse(x)
    assert ("index" if entries == 0 else "mask") in parts
    back = decode_sparse(parts, (3, 4))
    assert torch.equal(back.index, torch.arange(entries)) and torch.equal(back.values, x.values)


def test_positions_are_int64_only_where_int32_is_too_small():
    few = Sparse(torch.ones(2), torch.tensor([0, 5]), (2**31 - 1,))
    assert encode_sparse(few)["index"].dtype == torch.int32
    assert encode_sparse(dataclasses.replace(few, shape=(2**31,)))["index"].dtype == torch.int64
    assert sparse_bytes(2, 2**31, 4) == 2 * (4 + 8)


@pytest.mark.parametrize(
    ("entries", "change", "message"),
    [
        (11, lambda p: {"values": p["values"][:-1]}, "x.y: .* got 10 values and 11 positions"),
        (11, lambda p: {"mask": p["mask"] & 254}, "x.y: expected as many values as positions"),
        (11, lambda p: {"mask": p["mask"][:-1]}, r"x.y.mask: expected 3 bytes for 21 entries"),
        (11, lambda p: {"mask": p["mask"].int()}, "x.y.mask: expected 3 bytes .* got torch.int32"),
        (21, lambda p: {"mask": p["mask"].roll(1)}, "x.y: expected positions in 0..20, got"),
        (0, lambda p: {"values": torch.ones(1)}, "x.y: .* got 1 values and 0 positions"),
        (2, lambda p: {"index": p["index"].flip(0)}, "x.y.index: expected ascending positions"),
        (2, lambda p: {"index": p["index"] * 0}, "x.y.index: expected ascending positions"),
        (2, lambda p: {"index": p["index"] + 21}, r"x.y: expected positions in 0..20, got \d+ t"),
        (2, lambda p: {"index": p["index"] - 21}, r"x.y: expected positions in 0..20, got -"),
        (2, lambda p: {"index": p["index"].short()}, "x.y.index: expected a row of int32 or int64"),
        (2, lambda p: {"values": p["index"]}, "x.y.values: expected a row of floats, got torch.i"),
    ],
)  # fmt: skip
def test_sparse_parts_that_do_not_fit_are_named(entries, change, message):
    shape = (10, 21) if entries == 2 else (3, 7)
    x = scattered((3, 7), entries, seed=3)
    parts = encode_sparse(Sparse(x.values, x.index, shape))
    if shape != (3, 7):  # so few of so many that the positions are smaller; read as a small tensor
        assert "index" in parts
    with pytest.raises(CorruptArtifact, match=message):
        decode_sparse(parts | change(parts), (3, 7), "x.y")
