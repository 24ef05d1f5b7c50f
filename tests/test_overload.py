"""More requests than the API can take: the edge answers 503 to the others, and soon."""

import secrets
from functools import partial

import pytest
from servers.edge import Edge
from servers.install import install_missing
from servers.process import running
from servers.program import Gunicorn
from steps import (
    at_once,
    fresh_email,
    mailed_to,
    mails_to,
    problem_in,
    register,
    send,
    wait_until,
)


@pytest.fixture
def narrow(servers, settings, service):
    """An edge before an API of one worker with a queue of two; .api is that API."""
    install_missing("nginx")
    folder = servers.folder / f"narrow{secrets.token_hex(4)}"
    api = Gunicorn(folder / "api", settings | {"WEB_CONCURRENCY": "1"},
                   options=["--backlog", "2"])
    with running(api, Edge(folder, api)) as (api, edge):
        edge.api, edge.maildev_url = api, service.maildev_url
        yield edge


def test_it_sheds_what_is_too_much_and_keeps_nothing_of_it(narrow, database):
    emails = [fresh_email() for _ in range(60)]

    answers = at_once(*[partial(register, narrow, email) for email in emails])

    taken = [email for email, answer in zip(emails, answers) if answer.status == 202]
    shed = [email for email, answer in zip(emails, answers) if answer.status == 503]
    refusals = [answer for answer in answers if answer.status == 503]
    assert taken and shed and len(taken) + len(shed) == 60
    assert {problem_in(answer) for answer in refusals} == {503}
    assert all(0 < int(answer.headers["Retry-After"]) <= 10 for answer in refusals)
    assert all(mailed_to(narrow, email) for email in taken)
    assert not any(mails_to(narrow, email) for email in shed)
    assert database("SELECT email FROM users WHERE email = ANY(%s)", [shed]) == []
    assert {register(narrow, email).status for email in shed[:12]} == {202}


def test_it_does_not_disturb_the_worker_with_what_it_sheds(narrow):
    answers = at_once(*[partial(register, narrow, fresh_email()) for _ in range(60)])

    def seen():
        return narrow.api.log.read_text().count("method=POST")

    taken = sum(answer.status == 202 for answer in answers)
    wait_until(lambda: seen() >= taken)
    send(narrow, "GET", "/openapi.yaml")      # the worker comes to it after all others
    wait_until(lambda: "route=/openapi.yaml" in narrow.api.log.read_text())
    assert seen() == taken < 60


def test_it_asks_the_other_api_where_one_is_full(servers, settings, service, narrow):
    spare = Gunicorn(narrow.folder / "spare", settings)
    with running(spare, Edge(narrow.folder / "both", narrow.api, spare)) as (_, both):
        answers = at_once(*[partial(register, both, fresh_email()) for _ in range(20)])

    assert {answer.status for answer in answers} == {202}
    assert "method=POST" in spare.log.read_text()
