"""The docs page as a person uses it: in Chromium, with Try it out and Authorize.

SCREENSHOT=docs/swagger.png keeps a picture of how it ends.
"""

import json
import os
from urllib.parse import urlsplit

import pytest
from playwright.sync_api import sync_playwright
from servers.install import find, install_missing
from steps import PASSWORD, code_mailed_to, fresh_email

FLAGS = [
    "--no-sandbox",                    # root has none
    "--proxy-server=127.0.0.1:1",      # no way out; loopback addresses need no proxy
    "--disable-gpu", "--disable-quic", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--no-first-run"]


@pytest.fixture
def page():
    """An empty page of the system's own Chromium, in a profile of its own.

    page.hosts is the set of those that it asked for anything.
    """
    install_missing("Chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=find("chromium"), args=FLAGS)
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        page.hosts = set()
        page.on("request", lambda request: page.hosts.add(urlsplit(request.url).netloc))
        yield page
        browser.close()


def execute(operation, fields):
    """Expands an operation and tries it out; returns the status that the page shows."""
    operation.locator(".opblock-summary-control").click()
    operation.get_by_role("button", name="Try it out").click()
    operation.get_by_role("textbox").fill(json.dumps(fields))
    operation.get_by_role("button", name="Execute").click()
    return operation.locator(".live-responses-table .response .response-col_status"
                             ).inner_text()


def authorize(page, email, password):
    """Enters the credentials in the page's dialog for HTTP Basic."""
    page.get_by_role("button", name="Authorize").first.click()
    dialog = page.locator(".dialog-ux")
    dialog.locator("[name=username]").fill(email)
    dialog.locator("[name=password]").fill(password)
    dialog.get_by_role("button", name="Apply").click()
    dialog.get_by_role("button", name="Close").click()


def photograph(page, path):
    """A picture from the top of the page to the last answer in it."""
    page.locator("#operations-Users-register .opblock-summary-control").click()
    page.mouse.move(0, 0)
    page.evaluate("document.activeElement.blur(); scrollTo(0, 0)")
    page.wait_for_timeout(1000)  # the operation folds up
    answer = page.locator(".live-responses-table").bounding_box()
    page.screenshot(path=path, full_page=True, clip={
        "x": 0, "y": 0, "width": 1280, "height": answer["y"] + answer["height"]})


def test_it_registers_and_activates_on_its_docs_page(service, page):
    email = fresh_email()

    page.goto(f"{service.url}/docs/")
    accepted = execute(page.locator("#operations-Users-register"),
                       {"email": email, "password": PASSWORD})
    code = code_mailed_to(service, email)
    authorize(page, email, PASSWORD)
    done = execute(page.locator("#operations-Users-activate"), {"code": code})
    if "SCREENSHOT" in os.environ:
        photograph(page, os.environ["SCREENSHOT"])

    assert (accepted, done) == ("202", "200")
    assert page.hosts == {urlsplit(service.url).netloc}
