"""Servers that are down, paused, alarmed, read-only, full or silent; killed processes.

Each fault is real. While it lasts, the API answers 503 within 5 seconds and keeps
nothing; when it is over, everything works again by itself, with the same processes.
test_slow_world.py is about crowds.
"""

import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
from servers.faults import (
    alarmed,
    answering,
    crowded,
    cut_sessions,
    down,
    fault,
    full,
    killed,
    nothing,
    paused,
    read_only,
    row_locked,
    saying,
    statements_waiting,
)
from servers.process import tree
from servers.program import Gunicorn
from steps import (
    accepted,
    activate,
    at_once,
    code_mailed_to,
    fresh_email,
    mailed_to,
    mails_to,
    refused_in_time,
    register,
    registered,
    send,
    timed,
    wait_until,
    wait_until_at_rest,
    workers_of,
)
from steps.jobs import delete_queues, take_job, waiting_in
from steps.logs import events

ANOTHER = "another fine password"
INSERT, UPDATE, JOB = b"INSERT INTO users", b"UPDATE users", b'"template"'
CONFIRMED = "Your account is active"
WORKERS = "1"     # of the API with relays


@pytest.fixture(scope="module")
def system_of_module(servers, settings, service):
    with Gunicorn(servers.folder / "faults", settings | {
            "WEB_CONCURRENCY": "4", "CODE_LIFETIME": "600"}) as api:
        api.consumer, api.maildev_url = service.consumer, service.maildev_url
        api.since = time.monotonic()
        yield api


@pytest.fixture
def system(system_of_module):
    """An API with four workers and its .consumer; codes live ten minutes."""
    wait_until_at_rest(system_of_module)
    return system_of_module


def timed_at_once(*calls):
    return at_once(*[partial(timed, call) for call in calls])


def processes(system):
    """Their ids; gunicorn may still fork the last workers after its first answer."""
    return {*tree(system.process.pid), *tree(system.consumer.process.pid)}


def kept(servers, email):
    """How many rows the database has of an address."""
    return int(servers.postgres.psql(f"""
        SELECT (SELECT count(*) FROM users WHERE email = '{email}')
             + (SELECT count(*) FROM limits WHERE subject = '{email}')"""))


def heals(api, email, code):
    """Whether the right pair activates its account, and one mail confirms that."""
    def confirmations():
        return [mail["subject"] for mail in mails_to(api, email)].count(CONFIRMED)

    wait_until_at_rest(api)
    return (activate(api, email, code).status == 200
            and wait_until(confirmations) == 1)


# -- Outages of the database and the broker --------------------------------------------


OUTAGES = {
    "broker paused": lambda servers: paused(servers.rabbitmq),
    "broker alarmed": lambda servers: alarmed(servers.rabbitmq),
    "database down": lambda servers: down(servers.postgres),
    "database paused": lambda servers: paused(servers.postgres),
    "database read-only": lambda servers: read_only(servers.postgres),
    "database crowded": lambda servers: crowded(servers.postgres)}


@pytest.mark.parametrize("outage", OUTAGES)
def test_it_refuses_in_time_keeps_nothing_and_heals(servers, system, outage):
    (email, code), new, before = registered(system), fresh_email(), processes(system)
    server = outage.partition(" ")[0]
    calls = [partial(register, system, new), partial(register, system, email, ANOTHER)]
    if server == "database":
        calls.append(partial(activate, system, email, code))
    if "paused" in outage:     # the other outages can leave the health check at 200
        calls.append(partial(send, system, "GET", "/healthz"))

    with OUTAGES[outage](servers):
        answers = timed_at_once(*calls)

    assert all(refused_in_time(answer) for answer in answers)
    assert all(server in answer.json["detail"] for answer in answers)
    assert heals(system, email, code)     # so ANOTHER has replaced nothing
    assert kept(servers, new) == 0
    assert before <= processes(system)


@pytest.mark.parametrize("outage", [paused, alarmed])
def test_it_activates_in_time_without_a_broker_and_logs_which_mails_are_missing(
        servers, relayed, outage):
    pairs = at_once(*[partial(registered, relayed)] * 8)
    calls = [partial(activate, relayed, *pair) for pair in pairs]

    with outage(servers.rabbitmq):
        answers = timed_at_once(*calls)

    assert [answer.status for answer in answers] == [200] * 8
    assert all(answer.seconds < 5 for answer in answers)
    requests = events(relayed.log, event="request", route="/users/activate")[-8:]
    outages = events(relayed.log, event="outage", server="broker")[-8:]
    jobs = sorted(event["job"] for event in requests)
    assert sorted(event["job"] for event in outages) == jobs
    assert len(jobs[-1]) > 8     # after a time-out, some are not even published: "-"
    assert {call().status for call in calls} == {409}


def test_it_accepts_nothing_while_its_queue_is_full(servers, system):
    with paused(system.consumer), full(servers.rabbitmq):
        wait_until(lambda: register(system, fresh_email()).status == 503)
        email, jobs = fresh_email(), waiting_in(servers.rabbitmq.url)
        refused = timed(lambda: register(system, email))

        assert refused_in_time(refused)
        assert kept(servers, email) == 0
        assert waiting_in(servers.rabbitmq.url) == jobs

    wait_until(lambda: register(system, email).status == 202)
    assert activate(system, email, code_mailed_to(system, email)).status == 200


