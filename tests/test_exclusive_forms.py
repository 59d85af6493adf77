"""Exclusive parts as entries and as quantised factors: which are kept, how they are stored, and
that the model which runs them is the densely merged one."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import randn
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from test_conformance import assert_close, assert_same_files
from tiny import (
    EXPERTS,
    FAMILIES,
    Made,
    batch_of,
    exclusive,
    expert_tensors,
    made,
    merge,
    opened,
    shared_tensors,
)

from twinmerge.artifact.codec import decode_quantised, decode_sparse, dequantise
from twinmerge.artifact.format import Manifest, Share, TensorRecord
from twinmerge.errors import NotFinite
from twinmerge.merging.exclusive import Cut, factorize
from twinmerge.merging.shared.blocks import largest
from twinmerge.merging.sparse import Entries, count_of, dropout, magnitude, select
from twinmerge.runtime.load import load

FORMS: dict[str, dict[str, Any]] = {
    "factors": {"rank": 3},
    "int8": {"rank": 3, "dtype": "int8"},
    "int4": {"rank": 3, "dtype": "int4"},
    "magnitude": {"form": "magnitude", "density": 0.2},
    "magnitude of all": {"form": "magnitude", "density": 0.2, "scope": "all"},
    "dropout": {"form": "dropout", "density": 0.3},
    "full rank in int8": {"rank": "full", "dtype": "int8"},
}


def dense(entries: Entries, shape: tuple[int, ...]) -> torch.Tensor:
    parts = {key.removeprefix("."): tensor for key, tensor in entries.stored.items()}
    return decode_sparse(parts, shape).dense()


def error_of(delta: torch.Tensor, kept: torch.Tensor) -> float:
    square = delta.double().square().sum()
    return float(((delta.double() - kept.double()).square().sum() / square).sqrt()) if square else 0


# --------------------------------------------------------------------------- entries, by itself


@settings(deadline=None, max_examples=80)
@given(
    shape=st.lists(st.integers(1, 9), min_size=0, max_size=3),
    density=st.floats(0.01, 1),
    levels=st.integers(1, 6),
    seed=st.integers(0, 999),
)
def test_magnitude_keeps_the_largest_and_of_equal_ones_the_first(shape, density, levels, seed):
    # Few levels, so that many entries are equal, and zeros among them.
    delta = (randn(prod(shape), seed=seed).view(shape) * levels / 2).round()
    entries, count = magnitude(delta, density), count_of(delta.numel(), density)
    order = torch.sort(delta.abs().flatten(), descending=True, stable=True).indices[:count]
    want = torch.zeros(delta.numel())
    want[order] = delta.flatten()[order]
    assert torch.equal(dense(entries, tuple(shape)), want.view(shape))
    assert entries.count == int((want != 0).sum()) <= max(1, density * delta.numel() + 1e-6)
    assert entries.error == pytest.approx(error_of(delta, want.view(shape)), abs=1e-6)


@pytest.mark.parametrize(
    ("entries", "density", "count"),
    [(100, 0.29, 29), (70, 0.1, 7), (10, 0.05, 1), (10, 0.19, 1), (10, 1.0, 10), (1, 0.001, 1)],
)
def test_a_density_is_rounded_down_and_keeps_at_least_one(entries, density, count):
    assert count_of(entries, density) == count
    assert magnitude(randn(entries, seed=0), density).count == count


def test_the_smaller_of_mask_and_index_is_stored():
    delta = randn(40, 80, seed=0)  # a mask of 400 bytes, 4 bytes for an index
    few, many = magnitude(delta, 0.03), magnitude(delta, 0.04)
    assert (few.storage, set(few.stored)) == ("index", {".values", ".index"})
    assert (many.storage, set(many.stored)) == ("mask", {".values", ".mask"})
    assert few.count == 96 and few.stored[".index"].nbytes == 384
    assert many.count == 128 and many.stored[".mask"].nbytes == 400


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_the_error_is_that_of_the_entries_as_stored(dtype):
    delta = randn(30, 20, seed=0)
    draw = torch.Generator().manual_seed(0)
    for entries in (magnitude(delta, 0.3, dtype), dropout(delta, 0.3, draw, dtype)):
        assert entries.stored[".values"].dtype == dtype
        want = error_of(delta, dense(entries, (30, 20)))
        assert entries.error == pytest.approx(want, abs=1e-6)
    whole = magnitude(delta, 1.0, dtype)
    assert whole.count == 600
    assert whole.error == pytest.approx(error_of(delta, delta.to(dtype)), abs=1e-7)


@pytest.mark.parametrize("density", [0.05, 0.3, 0.9])
def test_dropout_keeps_about_that_share_and_rescales_it(density):
    delta = randn(200, 300, seed=0)
    entries = dropout(delta, density, torch.Generator().manual_seed(1))
    kept = dense(entries, (200, 300))
    # Five standard deviations of a binomial.
    assert abs(entries.count - 60_000 * density) < 5 * (60_000 * density * (1 - density)) ** 0.5
    mask = kept != 0
    torch.testing.assert_close(kept[mask], delta[mask] / density)
    # E‖D̃ - D‖² = ‖D‖² (1/p - 1)
    assert entries.error == pytest.approx((1 / density - 1) ** 0.5, rel=0.05)


def test_dropout_is_the_delta_on_average():
    delta = randn(8, 5, seed=0)
    draws = 1500
    total = torch.zeros(8, 5)
    for seed in range(draws):
        total += dense(dropout(delta, 0.5, torch.Generator().manual_seed(seed)), (8, 5))
    deviation = delta.abs() / draws**0.5  # sqrt(1/p - 1) = 1
    assert bool(((total / draws - delta).abs() < 5 * deviation).all())


@pytest.mark.parametrize("shape", [(), (1,), (1, 1), (3, 4), (0,), (2, 0)])
def test_nothing_is_kept_of_no_difference(shape):
    delta = torch.zeros(shape)
    for entries in (
        magnitude(delta, 0.5),
        dropout(delta, 0.5, torch.Generator().manual_seed(0)),
    ):
        assert entries.count == 0 and entries.error == 0
        assert torch.equal(dense(entries, shape), delta)


def test_a_single_entry_is_kept():
    entries = magnitude(torch.tensor([[-2.5]]), 0.01)
    assert entries.count == 1 and entries.error == 0
    assert dense(entries, (1, 1)).item() == -2.5


@settings(deadline=None, max_examples=60)
@given(
    sizes=st.lists(st.integers(1, 50), min_size=1, max_size=5),
    seed=st.integers(0, 99),
    levels=st.sampled_from([1.0, 3.0, 1e6]),
    scale=st.sampled_from([1.0, 1e-30, 1e-44, 1e30]),
    data=st.data(),
)
def test_the_largest_of_many_tensors_are_those_of_one_row(sizes, seed, levels, scale, data):
    tensors = [
        scale * ((randn(n, seed=seed + i) * levels).round() / levels) for i, n in enumerate(sizes)
    ]
    everything = torch.cat(tensors).abs().sort(descending=True).values
    count = data.draw(st.integers(1, len(everything)))
    where, start, kept = largest(tensors, len(everything), count), 0, []
    for tensor in tensors:
        entries = select(tensor, where, start, torch.float32)
        kept.append(dense(entries, tuple(tensor.shape)))
        start += len(tensor)
    found = torch.cat(kept)
    nonzero = int((everything > 0).sum())
    assert int((found != 0).sum()) == min(count, nonzero)  # zeros are never kept
    smallest = float(found.abs()[found != 0].min()) if nonzero else 0.0
    assert smallest == float(everything[min(count, max(1, nonzero)) - 1])
    # of equal ones the first
    equal = (torch.cat(tensors).abs() == smallest).nonzero().flatten()
    taken = (found.abs() == smallest).nonzero().flatten()
    assert not nonzero or torch.equal(taken, equal[: len(taken)])


# -------------------------------------------------------------------------- quantised, by itself


@settings(deadline=None, max_examples=40)
@given(
    out=st.integers(1, 70),
    in_=st.integers(1, 70),
    rank=st.one_of(st.none(), st.integers(1, 20)),
    bits=st.sampled_from([8, 4]),
    seed=st.integers(0, 99),
)
def test_the_error_of_quantised_factors_is_measured(out, in_, rank, bits, seed):
    delta = randn(out, in_, seed=seed)
    cut = Cut(full=True) if rank is None else Cut(rank=rank)
    factors = factorize(delta, cut, bits=bits)
    assert factors.storage == f"int{bits}"
    a, b = (
        dequantise(
            decode_quantised(
                {key: factors.stored[f".{side}.{key}"] for key in ("q", "scale")},
                factors.rank,
                n,
                bits,
            )
        )
        for side, n in (("a", in_), ("b", out))
    )
    assert torch.equal(a, factors.a) and torch.equal(b.T, factors.b)
    want = error_of(delta, b.double().T @ a.double())
    assert factors.error == pytest.approx(want, abs=1e-4)
    tail = torch.linalg.svdvals(delta.double())
    best = float(tail[factors.rank :].norm() / tail.norm())
    assert factors.truncation == pytest.approx(min(best, factors.error), abs=2e-3)
    assert factors.bound <= factors.truncation + 1e-6 <= factors.error + 2e-6


@pytest.mark.parametrize(("bits", "most"), [(8, 0.02), (4, 0.25)])
def test_full_rank_in_integers_loses_what_rounding_loses(bits, most):
    delta = 1e-3 * randn(64, 96, seed=0)
    factors = factorize(delta, Cut(full=True), bits=bits)
    assert factors.rank == 64 and 0 < factors.error < most and factors.truncation < 1e-3


# ---------------------------------------------------------------------------------- artifacts


def kept_of(tensors: dict[str, torch.Tensor], record: TensorRecord, share: Share) -> torch.Tensor:
    """What an expert's file says of one tensor, read with the codec, in float64."""
    name, shape = record.name, record.shape
    if share.empty:
        assert not [key for key in tensors if key.startswith(f"{name}.")]
        return torch.zeros(shape, dtype=torch.float64)
    if share.storage in ("mask", "index"):
        parts = {
            key: tensors[f"{name}.{key}"]
            for key in ("values", "mask", "index")
            if f"{name}.{key}" in tensors
        }
        assert set(parts) == {"values", share.storage}
        assert len(parts["values"]) == share.entries and share.rank is None
        return decode_sparse(parts, shape).dense().double()
    if share.storage in ("int8", "int4"):
        assert record.matrix is not None and share.rank is not None
        bits = int(share.storage.removeprefix("int"))
        a, b = (
            dequantise(
                decode_quantised(
                    {key: tensors[f"{name}.{side}.{key}"] for key in ("q", "scale")},
                    share.rank,
                    n,
                    bits,
                ),
                torch.float64,
            )
            for side, n in (("a", record.matrix[1]), ("b", record.matrix[0]))
        )
        return (b.T @ a).view(shape)
    return exclusive(tensors, name, torch.empty(shape))


