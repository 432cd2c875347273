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

    config = GPT2Config(
        vocab_size=vocabulary,
        n_positions=context,
        n_embd=width,
        n_layer=2,
        n_head=2,
        bos_token_id=256,
        eos_token_id=256,
    )
    return _save(GPT2LMHeadModel, config, folder, seed)


def save_llama(
    folder: Path, *, vocabulary: int = WORDS, context: int = 96, seed: int = 0, tokenizer: Any = None
) -> Path:
    """Two layers of four query heads that share two key-value heads, rotary positions, head and embeddings untied.
    tokenizer: another than of bytes.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    end = 256 if tokenizer is None else tokenizer.eos_token_id
    config = LlamaConfig(
        vocab_size=vocabulary if tokenizer is None else len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=context,
        bos_token_id=end,
        eos_token_id=end,
        tie_word_embeddings=False,
    )
    return _save(LlamaForCausalLM, config, folder, seed, tokenizer)


def save_qwen2(folder: Path, *, vocabulary: int = WORDS, context: int = 96, seed: int = 0) -> Path:
    """Like the Llama, with biases, one key-value head, and head and embeddings tied."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(
        vocab_size=vocabulary,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=1,
        max_position_embeddings=context,
        bos_token_id=256,
        eos_token_id=256,
        tie_word_embeddings=True,
    )
    return _save(Qwen2ForCausalLM, config, folder, seed)


def _save(kind: Any, config: Any, folder: Path, seed: int, tokenizer: Any = None) -> Path:
    """Weights ten times as large as usual, so that the distributions are far from uniform and a wrong mask shows."""
    torch.manual_seed(seed)
    model = kind(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(10)
    model.save_pretrained(folder)
    (byte_tokenizer() if tokenizer is None else tokenizer).save_pretrained(folder)
    return folder


def piece_tokenizer(
    *, scheme: str = "always", begins: bool = True, ends: bool = False, special: tuple[str, ...] = ()
) -> Any:
    """A SentencePiece-like tokenizer as Llama's: words begin with `▁`, whose first one is not decoded; other bytes are
    tokens; `<s>` is put before a text.

    scheme: where a space is put that was not there: always, first (at the beginning alone), never, or legacy (as a
    normalizer does it). begins, ends: whether `<s>` and `</s>` are put around a text. special: further special tokens.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *map(chr, range(33, 127))]
    merges = [("▁", "S"), ("▁", "t"), ("▁S", "u")]
    words = {name: number for number, name in enumerate([*names, *map("".join, merges)])}
    tokenizer = Tokenizer(models.BPE(vocab=words, merges=merges, byte_fallback=True, unk_token="<unk>"))
    if scheme == "legacy":
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme=scheme, split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    if begins:
        around = [("<s>", 1), ("</s>", 2)]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"<s> $A{' </s>' if ends else ''}", special_tokens=around
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=list(special),
    )
