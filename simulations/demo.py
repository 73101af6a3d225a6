"""Whether the demo page works: draw a digit in headless Chromium, predict and attack it, take screenshots.

    python -m simulations demo runs/mnist-private

Needs selenium (extra `dev`), Chromium and ChromeDriver (Debian: chromium, chromium-driver). Writes `demo-desktop.png`
and `demo-phone.png` to a folder. Without a run one of small digits is trained first.
"""

from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from fedsplit.common.errors import ConfigError
from fedsplit.service.tokens import add_token
from simulations.shared.browser import (
    DESKTOP,
    PHONE,
    SEVEN,
    browser,
    draw_lines,
    element,
    enter,
    installed,
    predict,
    resize,
    screenshot,
)
from simulations.shared.options import option
from simulations.shared.results import RESULTS, Results
from simulations.shared.serving import serving
from simulations.shared.settings import finished
from simulations.shared.tables import markdown


@dataclass(frozen=True)
class Options:
    """What to draw for, and where to."""

    run: Path | None = option(None, help="folder of a finished run on digits", positional=True)
    out: Path = option(Path("docs"), quick=RESULTS, help="folder of the screenshots")


def study(options: Options) -> Results:
    """Draw a seven, and take the screenshots."""
    if not installed():
        raise ConfigError("demo: chromium and chromedriver are not installed")
    options.out.mkdir(parents=True, exist_ok=True)
    with finished(options.run) as run, TemporaryDirectory() as name:
        token = add_token(Path(name) / "tokens", "demo")
        with serving(run, Path(name), "--demo") as url:
            return {"page": _used(url, token, options.out)}


def _used(url: str, token: str, out: Path) -> dict[str, str]:
    """Use the page on both screens; return what it said."""
    with browser() as driver:
        resize(driver, *DESKTOP)
        enter(driver, url, token)
        draw_lines(driver, SEVEN)
        predicted = predict(driver)
        said = {name: str(element(driver, name).text) for name in ("leaves", "attack")}
        screenshot(driver, out / "demo-desktop.png")
        resize(driver, *PHONE)
        screenshot(driver, out / "demo-phone.png")
    return {"predicted": predicted, **said}


def tables(results: Results) -> str:
    """Return what the page said."""
    return markdown(("", "the page says"), results["page"].items())