def test_it_loses_no_mail_when_its_queue_was_deleted(start_service, broker):
    api = start_service(BROKER_URL=broker, WEB_CONCURRENCY="1")
    email = fresh_email()
    register(api, fresh_email())
    delete_queues(broker)

    refused = register(api, email)
    accepted(api, email)

    assert refused.status == 503
    assert take_job(broker)["email"] == email


def test_it_waits_for_no_lock_longer_than_a_caller_would_and_leaves_none_waiting(
        servers, system):
    email, code = registered(system)

    with row_locked(servers.postgres, email):
        answers = timed_at_once(partial(register, system, email, ANOTHER),
                                partial(activate, system, email, code))

        # The others' turn comes while the lock is still there.
        wait_until(lambda: register(system, fresh_email()).status == 202)
        wait_until(lambda: statements_waiting(servers.postgres) == 0, seconds=5)

    assert all(refused_in_time(answer) for answer in answers)
    assert heals(system, email, code)


# -- An answer comes late, or never ----------------------------------------------------


def at_commit(servers, action, *emails):
    """Has the database do something at the COMMIT of a change of these addresses."""
    return fault(partial(servers.postgres.psql, f"""
        CREATE FUNCTION at_commit() RETURNS trigger LANGUAGE plpgsql AS
               $$ BEGIN {action}; RETURN NULL; END $$;
        CREATE CONSTRAINT TRIGGER at_commit AFTER INSERT OR UPDATE ON users
               DEFERRABLE INITIALLY DEFERRED FOR EACH ROW
          WHEN (NEW.email = ANY ('{{{','.join(emails)}}}'))
               EXECUTE FUNCTION at_commit()"""),
        partial(servers.postgres.psql, "DROP FUNCTION at_commit CASCADE"))


@pytest.mark.parametrize("action", [
    "RAISE 'no'", "PERFORM pg_terminate_backend(pg_backend_pid())"],
    ids=["refused", "connection lost"])
def test_it_keeps_nothing_and_mails_a_code_of_no_use_when_commit_fails(
        servers, system, action):
    (email, code), new = registered(system), fresh_email()

    with at_commit(servers, action, email, new):
        answers = timed_at_once(partial(activate, system, email, code),
                                partial(register, system, new))

    assert all(refused_in_time(answer) for answer in answers)
    dead_code = code_mailed_to(system, new)
    assert activate(system, new, dead_code).status == 403
    assert heals(system, email, code)
    assert register(system, new).status == 202
    assert activate(system, new, code_mailed_to(system, new, 2)).status == 200


def test_its_code_works_and_it_can_be_asked_again_when_the_answer_to_commit_was_lost(
        relayed):
    way, emails = relayed.ways["database"], [fresh_email(), fresh_email()]

    for email in emails:
        way.is_held = answering(INSERT, b"COMMIT")
        refused = timed(lambda email=email: register(relayed, email))
        way.is_held = nothing
        assert refused_in_time(refused)
        assert "database" in refused.json["detail"]
        wait_until_at_rest(relayed)

    first, second = emails
    assert activate(relayed, first, code_mailed_to(relayed, first)).status == 200
    assert register(relayed, second, ANOTHER).status == 202
    code = code_mailed_to(relayed, second, 2)
    assert activate(relayed, second, code, ANOTHER).status == 200


def test_it_waits_for_commit_as_long_as_for_all_before_it_once_the_job_is_confirmed(
        servers, relayed):
    way, emails = relayed.ways["broker"], [fresh_email() for _ in range(3)]

    with at_commit(servers, "PERFORM pg_sleep(1.2)", *emails):
        for email in emails:     # a busy machine may slow the first ones down too much
            accepted(relayed, fresh_email())     # opens the connection and the channel
            way.seconds = 1
            answer = timed(lambda email=email: register(relayed, email))
            way.seconds = 0
            if answer.status == 202:
                break

    assert answer.status == 202 and answer.seconds < 5
    assert heals(relayed, email, code_mailed_to(relayed, email))


def meanwhile(action, call, way, holding, texts):
    """Acts when the way holds something of a request; what becomes of the request. One
    that is refused before that, since this machine is busy, is made again."""
    def hold():
        way.is_held = holding(*texts)
        answers.append(threads.submit(call))
        wait_until(lambda: way.held.is_set() or answers[-1].done())
        return way.held.is_set()

    answers = []
    with ThreadPoolExecutor() as threads:
        wait_until(hold)
        action()
        way.is_held = nothing
        way.released.set()
    return answers[-1]


def test_it_mails_a_code_of_no_use_if_the_broker_fails_and_then_the_database(
        servers, relayed):
    email = fresh_email()

    refused = meanwhile(     # so even ROLLBACK fails
        lambda: cut_sessions(servers.postgres),
        lambda: timed(lambda: register(relayed, email)),
        relayed.ways["broker"], answering, [JOB]).result()

    assert refused_in_time(refused)
    late_code = code_mailed_to(relayed, email)
    assert activate(relayed, email, late_code).status == 403
    wait_until(lambda: register(relayed, email).status == 202)


