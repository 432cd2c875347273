"""The models of the learners and the reference: a Hugging Face causal LM, seen as what RLHF needs of it.

Shapes: B rows, T tokens, N chosen positions over the whole micro-batch, D width, V vocabulary.
Rows are right-padded, so causal attention keeps real tokens from ever seeing padding and no mask is needed.
Only action tokens go through the output head: there is no loss at a prompt or padding token that a mask would
have to remove, hence no NaN * 0. Where sequences share a line, a mask keeps them apart (`packing.py`).
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from actors.packing import block_causal

if TYPE_CHECKING:
    from transformers import PreTrainedModel


Entropy = Literal["none", "value", "gradient"]
REMEDY = "choose a model of another family, such as Llama, Qwen2, Mistral or GPT-2"


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenInputs:
    """A micro-batch as the model takes it.

    Token `targets[n]` was chosen in the state that ends at flat position `states[n]` of the (B, T) grid, one before the token's own.
    """

    input_ids: Tensor  # (B, T) int64, right-padded
    states: Tensor  # (N,) int64 into B * T
    targets: Tensor  # (N,) int64
    position_ids: Tensor | None = None  # (B, T) int64, and segments likewise: only where several sequences share a line; see `packing.Grid`
    segments: Tensor | None = None


def check_model(path: str, rule: str = "model.path: must be a folder or hub name of a causal language model") -> None:
    """Raises ValueError when a folder lacks config or weights, or these are torn; only their headers are read. What is no folder is for the hub to know."""
    folder = Path(path)
    is_hub_name = not path.startswith((".", "/", "~")) and path.count("/") <= 1
    problem = _folder_problem(folder) if folder.is_dir() else "" if is_hub_name else "there is no such folder"
    if problem:
        raise ValueError(f"{rule}, got {path!r}: {problem}")


def _folder_problem(folder: Path) -> str:
    """What a model's folder lacks, and what to do about it, or ""."""
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


def load_tokenizer(path: str) -> Any:
    """The tokenizer saved beside the model. Raises ValueError when there is none, or it has no end-of-text token."""
    from transformers import AutoTokenizer

    quiet_transformers()
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ValueError(f"model.path: must be a folder or hub name with a tokenizer, got {path!r}: {first_line(error)}") from error
    if len(tokenizer) <= len(tokenizer.all_special_ids):  # what transformers makes up for some families where there is none
        raise ValueError(f"model.path: must have its tokenizer beside it, got {path!r} without; save the one it was trained with there")
    if tokenizer.eos_token_id is None:
        raise ValueError(f"model.path: the tokenizer of {path!r} must have an end-of-text token; set eos_token in its tokenizer_config.json")
    return tokenizer


def load_causal_lm(path: str, dtype: torch.dtype, *, untie_head: bool = False, attention: str = "sdpa") -> PreTrainedModel:
    """A causal LM from a local folder or the hub, in eval mode with dropout off (Huang et al. 2023, detail 2).

    untie_head: give the output head a weight of its own, so that it can be trained while the embeddings stay frozen.
    attention: the implementation to leave it with, by the name transformers knows it by.
    Raises ValueError naming the path when nothing can be loaded from it, when its logits are not head(trunk(tokens)), or when its
    family has an attention of its own that cannot be replaced.
    """
    from transformers import AutoModelForCausalLM

    quiet_transformers()
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, attn_implementation="sdpa", trust_remote_code=False)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        message = f"model.path: must be a folder or hub name of a causal language model that runs with sdpa attention, got {path!r}: {first_line(error)}"
        raise ValueError(message) from error
    _check_head(model, path)
    if attention != "sdpa":  # set only now: an engine's own attention may need that engine's cache, which the check has not
        _replace_attention(model, attention, path)
    if untie_head and model.get_output_embeddings().weight is model.get_input_embeddings().weight:
        head = model.get_output_embeddings()
        head.weight = nn.Parameter(head.weight.detach().clone())
        model.config.tie_word_embeddings = False
    return without_dropout(model)


def without_dropout(model: PreTrainedModel) -> PreTrainedModel:
    """The model itself, in eval mode and with dropout off in any other."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model.eval()


def new_gpt2(tokenizer: Any, *, layers: int, width: int, heads: int, context: int, seed: int) -> PreTrainedModel:
    """A GPT-2 of that shape with random weights, dropout off, and a vocabulary as large as the tokenizer's, rounded up to a multiple of 64."""
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
    """The policy: log-probs of chosen tokens and the entropy of the distributions they were chosen from."""

    def __init__(self, causal_lm: PreTrainedModel, temperature: float) -> None:
        super().__init__()
        self.causal_lm = causal_lm
        self.temperature = temperature

    def forward(self, batch: TokenInputs, *, entropy: Entropy = "none") -> tuple[Tensor, Tensor]:
        """(log-probs (N,), entropy (N,)), both float32, both at the sampling temperature (Huang et al. 2023, detail 3).

        entropy: "none", and it comes back empty; "value", without a gradient, which costs no memory; or with its "gradient", for a bonus in the loss.
        """
        logits = self.head(trunk_states(self.causal_lm.base_model, batch)).float()  # (N, V)
        if self.temperature not in (0.0, 1.0):
            logits = logits / self.temperature
        log_z = torch.logsumexp(logits, dim=-1)  # (N,)
        logprobs = logits.gather(-1, batch.targets[:, None]).squeeze(-1) - log_z
        if entropy == "none":
            return logprobs, logprobs.new_empty(0)
        with torch.set_grad_enabled(entropy == "gradient" and torch.is_grad_enabled()):
            return logprobs, log_z - (torch.softmax(logits, dim=-1) * logits).sum(-1)

    @property
    def head(self) -> nn.Module:
        return self.causal_lm.get_output_embeddings()  # type: ignore[no-any-return]


