"""The docs page, and a page that registers, as a person uses them: in Chromium."""

import json
from urllib.parse import urlsplit

import pytest
from playwright.sync_api import sync_playwright
from servers.install import find, install_missing
from servers.process import TOP
from steps import ACTIVATE, PASSWORD, code_mailed_to, fresh_email, mailed_to, wrong
from steps.readme import code_in


@pytest.fixture(scope="module")
def browser():
    """The system's own Chromium."""
    install_missing("Chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=find("chromium"), args=[
            "--no-sandbox",                    # root has none
            "--proxy-server=127.0.0.1:1",      # no way out; loopback needs no proxy
            "--disable-gpu", "--disable-quic", "--disable-background-networking"])
        yield browser
        browser.close()


# -- The docs page ---------------------------------------------------------------------


def execute(operation, fields):
    """Expands an operation and tries it out; returns the status that the page shows."""
    operation.locator(".opblock-summary-control").click()
    operation.get_by_role("button", name="Try it out").click()
    operation.get_by_role("textbox").fill(json.dumps(fields))
    operation.get_by_role("button", name="Execute").click()
    return operation.locator(".live-responses-table .response .response-col_status"
                             ).inner_text()


def test_it_registers_and_activates_on_its_docs_page(service, browser):
    email, hosts, page = fresh_email(), set(), browser.new_page()
    page.on("request", lambda request: hosts.add(urlsplit(request.url).netloc))

    page.goto(f"{service.url}/docs/")
    accepted = execute(page.locator("#operations-Users-register"),
                       {"email": email, "password": PASSWORD})
    page.get_by_role("button", name="Authorize").first.click()
    dialog = page.locator(".dialog-ux")
    dialog.locator("[name=username]").fill(email)
    dialog.locator("[name=password]").fill(PASSWORD)
    dialog.get_by_role("button", name="Apply").click()
    dialog.get_by_role("button", name="Close").click()
    done = execute(page.locator("#operations-Users-activate"),
                   {"code": code_mailed_to(service, email)})

    assert (accepted, done) == ("202", "200")
    assert hosts == {urlsplit(service.url).netloc}     # it asks no other server


# -- A page that registers -------------------------------------------------------------


@pytest.fixture
def signup(service, browser):
    """A page on the API's own origin, with the functions of the README.

    signup.dialogs are the login dialogs that Chromium would have opened.
    """
    page = browser.new_page()
    page.goto(f"{service.url}/healthz")
    page.set_content((TOP / "tests/signup.html").read_text().replace(
        "FUNCTIONS", "\n\n".join(code_in("From a web page"))))
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


def test_a_page_registers_activates_and_learns_what_went_wrong(
        service, signup, database):
    email, password = fresh_email(), "größer als früher"

    invalid = press(signup, "Send a code", email="nobody", password="short")
    accepted = press(signup, "Send a code", email=email, password=password)
    code = code_mailed_to(service, email)
    failed = press(signup, "Activate", code=wrong(code))
    again = press(signup, "Send a code")
    done = press(signup, "Activate", code=code_mailed_to(service, email, 2))
    active = press(signup, "Activate")
    database("UPDATE limits SET count = 1000000 WHERE subject = %s", [email])
    limited = press(signup, "Send a code")

    answers = invalid, accepted, failed, again, done, active, limited
    assert ([answer["status"] for answer in answers]
            == [422, 202, 403, 202, 200, 409, 429])
    assert [error["field"] for error in invalid["errors"]] == ["email", "password"]
    assert accepted["expires_in"] == 60
    assert 0 < int(limited["wait"]) <= 3600
    assert mailed_to(service, email, 3)
    assert not signup.dialogs


def test_a_page_gets_its_401_without_the_dialog_that_browsers_open(signup):
    refused = press(signup, "Activate", code="0427")     # without address and password
    ours = len(signup.dialogs)
    signup.evaluate("""path => fetch(path, {
        method: "PATCH", credentials: "same-origin", body: "{}"}).catch(() => {})""",
        ACTIVATE)

    assert refused["status"] == 401
    assert (ours, len(signup.dialogs)) == (0, 1)     # so a dialog would be seen
