"""How text is generated, in the words of `params.yaml`. Needs no torch."""

from typing import Annotated, Literal

from pydantic import Field

from pipeline.section import Positive, Section


class GenerationOptions(Section):
    """How a model continues a prompt: by default greedily, the same on every run.

    `temperature` 0 takes the likeliest token, more of it draws from the distribution, of which
    `top_p` keeps the likeliest part (nucleus sampling, arXiv 1904.09751); with several beams too,
    which at 0 are searched. `dtype` is what the weights are loaded in.
    """

    # Left out where it is the default, as in records of earlier versions.
    dtype: Literal["float32", "bfloat16", "float16"] = Field(
        default="float32", exclude_if=lambda dtype: dtype == "float32"
    )
    max_new_tokens: Positive = 64
    num_beams: Positive = 1
    temperature: Annotated[float, Field(ge=0)] = 0.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    batch_size: Positive = 16
    seed: Annotated[int, Field(ge=0)] = 0
