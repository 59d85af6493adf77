"""The architectures of the conformance suite: how to make a base of two blocks, and its experts.

A family joins every test of the suite by its entry here. `FAMILIES` are the usual ones, which other
tests use too; `MORE` are the rest. Classes and configurations are transformers' own.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import transformers as tf

VOCABULARY = 40
TEXT = dict(vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=2, num_attention_heads=2)
BERT = TEXT | dict(intermediate_size=24, max_position_embeddings=14, initializer_range=0.2)
LLAMA = TEXT | dict(
    intermediate_size=24, initializer_range=0.2, pad_token_id=0, bos_token_id=1, eos_token_id=2
)
DISTILBERT = dict(
    vocab_size=VOCABULARY, dim=16, hidden_dim=24, n_layers=2, n_heads=2, initializer_range=0.2
)
GPT2 = dict(
    vocab_size=VOCABULARY, n_embd=16, n_layer=2, n_head=2, n_positions=32, initializer_range=0.2
)
VIT = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24)
VIT |= dict(image_size=8, patch_size=4, initializer_range=0.2)
GQA = dict(num_key_value_heads=1, head_dim=8)

ROBERTA = BERT | dict(pad_token_id=1, type_vocab_size=1)
DEBERTA = BERT | dict(
    relative_attention=True,
    pos_att_type=["p2c", "c2p"],
    position_buckets=4,
    norm_rel_ebd="layer_norm",
    share_att_key=True,
    position_biased_input=False,
)
MODERNBERT = LLAMA | dict(cls_token_id=1, sep_token_id=2, local_attention=4)
CLIP_TEXT = BERT | dict(projection_dim=8, pad_token_id=0, bos_token_id=1, eos_token_id=39)
CLIP_VISION = VIT | dict(projection_dim=8)
STAGES = dict(hidden_sizes=[8, 16], depths=[1, 1])
CONVNEXT = STAGES | dict(
    num_stages=2, patch_size=2, image_size=16, initializer_range=0.2, layer_scale_init_value=0.5
)
EFFICIENTNET = dict(
    image_size=16,
    width_coefficient=0.25,
    depth_coefficient=1.0,
    kernel_sizes=[3, 5],
    in_channels=[32, 16],
    out_channels=[16, 32],
    strides=[1, 2],
    num_block_repeats=[1, 2],
    expand_ratios=[1, 2],
    hidden_dim=320,
    initializer_range=0.2,
)
MISTRAL = LLAMA | GQA | dict(sliding_window=4)
NEOX = LLAMA | dict(rotary_pct=0.5, tie_word_embeddings=False)
GEMMA3 = LLAMA | GQA | dict(sliding_window=4, query_pre_attn_scalar=8)
GEMMA3 |= dict(layer_types=["sliding_attention", "full_attention"])
MIXTRAL = LLAMA | GQA | dict(num_local_experts=4, num_experts_per_tok=2)
QWEN3_MOE = LLAMA | GQA | dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=8)
MARKS = dict(pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=0)
T5 = dict(vocab_size=VOCABULARY, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2)
T5 |= MARKS | dict(relative_attention_num_buckets=8, relative_attention_max_distance=6)
BART = dict(vocab_size=VOCABULARY, d_model=16, encoder_layers=2, decoder_layers=2, init_std=0.2)
BART |= dict(encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=24)
BART |= MARKS | dict(decoder_ffn_dim=24, max_position_embeddings=32, forced_eos_token_id=None)


@dataclass(frozen=True)
class Family:
    """How to make one architecture's base and experts."""

    base: Any
    task: Any
    config: Any
    sizes: dict[str, Any]
    heads: tuple[int, ...] | None = None
    """Outputs of each expert's own head; None where the base has the head too."""
    expert_sizes: dict[str, Any] = field(default_factory=dict)
    ends: int | None = None
    """The end token, for models that read their answer off it: it closes every row."""
    blocks: bool = True
    """Whether there is a list of blocks to read router features from."""

    @property
    def generates(self) -> bool:
        return self.causal or "ConditionalGeneration" in self.task.__name__

    @property
    def causal(self) -> bool:
        return "CausalLM" in self.task.__name__ or "LMHead" in self.task.__name__

    @property
    def decoder(self) -> bool:
        """Whether a decoder answers what an encoder has read."""
        return bool(self.config(**self.sizes).is_encoder_decoder)

    @property
    def text(self) -> bool:
        return not self.image or self.image_and_text

    @property
    def image(self) -> bool:
        return self.task.main_input_name == "pixel_values" or self.image_and_text

    @property
    def image_and_text(self) -> bool:
        return self.config is tf.CLIPConfig

    @property
    def image_size(self) -> int:
        config = self.config(**self.sizes)
        return getattr(getattr(config, "vision_config", config), "image_size", 16)


def _classifies(name: str, sizes: dict[str, Any], heads=(2, 3, 1), **more: Any) -> Family:
    """A sequence classifier."""
    base, task = getattr(tf, f"{name}Model"), getattr(tf, f"{name}ForSequenceClassification")
    return Family(base, task, getattr(tf, f"{name}Config"), sizes, heads=heads, **more)


