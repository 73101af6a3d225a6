"""Settings files: every bad value is refused in one line with the key, the value and what is allowed."""

import tomllib
from pathlib import Path
from typing import Any

import pytest
from conftest import CONFIGS, small_settings

from fedsplit.common.errors import ConfigError
from fedsplit.plan.experiment import Experiment
from fedsplit.plan.settings import Settings, load_settings
from fedsplit.release.chosen import numbers_of


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
        (["dropping.keep=0.5"], ["dropping", "policy 'none' takes none of keep, k and bits, got keep"]),
        (["dropping.policy=random"], ["dropping", "policy 'random' takes keep, got none"]),
        (["dropping.policy=top-k"], ["dropping", "policy 'top-k' takes k, got none"]),
        (["dropping.policy=units"], ["dropping", "policy 'units' takes k, got none"]),
        (["dropping.policy=units", "dropping.keep=0.5"], ["dropping", "policy 'units' takes k, got keep"]),
        (["dropping.policy=bits"], ["dropping", "policy 'bits' takes bits, got none"]),
        (["dropping.policy=bits", "dropping.k=3"], ["dropping", "policy 'bits' takes bits, got k"]),
        (
            ["dropping.policy=bits", "dropping.bits=2", "dropping.k=3"],
            ["dropping", "policy 'bits' takes bits, got k and bits"],
        ),
        (["dropping.bits=2"], ["dropping", "policy 'none' takes none of keep, k and bits, got bits"]),
        (["dropping.policy=bits", "dropping.bits=0"], ["dropping.bits", "greater than or equal to 1", "got 0"]),
        (["dropping.policy=bits", "dropping.bits=9"], ["dropping.bits", "less than or equal to 8", "got 9"]),
        (["dropping.policy=bits", "dropping.bits=1.5"], ["dropping.bits", "integer", "got 1.5"]),
        (["dropping.clip=1.0"], ["dropping", "clip and noise go together"]),
        (["dropping.noise=1.0"], ["dropping", "clip and noise go together"]),
        (["dropping.clip=0", "dropping.noise=1"], ["dropping.clip", "greater than 0", "got 0"]),
        (["dropping.clip=1", "dropping.noise=0"], ["dropping.noise", "greater than 0", "got 0"]),
        (["dropping.clip=inf", "dropping.noise=1"], ["dropping.clip", "finite", "got inf"]),
        (["dropping.clip=1", "dropping.noise=nan"], ["dropping.noise", "got nan"]),
        (
            ["dropping.policy=top-k", "dropping.k=3", "dropping.clip=1", "dropping.noise=1"],
            ["dropping", "noise is not for policy 'top-k'"],
        ),
        (
            ["dropping.policy=bits", "dropping.bits=3", "dropping.clip=1", "dropping.noise=1"],
            ["dropping", "noise is not for policy 'bits'"],
        ),
        (
            ["dropping.policy=half"],
            ["dropping.policy", "'none', 'random', 'at-most', 'top-k', 'units' or 'bits'", "got 'half'"],
        ),
        (["run.rounds=0"], ["run.rounds", "greater than or equal to 1", "got 0"]),
        (["run.rounds=many"], ["run.rounds", "integer", "got 'many'"]),
        (["run.rounds=1.5"], ["run.rounds", "integer", "got 1.5"]),
        (["run.engine=dask"], ["run.engine", "'ray' or 'inline'", "got 'dask'"]),
        (
            ["protocol.mode=async"],
            ["protocol.mode", "'synchronous', 'pipelined', 'single-pass' or 'release-once'", "got 'async'"],
        ),
        (["protocol.mode=release-once"], ["'release-once' needs a [public] section with epochs of at least 1"]),
        (
            ["protocol.mode=release-once", "public.devices=[0]", "public.epochs=0"],
            ["'release-once' needs a [public] section with epochs of at least 1"],
        ),
        (
            ["protocol.mode=release-once", "public.devices=[0]", "protocol.chunk=spread"],
            ["protocol", "chunk 'spread' is for mode 'single-pass', not 'release-once'"],
        ),
        (
            ["protocol.mode=release-once", "public.devices=[0]", "run.evaluate-every=1"],
            ["run.evaluate-every must be 0 in mode 'release-once'"],
        ),
        (["public.epochs=3"], ["public", "public needs either devices or a file"]),
        (["public.devices=[0]", "public.file=here.npz"], ["public", "public needs either devices or a file"]),
        (["public.devices=[-1]"], ["public.devices", "greater than or equal to 0", "got -1"]),
        (["public.devices=2"], ["public.devices", "list", "got 2"]),
        (["public.devices=[0]", "public.epochs=-1"], ["public.epochs", "greater than or equal to 0", "got -1"]),
        (["public.devices=[0]", "public.lr=0"], ["public.lr", "greater than 0", "got 0"]),
        (["public.devices=[0]", "public.penalty=-1"], ["public.penalty", "greater than or equal to 0", "got -1"]),
        (["public.devices=[0]", "public.epoch=1"], ["public.epoch", "unknown key", "'public.epochs'"]),
        (["publc.devices=[0]"], ["publc: unknown section", "'public'"]),
        (["guard.mode=off"], ["guard.mode", "'observe' or 'enforce'", "got 'off'"]),
        (["guard.limits=3"], ["guard.limits", "string", "got 3"]),
        (["guard.limit=mine.toml"], ["guard.limit", "unknown key", "'guard.limits'"]),
        (["audit.targets=-1"], ["audit.targets", "greater than or equal to 0", "got -1"]),
        (["audit.target=1"], ["audit.target", "unknown key", "'audit.targets'"]),
        (["data.overlap=1"], ["data.overlap", "boolean", "got 1"]),
        (["protocol.chunk=spread"], ["protocol", "chunk 'spread'", "'single-pass'", "not 'pipelined'"]),
        (["protocol.chunk=half"], ["protocol.chunk", "'epoch' or 'spread'", "got 'half'"]),
        (["protocol.mode=single-pass", "run.evaluate-every=1"], ["run.evaluate-every must be 0", "'single-pass'"]),
        (["first-layer.strategy=FedFoo"], ["first-layer.strategy", "'frozen'", "'FedAvg'", "got 'FedFoo'"]),
        (["first-layer.strategy=own:"], ["first-layer.strategy", "'module:Class'", "got 'own:'"]),
        (["protocol.staleness-weight=-1"], ["protocol.staleness-weight", "greater than or equal to 0", "got -1"]),
        (["protocol.staleness-weight=inf"], ["protocol.staleness-weight", "finite", "got inf"]),
        (["devices.sampling=large"], ["devices.sampling", "'uniform', 'size' or 'fair'", "got 'large'"]),
        (["trunk.replay-mb=0"], ["trunk.replay-mb", "greater than 0", "got 0"]),
        (["trunk.replay-mb=1"], ["trunk.replay-mb: mode 'pipelined' keeps nothing for replay"]),
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
        (
            'mode = "pipelined"',
            ["protocol.mode", "missing", "'synchronous', 'pipelined', 'single-pass', 'release-once'"],
        ),
        ("rounds = 4", ["run.rounds", "missing"]),
        ('policy = "none"', ["dropping.policy", "missing", "'none', 'random', 'at-most', 'top-k', 'units', 'bits'"]),
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
        ("first-layer.strategy=own:Mine", "first_layer", "strategy", "own:Mine"),
        ("devices.sampling=size", "devices", "sampling", "size"),
        ("protocol.chunk=5", "protocol", "chunk", 5),
        ("guard.mode=enforce", "guard", "mode", "enforce"),
        ("guard.limits=mine.toml", "guard", "limits", "mine.toml"),
        ("audit.targets=20", "audit", "targets", 20),
        ("data.overlap=false", "data", "overlap", False),
    ],
)
def test_set_wins_over_the_file(file: Path, override: str, section: str, key: str, value: Any) -> None:
    before = load_settings(file)
    assert getattr(getattr(before, section), key) != value
    after = load_settings(file, [override])
    assert getattr(getattr(after, section), key) == value
    changed = {name for name in Settings.model_fields if getattr(before, name) != getattr(after, name)}
    assert changed == {section}


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["public.devices=[0, 2]"], {"devices": [0, 2], "file": None, "epochs": 20, "lr": 0.002, "penalty": 0.0}),
        (["public.file=here.npz", "public.epochs=0"], {"file": "here.npz", "devices": None, "epochs": 0}),
        (["public.devices=[1]", "public.penalty=0.5", "public.lr=0.1"], {"penalty": 0.5, "lr": 0.1}),
    ],
)
def test_a_public_section_is_there_only_if_it_is_set(
    file: Path, overrides: list[str], expected: dict[str, Any]
) -> None:
    assert load_settings(file).public is None
    found = load_settings(file, overrides)
    assert found.public is not None
    assert {name: getattr(found.public, name) for name in expected} == expected
    again = file.with_name("again.toml")
    again.write_text(found.to_toml())
    assert load_settings(again) == Settings.from_json(found.to_json()) == found


