"""Text encoders of the `transformers` library, tiny and random, with a word for a token."""

from pathlib import Path

import pytest
import torch

WORDS = ["a", "seven", "moving", "left", "three", "and", "two", "eine", "große", "Acht"]


def save_clip(folder: Path) -> Path:
    """As `save_pretrained` leaves it; 8 positions, 16 wide. Skips the test where the library is missing."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    _save_tokenizer(folder, ["<|startoftext|>", "<|endoftext|>"], "<|startoftext|> $A <|endoftext|>", "<|endoftext|>")
    config = transformers.CLIPTextConfig(
        vocab_size=13,
        hidden_size=16,
        intermediate_size=32,
        projection_dim=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=8,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    transformers.CLIPTextModel(config).save_pretrained(folder)
    return folder


def save_t5(folder: Path) -> Path:
    """As `save_pretrained` leaves it; 16 wide. Skips the test where the library is missing."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    _save_tokenizer(folder, ["<pad>", "</s>"], "$A </s>", "<pad>")
    config = transformers.T5Config(
        vocab_size=13, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, feed_forward_proj="gated-gelu"
    )
    transformers.T5EncoderModel(config).save_pretrained(folder)
    return folder


def _save_tokenizer(folder: Path, special: list[str], template: str, padding: str) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = {word: i for i, word in enumerate([*special, "<unk>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=template, special_tokens=[(token, words[token]) for token in special]
    )
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=padding, unk_token="<unk>").save_pretrained(folder)
