"""Settings files: every bad value is refused in one line with the key, the value and what is allowed."""

import tomllib
from pathlib import Path
from typing import Any

import pytest
from conftest import CONFIGS, small_settings

from fedsplit.config import Settings, load_settings
from fedsplit.errors import ConfigError


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "small.toml"
    path.write_text(small_settings().to_toml())
    return path


def refusal(path: Path, *overrides: str) -> str:
    with pytest.raises(ConfigError) as error:
        load_settings(path, overrides)
    text = str(error.value)
    assert "\n" not in text
    return text


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (["protocol.batchsize=3"], ["protocol.batchsize", "unknown key", "'protocol.batch-size'"]),
        (["run.evaluate_every=1"], ["run.evaluate_every", "unknown key", "'run.evaluate-every'"]),
        (["protocl.mode=pipelined"], ["protocl: unknown", "'protocol'"]),
        (["dropping.policy=random", "dropping.keep=0"], ["dropping.keep", "greater than 0", "got 0"]),
        (["dropping.policy=random", "dropping.keep=-0.5"], ["dropping.keep", "greater than 0", "got -0.5"]),
        (["dropping.policy=random", "dropping.keep=1.5"], ["dropping.keep", "less than or equal to 1", "got 1.5"]),
        (["dropping.policy=random", "dropping.keep=nan"], ["dropping.keep", "got nan"]),
        (["dropping.policy=top-k", "dropping.k=0"], ["dropping.k", "greater than or equal to 1", "got 0"]),
        (["dropping.policy=random", "dropping.k=3"], ["dropping", "policy 'random' takes keep, got k"]),
        (
            ["dropping.policy=random", "dropping.keep=0.5", "dropping.k=3"],
            ["dropping", "policy 'random' takes keep, got keep and k"],
        ),
        (["dropping.policy=top-k", "dropping.keep=0.5"], ["dropping", "policy 'top-k' takes k, got keep"]),
        (["dropping.policy=at-most", "dropping.keep=0.5"], ["dropping", "policy 'at-most' takes k, got keep"]),
        (["dropping.keep=0.5"], ["dropping", "policy 'none' takes neither keep nor k, got keep"]),
        (["dropping.policy=random"], ["dropping", "policy 'random' takes keep, got neither"]),
        (["dropping.policy=top-k"], ["dropping", "policy 'top-k' takes k, got neither"]),
        (["dropping.policy=half"], ["dropping.policy", "'none', 'random', 'at-most' or 'top-k'", "got 'half'"]),
        (["run.rounds=0"], ["run.rounds", "greater than or equal to 1", "got 0"]),
        (["run.rounds=many"], ["run.rounds", "integer", "got 'many'"]),
        (["run.rounds=1.5"], ["run.rounds", "integer", "got 1.5"]),
        (["run.engine=dask"], ["run.engine", "'ray' or 'inline'", "got 'dask'"]),
        (["protocol.mode=async"], ["protocol.mode", "'synchronous', 'pipelined' or 'single-pass'", "got 'async'"]),
        (["protocol.chunk=spread"], ["protocol", "chunk 'spread'", "'single-pass'", "not 'pipelined'"]),
        (["protocol.chunk=half"], ["protocol.chunk", "'epoch' or 'spread'", "got 'half'"]),
        (["protocol.mode=single-pass", "run.evaluate-every=1"], ["run.evaluate-every must be 0", "'single-pass'"]),
        (["first-layer.strategy=FedFoo"], ["first-layer.strategy", "'frozen'", "'FedAvg'", "got 'FedFoo'"]),
        (["first-layer.lr=inf"], ["first-layer.lr", "finite", "got inf"]),
        (["trunk.optimizer=adam", "trunk.momentum=0.9"], ["trunk", "momentum is for optimizer 'sgd', not 'adam'"]),
        (["devices.fraction=0"], ["devices.fraction", "greater than 0", "got 0"]),
        (["devices.test=some"], ["devices.test", "'all'", "got 'some'"]),
        (["model.name=mlp"], ["model needs a name or a builder, not both"]),
        (["run.rounds"], ["--set", "section.key=value", "got 'run.rounds'"]),
        (["rounds=3"], ["--set", "section.key=value", "got 'rounds=3'"]),
        (["run..rounds=3"], ["--set", "section.key=value", "got 'run..rounds=3'"]),
        (["run.seed.x=1"], ["--set 'run.seed.x=1'", "'seed' is not a table"]),
    ],
)
def test_refuses_a_bad_setting_in_one_line(file: Path, overrides: list[str], parts: list[str]) -> None:
    text = refusal(file, *overrides)
    assert all(part in text for part in parts), text


