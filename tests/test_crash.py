"""A worker that is killed in the middle of a request, at each step of it.

A relay holds back what the API says to a server, or what the server answers. Then the
worker is killed by SIGKILL. The caller gets no answer, and tries again.
"""

import os
import signal
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest
from servers.faults import answering, nothing, saying, way_to
from steps import (
    activate,
    code_mailed_to,
    fresh_email,
    mailed_to,
    register,
    registered,
    wait_until,
    workers_of,
)

SETTING = {"database": "DATABASE_URL", "broker": "BROKER_URL"}
INSERT, UPDATE, JOB = b"INSERT INTO users", b"UPDATE users", b'"template"'


@contextmanager
def api_that_is_killed(settings, start_service, server, is_held):
    """An API with one worker; kill(call) makes a request, whose worker is killed when
    the relay to the server holds something."""
    def kill(call):
        with ThreadPoolExecutor() as threads:
            way.is_held = is_held
            answer = threads.submit(call)
            assert way.held.wait(20)
            os.kill(workers_of(api)[0], signal.SIGKILL)
            way.is_held = nothing
            way.released.set()
            assert isinstance(answer.exception(20), OSError)    # no answer

    with way_to(settings[SETTING[server]]) as way:
        api = start_service(**{SETTING[server]: way.url}, WEB_CONCURRENCY="1")
        api.kill_worker_during = kill
        yield api


# The step: the server, what is held, whether the registration is kept, number of mails.
OF_REGISTERING = {
    "before the client is counted": (
        "database", saying, [b"register client"], False, 0),
    "before the row is written": ("database", saying, [INSERT], False, 0),
    "after the row is written": ("database", answering, [INSERT], False, 0),
    "after the job is published": ("broker", answering, [JOB], False, 1),
    "before COMMIT": ("database", saying, [INSERT, b"COMMIT"], False, 1),
    "after COMMIT": ("database", answering, [INSERT, b"COMMIT"], True, 1)}


@pytest.mark.parametrize("step", OF_REGISTERING)
def test_it_keeps_a_registration_or_nothing_of_it_when_it_is_killed(
        settings, start_service, database, step):
    server, held, texts, kept, mails = OF_REGISTERING[step]
    email = fresh_email()
    with api_that_is_killed(settings, start_service, server, held(*texts)) as api:
        register(api, fresh_email())    # its connections are open now

        api.kill_worker_during(lambda: register(api, email))

        rows = database("SELECT 1 FROM users WHERE email = %s", [email])
        counts = database("SELECT 1 FROM limits WHERE subject = %s", [email])
        assert (len(rows), len(counts)) == ((1, 2) if kept else (0, 0))
        if mails:
            code = code_mailed_to(api, email)
            assert activate(api, email, code).status == (200 if kept else 403)
        if not kept:
            wait_until(lambda: register(api, email).status == 202)
            code = code_mailed_to(api, email, mails + 1)
            assert activate(api, email, code).status == 200


# The step: the server, what is held, whether the account is active, number of mails.
OF_ACTIVATING = {
    "before the code is compared": ("database", saying, [UPDATE], False, 1),
    "before COMMIT": ("database", saying, [UPDATE, b"COMMIT"], False, 1),
    "after COMMIT": ("database", answering, [UPDATE, b"COMMIT"], True, 1),
    "before the job is published": ("broker", saying, [JOB], True, 1),
    "after the job is published": ("broker", answering, [JOB], True, 2)}


@pytest.mark.parametrize("step", OF_ACTIVATING)
def test_it_activates_an_account_or_spends_no_attempt_when_it_is_killed(
        settings, start_service, service, database, step):
    server, held, texts, active, mails = OF_ACTIVATING[step]
    with api_that_is_killed(settings, start_service, server, held(*texts)) as api:
        email, code = registered(service)

        api.kill_worker_during(lambda: activate(api, email, code))

        state = database("SELECT activated_at IS NOT NULL, attempts FROM users "
                         "WHERE email = %s", [email])
        assert state == [(True, 1) if active else (False, 0)]
        assert mailed_to(api, email, mails)
        assert activate(api, email, code).status == (409 if active else 200)
