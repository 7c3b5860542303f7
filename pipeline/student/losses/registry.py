"""What is known of a loss besides its formula: its name in `params.yaml` and what it works on.

A decorator declares a loss where it is defined; `LOSSES` finds it there. Another package gives a
loss by an entry point of the group `decant.losses` that is named `feature.…`, `attention.…` or
`output.…`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, TypeVar, cast, get_args

from pipeline.registry import Registry
from pipeline.section import Section
from pipeline.store.forms.form import Content
from pipeline.student.losses.lazy_torch import Tensor
from pipeline.tasks import Task, models_language

DISTRIBUTIONS = frozenset(
    task for task in get_args(Task) if models_language(task) or task == "classification"
)
"""Tasks whose outputs are a distribution over tokens, or over classes that exclude each other."""
MULTI_LABEL: frozenset[str] = frozenset({"multi-label"})
ALL_TASKS: frozenset[str] = frozenset(get_args(Task))


class LossOptions(Section):
    """The options of a loss; without fields, none."""


@dataclass(frozen=True, kw_only=True)
class Loss:
    """A loss with a name.

    Attributes:
        name: Its name in `params.yaml`.
        term: The term of the objective that it is for.
    """

    term: ClassVar[str]
    name: str

    @property
    def key(self) -> str:
        """Its name in the registry, `term.name`."""
        return f"{self.term}.{self.name}"


@dataclass(frozen=True, kw_only=True)
class FeatureLoss(Loss):
    """A loss of hidden states.

    Attributes:
        function: Takes the student's projected states and the teacher's, both [tokens, channels],
            and the count; returns a sum over tokens divided by the count.
    """

    term = "feature"
    function: Callable[..., Tensor]

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        """Call the function."""
        return self.function(*args, **kwargs)


@dataclass(frozen=True, kw_only=True)
class AttentionLoss(Loss):
    """A loss of attention, or of other maps from query rows to keys.

    Attributes:
        function: Takes log-probabilities of both sides, [batch, heads, rows, keys], which rows
            count, which keys each row sees, and the count; returns a sum over rows divided by the
            count.
        compares: The models' attention maps, or relations of their query, key and value vectors.
        equal_heads: Whether both sides must have the same number of heads.
    """

    term = "attention"
    function: Callable[..., Tensor]
    compares: Literal["maps", "relations"] = "maps"
    equal_heads: bool = False

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        """Call the function."""
        return self.function(*args, **kwargs)


@dataclass(frozen=True, kw_only=True)
class OutputLoss(Loss):
    """A loss of outputs, in one version for each content that stored logits have.

    Every version takes the student's logits, the teacher's side, the temperature and the count, and
    the loss's options as keywords; it returns a sum over rows divided by the count.

    Attributes:
        tasks: The tasks whose outputs it is defined for.
        full: From the teacher's logits over all classes.
        topk: From the ids of the top-k, their log-probabilities and the log-normaliser; None if the
            loss is undefined there.
        sampled: From drawn ids; None if the loss cannot be estimated from them.
        has_temperature: Whether a temperature other than 1 means something.
        options: The model of its options.
    """

    term = "output"
    tasks: frozenset[str]
    full: Callable[..., Tensor]
    topk: Callable[..., Tensor] | None = None
    sampled: Callable[..., Tensor] | None = None
    has_temperature: bool = True
    options: type[LossOptions] = LossOptions

    def serves(self, content: Content) -> bool:
        """Tell whether the loss can be computed from logits of this content."""
        return getattr(self, content) is not None


LOSSES: Registry[Loss] = Registry(
    "loss",
    package="pipeline.student.losses",
    group="decant.losses",
    name_of=lambda value: value.key if isinstance(value, Loss) else None,
)

SomeLoss = TypeVar("SomeLoss", bound=Loss)


def find_loss(kind: type[SomeLoss], name: str) -> SomeLoss:
    """Return the loss of a term by its name in `params.yaml`.

    Raises:
        ConfigError: If there is none, or its package cannot be loaded.
    """
    return cast("SomeLoss", LOSSES[f"{kind.term}.{name}"])


def loss_names(kind: type[Loss]) -> list[str]:
    """Return the names of a term's losses, ours first."""
    prefix = f"{kind.term}."
    return [key.removeprefix(prefix) for key in LOSSES if key.startswith(prefix)]


def built_in(kind: type[SomeLoss]) -> list[SomeLoss]:
    """Return the losses of a term that this package defines."""
    keys = (f"{kind.term}.{name}" for name in loss_names(kind))
    return [cast("SomeLoss", LOSSES[key]) for key in keys if LOSSES.origin(key) is None]


def feature_loss(name: str) -> Callable[[Callable[..., Tensor]], FeatureLoss]:
    """Declare the function below as a feature loss."""
    return lambda function: FeatureLoss(name=name, function=function)


def attention_loss(
    name: str, *, equal_heads: bool = False
) -> Callable[[Callable[..., Tensor]], AttentionLoss]:
    """Declare the function below as a loss of attention maps."""
    return lambda function: AttentionLoss(name=name, function=function, equal_heads=equal_heads)
