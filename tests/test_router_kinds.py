"""Every kind of router, on every feature, does what a router promises: one suite for all."""

from __future__ import annotations

import copy
import json
import pickle
import shutil
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file, save_file
from test_conformance import assert_same_files
from texts import BERT_TEXT, SIZES, save_tokenizer, sentences
from tiny import BERT, EXPERTS, inherit, merge, perturb, save

from twinmerge.artifact.format import EXAMPLES, MANIFEST, ROUTER
from twinmerge.artifact.reader import Artifact
from twinmerge.artifact.tensorfile import record
from twinmerge.data import encode, pad
from twinmerge.errors import InputError, RouterError
from twinmerge.recipe import Router as Settings
from twinmerge.runtime.load import load, load_router
from twinmerge.runtime.router.encoder import ENCODER, TextEncoder
from twinmerge.runtime.router.fit import fit_router
from twinmerge.runtime.router.router import KINDS

MLP = dict(epochs=3, hidden=8, batch_size=16, learning_rate=0.01)
CASES: dict[str, dict[str, Any]] = {
    "none": dict(kind="none", weights={"math": 5, "code": 3, "law": 0}),
    "projection": dict(kind="projection"),
    "prompts": dict(kind="prompts", layer=1),
    "prototype": dict(kind="prototype", layer=1, examples=2),
    "linear": dict(kind="linear", layer=2, sharpness="top"),
    "mlp": dict(kind="mlp", layer=0, refit=False) | MLP,
    "several layers": dict(kind="prototype", layer=[0, 2], sharpness=4),
    "first token": dict(kind="linear", layer=2, pooling="first", coverage=1),
    "last token": dict(kind="mlp", layer=[1, 2], pooling="last") | MLP,
    "an encoder": dict(kind="prototype", encoder="?", examples=1),
}
BENCHES = ("bench", "causal_bench")
OTHERS = {"causal_bench": ("none", "projection", "prototype", "mlp", "last token", "an encoder")}
"""Of decoders, what may differ for them."""
QUICK = [("bench", "projection"), ("bench", "prototype"), ("causal_bench", "mlp")]
ALL = [
    pytest.param(b, c, marks=() if (b, c) in QUICK else pytest.mark.slow)
    for b in BENCHES
    for c in CASES
    if c in OTHERS.get(b, CASES)
]


def test_the_suite_has_every_kind():
    assert {case["kind"] for case in CASES.values()} == set(KINDS)


@dataclass
class Fitted:
    """One artifact with a router. Read it, never write to it, nor to the model."""

    bench: Any
    folder: Path
    settings: Settings
    texts: Any
    model: Any

    def inputs(self, texts, side: str = "right", extra: int = 0) -> dict[str, torch.Tensor]:
        return padded(self.model.tokenizer, texts, side, extra)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory) -> Path:
    """A text encoder of one layer with random weights and a tokenizer of its own."""
    folder = tmp_path_factory.mktemp("encoder")
    torch.manual_seed(3)
    sizes = BERT | SIZES | dict(num_hidden_layers=1, hidden_size=12, num_attention_heads=2)
    save(tf.BertModel(tf.BertConfig(**sizes)), folder)
    save_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def fitted(request, tmp_path_factory, encoder):
    """Gives the artifact of a case, fitted when first asked for."""
    made: dict[tuple[str, str], Fitted] = {}

    def give(which: str, case: str) -> Fitted:
        if (which, case) not in made:
            bench = request.getfixturevalue(which)
            folder = shutil.copytree(bench.plain, tmp_path_factory.mktemp("fitted") / "artifact")
            settings, texts = settings_of(case, encoder), texts_of(case, bench)
            fit_router(folder, texts, settings)
            made[which, case] = Fitted(bench, folder, settings, texts, load(folder))
        return made[which, case]

    return give


def settings_of(case: str, encoder: Path) -> Settings:
    given = CASES[case]
    if "encoder" in given:
        given = given | {"encoder": str(encoder)}
    return Settings.model_validate(given)


def texts_of(case: str, bench) -> Any:
    if case in ("none", "projection"):
        return None
    return bench.texts(4 if case == "prompts" else 20)


