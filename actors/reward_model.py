"""The reward model: a sequence classifier with one output, as a learner trains it, and the loss it learns from comparisons by.

Its reward of a text is score(h), h the final hidden state of the text's last token before the end of text: what `reward.ClassifierReward`
and transformers themselves read there. N: texts of a micro-batch, each in the comparison `row[n]`.

What was left out: heads that are more than one linear layer (a pooler, a bias), whose reward could not be brought to mean 0 and std 1 in the weights.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from actors.model import REMEDY, TokenInputs, first_line, is_classifier, load_tokenizer, quiet_transformers, save_model, trunk_states, without_dropout
from actors.objective import Compared

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True, slots=True)
class Preference:
    """The reward objective. L = mean over pairs i < j of -log sigmoid(r_i - r_j - m_ij), texts of a comparison being ranked best first.

    Two texts: Bradley & Terry (1952) as in Christiano et al. (2017); the margin is that of Touvron et al. (2023, Llama 2). More: the mean over all pairs
    of a ranking, each comparison counting once (Ouyang et al. 2022); the margin says by how much the best is better, so it is m_ij of its pairs alone.
    """

    def reward_loss(self, rewards: Tensor, batch: Compared) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of each comparison (rows,), and of each the share of its pairs that are ranked right, a tie being half of one, and the mean r_i - r_j."""
        same = batch.row[:, None] == batch.row  # (N, N)
        better, worse = torch.nonzero(same.triu(1), as_tuple=True)  # pairs (P,)
        of = batch.row[better]
        best = torch.cat([batch.row.new_full((1,), -1), batch.row[:-1]]) != batch.row  # (N,) first of its comparison
        gap = rewards[better] - rewards[worse]
        loss = -logsigmoid(gap - torch.where(best[better], batch.margin[of], 0.0))
        pairs = torch.bincount(of, minlength=batch.rows)

        def mean(values: Tensor) -> Tensor:
            return torch.zeros(batch.rows, dtype=values.dtype, device=values.device).index_add(0, of, values) / pairs

        gap = gap.detach()
        return mean(loss), {"accuracy": mean((gap.sign() + 1) / 2), "margin": mean(gap)}


class RewardModel(nn.Module):
    """Rewards of texts. The classifier keeps its own names, so what is trained is what is exported."""

    def __init__(self, classifier: PreTrainedModel) -> None:
        """classifier: as `load_classifier` returns it."""
        super().__init__()
        self.classifier = classifier
        names = {id(parameter): name for name, parameter in classifier.named_parameters()}
        bias = _final_bias(classifier.base_model)
        self._score, self._bias = names[id(self.head.weight)], None if bias is None else names[id(bias)]

    def forward(self, batch: TokenInputs) -> Tensor:
        """Rewards of the states in which the targets, ends of text, were chosen, (N,) float32."""
        return self.head(trunk_states(self.classifier.base_model, batch)).squeeze(-1).float()  # type: ignore[no-any-return]

    @property
    def head(self) -> nn.Linear:
        return head_of(self.classifier)

    @torch.no_grad()
    def standardised(self, mean: float, std: float) -> dict[str, Tensor]:
        """New values of the classifier's parameters, by name, that turn rewards into (reward - mean) / std; whole parameters only.

        The std goes into the score's weights w; the shift b = -mean / std into the bias of the final norm, since w(h + b w / |w|^2) = w h + b.
        Where the family's final norm has no bias (Llama, Qwen2, Mistral) only the std is set: a constant changes no comparison and no whitened advantage.
        """
        weight = self.head.weight.detach().float() / std
        changed = {self._score: weight}
        if self._bias is not None:
            changed[self._bias] = self.classifier.get_parameter(self._bias).detach().float() - mean / std * weight[0] / weight.square().sum()
        return changed

    @torch.no_grad()
    def standardise(self, mean: float, std: float) -> None:
        """`standardised`, in place."""
        for name, tensor in self.standardised(mean, std).items():
            self.classifier.get_parameter(name).copy_(tensor)

    def save(self, folder: Path, path: str, changed: dict[str, Tensor]) -> None:
        """Write a sequence classifier as `from_pretrained` reads it, with the tokenizer of `path`; whole parameters only. changed: to be written instead."""
        tokenizer, config = load_tokenizer(path), self.classifier.config
        config.problem_type = "regression"
        # What a classifier looks past from the right. With the end of text as padding, a text has the same reward with it and without.
        config.pad_token_id = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        save_model(self.classifier, tokenizer, folder, changed)


def head_of(classifier: PreTrainedModel) -> nn.Linear:
    """The one linear layer (1, D) of a classifier that `load_classifier` took."""
    [head] = (child for child in classifier.children() if child is not classifier.base_model and isinstance(child, nn.Linear))
    return head


