"""What a student is asked to match: terms of the loss, weights, and layers they meet at.

L = w_feature · L_feature + w_attention · L_attention + w_output · L_output + w_label · L_label
"""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from pipeline.student.schedule import Weight


class Section(BaseModel):
    """A frozen section of parameters: unknown keys and NaN are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class FeatureTerm(Section):
    """Hidden states through a projector, in units of the teacher's channel deviation."""

    loss: Literal["mse"] = "mse"
    weight: Weight = Weight(0.0)
    projector: Literal["linear"] = "linear"
    form: str | None = None
    skip_first_token: bool = False


class AttentionTerm(Section):
    """Attention maps of aligned layers, row by row."""

    loss: Literal["kl"] = "kl"
    weight: Weight = Weight(0.0)
    form: str | None = None


class OutputTerm(Section):
    """The teacher's output distribution, softened by a temperature."""

    loss: Literal["forward_kl"] = "forward_kl"
    weight: Weight = Weight(0.0)
    temperature: Annotated[float, Field(gt=0)] = 1.0
    form: str | None = None


class LabelTerm(Section):
    """The true labels."""

    weight: Weight = Weight(0.0)


class Objective(Section):
    """All terms; one whose weight is 0 is off: it costs nothing and needs nothing of the store."""

    feature: FeatureTerm = FeatureTerm()
    attention: AttentionTerm = AttentionTerm()
    output: OutputTerm = OutputTerm()
    labels: LabelTerm = LabelTerm()


class Alignment(Section):
    """Which student layer learns from which teacher layer.

    `uniform` spreads the student's layers over the teacher's depth; a mapping names pairs, student
    layer first. `embeddings` adds the pair 0: 0, the input of the first block, to a uniform map of
    hidden states.
    """

    layers: Literal["uniform"] | dict[int, int] = "uniform"
    embeddings: bool = True