def padded(tokenizer, texts, side: str = "right", extra: int = 0) -> dict[str, torch.Tensor]:
    before, tokenizer.padding_side = tokenizer.padding_side, side
    try:
        inputs = pad(tokenizer, encode(tokenizer, texts, 40).rows)
    finally:
        tokenizer.padding_side = before
    rows = len(texts)
    for name, value in inputs.items():
        filler = value.new_full((rows, extra), tokenizer.pad_token_id if name[:5] == "input" else 0)
        inputs[name] = torch.cat([value, filler] if side == "right" else [filler, value], dim=1)
    return inputs


NEW = [text for name in EXPERTS for text in sentences(name, 3, seed=8)] + [("nothing known here",)]


def said(model, inputs, **given) -> SimpleNamespace:
    return SimpleNamespace(**vars(model.routing(**inputs, **given)))


def assert_same(one, other, close: float | None = None) -> None:
    for name in ("weights", "probabilities", "novelty", "new"):
        a, b = getattr(one, name), getattr(other, name)
        if close is None or a.dtype == torch.bool:
            assert torch.equal(a, b), name
        else:
            torch.testing.assert_close(a, b, rtol=close, atol=close, msg=name)


def halved(model, inputs):
    """A copy of the model for which about half of these rows are new, where it notices any."""
    model = copy.deepcopy(model)
    if model.router.novelty is not None:
        model.router.novelty.threshold = float(model.routing(**inputs).novelty.median())
    return model


everywhere = pytest.mark.parametrize(("which", "case"), ALL)

# ------------------------------------------------------------------------------ fit and load


@everywhere
def test_a_stored_router_loads_alike_every_time(which, case, fitted):
    found = fitted(which, case)
    inputs = found.inputs(NEW)
    one, other = (load_router(Artifact(found.folder)) for _ in range(2))
    for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True):
        assert torch.equal(a, b) and (a.dtype == torch.float32 or not a.is_floating_point())
    assert_same(said(found.model, inputs), said(load(found.folder), inputs))


@pytest.mark.slow
def test_an_encoder_must_be_one_and_be_able_to_pad(encoder, bench, tmp_path):
    save(
        tf.T5Model(
            tf.T5Config(vocab_size=43, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
        ),
        tmp_path / "t5",
    )
    save_tokenizer(tmp_path / "t5")
    with pytest.raises(InputError, match=r"t5: expected an encoder, got .* decoder .T5Model."):
        TextEncoder(tmp_path / "t5", bench.model.tokenizer, "mean")
    folder = shutil.copytree(encoder, tmp_path / "unpadded")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config.pop("pad_token", None)
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"pad_token": None}))
    with pytest.raises(InputError, match="unpadded: expected a tokenizer with a padding token"):
        TextEncoder(folder, bench.model.tokenizer, "mean")


def test_texts_that_an_encoder_cuts_are_counted(bench, tmp_path):
    sizes = BERT | SIZES | dict(num_hidden_layers=1, max_position_embeddings=12)
    save(tf.BertModel(tf.BertConfig(**sizes)), tmp_path / "short")
    save_tokenizer(tmp_path / "short")
    folder = shutil.copytree(bench.plain, tmp_path / "artifact")
    texts = {name: list(rows) for name, rows in bench.texts(20).items()}
    texts["law"][3] = (" ".join(["law1"] * 11),)  # with two special tokens one too many
    entry = fit_router(folder, texts, Settings(encoder=str(tmp_path / "short")))
    told = [warning for warning in entry.warnings if "longer" in warning]
    longer = sum(len("\t".join(row).split()) > 10 for rows in texts.values() for row in rows)
    assert longer and told == [
        f"{longer} of 60 texts are longer than the 12 tokens that the encoder reads: it routes on "
        "their beginning"
    ]


@everywhere
def test_fitting_twice_gives_the_same_files(which, case, fitted, encoder, tmp_path):
    found = fitted(which, case)
    other = shutil.copytree(found.bench.plain, tmp_path / "artifact")
    torch.manual_seed(99)
    before = torch.get_rng_state()
    fit_router(other, found.texts, found.settings)
    load(other)
    assert torch.equal(torch.get_rng_state(), before)  # nobody's random numbers are taken
    for folder in (found.folder, other):
        assert sorted(path.name for path in folder.iterdir() if path.name[0] == ".") == []
    assert_same_files(found.folder, other)


