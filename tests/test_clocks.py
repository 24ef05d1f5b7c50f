"""Clocks that jump by half a minute or an hour, forwards and back.

PostgreSQL decides when a code expires, by its own clock. The consumer compares the
deadline of a job with its own. If the consumer's is ahead by more than a code lives,
codes are not mailed, and the log says so. Once both agree, all is well again.
"""

import calendar
import time
from contextlib import closing
from types import SimpleNamespace

import psycopg2
import pytest
from servers.clock import Clock
from servers.postgres import Postgres
from servers.program import Consumer, Gunicorn
from servers.system import create_tables, running_program
from steps import (
    activate,
    code_mailed_to,
    fresh_email,
    register,
    registered,
    wait_until,
)
from steps.jobs import outcomes
from steps.logs import events


@pytest.fixture(scope="module")
def system(servers, settings, brokers):
    """A system with .clocks that can be wrong; codes live ten minutes."""
    folder = servers.folder / "clocks"
    postgres = Postgres(folder / "database")
    clocks = {"consumer": Clock(folder), "database": Clock(postgres.folder)}
    postgres.env |= clocks["database"].env
    with postgres:
        create_tables(postgres)
        changed = settings | {"DATABASE_URL": postgres.api_url, "CODE_LIFETIME": "600",
                              "BROKER_URL": brokers["clocks"]}
        with running_program(
                folder, changed,
                consumer=lambda folder, settings: Consumer(
                    folder, settings | clocks["consumer"].env)) as (api, consumer):
            api.maildev_url = servers.mail_server.web_url
            yield SimpleNamespace(api=api, consumer=consumer, postgres=postgres,
                                  settings=changed, clocks=clocks)


def time_of_log(system, job, email):
    [*_, event] = events(system.consumer.log, event="job", job=job)
    return calendar.timegm(time.strptime(event["time"], "%Y-%m-%dT%H:%M:%SZ"))


def time_of_row(system, job, email):
    return float(system.postgres.psql(
        f"SELECT extract(epoch FROM registered_at) FROM users WHERE email = '{email}'"))


shown_by = {"consumer": time_of_log, "database": time_of_row}


@pytest.mark.parametrize("whose, seconds, outcome, status", [
    ("consumer", 30, "sent", 200), ("consumer", -30, "sent", 200),
    ("consumer", 3600, "expired", 200), ("consumer", -3600, "sent", 200),
    ("database", 30, "sent", 200), ("database", -30, "sent", 200),
    ("database", 3600, "sent", 403), ("database", -3600, "expired", 200)])
def test_it_works_again_after_a_clock_was_wrong(
        system, whose, seconds, outcome, status):
    """outcome: of a job meanwhile; status: of a code that was issued before."""
    api = system.api
    before, old_code = registered(api)

    with system.clocks[whose].wrong_by(seconds):
        meanwhile, right = fresh_email(), time.time()
        assert register(api, meanwhile).status == 202
        job = events(api.log, event="request", status="202")[-1]["job"]
        wait_until(lambda: outcomes(system.consumer, job)[-1:] == [outcome])
        shown = shown_by[whose](system, job, meanwhile)
        assert shown - right == pytest.approx(seconds, abs=10)
        if outcome == "sent":
            code = code_mailed_to(api, meanwhile)
            assert activate(api, meanwhile, code).status == 200
        wait_until(lambda: activate(api, before, old_code).status == status)

    if outcome == "expired":
        assert register(api, meanwhile).status == 202
        code = code_mailed_to(api, meanwhile)
        assert activate(api, meanwhile, code).status == 200
    after, code = registered(api)
    assert activate(api, after, code).status == 200


def test_it_tidies_up_again_after_the_databases_clock_was_set_back(system, tmp_path):
    settings = system.settings | {"IP_LIMIT": "0", "WEB_CONCURRENCY": "1"}
    with Gunicorn(tmp_path, settings) as tidier, \
            closing(psycopg2.connect(system.postgres.url)) as session:
        session.autocommit = True
        cursor = session.cursor()

        def tidied():
            cursor.execute("""
                INSERT INTO users (email, password_hash, code_digest, expires_at,
                                   registered_at)
                VALUES ('ann@old.example', '', sha256(''), now(),
                        now() - interval '1 day 1 second');
                INSERT INTO limits (name, subject, count, expires_at)
                VALUES ('old', 'ann', 1, now() - interval '1 second')""")
            # One request in 30 tidies.
            wait_until(lambda: any(is_done() for _ in range(100)), 60)

        def is_done():
            assert register(tidier, fresh_email()).status == 429
            cursor.execute("""
                SELECT FROM users WHERE email = 'ann@old.example' UNION ALL
                SELECT FROM limits WHERE subject = 'ann'""")
            return not cursor.fetchall()

        with system.clocks["database"].wrong_by(3600):
            tidied()
        tidied()
