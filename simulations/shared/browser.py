"""Headless Chromium, and what a user does on the pages of a service.

Needs selenium (extra `dev`), Chromium and ChromeDriver (Debian: chromium, chromium-driver).
"""

import base64
import json
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from selenium import webdriver
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait

OPTIONS = ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
           "--disable-background-networking", "--disable-component-update")  # fmt: skip
DESKTOP, PHONE = (1000, 900, False), (390, 844, True)
SEVEN = [(80, 70), (205, 70), (180, 120), (150, 180), (130, 235)]


def installed() -> bool:
    """Whether there is a browser to drive."""
    return shutil.which("chromium") is not None and shutil.which("chromedriver") is not None


@contextmanager
def browser() -> Iterator[webdriver.Chrome]:
    """Open headless Chromium, which takes any certificate."""
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or ""
    options.accept_insecure_certs = True
    with tempfile.TemporaryDirectory() as profile:
        for option in (*OPTIONS, f"--user-data-dir={profile}"):
            options.add_argument(option)
        options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
        driver = webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver")))
        try:
            yield driver
        finally:
            driver.quit()


def element(driver: webdriver.Chrome, name: str) -> Any:
    """Return an element by its id."""
    return driver.find_element(By.ID, name)


def wait(driver: webdriver.Chrome, condition: str, timeout: float = 60) -> None:
    """Wait until some JavaScript is true; what the page says is wrong is raised as RuntimeError."""

    def done(_: Any) -> bool:
        if said := element(driver, "problem").text:
            raise RuntimeError(said)
        return bool(driver.execute_script(f"return {condition}"))

    WebDriverWait(driver, timeout, 0.1).until(done)


def enter(driver: webdriver.Chrome, url: str, token: str) -> None:
    """Open the page and give it the token."""
    driver.get(f"{url}/demo/")
    wait(driver, "!document.getElementById('entry').hidden")
    element(driver, "token").send_keys(token)
    element(driver, "entry").submit()
    wait(driver, "!document.getElementById('work').hidden")


def draw_lines(driver: webdriver.Chrome, points: Sequence[tuple[int, int]]) -> None:
    """Draw lines with the pointer between points of the area of 280 by 280."""
    area = element(driver, "draw")
    driver.execute_script("arguments[0].scrollIntoView({block: 'center'})", area)
    actions = ActionChains(driver, duration=20)
    places = [(x - 140, y - 140) for x, y in points]
    actions.move_to_element_with_offset(area, *places[0]).click_and_hold()
    for place in places[1:]:
        actions.move_to_element_with_offset(area, *place)
    actions.release().perform()
    wait(driver, "!document.getElementById('send').disabled")


def predict(driver: webdriver.Chrome) -> str:
    """Send what is shown, wait for the attack, and return the prediction."""
    driver.execute_script("document.getElementById('send').click()")
    wait(driver, "!document.getElementById('pictures').hidden")
    return str(element(driver, "answer").text)


def resize(driver: webdriver.Chrome, width: int, height: int, mobile: bool) -> None:
    """Have the page believe in a screen of this size."""
    size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": mobile}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)


def requests(driver: webdriver.Chrome) -> list[tuple[str, bytes]]:
    """Return the address and body of every request that the browser has sent since it was last asked."""
    said = driver.get_log("performance")  # type: ignore[no-untyped-call]
    events = [json.loads(entry["message"])["message"] for entry in said]
    sent = [event["params"]["request"] for event in events if event["method"] == "Network.requestWillBeSent"]
    return [
        (request["url"], b"".join(base64.b64decode(part["bytes"]) for part in request.get("postDataEntries", [])))
        for request in sent
    ]


def screenshot(driver: webdriver.Chrome, path: Path) -> None:
    """Write a picture of the whole page."""
    taken = driver.execute_cdp_cmd("Page.captureScreenshot", {"format": "png", "captureBeyondViewport": True})
    path.write_bytes(base64.b64decode(taken["data"]))
