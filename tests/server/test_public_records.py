"""Public records in other modes, and where they come from."""

from pathlib import Path

import numpy as np
import pytest
from conftest import small_settings
from digit_runs import digits, released, sizes, watch
from references import moved, trained

from fedsplit import simulate
from fedsplit.common.errors import ConfigError, DataError
from fedsplit.data.pooled import load_pool
from fedsplit.model.tasks import task_of
from fedsplit.plan.experiment import Experiment
from fedsplit.plan.settings import Settings
from fedsplit.server.warmup import (
    WarmUp,
    warm_up,
)

pytestmark = pytest.mark.usefixtures("quick")


def test_other_modes_begin_where_the_warm_up_ended(out: Path) -> None:
    chosen = digits(protocol={"mode": "pipelined"}, first_layer={"strategy": "FedAvg", "lr": 0.1}, run={"rounds": 2})
    run, grid, _ = watch(chosen, out)
    model = Experiment(chosen).model
    assert run.public is not None and run.result is not None
    warm_up(
        model,
        run.public,
        task_of("classification"),
        Experiment(chosen).policy,
        WarmUp(4, 0.005, 64, 0.0),
        chosen.run.seed,
    )
    weights = model.first_layer.flatten(model.first_layer.initial_weights())
    by_round = {d.round_number: d.weights for _, _, d in grid.sent}
    assert np.array_equal(by_round[1], weights)
    assert not np.array_equal(by_round[2], weights)
    assert {device for _, _, u in grid.received for device in u.release.devices.tolist()} == set(range(2, 10))
    assert run.result["samples"] == 2 * sum(sizes(run, range(2, 8)).values())
    assert run.result["public_only_accuracy"] is not None


def test_public_records_without_epochs_teach_nothing_and_their_devices_still_give_them(out: Path) -> None:
    chosen = digits(protocol={"mode": "pipelined"}, public={"epochs": 0}, first_layer={"strategy": "frozen"})
    run, grid, _ = watch(chosen, out)
    assert run.result is not None and "public_only_accuracy" not in run.result
    assert moved(chosen, trained(out), ["first."]) == 0
    assert set(released(grid)) == set(range(2, 8))


# --- where public records come from ----------------------------------------------------------------------------


def public_file(folder: Path, x: np.ndarray, y: np.ndarray) -> str:
    np.savez(folder / "public.npz", x=x, y=y)
    return str(folder / "public.npz")


def from_file(folder: Path, *borrowed: np.ndarray) -> Settings:
    """Settings with a public file of 30 records of noise and some that are borrowed."""
    x = np.concatenate([np.random.default_rng(0).random((30, 64)), *borrowed])
    file = public_file(folder, x, np.arange(len(x)) % 10)
    return digits(public={"devices": None, "file": file})


def test_a_public_file_teaches_too(tmp_path: Path, out: Path) -> None:
    pool = load_pool("digits")
    rng = np.random.default_rng(0)
    x = np.clip(pool.x + 0.05 * rng.normal(size=pool.x.shape), 0, 1)[:300]
    chosen = digits(public={"devices": None, "file": public_file(tmp_path, x, pool.y[:300])})
    source = Experiment(chosen).source
    public = Experiment(chosen).public
    assert public is not None
    np.testing.assert_array_equal(public.x, x.astype(np.float32))
    result = simulate(chosen, out=out)
    assert result["samples"] == sum(len(source.device(d).train) for d in range(8))  # nobody gives anything away
    assert result["public_only_accuracy"] > 0.3


def test_devices_that_give_their_records_are_joined_in_the_order_of_their_ids() -> None:
    chosen = digits(public={"devices": [5, 2, 5]})
    source = Experiment(chosen).source
    public = Experiment(chosen).public
    assert public is not None
    given = [source.device(d).train for d in (2, 5)]
    np.testing.assert_array_equal(public.x, np.concatenate([r.x for r in given]))
    np.testing.assert_array_equal(public.y, np.concatenate([r.y for r in given]))
    assert Experiment(small_settings()).public is None


@pytest.mark.parametrize(("device", "part"), [(0, "train"), (7, "train"), (9, "test")])
def test_a_public_file_that_overlaps_private_records_is_refused(
    device: int, part: str, tmp_path: Path, out: Path
) -> None:
    source = Experiment(digits()).source
    taken = getattr(source.device(device), part).x[3:4]
    with pytest.raises(DataError, match=f"^public records overlap with those of device {device}, which does not give"):
        simulate(from_file(tmp_path, taken.astype(np.float64)), out=out)
    assert not out.exists()
    nearly = taken.copy()
    nearly[0, 20] += 0.25  # another record
    assert Experiment(from_file(tmp_path, nearly)).public is not None


def test_a_device_that_gives_what_another_holds_too_is_refused(
    tmp_path: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for device in range(4):
        x = np.random.default_rng(device).normal(size=(9, 12))
        if device == 2:
            x[4] = np.random.default_rng(0).normal(size=(9, 12))[7]
        np.savez(tmp_path / f"{device}.npz", x=x, y=np.arange(9) % 3, x_test=x + 9, y_test=np.arange(9) % 3)
    data = {"folder": str(tmp_path), "builder": None}
    chosen = small_settings(data=data, devices={"count": 4, "test": [3]}, public={"devices": [0]})
    with pytest.raises(DataError, match="overlap with those of device 2,"):
        simulate(chosen, out=out)
    both = small_settings(data=data, devices={"count": 4, "test": [3]}, public={"devices": [0, 2]})
    assert Experiment(both).public is not None


@pytest.mark.parametrize(
    ("donors", "refusal"),
    [
        ([0, 9], r"public\.devices: device 9 is a test device"),
        ([8, 9], r"public\.devices: device 8 is a test device"),
        ([0, 10], r"public\.devices: device 10 does not exist: ids are 0\.\.9"),
    ],
)
def test_devices_that_cannot_give_their_records(donors: list[int], refusal: str, out: Path) -> None:
    with pytest.raises(ConfigError, match=refusal):
        simulate(digits(public={"devices": donors}), out=out)
    assert not out.exists()


def test_a_device_with_test_records_cannot_give_its_others_if_all_are_tested(out: Path) -> None:
    chosen = small_settings(devices={"test": "all"}, public={"devices": [0]})
    with pytest.raises(ConfigError, match=r"public\.devices: device 0 is a test device"):
        simulate(chosen, out=out)


def test_no_public_devices_are_refused_in_one_line(out: Path) -> None:
    with pytest.raises(ConfigError, match="public"):
        simulate(small_settings(public={"devices": []}), out=out)
