"""What a student is asked to match: terms of the loss, weights, and layers they meet at.

L = w_feature · L_feature + w_attention · L_attention + w_output · L_output + w_label · L_label
"""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from pipeline.errors import ConfigError
from pipeline.store.forms.form import Content
from pipeline.store.forms.registry import forms_of, names_of
from pipeline.student.align.schedule import Weight
from pipeline.tasks import models_language

Relation = Literal["qq", "kk", "vv"]
TERMS = ("feature", "attention", "output", "labels")
LAYER_TERMS = ("feature", "attention")
"""The terms that meet the teacher inside; the others are those of the prediction."""


class Section(BaseModel):
    """A frozen section of parameters: unknown keys and NaN are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class FeatureTerm(Section):
    """Hidden states through a projector, in units of the teacher's channel deviation."""

    loss: Literal["mse", "cosine", "pkd"] = "mse"
    weight: Weight = Weight(0.0)
    projector: Literal["linear"] = "linear"
    form: str | None = None
    skip_first_token: bool = False


class AttentionTerm(Section):
    """Attention maps of aligned layers, row by row, or relations of their vectors.

    `kl` needs equal head counts; `head_mean` compares the mean map over heads, and `relations`
    compares how tokens relate by query, key and value, split into `relation_heads` (None: the most
    that divide all widths), whatever the head counts.
    """

    loss: Literal["kl", "head_mean", "relations"] = "kl"
    weight: Weight = Weight(0.0)
    form: str | None = None
    relations: Annotated[tuple[Relation, ...], Field(min_length=1)] = ("qq", "kk", "vv")
    relation_heads: Annotated[int, Field(ge=1)] | None = None

    @model_validator(mode="after")
    def _relates(self) -> "AttentionTerm":
        if len(set(self.relations)) != len(self.relations):
            raise ValueError(f"relations {', '.join(self.relations)}: expected each once")
        forms = forms_of("attention")
        form = forms.get(self.form) if self.loss == "relations" and self.form else None
        if form is not None and form.content is Content.ATTENTION_MAP:
            raise ValueError(
                f"form {self.form} holds no query and key, which relations are made of; name "
                f"form {names_of(Content.QUERY_KEY)}, or use loss head_mean"
            )
        return self


class OutputTerm(Section):
    """The teacher's output: a distribution softened by a temperature, or its bare logits (mse).

    `skew` is the share of the other side mixed in by `skew_forward_kl` and `skew_reverse_kl`.
    """

    loss: Literal[
        "forward_kl",
        "reverse_kl",
        "jsd",
        "tvd",
        "skew_forward_kl",
        "skew_reverse_kl",
        "mse",
        "binary_kl",
    ] = "forward_kl"
    weight: Weight = Weight(0.0)
    temperature: Annotated[float, Field(gt=0)] = 1.0
    skew: Annotated[float, Field(gt=0, lt=1)] = 0.1
    form: str | None = None

    @model_validator(mode="after")
    def _is_warm(self) -> "OutputTerm":
        if self.loss == "mse" and self.temperature != 1.0:
            raise ValueError(
                f"temperature {self.temperature}: loss mse compares logits as they are; leave "
                "temperature out"
            )
        return self


class LabelTerm(Section):
    """The true labels."""

    weight: Weight = Weight(0.0)


class Phases(Section):
    """Two phases, as TinyBERT trains (arXiv 1909.10351): layers first, prediction after.

    For the share `features` of the steps only the feature and attention terms are on, then only
    output and labels, with the learning rate's schedule from its beginning.
    """

    features: Annotated[float, Field(gt=0, lt=1)]

    def first_steps(self, steps: int) -> int:
        """Return how many of `steps` the first phase has; each has one, where there are two."""
        return min(max(1, round(self.features * steps)), steps - 1)


class Objective(Section):
    """All terms; one whose weight is 0 is off: it costs nothing and needs nothing of the store.

    With `balance: gradient_norm` weights are shares: every `balance_every` steps each term is
    scaled so that its gradient in the student is as large as that of the output term (else of the
    labels, else of the features).
    """

    feature: FeatureTerm = FeatureTerm()
    attention: AttentionTerm = AttentionTerm()
    output: OutputTerm = OutputTerm()
    labels: LabelTerm = LabelTerm()
    phases: Phases | None = None
    balance: Literal["fixed", "gradient_norm"] = "fixed"
    balance_every: Annotated[int, Field(ge=1)] = 50

    @model_validator(mode="after")
    def _each_phase_has_a_term(self) -> "Objective":
        if self.phases is None:
            return self
        on = active_terms(self)
        if not set(on) & set(LAYER_TERMS) or not set(on) - set(LAYER_TERMS):
            raise ValueError(
                f"phases: the terms that are on are {', '.join(on) or 'none'}, expected feature or "
                "attention for the first phase and output or labels for the second; give them "
                "weights, or leave phases out"
            )
        return self

    def weights_at(self, step: int, steps: int) -> dict[str, float]:
        """Return the weight of each term that counts at a step of `steps`; a 0 is left out.

        Schedules of weights run over the whole run, phases or not.
        """
        progress = step / max(1, steps)
        found = {term: getattr(self, term).weight.weight_at(progress) for term in TERMS}
        if self.phases is not None:
            is_first = step < self.phases.first_steps(steps)
            found = {
                term: weight for term, weight in found.items() if (term in LAYER_TERMS) == is_first
            }
        return {term: weight for term, weight in found.items() if weight > 0}


def active_terms(objective: Objective) -> tuple[str, ...]:
    """Return the terms whose weight is not 0 throughout."""
    return tuple(term for term in TERMS if not getattr(objective, term).weight.is_off)


def check_task(objective: Objective, task: str, *, key: str = "loss") -> None:
    """Refuse an output loss that means nothing for a task's outputs.

    A distribution over classes is told apart by the softmax divergences, independent classes by
    binary_kl; bare logits, and so a number, by mse.

    Args:
        objective: The terms.
        task: What the student is for.
        key: Where the objective stands, for the message.

    Raises:
        ConfigError: If loss and task do not fit.
    """
    if objective.output.weight.is_off:
        return
    loss = objective.output.loss
    if models_language(task) or task == "classification":
        fits, use = loss != "binary_kl", "forward_kl or another divergence of distributions, or mse"
    elif task == "multi-label":
        fits, use = loss in ("binary_kl", "mse"), "binary_kl or mse"
    else:
        fits, use = loss == "mse", "mse"
    if not fits:
        raise ConfigError(f"{key}.output.loss: {loss} does not fit the task {task}; use {use}")


class Alignment(Section):
    """Which student layer learns from which teacher layer.

    `uniform` spreads the student's layers over the teacher's depth, `last` pairs the last ones
    alone (MiniLM, arXiv 2002.10957), `emd` lets every student layer learn from all captured ones
    by optimal transport (BERT-EMD, arXiv 2010.06133); a mapping names pairs, student layer first.
    `embeddings` adds the pair 0: 0, the input of the first block, to a uniform or emd map of
    hidden states.
    """

    layers: Literal["uniform", "last", "emd"] | dict[int, int] = "uniform"
    embeddings: bool = True
