"""A store written by the first format decodes for ever, here and by any Zarr reader."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import zarr

from pipeline.store.forms.registry import FORMS
from pipeline.store.reader import StoreReader
from tests.golden.write_store import decoded, forms

GOLDEN = sorted(path for path in Path(__file__).parent.glob("store_v*") if path.is_dir())
each = pytest.mark.parametrize("golden", GOLDEN, ids=lambda path: path.name)


@each
def test_it_decodes_to_the_values_of_the_day_it_was_written(golden, tmp_path):
    # A copy, as a checkout may be a link itself or be read-only.
    found = decoded(shutil.copytree(golden, tmp_path / "store"))
    with np.load(golden.with_name(f"{golden.name}.npz"), allow_pickle=False) as expected:
        assert set(expected.files) == set(found)
        for key in expected.files:
            np.testing.assert_array_equal(found[key], expected[key], err_msg=key, strict=True)


def test_every_form_is_in_one():
    kept = {form for golden in GOLDEN for form in forms(golden)}
    present = {(form.kind, form.name, form.version) for form in FORMS.values()}
    earlier = {("logits", "topk", 1), ("logits", "sampled", 1)}
    assert kept == present | earlier


@each
@pytest.mark.parametrize("pipeline", ["zarr.core.codec_pipeline.BatchedCodecPipeline", "zarrs"])
def test_plain_zarr_reads_the_stored_values(golden, pipeline):
    if pipeline == "zarrs":
        pytest.importorskip("zarrs")
        pipeline = "zarrs.ZarrsCodecPipeline"
    reader = StoreReader(golden)
    capacity = reader.plan["segment_tokens"]
    with zarr.config.set({"codec_pipeline.path": pipeline}):
        group = zarr.open_group(golden / "features.zarr", mode="r")
        for number in range(len(reader.plan["segments"])):
            segment = reader.read_segment(number, reader.signals)
            for name, parts in segment.features.items():
                for part, values in parts.items():
                    array = group[f"{name}/{part}"]
                    assert isinstance(array, zarr.Array)
                    rows = len(values)
                    plain = np.asarray(array[number * rows : (number + 1) * rows])
                    np.testing.assert_array_equal(plain, values, strict=True)
            ids = group["tokens/input_ids"]
            assert isinstance(ids, zarr.Array)
            plain = np.asarray(ids[number * capacity : (number + 1) * capacity])
            np.testing.assert_array_equal(plain, segment.tokens["input_ids"])


def test_its_groups_can_be_walked():
    group = zarr.open_group(GOLDEN[0] / "features.zarr", mode="r")
    arrays = [name for name, node in group.members(max_depth=None) if isinstance(node, zarr.Array)]
    assert {name.split("/")[0] for name in arrays} == {
        "attention",
        "examples",
        "hidden",
        "logits",
        "tokens",
    }
