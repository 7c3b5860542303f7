"""Small results with round numbers, for the report's tests."""

from pipeline.report.results import (
    Agreement,
    CorpusSummary,
    Curve,
    ModelMetrics,
    SignalResult,
    StudentResult,
    TeacherResult,
    TokensSummary,
)


def metrics(name, perplexity, parameters, speed, **changes):
    return ModelMetrics(
        name=name,
        task="causal-lm",
        test_perplexity=perplexity,
        parameters=parameters,
        parameters_without_embeddings=parameters // 2,
        bytes_on_disk=4 * parameters,
        tokens_per_second=speed,
        latency_seconds=0.0125,
        **changes,
    )


def teacher(name="big", **changes):
    values = {
        "name": name,
        "metrics": metrics(name, 40.0, 4_000_000, 1000.0),
        "tokens": TokensSummary(
            vocab=2048, max_length=128, rows={"train": 90}, tokens={"train": 8123}, digest="tokens1"
        ),
        "signals": (
            SignalResult(
                signal="hidden/3/bfloat16-1a2b3c4d",
                form="bfloat16",
                digest="9f" * 32,
                tokens=1000,
                bytes=374_000,
                segments=5,
                store="f00dface",
            ),
        ),
    }
    return TeacherResult(**values | changes)


def student(name, perplexity=80.0, *, of="big", terms=("loss", "labels"), **changes):
    curve = Curve(step=(1, 2, 3), terms=dict.fromkeys(terms, (3.0, 2.0, 1.0)))
    values = {
        "name": name,
        "teacher": of,
        "metrics": metrics(
            name, perplexity, 1_000_000, 2500.0, agreement=Agreement(kl=0.25, top1=0.625)
        ),
        "curve": curve if terms else None,
    }
    return StudentResult(**values | changes)


def corpus():
    return CorpusSummary(
        task="causal-lm",
        rows={"train": 700, "test": 77},
        text_bytes={"train": 1_900_000, "test": 100_000},
        source={"kind": "python-docs"},
        digest="corpus1",
    )


def classifier(name, accuracy, f1, matthews):
    return ModelMetrics(
        name=name,
        task="classification",
        test_accuracy=accuracy,
        test_f1=f1,
        test_matthews=matthews,
    )
