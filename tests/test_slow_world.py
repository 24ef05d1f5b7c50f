"""The truth in a slow world: servers that answer late or break off.

A 2xx means that it happened, and a 503 that nothing was kept. Every answer comes within
5 seconds, however many callers wait.
"""

import contextlib
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from servers.faults import (
    alarmed,
    full,
    paused,
    row_locked,
    statements_waiting,
    table_locked,
    way_to,
)
from steps import (
    activate,
    at_once,
    code_mailed_to,
    fresh_email,
    refused_in_time,
    register,
    registered,
    send,
    timed,
    wait_until,
)
from steps.jobs import fill, purge
from steps.logs import events

ANOTHER = "another fine password"
SLOW = {"paused": lambda servers: paused(servers.rabbitmq),
        "alarmed": lambda servers: alarmed(servers.rabbitmq)}


# -- A 2xx happened, and after a 503 nothing is kept -----------------------------------


def test_it_mails_no_live_code_for_a_registration_that_it_refused(
        servers, start_service):
    email = fresh_email()
    with way_to(servers.rabbitmq.url) as way:
        api = start_service(BROKER_URL=way.url, WEB_CONCURRENCY="1")
        register(api, fresh_email())     # the connection is open, and used again
        way.seconds = 1.5

        assert register(api, email).status == 503

        way.seconds = 0
        late_code = code_mailed_to(api, email)     # the broker had confirmed
        wait_until(lambda: activate(api, email, late_code).status == 401)


def test_it_keeps_what_it_says_however_slow_lock_and_broker_were(
        servers, start_service):
    with way_to(servers.rabbitmq.url) as way, ThreadPoolExecutor() as threads:
        api = start_service(BROKER_URL=way.url)
        email, _ = registered(api)
        way.seconds = 0.3     # eight answers until the confirm
        with row_locked(servers.postgres, email):
            under_way = threads.submit(lambda: register(api, email, ANOTHER))
            wait_until(lambda: statements_waiting(servers.postgres))
        accepted = under_way.result()
        way.seconds = 0

        assert accepted.status == 202
        code = code_mailed_to(api, email, 2)
        assert activate(api, email, code, ANOTHER).status == 200


@pytest.mark.parametrize("outage", SLOW.values(), ids=SLOW.keys())
def test_it_activates_without_a_confirmation_and_logs_which_one_is_missing(
        servers, database, start_service, outage):
    api = start_service(WEB_CONCURRENCY="1")
    email, code = registered(api)     # its connections are open now

    with outage(servers):
        answer = timed(lambda: activate(api, email, code))

    assert answer.status == 200 and answer.seconds < 5
    assert database("SELECT count(activated_at) FROM users WHERE email = %s",
                    [email]) == [(1,)]
    [request] = events(api.log, event="request", route="/users/activate")
    assert len(request["job"]) > 8
    assert events(api.log, event="outage", server="broker", job=request["job"])
    wait_until(lambda: register(api, fresh_email()).status == 202)


@contextlib.contextmanager
def out_of_memory(servers, broker):
    with alarmed(servers.rabbitmq):
        yield


@contextlib.contextmanager
def out_of_space(servers, broker):
    with full(servers.rabbitmq, "spare"):
        fill(broker)
        yield
    purge(broker)


@pytest.mark.parametrize("outage", [out_of_memory, out_of_space])
def test_it_does_not_lock_out_a_caller_who_repeats_what_was_refused(
        servers, broker, database, start_service, outage):
    api = start_service(BROKER_URL=broker, WEB_CONCURRENCY="1", EMAIL_LIMIT_HOUR="5")
    email = fresh_email()

    with outage(servers, broker):
        for _ in range(7):
            answer = register(api, email)
            assert answer.status == 503
            time.sleep(int(answer.headers["Retry-After"]))     # as a caller would

    wait_until(lambda: register(api, email).status == 202)
    counts = database("SELECT count FROM limits WHERE subject = %s", [email])
    assert counts == [(1,), (1,)]     # of this hour, and of this day


# -- In time, however many callers wait ------------------------------------------------


@pytest.mark.parametrize("server", ["rabbitmq", "postgres"])
def test_it_refuses_a_crowd_in_time_while_a_server_is_paused(
        servers, start_service, server):
    api = start_service(WEB_CONCURRENCY="5")
    at_once(*[lambda: register(api, fresh_email())] * 10)     # connections are open now

    with paused(getattr(servers, server)):
        answers = at_once(
            *[lambda: timed(lambda: register(api, fresh_email()))] * 60,
            *[lambda: timed(lambda: send(api, "GET", "/healthz"))] * 80)

    assert all(refused_in_time(answer) for answer in answers)
    wait_until(lambda: register(api, fresh_email()).status == 202)


def test_it_refuses_a_crowd_in_time_while_a_table_is_locked(servers, start_service):
    api = start_service(WEB_CONCURRENCY="5")
    at_once(*[lambda: register(api, fresh_email())] * 10)     # connections are open now

    with table_locked(servers.postgres, "limits"):
        answers = at_once(*[lambda: timed(lambda: register(api, fresh_email()))] * 60)

    assert all(refused_in_time(answer) for answer in answers)
    wait_until(lambda: register(api, fresh_email()).status == 202)


def test_it_answers_a_crowd_in_time_while_each_answer_of_a_server_is_late(
        servers, start_service):
    with way_to(servers.postgres.api_url) as way:
        api = start_service(DATABASE_URL=way.url, WEB_CONCURRENCY="5")
        at_once(*[lambda: register(api, fresh_email())] * 10)

        way.seconds = 0.35     # six answers a registration
        answers = at_once(*[lambda: timed(lambda: register(api, fresh_email()))] * 60,
                          *[lambda: timed(lambda: send(api, "GET", "/healthz"))] * 5)
        way.seconds = 0

        statuses = [answer.status for answer in answers]
        assert set(statuses[:60]) == {202, 503} and statuses[60:] == [200] * 5
        assert all(answer.seconds < 5 for answer in answers)
        wait_until(lambda: register(api, fresh_email()).status == 202)


@pytest.mark.parametrize("server", ["rabbitmq", "postgres"])
def test_it_refuses_callers_who_never_pause_in_time_while_a_server_is_paused(
        servers, start_service, server):
    api = start_service(WEB_CONCURRENCY="5")
    at_once(*[lambda: register(api, fresh_email())] * 10)     # connections are open now

    def insist():
        while time.monotonic() < ends:
            answers.append(timed(lambda: register(api, fresh_email())))

    with paused(getattr(servers, server)):
        ends, answers = time.monotonic() + 6, []
        at_once(*[insist] * 60)

    assert all(refused_in_time(answer) for answer in answers)
    wait_until(lambda: register(api, fresh_email()).status == 202)


# -- The log names the error -----------------------------------------------------------


@pytest.mark.parametrize("answers", range(8))
@pytest.mark.parametrize("server, setting", [
    ("broker", "BROKER_URL"), ("database", "DATABASE_URL")])
def test_it_logs_why_a_connection_broke_off_instead_of_answering(
        settings, start_service, server, setting, answers):
    with way_to(settings[setting]) as way:
        api = start_service(**{setting: way.url}, WEB_CONCURRENCY="1")
        if answers:
            way.answers = 0
            register(api, fresh_email())     # now it needs a new connection
        way.answers = answers

        refused = timed(lambda: register(api, fresh_email()))

    assert refused_in_time(refused)
    assert_it_names_the_error(api, server)


def test_it_logs_why_a_transaction_ended_and_not_that_its_rollback_failed(
        servers, start_service):
    api = start_service(WEB_CONCURRENCY="1")
    email, _ = registered(api)

    with ThreadPoolExecutor() as threads, row_locked(servers.postgres, email):
        under_way = threads.submit(register, api, email, ANOTHER)
        wait_until(lambda: statements_waiting(servers.postgres))
        servers.postgres.psql("SELECT pg_terminate_backend(pid) FROM pg_locks "
                              "WHERE NOT granted")
        refused = under_way.result()

    assert refused.status == 503
    assert_it_names_the_error(api, "database")


def test_it_logs_that_a_transaction_got_no_answer_and_not_that_its_rollback_failed(
        servers, start_service):
    api = start_service(WEB_CONCURRENCY="1")
    email, _ = registered(api)

    with ThreadPoolExecutor() as threads, row_locked(servers.postgres, email):
        under_way = threads.submit(register, api, email, ANOTHER)
        wait_until(lambda: statements_waiting(servers.postgres))
        with paused(servers.postgres):
            refused = under_way.result()

    assert refused.status == 503
    assert_it_names_the_error(api, "database")


def assert_it_names_the_error(api, server):
    outage = events(api.log, event="outage")[-1]
    assert outage["server"] == server
    assert outage["error"] not in ("KeyError", "InterfaceError")
    assert outage["reason"] not in ("", "None")
