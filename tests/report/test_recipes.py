"""A student's section becomes phrases that leave nothing out but what is off."""

from pipeline.report.recipes import recipe


def test_a_section_is_said_whole():
    found = recipe(
        {
            "teacher": "main",
            "model": {
                "architecture": {"num_hidden_layers": 2, "hidden_size": 64},
                "init": "teacher-layers",
                "blocks": {"every": 3},
                "lora": {"r": 4},
            },
            "align": {"layers": {1: 2}, "embeddings": False},
            "loss": {
                "feature": {"weight": 0.0, "loss": "cosine"},
                "attention": {"weight": {"start": 1.0, "end": 0.5}, "loss": "relations"},
                "output": {"weight": 1.0, "temperature": 2.0},
                "phases": {"features": 0.5},
            },
            "train": {"epochs": 3, "learning_rate": 0.002},
        }
    )
    assert found.start == (
        "num_hidden_layers 2, hidden_size 64; init teacher-layers, blocks (every 3), lora (r 4)"
    )
    assert found.match == (
        "(start 1.0, end 0.5) attention (relations); 1.0 output (temperature 2.0); "
        "phases (features 0.5)"
    )
    assert found.align == "layers (1 2), embeddings false"
    assert found.train == "epochs 3, learning_rate 0.002"


def test_what_is_left_out_is_not_made_up():
    found = recipe({"teacher": "main", "model": {"checkpoint": "here"}})
    assert (found.start, found.match, found.align, found.train) == ("checkpoint here", "", "", "")
