"""Tiny causal LMs with random weights and a byte-level tokenizer, saved as `from_pretrained` reads them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

WORDS = 257  # 256 bytes and the end-of-text token


def byte_tokenizer() -> Any:
    """One token a byte, and `<|endoftext|>`, id 256."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>")


def save_gpt2(folder: Path, *, vocabulary: int = WORDS, context: int = 96, width: int = 32, seed: int = 0) -> Path:
    """Two layers of two heads."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=vocabulary, n_positions=context, n_embd=width, n_layer=2, n_head=2, bos_token_id=256, eos_token_id=256)
    return _save(GPT2LMHeadModel, config, folder, seed)


def save_llama(folder: Path, *, vocabulary: int = WORDS, context: int = 96, seed: int = 0) -> Path:
    """Two layers of four query heads that share two key-value heads, rotary positions, head and embeddings untied."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=context, bos_token_id=256, eos_token_id=256, tie_word_embeddings=False,
    )  # fmt: skip
    return _save(LlamaForCausalLM, config, folder, seed)


def save_qwen2(folder: Path, *, vocabulary: int = WORDS, context: int = 96, seed: int = 0) -> Path:
    """Like the Llama, with biases, one key-value head, and head and embeddings tied."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(
        vocab_size=vocabulary, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=1,
        max_position_embeddings=context, bos_token_id=256, eos_token_id=256, tie_word_embeddings=True,
    )  # fmt: skip
    return _save(Qwen2ForCausalLM, config, folder, seed)


def _save(kind: Any, config: Any, folder: Path, seed: int) -> Path:
    """Weights ten times as large as usual, so that the distributions are far from uniform and a wrong mask shows."""
    torch.manual_seed(seed)
    model = kind(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(10)
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder
