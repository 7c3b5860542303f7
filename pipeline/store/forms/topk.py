"""Logits as the k most probable tokens, with the true mass of the rest kept as one ghost class.

Stored log-probabilities are of the whole vocabulary and are never renormalised: with top-32
renormalised the gradient points half away (cosine 0.486), with the ghost class it is 0.973 to
0.9995. The logsumexp of the whole vocabulary is stored for every temperature asked for, because it
cannot be derived from one another. Log-probabilities err by at most 2^-11 of their size (float16).
Ids fit 16 bits up to a vocabulary of 65,536; beyond, compression packs them.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar

import numpy as np
from array_api_compat import array_namespace, is_torch_array
from pydantic import Field

from pipeline.axes import Axis
from pipeline.errors import IncompatibleError
from pipeline.store.forms.form import Array, Channels, Error, Geometry, Part


def log_softmax(values: Array) -> Array:
    """Return log-probabilities along the last axis; the largest value is taken off first."""
    xp = array_namespace(values)
    shifted = values - xp.max(values, axis=-1, keepdims=True)
    return shifted - xp.log(xp.sum(xp.exp(shifted), axis=-1, keepdims=True))


def log_sum_exp(values: Array) -> Array:
    """Return log Σ exp along the last axis, without overflow."""
    xp = array_namespace(values)
    largest = xp.max(values, axis=-1, keepdims=True)
    return xp.log(xp.sum(xp.exp(values - largest), axis=-1)) + largest[..., 0]


def largest(values: Array, k: int) -> tuple[Array, Array]:
    """Return the `k` largest entries of each row and their columns, columns ascending.

    Which of several equal entries at the edge is kept is up to the array library.
    """
    if is_torch_array(values):
        columns = values.topk(k, dim=-1, sorted=False).indices.sort(dim=-1).values
        return values.gather(-1, columns), columns
    columns = np.sort(np.argpartition(values, -k, axis=-1)[..., -k:], axis=-1)
    return np.take_along_axis(values, columns, axis=-1), columns


@dataclass(frozen=True)
class TopK:
    """Serves the output loss of language models at the temperatures captured."""

    k: Annotated[int, Field(ge=1)] = 64
    temperatures: Annotated[
        tuple[Annotated[float, Field(gt=0, allow_inf_nan=False)], ...], Field(min_length=1)
    ] = (1.0,)

    name: ClassVar[str] = "topk"
    version: ClassVar[int] = 1
    kind: ClassVar[str] = "logits"
    axis: ClassVar[Axis] = Axis.TOKEN
    needs_channels: ClassVar[bool] = False

    def parts(self, geometry: Geometry) -> dict[str, Part]:
        """Ids and log-probabilities of `k` tokens, and a normaliser for every temperature."""
        if not 0 < self.k < geometry.vocab:
            raise IncompatibleError(
                f"logits form topk: k is {self.k}, the teacher's vocabulary {geometry.vocab}; "
                "choose 0 < k < vocabulary, or the form head, which keeps all of it"
            )
        return {
            "ids": Part("uint16" if geometry.vocab <= 2**16 else "uint32", (self.k,)),
            "log_probs": Part("float16", (self.k,)),
            "log_normalizer": Part("float32", (len(self.temperatures),)),
        }

    def encode(self, values: Mapping[str, Array], channels: Channels | None) -> dict[str, Array]:
        """Encode `logits` (tokens, vocab), softmax over all of the vocabulary before the cut."""
        xp = array_namespace(values["logits"])
        logits = xp.astype(values["logits"], xp.float32)
        log_probs = log_softmax(logits)
        top, ids = largest(log_probs, self.k)
        normalizers = [log_sum_exp(log_probs / temperature) for temperature in self.temperatures]
        ids_dtype = xp.uint16 if logits.shape[-1] <= 2**16 else xp.uint32
        return {
            "ids": xp.astype(ids, ids_dtype),
            "log_probs": xp.astype(top, xp.float16),
            "log_normalizer": xp.stack(normalizers, axis=-1),
        }

    def decode(self, parts: Mapping[str, Array], channels: Channels | None) -> dict[str, Array]:
        """Return `ids` (int64), `log_probs` at temperature 1 and `log_normalizer` a temperature."""
        xp = array_namespace(parts["log_probs"])
        return {
            "ids": xp.astype(parts["ids"], xp.int64),
            "log_probs": xp.astype(parts["log_probs"], xp.float32),
            "log_normalizer": parts["log_normalizer"],
        }

    def errors(
        self, values: Mapping[str, Array], decoded: Mapping[str, Array], channels: Channels | None
    ) -> dict[str, Error]:
        """Log-probabilities as float16 rounds them; the rest exactly, but for float32's rounding.

        `ids` is how much more probable, in nats, the best token left out is than the worst kept.
        """
        xp = array_namespace(values["logits"])
        log_probs, ids = log_softmax(values["logits"]), decoded["ids"]
        true = xp.take_along_axis(log_probs, ids, axis=-1)
        best, _ = largest(log_probs, self.k)
        missed = xp.min(best, axis=-1) - xp.min(true, axis=-1)
        rounding = 2.0**-20 * (1 + xp.abs(xp.min(true, axis=-1)))
        normalizers = xp.stack([log_sum_exp(log_probs / t) for t in self.temperatures], axis=-1)
        return {
            "ids": Error(missed, rounding),
            "log_probs": Error(
                xp.abs(decoded["log_probs"] - true), xp.abs(true) * 2.0**-11 + 2.0**-25
            ),
            "log_normalizer": Error(
                xp.abs(decoded["log_normalizer"] - normalizers),
                2.0**-20 * (1 + xp.abs(normalizers)),
            ),
        }
