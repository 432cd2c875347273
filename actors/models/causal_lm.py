"""A Hugging Face causal LM as policy, critic and reference; loading and checks.

Shapes: B rows, T tokens, N chosen positions over the whole micro-batch, D width, V vocabulary.

Rows are right-padded, so with causal attention real tokens never see padding, and no mask is needed. Only action tokens
go through the output head. So there is no loss at a prompt or padding token that a mask would have to remove, and no
NaN * 0. Where sequences share a line, a mask keeps them apart (`packing.py`).
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from actors.hub import is_path
from actors.models.context import longest_text
from actors.models.loading import check_names, load_exactly
from actors.models.packing import block_causal
from actors.models.suppressed import check_suppressed, suppress, suppressed_tokens
from actors.models.tokenizer import first_line, load_tokenizer, quiet_transformers, unreadable

if TYPE_CHECKING:
    from transformers import PreTrainedModel


Entropy = Literal["none", "value", "gradient"]
CAUSAL_LM = "model.path: must be a folder or hub name of a causal language model"
REMEDY = "choose a model of another family, such as Llama, Qwen2, Mistral or GPT-2"


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenInputs:
    """A micro-batch as the model takes it.

    Token `targets[n]` was chosen in the state at flat position `states[n]` of the (B, T) grid, one before its own.
    """

    input_ids: Tensor  # (B, T) int64, right-padded
    states: Tensor  # (N,) int64 into B * T
    targets: Tensor  # (N,) int64
    position_ids: Tensor | None = None  # (B, T) int64, only where several sequences share a line; see `packing.Grid`
    segments: Tensor | None = None  # (B, T) int64, likewise


def check_model(path: str, rule: str = CAUSAL_LM) -> None:
    """Raises ValueError when a folder lacks config or weights, or these are torn; only their headers are read.

    A hub name passes.
    """
    problem = _folder_problem(Path(path)) if os.path.isdir(path) else "there is no such folder" if is_path(path) else ""
    if problem:
        raise ValueError(f"{rule}, got {path!r}: {problem}")


def _folder_problem(folder: Path) -> str:
    """What a model's folder lacks, with the remedy; "" if it is complete."""
    if not (folder / "config.json").is_file():
        return "it has no config.json; save_pretrained writes one"
    weights = sorted(folder.glob("*.safetensors"))
    if not (weights or any(folder.glob("pytorch_model*.bin"))):
        return "it has no weights (model.safetensors); save_pretrained writes them"
    for file in weights:
        try:
            with safe_open(file, framework="pt"):
                pass
        except (OSError, SafetensorError) as error:
            return f"{file.name} is not whole ({first_line(error)}); copy it again"
    return ""


def load_causal_lm(
    path: str, dtype: torch.dtype | Literal["auto"], *, untie_head: bool = False, attention: str = "sdpa"
) -> PreTrainedModel:
    """A causal LM from a local folder or the hub, in eval mode with dropout off (Huang et al. 2023, detail 2).

    dtype: of the weights; auto: as their files have them. untie_head: give the output head a separate weight, so that
    it can be trained while the embeddings stay frozen. attention: the implementation that the model is left with, by
    its name in transformers. Raises ValueError naming the path when nothing can be loaded from it, when a weight is
    missing, unknown or of another shape (naming it), when its logits are not head(trunk(tokens)), when it suppresses
    tokens that it may not, or when the attention of its family cannot be replaced.
    """
    from transformers import AutoModelForCausalLM

    model: Any
    model, _ = load_exactly(
        AutoModelForCausalLM,
        path,
        f"{CAUSAL_LM} that runs with sdpa attention",
        dtype=dtype,
        attn_implementation="sdpa",
    )
    _check_head(model, path)
    check_suppressed(path, model.get_output_embeddings().weight.shape[0])
    # only now, because an engine's attention may need that engine's cache, which the check does not have
    if attention != "sdpa":
        _replace_attention(model, attention, path)
    head = model.get_output_embeddings()
    if untie_head and head.weight is model.get_input_embeddings().weight:
        head.weight = nn.Parameter(head.weight.detach().clone())
    # a file may hold a separate head although the config says that it is tied
    if head.weight is not model.get_input_embeddings().weight:
        model.config.tie_word_embeddings = False
    return without_dropout(model)


