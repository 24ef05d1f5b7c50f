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


def test_it_registers_mails_a_code_and_activates_once(service):
    email = fresh_email()

    accepted = register(service, email)
    code = code_mailed_to(service, email)
    tries = [activate(service, email, each) for each in (wrong(code), code, code)]

    assert accepted.status == 202
    assert [answer.status for answer in tries] == [403, 200, 409]
    assert mailed_to(service, email, 2)["subject"] == "Your account is active"


def test_it_shows_its_docs(service):
    assert b"swagger-ui" in send(service, "GET", "/docs/").body
