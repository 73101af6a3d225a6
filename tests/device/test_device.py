"""A node by itself: what its noise, its ledger and its failures look like to the server."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import new_node, small_settings
from own import linear
from payloads import ones_for

from fedsplit import DeviceData
from fedsplit.device.node import Node
from fedsplit.wire.exchange import CutGradients, Download

DEVICES = 5


def twins(device_id: int, num_devices: int) -> DeviceData:
    """Records that stand at the same places to train and to test."""
    records = linear(device_id, num_devices).train
    return DeviceData(records, records)


def node(folder: Path, dtype: str = "float32", number: int = 0, nodes: int = 1, **dropping: Any) -> Node:
    """One of so many nodes, by default with all devices."""
    folder.mkdir(exist_ok=True)
    settings = small_settings(
        data={"builder": "test_device:twins"},
        devices={"per-node": DEVICES},
        dropping=dropping,
        protocol={"dtype": dtype},
    )
    return new_node(settings, number, nodes, folder / "nodes")


def ask(node: Node, round_number: int = 1, pending: tuple[CutGradients, ...] = ()) -> Download:
    """A download that asks for everything."""
    rows = [(d, 0, 0, len(linear(d, DEVICES).train)) for d in node.device_ids.tolist()]
    weights = node.first_layer.flatten(node.first_layer.initial_weights())
    return Download(1, round_number, 0, False, weights, np.array(rows), list(pending))


def test_noise_of_training_is_not_that_of_testing(tmp_path: Path) -> None:
    """The same on both would be gone from their difference: their records share their indices."""
    one = node(tmp_path, policy="none", clip=1.0, noise=0.5, mask="keyed")
    trained, tested = one.exchange(ask(one)).release, one.evaluate(ask(one)).release
    assert np.array_equal(trained.bitmap, tested.bitmap)
    difference = trained.values() - tested.values()
    assert difference.std() == pytest.approx(0.5 * 2**0.5, rel=0.1)


@pytest.mark.parametrize(
    ("dtype", "dropping", "each", "more"),
    [
        ("float16", {"policy": "top-k", "k": 4}, 16, 16),  # the exponent is one of the release's numbers, too
        ("float32", {"policy": "top-k", "k": 4}, 32, 0),
        ("float16", {"policy": "bits", "bits": 3}, 3, 0),
        ("float16", {"policy": "bits", "bits": 1}, 0, 0),
    ],
    ids=lambda value: value.get("policy", "") if isinstance(value, dict) else str(value),
)
def test_the_ledger_counts_all_bits_that_leave(
    dtype: str, dropping: dict[str, Any], each: int, more: int, tmp_path: Path
) -> None:
    one = node(tmp_path, dtype, **dropping)
    upload = one.exchange(ask(one))
    assert upload.ledger.bits == one.first_layer.width + each * upload.release.counts.max() + more


def test_packing_does_not_show_in_the_gradients_of_devices_with_few_records(tmp_path: Path) -> None:
    """Not to what a float32 could show: adaptive steps would magnify that."""

    def total(one: Node) -> np.ndarray:
        first = ask(one)
        return one.exchange(ask(one, 2, (ones_for(one.exchange(first), first),))).gradients.sums.sum(axis=0)

    together = total(node(tmp_path / "together", policy="none"))
    apart = sum(total(node(tmp_path / "apart", number=n, nodes=DEVICES, policy="none")) for n in range(DEVICES))
    assert np.abs(together).max() > 1
    np.testing.assert_allclose(together, apart, rtol=1e-12, atol=1e-12)


def test_a_device_that_fails_in_a_backward_half_loses_its_block(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server divides by all records of a block: a sum over some of them would be wrong."""
    one = node(tmp_path, policy="none")
    first = ask(one)
    cut = ones_for(one.exchange(first), first)
    whole = one.exchange(ask(one, 2, (cut,)))
    assert whole.lost.tolist() == []
    assert whole.gradients.records.tolist() == [sum(len(linear(d, DEVICES).train) for d in range(DEVICES))]
    load = one.records._data

    def failing(device: int) -> DeviceData:
        if device == 3:
            raise OSError("no such disk")
        return load(device)

    monkeypatch.setattr(one.records, "_data", failing)
    upload = one.exchange(ask(one, 3, (cut,)))
    assert upload.lost.tolist() == [1]
    assert upload.gradients.records.size == upload.gradients.sums.size == 0
    assert upload.failed.tolist() == [3]
