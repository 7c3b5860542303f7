"""Parts by name, ours and those of installed packages."""

from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import ConfigError
from pipeline.registry import Origin, Registry
from tests.installed import install_package

GROUP = "decant.test-parts"


def registry() -> Registry[str]:
    """A registry of texts that begin with "part ", of which our folder has none."""

    def name_of(value: Any) -> str | None:
        is_part = isinstance(value, str) and value.startswith("part ")
        return value.split()[1] if is_part else None

    return Registry("part", package="pipeline.training", group=GROUP, name_of=name_of)


def classes() -> Registry[type]:
    """A registry of all classes that are defined in our folder."""

    def name_of(value: Any) -> str | None:
        return value.__name__ if isinstance(value, type) else None

    return Registry("class", package="pipeline.training", group=GROUP, name_of=name_of)


def install(monkeypatch: pytest.MonkeyPatch, site: Path, name: str = "more-parts", **parts: str):
    site.mkdir()
    module = name.replace("-", "_")
    lines = [f"{key} = {value!r}" for key, value in parts.items()]
    install_package(
        monkeypatch,
        site,
        name=name,
        code="\n".join(lines),
        entries={GROUP: {key: f"{module}:{key}" for key in parts}},
        version="1.5",
    )


def test_a_class_of_ours_is_found_where_it_is_defined_and_not_where_it_is_imported():
    known = classes()
    assert known["TrainOptions"].__module__ == "pipeline.training.options"
    assert "ConfigError" not in known
    assert known.origin("TrainOptions") is None


def test_an_installed_package_gives_parts(monkeypatch, tmp_path):
    install(monkeypatch, tmp_path / "site", blue="part blue", red="part red")
    known = registry()
    assert {"blue", "red"} <= set(known)
    assert len(known) == len(list(known))
    assert known["blue"] == "part blue"
    assert known.origin("blue") == Origin(package="more-parts", version="1.5")


def test_an_unknown_name_lists_those_that_are_known(monkeypatch, tmp_path):
    install(monkeypatch, tmp_path / "site", blue="part blue")
    with pytest.raises(ConfigError, match=r"part 'green' is unknown; expected one of .*blue"):
        registry()["green"]


def test_a_missing_package_is_named():
    origin = Origin(package="more-parts", version="1.5")
    with pytest.raises(ConfigError, match=r"more-parts is not installed, .* more-parts==1.5$"):
        registry().require("blue", origin)


def test_what_is_there_is_required_as_it_is_taken(monkeypatch, tmp_path):
    install(monkeypatch, tmp_path / "site", blue="part blue")
    assert registry().require("blue", None) == "part blue"
    with pytest.raises(ConfigError, match="'green' is unknown"):
        registry().require("green", None)


def test_two_packages_that_give_the_same_name_are_named(monkeypatch, tmp_path):
    install(monkeypatch, tmp_path / "first", blue="part blue")
    install(monkeypatch, tmp_path / "second", name="others", blue="part blue")
    with pytest.raises(ConfigError, match=r"given by (more-parts and others|others and more)"):
        registry()["blue"]


def test_a_name_of_ours_is_not_replaced(monkeypatch, tmp_path):
    install(monkeypatch, tmp_path / "site", TrainOptions="part")
    with pytest.raises(ConfigError, match="given by decant and more-parts, expected one package"):
        classes()["TrainOptions"]


def test_a_package_that_cannot_be_imported_is_named(monkeypatch, tmp_path):
    (tmp_path / "site").mkdir()
    install_package(
        monkeypatch,
        tmp_path / "site",
        name="broken",
        code="raise OSError('libfoo.so: not found')",
        entries={GROUP: {"blue": "broken:blue"}},
    )
    with pytest.raises(ConfigError, match=r"package broken cannot be loaded \(OSError: libfoo"):
        registry()["blue"]


@pytest.mark.parametrize(
    ("value", "expected"), [("no part", "is no part"), ("part red", "is 'red'")]
)
def test_an_entry_point_of_something_else_is_refused(monkeypatch, tmp_path, value, expected):
    install(monkeypatch, tmp_path / "site", blue=value)
    with pytest.raises(ConfigError, match=f"package more-parts {expected}, expected a part"):
        registry()["blue"]
