"""Expired rows are deleted, a few at a time, by the requests that come."""

from contextlib import closing
from functools import partial
from itertools import pairwise
from types import SimpleNamespace
from urllib.parse import quote

import psycopg2
import pytest
from steps import activate, activated, fresh_email, register, registered, wait_until


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


@pytest.fixture
def tidier(servers, start_service):
    """An API of one worker that refuses each request right after it may have tidied.

    Its sessions use the indexes, although the tables are small.
    """
    options = "enable_seqscan=off enable_bitmapscan=off enable_sort=off"
    options = quote(" ".join(f"-c {option}" for option in options.split()))
    url = f"{servers.postgres.url}?application_name=tidier&options={options}"
    return start_service(DATABASE_URL=url, WEB_CONCURRENCY="1", IP_LIMIT="0")


def tidies(tidier, old_rows, left=(0, 0), ask=register, seconds=60):
    """Sends requests until only so many old rows are left; gives all their counts."""
    counts = [old_rows.left()]

    def is_done():
        assert ask(tidier, fresh_email()).status == 429
        counts.append(old_rows.left())
        return counts[-1] == left

    wait_until(lambda: any(is_done() for _ in range(100)), seconds)    # without pauses
    return counts


def test_it_takes_away_what_is_out_of_date_a_little_at_a_time(tidier, old_rows):
    old_rows.insert(1000)

    counts = tidies(tidier, old_rows)

    for of_one_table in zip(*counts):
        assert all(before - after <= 300 for before, after in pairwise(of_one_table))


def test_it_tidies_at_activations_too(tidier, old_rows):
    old_rows.insert(10)

    tidies(tidier, old_rows, ask=partial(activate, code="1234"))


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


def test_it_takes_away_what_comes_in_later_with_an_older_time(tidier, old_rows,
                                                              database):
    old_rows.insert(1)
    tidies(tidier, old_rows)
    database("""
        INSERT INTO users (email, password_hash, code_digest, expires_at,
                           registered_at)
        VALUES (%(name)s || '@old.example', '', sha256(''), now(),
                now() - interval '1 year');
        INSERT INTO limits (name, subject, count, expires_at)
        VALUES ('old', %(name)s, 1, now() - interval '1 year')""", old_rows.name)

    tidies(tidier, old_rows, seconds=300)   # as after a restore: seldom, it begins anew


def test_it_does_not_wait_for_old_rows_that_are_in_use(servers, tidier, old_rows):
    old_rows.insert(10)
    with closing(psycopg2.connect(servers.postgres.url)) as session:
        session.cursor().execute("""
            SELECT FROM users, limits
             WHERE email = %(name)s || '1@old.example' AND subject = %(name)s || '1'
               FOR UPDATE""", old_rows.name)

        tidies(tidier, old_rows, left=(1, 1))


def test_it_does_not_pass_over_what_it_has_deleted_while_a_backup_runs(
        servers, tidier, old_rows, database):
    database("VACUUM users, limits")     # of what other tests have deleted
    old_rows.insert(3000)
    before = entries_read(database)
    with closing(psycopg2.connect(servers.postgres.url)) as backup:
        backup.set_session(isolation_level="REPEATABLE READ")
        backup.cursor().execute("SELECT count(*) FROM users")     # its snapshot

        tidies(tidier, old_rows)
        tidier.stop()

    # Only the end of a session brings its last figures into the statistics.
    wait_until(lambda: not database("""
        SELECT FROM pg_stat_activity WHERE application_name = 'tidier'"""))
    read = [after - was for was, after in zip(before, entries_read(database))]
    # Each time from the beginning, it would be 16,500; seldom it does begin anew.
    assert all(3000 <= count < 4 * 3000 for count in read)


def entries_read(database):
    """How many entries were read of the index by time of each table, ever."""
    return [count for count, in database("""
        SELECT idx_tup_read
          FROM pg_stat_user_indexes
         WHERE indexrelname IN ('users_waiting', 'limits_expired')
         ORDER BY indexrelname""")]
