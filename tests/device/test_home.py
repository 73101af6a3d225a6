"""A real node's folder: made once, refused when something of it is missing, and its guard enforces."""

import logging
import sys
from pathlib import Path

import numpy as np
import pytest
from torch import nn

from fedsplit.cli import main as cli
from fedsplit.common.errors import ConfigError, StateError
from fedsplit.data import DeviceData, Records
from fedsplit.device.home import Home
from fedsplit.model.layer import FirstLayer


def test_a_new_home_is_its_owners_alone(tmp_path: Path) -> None:
    home = Home.create(tmp_path / "home", [7, 3])
    assert home.devices == [3, 7]
    assert (tmp_path / "home").stat().st_mode & 0o077 == 0
    for private in ("secret", "key"):
        assert (tmp_path / "home" / private).stat().st_mode & 0o077 == 0
    assert (tmp_path / "home" / "key.pub").read_bytes() != (tmp_path / "home" / "key").read_bytes()
    home.check()
    assert not home.limits.gradients and home.limits.releases == 1
    assert home.accountant("train").exposures() == 0
    assert Home.create(tmp_path / "other", [3]).device_secret(3) != home.device_secret(3) != home.device_secret(7)


def test_a_home_is_never_replaced(tmp_path: Path) -> None:
    Home.create(tmp_path / "home", [1])
    with pytest.raises(ConfigError, match="is not empty: a node's secret and ledgers are never replaced"):
        Home.create(tmp_path / "home", [1])
    with pytest.raises(ConfigError, match="devices must be different ids"):
        Home.create(tmp_path / "another", [1, 1])


@pytest.mark.parametrize("name", ["secret", "key", "node.toml", "ledger-train.npz", "ledger-test.npz"])
def test_a_home_without_a_part_is_refused(name: str, tmp_path: Path) -> None:
    home = Home.create(tmp_path / "home", [1])
    (home.folder / name).unlink()
    with pytest.raises(StateError, match=f"{home.folder / name.split('.')[0]}.* is missing"):
        read_all(Home(home.folder))


@pytest.mark.parametrize("name", ["secret", "key"])
@pytest.mark.parametrize("mode", [0o640, 0o602])
def test_what_is_private_is_refused_when_others_can_read_it(name: str, mode: int, tmp_path: Path) -> None:
    home = Home.create(tmp_path / "home", [1])
    (home.folder / name).chmod(mode)
    with pytest.raises(StateError, match=f"{home.folder / name} can be read by others: chmod 600 it"):
        read_all(Home(home.folder))


@pytest.mark.parametrize("damage", ['devices = "12"', 'devices = [1]\nallow = "/srv/x"', "devices = 1", "devices = ["])
def test_damaged_settings_are_never_taken_apart(damage: str, tmp_path: Path) -> None:
    home = Home.create(tmp_path / "home", [1], ["own:model"])
    assert Home(home.folder).allowed == ["own:model"]
    (home.folder / "node.toml").write_text(damage)
    with pytest.raises(StateError, match=r"node\.toml is missing or damaged: it must hold devices = \[ids\], allow = "):
        Home(home.folder).devices  # noqa: B018


def test_damaged_or_open_secrets_and_anothers_ledger_are_refused(tmp_path: Path) -> None:
    home, other = Home.create(tmp_path / "home", [1]), Home.create(tmp_path / "other", [1])
    (home.folder / "secret").chmod(0o644)
    with pytest.raises(StateError, match="can be read by others"):
        read_all(Home(home.folder))
    (home.folder / "secret").chmod(0o600)
    (home.folder / "ledger-train.npz").write_bytes((other.folder / "ledger-train.npz").read_bytes())
    with pytest.raises(StateError, match="belongs to other devices"):
        read_all(Home(home.folder))
    (home.folder / "secret").write_bytes(b"short")
    with pytest.raises(StateError, match="must have 32 bytes, it has 5"):
        read_all(Home(home.folder))
    (other.folder / "limits.toml").unlink()
    with pytest.raises(ConfigError, match=r"limits file .*: No such file"):
        read_all(Home(other.folder))


def read_all(home: Home) -> None:
    """Read everything of a home, as a node does before its first exchange."""
    _ = home.limits, home.devices
    home.check()


@pytest.mark.parametrize("enforce", [True, False])
def test_only_its_owner_can_switch_the_guard_off(
    enforce: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    home, layer = Home.create(tmp_path / "home", [1]), FirstLayer(nn.Linear(3, 4), nn.ReLU(), (3,))
    assert home.guard("train", layer).enforce  # as shipped
    limits = home.folder / "limits.toml"
    limits.write_text(limits.read_text().replace("# enforce = false", f"enforce = {str(enforce).lower()}"))
    home = Home(home.folder)
    with caplog.at_level(logging.WARNING):
        home.check()
    assert ("enforce is false: everything leaves this node" in caplog.text) is not enforce
    assert [home.guard(ledger, layer).enforce for ledger in ("train", "test")] == [enforce] * 2


def test_the_owners_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    def main(*arguments: object) -> int:
        monkeypatch.setattr(sys, "argv", ["fedsplit", "node", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        return int(stopped.value.code or 0)

    assert main("init", tmp_path / "home", "--device", 3, "--device", 4) == 0
    assert main("ledger", tmp_path / "home") == 0
    assert "train records: 0 have left" in capsys.readouterr().out
    assert main("init", tmp_path / "home", "--device", 3) == 2
    assert main("ledger", tmp_path / "nowhere") == 2
    said = capsys.readouterr().err
    assert "Traceback" not in said and "is missing" in said


def some(count: int, segments: np.ndarray | None = None) -> DeviceData:
    x = np.random.default_rng(0).normal(size=(9, 3)).astype(np.float32)[:count]
    return DeviceData(Records(x, np.zeros(count, np.int64), segments), Records(x[:2], np.zeros(2, np.int64)))


def test_records_may_be_added_behind_the_others(tmp_path: Path) -> None:
    home = Home.create(tmp_path / "home", [1])
    assert home.known(1, some(5)).train.x.shape == (5, 3)
    home.known(1, some(5))
    Home(home.folder).known(1, some(7))


def test_a_record_that_is_not_the_one_it_was_is_refused(tmp_path: Path) -> None:
    """Else what left of the old one would be counted for the new, and a shuffled file would start all ledgers anew."""
    home = Home.create(tmp_path / "home", [1])
    home.known(1, some(7))
    shuffled = some(7)
    shuffled.train.x[[2, 3]] = shuffled.train.x[[3, 2]]
    for data, place in ((some(5), 5), (shuffled, 2), (some(7, np.arange(7)[:, None] // 2), 0)):
        with pytest.raises(StateError, match=f"train record {place} of device 1 is not the one that it was"):
            home.known(1, data)
    home.known(1, some(7))


@pytest.mark.parametrize("damage", ["missing", "damaged"])
def test_what_a_device_held_is_never_begun_anew(damage: str, tmp_path: Path) -> None:
    home = Home.create(tmp_path / "home", [1])
    path = home.known_path(1)
    path.unlink() if damage == "missing" else path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(StateError, match="which records have left cannot be known"):
        home.known(1, some(5))
    with pytest.raises(StateError, match=r"records-2\.npz is missing"):
        home.known(2, some(5))
