"""A worker that is killed in the middle of a registration, at each step of it.

A relay holds back what the API says to a server, or what the server answers. Then the
worker is killed by SIGKILL. The caller gets no answer, and tries again.
"""

import os
import signal
from concurrent.futures import ThreadPoolExecutor

import pytest
from servers.faults import way_to
from steps import (
    activate,
    code_mailed_to,
    fresh_email,
    register,
    wait_until,
    workers_of,
)


def saying(text):
    """Makes a test for what the API says, if it has this text."""
    return lambda: lambda data, is_answer: not is_answer and text in data


def answering(text):
    """Makes a test for the answer to that."""
    def made():
        said = []

        def is_held(data, is_answer):
            if not is_answer and text in data:
                said.append(text)
            return is_answer and bool(said)

        return is_held

    return made


def nothing(data, is_answer):
    return False


# The step: the server, what is held, whether the registration is kept, number of mails.
STEPS = {
    "before the client is counted": (
        "postgres", saying(b"register client"), False, 0),
    "before the row is written": ("postgres", saying(b"INSERT INTO users"), False, 0),
    "after the row is written": (
        "postgres", answering(b"INSERT INTO users"), False, 0),
    "after the job is published": (
        "rabbitmq", answering(b'"template"'), False, 1),
    "before COMMIT": ("postgres", saying(b"COMMIT"), False, 1),
    "after COMMIT": ("postgres", answering(b"COMMIT"), True, 1)}


@pytest.mark.parametrize("step", STEPS)
def test_it_keeps_a_registration_or_nothing_of_it_when_it_is_killed(
        servers, start_service, database, step):
    server, is_held, kept, mails = STEPS[step]
    setting, url = {"postgres": ("DATABASE_URL", servers.postgres.api_url),
                    "rabbitmq": ("BROKER_URL", servers.rabbitmq.url)}[server]
    email = fresh_email()
    with way_to(url) as way, ThreadPoolExecutor() as threads:
        api = start_service(**{setting: way.url, "WEB_CONCURRENCY": "1"})
        register(api, fresh_email())    # its connections are open now
        way.is_held = is_held()
        answer = threads.submit(lambda: register(api, email))
        assert way.held.wait(20)

        os.kill(workers_of(api)[0], signal.SIGKILL)
        way.is_held = nothing
        way.released.set()

        assert isinstance(answer.exception(20), OSError)    # no answer
        rows = database("SELECT 1 FROM users WHERE email = %s", [email])
        counts = database("SELECT 1 FROM limits WHERE subject = %s", [email])
        assert (len(rows), len(counts)) == ((1, 2) if kept else (0, 0))
        if mails:
            code = code_mailed_to(api, email)
            assert activate(api, email, code).status == (200 if kept else 401)
        if not kept:
            wait_until(lambda: register(api, email).status == 202)
            code = code_mailed_to(api, email, mails + 1)
            assert activate(api, email, code).status == 200