@everywhere
def test_what_the_manifest_says_is_what_loads(which, case, fitted):
    found = fitted(which, case)
    entry, router = Artifact(found.folder, check=True).manifest.router, found.model.router
    asked = CASES[case]
    assert entry.kind == router.kind == asked["kind"] and entry.said == router.said
    assert (entry.layers, entry.pooling) == (router.layers, router.pooling)
    assert (entry.temperature, entry.sharpness) == (router.temperature, router.sharpness)
    assert (entry.novelty is None) == (router.novelty is None)
    notices = asked["kind"] in ("prototype", "linear", "mlp") and asked.get("coverage", 0) < 1
    assert (entry.novelty is not None) == notices
    assert (entry.encoder is not None) == (router.encoder is not None) == ("encoder" in asked)
    own = [ROUTER, *((EXAMPLES,) if "examples" in asked else ())]
    names = [n for n in Artifact(found.folder).manifest.files if n in own or n.startswith(ENCODER)]
    assert entry.bytes == sum((found.folder / name).stat().st_size for name in names)
    assert set(own) <= set(names)


@pytest.mark.parametrize(
    ("which", "case", "read", "looked_at"),
    [("bench", "prototype", "mean", "last"), ("causal_bench", "last token", "last", "mean")],
)
def test_new_inputs_may_be_told_by_another_pooling_than_the_routers(
    which, case, read, looked_at, fitted
):
    """These cases then stand for such routers in all of the suite."""
    found = fitted(which, case)
    entry, router = found.model.manifest.router, found.model.router
    assert entry.pooling == router.pooling == read and {how for _, how in router.keys} == {read}
    assert entry.novelty.pooling == router.novelty.pooling == looked_at
    assert {how for _, how in router.wanted} == {"mean", "last"}
    inputs = found.inputs(NEW)
    features = found.model.features.read(inputs, router.wanted)
    want = router(features)
    assert_same(said(found.model, inputs), want)
    # Each reads its own: changing what the other reads changes nothing of it.
    for how, same in ((read, "novelty"), (looked_at, "probabilities")):
        spoilt = {key: x + 9.0 if key[1] == how else x for key, x in features.items()}
        other = router(spoilt)
        assert torch.equal(getattr(other, same), getattr(want, same))
        changed = {"novelty": "probabilities", "probabilities": "novelty"}[same]
        assert not torch.equal(getattr(other, changed), getattr(want, changed))


def test_a_forward_also_takes_two_poolings_on_its_way(late, bench):
    """Said of the case that is compared with `routing` below."""
    router = late("prototype", texts_of("prototype", bench)).router
    assert (router.pooling, router.novelty.pooling, router.last) == ("mean", "last", 1)


@pytest.mark.slow
@pytest.mark.parametrize("case", [name for name in CASES if name != "projection"])
def test_the_order_of_the_rows_files_does_not_matter(case, fitted, tmp_path):
    found = fitted("bench", case)
    other = shutil.copytree(found.bench.plain, tmp_path / "artifact")
    settings, texts = found.settings, found.texts
    if texts is None:
        settings = settings.model_copy(update={"weights": dict(reversed(settings.weights.items()))})
    else:
        texts = dict(reversed(texts.items()))
    fit_router(other, texts, settings)
    assert (other / ROUTER).read_bytes() == (found.folder / ROUTER).read_bytes()


# ------------------------------------------------------------------------------ what it says


@everywhere
def test_weights_sum_to_one_or_less_where_new_and_probabilities_always_do(which, case, fitted):
    found = fitted(which, case)
    inputs = found.inputs(NEW)
    model = halved(found.model, inputs)
    routed = model.routing(**inputs)
    assert routed.weights.shape == routed.probabilities.shape == (len(NEW), len(EXPERTS))
    assert routed.weights.dtype == routed.probabilities.dtype == torch.float32
    assert bool((routed.weights >= 0).all()) and bool((routed.probabilities >= 0).all())
    sums = routed.weights.sum(dim=1)
    torch.testing.assert_close(sums[~routed.new], torch.ones(int((~routed.new).sum())))
    if bool(routed.new.any()):
        over = routed.novelty[routed.new] - model.router.novelty.threshold
        assert bool((over > 0).all())
        torch.testing.assert_close(sums[routed.new], (-over).exp())
    torch.testing.assert_close(routed.probabilities.sum(dim=1), torch.ones(len(NEW)))
    assert torch.equal(routed.confidence, routed.probabilities.max(dim=1).values)
    if found.model.router.novelty is not None:
        assert 0 < routed.new.sum() < len(NEW)
    else:
        assert not routed.new.any() and not routed.novelty.any()