def deltas(made: Made, folder: Path, manifest: Manifest) -> dict[str, dict[str, torch.Tensor]]:
    """Expert minus shared expert, by expert and matrix, in float64."""
    shared = shared_tensors(folder)
    found: dict[str, dict[str, torch.Tensor]] = {}
    for name, reference in made.experts.items():
        theirs = load_file(Path(reference, "model.safetensors"))
        prefixes = ("", f"{made.family.task.base_model_prefix}.")
        for record in manifest.tensors:
            if record.kind == "matrix":
                own = next(theirs[p + record.name] for p in prefixes if p + record.name in theirs)
                delta = own.double() - shared[record.name].double()
                found.setdefault(name, {})[record.name] = delta
    return found


def check_shares(made: Made, folder: Path, manifest: Manifest, tolerance: float = 1e-5) -> None:
    """Errors, entries and bytes of every share are those of the files."""
    differences = deltas(made, folder, manifest)
    for expert in manifest.experts:
        tensors, total = expert_tensors(folder, expert.name), 0
        for record in manifest.tensors:
            share = record.experts.get(expert.name)
            if share is None:
                continue
            own = [t for key, t in tensors.items() if key.startswith(f"{record.name}.")]
            assert share.bytes == sum(t.nbytes for t in own)
            total += share.bytes
            if record.kind == "matrix":
                kept = kept_of(tensors, record, share)
                want = error_of(differences[expert.name][record.name], kept)
                assert share.error == pytest.approx(want, abs=tolerance)
        path = folder / "experts" / f"{expert.name}.safetensors"
        header = 8 + int.from_bytes(path.read_bytes()[:8], "little")
        assert expert.bytes == path.stat().st_size == header + total


