"""How a machine is told to run stages, by its file and by its environment."""

import contextlib
import string

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.errors import ConfigError
from pipeline.runtime import Runtime
from stages.project import runtime
from tests.cases import error_line


@pytest.fixture
def told(tmp_path, monkeypatch):
    """Write `runtime.yaml` in an empty project, and variables, and read them."""
    monkeypatch.chdir(tmp_path)

    def read(text: str = "", **variables: str):
        (tmp_path / "runtime.yaml").write_text(text)
        for name, value in variables.items():
            monkeypatch.setenv(f"DECANT_{name}", value)
        return runtime()

    return read


@pytest.mark.parametrize(
    "scheduler",
    ["synchronous", "threads", "processes", "tcp://127.0.0.1:8786", "tls://node7:8786"],
)
def test_a_scheduler_is_a_word_or_an_address(told, scheduler):
    assert told(f"scheduler: {scheduler}").scheduler == scheduler
    assert told(SCHEDULER=scheduler).scheduler == scheduler


@pytest.mark.parametrize("scheduler", ["distributed", "http://host:80", "tcp://host", "tls://:1 x"])
def test_any_other_is_refused_with_what_is_expected(told, scheduler):
    with pytest.raises(ConfigError, match=r"scheduler: found .*, expected synchronous.*tcp://HOST"):
        told(SCHEDULER=scheduler)


def test_the_environment_names_certificates(told):
    settings = told("tls_ca: ca.pem\ntls_key: other.pem", TLS_KEY="key.pem")
    assert [str(settings.tls_ca), settings.tls_cert, str(settings.tls_key)] == [
        *("ca.pem", None, "key.pem")
    ]


@pytest.mark.parametrize(
    ("given", "address"),
    [
        ("false", ""),
        ("true", "127.0.0.1:0"),
        ("127.0.0.1:8787", "127.0.0.1:8787"),
    ],
)
def test_a_dashboard_is_on_loopback_unless_told(told, given, address):
    assert told(f"dashboard: {given}").dashboard_address == address
    assert told("", DASHBOARD=given).dashboard_address == address


@pytest.mark.parametrize(
    "reports", ["report_to: [tensorboard, wandb]", "report_to: tensorboard,wandb"]
)
def test_reports_are_a_list_or_a_text_with_commas(told, reports):
    assert told(reports).report_to == ("tensorboard", "wandb")
    assert told("", REPORT_TO="dvclive, mlflow").report_to == ("dvclive", "mlflow")


def test_a_micro_batch_is_a_number_or_auto(told):
    assert told("").micro_batch_size == 0
    assert told("micro_batch_size: 8").micro_batch_size == 8
    assert told("", MICRO_BATCH_SIZE="auto", PROCESSES="2").micro_batch_size == "auto"
    with pytest.raises(ConfigError, match=r"found 'large', expected .* or 'auto'"):
        told("", MICRO_BATCH_SIZE="large")


@pytest.mark.parametrize("threads", ["²", "٣", "99999999999", "-1", "9" * 5000, "1.5", "two"])
def test_a_number_that_is_none_is_one_line(told, threads):
    with pytest.raises(ConfigError, match=r"^runtime.yaml or DECANT_\*: threads: found ") as error:
        told("", THREADS=threads)
    assert "quotes" not in str(error.value)


def test_a_variable_set_to_nothing_is_not_set(told):
    assert told("threads: 3", THREADS="").threads == 3


@pytest.mark.parametrize("text", ["[threads, 2]", "threads", "7"])
def test_a_file_without_keys_is_refused(told, text):
    with pytest.raises(ConfigError, match=r"^runtime.yaml: found \w+, expected keys and values"):
        told(text)


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    key=st.sampled_from(sorted(Runtime.model_fields)),
    text=st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=30)
    | st.text(string.digits + "-.eE_,", max_size=30),
)
def test_any_text_in_a_variable_is_a_value_or_one_line(key, text, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with monkeypatch.context() as patch:
        patch.setenv(f"DECANT_{key.upper()}", text)
        with contextlib.suppress(ConfigError):
            assert isinstance(runtime(), Runtime)


@pytest.mark.parametrize("level", ["debug", "DEBUG", "Warning", ""])
def test_a_log_level_is_named_in_any_case(decant, empty, monkeypatch, level):
    monkeypatch.setenv("DECANT_LOG", level)
    assert decant("check").exit_code == 0


def test_an_unknown_log_level_is_one_line(decant, empty, monkeypatch):
    monkeypatch.setenv("DECANT_LOG", "loud")
    result = decant("check")
    assert result.exit_code == 2
    assert "DECANT_LOG: found 'loud', expected one of CRITICAL" in error_line(result)