@everywhere
def test_a_batch_is_its_rows_one_by_one(which, case, fitted):
    found = fitted(which, case)
    together = said(found.model, found.inputs(NEW))
    alone = [said(found.model, found.inputs([text])) for text in NEW]
    rows = {name: torch.cat([getattr(each, name) for each in alone]) for name in vars(together)}
    assert_same(together, SimpleNamespace(**rows), close=1e-4)


@everywhere
def test_padding_its_side_and_its_amount_change_nothing(which, case, fitted):
    found = fitted(which, case)
    want = said(found.model, found.inputs(NEW))
    assert_same(said(found.model, found.inputs(NEW, extra=5)), want, close=1e-4)
    if which == "causal_bench":  # encoders number their positions from the left
        assert_same(said(found.model, found.inputs(NEW, side="left")), want, close=1e-4)
        assert_same(said(found.model, found.inputs(NEW, side="left", extra=3)), want, close=1e-4)


# ---------------------------------------------------------------------------------- allowed


@everywhere
def test_what_is_not_allowed_gets_nothing_and_the_rest_is_in_proportion(which, case, fitted):
    found = fitted(which, case)
    inputs = found.inputs(NEW)
    free, few = said(found.model, inputs), said(found.model, inputs, allowed=["code", "math"])
    assert not few.probabilities[:, 2].any() and not few.weights[:, 2].any()
    want = free.probabilities[:, :2] / free.probabilities[:, :2].sum(dim=1, keepdim=True)
    torch.testing.assert_close(few.probabilities[:, :2], want, rtol=1e-3, atol=1e-5)
    assert torch.equal(few.new, free.new) and torch.equal(few.novelty, free.novelty)


@everywhere
def test_one_allowed_expert_gets_all_also_where_the_router_gives_it_nothing(which, case, fitted):
    found = fitted(which, case)
    inputs = found.inputs(NEW)
    for index, name in enumerate(EXPERTS):
        routed = found.model.routing(**inputs, allowed=name)
        only = torch.eye(len(EXPERTS))[index]
        assert torch.equal(routed.probabilities, only.expand(len(NEW), -1))
        assert torch.equal(routed.weights[:, index] == 1, ~routed.new)
        assert bool((routed.weights[:, torch.arange(len(EXPERTS)) != index] == 0).all())


@everywhere
def test_each_row_may_have_experts_of_its_own(which, case, fitted):
    found = fitted(which, case)
    inputs = found.inputs(NEW[:3])
    each = [["law"], ["math", "code"], list(EXPERTS)]
    routed = said(found.model, inputs, allowed=each)
    rows = [said(found.model, inputs, allowed=names) for names in each]
    for row in range(3):
        assert torch.equal(routed.probabilities[row], rows[row].probabilities[row])
        assert torch.equal(routed.weights[row], rows[row].weights[row])


@everywhere
def test_a_wrong_allowed_is_refused(which, case, fitted):
    model, inputs = fitted(which, case).model, fitted(which, case).inputs(NEW[:2])
    for allowed, message in [
        ("lwa", "no expert is called 'lwa'. Did you mean 'law'"),
        (["math", "chess"], "no expert is called 'chess'"),
        ([["math"]] * 3, "expected names for 2 rows, got 3"),
        ([["math"], []], "expected at least one expert of row 1, got none"),
        ([], "expected at least one expert, got none"),
    ]:
        with pytest.raises(InputError, match=message):
            model.routing(**inputs, allowed=allowed)
        with pytest.raises(InputError, match=message):
            model(**inputs, allowed=allowed)
    for given in ({"task": "math"}, {"weights": [1, 0, 0]}):
        with pytest.raises(InputError, match="allowed=: restricts what the router may choose"):
            model(**inputs, allowed="math", **given)


# --------------------------------------------------------------------------------- a forward


@pytest.fixture(scope="module")
def late(tmp_path_factory, encoder):
    """Artifacts by case whose experts differ from the base in the last block and the head only."""
    folder = tmp_path_factory.mktemp("late")
    torch.manual_seed(0)
    config = BERT_TEXT.config(**BERT_TEXT.sizes)
    base = BERT_TEXT.base(config)
    perturb(base, 0.05, "base")
    save(base, folder / "base")
    save_tokenizer(folder / "base")
    for name in EXPERTS:
        expert = BERT_TEXT.task(config)
        inherit(expert, base)
        perturb(expert.bert.encoder.layer[1], 0.05, name)
        save(expert, folder / name)
    merge(str(folder / "base"), {name: str(folder / name) for name in EXPERTS}, folder / "plain")
    made = {}

    def give(case: str, texts) -> Any:
        if case not in made:
            out = shutil.copytree(folder / "plain", folder / f"artifact {case}")
            fit_router(out, texts, settings_of(case, encoder))
            made[case] = load(out)
        return made[case]

    return give