@pytest.mark.parametrize(
    ("line", "parts"),
    [
        ('mode = "pipelined"', ["protocol.mode", "missing", "'synchronous', 'pipelined', 'single-pass'"]),
        ("rounds = 4", ["run.rounds", "missing"]),
        ('policy = "none"', ["dropping.policy", "missing", "'none', 'random', 'at-most', 'top-k'"]),
    ],
)
def test_refuses_what_has_no_default_to_be_left_out(file: Path, line: str, parts: list[str]) -> None:
    text = file.read_text()
    assert text.count(f"{line}\n") == 1
    file.write_text(text.replace(f"{line}\n", ""))
    said = refusal(file)
    assert all(part in said for part in parts), said


def test_refuses_a_file_that_is_missing_or_not_toml(tmp_path: Path) -> None:
    assert refusal(tmp_path / "no.toml") == f"settings file {tmp_path}/no.toml: No such file or directory"
    assert "Is a directory" in refusal(tmp_path)
    path = tmp_path / "bad.toml"
    for content in (b"[run\n", b"\xff\xfe\x00"):
        path.write_bytes(content)
        assert refusal(path).startswith(f"settings file {path}: not valid TOML: ")


@pytest.mark.parametrize(
    ("override", "section", "key", "value"),
    [
        ("run.rounds=7", "run", "rounds", 7),
        ("run.name=other", "run", "name", "other"),
        ('run.name="7"', "run", "name", "7"),
        ("devices.test=[1, 2]", "devices", "test", [1, 2]),
        ("devices.test = all", "devices", "test", "all"),
        ("first-layer.args.min_train_nodes=2", "first_layer", "args", {"min_train_nodes": 2}),
        ("protocol.chunk=5", "protocol", "chunk", 5),
    ],
)
def test_set_wins_over_the_file(file: Path, override: str, section: str, key: str, value: Any) -> None:
    before = load_settings(file)
    assert getattr(getattr(before, section), key) != value
    after = load_settings(file, [override])
    assert getattr(getattr(after, section), key) == value
    changed = {name for name in Settings.model_fields if getattr(before, name) != getattr(after, name)}
    assert changed == {section}


def test_the_last_set_wins(file: Path) -> None:
    assert load_settings(file, ["run.rounds=7", "run.rounds=8"]).run.rounds == 8


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.toml")), ids=lambda path: path.stem)
def test_shipped_settings_load_and_begin_with_the_command_that_runs_them(path: Path, tmp_path: Path) -> None:
    settings = load_settings(path)
    first = path.read_text().splitlines()[0]
    words = first.split()
    assert words[:4] == ["#", "fedsplit", "simulate", f"configs/{path.name}"]
    assert settings.run.name == path.stem
    written = tmp_path / "written.toml"
    written.write_text(settings.to_toml())
    assert load_settings(written) == settings
    assert Settings.from_json(settings.to_json()) == settings


def test_there_are_shipped_settings() -> None:
    assert {"digits", "mnist", "own-data", "wearables"} <= {path.stem for path in CONFIGS.glob("*.toml")}


def test_toml_names_every_default(file: Path) -> None:
    written = tomllib.loads(file.read_text())
    for section, values in small_settings().model_dump(by_alias=True, exclude_none=True).items():
        assert written[section] == values
    assert written["protocol"]["batch-size"] == 64
