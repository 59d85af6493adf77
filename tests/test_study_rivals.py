"""Rivals of the text study do what their papers define, and cost what their files weigh."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from conftest import randn
from lab.lab import Lab, Settings
from lab.records import Records
from lab.rivals import emr, rivals, smile, switch, tall, tsv
from lab.rivals.packed import (
    flat,
    from_bits,
    from_file,
    shaped,
    to_bits,
    to_file,
)
from lab.rivals.sources import linear_layers
from tiny import EXPERTS
from torch import nn

from twinmerge.artifact.reader import Artifact
from twinmerge.merging.linalg import svd

SHAPES = {"first.weight": torch.Size((12, 8)), "first.bias": torch.Size((12,))}
WEIGHTS = 12 * 8 + 12
HALF = dict(rtol=2e-3, atol=2e-3)
"""What float16 leaves."""


def vector(seed: int) -> dict[str, torch.Tensor]:
    return shaped(randn(WEIGHTS, seed=seed), SHAPES)


def reread(packed):
    return from_file(to_file(packed))


def factors(found):
    return {name: svd(x) for name, x in found.items() if x.ndim == 2}


def data_bytes(packed) -> int:
    return sum(x.numel() * x.element_size() for x in packed.values())


@pytest.mark.parametrize("size", [1, 7, 8, 9, 800])
def test_bits_come_back_and_eight_make_a_byte(size):
    bits = randn(size, seed=size) > 0
    packed = to_bits(bits)
    assert len(packed) == math.ceil(size / 8)
    assert torch.equal(from_bits(packed, size), bits)


def test_a_task_vector_is_flat_and_comes_back():
    found = vector(0)
    back = shaped(flat(found), SHAPES)
    assert list(back) == list(found)
    assert all(torch.equal(back[name], found[name]) for name in found)


# ------------------------------------------------------------------------------------ TSV-Compress


def test_tsv_at_full_rank_is_the_expert():
    found = vector(0)
    packed = reread(tsv.pack(found, factors(found), {"first.weight": 8}))
    back = tsv.unpack(packed, SHAPES)
    torch.testing.assert_close(back["first.weight"], found["first.weight"], **HALF)
    assert torch.equal(back["first.bias"], found["first.bias"].half().float())


@pytest.mark.parametrize("rank", [1, 2, 5])
def test_tsv_leaves_what_eckart_and_young_say_and_stores_what_the_paper_counts(rank):
    found = vector(1)
    packed = reread(tsv.pack(found, factors(found), {"first.weight": rank}))
    lost = found["first.weight"] - tsv.unpack(packed, SHAPES)["first.weight"]
    tail = torch.linalg.svdvals(found["first.weight"])[rank:].norm()
    torch.testing.assert_close(lost.norm(), tail, **HALF)
    # k (out + 1 + in) numbers and the vector, in float16
    assert data_bytes(packed) == 2 * (rank * (12 + 1 + 8) + 12)


def test_tsv_keeps_the_same_share_of_every_matrix():
    assert [tsv.count(shape, 8) for shape in ((384, 384), (1536, 384), (2, 384))] == [
        48,
        48,
        1,
    ]


# ------------------------------------------------------------------------------------- EMR-Merging


def naive_emr(rows):
    """The paper's section 3.2, weight by weight."""
    unified = torch.zeros(WEIGHTS)
    for i in range(WEIGHTS):
        values = [float(row[i]) for row in rows]
        sign = math.copysign(1, sum(values)) if sum(values) else 0
        agreeing = [abs(value) for value in values if value * sign > 0]
        unified[i] = sign * max(agreeing, default=0)
    found = []
    for row in rows:
        mask = torch.tensor([float(a * b > 0) for a, b in zip(row, unified, strict=True)])
        found.append(row.abs().sum() / (mask * unified).abs().sum() * mask * unified)
    return unified, found


def test_emr_is_the_papers_formula():
    vectors = {name: vector(seed) for seed, name in enumerate(EXPERTS)}
    rows = [flat(each) for each in vectors.values()]
    unified, wanted = naive_emr(rows)
    torch.testing.assert_close(emr.elect(rows), unified)
    kept = emr.pack(vectors)
    shared = reread(kept.shared)
    torch.testing.assert_close(shared["unified"].float(), unified, **HALF)
    for name, want in zip(EXPERTS, wanted, strict=True):
        back = emr.unpack(shared, reread(kept.experts[name]), SHAPES)
        torch.testing.assert_close(flat(back), want, **HALF)


def test_emr_gives_a_single_expert_back():
    kept = emr.pack({"math": vector(0)})
    back = emr.unpack(kept.shared, kept.experts["math"], SHAPES)
    torch.testing.assert_close(flat(back), flat(vector(0)), **HALF)


def test_emr_costs_one_bit_a_weight_and_a_shared_vector():
    kept = emr.pack({"math": vector(0), "code": vector(1)})
    assert data_bytes(kept.experts["math"]) == math.ceil(WEIGHTS / 8) + 4
    assert data_bytes(kept.shared) == 2 * WEIGHTS