class ValueModel(nn.Module):
    """The critic: a trunk of its own and one linear head, zero at the start or a reward model's (Huang et al. 2023, detail 8)."""

    def __init__(self, model: PreTrainedModel, head: Tensor | None = None) -> None:
        """model: causal LM or classifier whose trunk it takes. head: (1, D) of a reward model, or None for zero."""
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
    packed = {} if batch.segments is None else {"position_ids": batch.position_ids, "attention_mask": block_causal(batch.segments)}
    hidden = trunk(input_ids=batch.input_ids, use_cache=False, **packed).last_hidden_state  # (B, T, D)
    return hidden.reshape(-1, hidden.shape[-1])[batch.states]  # type: ignore[no-any-return]


def context_of(path: str) -> int:
    """Longest sequence the model of a folder or hub name takes, in tokens. Raises ValueError naming the path when it does not say."""
    config = _config_of(path)
    context = getattr(config, "max_position_embeddings", None)
    if context is None:
        raise ValueError(f"model.path: must have max_position_embeddings in its config, got {path!r} (family {config.model_type}); {REMEDY}")
    return int(context)


def vocabulary_of(path: str) -> int:
    """Embeddings the model of a folder or hub name has: ids must be below this. Raises ValueError naming the path when it does not say."""
    config = _config_of(path)
    vocabulary = getattr(config, "vocab_size", None)
    if vocabulary is None:
        raise ValueError(f"model.path: must have vocab_size in its config, got {path!r} (family {config.model_type}); {REMEDY}")
    return int(vocabulary)


def is_classifier(path: str) -> bool:
    """Whether a folder or hub name holds a sequence classifier, by what its config says. Raises ValueError naming the path when there is no config."""
    return any(name.endswith("ForSequenceClassification") for name in _config_of(path).architectures or ())


def check_same_words(path: str, other: str, field: str) -> None:
    """Raises ValueError, naming the field that `other` is of, unless both read the same text as the same ids and `other` takes as long sequences."""
    if load_tokenizer(path).get_vocab() != load_tokenizer(other).get_vocab() or vocabulary_of(other) < vocabulary_of(path):
        raise ValueError(f"{field}: must have the words of the policy, {path!r}, got {other!r} with others; choose a model that was trained from the same one")
    if context_of(other) < context_of(path):
        raise ValueError(f"{field}: must take sequences of {context_of(path)} tokens, as the policy {path!r} does, got {other!r} of {context_of(other)}")


def save_model(model: PreTrainedModel, tokenizer: Any, folder: Path, changed: Mapping[str, Tensor] | None = None) -> None:
    """Write safetensors, config and tokenizer as `from_pretrained` reads them. changed: values of parameters, by name, to be written instead of its own."""
    folder.mkdir(parents=True, exist_ok=True)
    # Copies: a sharded learner's parameters are views of one flat storage, which safetensors would take for tied weights.
    parameters = {name: (changed or {}).get(name, p).detach().to(p.dtype, copy=True) for name, p in model.named_parameters()}
    buffers = {name: t for name, t in model.state_dict().items() if name in dict(model.named_buffers())}
    model.save_pretrained(folder, state_dict=parameters | buffers)
    tokenizer.save_pretrained(folder)


def _config_of(path: str) -> Any:
    from transformers import AutoConfig

    quiet_transformers()
    try:
        return AutoConfig.from_pretrained(path, trust_remote_code=False)
    except (OSError, ValueError) as error:
        where = "" if Path(path).is_dir() else "no such folder is here, and of the hub: "
        raise ValueError(f"model.path: must be a folder or hub name of a causal language model, got {path!r}: {where}{first_line(error)}") from error


def _check_head(model: Any, path: str) -> None:
    """Raises ValueError unless the logits are what every module here takes them for; a family that scales or caps them would train wrongly, unseen."""
    problem = _head_problem(model)
    if problem:
        raise ValueError(
            "model.path: must be a causal language model whose logits are its output head of its final hidden states, "
            f"got {path!r} (family {model.config.model_type}), {problem}; {REMEDY}"
        )


@torch.no_grad()
def _head_problem(model: Any) -> str:
    """What is wrong with taking the logits for head(trunk(tokens)), or ""; found out by running four tokens."""
    head, context = model.get_output_embeddings(), getattr(model.config, "max_position_embeddings", None)
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
    # The same arithmetic twice, so one rounding is ample; a gap that is not finite comes from the weights and is not this check's to judge.
    wrong = gap > torch.finfo(model.dtype).eps * float(logits.abs().max())
    return f"whose logits differ from that by up to {gap:.2g}" if wrong else ""


def _replace_attention(model: Any, attention: str, path: str) -> None:
    model.set_attn_implementation(attention)
    if model.config._attn_implementation != attention:  # transformers only logs that it could not
        raise ValueError(f"model.path: must be of a family whose attention can be replaced, got {path!r} (family {model.config.model_type}); {REMEDY}")


def quiet_transformers() -> None:
    """What it would print of a model is not for the terminal."""
    from transformers.utils import logging as hf_logging

    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    logging.getLogger("transformers").setLevel(logging.ERROR)


def first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