def without_dropout(model: PreTrainedModel) -> PreTrainedModel:
    """The same model, in eval mode, and without dropout in any mode."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model.eval()


def new_gpt2(tokenizer: Any, *, layers: int, width: int, heads: int, context: int, seed: int) -> PreTrainedModel:
    """A GPT-2 of this shape with random weights and without dropout.

    Its vocabulary is the tokenizer's, rounded up to a multiple of 64.
    """
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=-(-len(tokenizer) // 64) * 64,
        n_positions=context,
        n_embd=width,
        n_layer=layers,
        n_head=heads,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=tokenizer.eos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return GPT2LMHeadModel(config).eval()


class PolicyModel(nn.Module):
    """The policy: log-probs of chosen tokens and the entropy of the distributions they were chosen from.

    Tokens that the model suppresses have probability zero; see `suppressed.py`.
    """

    suppressed: Tensor | None  # (K,) int64

    def __init__(self, causal_lm: PreTrainedModel, temperature: float) -> None:
        super().__init__()
        self.causal_lm = causal_lm
        self.temperature = temperature
        self.register_buffer("suppressed", suppressed_tokens(causal_lm), persistent=False)

    def forward(self, batch: TokenInputs, *, entropy: Entropy = "none") -> tuple[Tensor, Tensor]:
        """(log-probs (N,), entropy (N,)), both float32 and at the sampling temperature (Huang et al. 2023, detail 3).

        entropy: "none": it is returned empty; "value": without a gradient, which costs no memory; "gradient": with it,
        for a bonus in the loss. Raises ValueError for a target that is suppressed.
        """
        self._check(batch.targets)
        free = self.head(trunk_states(self.causal_lm.base_model, batch)).float()  # (N, V)
        if self.temperature not in (0.0, 1.0):
            free = free / self.temperature
        logits = suppress(free, self.suppressed)
        log_z = torch.logsumexp(logits, dim=-1)  # (N,)
        logprobs = logits.gather(-1, batch.targets[:, None]).squeeze(-1) - log_z
        if entropy == "none":
            return logprobs, logprobs.new_empty(0)
        with torch.set_grad_enabled(entropy == "gradient" and torch.is_grad_enabled()):
            # not times `logits`: the gradient of a product with numbers that large would overflow
            return logprobs, log_z - (torch.softmax(logits, dim=-1) * free).sum(-1)

    def _check(self, targets: Tensor) -> None:
        if self.suppressed is not None and (never := torch.isin(targets, self.suppressed)).any():
            raise ValueError(
                f"data: must have no reply with a token that the model suppresses, got token {int(targets[never][0])}; "
                "take it out of the replies, or out of suppress_tokens in generation_config.json"
            )

    @property
    def head(self) -> nn.Module:
        return self.causal_lm.get_output_embeddings()  # type: ignore[no-any-return]


class ValueModel(nn.Module):
    """The critic: its own trunk and one linear head, which starts at zero or as a reward model's.

    Huang et al. 2023, detail 8.
    """

    def __init__(self, model: PreTrainedModel, head: Tensor | None = None) -> None:
        """model: causal LM or classifier that gives the trunk. head: (1, D) of a reward model; None: zero."""
        super().__init__()
        embeddings: Any = model.get_input_embeddings()
        width = embeddings.weight.shape[1]
        self.trunk = model.base_model
        self.value_head = nn.Linear(width, 1, dtype=next(model.parameters()).dtype)
        nn.init.zeros_(self.value_head.weight)
        nn.init.zeros_(self.value_head.bias)
        if head is not None:
            with torch.no_grad():
                self.value_head.weight.copy_(head)

    @property
    def head(self) -> nn.Module:
        return self.value_head

    def forward(self, batch: TokenInputs) -> Tensor:
        """Values of the states in which the targets were chosen, (N,) float32."""
        return self.value_head(trunk_states(self.trunk, batch)).squeeze(-1).float()  # type: ignore[no-any-return]


def trunk_states(trunk: nn.Module, batch: TokenInputs) -> Tensor:
    """Final hidden states at the chosen positions, (N, D)."""
    packed = (
        {}
        if batch.segments is None
        else {"position_ids": batch.position_ids, "attention_mask": block_causal(batch.segments)}
    )
    hidden = trunk(input_ids=batch.input_ids, use_cache=False, **packed).last_hidden_state  # (B, T, D)
    return hidden.reshape(-1, hidden.shape[-1])[batch.states]  # type: ignore[no-any-return]


def context_of(path: str) -> int:
    """The longest sequence of a model in a folder or on the hub, in tokens; see `context.py`.

    Raises ValueError naming the path when its config does not say.
    """
    config = config_of(path)
    context = longest_text(config)
    if context is None:
        raise ValueError(
            f"model.path: must have max_position_embeddings in its config, got {path!r} (family {config.model_type}); "
            f"{REMEDY}"
        )
    return context


def longest_of(path: str) -> int | None:
    """The longest text of any model, such as a sequence classifier; None if it takes texts of any length."""
    return longest_text(config_of(path))


def width_of(path: str) -> int:
    """The width of the last hidden state of a causal LM."""
    return int(config_of(path).get_text_config(decoder=True).hidden_size)


def vocabulary_of(path: str) -> int:
    """The number of embeddings of a model in a folder or on the hub: ids must be below it.

    Raises ValueError naming the path when its config does not say.
    """
    config = config_of(path)
    vocabulary = getattr(config.get_text_config(), "vocab_size", None)
    if vocabulary is None:
        raise ValueError(
            f"model.path: must have vocab_size in its config, got {path!r} (family {config.model_type}); {REMEDY}"
        )
    return int(vocabulary)


def check_family(path: str, field: str = "model.path") -> None:
    """Raises ValueError naming the field when transformers has no causal language model of its family."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    family = config_of(path).model_type
    if family not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise ValueError(
            f"{field}: must be a folder or hub name of a causal language model, got {path!r} (family {family}), which "
            f"has none; {REMEDY}"
        )


