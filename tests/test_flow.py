"""The story from beginning to end; also against a system that runs already."""

from steps import (
    activate,
    code_mailed_to,
    fresh_email,
    mailed_to,
    register,
    send,
    wrong,
)


def test_it_registers_mails_a_code_and_activates(service):
    email = fresh_email()

    accepted = register(service, email)
    code = code_mailed_to(service, email)
    refused = activate(service, email, wrong(code))
    done = activate(service, email, code)

    assert [accepted.status, refused.status, done.status] == [202, 403, 200]
    assert mailed_to(service, email, 2)["subject"] == "Your account is active"


def test_it_says_when_an_account_is_active_already(service):
    email = fresh_email()
    register(service, email)
    code = code_mailed_to(service, email)
    activate(service, email, code)

    again = activate(service, email, code)

    assert again.status == 409


def test_it_shows_its_docs(service):
    assert b"swagger-ui" in send(service, "GET", "/docs/").body
