"""The forms by kind and name. A new form is one file and one line here."""

import json
from dataclasses import fields
from functools import cache
from typing import Any

from pydantic import TypeAdapter, ValidationError

from pipeline.errors import ConfigError
from pipeline.store.forms.below import Below
from pipeline.store.forms.bfloat16 import BFloat16
from pipeline.store.forms.dense import Dense
from pipeline.store.forms.float16 import Float16
from pipeline.store.forms.form import Form
from pipeline.store.forms.head import Head
from pipeline.store.forms.int8 import Int8
from pipeline.store.forms.map import Map
from pipeline.store.forms.qk import QueryKey
from pipeline.store.forms.sampled import Sampled
from pipeline.store.forms.topk import TopK
from pipeline.store.forms.value_int8 import ValueInt8

FORMS: dict[str, dict[str, type[Form]]] = {
    "hidden": {"float16": Float16, "bfloat16": BFloat16, "int8": Int8},
    "attention": {"qk": QueryKey, "map": Map, "below": Below},
    "value": {"int8": ValueInt8},
    "logits": {"topk": TopK, "sampled": Sampled, "head": Head, "dense": Dense},
}


_adapter = cache(TypeAdapter)


def build_form(kind: str, name: str, options: dict[str, Any]) -> Form:
    """Return the form of this kind and name with these options.

    Raises:
        ConfigError: If there is no such kind or form, or an option is unknown or out of range.
    """
    forms = FORMS.get(kind, {})
    if name not in forms:
        raise ConfigError(
            f"{kind} form {name!r} is unknown; expected one of {', '.join(forms) or 'none'}"
        )
    known = [field.name for field in fields(forms[name])]  # pyright: ignore[reportArgumentType]
    said = f"{kind} form {name}: its options are {', '.join(known) or 'none'}"
    if unknown := sorted(set(options) - set(known)):
        raise ConfigError(f"{said}; found {', '.join(unknown)}: remove or rename it")
    try:
        # As JSON: there a list is a tuple and an integer a float, and nothing else is lenient.
        return _adapter(forms[name]).validate_json(json.dumps(options), strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(str(part) for part in first["loc"])
        raise ConfigError(f"{said}; {key}: {first['msg']}, found {first['input']!r}") from error
