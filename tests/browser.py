"""Debian's Chromium without a window, installed where it is missing."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from selenium import webdriver

from tests import apt

PROGRAMS = {"chromium": "chromium", "chromedriver": "chromium-driver"}  # and their packages


def install() -> str | None:
    """Install Debian's packages where they are missing; why that cannot be done, or None."""
    with apt.alone():
        missing = [package for name, package in PROGRAMS.items() if shutil.which(name) is None]
        if not missing:
            return None
        if os.geteuid() != 0 or shutil.which("apt-get") is None:
            return f"no {', '.join(missing)}, and only root on Debian can install them"
        return apt.get(*missing)


@contextmanager
def chromium(folder: Path) -> Iterator[webdriver.Chrome]:
    """A browser with a fresh profile in `folder`. The test is skipped only where Chromium cannot be
    installed, and says why."""
    reason = install()
    if reason:
        pytest.skip(f"no Chromium here: {reason}")
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    for argument in (
        "--headless=new",
        "--no-sandbox",  # it does not start without for root
        "--disable-dev-shm-usage",
        "--disable-background-networking",
        f"--user-data-dir={folder}",
    ):
        options.add_argument(argument)
    service = webdriver.ChromeService(shutil.which("chromedriver"))
    browser = webdriver.Chrome(options, service)
    try:
        yield browser
    finally:
        browser.quit()
