"""Every command and code block of CONTRIBUTING, the tutorial and the how-to pages runs, or says why not.

The blocks of a page run in order, in one shell, in an empty folder with ``configs``. A block with a title is a file. A
``text`` block after a command is what the command says, but for numbers. ``<!-- not run: REASON -->`` stands before a
block that is not run.
"""

import os
import re
import signal
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from fedsplit.plan.settings import check_settings

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "CONTRIBUTING.md", ROOT / "docs" / "tutorial.md", *sorted((ROOT / "docs" / "how-to").glob("*.md"))]
_BLOCK = re.compile(
    r"(?:^ *<!-- not run: (?P<reason>[^\n]+) -->\n)?"
    r'^(?P<indent> *)```(?P<language>\w*)(?: title="(?P<title>[^"\n]+)")?\n(?P<body>.*?)^(?P=indent)```$',
    flags=re.DOTALL | re.MULTILINE,
)


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    language: str
    title: str | None
    reason: str | None
    body: str

    @property
    def script(self) -> str:
        """What it adds to the page's shell script."""
        if self.reason or self.language == "text":
            return ""
        if self.title:
            return f"mkdir -p $(dirname {self.title}); cat > {self.title} <<'END OF FILE'\n{self.body}END OF FILE\n"
        if self.language == "python":
            return f"python - <<'END OF FILE'\n{self.body}END OF FILE\n"
        return self.body if self.language == "bash" else ""


def blocks_of(text: str) -> list[Block]:
    """Return the fenced blocks of a page, in order."""
    found = []
    for match in _BLOCK.finditer(text):
        body = re.sub(rf"^{match['indent']}", "", match["body"], flags=re.MULTILINE)
        found.append(Block(match["language"], match["title"], match["reason"], body))
    assert len(found) == len(re.findall(r"^ *```", text, flags=re.MULTILINE)) / 2
    return found


def script_of(blocks: list[Block]) -> str:
    """Return the page as one script, which says before each block which one it is."""
    return "set -euo pipefail\n" + "".join(f"echo '@@ {i}'\n{block.script}" for i, block in enumerate(blocks))


def run(script: str, folder: Path) -> str:
    """Return what a page's script prints; all that it started ends with it."""
    environment = {**os.environ, "FLWR_HOME": str(folder / "flwr"), "COLUMNS": "120", "OMP_NUM_THREADS": "1"}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    (folder / "configs").symlink_to(ROOT / "configs")
    process = subprocess.Popen(
        ["bash", "-c", script],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        out, err = process.communicate(timeout=580)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 0, f"after block {out.rpartition('@@ ')[2]}{err}"
    return out


def shape(text: str) -> str:
    """Return a text without its numbers and its spaces."""
    return re.sub(r"\s+", " ", re.sub(r"\d[\d.,]*", "#", text)).strip()


def unsaid(blocks: list[Block], output: str) -> Iterator[str]:
    """Yield the lines of ``text`` blocks that the command before them has not printed."""
    said = re.split(r"^@@ \d+\n", output, flags=re.MULTILINE)[1:]
    assert len(said) == len(blocks)
    for i, block in enumerate(blocks[1:], start=1):
        if block.language == "text" and blocks[i - 1].language == "bash" and not blocks[i - 1].reason:
            yield from (line for line in block.body.splitlines() if shape(line) not in shape(said[i - 1]))


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_blocks_of_a_page_run(page: Path, tmp_path: Path) -> None:
    blocks = blocks_of(page.read_text(encoding="utf-8"))
    assert list(unsaid(blocks, run(script_of(blocks), tmp_path))) == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_block_is_run_or_says_why_not(page: Path) -> None:
    for block in blocks_of(page.read_text(encoding="utf-8")):
        known = block.language in ("bash", "python", "text") or block.title or block.language == "toml"
        assert block.reason or known, f"a block that nothing runs: {block}"
        if block.language == "toml" and not block.reason and not block.title:
            check_settings(merged(tomllib.loads(block.body)))


def merged(fragment: dict[str, object]) -> dict[str, object]:
    """Return small settings with a fragment's sections in place of their own."""
    base = tomllib.loads((ROOT / "configs" / "digits.toml").read_text(encoding="utf-8"))
    for name, section in fragment.items():
        assert isinstance(section, dict)
        only_tables = all(isinstance(value, dict) for value in section.values())
        base[name] = {**base.get(name, {}), **section} if only_tables else section
    return base


def test_a_block_that_fails_or_prints_something_else_is_noticed(tmp_path: Path) -> None:
    text = '<!-- not run: no -->\n```bash\nfalse\n```\n\n```toml title="a/b.toml"\nx = 1\n```\n'
    text += "\n```bash\ncat a/b.toml\n```\n"
    blocks = blocks_of(text)
    assert [block.reason for block in blocks] == ["no", None, None]
    assert run(script_of(blocks), tmp_path).split() == ["@@", "0", "@@", "1", "@@", "2", "x", "=", "1"]
    blocks = blocks_of("```bash\necho 'accuracy 0.91, loss 2'\n```\n\n```text\naccuracy 0.89\nscore 1\n```\n")
    assert list(unsaid(blocks, "@@ 0\naccuracy 0.91, loss 2\n@@ 1\n")) == ["score 1"]
    (tmp_path / "configs").unlink()
    with pytest.raises(AssertionError, match="after block 0"):
        run(script_of(blocks_of("```bash\nls missing\n```\n")), tmp_path)


def test_every_file_a_page_names_exists() -> None:
    for page in (*PAGES, *(ROOT / "docs").rglob("*.md")):
        text = page.read_text(encoding="utf-8")
        for name in re.findall(r"`((?:configs|docs|fedsplit|simulations|tests)/[\w./-]*\w)`", text):
            assert (ROOT / name).exists(), f"{page}: {name}"
