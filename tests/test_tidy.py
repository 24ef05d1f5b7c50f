"""Expired rows are deleted, a few at a time, by the requests that come."""

import time
from contextlib import closing
from itertools import pairwise
from types import SimpleNamespace

import psycopg2
import pytest
from servers.faults import table_locked
from servers.program import Gunicorn
from steps import (
    activate,
    activated,
    fresh_email,
    register,
    registered,
    send,
)
from steps.logs import events


@pytest.fixture
def old_rows(database):
    """Inserts so many expired rows into each table; counts those left: (users, limits).

    They are the oldest rows of their tables, and each has a time of its own.
    """
    name = {"name": fresh_email().partition("@")[0]}

    def insert(count):
        database("""
            INSERT INTO users (email, password_hash, code_digest, expires_at,
                               registered_at)
            SELECT %(name)s || n || '@old.example', '', sha256(''), now(),
                   now() - interval '1 month' + n * interval '1 ms'
              FROM generate_series(1, %(count)s) AS n;
            INSERT INTO limits (name, subject, count, expires_at)
            SELECT 'old', %(name)s || n, 1,
                   now() - interval '1 month' + n * interval '1 ms'
              FROM generate_series(1, %(count)s) AS n""", name | {"count": count})

    def left():
        return database("""
            SELECT (SELECT count(*) FROM users WHERE email LIKE %(name)s || '%%'),
                   (SELECT count(*) FROM limits WHERE subject LIKE %(name)s || '%%')
            """, name)[0]

    yield SimpleNamespace(name=name, insert=insert, left=left)
    database("""
        DELETE FROM users WHERE email LIKE %(name)s || '%%';
        DELETE FROM limits WHERE subject LIKE %(name)s || '%%'""", name)


@pytest.fixture(scope="module")
def tidier(servers, settings, tmp_path_factory):
    """An API of one worker that refuses each request right after it may have tidied."""
    with Gunicorn(tmp_path_factory.mktemp("tidier"), settings | {
            "WEB_CONCURRENCY": "1", "IP_LIMIT": "0"}) as api:
        yield api


def check_health(api):
    return send(api, "GET", "/healthz")


def tidies(tidier, old_rows, left=(0, 0), ask=check_health):
    """Asks until only so many old rows are left; gives all their counts."""
    counts, deadline = [old_rows.left()], time.monotonic() + 60
    while counts[-1] != left:
        assert ask(tidier).status in (200, 429) and time.monotonic() < deadline
        counts.append(old_rows.left())
    return counts


@pytest.mark.parametrize("ask", [
    lambda api: register(api, fresh_email()),
    lambda api: activate(api, fresh_email(), "1234"),
    check_health], ids=["register", "activate", "health check"])
def test_it_takes_away_what_is_out_of_date_a_little_at_a_time(tidier, old_rows, ask):
    old_rows.insert(301)

    counts = tidies(tidier, old_rows, ask=ask)

    for of_one_table in zip(*counts):
        assert all(before - after <= 300 for before, after in pairwise(of_one_table))


def test_it_leaves_what_is_still_of_use(service, tidier, old_rows, database):
    active, (waiting, code) = activated(service), registered(service)
    both = [active, waiting]
    database("""
        UPDATE users SET registered_at = now() - interval '1 year' WHERE email = %s;
        UPDATE users SET registered_at = now() - interval '23 hours 59 minutes'
         WHERE email = %s;
        UPDATE limits SET expires_at = now() + interval '5 minutes'
         WHERE subject IN (%s, %s);
        DELETE FROM limits WHERE expires_at < now()""", [*both, *both])
    kept = ("""SELECT (SELECT count(*) FROM users WHERE email IN (%s, %s)),
                      (SELECT count(*) FROM limits WHERE subject IN (%s, %s))""",
            [*both, *both])
    before = database(*kept)
    old_rows.insert(10)

    tidies(tidier, old_rows)

    assert database(*kept) == before
    assert activate(service, waiting, code).status == 200


def test_it_does_not_wait_for_old_rows_that_are_in_use(servers, tidier, old_rows):
    old_rows.insert(10)
    with closing(psycopg2.connect(servers.postgres.url)) as session:
        session.cursor().execute("""
            SELECT FROM users, limits
             WHERE email = %(name)s || '1@old.example' AND subject = %(name)s || '1'
               FOR UPDATE""", old_rows.name)

        tidies(tidier, old_rows, left=(1, 1))


@pytest.mark.parametrize("table, left", [("users", (10, 0)), ("limits", (0, 10))])
def test_it_gives_up_soon_and_quietly_where_it_would_have_to_wait(
        servers, tidier, old_rows, table, left):
    old_rows.insert(10)

    with table_locked(servers.postgres, f"{table} IN EXCLUSIVE MODE"):    # for DELETE
        tidies(tidier, old_rows, left)
        after = check_health(tidier)

    assert after.status == 200    # and not 503, as after a second of waiting
    assert not events(tidier.log, level="WARNING")
