"""Router features of every architecture: the same alone, in a batch, and padded."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from families import EVERY
from torch import nn

from twinmerge.errors import UnsupportedModel
from twinmerge.runtime.parts import PartList
from twinmerge.runtime.router.features import FeatureReader, find_blocks, keys

NO_BLOCKS = ["albert"]
MOVED = {"bert", "bert tokens", "bert answers", "bert embeds", "distilbert", "electra"}
MOVED |= {"clip text", "clip", "bart", "bart classifier"}
"""These number positions from the first column, padding included: other positions, other states."""

FIRST = (1, "mean")


def model_of(name: str):
    family = EVERY[name]
    torch.manual_seed(0)
    return family.task(family.config(**family.sizes)).eval()


def inputs_of(name: str, rows: int = 3) -> dict[str, torch.Tensor]:
    family, draw = EVERY[name], torch.Generator().manual_seed(1)
    inputs = {}
    if family.text:
        inputs["input_ids"] = torch.randint(3, 39, (rows, 7), generator=draw)
        if family.ends is not None:
            inputs["input_ids"][:, -1] = family.ends
        inputs["attention_mask"] = torch.ones(rows, 7, dtype=torch.long)
    if family.image:
        size = family.image_size
        inputs["pixel_values"] = torch.randn(rows, 3, size, size, generator=draw)
    return inputs


def read_all(reader: FeatureReader, inputs) -> list[torch.Tensor]:
    wanted = keys(range(reader.layers + 1))
    found = reader.read(inputs, wanted)
    return [found[key] for key in wanted]


@pytest.mark.parametrize("name", sorted(set(EVERY) - set(NO_BLOCKS)))
def test_features_do_not_depend_on_batch_or_padding(name):
    reader, inputs = FeatureReader(model_of(name)), inputs_of(name)
    together = read_all(reader, inputs)
    assert len(together) >= 3 and all(each.shape[0] == 3 for each in together)
    assert all(each.dtype == torch.float32 and each.ndim == 2 for each in together)
    assert not torch.equal(together[-1][0], together[-1][1])
    for index in range(3):
        alone = read_all(reader, {key: value[index][None] for key, value in inputs.items()})
        for one, all_ in zip(alone, together, strict=True):
            torch.testing.assert_close(one[0], all_[index], rtol=1e-4, atol=1e-5)
    if "input_ids" not in inputs:
        return
    padding = EVERY[name].sizes.get("pad_token_id") or 0
    for side in ("right",) if name in MOVED else ("right", "left"):
        padded = dict(inputs)
        for key, fill in (("input_ids", padding), ("attention_mask", 0)):
            more = torch.full((3, 3), fill)
            pair = [inputs[key], more] if side == "right" else [more, inputs[key]]
            padded[key] = torch.cat(pair, dim=1)
        for one, want in zip(read_all(reader, padded), together, strict=True):
            torch.testing.assert_close(one, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["t5", "bart", "t5 classifier"])
def test_an_encoder_decoder_is_read_in_its_encoder_alone(name):
    model = model_of(name)
    reader, calls = FeatureReader(model), []
    decoder = next(m for n, m in model.named_modules() if n.endswith("decoder"))
    decoder.register_forward_hook(lambda *_: calls.append("decoder"))
    found = reader.read(inputs_of(name), keys([reader.layers]))
    assert calls == [] and found[2, "mean"].shape == (3, 16)
    encoder = model.get_encoder()
    assert all(any(block is m for m in encoder.modules()) for block in reader.blocks)


@pytest.mark.parametrize(("name", "widths"), [("convnext", [8, 8, 16]), ("resnet", [8, 8, 16])])
def test_a_stage_of_a_convolutional_model_is_a_layer(name, widths):
    reader, inputs, maps = FeatureReader(model_of(name)), inputs_of(name), []
    hooks = [b.register_forward_hook(lambda *given: maps.append(given[-1])) for b in reader.blocks]
    reader.model(**inputs)
    for hook in hooks:
        hook.remove()
    found = read_all(reader, inputs)
    assert [each.shape[1] for each in found] == widths
    for each, want in zip(found[1:], maps, strict=True):
        torch.testing.assert_close(each, want.mean(dim=(2, 3)))


def test_a_model_of_two_towers_is_read_in_the_one_that_has_an_input():
    reader, inputs = FeatureReader(model_of("clip")), inputs_of("clip")
    image = {"pixel_values": inputs["pixel_values"]}
    text = {key: inputs[key] for key in ("input_ids", "attention_mask")}
    by_text, by_image = (reader.read(given, [FIRST])[FIRST] for given in (text, image))
    assert torch.equal(reader.read(inputs, [FIRST])[FIRST], by_text)
    assert not torch.allclose(by_text, by_image, atol=1e-2)
    vision = FeatureReader(model_of("clip").vision_model)
    torch.testing.assert_close(vision.read(image, [FIRST])[FIRST], by_image)


def test_lists_within_our_own_layers_are_not_taken_for_blocks():
    model = model_of("bert")
    blocks = find_blocks(model)[0]
    embedding = model.get_submodule("bert.embeddings.word_embeddings")
    parts = nn.ModuleDict({"weight": PartList([])})
    embedding.twin_mixers = parts  # type: ignore[assignment]
    parts["weight"].extend([nn.Identity(), nn.Identity()])  # two, as many as there are blocks
    assert find_blocks(model)[0] == blocks


def test_what_stands_at_padded_positions_does_not_matter_even_if_it_is_no_number():
    reader, inputs = FeatureReader(model_of("bert")), inputs_of("bert")
    inputs["attention_mask"][:, 5:] = 0
    want = read_all(reader, inputs)[0]

    def spoil(module, args, output):
        output[:, 5:] = float("nan")
        return output

    reader.model.get_submodule("bert.embeddings").register_forward_hook(spoil)
    torch.testing.assert_close(reader.read(inputs, keys([0]))[0, "mean"], want)


def test_watching_calls_once_before_the_next_block_and_lets_the_forward_go_on():
    reader, inputs = FeatureReader(model_of("bert")), inputs_of("bert")
    seen, calls = [], []
    reader.blocks[1].register_forward_hook(lambda *_: calls.append(len(seen)))
    with torch.no_grad(), reader.watching(inputs, [FIRST], lambda found: seen.append(found[FIRST])):
        for _ in range(2):  # a second forward within it is not watched
            output = reader.model(**inputs)
    assert output.logits.shape[0] == 3 and calls == [1, 1] and len(seen) == 1
    torch.testing.assert_close(seen[0], reader.read(inputs, [FIRST])[FIRST])
    with pytest.raises(UnsupportedModel, match="a forward did not come past layer 1"):
        with reader.watching(inputs, [FIRST], lambda found: None):
            pass


def test_a_reader_is_copied_and_pickled_with_its_model():
    reader, inputs = FeatureReader(model_of("bert")), inputs_of("bert")
    want = read_all(reader, inputs)
    for other in (copy.deepcopy(reader), pickle.loads(pickle.dumps(reader))):
        for one, each in zip(read_all(other, inputs), want, strict=True):
            assert torch.equal(one, each)
