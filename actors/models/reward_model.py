"""The reward model that a learner trains: a sequence classifier with one output, and its loss on comparisons.

Shapes: N texts of a micro-batch, text n in comparison `row[n]`; P pairs of texts; D width.

The reward of a text is score(h), where h is the final hidden state of the text's last token before the end of text.
`ClassifierReward` and transformers read it at the same place. Left out: heads that are more than one linear layer (a
pooler, a bias), because their reward could not be scaled to mean 0 and std 1 in the weights.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from actors.models.causal_lm import REMEDY, TokenInputs, is_classifier, trunk_states, without_dropout
from actors.models.context import longest_text
from actors.models.export import save_model
from actors.models.loading import load_exactly
from actors.models.tokenizer import load_tokenizer, quiet_transformers
from actors.objective import ComparisonBatch

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True, slots=True)
class Preference:
    """The reward objective.

    L = mean over pairs i < j of -log sigmoid(r_i - r_j - m_ij), with the texts of a comparison ranked best first.

    Two texts: Bradley & Terry (1952) as in Christiano et al. (2017), with the margin of Touvron et al. (2023, Llama 2).
    More texts: the mean over all pairs of the ranking, each comparison counting once (Ouyang et al. 2022). The margin
    says by how much the best text is better, so m_ij is 0 except for the pairs of the best.
    """

    def reward_loss(self, rewards: Tensor, batch: ComparisonBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of each comparison (rows,), and its statistics: accuracy and mean margin.

        accuracy: share of pairs that are ranked right; a tie counts half. margin: mean of r_i - r_j.
        """
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
    """Rewards of texts. The classifier keeps its parameter names, so it is exported as it is trained."""

    def __init__(self, classifier: PreTrainedModel) -> None:
        """classifier: as `load_classifier` returns it."""
        super().__init__()
        self.classifier = classifier
        names = {id(parameter): name for name, parameter in classifier.named_parameters()}
        bias = _final_bias(classifier.base_model)
        self._score, self._bias = names[id(self.head.weight)], None if bias is None else names[id(bias)]

    def forward(self, batch: TokenInputs) -> Tensor:
        """Rewards of the states in which the targets (ends of text) were chosen, (N,) float32."""
        return self.head(trunk_states(self.classifier.base_model, batch)).squeeze(-1).float()  # type: ignore[no-any-return]

    @property
    def head(self) -> nn.Linear:
        return head_of(self.classifier)

    @torch.no_grad()
    def standardised(self, mean: float, std: float) -> dict[str, Tensor]:
        """New values of parameters, by name, that turn rewards into (reward - mean) / std; needs whole parameters.

        The std goes into the score's weights w. The shift b = -mean / std goes into the bias of the final norm, because
        w(h + b w / |w|^2) = w h + b. If the family's final norm has no bias (Llama, Qwen2, Mistral), only the std is
        set: a constant changes no comparison and no whitened advantage.
        """
        weight = self.head.weight.detach().float() / std
        changed = {self._score: weight}
        if self._bias is not None:
            changed[self._bias] = (
                self.classifier.get_parameter(self._bias).detach().float()
                - mean / std * weight[0] / weight.square().sum()
            )
        return changed

    @torch.no_grad()
    def standardise(self, mean: float, std: float) -> None:
        """Set the parameters to `standardised`."""
        for name, tensor in self.standardised(mean, std).items():
            self.classifier.get_parameter(name).copy_(tensor)

    def save(self, folder: Path, path: str, changed: dict[str, Tensor]) -> None:
        """Write a sequence classifier with the tokenizer of `path`; needs whole parameters.

        changed: name -> value of parameters that are written instead.
        """
        tokenizer, config = load_tokenizer(path), self.classifier.config
        config.problem_type = "regression"
        # A classifier ignores padding at the right. With the end of text as padding, a text has the same reward with
        # it and without.
        config.pad_token_id = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        save_model(self.classifier, tokenizer, folder, changed)


def head_of(classifier: PreTrainedModel) -> nn.Linear:
    """The one linear layer (1, D) of a classifier that `load_classifier` has loaded."""
    [head] = (
        child for child in classifier.children() if child is not classifier.base_model and isinstance(child, nn.Linear)
    )
    return head


@torch.no_grad()
def _final_bias(trunk: Any) -> Tensor | None:
    """The bias of the trunk's final layer norm, or None if that has none. Runs one token."""
    seen: list[tuple[Tensor, Tensor]] = []
    norms = [
        module
        for module in trunk.modules()
        if isinstance(module, nn.LayerNorm) and getattr(module, "bias", None) is not None
    ]
    hooks = [norm.register_forward_hook(lambda module, _, out: seen.append((module.bias, out))) for norm in norms]
    hidden = trunk(input_ids=torch.zeros(1, 1, dtype=torch.int64), use_cache=False).last_hidden_state
    for hook in hooks:
        hook.remove()
    return next((bias for bias, out in seen if out.data_ptr() == hidden.data_ptr()), None)