def plain(made: Made, folder: Path, manifest: Manifest, weights: Iterable[float], head: str, to):
    """The densely merged model with one expert's head, opened by transformers alone."""
    state = {name: tensor.double() for name, tensor in shared_tensors(folder).items()}
    for weight, expert in zip(weights, made.experts, strict=True):
        tensors = expert_tensors(folder, expert)
        for record in manifest.tensors:
            if record.kind in ("matrix", "vector") and expert in record.experts:
                kept = kept_of(tensors, record, record.experts[expert])
                state[record.name] = state[record.name] + weight * kept
    state = {name: tensor.float().contiguous() for name, tensor in state.items()}
    for name, tensor in expert_tensors(folder, head).items():
        if name.endswith(".head"):
            state[name.removesuffix(".head")] = tensor
    to.mkdir(parents=True)
    (to / "config.json").write_text(Path(made.experts[head], "config.json").read_text())
    save_file(state, to / "model.safetensors", {"format": "pt"})
    return opened(made.family.task, to)


@pytest.mark.parametrize("name", ["bert", "gpt2"])
@pytest.mark.parametrize("form", FORMS)
def test_every_form_runs_as_the_densely_merged_model(form, name, zoo, tmp_path):
    made, out = zoo.made(name), tmp_path / "out"
    manifest = merge(made.base, made.experts, out, exclusive=FORMS[form])
    check_shares(made, out, manifest)
    twin, inputs = load(out), batch_of(made.family)
    mask = inputs["attention_mask"].bool()
    for number, weights in enumerate(([1.0, 0.0, 0.0], [0.2, -0.5, 0.9])):
        model = plain(made, out, manifest, weights, "code", tmp_path / str(number))
        got = twin(weights=weights, head="code", **inputs).logits
        want = model(**inputs).logits
        if got.ndim == 3:
            got, want = got[mask], want[mask]
        assert_close(got, want)