def _sees(name: str, sizes: dict[str, Any], **more: Any) -> Family:
    """An image classifier whose heads have 2, 3 and 4 outputs."""
    base, task = getattr(tf, f"{name}Model"), getattr(tf, f"{name}ForImageClassification")
    return Family(base, task, getattr(tf, f"{name}Config"), sizes, heads=(2, 3, 4), **more)


def _same(task: Any, config: Any, sizes: dict[str, Any], **more: Any) -> Family:
    """Base and experts of one class: language models and embedders."""
    return Family(task, task, config, sizes, **more)


FAMILIES: dict[str, Family] = {
    "bert": _classifies("Bert", BERT),
    "bert tokens": Family(
        tf.BertModel, tf.BertForTokenClassification, tf.BertConfig, BERT, heads=(2, 3, 5)
    ),
    "roberta": _classifies("Roberta", ROBERTA),
    "distilbert": _classifies("DistilBert", DISTILBERT),
    "vit": _sees("ViT", VIT),
    "llama": _same(tf.LlamaForCausalLM, tf.LlamaConfig, LLAMA | GQA),
    "llama tied": _same(
        tf.LlamaForCausalLM, tf.LlamaConfig, LLAMA | dict(tie_word_embeddings=True)
    ),
    "llama classifier": Family(
        tf.LlamaForCausalLM,
        tf.LlamaForSequenceClassification,
        tf.LlamaConfig,
        LLAMA,
        heads=(2, 3, 1),
    ),
    "gpt2": _same(
        tf.GPT2LMHeadModel,
        tf.GPT2Config,
        GPT2 | dict(bos_token_id=1, eos_token_id=2, pad_token_id=0),
    ),
    "qwen3": _same(tf.Qwen3ForCausalLM, tf.Qwen3Config, LLAMA | GQA),
    "gemma": _same(tf.GemmaForCausalLM, tf.GemmaConfig, LLAMA | GQA),
}

MORE: dict[str, Family] = {
    # text encoders
    "bert answers": Family(
        tf.BertModel, tf.BertForQuestionAnswering, tf.BertConfig, BERT, heads=(2, 2, 2)
    ),
    "bert embeds": _same(tf.BertModel, tf.BertConfig, BERT),
    "mpnet": _classifies("MPNet", BERT | dict(pad_token_id=1)),
    "mpnet embeds": _same(tf.MPNetModel, tf.MPNetConfig, BERT | dict(pad_token_id=1)),
    "deberta": _classifies("DebertaV2", DEBERTA),
    "deberta keys": _classifies(
        "DebertaV2", DEBERTA | dict(share_att_key=False, conv_kernel_size=3)
    ),
    "electra": _classifies("Electra", BERT | dict(embedding_size=8)),
    "modernbert": _classifies("ModernBert", MODERNBERT),
    # vision
    "dinov2": _sees("Dinov2", VIT | dict(mlp_ratio=2)),
    "convnext": _sees("ConvNext", CONVNEXT, blocks=False),
    "resnet": _sees(
        "ResNet", STAGES | dict(embedding_size=8, layer_type="bottleneck"), blocks=False
    ),
    "efficientnet": _sees("EfficientNet", EFFICIENTNET, blocks=False),
    "clip text": _same(tf.CLIPTextModelWithProjection, tf.CLIPTextConfig, CLIP_TEXT, ends=39),
    "clip vision": _same(tf.CLIPVisionModelWithProjection, tf.CLIPVisionConfig, CLIP_VISION),
    "clip": _same(
        tf.CLIPModel,
        tf.CLIPConfig,
        dict(text_config=CLIP_TEXT, vision_config=CLIP_VISION, projection_dim=8),
        ends=39,
    ),
    # decoders
    "mistral": _same(tf.MistralForCausalLM, tf.MistralConfig, MISTRAL),
    "qwen2": _same(tf.Qwen2ForCausalLM, tf.Qwen2Config, LLAMA | GQA),
    "gemma3": _same(tf.Gemma3ForCausalLM, tf.Gemma3TextConfig, GEMMA3),
    "phi3": _same(tf.Phi3ForCausalLM, tf.Phi3Config, LLAMA),
    "neox": _same(tf.GPTNeoXForCausalLM, tf.GPTNeoXConfig, NEOX),
    "olmo2": _same(tf.Olmo2ForCausalLM, tf.Olmo2Config, LLAMA),
    "mixtral": _same(tf.MixtralForCausalLM, tf.MixtralConfig, MIXTRAL),
    "qwen3 moe": _same(tf.Qwen3MoeForCausalLM, tf.Qwen3MoeConfig, QWEN3_MOE),
    # encoder-decoders
    "t5": _same(tf.T5ForConditionalGeneration, tf.T5Config, T5),
    "t5 untied": _same(
        tf.T5ForConditionalGeneration,
        tf.T5Config,
        T5 | dict(tie_word_embeddings=False, feed_forward_proj="gated-gelu"),
    ),
    "t5 classifier": _classifies("T5", T5, ends=2),
    "bart": _same(tf.BartForConditionalGeneration, tf.BartConfig, BART),
    # Two labels, transformers' default, are not saved, and read back as three, BART's default.
    "bart classifier": _classifies("Bart", BART, heads=(4, 3, 1), ends=2),
}

EVERY = FAMILIES | MORE
