"""Message sizes as a virtual clock counts them, against real messages of one device."""

from pathlib import Path

import numpy as np
import pytest
from conftest import new_node, small_settings
from hypothesis import given, settings
from hypothesis import strategies as st
from payloads import ints, nothing_but, ones_for, some_kept

from fedsplit.data import DeviceData
from fedsplit.model.head import Head
from fedsplit.release.admitted import unguarded
from fedsplit.wire.exchange import CutGradients, Download, Gradients, Upload
from fedsplit.wire.head import HeadDownload, HeadUpload, Rows
from fedsplit.wire.release import Release
from fedsplit.wire.sizes import Sizes


def one(number: int) -> np.ndarray:
    return ints(number)


def a_release(seed: int, records: int, width: int, dtype: str, bits: int, columns: int | None) -> Release:
    """Of one device; none without records, as of a device that was not asked."""
    rng = np.random.default_rng(seed)
    shape = (records,) if columns is None or not records else (records, columns)
    y = rng.integers(0, 5, shape) if columns is None or not records else rng.normal(size=shape).astype(np.float32)
    kept = some_kept(rng, records, width, 0.4, bits)
    return Release.pack(
        unguarded(kept, "test"), ints(*[7][:records]), ints(*[records][: min(1, records)]), y, dtype, bits
    )


@settings(max_examples=150)
@given(
    seed=st.integers(0, 99),
    records=st.integers(0, 9),
    width=st.integers(1, 70),
    coding=st.sampled_from([("float16", 0), ("float32", 0), *(("float16", bits) for bits in range(1, 9))]),
    columns=st.none() | st.integers(0, 4),
    failed=st.booleans(),
    refused=st.integers(0, 3),
    summed=st.booleans(),
    parameters=st.integers(1, 50),
)
def test_an_upload_is_as_long_as_it_says(
    seed: int,
    records: int,
    width: int,
    coding: tuple[str, int],
    columns: int | None,
    failed: bool,
    refused: int,
    summed: bool,
    parameters: int,
) -> None:
    dtype, bits = coding
    release = a_release(seed, records, width, dtype, bits, columns)
    upload = nothing_but(release, parameters)
    fields = vars(upload) | {"refused": np.ones((refused, 3), np.int64)}
    if failed:
        fields["failed"] = ints(7)
    if summed:
        fields["gradients"] = Gradients(ints(-1), ints(records), np.ones((1, parameters)))
    sizes = Sizes(parameters, width, 2 if dtype == "float16" else 4, bits, columns)
    values = int(release.counts.sum())
    said = sizes.upload(one(records), one(values), one(failed), one(refused), one(summed))
    assert said.tolist() == [len(Upload(**fields).to_bytes())]


def test_an_upload_of_a_wide_layer_counts_in_four_bytes() -> None:
    for width in (65535, 65536):
        release = a_release(1, 2, width, "float16", 0, None)
        said = Sizes(3, width, 2, 0, None).upload(one(2), one(int(release.counts.sum())), one(0), one(0), one(0))
        assert said.tolist() == [len(nothing_but(release, 3).to_bytes())]


@given(
    parameters=st.integers(1, 50),
    rows=st.booleans(),
    blocks=st.lists(st.integers(0, 30), max_size=3),
    dtype=st.sampled_from(["float16", "float32"]),
)
def test_a_download_is_as_long_as_it_says(parameters: int, rows: bool, blocks: list[int], dtype: str) -> None:
    pending = [CutGradients.pack(r, 1, ints(7), ints(n), np.ones(n, np.float32), dtype) for r, n in enumerate(blocks)]
    schedule = ints(7, 0, 0, 9).reshape(1, 4)[: int(rows)]
    download = Download(1, 9, 1, False, np.ones(parameters, np.float32), schedule, pending, nonce=5)
    sizes = Sizes(parameters, 10, 2 if dtype == "float16" else 4, 0, None)
    said = sizes.download(one(rows), one(len(blocks)), one(sum(blocks)))
    assert said.tolist() == [len(download.to_bytes())]