@pytest.mark.parametrize("density", [0.02, 0.2, 0.6, 1.0])
def test_the_largest_entries_of_all_matrices_are_those_of_a_dense_computation(
    density, zoo, tmp_path
):
    made, out = zoo.made("bert"), tmp_path / "out"
    form = {"form": "magnitude", "density": density, "scope": "all"}
    manifest = merge(made.base, made.experts, out, exclusive=form)
    check_shares(made, out, manifest)
    # In the order of the tensors in the shared expert's file.
    order = [n for n in json_header(out / "model.safetensors") if n != "__metadata__"]
    for expert, differences in deltas(made, out, manifest).items():
        names = [name for name in order if name in differences]
        flat = torch.cat([differences[name].float().flatten() for name in names])
        count = int(density * len(flat) + 1e-9)
        chosen = torch.sort(flat.abs(), descending=True, stable=True).indices[:count]
        want = torch.zeros_like(flat)
        want[chosen] = flat[chosen]
        records = {record.name: record for record in manifest.tensors}
        tensors = expert_tensors(out, expert)
        got = torch.cat(
            [
                kept_of(tensors, records[name], records[name].experts[expert]).flatten()
                for name in names
            ]
        )
        assert torch.equal(got.float(), want)
        total = sum(records[name].experts[expert].entries for name in names)
        assert total == int((want != 0).sum())
    shares = [s for r in manifest.tensors if r.kind == "matrix" for s in r.experts.values()]
    if density < 1:
        spread = {round(s.entries / prod(r.shape), 3) for r in manifest.tensors
                  if r.kind == "matrix" for s in r.experts.values()}  # fmt: skip
        assert len(spread) > 3  # not the same share of each
    else:
        assert all(share.error == 0 for share in shares)