def test_emr_of_an_expert_that_changed_nothing_is_the_pretrained_model():
    still = {name: torch.zeros(shape) for name, shape in SHAPES.items()}
    kept = emr.pack({"math": vector(0), "code": still})
    assert not flat(emr.unpack(kept.shared, kept.experts["code"], SHAPES)).any()


# -------------------------------------------------------------------------------------- TALL masks


@pytest.mark.parametrize("title", tall.VECTORS)
def test_tall_is_the_papers_formula(title):
    vectors = {name: vector(seed) for seed, name in enumerate(EXPERTS)}
    lambdas = dict(zip(EXPERTS, (0.2, 0.4, 0.6), strict=True))
    kept = tall.pack(title, vectors, lambdas)
    multi = reread(kept.shared)["multi"].float()
    for name in EXPERTS:
        row = flat(vectors[name])
        want = [
            m if abs(t) >= lambdas[name] * abs(m - t) else 0.0
            for t, m in zip(row.tolist(), multi.tolist(), strict=True)
        ]
        back = tall.unpack(reread(kept.shared), reread(kept.experts[name]), SHAPES)
        torch.testing.assert_close(flat(back), torch.tensor(want))
        assert data_bytes(kept.experts[name]) == math.ceil(WEIGHTS / 8)


def test_tall_at_lambda_1_is_the_best_mask():
    rows = [randn(50, seed=seed) for seed in range(3)]
    multi = tall.summed(rows)
    mask = tall.mask(rows[0], multi, 1.0)
    torch.testing.assert_close(
        (rows[0] - mask * multi).abs(), torch.minimum(rows[0].abs(), (rows[0] - multi).abs())
    )


def test_tall_gives_a_single_expert_back():
    title = "TALL masks + task arithmetic"
    kept = tall.pack(title, {"math": vector(0)}, {"math": 0.4})
    back = tall.unpack(kept.shared, kept.experts["math"], SHAPES)
    torch.testing.assert_close(flat(back), flat(vector(0)), **HALF)


def test_the_ties_vector_sums_the_large_values_that_agree():
    rows = [torch.tensor([9.0, 1.0, -8.0, 0.5]), torch.tensor([-3.0, 0.1, -7.0, 0.2])]
    assert tall.ties(rows, density=0.5).tolist() == [9.0, 0.0, -15.0, 0.0]


# ---------------------------------------------------------------------------------------- T-Switch


@pytest.mark.parametrize("density", [0.1, 0.5, 1.0])
def test_t_switch_is_the_papers_formula(density):
    found = vector(0)
    back = switch.unpack(reread(switch.pack(found, density)), SHAPES)
    for name, x in found.items():
        values = x.flatten().tolist()
        kept = set()
        for sign in (1, -1):
            side = sorted((sign * v for v in values if sign * v > 0), reverse=True)
            kept |= {sign * v for v in side[: max(1, int(density * len(side) + 1e-9))]}
        norm = math.sqrt(sum(v * v for v in kept))
        want = [math.copysign(norm / math.sqrt(len(kept)), v) if v in kept else 0 for v in values]
        torch.testing.assert_close(back[name].flatten(), torch.tensor(want))


def test_t_switch_costs_a_bit_a_weight_a_bit_a_sign_and_a_scale_a_tensor():
    found = vector(0)
    packed = switch.pack(found, 0.3)
    kept = sum(int(switch.activation(x, 0.3).sum()) for x in found.values())
    assert data_bytes(packed) == math.ceil(WEIGHTS / 8) + math.ceil(kept / 8) + 4 * len(SHAPES)


def test_t_switch_of_signs_is_exact():
    """Where all changes of a tensor are equally large, a sign says all."""
    found = {name: 0.01 * x.sign() for name, x in vector(0).items()}
    back = switch.unpack(switch.pack(found, 1.0), SHAPES)
    torch.testing.assert_close(flat(back), flat(found))


def test_t_switch_of_a_tensor_that_did_not_change_is_nothing():
    found = vector(0) | {"first.bias": torch.zeros(12)}
    back = switch.unpack(switch.pack(found, 0.5), SHAPES)
    assert not back["first.bias"].any()


# ------------------------------------------------------------------------------------------- SMILE


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 12)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.first(x)


def made_smile(vectors, rank, gate) -> tuple[Net, list]:
    torch.manual_seed(0)
    net = Net()
    paths = linear_layers(net, SHAPES)
    assert paths == ["first"]
    packed = [reread(smile.pack(v, factors(v), paths, rank, gate)) for v in vectors]
    smile.install(net, packed, paths, gate)
    return net, packed


def plain(found) -> Net:
    torch.manual_seed(0)
    net = Net()
    with torch.no_grad():
        for name, x in net.named_parameters():
            x += found[name]
    return net


@torch.no_grad()
def test_smile_of_one_expert_at_full_rank_is_the_expert():
    net, _ = made_smile([vector(0)], 8, 4)
    x = randn(2, 5, 8, seed=9)
    torch.testing.assert_close(net(x), plain(vector(0))(x), rtol=1e-2, atol=1e-2)


