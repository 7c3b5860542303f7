"""How a machine is told to run stages, by its file and by its environment."""

import pytest

from pipeline.errors import ConfigError
from stages.project import dashboard_address, runtime


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
    assert dashboard_address(told(f"dashboard: {given}")) == address
    assert dashboard_address(told("", DASHBOARD=given)) == address


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
