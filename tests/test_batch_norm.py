"""Batch norms: running means and variances are averaged, whatever the method; counts are not.

Offline code sees names and shapes alone, so everything is asked of real checkpoints of
convolutional models that were trained for a few batches, each on inputs of its own.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file, save_file
from tiny import (
    EXPERTS,
    adapter,
    exclusive,
    expert_tensors,
    merge,
    merged_folder,
    recipe,
    save,
    shared_tensors,
)

from twinmerge.artifact.reader import Artifact
from twinmerge.checkpoint import Checkpoint
from twinmerge.errors import CheckpointError, RecipeError
from twinmerge.merging.build import build_part, join_parts
from twinmerge.merging.doctor import diagnose
from twinmerge.merging.plan import make_plan
from twinmerge.merging.shared import METHODS

RESNET = dict(embedding_size=8, hidden_sizes=[8, 12], depths=[1, 1])
EFFICIENTNET = dict(
    image_size=16,
    width_coefficient=0.25,
    depth_coefficient=1.0,
    hidden_dim=320,
    kernel_sizes=[3, 3],
    in_channels=[32, 16],
    out_channels=[16, 24],
    strides=[1, 2],
    num_block_repeats=[1, 1],
    expand_ratios=[1, 2],
)
FAMILIES = {
    "resnet": (tf.ResNetConfig, tf.ResNetModel, tf.ResNetForImageClassification, RESNET),
    "efficientnet": (
        tf.EfficientNetConfig,
        tf.EfficientNetModel,
        tf.EfficientNetForImageClassification,
        EFFICIENTNET,
    ),
}
STATISTICS = ("running_mean", "running_var")


def trained(model, batches: int, shift: float) -> None:
    """A few forwards in training mode on inputs of that mean, and every parameter moved a bit."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
        model.train()
        for _ in range(batches):
            model(pixel_values=shift + (1 + shift) * torch.randn(4, 3, 16, 16))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Family -> (base, {expert: folder}); experts have other statistics, and counts, each."""
    root, out = tmp_path_factory.mktemp("batch-norm"), {}
    for name, (config, base_class, task, sizes) in FAMILIES.items():
        torch.manual_seed(0)
        base = base_class(config(**sizes))
        trained(base, 2, 0.0)
        experts = {}
        for index, expert in enumerate(EXPERTS):
            model = task(config(**sizes, num_labels=2 + index))
            body = getattr(model, model.base_model_prefix)
            body.load_state_dict(base.state_dict())
            trained(model, 3 + index, 0.5 * (index + 1))
            experts[expert] = save(model, root / name / expert)
        out[name] = save(base, root / name / "base"), experts
    return out


def states(family: str, folders) -> tuple[dict, dict[str, dict]]:
    """The base's tensors and each expert's, under the base's names."""
    base, experts = folders[family]
    ours = load_file(Path(base, "model.safetensors"))
    theirs = {}
    for name, folder in experts.items():
        tensors = load_file(Path(folder, "model.safetensors"))
        theirs[name] = {n: tensors[f"{family}.{n}"] for n in ours}
    return ours, theirs


# ----------------------------------------------------------------------------- what is merged


@pytest.mark.parametrize("method", sorted(METHODS))
def test_statistics_are_the_plain_average_whatever_the_method(method, folders, tmp_path):
    base, experts = folders["resnet"]
    some = dict(list(experts.items())[: METHODS[method].experts[1] or 3])
    known = {"weight": 3.0, "density": 0.5} if method != "linear" else {"weight": 3.0}
    parameters = {k: v for k, v in known.items() if k in METHODS[method].options}
    merge(base, some, tmp_path / "out", merge_method=method, parameters=parameters)
    shared = shared_tensors(tmp_path / "out")
    _, theirs = states("resnet", folders)
    checked = 0
    for name, tensor in shared.items():
        if name.endswith(STATISTICS):
            mean = torch.stack([theirs[e][name] for e in some]).double().mean(0)
            torch.testing.assert_close(tensor.double(), mean, rtol=1e-6, atol=1e-7)
            checked += 1
    assert checked == 2 * 8