@torch.no_grad()
def _final_bias(trunk: Any) -> Tensor | None:
    """The bias of the layer norm whose output is the trunk's, or None where its norm has none; found out by running a token."""
    seen: list[tuple[Tensor, Tensor]] = []
    norms = [module for module in trunk.modules() if isinstance(module, nn.LayerNorm) and getattr(module, "bias", None) is not None]
    hooks = [norm.register_forward_hook(lambda module, _, out: seen.append((module.bias, out))) for norm in norms]
    hidden = trunk(input_ids=torch.zeros(1, 1, dtype=torch.int64), use_cache=False).last_hidden_state
    for hook in hooks:
        hook.remove()
    return next((bias for bias, out in seen if out.data_ptr() == hidden.data_ptr()), None)


def load_reward_model(path: str, dtype: torch.dtype, seed: int) -> RewardModel:
    """A reward model from a causal LM, with a new head, or from a classifier, whose head is kept.

    A new head is drawn from N(0, 1 / (D + 1)) by the seed alone, without a bias (Huang et al. 2023, detail 5; Stiennon et al. 2020). Raises as
    `load_classifier` does.
    """
    classifier = load_classifier(path, dtype)
    if not is_classifier(path):
        weight = head_of(classifier).weight
        drawn = torch.randn(weight.shape, generator=torch.Generator().manual_seed(seed)) / math.sqrt(weight.shape[1] + 1)
        with torch.no_grad():
            weight.copy_(drawn)
    return RewardModel(classifier)


def load_classifier(path: str, dtype: torch.dtype) -> PreTrainedModel:
    """A sequence classifier with one output from a classifier's or causal LM's folder or hub name, in eval mode with dropout off.

    Raises ValueError naming the path when it is neither, has another number of outputs, or its logit is not head(trunk(tokens)) at the last token.
    """
    from transformers import AutoConfig, AutoModelForSequenceClassification

    quiet_transformers()
    rule = "model.path: must be a folder or hub name of a causal language model or sequence classifier that runs with sdpa attention"
    try:
        outputs = AutoConfig.from_pretrained(path, trust_remote_code=False).num_labels if is_classifier(path) else 1
        if outputs != 1:
            raise ValueError(f"it has {outputs} labels; train it with num_labels=1")
        model, found = AutoModelForSequenceClassification.from_pretrained(
            path, num_labels=1, dtype=dtype, attn_implementation="sdpa", trust_remote_code=False, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ValueError(f"{rule}, got {path!r}: {first_line(error)}") from error
    problem = _head_problem(model)
    if problem:
        raise ValueError(
            "model.path: must be of a family whose sequence classifier is one linear layer, without a bias, on its final hidden state of the last token, "
            f"got {path!r} (family {model.config.model_type}), {problem}; {REMEDY}"
        )
    new = set() if is_classifier(path) else {name for name, parameter in model.named_parameters() if parameter is head_of(model).weight}
    if lacking := sorted(set(found["missing_keys"]) - new):
        raise ValueError(f"{rule}, got {path!r}: its weights lack {lacking[0]!r}; copy it again")
    return without_dropout(model)


@torch.no_grad()
def _head_problem(model: Any) -> str:
    """What is wrong with taking the logit for head(trunk(tokens)) at the last token, or ""; found out by running a few tokens."""
    heads = [child for child in model.children() if child is not model.base_model and any(True for _ in child.parameters())]
    context = getattr(model.config, "max_position_embeddings", None)
    if len(heads) != 1 or not isinstance(heads[0], nn.Linear):
        return "whose head is more than that"
    if getattr(heads[0], "bias", None) is not None:
        return "whose head has a bias"
    if context is None:
        return "whose config has no max_position_embeddings"
    ids = torch.arange(min(5, context)) % model.get_input_embeddings().weight.shape[0]
    ids = ids[ids != model.config.pad_token_id if model.config.pad_token_id is not None else ids >= 0][None]  # a classifier looks past trailing padding
    hidden = getattr(model.base_model(input_ids=ids, use_cache=False), "last_hidden_state", None)  # (1, 4, D)
    if hidden is None or hidden.shape[-1] != heads[0].weight.shape[-1]:
        return "whose trunk does not end in the hidden states that its head takes"
    logit = model(input_ids=ids, use_cache=False).logits.float()  # (1, 1)
    gap = float((heads[0](hidden)[:, -1].float() - logit).abs().max())
    wrong = gap > torch.finfo(model.dtype).eps * float(logit.abs().max())  # the same arithmetic twice, as in `model._head_problem`
    return f"whose logit differs from that by {gap:.2g}" if wrong else ""
