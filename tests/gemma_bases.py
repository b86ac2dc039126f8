"""Tiny PaliGemma 2 and Gemma 3 bases, with the processors of the releases, drawn from a seed.

As in the releases: the image token is a row of the head, PaliGemma has no chat template and its
language model caps its logits, and Gemma 3 sees through one window in most layers.
"""

import json
from collections.abc import Iterable
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import (
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3ImageProcessorPil,
    Gemma3Processor,
    GemmaTokenizer,
    GenerationConfig,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    PaliGemmaProcessor,
    SiglipImageProcessorPil,
)

from medft.demo.bases import tokenizer_corpus

SPECIALS = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]

# Renders what Gemma 3's template renders: a system turn becomes the start of the first user turn.
GEMMA3_TEMPLATE = """\
{{- bos_token }}
{%- set first = namespace(text='') %}
{%- if messages[0].role == 'system' %}
  {%- for part in messages[0].content %}{%- set first.text = part.text + '\\n\\n' %}{%- endfor %}
  {%- set messages = messages[1:] %}
{%- endif %}
{%- for message in messages %}
  {%- if (message.role == 'user') != (loop.index0 % 2 == 0) %}
    {{- raise_exception('roles must alternate') }}
  {%- endif %}
  {{- '<start_of_turn>' + ('model' if message.role == 'assistant' else message.role) + '\\n' }}
  {{- first.text if loop.first else '' }}
  {%- for part in message.content %}
    {%- if part.type == 'image' %}{{- '<start_of_image>' }}{%- else %}{{- part.text | trim }}
    {%- endif %}
  {%- endfor %}
  {{- '<end_of_turn>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<start_of_turn>model\\n' }}{%- endif %}
"""


def gemma_tokenizer(corpus: Iterable[str] = (), **attributes: object) -> GemmaTokenizer:
    """Gemma's BPE with 512 entries that falls back to bytes; special tokens come after them."""
    core = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    core.normalizer = normalizers.Replace(" ", "▁")
    core.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        special_tokens=[*SPECIALS, *(f"<0x{byte:02X}>" for byte in range(256))],
        show_progress=False,
    )
    core.train_from_iterator([*tokenizer_corpus(), "\n", "\n\n", *corpus], trainer)
    vocabulary = core.get_vocab()
    merges = [tuple(pair) for pair in json.loads(core.to_str())["model"]["merges"]]
    for filler in range(512 - len(vocabulary)):
        vocabulary[f"<unused{filler}>"] = len(vocabulary)
    return GemmaTokenizer(vocab=vocabulary, merges=merges, **attributes)


def build_paligemma(
    folder: Path, *, seed: int, image_size: int = 56, width: int = 64, corpus: Iterable[str] = ()
) -> Path:
    """A random PaliGemma 2 base: a SigLIP tower on Gemma 2, one token a patch."""
    patches = (image_size // 14) ** 2
    image_processor = SiglipImageProcessorPil(
        size={"height": image_size, "width": image_size}, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )
    image_processor.image_seq_length = patches
    tokenizer = gemma_tokenizer(corpus)
    tokenizer.add_tokens([f"<loc{i:0>4}>" for i in range(1024)])
    tokenizer.add_tokens([f"<seg{i:0>3}>" for i in range(128)])
    processor = PaliGemmaProcessor(image_processor, tokenizer)
    config = PaliGemmaConfig(
        vision_config={"model_type": "siglip_vision_model", **_vision(image_size, width)},
        text_config={
            "model_type": "gemma2",
            **_text(width, len(tokenizer) + 63, layers=3),
            "sliding_window": 4096,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 4.0,
        },
        image_token_index=processor.image_token_id,
        projection_dim=width,
        hidden_size=width,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = PaliGemmaForConditionalGeneration(config)
    model.generation_config = GenerationConfig(bos_token_id=2, eos_token_id=1, pad_token_id=0)
    return _save(folder, model, processor)


def build_gemma3(
    folder: Path, *, seed: int, image_size: int = 56, width: int = 64, corpus: Iterable[str] = ()
) -> Path:
    """A random Gemma 3 base (MedGemma's architecture), four tokens an image."""
    image_processor = Gemma3ImageProcessorPil(
        size={"height": image_size, "width": image_size}, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )
    names = {
        "boi_token": "<start_of_image>",
        "eoi_token": "<end_of_image>",
        "image_token": "<image_soft_token>",
    }
    tokenizer = gemma_tokenizer(corpus, extra_special_tokens=names)
    tokenizer.add_tokens(["<start_of_turn>", "<end_of_turn>"], special_tokens=True)
    processor = Gemma3Processor(
        image_processor, tokenizer, chat_template=GEMMA3_TEMPLATE, image_seq_length=4
    )
    end_of_turn = tokenizer.convert_tokens_to_ids("<end_of_turn>")
    config = Gemma3Config(
        vision_config=_vision(image_size, width),
        text_config={
            **_text(width, len(tokenizer) + 64, layers=3),
            "sliding_window": 16,
            "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
        },
        mm_tokens_per_image=4,
        boi_token_index=tokenizer.boi_token_id,
        eoi_token_index=tokenizer.eoi_token_id,
        image_token_index=tokenizer.image_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Gemma3ForConditionalGeneration(config)
        torch.nn.init.normal_(model.model.multi_modal_projector.mm_input_projection_weight, std=0.1)
    model.generation_config = GenerationConfig(
        bos_token_id=2, eos_token_id=[1, end_of_turn], pad_token_id=0
    )
    return _save(folder, model, processor)


def _save(folder: Path, model: torch.nn.Module, processor: object) -> Path:
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def _vision(size: int, width: int) -> dict:
    return {
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "image_size": size,
        "patch_size": 14,
        "vision_use_head": False,
    }


def _text(width: int, rows: int, layers: int) -> dict:
    return {
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": width // 4,
        "query_pre_attn_scalar": width // 4,
        "vocab_size": rows,
        "max_position_embeddings": 2048,
        "initializer_range": 0.15,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "bos_token_id": 2,
    }