def json_header(path: Path) -> dict[str, Any]:
    data = path.read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    return dict(sorted(header.items(), key=lambda item: item[1].get("data_offsets", [-1])[0]))


def changed(made: Made, folder: Path, change) -> Made:
    """The family with all weights of the experts changed in place by `change(name, own, base)`."""
    bases = load_file(Path(made.base, "model.safetensors"))
    experts = {}
    for expert, source in made.experts.items():
        theirs = load_file(Path(source, "model.safetensors"))
        prefix = f"{made.family.task.base_model_prefix}."
        for key in theirs:
            name = key.removeprefix(prefix)
            if name in bases:
                theirs[key] = change(f"{expert}/{name}", theirs[key], bases[name]).contiguous()
        (folder / expert).mkdir(parents=True)
        config = Path(source, "config.json").read_text()
        (folder / expert / "config.json").write_text(config)
        save_file(theirs, folder / expert / "model.safetensors", {"format": "pt"})
        experts[expert] = str(folder / expert)
    return dataclasses.replace(made, experts=experts)


def test_ties_across_matrices_go_to_the_first(zoo, tmp_path):
    # Differences of a few equal sizes: steps of 1/4, exact in float32 for a merge that is the base.
    def stepped(name, own, base):
        return base.round() + ((own - base) * 40).round() / 4

    made = zoo.made("bert")
    base = tmp_path / "base"
    base.mkdir()
    (base / "config.json").write_text(Path(made.base, "config.json").read_text())
    bases = load_file(Path(made.base, "model.safetensors"))
    save_file(
        {n: t.round().contiguous() for n, t in bases.items()},
        base / "model.safetensors",
        {"format": "pt"},
    )
    own = dataclasses.replace(changed(made, tmp_path / "experts", stepped), base=str(base))
    options = dict(merge_method="task_arithmetic", parameters={"weight": 0.0})
    for density in (0.07, 0.3, 0.97):  # the last: more than there are entries that are not zero
        out = tmp_path / str(density)
        form = {"form": "magnitude", "density": density, "scope": "all"}
        manifest = merge(own.base, own.experts, out, exclusive=form, **options)
        check_shares(own, out, manifest)
        order = list(json_header(out / "model.safetensors"))
        for expert, differences in deltas(own, out, manifest).items():
            names = [name for name in order if name in differences]
            flat = torch.cat([differences[name].flatten() for name in names])
            assert len(flat.abs().unique()) < 40
            count = int(density * len(flat))
            chosen = torch.sort(flat.abs(), descending=True, stable=True).indices[:count]
            want = torch.zeros_like(flat)
            want[chosen] = flat[chosen]
            records = {record.name: record for record in manifest.tensors}
            tensors = expert_tensors(out, expert)
            got = [kept_of(tensors, records[n], records[n].experts[expert]) for n in names]
            assert torch.equal(torch.cat([each.flatten() for each in got]), want)