@torch.no_grad()
def test_smile_sends_each_token_to_the_expert_with_the_longest_projection():
    vectors = [vector(seed) for seed in range(3)]
    net, _ = made_smile(vectors, 8, 2)
    x = randn(3, 4, 8, seed=9)
    answers = [plain(each)(x) for each in vectors]
    tops = [torch.linalg.svd(v["first.weight"]).Vh[:2] for v in vectors]
    chosen = set()
    for row, token in [(row, token) for row in range(3) for token in range(4)]:
        best = max(range(3), key=lambda e: float((tops[e] @ x[row, token]).norm()))
        chosen.add(best)
        torch.testing.assert_close(
            net(x)[row, token], answers[best][row, token], rtol=1e-2, atol=1e-2
        )
    assert len(chosen) > 1, "the test says nothing if one expert gets all"


@pytest.mark.parametrize("rank, gate", [(1, 4), (4, 1), (3, 3)])
def test_smile_stores_v_once_for_gate_and_expert(rank, gate):
    _, packed = made_smile([vector(0), vector(1)], rank, gate)
    for each in packed:
        assert data_bytes(each) == 2 * (max(rank, gate) * 8 + rank * 12 + 12)


def test_smile_leaves_layers_that_no_expert_changed():
    assert linear_layers(Net(), {"other.weight"}) == []


# --------------------------------------------------------------------------------------- the study


TASKS = ("math", "code")


def opened(bench, folder: Path) -> Lab:
    settings = Settings(
        choose_rows=6, test_rows=8, max_tokens=32, seeds=(0,), ranks=(1, 16), noisy=()
    )
    return Lab(
        list(TASKS),
        {name: Path(bench.made.experts[name]) for name in TASKS},
        {name: bench.data for name in TASKS},
        bench.made.base,
        folder / "work",
        settings,
        Records(folder / "out", {"experts": list(TASKS)}),
    )


@pytest.mark.slow
def test_every_rival_has_its_records_and_a_second_run_makes_none(bench, tmp_path, monkeypatch):
    monkeypatch.setattr(rivals, "RANKS", (1, 16))
    monkeypatch.setattr(rivals, "GATES", (1, 4))
    monkeypatch.setattr(rivals, "DENSITIES", (0.3,))
    monkeypatch.setattr(tall, "LAMBDAS", (0.2, 0.5))
    lab = opened(bench, tmp_path)
    said: list[str] = []
    rivals.rivals(lab, said.append)
    records = lab.records.all()
    found = [record for record in records if record["part"] == "rival"]
    assert {record["name"] for record in found} == {
        "TSV-Compress",
        "SMILE",
        "EMR-Merging",
        "T-Switch",
        *tall.VECTORS,
    }
    for record in found:
        sizes = record["bytes"]
        stored = sizes["experts"] + sizes["extra_shared"]
        assert sizes["share"] == stored / len(TASKS) / sizes["base_float16"]
        assert record["needs_task"] is (record["name"] != "SMILE")
        assert set(record["scores"]) == set(TASKS)
        assert record["source"].startswith("https://arxiv.org/abs/")
        assert (sizes["extra_shared"] > 0) is (record["name"].split()[0] in ("EMR-Merging", "TALL"))
    assert len(said) >= len(found)
    # No matrix has a rank above 16: the experts come back but for float16.
    full = next(r for r in found if (r["name"], r["settings"]) == ("TSV-Compress", {"rank": 16}))
    assert full["normalised"] == pytest.approx(1)

    monkeypatch.setattr(rivals.Sources, "vectors", property(lambda _: pytest.fail("read again")))
    rivals.rivals(opened(bench, tmp_path), said.append)
    assert len(lab.records.all()) == len(records)


@pytest.mark.slow
def test_a_file_holds_the_head_as_an_artifact_does_and_no_tensor_that_nobody_changed(
    bench, tmp_path
):
    lab = opened(bench, tmp_path)
    sources = rivals.Sources(lab, lambda _: 1)
    head = sources.heads["code"]
    with Artifact(lab.plain.folder, check=False).expert("code") as tensors:
        assert {name for name in tensors.names() if name.endswith(".head")} == set(head)
        assert all(torch.equal(tensors[name], x) for name, x in head.items())
    records = [r for r in lab.plain.manifest.tensors if r.kind == "head"]
    assert sum(r.experts["code"].bytes for r in records) == data_bytes(head) > 0
    assert not any(name.startswith("classifier") for name in sources.shapes)
    # Without a change it is the pretrained model with this head, with the change the expert.
    expert = dict(lab.expert("code").named_parameters())
    model = dict(sources.model("code", sources.vectors["code"]).named_parameters())
    for name, x in expert.items():
        torch.testing.assert_close(model[name], x)
    still = dict(sources.model("code", {}).named_parameters())
    for name, x in sources.base.items():
        assert torch.equal(still[name], x)
        assert not torch.equal(still[name], expert[name])
