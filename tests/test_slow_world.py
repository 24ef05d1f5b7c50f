"""The truth in a slow world: servers that answer late or break off.

A 2xx means that it happened, and a 503 that nothing was kept. Every answer comes within
5 seconds, with 60 callers and 5 workers. Afterwards, all is well within 10 seconds.
"""

import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from servers.faults import (
    alarmed,
    down,
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
    mailed_to,
    refused_in_time,
    register,
    registered,
    send,
    timed,
    wait_until,
)
from steps.logs import events

ANOTHER = "another fine password"
AWAY = {"broker down": lambda servers: down(servers.rabbitmq),
        "broker paused": lambda servers: paused(servers.rabbitmq),
        "broker alarmed": lambda servers: alarmed(servers.rabbitmq),
        "database down": lambda servers: down(servers.postgres),
        "database paused": lambda servers: paused(servers.postgres),
        "limits locked": lambda servers: table_locked(servers.postgres, "limits")}


# -- A 2xx happened, and after a 503 nothing is kept -----------------------------------


def test_it_mails_no_live_code_for_a_registration_that_it_refused(
        servers, start_service):
    email = fresh_email()
    with way_to(servers.rabbitmq.url) as way:
        api = start_service(BROKER_URL=way.url, WEB_CONCURRENCY="1")
        register(api, fresh_email())     # the connection is open, and used again
        way.seconds = 2.5

        assert register(api, email).status == 503

        way.seconds = 0
        late_code = code_mailed_to(api, email)     # the broker had confirmed
        wait_until(lambda: activate(api, email, late_code).status == 403)


@pytest.mark.parametrize("outage", ["broker paused", "broker alarmed"])
def test_it_activates_without_a_confirmation_and_logs_which_one_is_missing(
        servers, database, start_service, outage):
    api = start_service(WEB_CONCURRENCY="1")
    wait_until(lambda: is_well(api))     # its connections are open now
    email, code = registered(api)

    with AWAY[outage](servers):
        answer = timed(lambda: activate(api, email, code))

    assert answer.status == 200 and answer.seconds < 5
    assert database("SELECT count(activated_at) FROM users WHERE email = %s",
                    [email]) == [(1,)]
    [request] = events(api.log, event="request", route="/users/activate")
    assert len(request["job"]) > 8
    assert events(api.log, event="outage", server="broker", job=request["job"])


def test_it_accepts_registrations_over_a_slow_broker_that_it_has_to_connect_to(
        servers, start_service):
    with way_to(servers.rabbitmq.url) as way:
        api = start_service(BROKER_URL=way.url, WEB_CONCURRENCY="1")
        way.answers = 0
        register(api, fresh_email())     # now it needs a new connection
        way.answers, way.seconds = None, 0.4     # two seconds until it is there

        accepted = timed(lambda: register(api, fresh_email()))

        assert accepted.status == 202 and accepted.seconds < 5


def test_it_mails_confirmations_over_a_slow_broker(servers, start_service):
    with way_to(servers.rabbitmq.url) as way:
        api = start_service(BROKER_URL=way.url, WEB_CONCURRENCY="1")
        pairs = [registered(api) for _ in range(3)]
        way.seconds = 0.4

        answers = [activate(api, *pair).status for pair in pairs]

        assert answers == [200] * 3
        for email, _ in pairs:
            assert mailed_to(api, email, 2)["subject"] == "Your account is active"


# -- In time, however many callers wait ------------------------------------------------


def crowd(api):
    """The answers of 60 registrations at once, and of 5 health checks."""
    return at_once(*[lambda: timed(lambda: register(api, fresh_email()))] * 60,
                   *[lambda: timed(lambda: send(api, "GET", "/healthz"))] * 5)


def insistent_crowd(api, seconds):
    """The answers of 60 callers who register again and again for so long."""
    def insist():
        while time.monotonic() < ends:
            answers.append(timed(lambda: register(api, fresh_email())))

    ends, answers = time.monotonic() + seconds, []
    at_once(*[insist] * 60)
    return answers


def is_well(api):
    """Whether each of ten callers is accepted."""
    answers = at_once(*[lambda: register(api, fresh_email())] * 10)
    return {answer.status for answer in answers} == {202}


@pytest.mark.parametrize("outage", AWAY.values(), ids=AWAY.keys())
def test_it_refuses_a_crowd_in_time_while_a_server_is_away(
        servers, start_service, outage):
    api = start_service(WEB_CONCURRENCY="5")
    wait_until(lambda: is_well(api))     # its connections are open now

    with outage(servers):
        answers = crowd(api)[:60]

    assert all(refused_in_time(answer) for answer in answers)
    wait_until(lambda: is_well(api), seconds=10)


@pytest.mark.parametrize("seconds", [0.25, 0.35, 0.9])
@pytest.mark.parametrize("setting", ["DATABASE_URL", "BROKER_URL"])
def test_it_answers_a_crowd_in_time_while_each_answer_of_a_server_is_late(
        settings, start_service, setting, seconds):
    with way_to(settings[setting]) as way:
        api = start_service(**{setting: way.url}, WEB_CONCURRENCY="5")
        wait_until(lambda: is_well(api))     # its connections are open now

        way.seconds = seconds
        answers = crowd(api)
        way.seconds = 0

        assert {answer.status for answer in answers} <= {200, 202, 503}
        assert all(answer.seconds < 5 for answer in answers)
        wait_until(lambda: is_well(api), seconds=10)


def test_it_accepts_some_of_a_crowd_while_the_database_is_a_little_late(
        settings, start_service):
    with way_to(settings["DATABASE_URL"]) as way:
        api = start_service(DATABASE_URL=way.url, WEB_CONCURRENCY="5")
        wait_until(lambda: is_well(api))     # its connections are open now

        way.seconds = 0.25     # seven answers a registration
        answers = crowd(api)
        way.seconds = 0

        assert {answer.status for answer in answers[:60]} == {202, 503}


@pytest.mark.parametrize("outage", ["broker paused", "database paused"])
def test_it_refuses_callers_who_never_pause_in_time_while_a_server_is_away(
        servers, start_service, outage):
    api = start_service(WEB_CONCURRENCY="5")
    wait_until(lambda: is_well(api))     # its connections are open now

    with AWAY[outage](servers):
        answers = insistent_crowd(api, seconds=6)

    assert all(refused_in_time(answer) for answer in answers)
    wait_until(lambda: is_well(api), seconds=10)


@pytest.mark.parametrize("seconds", [0.25, 0.9])
@pytest.mark.parametrize("setting", ["DATABASE_URL", "BROKER_URL"])
def test_it_answers_callers_who_never_pause_in_time_while_a_server_is_late(
        settings, start_service, setting, seconds):
    with way_to(settings[setting]) as way:
        api = start_service(**{setting: way.url}, WEB_CONCURRENCY="5")
        wait_until(lambda: is_well(api))     # its connections are open now

        way.seconds = seconds
        answers = insistent_crowd(api, seconds=6)
        way.seconds = 0

        assert {answer.status for answer in answers} <= {202, 503}
        assert all(answer.seconds < 5 for answer in answers)
        wait_until(lambda: is_well(api), seconds=10)


# -- The log names the error -----------------------------------------------------------


@pytest.mark.parametrize("answers", range(6))
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
