"""The docs page, and a page that registers, as a person uses them: in Chromium.

SCREENSHOT=docs/swagger.png keeps a picture of how it ends.
"""

import json
import os
from urllib.parse import urlsplit

import pytest
from playwright.sync_api import sync_playwright
from servers.install import find, install_missing
from servers.process import TOP
from steps import ACTIVATE, PASSWORD, code_mailed_to, fresh_email, mailed_to, wrong
from steps.readme import page_functions

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


# -- A page that registers -------------------------------------------------------------


def open_signup(service, page):
    """Shows a page on the API's own origin, with the functions of the README."""
    page.goto(f"{service.url}/healthz")
    page.set_content((TOP / "tests/signup.html").read_text().replace(
        "FUNCTIONS", page_functions()))


@pytest.fixture
def signup(service, page):
    """That page of an API whose mails arrive.

    signup.dialogs are the login dialogs that Chromium would have opened.
    """
    open_signup(service, page)
    page.dialogs = []
    cdp = page.context.new_cdp_session(page)
    cdp.on("Fetch.requestPaused", lambda event: cdp.send(
        "Fetch.continueRequest", {"requestId": event["requestId"]}))
    cdp.on("Fetch.authRequired", lambda event: (
        page.dialogs.append(event["request"]["url"]),
        cdp.send("Fetch.continueWithAuth", {
            "requestId": event["requestId"],
            "authChallengeResponse": {"response": "CancelAuth"}})))
    cdp.send("Fetch.enable", {"handleAuthRequests": True})
    return page


def press(page, button, **fields):
    """Fills in the fields and presses a button; returns the answer."""
    for field, text in fields.items():
        page.locator(f"#{field}").fill(text)
    page.get_by_role("button", name=button).click()
    page.wait_for_function("document.querySelector('output').textContent")
    return json.loads(page.locator("output").inner_text())


def test_a_page_registers_and_activates(service, signup):
    email = fresh_email()

    accepted = press(signup, "Send a code", email=email, password="größer als früher")
    code = code_mailed_to(service, email)
    failed = press(signup, "Activate", code=wrong(code))
    sent_again = press(signup, "Send a code")
    newest = code_mailed_to(service, email, 2)
    done = press(signup, "Activate", code=newest)
    again = press(signup, "Activate")

    answers = accepted, failed, sent_again, done, again
    assert [answer["status"] for answer in answers] == [202, 403, 202, 200, 409]
    assert accepted["expires_in"] == 60
    assert mailed_to(service, email, 3)
    assert not signup.dialogs


def test_a_page_shows_which_field_is_not_acceptable(signup):
    refused = press(signup, "Send a code", email="nobody", password="short")

    assert refused["status"] == 422
    assert [error["field"] for error in refused["errors"]] == ["email", "password"]


def test_a_page_learns_when_to_try_again(start_service, page):
    api = start_service(IP_LIMIT="0")
    open_signup(api, page)

    refused = press(page, "Send a code", email=fresh_email(), password=PASSWORD)

    assert refused["status"] == 429
    assert int(refused["wait"]) > 0


def test_a_page_gets_its_401_without_a_dialog(signup):
    refused = press(signup, "Activate", code="0427")     # without address and password

    assert refused["status"] == 401
    assert not signup.dialogs


def test_a_401_would_open_a_dialog_if_the_page_sent_the_browsers_credentials(signup):
    for credentials in "omit", "same-origin":
        signup.evaluate("""([path, credentials]) => fetch(path, {
            method: "PATCH", credentials, body: "{}"}).catch(() => {})""",
            [ACTIVATE, credentials])

    assert len(signup.dialogs) == 1     # so the test above would see it