@pytest.mark.parametrize("method", ["linear", "task_arithmetic", "ties"])
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_shared_and_exclusive_give_every_expert_back(family, method, folders, tmp_path):
    base, experts = folders[family]
    manifest = merge(
        base, experts, tmp_path / "out", merge_method=method, exclusive={"rank": "full"}
    )
    ours, theirs = states(family, folders)
    shared = shared_tensors(tmp_path / "out")
    kinds = {record.name: record.kind for record in manifest.tensors if record.kind != "head"}
    assert set(shared) == set(ours) == set(kinds)
    for expert in experts:
        kept = expert_tensors(tmp_path / "out", expert)
        for name, tensor in shared.items():
            if not tensor.is_floating_point():
                assert name.endswith("num_batches_tracked") and kinds[name] == "buffer"
                assert torch.equal(tensor, ours[name]) and tensor != theirs[expert][name]
                continue
            if name.endswith(STATISTICS):
                assert kinds[name] == "vector" and f"{name}.delta" in kept
            whole = tensor.double() + exclusive(kept, name, tensor)
            want = theirs[expert][name].double()
            torch.testing.assert_close(whole, want, rtol=1e-5, atol=1e-5)


def test_weights_and_filters_of_the_recipe_leave_statistics_alone(folders, tmp_path):
    base, experts = folders["resnet"]
    merge(base, experts, tmp_path / "plain")
    # Weights that sum to 0 cannot be normalised: an error for any tensor that they are meant for.
    weight = [{"filter": "running", "value": 0.0}, {"value": [0.2, 1.0]}]
    merge(base, experts, tmp_path / "filtered", parameters={"weight": weight})
    one, other = shared_tensors(tmp_path / "plain"), shared_tensors(tmp_path / "filtered")
    assert all(torch.equal(one[n], other[n]) for n in one if n.endswith(STATISTICS))
    weight[0]["filter"] = "normalization.bias"
    with pytest.raises(RecipeError, match="normalization.bias"):
        merge(base, experts, tmp_path / "refused", parameters={"weight": weight})


@pytest.mark.parametrize("dtype", [None, "bfloat16", "float16"])
def test_a_variance_is_negative_neither_in_the_shared_expert_nor_with_one_expert(
    dtype, folders, tmp_path
):
    base, experts = folders["resnet"]
    changed = {}
    for index, (name, folder) in enumerate(experts.items()):
        changed[name] = str(shutil.copytree(folder, tmp_path / name))
        tensors = load_file(tmp_path / name / "model.safetensors")
        for each, tensor in tensors.items():
            if each.endswith("running_var"):
                tensor.copy_(1e-9 * torch.rand_like(tensor) if index else 7.7 + tensor)
        save_file(tensors, tmp_path / name / "model.safetensors", metadata={"format": "pt"})
    merge(
        base, changed, tmp_path / "out", merge_method="task_arithmetic", out_dtype=dtype,
        parameters={"weight": 1.0},
    )  # fmt: skip
    shared = shared_tensors(tmp_path / "out")
    names = [name for name in shared if name.endswith("running_var")]
    assert names
    for name in names:
        assert (shared[name] > 2).all()
        for expert in EXPERTS:
            delta = expert_tensors(tmp_path / "out", expert)[f"{name}.delta"]
            assert delta.dtype == shared[name].dtype and (shared[name] + delta >= 0).all()


def test_adapters_count_with_the_bases_statistics(folders, tmp_path):
    config, base_class, task, sizes = FAMILIES["resnet"]
    base = folders["resnet"][0]
    tensors = load_file(Path(base, "model.safetensors"))
    lora = dict(r=2, lora_alpha=4, target_modules=["convolution"])
    made = {
        name: adapter(base_class.from_pretrained(base), tmp_path / name, seed=name, **lora)
        for name in ("one", "two")
    }
    model = base_class.from_pretrained(base)
    trained(model, 4, 1.0)
    made["full"] = save(model, tmp_path / "full")
    moved = load_file(tmp_path / "full" / "model.safetensors")
    merge(base, made, tmp_path / "out", exclusive={"rank": "full"})
    shared = shared_tensors(tmp_path / "out")
    kept = {name: expert_tensors(tmp_path / "out", name) for name in made}
    for name, tensor in shared.items():
        if name.endswith(STATISTICS):
            mean = (2 * tensors[name].double() + moved[name].double()) / 3
            torch.testing.assert_close(tensor.double(), mean, rtol=1e-6, atol=1e-7)
        if name.endswith("num_batches_tracked"):
            assert torch.equal(tensor, tensors[name])
            continue
        for expert in made:
            folder = "full" if expert == "full" else merged_folder(made[expert])
            want = load_file(tmp_path / folder / "model.safetensors")[name].double()
            whole = tensor.double() + exclusive(kept[expert], name, tensor)
            torch.testing.assert_close(whole, want, rtol=1e-5, atol=1e-5)