def test_magnitude_per_tensor_keeps_that_share_of_each(zoo, tmp_path):
    made, out = zoo.made("bert"), tmp_path / "out"
    form = {"form": "magnitude", "density": 0.03}
    manifest = merge(made.base, made.experts, out, exclusive=form)
    storages = set()
    for record in manifest.tensors:
        if record.kind == "matrix":
            for share in record.experts.values():
                assert share.entries == count_of(prod(record.shape), 0.03)
                storages.add(share.storage)
    assert storages == {"mask", "index"} or storages == {"index"}
    for record in manifest.tensors:
        if record.kind == "vector":
            assert all(s.storage == "whole" and s.error == 0 for s in record.experts.values())


def test_dropout_depends_on_the_seed_the_tensor_and_the_expert_alone(zoo, tmp_path):
    made = zoo.made("bert")
    options = dict(exclusive=FORMS["dropout"], merge_method="task_arithmetic",
                   parameters={"weight": 0.0})  # fmt: skip
    merge(made.base, made.experts, tmp_path / "one", **options)
    torch.manual_seed(5)
    merge(made.base, made.experts, tmp_path / "again", **options)
    merge(made.base, dict(reversed(made.experts.items())), tmp_path / "turned", **options)
    merge(made.base, {"code": made.experts["code"], "law": made.experts["law"]},
          tmp_path / "two", **options)  # fmt: skip
    merge(made.base, made.experts, tmp_path / "seed", seed=1, **options)
    assert_same_files(tmp_path / "one", tmp_path / "again")
    file = "experts/code.safetensors"
    content = (tmp_path / "one" / file).read_bytes()
    assert (tmp_path / "turned" / file).read_bytes() == content
    assert (tmp_path / "two" / file).read_bytes() == content
    assert (tmp_path / "seed" / file).read_bytes() != content
    masks = [
        expert_tensors(tmp_path / "one", expert)[f"encoder.layer.{layer}.output.dense.weight.mask"]
        for expert in EXPERTS
        for layer in (0, 1)
    ]
    assert len({bytes(mask.numpy()) for mask in masks}) == 6


# ------------------------------------------------------------------------- dtypes and edges


@pytest.mark.parametrize("form", FORMS)
def test_sixteen_bits_are_what_is_stored_and_measured(form, zoo, tmp_path):
    made, out = zoo.made("bert"), tmp_path / "out"
    manifest = merge(made.base, made.experts, out, exclusive=FORMS[form], out_dtype="bfloat16")
    check_shares(made, out, manifest, 1e-4)
    floats = {
        tensor.dtype
        for key, tensor in expert_tensors(out, "math").items()
        if key.endswith((".a", ".b", ".values", ".delta"))
    }
    assert floats == {torch.bfloat16}
    output = load(out)(task="math", **batch_of(made.family))
    assert torch.isfinite(output.logits[:, :2]).all()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_entries_may_be_stored_in_another_dtype_than_the_shared_expert(dtype, zoo, tmp_path):
    made, out = zoo.made("bert"), tmp_path / "out"
    for scope in ("tensor", "all"):
        form = {"form": "magnitude", "density": 0.5, "dtype": dtype, "scope": scope}
        manifest = merge(made.base, made.experts, out / scope, exclusive=form)
        check_shares(made, out / scope, manifest)
        values = [t for k, t in expert_tensors(out / scope, "law").items() if k.endswith(".values")]
        assert {tensor.dtype for tensor in values} == {getattr(torch, dtype)}


@pytest.mark.parametrize("form", FORMS)
def test_a_base_in_float64_is_kept_in_float64(form, tmp_path):
    family = dataclasses.replace(
        FAMILIES["llama"], sizes=FAMILIES["llama"].sizes | {"num_hidden_layers": 1}
    )
    own = made(family, tmp_path / "models", EXPERTS[:2])
    for folder in (own.base, *own.experts.values()):
        path = Path(folder, "model.safetensors")
        save_file({n: t.double() for n, t in load_file(path).items()}, path, {"format": "pt"})
    out = tmp_path / "out"
    manifest = merge(own.base, own.experts, out, exclusive=FORMS[form])
    assert {tensor.dtype for tensor in shared_tensors(out).values()} == {torch.float64}
    check_shares(own, out, manifest, 1e-6 if "int" not in form else 1e-4)


