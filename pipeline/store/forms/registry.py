"""The forms by kind and name. A new form is one file and one line here."""

from typing import Any

from pipeline.errors import ConfigError
from pipeline.store.forms.bfloat16 import BFloat16
from pipeline.store.forms.dense import Dense
from pipeline.store.forms.float16 import Float16
from pipeline.store.forms.form import Form
from pipeline.store.forms.head import Head
from pipeline.store.forms.int8 import Int8
from pipeline.store.forms.qk import QueryKey
from pipeline.store.forms.topk import TopK

FORMS: dict[str, dict[str, type[Form]]] = {
    "hidden": {"float16": Float16, "bfloat16": BFloat16, "int8": Int8},
    "attention": {"qk": QueryKey},
    "logits": {"topk": TopK, "head": Head, "dense": Dense},
}


def build_form(kind: str, name: str, options: dict[str, Any]) -> Form:
    """Return the form of this kind and name with these options.

    Raises:
        ConfigError: If the kind has no such form, or the form no such option.
    """
    if name not in FORMS[kind]:
        raise ConfigError(
            f"{kind} form {name!r} is unknown; expected one of {', '.join(FORMS[kind])}"
        )
    values = {key: tuple(v) if isinstance(v, list) else v for key, v in options.items()}
    try:
        return FORMS[kind][name](**values)
    except TypeError as error:
        raise ConfigError(f"{kind} form {name}: {error}; remove or rename the option") from error
