"""Tiny base models of the real architectures, with real processors, built from a seed.

Their weights are random, never trained, and hold no data: enough to run every line of the pipeline
on a CPU in seconds. What matters for correctness is as in the released models: the id of
`<|image|>` is one past the last row of Mllama's head, SigLIP pads with `</s>` to 64 positions, its
learned scale and bias are not zero, and the image processors are the Pillow ones.
"""

import io
import math
from collections.abc import Iterable
from pathlib import Path

import sentencepiece
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    GenerationConfig,
    MllamaConfig,
    MllamaForConditionalGeneration,
    MllamaImageProcessorPil,
    MllamaProcessor,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    ProcessorMixin,
    SiglipConfig,
    SiglipImageProcessorPil,
    SiglipModel,
    SiglipProcessor,
    SiglipTokenizer,
)

from medft.compat import mllama_aspect_ratios

DECODER_VOCABULARY = 512
"""Rows of the tiny decoder's head; the image token's id is this number."""

# How text is split into words. Source: the pattern of Llama 3's tokenizer.json.
_LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LLAMA3_SPECIALS = [
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|finetune_right_pad_id|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eom_id|>",
    "<|eot_id|>",
    "<|python_tag|>",
]

# Renders what Llama 3.2 Vision's template renders for conversations without tools: a system turn
# with today's date where there is no image, none where there is one.
_LLAMA3_TEMPLATE = """\
{{- bos_token }}
{%- set seen = namespace(image=false) %}
{%- for message in messages %}
  {%- if message.content is not string %}
    {%- for part in message.content %}
      {%- if part.type == 'image' %}{%- set seen.image = true %}{%- endif %}
    {%- endfor %}
  {%- endif %}
{%- endfor %}
{%- if messages[0].role == 'system' %}
  {%- if seen.image %}{{- raise_exception('images and a system turn') }}{%- endif %}
{%- elif not seen.image %}
  {%- if date_string is not defined %}{%- set date_string = strftime_now('%d %b %Y') %}{%- endif %}
  {{- '<|start_header_id|>system<|end_header_id|>\\n\\nToday Date: ' + date_string + '<|eot_id|>' }}
{%- endif %}
{%- for message in messages %}
  {{- '<|start_header_id|>' + message.role + '<|end_header_id|>\\n\\n' }}
  {%- if message.content is string %}
    {{- message.content }}
  {%- else %}
    {%- for part in message.content %}
      {%- if part.type == 'image' %}{{- '<|image|>' }}{%- else %}{{- part.text }}{%- endif %}
    {%- endfor %}
  {%- endif %}
  {{- '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
  {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""

_WORDS = [
    "a", "an", "and", "are", "area", "at", "axial", "both", "bone", "brain", "bright", "centre",
    "chest", "clear", "contrast", "ct", "dark", "describe", "disc", "discs", "does", "effusion",
    "evidence", "field", "finding", "findings", "fracture", "head", "heart", "image", "in", "is",
    "knee", "large", "left", "lesion", "level", "lobe", "lower", "lung", "lungs", "medical",
    "middle", "moderate", "mri", "no", "normal", "not", "nodule", "of", "on", "one", "or",
    "pleural", "pneumothorax", "quadrant", "question", "red", "right", "round", "scan", "seen",
    "shows", "side", "single", "size", "skin", "slice", "small", "soft", "square", "squares",
    "study", "the", "there", "this", "three", "tissue", "two", "upper", "view", "visible", "what",
    "where", "which", "white", "with", "within", "x-ray", "yes",
]  # fmt: skip


def tokenizer_corpus() -> list[str]:
    """Sentences that cover every printable ASCII character and the words of plain reports."""
    characters = [chr(code) * 3 for code in range(32, 127)]
    pairs = [f"{first} {second}." for first in _WORDS for second in _WORDS[::7]]
    breaks = ["a\n\nb"] * 1000  # makes \n\n one token, as in the release, where a prompt ends in it
    return [*characters, *(word.capitalize() for word in _WORDS), *pairs, *breaks]


def decoder_tokenizer(corpus: Iterable[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with Llama 3's splitting and special tokens, 513 entries."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_LLAMA3_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=DECODER_VOCABULARY - len(_LLAMA3_SPECIALS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(corpus, trainer)
    missing = DECODER_VOCABULARY - len(_LLAMA3_SPECIALS) - core.get_vocab_size()
    reserved = [f"<|reserved_special_token_{i}|>" for i in range(missing)]
    core.add_special_tokens([*_LLAMA3_SPECIALS, *reserved, "<|image|>"])
    bos = "<|begin_of_text|>"
    core.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, core.token_to_id(bos))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token=bos,
        eos_token="<|eot_id|>",
        pad_token="<|finetune_right_pad_id|>",
        model_input_names=["input_ids", "attention_mask"],
        padding_side="right",
        chat_template=_LLAMA3_TEMPLATE,
    )


def build_decoder(
    folder: Path,
    *,
    seed: int,
    tile: int = 56,
    max_tiles: int = 4,
    width: int = 64,
    layers: int = 4,
    corpus: Iterable[str] = (),
) -> Path:
    """Write a random Mllama base of half a million parameters or more, for `from_pretrained`.

    Args:
        folder: created; must not exist.
        seed: of the random weights.
        tile: side of a square tile in pixels, a multiple of 14.
        max_tiles: maximum number of tiles of an image.
        width: hidden width of tower and language model, a multiple of 64 (one NF4 block).
        layers: of the language model; every second one attends to the image.
        corpus: sentences whose words should become single tokens.
    """
    tokenizer = decoder_tokenizer([*tokenizer_corpus(), *corpus])
    token = tokenizer.convert_tokens_to_ids
    config = MllamaConfig(
        vision_config={
            "hidden_size": width,
            "intermediate_size": 2 * width,
            "num_hidden_layers": 3,
            "num_global_layers": 1,
            "attention_heads": 4,
            "image_size": tile,
            "patch_size": 14,
            "max_num_tiles": max_tiles,
            "supported_aspect_ratios": [list(r) for r in mllama_aspect_ratios(max_tiles)],
            "intermediate_layers_indices": [1],
            "vision_output_dim": 2 * width,
            "initializer_range": 0.08,
        },
        text_config={
            "hidden_size": width,
            "intermediate_size": 2 * width,
            "num_hidden_layers": layers,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "cross_attention_layers": list(range(1, layers, 2)),
            "vocab_size": DECODER_VOCABULARY,
            "max_position_embeddings": 2048,
            "initializer_range": 0.06,
            "bos_token_id": token("<|begin_of_text|>"),
            "eos_token_id": token("<|eot_id|>"),
            "pad_token_id": token("<|finetune_right_pad_id|>"),
        },
        image_token_index=token("<|image|>"),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = MllamaForConditionalGeneration(config)
        for name, weight in model.named_parameters():
            if "gate" in name.rpartition(".")[2]:
                torch.nn.init.constant_(weight, 0.5)  # released gates are open, new ones zero
    model.generation_config = GenerationConfig(
        bos_token_id=token("<|begin_of_text|>"),
        eos_token_id=[token("<|end_of_text|>"), token("<|eom_id|>"), token("<|eot_id|>")],
        pad_token_id=token("<|finetune_right_pad_id|>"),
    )
    image_processor = MllamaImageProcessorPil(
        size={"height": tile, "width": tile}, max_image_tiles=max_tiles
    )
    processor = MllamaProcessor(image_processor, tokenizer, chat_template=tokenizer.chat_template)
    return _save(folder, model, processor)


def siglip_tokenizer(corpus: Iterable[str], folder: Path) -> SiglipTokenizer:
    """A sentencepiece tokenizer as SigLIP's: lower case, `<pad>` 0, `</s>` 1, `<unk>` 2."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentence.lower() for sentence in corpus),
        model_writer=model,
        vocab_size=320,
        hard_vocab_limit=False,
        character_coverage=1.0,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        num_threads=1,
        minloglevel=2,
    )
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = folder / "spiece.model"
    vocabulary.write_bytes(model.getvalue())
    return SiglipTokenizer(str(vocabulary))