def test_matrices_that_no_expert_changed_have_no_part(zoo, tmp_path):
    made = zoo.made("bert")
    own = changed(
        made,
        tmp_path / "experts",
        lambda name, own, base: own if "layer.1.output.dense" in name else base,
    )
    for form, options in FORMS.items():
        out = tmp_path / form
        manifest = merge(own.base, own.experts, out, exclusive=options)
        parts = {r.name for r in manifest.tensors if r.experts and r.kind != "head"}
        assert parts == {f"encoder.layer.1.output.dense.{end}" for end in ("weight", "bias")}
        check_shares(own, out, manifest)
        load(out)(task="law", **batch_of(made.family))


def test_a_matrix_that_one_expert_has_as_the_shared_expert_is_empty_for_it(zoo, tmp_path):
    made = zoo.made("bert")
    own = changed(made, tmp_path / "experts",
                  lambda name, own, base: base if name.startswith("math/") else own)  # fmt: skip
    still = dict(merge_method="task_arithmetic", parameters={"weight": 0.0})  # shared: the base
    for form, options in FORMS.items():
        out = tmp_path / form
        manifest = merge(own.base, own.experts, out, exclusive=options, **still)
        shares = [r.experts["math"] for r in manifest.tensors if r.kind == "matrix"]
        assert all(share.empty and share.bytes == 0 and share.error == 0 for share in shares)
        assert manifest.warnings == ("expert 'math': all its matrices equal the base's.",)
        twin, inputs = load(out), batch_of(made.family)
        assert_close(
            twin(task="math", **inputs).logits,
            plain(own, out, manifest, [1, 0, 0], "math", tmp_path / f"{form} plain")(
                **inputs
            ).logits,
        )


@pytest.mark.parametrize("form", ["magnitude", "dropout"])
def test_all_entries_are_the_difference_itself(form, zoo, tmp_path):
    made, out = zoo.made("bert"), tmp_path / "out"
    manifest = merge(made.base, made.experts, out, exclusive={"form": form, "density": 1.0})
    shares = [s for r in manifest.tensors if r.kind == "matrix" for s in r.experts.values()]
    assert shares and all(share.error == 0 and share.storage == "mask" for share in shares)
    inputs = batch_of(made.family)
    for expert in EXPERTS:
        got = load(out)(task=expert, **inputs).logits
        assert_close(got, made.expert(expert)(**inputs).logits)


def test_an_entry_that_float16_cannot_hold_is_told(zoo, tmp_path):
    # 1000 / 0.01 is beyond 65504: an infinite entry would be stored otherwise.
    def large(name, own, base):
        return base + 1000 * torch.sign(own - base) if "query.weight" in name else own

    own = changed(zoo.made("bert"), tmp_path / "experts", large)
    before = sorted(tmp_path.iterdir())
    for form in (
        {"form": "dropout", "density": 0.01, "dtype": "float16"},
        {"form": "magnitude", "density": 0.5, "dtype": "float16"},
        {"form": "magnitude", "density": 0.01, "dtype": "float16", "scope": "all"},
    ):
        options = dict(merge_method="task_arithmetic", parameters={"weight": 0.0})
        if form["form"] == "magnitude":
            options["parameters"] = {"weight": -80.0}  # the shared expert is far off
        with pytest.raises(NotFinite, match=r"(?s)query.weight: .*float16.*exclusive.dtype"):
            merge(own.base, own.experts, tmp_path / "out", exclusive=form, **options)
        assert sorted(tmp_path.iterdir()) == before