def test_statistics_that_no_expert_changed_stay_the_bases_bits(folders, tmp_path):
    base = folders["resnet"][0]
    model = tf.ResNetModel
    lora = dict(r=2, lora_alpha=4, target_modules=["convolution"])
    made = {
        name: adapter(model.from_pretrained(base), tmp_path / name, seed=name, **lora)
        for name in EXPERTS
    }
    manifest = merge(base, made, tmp_path / "out")
    tensors, shared = load_file(Path(base, "model.safetensors")), shared_tensors(tmp_path / "out")
    records = {record.name: record for record in manifest.tensors}
    for name in shared:
        if name.endswith(STATISTICS):
            assert torch.equal(shared[name], tensors[name]) and not records[name].experts


# -------------------------------------------------------------------------- building as always


def test_in_parts_and_at_once_the_bytes_are_the_same(folders, tmp_path):
    base, experts = folders["efficientnet"]
    merge(base, experts, tmp_path / "whole", merge_method="dare_ties", exclusive={"rank": 2})
    same = recipe(base, experts, merge_method="dare_ties", exclusive={"rank": 2})
    for index in range(3):
        build_part(same, tmp_path / "parts", index, 3)
    join_parts(same, tmp_path / "parts", 3)
    files = {
        folder: {path.name: path.read_bytes() for path in (tmp_path / folder).rglob("*.*")}
        for folder in ("whole", "parts")
    }
    assert len(files["whole"]) > len(EXPERTS) and files["whole"] == files["parts"]


@pytest.mark.parametrize(
    "exclusive",
    [
        {"budget": "90%", "dtype": "int8"},
        {"form": "magnitude", "density": 0.2, "scope": "all"},
        {"rank": "none"},
    ],
)
def test_every_form_keeps_statistics_whole_or_not_at_all(exclusive, folders, tmp_path):
    base, experts = folders["resnet"]
    merge(base, experts, tmp_path / "out", exclusive=exclusive)
    for record in Artifact(tmp_path / "out").manifest.tensors:
        if record.name.endswith(STATISTICS):
            assert record.matrix is None
            storages = {share.storage for share in record.experts.values()}
            assert storages == (set() if exclusive.get("rank") == "none" else {"whole"})


def test_plan_and_doctor_take_them_as_they_are(folders):
    base, experts = folders["efficientnet"]
    asked = recipe(base, experts)
    plan = make_plan(asked)
    running = {tensor.name for tensor in plan.tensors if tensor.running}
    plan.close()
    assert plan.summary()["tensors"]["buffer"] == len(running) / 3
    assert running == {n for n in plan.base.names() if "running_" in n or "num_batches" in n}
    found = diagnose(asked)
    assert not [finding for finding in found.findings if finding.level == "fail"]


# ------------------------------------------------------------------------------- what is known


def test_other_integers_must_still_be_equal(folders, tmp_path):
    base, experts = folders["resnet"]
    ours = shutil.copytree(base, tmp_path / "base")
    tensors = load_file(ours / "model.safetensors")
    tensors["embedder.steps"] = torch.tensor(1)
    save_file(tensors, ours / "model.safetensors", metadata={"format": "pt"})
    changed = {}
    for value, (name, folder) in enumerate(experts.items()):
        changed[name] = str(shutil.copytree(folder, tmp_path / name))
        tensors = load_file(tmp_path / name / "model.safetensors")
        tensors["resnet.embedder.steps"] = torch.tensor(value)
        save_file(tensors, tmp_path / name / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="embedder.steps: a torch.int64 tensor"):
        merge(str(ours), changed, tmp_path / "out")
    found = [f for f in diagnose(recipe(str(ours), changed)).findings if f.level == "fail"]
    assert found and all("embedder.steps" in finding.text for finding in found)


def test_running_statistics_are_known_by_what_stands_beside_them(tmp_path):
    vector, count = torch.ones(3), torch.tensor(5)
    tensors = {
        "a.norm.running_mean": vector,
        "a.norm.running_var": vector.clone(),
        "a.norm.num_batches_tracked": count,
        "frozen.running_mean": vector.clone(),
        "frozen.running_var": vector.clone(),
        "alone.running_mean": vector.clone(),
        "alone.num_batches_tracked": count.clone(),
        "shapes.running_mean": vector.clone(),
        "shapes.running_var": torch.ones(4),
        "matrix.running_mean": torch.ones(2, 3),
        "matrix.running_var": torch.ones(2, 3),
        "other_running_mean": vector.clone(),
        "other_running_var": vector.clone(),
        "integers.running_mean": torch.ones(3, dtype=torch.int64),
        "integers.running_var": torch.ones(3, dtype=torch.int64),
    }
    (tmp_path / "config.json").write_text("{}")
    save_file(tensors, tmp_path / "model.safetensors")
    known = {name for name in tensors if name.startswith(("a.norm.", "frozen."))}
    assert Checkpoint.open(str(tmp_path)).running() == known