@given(
    records=st.integers(0, 9),
    outputs=st.integers(1, 4),
    features=st.integers(1, 9),
    dtype=st.sampled_from(["float16", "float32"]),
)
def test_a_question_about_labels_and_its_answer_are_as_long_as_they_say(
    records: int, outputs: int, features: int, dtype: str
) -> None:
    head, rng = Head(features, outputs, bias=True, task="classification"), np.random.default_rng(records)
    rows = Rows.pack(rng.normal(size=(records, features)).astype(np.float32), dtype)
    parameters = np.ones(head.size, np.float32)
    download = HeadDownload(1, 2, 3, 4, ints(7), ints(records), parameters, rows)
    upload = HeadUpload(3, records, 0.5, 1, parameters.astype(np.float64), rows)
    sizes = Sizes(3, 10, 2 if dtype == "float16" else 4, 0, 0)
    assert sizes.head_download(one(records), features, head.size).tolist() == [len(download.to_bytes())]
    assert sizes.head_upload(one(records), features, head.size).tolist() == [len(upload.to_bytes())]


def test_sizes_are_by_device() -> None:
    sizes = Sizes(3, 10, 2, 0, None)
    none, some = ints(0, 0), ints(0, 2)
    alone = [sizes.upload(*(v[i : i + 1] for v in (some, some, none, none, none))).tolist() for i in range(2)]
    assert sizes.upload(some, some, none, none, none).tolist() == [alone[0][0], alone[1][0]]
    assert alone[0] < alone[1]


def triples(device_id: int, num_devices: int) -> DeviceData:
    """Records with three numbers to predict."""
    rng = np.random.default_rng(device_id)
    x, y = rng.normal(size=(9, 12)).astype(np.float32), rng.normal(size=(9, 3)).astype(np.float32)
    return DeviceData((x, y), (x, y))


def failing(device_id: int, num_devices: int) -> DeviceData:
    if device_id == 1:
        raise OSError
    return triples(device_id, num_devices)


@pytest.mark.parametrize("task", ["classification", "regression"])
def test_a_real_node_of_one_device_sends_so_much(task: str, tmp_path: Path) -> None:
    """With rows; with rows and cut gradients; with cut gradients alone; with nothing; a device that sits out."""
    columns = {"classification": None, "regression": 3}[task]
    data = {"builder": "own:linear" if columns is None else "test_sizes:failing", "task": task, "outputs": 3}
    whole = small_settings(data=data, dropping={"policy": "top-k", "k": 4})
    node = new_node(whole, 0, 5, tmp_path / "nodes")
    weights = node.first_layer.flatten(node.first_layer.initial_weights())
    sizes = Sizes(node.first_layer.size, node.first_layer.width, 4, 0, columns)
    rows, nothing = ints(0, 0, 0, 6).reshape(1, 4), np.zeros((0, 4), np.int64)
    first = Download(1, 1, 0, False, weights, rows)
    pending = ones_for(Upload.from_bytes(node.answer("train", first.to_bytes()), parameters=len(weights)), first)
    for number, schedule, blocks in ((2, rows, [pending]), (3, nothing, [pending]), (4, nothing, []), (5, rows, [])):
        download = Download(1, number, 0, False, weights, schedule, blocks)
        payload = download.to_bytes()
        answer = node.answer("train", payload)
        upload = Upload.from_bytes(answer, parameters=len(weights))
        release, refused = upload.release, len(upload.refused)  # which are only counted
        records, values = 6 * len(schedule), int(release.counts.sum())
        assert release.records.sum() == records
        asked = (one(len(schedule)), one(len(blocks)), one(len(pending.codes) * len(blocks)))
        assert sizes.download(*asked).tolist() == [len(payload)]
        said = sizes.upload(one(records), one(values), one(0), one(refused), one(len(blocks)))
        assert said.tolist() == [len(answer)], number
    if columns:
        sits_out = new_node(whole, 1, 5, tmp_path / "nodes")
        schedule = ints(1, 0, 0, 6).reshape(1, 4)
        answer = sits_out.answer("train", Download(1, 1, 0, False, weights, schedule).to_bytes())
        assert sizes.upload(one(0), one(0), one(1), one(0), one(0)).tolist() == [len(answer)]
