"""The owner's limits file: a wrong one is refused in one line, and never replaced by other limits."""

import re
import tomllib
from pathlib import Path

import pytest

from fedsplit.common.errors import ConfigError
from fedsplit.guard.limits import SHIPPED, Limits, load_limits


def refused(path: Path) -> str:
    """Return why a file is refused, after its name."""
    with pytest.raises(ConfigError) as caught:
        load_limits(path)
    text = str(caught.value)
    assert "\n" not in text and text.startswith(f"limits file {path}: ") and caught.value.__cause__ is None
    return text.removeprefix(f"limits file {path}: ")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "limits.toml"


def test_the_shipped_file_says_the_defaults() -> None:
    assert load_limits() == Limits() == load_limits(SHIPPED)


def test_the_shipped_file_names_every_limit() -> None:
    """Those that are off by default as a comment that can be taken away."""
    text = SHIPPED.read_text()
    switched_on = tomllib.loads(re.sub(r"^# ((?:enforce|epsilon) = .*)$", r"\1", text, flags=re.MULTILINE))
    assert switched_on.keys() == {str(field.alias) for field in Limits.model_fields.values()}
    limits = Limits.model_validate(switched_on)
    assert (limits.epsilon, limits.enforce) == (8.0, False)


def test_what_a_file_leaves_out_is_as_shipped(file: Path) -> None:
    file.write_text("releases = 3\ngradient-records = 32\n")
    assert load_limits(file) == Limits.model_validate({"releases": 3, "gradient-records": 32})
    file.write_text("")
    assert load_limits(str(file)) == Limits()


def test_limits_cannot_be_changed_once_they_are_read() -> None:
    with pytest.raises(ValueError, match="frozen"):
        load_limits().releases = 9  # type: ignore[misc]


def test_a_missing_file_is_refused(file: Path) -> None:
    assert refused(file) == "No such file or directory"
    file.mkdir()
    assert refused(file) == "Is a directory"


@pytest.mark.parametrize(
    "content", [b"releases = ", b"releases", b"[", b"\xff\xfe\x00", b"releases = 1\nreleases = 2", b"\x00" * 30, b"{}"]
)
def test_a_damaged_file_is_refused(content: bytes, file: Path) -> None:
    file.write_bytes(content)
    assert refused(file) == "not valid TOML"


@pytest.mark.parametrize(
    ("line", "nearest"),
    [
        ("release = 1", "releases"),
        ("equation = 0.5", "equations"),
        ("gradient_records = 16", "gradient-records"),
        ("gradient-shares = 0.1", "gradient-share"),
        ("row_norms = 1.0", "row-norms"),
        ("epsilons = 8.0", "epsilon"),
        ("refusal = 1", "refusals"),
        ("releases = 1\nactives = 1.0", "active"),
    ],
)
def test_an_unknown_name_is_refused_with_the_nearest(line: str, nearest: str, file: Path) -> None:
    """A limit that is not understood would be none."""
    file.write_text(line)
    name = line.splitlines()[-1].split(" ")[0]
    assert refused(file) == f"{name}: unknown key; nearest valid key is {nearest!r}"


def test_sections_are_refused(file: Path) -> None:
    file.write_text("[limits]\nreleases = 1")
    assert refused(file).startswith("limits: unknown key; nearest valid key is ")


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("releases", "-1", "should be greater than or equal to 0, got -1"),
        ("releases", "1.0", "should be a valid integer, got 1.0"),
        ("releases", "true", "should be a valid integer, got True"),
        ("releases", '"many"', "should be a valid integer, got 'many'"),
        ("equations", "0", "should be greater than 0, got 0"),
        ("equations", "1.01", "should be less than or equal to 1, got 1.01"),
        ("equations", "nan", "should be less than or equal to 1, got nan"),
        ("leverage", "1.5", "should be less than or equal to 1, got 1.5"),
        ("leverage", "nan", "should be less than or equal to 1, got nan"),
        ("gradients", "1", "should be a valid boolean, got 1"),
        ("gradients", '"no"', "should be a valid boolean, got 'no'"),
        ("gradient-records", "1", "should be greater than or equal to 2, got 1"),
        ("gradient-share", "-0.5", "should be greater than 0, got -0.5"),
        ("gradient-leverage", "inf", "should be less than or equal to 1, got inf"),
        ("epsilon", "0", "should be greater than 0, got 0"),
        ("epsilon", "nan", "should be greater than 0, got nan"),
        ("delta", "1", "should be less than 1, got 1"),
        ("delta", "0.0", "should be greater than 0, got 0.0"),
        ("active", "nan", "should be less than or equal to 1, got nan"),
        ("row-norms", "0.5", "should be greater than or equal to 1, got 0.5"),
        ("row-norms", "nan", "should be greater than or equal to 1, got nan"),
        ("refusals", "-1", "should be greater than or equal to 0, got -1"),
        ("refusals", "[1]", "should be a valid integer, got [1]"),
    ],
)
def test_a_value_that_is_not_allowed_is_refused(name: str, value: str, said: str, file: Path) -> None:
    file.write_text(f"{name} = {value}")
    assert refused(file) == f"{name}: {said}"


@pytest.mark.parametrize(
    "line", ["releases = 0", "equations = 1", "leverage = 1.0", "refusals = 0", "delta = 1e-9", "epsilon = 0.1"]
)
def test_the_ends_of_the_ranges_are_allowed(line: str, file: Path) -> None:
    file.write_text(line)
    name, value = line.split(" = ")
    assert getattr(load_limits(file), name) == float(value)
