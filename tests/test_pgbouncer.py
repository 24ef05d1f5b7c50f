"""PgBouncer in transaction mode, which gives each transaction another session."""

from functools import partial

import pytest
from servers.faults import row_locked, statements_waiting
from servers.install import install_missing
from servers.pgbouncer import PgBouncer
from servers.program import Gunicorn
from steps import (
    activate,
    at_once,
    fresh_client,
    fresh_email,
    mailed_to,
    refused_in_time,
    register,
    registered,
    send,
    timed,
    wait_until,
    wrong,
)


@pytest.fixture(scope="module")
def pooled(servers, settings, service):
    """An API that reaches PostgreSQL through a PgBouncer that has fewer sessions than
    the API has workers."""
    install_missing(PgBouncer.name)
    folder = servers.folder / "pgbouncer"
    with PgBouncer(folder, servers.postgres) as pooler, Gunicorn(folder, settings | {
            "DATABASE_URL": pooler.api_url, "WEB_CONCURRENCY": "4",
            "TRUSTED_PROXIES": "1", "EMAIL_LIMIT_HOUR": "2",
            "FAILURE_LIMIT_HOUR": "2"}) as api:
        api.maildev_url = service.maildev_url
        yield api


def test_it_registers_and_activates_through_pgbouncer(pooled):
    client = fresh_client()
    email, code = registered(pooled, **client)

    refused = activate(pooled, email, wrong(code), **client)
    done = activate(pooled, email, code, **client)

    assert [refused.status, done.status] == [403, 200]
    assert mailed_to(pooled, email, 2)["subject"] == "Your account is active"
    assert send(pooled, "GET", "/healthz").status == 200


def test_it_holds_its_limits_for_22_requests_at_once_through_pgbouncer(pooled):
    email, here = fresh_email(), fresh_client()

    answers = at_once(
        *[partial(register, pooled, fresh_email(), **fresh_client())
          for _ in range(10)],
        *[partial(register, pooled, email, **fresh_client()) for _ in range(4)],
        *[partial(activate, pooled, fresh_email(), "1234", **here)] * 8)

    statuses = [answer.status for answer in answers]
    assert statuses[:10] == [202] * 10
    assert sorted(statuses[10:14]) == [202] * 2 + [429] * 2     # of an address
    assert sorted(statuses[14:]) == [403] * 2 + [429] * 6       # failures of a client


def test_it_gives_up_a_locked_row_through_pgbouncer_and_leaves_nothing_behind(
        servers, pooled):
    email, code = registered(pooled, **fresh_client())
    with row_locked(servers.postgres, email):
        refused = timed(partial(activate, pooled, email, code, **fresh_client()))

        assert refused_in_time(refused)
        wait_until(lambda: statements_waiting(servers.postgres) == 0, seconds=5)

    wait_until(
        lambda: activate(pooled, email, code, **fresh_client()).status == 200)
