"""The forms by kind and name. A new form is one file and one line here.

A form whose bytes change may keep its earlier version as a class in `OLDER`: stores of it stay
readable.
"""

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
from pipeline.store.forms.int4 import Int4
from pipeline.store.forms.int8 import Int8
from pipeline.store.forms.map import Map
from pipeline.store.forms.older import Sampled1, TopK1
from pipeline.store.forms.qk import QueryKey
from pipeline.store.forms.sampled import Sampled
from pipeline.store.forms.topk import TopK
from pipeline.store.forms.value_int8 import ValueInt8

FORMS: dict[str, dict[str, type[Form]]] = {
    "hidden": {"float16": Float16, "bfloat16": BFloat16, "int8": Int8, "int4": Int4},
    "attention": {"qk": QueryKey, "map": Map, "below": Below},
    "value": {"int8": ValueInt8},
    "logits": {"topk": TopK, "sampled": Sampled, "head": Head, "dense": Dense},
}
OLDER: dict[tuple[str, str, int], type[Form]] = {
    ("logits", "topk", 1): TopK1,
    ("logits", "sampled", 1): Sampled1,
}


_adapter = cache(TypeAdapter)


def build_form(kind: str, name: str, options: dict[str, Any], version: int | None = None) -> Form:
    """Return the form of this kind and name with these options.

    Args:
        kind: What it is a form of.
        name: Its name.
        options: Its own options.
        version: An earlier version, if there is one that can still be read; else the present one.

    Raises:
        ConfigError: If there is no such kind or form, or an option is unknown or out of range.
    """
    forms = FORMS.get(kind, {})
    if name not in forms:
        raise ConfigError(
            f"{kind} form {name!r} is unknown; expected one of {', '.join(forms) or 'none'}"
        )
    form = forms[name] if version is None else OLDER.get((kind, name, version), forms[name])
    known = [field.name for field in fields(form)]  # pyright: ignore[reportArgumentType]
    said = f"{kind} form {name}: its options are {', '.join(known) or 'none'}"
    if unknown := sorted(set(options) - set(known)):
        raise ConfigError(f"{said}; found {', '.join(unknown)}: remove or rename it")
    try:
        # As JSON: there a list is a tuple and an integer a float, and nothing else is lenient.
        return _adapter(form).validate_json(json.dumps(options), strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(str(part) for part in first["loc"])
        raise ConfigError(f"{said}; {key}: {first['msg']}, found {first['input']!r}") from error
