"""All forms by kind and name, including those of other packages.

A built-in form is one file of this folder. Another package can add one as an entry point:

    [project.entry-points."decant.forms"]
    "hidden.fp6" = "my_package.fp6:Fp6"
"""

import difflib
from collections.abc import Mapping
from dataclasses import fields
from functools import cache
from typing import Any

from pydantic import TypeAdapter, ValidationError

from pipeline.axes import Axis
from pipeline.errors import ConfigError, IncompatibleError
from pipeline.provenance import canonical_json, fingerprint
from pipeline.registry import Origin, Registry
from pipeline.store.forms.form import Content, Form, options


def _name(part: Any) -> str | None:
    # A class that only reads an earlier version inherits its name.
    is_form = isinstance(part, type) and issubclass(part, Form) and "name" in vars(part)
    return f"{part.kind}.{part.name}" if is_form else None


FORMS: Registry[type[Form]] = Registry(
    "form", package="pipeline.store.forms", group="decant.forms", name_of=_name
)
"""Form classes by `<kind>.<name>`, as in `hidden.int8`."""

_adapter = cache(TypeAdapter)


def forms_of(kind: str) -> dict[str, type[Form]]:
    """Return the forms of a kind by their names, the most faithful first."""
    forms = [FORMS[key] for key in FORMS if key.startswith(f"{kind}.")]
    return {form.name: form for form in sorted(forms, key=lambda form: form.rank)}


def names_of(
    content: Content | None = None, *, kind: str | None = None, axis: Axis = Axis.TOKEN
) -> str:
    """Return the names of some forms, the most faithful first, as errors advise: `qk or below`."""
    fitting = [
        form
        for form in FORMS.values()
        if content in (None, form.content) and kind in (None, form.kind) and form.axis is axis
    ]
    names = [form.name for form in sorted(fitting, key=lambda form: form.rank)]
    return " or ".join(filter(None, (", ".join(names[:-1]), *names[-1:])))


def build_form(kind: str, name: str, given: Mapping[str, Any]) -> Form:
    """Return the form of this kind and name with the options given.

    Raises:
        ConfigError: If there is no such kind or form, or an option is unknown or out of range.
    """
    if f"{kind}.{name}" not in FORMS:
        known = [key.partition(".")[2] for key in FORMS if key.startswith(f"{kind}.")]
        raise ConfigError(
            f"{kind}.form: found {name!r}, expected one of {', '.join(known) or 'none'}"
        )
    form = FORMS[f"{kind}.{name}"]
    known = [field.name for field in fields(form)]  # pyright: ignore[reportArgumentType]
    for key in sorted(set(given) - set(known)):
        close = difflib.get_close_matches(key, [*known, "form", "layers"], n=1)
        advice = f"did you mean {close[0]!r}?" if close else "remove it"
        raise ConfigError(f"{kind}.{key}: the form {name} has no such option; {advice}")
    try:
        # As JSON: there a list is a tuple and an integer a float, and nothing else is lenient.
        return _adapter(form).validate_json(canonical_json(given), strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join([kind, *map(str, first["loc"])])
        expected = first["msg"].replace("Input should be", "expected")
        raise ConfigError(f"{key}: found {first['input']!r}, {expected}") from error


def stored_form(
    kind: str, name: str, version: int, given: Mapping[str, Any], origin: Origin | None
) -> Form:
    """Return the form that decodes what a store holds.

    Args:
        kind: The signal's kind.
        name: The form's name.
        version: The version of the form that wrote it.
        given: The form's options.
        origin: The package that provided the form; None for a built-in form.

    Raises:
        IncompatibleError: If this software has no such form, option or version, or another version
            of the package that provided the form.
    """
    key = f"{kind}.{name}"
    try:
        FORMS.require(key, origin)
        form = build_form(kind, name, given)
    except ConfigError as error:
        raise IncompatibleError(f"{error}; or use the software that wrote the store") from error
    if (installed := FORMS.origin(key)) != origin:
        here, there = (
            "decant" if one is None else f"{one.package} {one.version}"
            for one in (installed, origin)
        )
        remedy = "" if origin is None else f"pip install {origin.package}=={origin.version}, or "
        raise IncompatibleError(
            f"form {key!r}: written by that of {there}, found that of {here}; {remedy}capture again"
        )
    written = form.as_written_by(version)
    if written is None:
        raise IncompatibleError(
            f"form {key!r}: written by version {version}, this software has version "
            f"{form.version}; use the software that wrote the store, or capture again"
        )
    return written


def origin_of(form: Form) -> Origin | None:
    """Return the package that provides a form; None for a built-in form."""
    return FORMS.origin(f"{form.kind}.{form.name}")


def identity(form: Form) -> str:
    """Return the form's name with a hash of what decides its bytes, as in `int8-1f3a9c02`."""
    stated = {"name": form.name, "version": form.version, "options": options(form)}
    if (origin := origin_of(form)) is not None:
        stated["origin"] = origin.model_dump()
    return f"{form.name}-{fingerprint(stated)[:8]}"