def load_reward_model(path: str, dtype: torch.dtype, seed: int) -> RewardModel:
    """A reward model from a causal LM, with a new head, or from a classifier, with its own head.

    A new head is drawn from N(0, 1 / (D + 1)) by the seed alone, without a bias (Huang et al. 2023, detail 5; Stiennon
    et al. 2020). Raises as `load_classifier` does.
    """
    classifier, has_new_head = _loaded(path, dtype)
    if has_new_head:
        weight = head_of(classifier).weight
        drawn = torch.randn(weight.shape, generator=torch.Generator().manual_seed(seed)) / math.sqrt(
            weight.shape[1] + 1
        )
        with torch.no_grad():
            weight.copy_(drawn)
    return RewardModel(classifier)


def load_classifier(path: str, dtype: torch.dtype) -> PreTrainedModel:
    """A sequence classifier with one output, from a classifier or a causal LM, in eval mode with dropout off.

    path: folder or hub name. Raises ValueError naming the path when it holds neither, has another number of outputs,
    lacks a weight or has an unknown one (except the head of a causal LM), or its logit is not head(trunk(tokens)) at
    the last token.
    """
    return _loaded(path, dtype)[0]


def _loaded(path: str, dtype: torch.dtype) -> tuple[PreTrainedModel, bool]:
    """(the classifier, whether its head is new)."""
    from transformers import AutoConfig, AutoModelForSequenceClassification

    quiet_transformers()
    rule = (
        "model.path: must be a folder or hub name of a causal language model or sequence classifier that runs with "
        "sdpa attention"
    )
    if is_classifier(path) and (outputs := AutoConfig.from_pretrained(path, trust_remote_code=False).num_labels) != 1:
        raise ValueError(f"{rule}, got {path!r}: it has {outputs} labels; train it with num_labels=1")
    new, dropped = _heads(path)
    model: Any
    model, is_new = load_exactly(
        AutoModelForSequenceClassification,
        path,
        rule,
        new=new,
        dropped=dropped,
        num_labels=1,
        dtype=dtype,
        attn_implementation="sdpa",
    )
    if problem := _logit_problem(model):
        raise ValueError(_other_family(path, model.config, problem))
    return without_dropout(model), is_new


def check_trainable(path: str) -> None:
    """Raises ValueError naming the path when its family has no suitable classifier; reads no weight."""
    _heads(path)


def _heads(path: str) -> tuple[set[str], set[str]]:
    """(parameters that a file may lack, parameters of it that are dropped), by name; both empty for a classifier.

    A causal LM lacks the classifier's head, and its output head is dropped. Raises ValueError for a family whose
    classifier's head is not one linear layer.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

    config = AutoConfig.from_pretrained(path, trust_remote_code=False, num_labels=1)
    try:
        with torch.device("meta"):  # without values
            classifier: Any = AutoModelForSequenceClassification.from_config(config)
            causal: Any = None if is_classifier(path) else AutoModelForCausalLM.from_config(config)
    except ValueError:  # a family that lacks one of the two; loading it says so
        return set(), set()
    if problem := _head_problem(classifier):
        raise ValueError(_other_family(path, config, problem))
    if causal is None:
        return set(), set()
    new, output = head_of(classifier).weight, causal.get_output_embeddings().weight
    dropped = {name for name, parameter in causal.named_parameters(remove_duplicate=False) if parameter is output}
    return {name for name, parameter in classifier.named_parameters() if parameter is new}, dropped - set(
        classifier.state_dict()
    )


def _other_family(path: str, config: Any, problem: str) -> str:
    return (
        "model.path: must be of a family whose sequence classifier is one linear layer, without a bias, on its final "
        "hidden state of the last token, "
        f"got {path!r} (family {config.model_type}), {problem}; {REMEDY}"
    )


def _head_problem(model: Any) -> str:
    """The way in which the classifier's head is not one linear layer without a bias; "" if it is."""
    heads = [
        child for child in model.children() if child is not model.base_model and any(True for _ in child.parameters())
    ]
    if len(heads) != 1 or not isinstance(heads[0], nn.Linear):
        return "whose head is more than that"
    return "whose head has a bias" if heads[0].bias is not None else ""


@torch.no_grad()
def _logit_problem(model: Any) -> str:
    """The way in which the logit is not head(trunk(tokens)) at the last token; "" if it is. Runs a few tokens."""
    head, context = head_of(model), longest_text(model.config, model)
    if context is None:
        return "whose config has no max_position_embeddings"
    ids = torch.arange(min(5, context)) % model.get_input_embeddings().weight.shape[0]
    # without padding, which a classifier ignores at the end
    ids = ids[ids != model.config.pad_token_id if model.config.pad_token_id is not None else ids >= 0][None]
    hidden = getattr(model.base_model(input_ids=ids, use_cache=False), "last_hidden_state", None)  # (1, 4, D)
    if hidden is None or hidden.shape[-1] != head.weight.shape[-1]:
        return "whose trunk does not end in the hidden states that its head takes"
    logit = model(input_ids=ids, use_cache=False).logits.float()  # (1, 1)
    gap = float((head(hidden)[:, -1].float() - logit).abs().max())
    # the same arithmetic twice, as in `causal_lm._head_problem`
    wrong = gap > torch.finfo(model.dtype).eps * float(logit.abs().max())
    return f"whose logit differs from that by {gap:.2g}" if wrong else ""