@pytest.mark.parametrize("allowed", [None, ["law", "code"]], ids=["all", "some"])
@pytest.mark.parametrize("where", ["before it", "on the way"])
@pytest.mark.parametrize("case", [name for name in CASES if name != "projection"])
def test_a_forward_says_what_the_router_says_alone(case, where, allowed, late, bench):
    model = late(case, texts_of(case, bench))
    inputs = padded(model.tokenizer, NEW)
    model = halved(model, inputs)
    assert model.untouched_layers == 1
    read_alone = []
    read = model.router.read
    model.router.read = lambda *given: read_alone.append(0) or read(*given)
    if where == "before it":
        model.untouched_layers = -1
    output = model(**inputs, allowed=allowed)
    on_the_way = where == "on the way" and model.router.last <= 1
    assert len(read_alone) == (not on_the_way or not model.router.reads_hidden_states)
    want = model.routing(**inputs, allowed=allowed)
    assert_same(output.routed, want, close=1e-5)
    assert torch.equal(output.weights, output.routed.weights)
    kept, new = output.weights.argmax(dim=1), want.new
    assert torch.equal(output.expert[~new], kept[~new])
    assert torch.equal(output.expert[new], want.probabilities.argmax(dim=1)[new])
    heads = [EXPERTS[index] for index in output.expert]
    again = model(**inputs, weights=output.weights, head=heads)
    torch.testing.assert_close(output.logits, again.logits, rtol=1e-4, atol=1e-5)


@everywhere
def test_a_forward_whose_weights_are_given_asks_no_router(which, case, fitted):
    found = fitted(which, case)
    model, inputs = found.model, found.inputs(NEW[:2])
    assert model(**inputs, task="code").routed is None
    assert model(**inputs, weights=[0.2, 0.3, 0.5]).routed is None
    assert model(**inputs).routed is not None


# -------------------------------------------------------------------------- moved and copied


@everywhere
def test_saving_the_model_keeps_the_router_bit_for_bit(which, case, fitted, tmp_path):
    found = fitted(which, case)
    found.model.save_pretrained(tmp_path / "saved")
    names = [n for n in Artifact(found.folder).manifest.files if n.startswith(("router", ENCODER))]
    for name in (*names, *((EXAMPLES,) if "examples" in CASES[case] else ())):
        assert (tmp_path / "saved" / name).read_bytes() == (found.folder / name).read_bytes(), name
    again = load(tmp_path / "saved")
    inputs = found.inputs(NEW)
    assert_same(said(again, inputs), said(found.model, inputs))
    assert Artifact(tmp_path / "saved").examples() == Artifact(found.folder).examples()
    assert Artifact(tmp_path / "saved", check=True).manifest.router == found.model.manifest.router


@everywhere
def test_in_half_precision_the_router_stays_in_float32(which, case, fitted):
    found = fitted(which, case)
    inputs = found.inputs(NEW)
    half = load(found.folder, dtype=torch.bfloat16)
    for model in (half, copy.deepcopy(found.model).bfloat16(), copy.deepcopy(found.model).half()):
        assert model.dtype in (torch.bfloat16, torch.float16)
        for name, tensor in model.router.state_dict().items():
            assert tensor.dtype == torch.float32 or not tensor.is_floating_point(), name
            assert torch.equal(tensor, found.model.router.state_dict()[name]), name
        routed = model.routing(**inputs)
        assert routed.weights.dtype == routed.novelty.dtype == torch.float32
    if case in ("none", "an encoder"):  # they read nothing of the model's
        assert_same(half.routing(**inputs), said(found.model, inputs))


@everywhere
def test_copies_and_pickles_answer_alike(which, case, fitted):
    found = fitted(which, case)
    inputs = found.inputs(NEW)
    want = said(found.model, inputs)
    for model in (
        copy.deepcopy(found.model),
        pickle.loads(pickle.dumps(found.model)),
        copy.deepcopy(found.model).to("cpu").to(torch.float32),
    ):
        assert_same(said(model, inputs), want)


