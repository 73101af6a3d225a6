"""A real node's folder: made once, refused when something of it is missing, and its guard enforces."""

import sys
from pathlib import Path

import pytest

from fedsplit import cli
from fedsplit.errors import ConfigError, StateError
from fedsplit.home import Home


def test_a_new_home_is_its_owners_alone(tmp_path: Path) -> None:
    home = Home.create(tmp_path / "home", [7, 3])
    assert home.devices == [3, 7]
    assert (tmp_path / "home").stat().st_mode & 0o077 == 0
    assert (tmp_path / "home" / "secret").stat().st_mode & 0o077 == 0
    assert not home.limits.gradients and home.limits.releases == 1
    assert home.accountant("train").exposures() == 0
    assert Home.create(tmp_path / "other", [3]).device_secret(3) != home.device_secret(3) != home.device_secret(7)


def test_a_home_is_never_replaced(tmp_path: Path) -> None:
    Home.create(tmp_path / "home", [1])
    with pytest.raises(ConfigError, match="is not empty: a node's secret and ledgers are never replaced"):
        Home.create(tmp_path / "home", [1])
    with pytest.raises(ConfigError, match="devices must be different ids"):
        Home.create(tmp_path / "another", [1, 1])


@pytest.mark.parametrize("name", ["secret", "node.toml", "ledger-train.npz"])
def test_a_home_without_a_part_is_refused(name: str, tmp_path: Path) -> None:
    home = Home.create(tmp_path / "home", [1])
    (home.folder / name).unlink()
    with pytest.raises(StateError, match=f"{name.split('.')[0]}.* is missing"):
        read_all(Home(home.folder))


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
    home.accountant("train")


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