@pytest.mark.parametrize(
    "overrides",
    [
        ["dropping.policy=units", "dropping.k=10"],
        ["dropping.policy=bits", "dropping.bits=8"],
        ["dropping.clip=1", "dropping.noise=0.5"],
        ["dropping.policy=random", "dropping.keep=0.5", "dropping.clip=1.5", "dropping.noise=2"],
        ["dropping.policy=at-most", "dropping.k=2", "dropping.clip=1.5", "dropping.noise=2"],
        ["dropping.policy=units", "dropping.k=2", "dropping.clip=1.5", "dropping.noise=2"],
    ],
)
def test_policies_take_their_budget_and_noise(file: Path, overrides: list[str]) -> None:
    found = load_settings(file, overrides)
    made = Experiment(found).policy
    name, numbers = numbers_of(made)
    assert {"policy": name, **numbers} == found.dropping.model_dump(exclude_none=True, exclude={"mask"})


@pytest.mark.parametrize(
    ("mode", "once"), [("synchronous", False), ("pipelined", False), ("single-pass", True), ("release-once", True)]
)
def test_modes_that_release_a_record_once(mode: str, once: bool) -> None:
    assert small_settings(protocol={"mode": mode}, public={"devices": [0]}).protocol.facts.once == once


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
    shipped = {"digits", "mnist", "mnist-paper", "mnist-private", "own-data", "own-novelty", "wearables"}
    assert shipped <= {path.stem for path in CONFIGS.glob("*.toml")}


def test_toml_names_every_default(file: Path) -> None:
    written = tomllib.loads(file.read_text())
    for section, values in small_settings().model_dump(by_alias=True, exclude_none=True).items():
        assert written[section] == values
    assert written["protocol"]["batch-size"] == 64