def test_it_registers_and_mails_confirmations_over_a_slow_broker(relayed):
    pairs, way = [registered(relayed), registered(relayed)], relayed.ways["broker"]
    way.answers = 0
    register(relayed, fresh_email())     # now it needs a new connection
    time.sleep(1)   # if that took long, the worker refuses for a second
    way.answers, way.seconds = None, 0.4     # two seconds until it is there

    answer = accepted(relayed, fresh_email())

    assert answer.seconds < 5
    for email, code in pairs:
        assert activate(relayed, email, code).status == 200
        assert mailed_to(relayed, email, 2)["subject"] == CONFIRMED


@pytest.mark.parametrize("server, text", [("broker", JOB), ("database", INSERT)])
def test_it_logs_why_it_got_no_answer_and_not_what_failed_as_a_consequence(
        relayed, server, text):
    # The open connection breaks off, then a new one after each step; then, silence.
    breaks = [{"answers": answers} for answers in (0, 0, 1, 2, 3, 4, 5)]
    for trouble in *breaks, {"answers": None, "is_held": saying(text)}:
        vars(relayed.ways[server]).update(trouble)

        refused = timed(lambda: register(relayed, fresh_email()))

        assert refused_in_time(refused)
        outage = events(relayed.log, event="outage")[-1]
        assert outage["server"] == server
        assert outage["error"] not in ("KeyError", "InterfaceError")
        assert outage["reason"] not in ("", "None")


# -- A worker is killed in the middle of a request, at each step of it -----------------


def kill_worker_during(call, api, server, holding, texts):
    """Kills the worker in a request, which the way holds; the caller gets no answer."""
    answer = meanwhile(lambda: os.kill(workers_of(api)[0], signal.SIGKILL), call,
                       api.ways[server], holding, texts)
    assert isinstance(answer.exception(), OSError)


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
        servers, relayed, step):
    *what, is_kept, mails = OF_REGISTERING[step]
    email = fresh_email()

    kill_worker_during(lambda: register(relayed, email), relayed, *what)

    assert kept(servers, email) == (3 if is_kept else 0)     # the account, two limits
    if mails:
        code = code_mailed_to(relayed, email)
        assert activate(relayed, email, code).status == (200 if is_kept else 403)
    if not is_kept:
        wait_until(lambda: register(relayed, email).status == 202)
        code = code_mailed_to(relayed, email, mails + 1)
        assert activate(relayed, email, code).status == 200


# The step: the server, what is held, whether the account is active, number of mails.
OF_ACTIVATING = {
    "before COMMIT": ("database", saying, [UPDATE, b"COMMIT"], False, 1),
    "after COMMIT": ("database", answering, [UPDATE, b"COMMIT"], True, 1),
    "after the job is published": ("broker", answering, [JOB], True, 2)}


@pytest.mark.parametrize("step", OF_ACTIVATING)
def test_it_activates_an_account_or_spends_no_attempt_when_it_is_killed(
        database, relayed, step):
    *what, active, mails = OF_ACTIVATING[step]
    email, code = registered(relayed)

    kill_worker_during(lambda: activate(relayed, email, code), relayed, *what)

    state = database("SELECT activated_at IS NOT NULL, attempts FROM users "
                     "WHERE email = %s", [email])
    assert state == [(True, 1) if active else (False, 0)]
    assert mailed_to(relayed, email, mails)
    assert activate(relayed, email, code).status == (409 if active else 200)


# -- Killed servers and processes; the mail server is away -----------------------------


def test_it_loses_nothing_by_power_cuts_and_activates_without_a_broker(
        servers, system):
    (first, code), email, new = registered(system), fresh_email(), fresh_email()
    # RabbitMQ notes a new queue on its disk only after a second.
    wait_until(lambda: time.monotonic() > system.since + 3)

    with paused(system.consumer):
        accepted(system, email)
        with killed(servers.rabbitmq):
            refused = timed(lambda: register(system, new))
            activated = timed(lambda: activate(system, first, code))
        with killed(servers.postgres):
            pass

    assert refused_in_time(refused)
    assert activated.status == 200 and activated.seconds < 5
    assert heals(system, email, code_mailed_to(system, email))
    assert kept(servers, new) == 0
    assert activate(system, first, code).status == 409


@pytest.mark.parametrize("outage", [down, paused])
def test_it_mails_once_the_mail_server_is_back(servers, system, outage):
    email, before = fresh_email(), processes(system)
    wait_until(lambda: waiting_in(servers.rabbitmq.url) == 0)     # jobs of other tests

    with outage(servers.mail_server):
        answer = accepted(system, email)
        wait_until(lambda: waiting_in(servers.rabbitmq.url) == 0)

    assert answer.seconds < 5
    assert activate(system, email, code_mailed_to(system, email)).status == 200
    assert before <= processes(system)
