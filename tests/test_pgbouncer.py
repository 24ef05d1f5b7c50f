"""PgBouncer in transaction mode, which gives each transaction another session."""

from functools import partial

import pytest
from servers.faults import row_locked, statements_waiting
from servers.install import install_missing
from servers.pgbouncer import PgBouncer
from steps import (
    activate,
    at_once,
    code_mailed_to,
    fresh_client,
    fresh_email,
    mailed_to,
    refused_in_time,
    register,
    send,
    timed,
    wait_until,
    wrong,
)


@pytest.fixture(scope="module")
def pooler(servers):
    """A PgBouncer with fewer sessions than the API has workers."""
    install_missing(PgBouncer.name)
    with PgBouncer(servers.folder / "pgbouncer", servers.postgres) as pooler:
        yield pooler


@pytest.fixture
def pooled(pooler, start_service):
    """An API that reaches PostgreSQL through it."""
    return start_service(
        DATABASE_URL=pooler.api_url, WEB_CONCURRENCY="4", TRUSTED_PROXIES="1",
        IP_LIMIT="5", EMAIL_LIMIT_HOUR="2", FAILURE_LIMIT_HOUR="2")


def registered(api, here):
    """A fresh address that a client has registered: (email, the code)."""
    email = fresh_email()
    assert register(api, email, **here).status == 202
    return email, code_mailed_to(api, email)


def test_it_registers_and_activates_through_pgbouncer(pooled):
    here = fresh_client()
    email, code = registered(pooled, here)

    refused = activate(pooled, email, wrong(code), **here)
    done = activate(pooled, email, code, **here)

    assert [refused.status, done.status] == [403, 200]
    assert mailed_to(pooled, email, 2)["subject"] == "Your account is active"
    assert send(pooled, "GET", "/healthz").status == 200


def test_it_holds_its_limits_through_pgbouncer(pooled):
    email, here, there = fresh_email(), fresh_client(), fresh_client()

    of_address = [register(pooled, email, **fresh_client()).status for _ in range(3)]
    of_client = [register(pooled, fresh_email(), **here).status for _ in range(6)]
    failures = [activate(pooled, fresh_email(), "1234", **there).status
                for _ in range(3)]

    assert of_address == [202, 202, 429]
    assert of_client == [202] * 5 + [429]
    assert failures == [403, 403, 429]


def test_it_takes_40_requests_at_once_through_pgbouncer(pooled):
    emails = [fresh_email() for _ in range(20)]

    answers = at_once(
        *[partial(register, pooled, email, **fresh_client()) for email in emails],
        *[partial(activate, pooled, fresh_email(), "1234", **fresh_client())] * 20)

    assert [answer.status for answer in answers[:20]] == [202] * 20
    assert sorted(answer.status for answer in answers[20:]) == [403] * 2 + [429] * 18
    assert all(mailed_to(pooled, email) for email in emails)


def test_it_gives_up_a_locked_row_through_pgbouncer_and_leaves_nothing_behind(
        servers, pooled):
    here = fresh_client()
    email, code = registered(pooled, here)
    with row_locked(servers.postgres, email):
        refused = timed(partial(activate, pooled, email, code, **here))

        assert refused_in_time(refused)
        wait_until(lambda: statements_waiting(servers.postgres) == 0, 3)

    done = wait_until(lambda: answer if (
        answer := activate(pooled, email, code, **here)).status != 503 else None)
    assert done.status == 200
