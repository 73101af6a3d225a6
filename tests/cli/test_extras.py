"""A command whose packages are missing says which extra has them, and has done nothing."""

import re
import tomllib
from pathlib import Path

import pytest
from blocked import fedsplit, without
from conftest import CONFIGS

from fedsplit.cli.extras import EXTRAS

pytestmark = pytest.mark.slow  # starts processes

PROJECT = tomllib.loads((CONFIGS.parent / "pyproject.toml").read_text())["project"]
COMMANDS = {
    ("simulate", CONFIGS / "digits.toml", "--out", "run"): ("ray", "simulation"),
    ("simulate", CONFIGS / "digits.toml", "--out", "run", "--engine", "inline"): ("flwr", "server"),
    ("tune", CONFIGS / "tune" / "wearables.toml", "--out", "run"): ("optuna", "tune"),
    ("run", CONFIGS / "digits.toml", "--out", "run"): ("flwr", "server"),
    ("server", "start", "server"): ("flwr", "server"),
    ("server", "register", "key.pub"): ("flwr", "server"),
    ("node", "start", "--superlink", "127.0.0.1:9092", "--home", "home", "--insecure"): ("flwr", "node"),
    ("node", "preview", CONFIGS / "digits.toml"): ("matplotlib", "pictures"),
    ("audit", "run"): ("matplotlib", "pictures"),
    ("compare", "run", "run"): ("matplotlib", "pictures"),
    ("serve", "run", "--insecure"): ("fastapi-offline", "serve"),
}


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: " ".join(map(str, command[:2])))
def test_what_is_missing_is_said_in_one_line(command: tuple[object, ...], tmp_path: Path) -> None:
    package, extra = COMMANDS[command]
    (tmp_path / "here").mkdir()
    env = without([package.replace("-", "_")], tmp_path / "hook")
    done = fedsplit(*command, env=env, cwd=tmp_path / "here")
    said = f"fedsplit: this command needs the package {package}: pip install 'fedsplit[{extra}]'\n"
    assert (done.returncode, done.stdout, done.stderr) == (2, "", said)
    assert not list((tmp_path / "here").iterdir())


def packages(extra: str) -> set[str]:
    """The packages of an extra, those of the extras that it takes in among them."""
    found: set[str] = set()
    for line in PROJECT["optional-dependencies"][extra]:
        name, more = re.fullmatch(r"([\w-]+)(?:\[([\w,]+)\])?.*", line).groups()  # type: ignore[union-attr]
        if name == "fedsplit":
            found = found.union(*(packages(other) for other in more.split(",")))
        else:
            found |= {name} | ({"ray"} if (name, more) == ("flwr", "simulation") else set())
    return found


@pytest.mark.parametrize("extra", EXTRAS)
def test_the_extras_hold_what_commands_ask_for(extra: str) -> None:
    assert packages(extra) == {module.replace("_", "-") for module in EXTRAS[extra]}


def test_every_package_comes_with_an_extra_or_to_every_device() -> None:
    core = {re.match(r"[\w-]+", line).group() for line in PROJECT["dependencies"]}  # type: ignore[union-attr]
    assert not core & {module.replace("_", "-") for modules in EXTRAS.values() for module in modules}
    assert packages("simulation") < packages("data")  # the README's first command
    assert packages("dev") > packages("tune") | packages("serve")