def check_causal_lm(path: str, field: str = "model.path") -> None:
    """Check a causal LM without reading its weights: names, shapes, the kinds of its layers, and suppressed tokens.

    Names and shapes are not checked of a hub name. Raises ValueError naming the field.
    """
    from transformers import AutoModelForCausalLM

    config = config_of(path)
    if problem := _layer_problem(config):
        raise ValueError(
            f"{field}: must be a model of attention in full or in a sliding window, got {path!r} (family "
            f"{config.model_type}), {problem}; {REMEDY}"
        )
    check_names(AutoModelForCausalLM, path, f"{field}: must be a folder or hub name of a causal language model")
    check_suppressed(path, vocabulary_of(path), field)


def check_vocabulary(path: str, tokenizer: Any, field: str) -> None:
    """Raises ValueError, naming field and token, when a tokenizer has an id without an embedding in the model."""
    vocabulary, (token, highest) = vocabulary_of(path), max(tokenizer.get_vocab().items(), key=lambda item: item[1])
    if highest >= vocabulary:
        raise ValueError(
            f"{field}: must have at least as many embeddings as its tokenizer has tokens, got {vocabulary} and "
            f"{highest + 1} in {path!r} "
            f"({token!r} is number {highest}); give it its own tokenizer, or resize its embeddings"
        )


def is_classifier(path: str) -> bool:
    """Whether a folder or hub name holds a sequence classifier, according to its config.

    Raises ValueError naming the path when there is no config.
    """
    return any(name.endswith("ForSequenceClassification") for name in config_of(path).architectures or ())


def check_same_words(path: str, other: str, field: str) -> None:
    """Raises ValueError unless both models have the same vocabulary and `other` takes sequences as long.

    field: the setting that names `other`.
    """
    if load_tokenizer(path).get_vocab() != load_tokenizer(other, field).get_vocab() or vocabulary_of(
        other
    ) < vocabulary_of(path):
        raise ValueError(
            f"{field}: must have the words of the policy, {path!r}, got {other!r} with others; choose a model that was "
            "trained from the same one"
        )
    if context_of(other) < context_of(path):
        raise ValueError(
            f"{field}: must take sequences of {context_of(path)} tokens, as the policy {path!r} does, got {other!r} of "
            f"{context_of(other)}"
        )


def config_of(path: str, rule: str = CAUSAL_LM) -> Any:
    """The config of a model. Raises ValueError, which begins with the rule, when it cannot be read."""
    from transformers import AutoConfig

    quiet_transformers()
    try:
        return AutoConfig.from_pretrained(path, trust_remote_code=False)
    except Exception as error:  # a config.json with wrong types may raise anything
        where = "" if os.path.isdir(path) else "there is no such folder; as for the Hugging Face hub: "
        raise ValueError(
            f"{rule}, got {path!r}: {where}{unreadable(path, 'config.json') or first_line(error)}"
        ) from error


def _check_head(model: Any, path: str) -> None:
    """Raises ValueError unless the logits are head(trunk(tokens)).

    A family that scales or caps its logits would be trained wrongly, and nobody would notice.
    """
    problem = _head_problem(model)
    if problem:
        raise ValueError(
            "model.path: must be a causal language model whose logits are its output head of its final hidden states, "
            f"got {path!r} (family {model.config.model_type}), {problem}; {REMEDY}"
        )


@torch.no_grad()
def _head_problem(model: Any) -> str:
    """The way in which the logits are not head(trunk(tokens)); "" if they are. Runs four tokens."""
    head, context = model.get_output_embeddings(), longest_text(model.config, model)
    if head is None:
        return "which has no output head"
    if context is None:
        return "whose config has no max_position_embeddings"
    ids = torch.arange(min(4, context))[None] % head.weight.shape[0]  # (1, 4)
    hidden = getattr(model.base_model(input_ids=ids, use_cache=False), "last_hidden_state", None)  # (1, 4, D)
    if hidden is None or hidden.shape[-1] != head.weight.shape[-1]:
        return "whose trunk does not end in the hidden states that its head takes"
    logits = model(input_ids=ids, use_cache=False).logits.float()  # (1, 4, V)
    gap = float((head(hidden).float() - logits).abs().max())
    # The same arithmetic twice, so a tolerance of one rounding is enough. A gap that is not finite comes from the
    # weights, which this check does not judge.
    wrong = gap > torch.finfo(model.dtype).eps * float(logits.abs().max())
    return f"whose logits differ from that by up to {gap:.2g}" if wrong else ""


def _layer_problem(config: Any) -> str:
    """The kinds of layers that have no plain or sliding-window attention; "" if there are none."""
    kinds = set(getattr(config.get_text_config(), "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    return f"which has layers of {', '.join(sorted(kinds))}" if kinds else ""


def _replace_attention(model: Any, attention: str, path: str) -> None:
    model.set_attn_implementation(attention)
    if model.config._attn_implementation != attention:  # transformers only logs that it could not
        raise ValueError(
            f"model.path: must be of a family whose attention can be replaced, got {path!r} (family "
            f"{model.config.model_type}); {REMEDY}"
        )