# ----------------------------------------------------------------------------- what is broken


def edited(folder: Path, change) -> None:
    data = json.loads((folder / MANIFEST).read_text())
    change(data)
    (folder / MANIFEST).write_text(json.dumps(data))


def admitted(folder: Path) -> None:
    """The manifest gets the digests of all files as they are now."""

    def change(data):
        for name in data["files"]:
            if (folder / name).is_file():
                data["files"][name] = record(folder / name).model_dump()

    edited(folder, change)


def cut_short(folder: Path) -> None:
    (folder / ROUTER).write_bytes((folder / ROUTER).read_bytes()[:-9])
    admitted(folder)


def no_safetensors(folder: Path) -> None:
    (folder / ROUTER).write_bytes(b"no such thing")
    admitted(folder)


def gone(folder: Path) -> None:
    (folder / ROUTER).unlink()
    edited(folder, lambda data: data["files"].pop(ROUTER))


def tensors_changed(change):
    def do(folder: Path) -> None:
        tensors = load_file(folder / ROUTER)
        change(tensors)
        save_file(tensors, folder / ROUTER, {"format": "pt"})
        admitted(folder)

    return do


def router_changed(**fields: Any):
    return lambda folder: edited(folder, lambda data: data["router"].update(fields))


BROKEN = {
    "gone": gone,
    "cut short": cut_short,
    "no safetensors": no_safetensors,
    "a tensor less": tensors_changed(lambda t: t.pop(min(t))),
    "a tensor more": tensors_changed(lambda t: t.update(more=torch.zeros(2))),
    "another shape": tensors_changed(lambda t: t.update({min(t): torch.zeros(7)})),
    "other experts": router_changed(experts=["code", "math", "law"]),
    "another base": router_changed(shared_sha256={"model.safetensors": "0" * 64}),
    "another kind": lambda folder: edited(
        folder,
        lambda data: data["router"].update(
            kind="prototype" if data["router"]["kind"] in ("none", "mlp") else "mlp"
        ),
    ),
}


@pytest.mark.parametrize(
    ("case", "how"),
    [
        *(("prototype", how) for how in BROKEN),
        *(
            pytest.param(case, how, marks=pytest.mark.slow)
            for case in CASES
            for how in ("cut short", "a tensor less", "another shape", "another kind")
            if case != "prototype"
        ),
    ],
)
def test_a_router_that_does_not_fit_is_not_used_and_can_be_fitted_again(
    case, how, fitted, tmp_path
):
    found = fitted("bench", case)
    folder = shutil.copytree(found.folder, tmp_path / "artifact")
    BROKEN[how](folder)
    model, inputs = load(folder), found.inputs(NEW)
    assert model.router is None
    assert model(task="math", **inputs).logits is not None
    with pytest.raises(RouterError, match="Run 'twinmerge fit-router' again"):
        model.routing(**inputs)
    with pytest.raises(RouterError, match="Run 'twinmerge fit-router' again"):
        model(**inputs)
    fit_router(folder, found.texts, found.settings)
    assert_same(said(load(folder), inputs), said(found.model, inputs))


@pytest.mark.parametrize("how", ["its weights are cut short", "its config is gone"])
def test_a_broken_encoder_is_not_used_and_can_be_fitted_again(how, fitted, tmp_path):
    found = fitted("bench", "an encoder")
    folder = shutil.copytree(found.folder, tmp_path / "artifact")
    if how == "its config is gone":
        (folder / ENCODER / "config.json").unlink()
        edited(folder, lambda data: data["files"].pop(f"{ENCODER}/config.json"))
    else:
        weights = folder / ENCODER / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-9])
        admitted(folder)
    model, inputs = load(folder), found.inputs(NEW)
    with pytest.raises(RouterError, match="Run 'twinmerge fit-router' again"):
        model.routing(**inputs)
    fit_router(folder, found.texts, found.settings)
    assert_same(said(load(folder), inputs), said(found.model, inputs))


def test_of_a_router_that_is_fitted_over_nothing_is_left(fitted, encoder, tmp_path):
    found = fitted("bench", "an encoder")
    folder = shutil.copytree(found.folder, tmp_path / "artifact")
    fit_router(folder, None, settings_of("none", encoder))
    assert not (folder / ENCODER).exists() and not (folder / EXAMPLES).exists()
    assert Artifact(folder, check=True).examples() == {}
    assert load(folder).router.novelty is None
