"""Reading: the values written, joined to their rows by identity, pinned, and from many threads."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from pipeline.errors import IncompatibleError, IntegrityError
from pipeline.store.reader import StoreReader
from tests.store.synthetic import (
    LENGTHS,
    SEGMENT_TOKENS,
    SIGNALS,
    Synthetic,
    channels,
    identity,
    name_of,
    plan,
    rows,
    values,
)

BIT_EQUAL = {"dense"}
TOLERANCE = {
    "float16": 0.01, "bfloat16": 0.06, "int8": 0.2, "fp8": 1.0, "int4": 3.0,
    "qk": 0.1, "map": 0.005, "head": 0.3,
}  # fmt: skip


@pytest.mark.parametrize("name", SIGNALS)
def test_every_row_comes_back_with_its_own_features(whole_store, name):
    reader = StoreReader(whole_store)
    signal = SIGNALS[name]
    for number in range(plan().segments):
        segment = reader.read_segment(number, [name])
        decoded = signal.form.decode(segment.features[name], channels(signal))
        for key, expected in values(signal, number).items():
            if key not in decoded:
                continue
            np.testing.assert_allclose(
                decoded[key][: len(expected)],
                expected,
                atol=TOLERANCE.get(signal.form.name, 0),
                rtol=0,
            )
            swapped = decoded[key][: len(expected)][::-1]
            if len(expected) > 1:
                assert np.abs(swapped - expected).max() > TOLERANCE.get(signal.form.name, 0)


def test_tokens_and_labels_are_those_of_their_source_rows(whole_store):
    reader = StoreReader(whole_store)
    expected = rows()
    seen = []
    for split in LENGTHS:
        for number in reader.segments(split):
            segment = reader.read_segment(number)
            for i, start, length in zip(
                segment.examples, segment.offset, segment.length, strict=True
            ):
                ids = segment.tokens["input_ids"][start : start + length]
                np.testing.assert_array_equal(ids, expected.tokens["input_ids"][i])
                assert reader.examples["label"][i] == expected.label[i]
                seen.append((split, int(reader.examples["source_row"][i])))
    assert sorted(seen) == sorted((s, r) for s, ls in LENGTHS.items() for r in range(len(ls)))


def test_pins(whole_store):
    name = name_of("hidden", 1, "float16")
    digest = StoreReader(whole_store).signal(name).digest
    StoreReader(whole_store, {name: digest})
    with pytest.raises(IncompatibleError, match=r"has digest .* run the select stage again"):
        StoreReader(whole_store, {name: "0" * 64})
    with pytest.raises(IncompatibleError, match="no signal hidden/9/x; it has attention/1"):
        StoreReader(whole_store, {"hidden/9/x": digest})
    with pytest.raises(IncompatibleError, match="no signal hidden/9/x"):
        StoreReader(whole_store).signal("hidden/9/x")


def test_skipped_examples_are_absent(tmp_path, unsynced):
    synthetic = Synthetic(tmp_path / "s")
    synthetic.plan()
    name = name_of("hidden", 1, "float16")
    writer = synthetic.writer(name)
    writer.declare()
    for number in range(plan().segments):
        writer.write_segment(
            number,
            synthetic.buffers(writer, number),
            rows=identity(number),
            skipped=(0,) if number == 1 else (),
        )
    writer.commit()
    reader = StoreReader(synthetic.root)
    everyone = reader.examples_in(1)
    assert reader.read_segment(1, [name]).examples.tolist() == everyone[1:].tolist()
    assert reader.read_segment(1).examples.tolist() == everyone.tolist()


def test_threads_may_share_a_reader(whole_store):
    names = list(SIGNALS)
    expected = StoreReader(whole_store)
    for _ in range(2):
        reader = StoreReader(whole_store)
        with ThreadPoolExecutor(8) as pool:
            jobs = [pool.submit(reader.read_segment, i % plan().segments, names) for i in range(16)]
            for i, job in enumerate(jobs):
                wanted = expected.read_segment(i % plan().segments, names)
                for name in names:
                    for part, array in wanted.features[name].items():
                        np.testing.assert_array_equal(array, job.result().features[name][part])


def test_assets(whole_store):
    reader = StoreReader(whole_store)
    assert reader.asset("lm_head").name == "lm_head.safetensors"
    assert reader.teacher_config() == {"model_type": "llama"}
    assert [p.name for p in reader.tokenizer().iterdir()] == ["tokenizer.json"]
    with pytest.raises(IncompatibleError, match="no asset blocks; ask for it"):
        reader.asset("blocks")


def test_channels_only_where_a_signal_has_them(whole_store):
    reader = StoreReader(whole_store)
    found = reader.channels(name_of("hidden", 2, "int8"))
    assert found is not None
    np.testing.assert_array_equal(found.mean, np.arange(6) - 2)
    assert reader.channels(name_of("attention", 1, "qk")) is None


def test_bytes_and_tokens_are_of_the_files(whole_store):
    stored = StoreReader(whole_store).signal(name_of("hidden", 1, "float16"))
    files = (whole_store / "features.zarr" / stored.declaration.name).rglob("c/*/*")
    assert stored.bytes == sum(file.stat().st_size for file in files)
    assert stored.tokens == sum(int(x.sum()) for x in LENGTHS.values())
    assert plan().segments * SEGMENT_TOKENS >= stored.tokens


def test_no_store_is_an_integrity_error(tmp_path):
    with pytest.raises(
        IntegrityError, match="no complete store is here; run the capture stage first"
    ):
        StoreReader(tmp_path)