def build_siglip(
    folder: Path,
    *,
    seed: int,
    image_size: int = 56,
    width: int = 64,
    layers: int = 2,
    positions: int = 64,
    corpus: Iterable[str] = (),
) -> Path:
    """Write a random SigLIP base of 200 thousand parameters or more, for `from_pretrained`.

    Args:
        folder: created; must not exist.
        seed: of the random weights.
        image_size: side of the square input in pixels, a multiple of 14.
        width: hidden width of both towers.
        layers: of each tower.
        positions: tokens of a text, padding included.
        corpus: sentences whose words should become single tokens.
    """
    tokenizer = siglip_tokenizer([*tokenizer_corpus(), *corpus], folder)
    tower = {
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
    }
    config = SiglipConfig(
        vision_config={**tower, "image_size": image_size, "patch_size": 14},
        text_config={
            **tower,
            "vocab_size": tokenizer.vocab_size,
            "max_position_embeddings": positions,
            "projection_size": width,
            "bos_token_id": None,
            "eos_token_id": 1,
            "pad_token_id": 1,
        },
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = SiglipModel(config)
        torch.nn.init.constant_(model.logit_scale, math.log(10))
        torch.nn.init.constant_(model.logit_bias, -10)
    image_processor = SiglipImageProcessorPil(
        size={"height": image_size, "width": image_size}, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )
    return _save(folder, model, SiglipProcessor(image_processor, tokenizer))


def _save(folder: Path, model: PreTrainedModel, processor: ProcessorMixin) -> Path:
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder
