"""The objective: terms of the loss, their weights over the run, and the layers they compare.

L = w_feature · L_feature + w_attention · L_attention + w_output · L_output + w_labels · L_labels

Losses, layer maps and projectors are named; their registries know the names.
"""

from collections.abc import Callable, Iterable
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    RootModel,
    Tag,
    ValidationError,
    field_validator,
    model_validator,
)

from pipeline.errors import ConfigError
from pipeline.registry import Origin, Registry
from pipeline.section import Section
from pipeline.store.forms.form import Content
from pipeline.store.forms.registry import forms_of, names_of
from pipeline.student.align.layer_maps import LAYER_MAPS
from pipeline.student.align.projectors import PROJECTORS
from pipeline.student.losses.registry import (
    LOSSES,
    AttentionLoss,
    FeatureLoss,
    OutputLoss,
    built_in,
    find_loss,
    loss_names,
)

Relation = Literal["qq", "kk", "vv"]
TERMS = ("feature", "attention", "output", "labels")
LAYER_TERMS = ("feature", "attention")
"""The terms that compare layers; the others compare predictions."""

NonNegative = Annotated[float, Field(ge=0, strict=True, allow_inf_nan=False)]
Share = Annotated[float, Field(gt=0, le=1, strict=True, allow_inf_nan=False)]


class LinearWeight(BaseModel):
    """A weight that goes from `start` to `end` along a straight line, then stays.

    Attributes:
        start: Weight at the first step.
        end: Weight from `until` on.
        until: Share of the run after which `end` is reached.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    start: NonNegative
    end: NonNegative = 0.0
    until: Share = 1.0


class WindowWeight(BaseModel):
    """A weight that holds within a share of the run and is 0 before and after.

    Attributes:
        value: Weight inside the window.
        from_: Share of the run at which it begins; `from` in `params.yaml`.
        to: Share of the run at which it ends; the step at `to` itself is outside, unless it is 1.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", serialize_by_alias=True)

    value: NonNegative
    from_: Annotated[float, Field(ge=0, lt=1, strict=True, allow_inf_nan=False)] = Field(
        0.0, alias="from"
    )
    to: Share = 1.0

    @model_validator(mode="after")
    def _is_a_window(self) -> "WindowWeight":
        if self.from_ >= self.to:
            raise ValueError(f"from {self.from_}, to {self.to}: expected from below to; correct it")
        return self


def _alternative(weight: Any) -> str:
    """Say which way of writing a weight is meant, so that an error names a key of that one."""
    if isinstance(weight, WindowWeight) or (
        isinstance(weight, dict) and {"value", "from", "to"} & weight.keys()
    ):
        return "window"
    return "line" if isinstance(weight, dict | LinearWeight) else "constant"


AnyWeight: TypeAlias = Annotated[
    Annotated[NonNegative, Tag("constant")]
    | Annotated[LinearWeight, Tag("line")]
    | Annotated[WindowWeight, Tag("window")],
    Discriminator(_alternative),
]


class Weight(RootModel[AnyWeight]):
    """A term's weight in `params.yaml`: a number, `{start, end, until}` or `{value, from, to}`."""

    model_config = ConfigDict(frozen=True)

    @property
    def is_off(self) -> bool:
        """Whether the weight is 0 in the whole run; the term then needs no signal and no column."""
        if isinstance(self.root, LinearWeight):
            return self.root.start == 0 and self.root.end == 0
        if isinstance(self.root, WindowWeight):
            return self.root.value == 0
        return self.root == 0

    def weight_at(self, progress: float) -> float:
        """Return the weight after `progress`, a share of the run; outside [0, 1] the ends hold."""
        if isinstance(self.root, WindowWeight):
            window, progress = self.root, min(max(progress, 0.0), 1.0)
            is_inside = window.from_ <= progress < window.to or progress == window.to == 1.0
            return window.value if is_inside else 0.0
        line = self.root
        if not isinstance(line, LinearWeight):
            return line
        share = min(max(progress / line.until, 0.0), 1.0)
        # Not start + share * (end - start): that misses `end` by a rounding step at share 1.
        return (1.0 - share) * line.start + share * line.end


def _known(names: Callable[[], Iterable[str]], find: Callable[[str], Any]) -> AfterValidator:
    """Return a validator of a name that one of the registries must know."""

    def check(name: str) -> str:
        known = list(names())
        if name not in known:
            raise ValueError(f"found {name!r}, expected one of {', '.join(known)}; correct it")
        try:
            find(name)
        except ConfigError as error:  # Of another package, and it cannot be loaded.
            raise ValueError(str(error)) from error
        return name

    return AfterValidator(check)


def _loss(kind: type[FeatureLoss | AttentionLoss | OutputLoss]) -> AfterValidator:
    return _known(lambda: loss_names(kind), lambda name: find_loss(kind, name))


def _part(registry: Registry[Any]) -> AfterValidator:
    return _known(lambda: registry, registry.__getitem__)


class FeatureTerm(Section):
    """Hidden states through a projector, in units of the teacher's channel deviation."""

    loss: Annotated[str, _loss(FeatureLoss)] = "mse"
    weight: Weight = Weight(0.0)
    projector: Annotated[str, _part(PROJECTORS)] = "linear"
    form: str | None = None
    skip_first_token: bool = False


class AttentionTerm(Section):
    """Attention maps of aligned layers, row by row, or relations of their vectors.

    Relations are how tokens relate by query (`qq`), key (`kk`) and value (`vv`), which both sides
    split into `relation_heads` (None: the most that divide all widths).
    """

    loss: Annotated[str, _loss(AttentionLoss)] = "kl"
    weight: Weight = Weight(0.0)
    form: str | None = None
    relations: Annotated[tuple[Relation, ...], Field(min_length=1)] = ("qq", "kk", "vv")
    relation_heads: Annotated[int, Field(ge=1)] | None = None

    @model_validator(mode="after")
    def _relates(self) -> "AttentionTerm":
        if len(set(self.relations)) != len(self.relations):
            raise ValueError(f"relations {', '.join(self.relations)}: expected each once")
        form = forms_of("attention").get(self.form) if self.form else None
        has_vectors = form is None or form.content is not Content.ATTENTION_MAP
        if self.compared_relations and not has_vectors:
            raise ValueError(
                f"form {self.form} holds no query and key, which relations are made of; name "
                f"form {names_of(Content.QUERY_KEY)}, or use loss head_mean"
            )
        return self

    @property
    def compared_relations(self) -> tuple[Relation, ...]:
        """The relations that the loss compares; none if it compares attention maps."""
        compares = find_loss(AttentionLoss, self.loss).compares
        return self.relations if compares == "relations" else ()


class OutputTerm(Section):
    """The teacher's output: a distribution softened by a temperature, or its bare logits (mse).

    `skew` is an option of the skewed divergences; other losses have theirs in `options`.
    """

    loss: Annotated[str, _loss(OutputLoss)] = "forward_kl"
    weight: Weight = Weight(0.0)
    temperature: Annotated[float, Field(gt=0)] = 1.0
    skew: Annotated[float, Field(gt=0, lt=1)] = 0.1
    # Left out of a dump when empty: fingerprints of objectives without options stay as they were.
    options: dict[str, float] = Field(default={}, exclude_if=lambda given: not given)
    form: str | None = None

    @model_validator(mode="after")
    def _fits_the_loss(self) -> "OutputTerm":
        loss = find_loss(OutputLoss, self.loss)
        if not loss.has_temperature and self.temperature != 1.0:
            raise ValueError(
                f"temperature {self.temperature}: loss {self.loss} compares logits as they are; "
                "leave temperature out"
            )
        known = [name for name in loss.options.model_fields if name != "skew"]
        for name in self.options:
            if name not in known:
                raise ValueError(
                    f"options.{name}: loss {self.loss} has "
                    f"{'the options ' + ', '.join(known) if known else 'no options'}; "
                    "correct or remove it"
                )
        try:
            self.loss_options()
        except ValidationError as error:
            first = error.errors()[0]
            if first["type"] == "value_error":
                reason = first["msg"].removeprefix("Value error, ")
                raise ValueError(f"options: {reason}") from error
            expected = first["msg"].removeprefix("Input should be ")
            raise ValueError(
                f"options.{first['loc'][0]}: found {first['input']}, expected a number {expected}"
            ) from error
        return self

    def loss_options(self) -> dict[str, float]:
        """Return all options of the loss, those that are not given at their defaults."""
        loss = find_loss(OutputLoss, self.loss)
        skew = {"skew": self.skew} if "skew" in loss.options.model_fields else {}
        return loss.options(**{**skew, **self.options}).model_dump()


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
        """Return how many of `steps` the first phase has; each has one if there are two."""
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

        Schedules of weights run over all steps, phases or not.
        """
        progress = step / max(1, steps)
        weights = {term: getattr(self, term).weight.weight_at(progress) for term in TERMS}
        if self.phases is not None:
            is_first = step < self.phases.first_steps(steps)
            weights = {
                term: weight
                for term, weight in weights.items()
                if (term in LAYER_TERMS) == is_first
            }
        return {term: weight for term, weight in weights.items() if weight > 0}

    def record(self) -> dict[str, Any]:
        """Return the parameters, and the origins of losses and projectors of other packages."""
        dumped = self.model_dump(mode="json")
        origins: dict[str, Origin | None] = {}
        for term in set(active_terms(self)) - {"labels"}:
            key = f"{term}.{getattr(self, term).loss}"
            origins[key] = LOSSES.origin(key)
        if not self.feature.weight.is_off:
            projector = self.feature.projector
            origins[f"projector.{projector}"] = PROJECTORS.origin(projector)
        foreign = {key: origin.model_dump() for key, origin in origins.items() if origin}
        return dumped | ({"origins": foreign} if foreign else {})


def active_terms(objective: Objective) -> tuple[str, ...]:
    """Return the terms whose weight is not 0 throughout."""
    return tuple(term for term in TERMS if not getattr(objective, term).weight.is_off)


def check_task(objective: Objective, task: str, *, key: str = "loss") -> None:
    """Refuse an output loss that is not defined for a task's outputs.

    Args:
        objective: The terms.
        task: The student's task.
        key: The key of the objective, for the message.

    Raises:
        ConfigError: If loss and task do not fit.
    """
    if objective.output.weight.is_off:
        return
    loss = find_loss(OutputLoss, objective.output.loss)
    if task not in loss.tasks:
        fitting = [other.name for other in built_in(OutputLoss) if task in other.tasks]
        raise ConfigError(
            f"{key}.output.loss: {loss.name} does not fit the task {task}; use "
            f"{' or '.join(fitting)}"
        )


class Alignment(Section):
    """Which student layer learns from which teacher layer.

    `layers` is the name of a layer map, or names the pairs, student layer first. `embeddings` adds
    the pair 0: 0, the input of the first block, to a named map of hidden states.
    """

    layers: Annotated[str, _part(LAYER_MAPS)] | dict[int, int] = "uniform"
    embeddings: bool = True

    @field_validator("layers", mode="before")
    @classmethod
    def _is_a_name_or_a_mapping(cls, value: Any) -> Any:
        if isinstance(value, dict):
            # The keys of a JSON object are text.
            return {int(key) if str(key).isdigit() else key: pair for key, pair in value.items()}
        if not isinstance(value, str):
            raise ValueError(  # noqa: TRY004 - pydantic reports ValueErrors
                f"found {value!r}, expected {', '.join(LAYER_MAPS)} or a mapping from student "
                "layers to teacher layers; correct it"
            )
        return value
