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


def scored(name, task, score, values, *, lower=False, spread=0.03, **changes):
    """Metrics as `evaluate` writes them: a headline, its direction, intervals."""
    tested = {f"test_{metric}": value for metric, value in values.items()}
    parts = {
        "name": name,
        "task": task,
        "score": score,
        "lower_is_better": lower,
        "test_score": values.get(score),
        "test_intervals": {
            metric: (value * (1 - spread), value * (1 + spread)) for metric, value in values.items()
        },
        "parameters": 1_000_000,
        "tokens_per_second": 2500.0,
    }
    return ModelMetrics(**parts | tested | changes)


LANGUAGE = {
    "perplexity": 12.25,
    "perplexity_per_word": 61.5,
    "perplexity_per_byte": 1.875,
    "bits_per_byte": 0.907,
    "nats_per_token": 2.506,
}
TEXT = {
    "bleu": 31.25,
    "chrf": 54.5,
    "rouge1": 0.625,
    "rouge2": 0.375,
    "rougeL": 0.5,
    "cer": 0.25,
    "wer": 0.4375,
    "exact_match": 0.125,
}
SIGNATURES = {
    "bleu": "nrefs:var|case:mixed|eff:no|tok:13a|smooth:exp|version:2.6.0",
    "chrf": "nrefs:var|case:mixed|eff:yes|nc:6|nw:0|space:no|version:2.6.0",
}
VALUES = {
    "causal-lm": ("perplexity", LANGUAGE),
    "prompt-target": ("bleu", LANGUAGE | TEXT),
    "messages": ("rougeL", LANGUAGE | TEXT),
    "classification": (
        "accuracy",
        {"accuracy": 0.875, "f1": 0.75, "matthews": 0.5, "ece": 0.0625},
    ),
    "multi-label": ("f1", {"accuracy": 0.5, "f1": 0.75, "f1_macro": 0.625, "ece": 0.125}),
    "regression": ("pearson", {"pearson": 0.875, "spearman": 0.8125, "mse": 0.4375}),
}


def run_of(task, students=("aligned", "labels-only", "soft")):
    """A teacher and students of any task; each student is a tenth worse than the one before."""
    score, values = VALUES[task]
    lower = score == "perplexity"
    better_when_less = {*LANGUAGE, "cer", "wer", "ece", "mse"}

    def worse(steps):
        return {
            metric: value * (1.1**steps if metric in better_when_less else 0.9**steps)
            for metric, value in values.items()
        }

    generated = task in {"prompt-target", "messages"}
    extra = {"signatures": SIGNATURES, "generated_rows": 200} if generated else {}
    top = TeacherResult(
        name="big",
        metrics=scored("big", task, score, worse(0), lower=lower, **extra | {"parameters": 10**7}),
    )
    trained = [
        StudentResult(
            name=name,
            teacher="big",
            metrics=scored(
                name,
                task,
                score,
                worse(steps),
                lower=lower,
                agreement=Agreement(kl=0.25, top1=0.625),
                against_teacher={key: TEXT[key] * 1.1 for key in TEXT} if generated else {},
                **extra,
            ),
        )
        for steps, name in enumerate(students, start=1)
    ]
    return [top], trained
