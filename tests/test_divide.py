"""A build that is divided over machines gives the bytes of one in one go."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
import yaml
from safetensors.torch import load_file, save_file
from test_conformance import assert_same_files
from test_resume import Saboteur, forked, killed
from tiny import EXPERTS, FAMILIES, Made, adapter, inherit, made, opened, recipe, save
from typer.testing import CliRunner

from twinmerge import cli
from twinmerge.errors import CheckpointError, InputError, NotFinite, OutputError
from twinmerge.merging.build import build, build_part, join_parts
from twinmerge.merging.journal import Workspace
from twinmerge.merging.plan import make_plan
from twinmerge.merging.segments import divide, shards_of
from twinmerge.recipe import Recipe

WAYS: dict[str, dict[str, Any]] = {
    "rank": dict(exclusive={"rank": 3}),
    "budget": dict(exclusive={"budget": "60%"}),
    "int4 budget": dict(
        merge_method="task_arithmetic", exclusive={"budget": "60%", "dtype": "int4"}
    ),
    "entries of all": dict(exclusive={"form": "magnitude", "density": 0.2, "scope": "all"}),
    "random method": dict(merge_method="dare_ties", parameters={"density": 0.5}),
    "random entries": dict(exclusive={"form": "dropout", "density": 0.3}, seed=4),
    "sixteen bits": dict(out_dtype="bfloat16", exclusive={"energy": 0.8}),
    "static": dict(exclusive={"rank": "none"}),
}
SMALL = 6000
"""Bytes of a shard."""
ONE = 5_000_000_000


@pytest.fixture(scope="module")
def bert(tmp_path_factory) -> Made:
    family = FAMILIES["bert"]
    family = dataclasses.replace(family, sizes=family.sizes | {"num_hidden_layers": 1})
    return made(family, tmp_path_factory.mktemp("bert"), EXPERTS[:2])


@pytest.fixture(scope="module")
def lora(tmp_path_factory) -> Made:
    folder = tmp_path_factory.mktemp("lora")
    wide = {"hidden_size": 32, "intermediate_size": 48, "num_key_value_heads": 2, "head_dim": 16}
    sizes = FAMILIES["llama"].sizes | wide | {"num_hidden_layers": 1}
    family = dataclasses.replace(FAMILIES["llama"], sizes=sizes)
    base = made(family, folder, experts=()).base
    options = dict(target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM", lora_alpha=4)
    experts = {
        name: adapter(opened(tf.LlamaForCausalLM, base), folder / name, name, r=rank, **options)
        for name, rank in (("one", 2), ("two", 3))
    }
    return Made(family, base, experts)


def asked(made: Made, way: str = "rank", **more: Any) -> Recipe:
    return recipe(made.base, made.experts, **WAYS[way] | more)


def joined(asked: Recipe, out: Path, order: list[int], size: int = SMALL):
    """All parts in this order, then put together."""
    for index in order:
        build_part(asked, out, index, len(order), shard_bytes=size)
        assert not out.exists()
    return join_parts(asked, out, len(order), shard_bytes=size)


def left(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# ------------------------------------------------------------------------------- the same bytes


@pytest.mark.parametrize("size", [SMALL, ONE], ids=["shards", "one file"])
@pytest.mark.parametrize("way", WAYS)
def test_parts_in_any_order_give_the_bytes_of_one_build(way, size, bert, tmp_path):
    whole = build(asked(bert, way), tmp_path / "whole", shard_bytes=size)
    orders = [[0], [1, 0], [2, 0, 1], [3, 6, 0, 5, 1, 4, 2]]
    for order in orders if way in ("rank", "budget") else orders[2:3]:
        out = tmp_path / f"{len(order)}"
        assert joined(asked(bert, way), out, order, size) == whole
        assert_same_files(out, tmp_path / "whole")
    assert not [name for name in left(tmp_path) if name.startswith(".")]


@pytest.mark.parametrize("size", [SMALL, ONE], ids=["shards", "one file"])
def test_there_may_be_more_parts_than_tensors(size, bert, tmp_path):
    whole = build(asked(bert), tmp_path / "whole", shard_bytes=size)
    count = len(whole.tensors) + 3
    assert joined(asked(bert), tmp_path / "out", list(range(count)), size) == whole
    assert_same_files(tmp_path / "out", tmp_path / "whole")


@pytest.mark.parametrize(
    "more",
    [
        {},
        dict(exclusive={"budget": 12_000}),
        dict(exclusive={"form": "magnitude", "density": 0.1}),
        dict(merge_method="ties", parameters={"density": 0.5}),
    ],
    ids=["rank", "budget", "entries", "ties"],
)
def test_adapters_are_divided_like_checkpoints(more, lora, tmp_path):
    whole = build(asked(lora, **more), tmp_path / "whole", shard_bytes=SMALL)
    assert joined(asked(lora, **more), tmp_path / "out", [1, 2, 0]) == whole
    assert_same_files(tmp_path / "out", tmp_path / "whole")


def test_every_tensor_has_one_part_and_parts_are_about_as_large(zoo):
    models = zoo.made("bert")
    plan = make_plan(recipe(models.base, models.experts))
    shards = shards_of(plan, SMALL)
    for count in (1, 2, 3, 7, 100):
        parts = divide(plan, shards, count)
        assert len(parts) == count
        owned = [tensor.key for part in parts for segment in part for tensor in segment.tensors]
        assert sorted(owned) == sorted(tensor.key for tensor in plan.tensors)
        sizes = [
            sum(t.bytes // t.dtype.itemsize for segment in part for t in segment.tensors)
            for part in parts
        ]
        if count < 4:
            largest = max(tensor.bytes // tensor.dtype.itemsize for tensor in plan.tensors)
            assert max(sizes) - min(sizes) <= 2 * largest + len(plan.tensors)
    plan.close()


def test_heads_beside_a_base_with_a_head_of_another_dtype(bert, tmp_path):
    """Two tensors of one name, which stand at different places of the order."""
    model = tf.BertForSequenceClassification(tf.BertConfig(**bert.family.sizes, num_labels=7))
    inherit(model, opened(tf.BertModel, bert.base))
    base = save(model, tmp_path / "base")
    tensors = load_file(Path(base, "model.safetensors"))
    kept = {
        name: tensor if "classifier" in name or "layer.0.output" in name else tensor.bfloat16()
        for name, tensor in tensors.items()
    }
    save_file(kept, Path(base, "model.safetensors"), {"format": "pt"})
    experts = {}
    for name, folder in bert.experts.items():
        experts[name] = str(shutil.copytree(folder, tmp_path / name))
        theirs = load_file(Path(folder, "model.safetensors"))
        theirs = {n: t.bfloat16() if "classifier" in n else t for n, t in theirs.items()}
        save_file(theirs, Path(experts[name], "model.safetensors"), {"format": "pt"})
    this = recipe(base, experts, exclusive={"rank": 3})
    for size in (SMALL, ONE):
        whole = build(this, tmp_path / f"whole-{size}", shard_bytes=size)
        kinds = [record.kind for record in whole.tensors if record.name == "classifier.weight"]
        assert sorted(kinds) == ["base_only", "head"]
        for count in (2, 3, 5):
            out = tmp_path / f"{size}-{count}"
            assert joined(this, out, list(range(count)), size) == whole
            assert_same_files(out, tmp_path / f"whole-{size}")


# ---------------------------------------------------------------------------- killed, not done


@pytest.mark.parametrize("at", [3, 40])
def test_a_part_that_is_killed_goes_on(at, bert, tmp_path):
    whole, out = tmp_path / "whole", tmp_path / "out"
    build(asked(bert), whole, shard_bytes=SMALL)
    build_part(asked(bert), out, 1, 2, shard_bytes=SMALL)

    def work() -> None:
        Saboteur(at, killed, half=True).install()
        build_part(asked(bert), out, 0, 2, shard_bytes=SMALL)

    assert forked(work) == -signal.SIGKILL
    with pytest.raises(OutputError) as caught:
        join_parts(asked(bert), out, 2, shard_bytes=SMALL)
    message = str(caught.value)
    assert f"{out}: part 0 of 2 is not finished" in message
    assert "--num-shards 2 --shard-index 0" in message and not out.exists()
    build_part(asked(bert), out, 0, 2, shard_bytes=SMALL)

    def put_together() -> None:
        Saboteur(20, killed, half=True).install()
        join_parts(asked(bert), out, 2, shard_bytes=SMALL)

    assert forked(put_together) == -signal.SIGKILL
    join_parts(asked(bert), out, 2, shard_bytes=SMALL)
    assert_same_files(out, whole)
    assert left(tmp_path) == ["out", "whole"]


def test_a_part_that_was_not_built_is_named_with_the_command(bert, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(OutputError, match=r"out: part 0 of 2 was not built yet .*there is no"):
        join_parts(asked(bert), out, 2, shard_bytes=SMALL)
    assert left(tmp_path) == []  # asking leaves nothing
    build_part(asked(bert), out, 0, 2, shard_bytes=SMALL)
    with pytest.raises(OutputError, match=r"part 1 of 2 .* --num-shards 2 --shard-index 1,"):
        join_parts(asked(bert), out, 2, shard_bytes=SMALL)
    with pytest.raises(OutputError, match="part 0 of 3 was not built yet"):
        join_parts(asked(bert), out, 3, shard_bytes=SMALL)
    build_part(asked(bert), out, 1, 2, shard_bytes=SMALL)
    join_parts(asked(bert), out, 2, shard_bytes=SMALL)
    assert left(tmp_path) == ["out"]


def test_a_finished_part_is_not_done_again(bert, tmp_path):
    seen: list[tuple] = []
    for _ in range(2):
        seen.clear()
        build_part(
            asked(bert), tmp_path / "out", 1, 2, shard_bytes=SMALL,
            progress=lambda *step: seen.append(step),
        )  # fmt: skip
    assert len(seen) == 1 and seen[0][0] == seen[0][1] > 3


def test_parts_of_another_recipe_are_not_put_together(bert, tmp_path):
    out = tmp_path / "out"
    build_part(asked(bert), out, 0, 2, shard_bytes=SMALL)
    build_part(asked(bert, seed=1), out, 1, 2, shard_bytes=SMALL)
    for seed in (0, 1):
        other = rf"recipe.seed was {1 - seed} and is now {seed}.*--restart"
        with pytest.raises(OutputError, match=f"(?s)holds an unfinished build, but {other}"):
            join_parts(asked(bert, seed=seed), out, 2, shard_bytes=SMALL)
    with pytest.raises(OutputError, match="shard_bytes was 6000 and is now 7000"):
        join_parts(asked(bert), out, 2, shard_bytes=7000)
    build_part(asked(bert), out, 1, 2, shard_bytes=SMALL, restart=True)
    join_parts(asked(bert), out, 2, shard_bytes=SMALL)
    build(asked(bert), tmp_path / "whole", shard_bytes=SMALL)
    assert_same_files(out, tmp_path / "whole")


def test_a_part_that_was_damaged_is_not_put_together(bert, tmp_path):
    out = tmp_path / "out"
    for index in (0, 1):
        build_part(asked(bert), out, index, 2, shard_bytes=ONE)
    path = Workspace(out).part(1, 2) / "model.safetensors.segment"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)
    with pytest.raises(OutputError, match=rf"{path}: a part of an unfinished build is not what"):
        join_parts(asked(bert), out, 2, shard_bytes=ONE)
    build_part(asked(bert), out, 1, 2, shard_bytes=ONE, restart=True)
    join_parts(asked(bert), out, 2, shard_bytes=ONE)
    build(asked(bert), tmp_path / "whole", shard_bytes=ONE)
    assert_same_files(out, tmp_path / "whole")


def test_a_part_under_way_is_waited_for(bert, tmp_path):
    out, told = tmp_path / "out", []

    def progress(done: int, total: int, name: str) -> None:
        if done == 2:
            with pytest.raises(OutputError, match="another process is building here right now"):
                join_parts(asked(bert), out, 2, shard_bytes=SMALL)
            told.append(done)

    build_part(asked(bert), out, 0, 2, shard_bytes=SMALL)
    build_part(asked(bert), out, 1, 2, shard_bytes=SMALL, progress=progress)
    assert told == [2]
    join_parts(asked(bert), out, 2, shard_bytes=SMALL)


def test_parts_run_at_once(bert, tmp_path):
    out = tmp_path / "out"
    build(asked(bert), tmp_path / "whole", shard_bytes=SMALL)

    def inner(done: int, total: int, name: str) -> None:
        if done == 1:  # part 2 from beginning to end, while part 0 is under way
            build_part(asked(bert), out, 2, 3, shard_bytes=SMALL)

    build_part(asked(bert), out, 0, 3, shard_bytes=SMALL, progress=inner)
    build_part(asked(bert), out, 1, 3, shard_bytes=SMALL)
    join_parts(asked(bert), out, 3, shard_bytes=SMALL)
    assert_same_files(out, tmp_path / "whole")


def test_a_broken_model_takes_its_part_along_and_no_other(bert, tmp_path):
    code = str(shutil.copytree(bert.experts["code"], tmp_path / "code"))
    path = Path(code, "model.safetensors")
    tensors = load_file(path)
    tensors["bert.pooler.dense.weight"][0, 0] = torch.inf
    save_file(tensors, path, {"format": "pt"})
    this, out = recipe(bert.base, bert.experts | {"code": code}), tmp_path / "out"
    build_part(this, out, 0, 2)
    with pytest.raises(NotFinite, match="pooler.dense.weight"):
        build_part(this, out, 1, 2)
    assert left(tmp_path / ".out.building") == ["part-00001-of-00002"]


def test_the_same_expert_twice_is_told_when_all_parts_are_known(bert, tmp_path):
    same = str(shutil.copytree(bert.experts["math"], tmp_path / "same"))
    twice = {"math": bert.experts["math"], "same": same}
    out = tmp_path / "out"
    for index in range(2):
        build_part(recipe(bert.base, twice), out, index, 2)
    with pytest.raises(CheckpointError, match="'math' and 'same': expected two different models"):
        join_parts(recipe(bert.base, twice), out, 2)
    assert left(tmp_path) == ["same"]


# ---------------------------------------------------------------------------- by command line


@pytest.fixture
def call(bert, tmp_path) -> Callable[..., Any]:
    models = [{"model": folder, "name": name} for name, folder in bert.experts.items()]
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump({"base_model": bert.base, "models": models} | WAYS["rank"]))

    def run(*words: object):
        fixed = ["merge", path, tmp_path / "out", "--max-shard-bytes", SMALL, "-q"]
        return CliRunner().invoke(cli.app, [str(word) for word in (*fixed, *words)])

    return run


def test_parts_and_join_by_the_command_line(call, bert, tmp_path):
    for index in (1, 0, 2):
        done = call("--num-shards", 3, "--shard-index", index, "--json")
        assert done.exit_code == 0
        assert json.loads(done.stdout) == {"part": index, "of": 3, "finished": True}
    done = call("--num-shards", 3, "--join", "--json")
    assert done.exit_code == 0 and len(json.loads(done.stdout)["experts"]) == 2
    build(asked(bert), tmp_path / "whole", shard_bytes=SMALL)
    assert_same_files(tmp_path / "out", tmp_path / "whole")
    assert ".out.building" not in left(tmp_path)


def test_a_part_tells_people_that_it_is_done(call):
    done = call("--num-shards", 2, "--shard-index", 1)
    assert done.exit_code == 0 and "1" in done.stdout and "2" in done.stdout


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--join"], "--join: of how many parts? Give --num-shards too."),
        (["--shard-index", 1], "--shard-index 1: of how many parts? Give --num-shards too."),
        (["--num-shards", 4], "--num-shards 4: give --shard-index 0 to 3 to do a part, or --join"),
        (["--num-shards", 4, "--shard-index", 1, "--join"], "(one of the two)"),
        (["--num-shards", 4, "--shard-index", 4], "parts of --num-shards 4 are numbered 0 to 3"),
        (["--engine", "spark"], "--engine spark: expected local or ray."),
        (
            ["--engine", "ray", "--num-shards", 2, "--join"],
            "--engine ray: does all parts and joins",
        ),
        (["--engine", "ray", "--num-shards", 2, "--shard-index", 0], "give --num-shards only"),
    ],
)
def test_options_that_do_not_go_together_are_one_message(words, message, call, tmp_path):
    for more in ([], ["--dry-run"]):
        done = call(*words, *more)
        assert isinstance(done.exception, InputError) and message in str(done.exception)
        assert left(tmp_path) == ["recipe.yaml"]


@pytest.mark.parametrize("words", [["--num-shards", 0], ["--num-shards", 2, "--shard-index", -1]])
def test_numbers_out_of_range_are_refused(words, call, tmp_path):
    assert call(*words).exit_code == 2
    assert left(tmp_path) == ["recipe.yaml"]


# -------------------------------------------------------------------------------------- on ray


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    ray = pytest.importorskip("ray")
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(
        [str(Path(cli.__file__).parents[1]), *([before] if before else [])]
    )
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield ray
    ray.shutdown()
    if before is None:
        del os.environ["PYTHONPATH"]
    else:
        os.environ["PYTHONPATH"] = before


ON_RAY = [
    pytest.mark.slow,
    # Ray's own: files and sockets that it leaves to the garbage collector.
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


def on_ray(test):
    for mark in ON_RAY:
        test = mark(test)
    return test


@on_ray
def test_ray_gives_the_same_bytes(cluster, bert, tmp_path):
    from twinmerge.merging.ray_engine import build_on_ray

    seen: list[tuple] = []
    for way, parts in (("budget", 3), ("random method", None)):
        whole = build(asked(bert, way), tmp_path / f"{way} whole", shard_bytes=SMALL)
        out = tmp_path / way
        got = build_on_ray(
            asked(bert, way), out, parts, shard_bytes=SMALL,
            progress=lambda *step: seen.append(step[:2]),
        )  # fmt: skip
        assert got == whole
        assert_same_files(out, tmp_path / f"{way} whole")
    assert seen == [(1, 3), (2, 3), (3, 3), (1, 2), (2, 2)]  # as many parts as CPUs
    assert cluster.is_initialized()  # not ours to end
    assert not [name for name in left(tmp_path) if name.startswith(".")]


@on_ray
def test_an_error_in_a_worker_is_told_as_it_is(cluster, bert, tmp_path):
    from twinmerge.merging.ray_engine import build_on_ray

    code = str(shutil.copytree(bert.experts["code"], tmp_path / "code"))
    path = Path(code, "model.safetensors")
    tensors = load_file(path)
    tensors["bert.pooler.dense.weight"][0, 0] = torch.inf
    save_file(tensors, path, {"format": "pt"})
    this = recipe(bert.base, bert.experts | {"code": code})
    with pytest.raises(NotFinite) as caught:
        build_on_ray(this, tmp_path / "out", 2)
    assert type(caught.value) is NotFinite
    assert "pooler.dense.weight: expected finite numbers, expert 'code'" in str(caught.value)
    assert not (tmp_path / "out").exists()


@on_ray
def test_the_command_line_builds_on_ray(cluster, call, bert, tmp_path):
    done = call("--engine", "ray", "--num-shards", 2, "--json")
    assert done.exit_code == 0, done.output
    build(asked(bert), tmp_path / "whole", shard_bytes=SMALL)
    assert_same_files(tmp_path / "out", tmp_path / "whole")
    again = call("--engine", "ray")
    assert isinstance(again.exception, OutputError) and "is not empty" in str(again.exception)


def test_without_ray_it_says_what_to_install(bert, tmp_path):
    import subprocess
    import sys

    # In a process of its own: taking Ray away from under a running cluster would end this one.
    (tmp_path / "recipe.yaml").write_text(asked(bert).to_yaml())
    words = ["twinmerge", "merge", str(tmp_path / "recipe.yaml"), str(tmp_path / "out")]
    code = (
        "import sys; sys.modules['ray'] = None\n"
        f"sys.argv = {[*words, '--engine', 'ray']}\n"
        "from twinmerge.cli import main; main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1 and "pip install 'twinmerge[ray]'" in done.stderr
    assert left(tmp_path) == ["recipe.yaml"]
