"""Servers that are down, paused, alarmed, read-only, full or cut; killed processes.

Each fault is real. While it lasts, the API answers 503 within 5 seconds and keeps
nothing; when it is over, everything works again by itself, with the same processes.
test_slow_world.py is about answers that come late.
"""

import contextlib
import os
import re
import signal
import threading
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from functools import partial
from types import SimpleNamespace

import pytest
from servers.faults import (
    alarmed,
    answering,
    crowded,
    cut_connections,
    cut_sessions,
    down,
    full,
    nothing,
    paused,
    read_only,
    row_locked,
    saying,
    statements_waiting,
    way_to,
)
from servers.process import tree
from servers.system import running_program
from steps import (
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
    workers_of,
)
from steps.jobs import MAIL, delete_queues, fill, put, take_all, take_job, waiting_in

ANOTHER = "another fine password"


@pytest.fixture(scope="module")
def system_of_module(servers, settings, brokers):
    changed = settings | {"BROKER_URL": brokers["faults"], "CODE_LIFETIME": "600"}
    with running_program(servers.folder / "faults", changed) as (api, consumer):
        yield SimpleNamespace(
            api=api, consumer=consumer, broker=brokers["faults"], url=api.url,
            maildev_url=servers.mail_server.web_url)


@pytest.fixture
def system(system_of_module):
    """An API and a consumer with a broker of their own; codes live ten minutes."""
    wait_until_at_rest(system_of_module)
    return system_of_module


def wait_until_at_rest(system):
    """Until nobody in a crowd is refused, as some are for a second after a stall."""
    def healthy():
        return send(system, "GET", "/healthz").status == 200

    wait_until(lambda: all(at_once(*[healthy] * 16)), seconds=10)


def processes(system):
    return tree(system.api.process.pid) + tree(system.consumer.process.pid)


def rows_of(servers, email):
    return int(servers.postgres.psql(
        f"SELECT count(*) FROM users WHERE email = '{email}'"))


def is_active(servers, email):
    return servers.postgres.psql(
        f"SELECT activated_at IS NOT NULL FROM users WHERE email = '{email}'") == "t"


def confirmations_to(system, email):
    return [mail for mail in mails_to(system, email)
            if mail["subject"] == "Your account is active"]


def named_in(refused):
    """The servers that the detail of a 503 names."""
    return re.findall("broker|database", refused.json["detail"])


def heals(system, email, code):
    """Whether the right pair activates its account in time, and the mail is sent."""
    wait_until_at_rest(system)
    before = len(confirmations_to(system, email))
    return activate(system, email, code).status == 200 and wait_until(
        lambda: len(confirmations_to(system, email)) > before)


# -- Outages of the database and the broker --------------------------------------------


OF_BROKER = {
    "broker down": lambda servers: down(servers.rabbitmq),
    "broker paused": lambda servers: paused(servers.rabbitmq),
    "broker alarmed": lambda servers: alarmed(servers.rabbitmq)}
OF_DATABASE = {
    "database down": lambda servers: down(servers.postgres),
    "database paused": lambda servers: paused(servers.postgres),
    "database read-only": lambda servers: read_only(servers.postgres),
    "database crowded": lambda servers: crowded(servers.postgres)}
OUTAGES = OF_BROKER | OF_DATABASE


@pytest.mark.parametrize("outage", OUTAGES.values(), ids=OUTAGES.keys())
def test_it_refuses_registrations_in_time_keeps_nothing_and_heals(
        servers, system, outage):
    email, code = registered(system)
    new, before = fresh_email(), processes(system)

    with outage(servers):
        answers = at_once(
            lambda: timed(lambda: register(system, new)),
            lambda: timed(lambda: register(system, email, ANOTHER)))

    assert all(refused_in_time(answer) for answer in answers)
    assert heals(system, email, code)    # so ANOTHER has replaced nothing
    assert rows_of(servers, new) == 0
    assert processes(system) == before


@pytest.mark.parametrize("outage", OF_DATABASE.values(), ids=OF_DATABASE.keys())
def test_it_refuses_activations_in_time_keeps_nothing_and_heals(
        servers, system, outage):
    email, code = registered(system)

    with outage(servers):
        refused = timed(lambda: activate(system, email, code))

    assert refused_in_time(refused)
    assert not is_active(servers, email)
    wait_until_at_rest(system)
    registered(system)     # its mail comes after a confirmation would have come
    assert not confirmations_to(system, email)
    assert heals(system, email, code)


@pytest.mark.parametrize("outage", OF_BROKER.values(), ids=OF_BROKER.keys())
@pytest.mark.parametrize("order", ["in turn", "at once"])
def test_it_activates_in_time_without_a_broker(
        servers, system_of_module, start_service, outage, order):
    api = start_service(BROKER_URL=system_of_module.broker, CODE_LIFETIME="600")
    wait_until_at_rest(api)     # after the test before this one
    calls = [partial(timed, partial(activate, api, *registered(api)))
             for _ in range(6)]

    with outage(servers):
        answers = (at_once(*calls) if order == "at once"
                   else [call() for call in calls])

    assert [answer.status for answer in answers] == [200] * 6
    assert all(answer.seconds < 5 for answer in answers)


def test_it_opens_the_connection_anew_for_a_confirmation_when_the_broker_is_back(
        servers, system_of_module, start_service):
    api = start_service(BROKER_URL=system_of_module.broker, WEB_CONCURRENCY="1",
                        CODE_LIFETIME="600")
    wait_until_at_rest(api)
    (first, code), (second, another_code) = registered(api), registered(api)

    with down(servers.rabbitmq):
        assert activate(api, first, code).status == 200

    assert activate(api, second, another_code).status == 200
    assert mailed_to(api, second, 2)["subject"] == "Your account is active"


@contextlib.contextmanager
def out_of_space(servers, broker):
    with full(servers.rabbitmq, "spare"):
        fill(broker)
        yield
    take_all(broker, MAIL)


OF_PUBLISHING = {
    "broker down": lambda servers, broker: down(servers.rabbitmq),
    "broker paused": lambda servers, broker: paused(servers.rabbitmq),
    "broker alarmed": lambda servers, broker: alarmed(servers.rabbitmq),
    "queue full": out_of_space}


@pytest.mark.parametrize("outage", OF_PUBLISHING.values(), ids=OF_PUBLISHING.keys())
def test_it_counts_nothing_against_an_address_that_it_refuses(
        servers, broker, database, start_service, outage):
    api = start_service(BROKER_URL=broker, WEB_CONCURRENCY="1", EMAIL_LIMIT_HOUR="1")
    wait_until_at_rest(api)     # its connections are open now
    email = fresh_email()

    with outage(servers, broker):
        refused = [register(api, email).status for _ in range(3)]

    assert refused == [503, 503, 503]
    wait_until(lambda: register(api, email).status == 202)
    counts = database("SELECT count FROM limits WHERE subject = %s", [email])
    assert counts == [(1,), (1,)]     # of this hour, and of this day


@pytest.mark.parametrize("server, outage", [
    ("broker", "broker paused"), ("database", "database paused"),
    ("database", "database down")])
def test_it_names_in_healthz_the_server_that_does_not_answer(
        servers, start_service, server, outage):
    api = start_service(WEB_CONCURRENCY="1")

    with OUTAGES[outage](servers):
        sick = timed(lambda: send(api, "GET", "/healthz"))

    assert refused_in_time(sick)
    assert named_in(sick) == [server]
    wait_until(lambda: send(api, "GET", "/healthz").status == 200)


def test_its_callers_do_not_notice_that_idle_connections_were_cut(servers, system):
    cut_connections(servers.rabbitmq, "faults")

    answers = [register(system, fresh_email()).status for _ in range(10)]

    assert answers == [202] * 10


def test_its_callers_do_not_notice_that_idle_sessions_were_cut(servers, system):
    cut_sessions(servers.postgres)

    answers = [register(system, fresh_email()).status for _ in range(10)]

    assert answers == [202] * 10


def test_it_answers_503_while_its_queue_is_full(servers, queue):
    with full(servers.rabbitmq, "queue"):
        wait_until(lambda: register(queue, fresh_email()).status == 503)
        email, jobs = fresh_email(), waiting_in(queue.broker)
        refused = timed(lambda: register(queue, email))

        assert refused_in_time(refused)
        assert rows_of(servers, email) == 0
        assert waiting_in(queue.broker) == jobs

    take_all(queue.broker, MAIL)
    wait_until(lambda: register(queue, email).status == 202)
    assert take_job(queue.broker)["email"] == email


def test_it_loses_no_mail_when_its_queue_was_deleted(start_service, broker):
    api = start_service(BROKER_URL=broker, WEB_CONCURRENCY="1")
    email = fresh_email()
    register(api, fresh_email())
    delete_queues(broker)

    refused = register(api, email)
    accepted = register(api, email)

    assert [refused.status, accepted.status] == [503, 202]
    assert take_job(broker)["email"] == email


def test_it_waits_for_no_lock_longer_than_a_caller_would(servers, system):
    email, code = registered(system)

    with row_locked(servers.postgres, email):
        answers = at_once(lambda: timed(lambda: register(system, email, ANOTHER)),
                          lambda: timed(lambda: activate(system, email, code)))

        # The others' turn comes while the lock is still there.
        wait_until(lambda: register(system, fresh_email()).status == 202)

    assert all(refused_in_time(answer) for answer in answers)
    assert heals(system, email, code)


def test_it_leaves_no_statement_waiting_that_it_gave_up(servers, system):
    email, _ = registered(system)

    with row_locked(servers.postgres, email):
        assert register(system, email, ANOTHER).status == 503

        wait_until(lambda: statements_waiting(servers.postgres) == 0, seconds=5)


# -- COMMIT fails after the publish ----------------------------------------------------


@pytest.fixture
def at_commit(servers):
    """Has the database do something at the COMMIT of a change of one address."""
    with contextlib.ExitStack() as cleanup:
        def prepare(email, action):
            name = f"at_commit_{email.partition('@')[0]}"
            cleanup.callback(servers.postgres.psql, f"DROP FUNCTION {name} CASCADE")
            servers.postgres.psql(f"""
                CREATE FUNCTION {name}() RETURNS trigger LANGUAGE plpgsql AS
                       $$ BEGIN {action}; RETURN NULL; END $$;
                CREATE CONSTRAINT TRIGGER {name} AFTER INSERT OR UPDATE ON users
                       DEFERRABLE INITIALLY DEFERRED FOR EACH ROW
                  WHEN (NEW.email = '{email}') EXECUTE FUNCTION {name}()""")

        prepare.undo = cleanup.close
        yield prepare


@pytest.mark.parametrize("action", [
    "RAISE 'no'", "PERFORM pg_terminate_backend(pg_backend_pid())"],
    ids=["refused", "connection lost"])
def test_it_mails_a_code_of_no_use_when_commit_fails(system, at_commit, action):
    email = fresh_email()
    at_commit(email, action)

    refused = timed(lambda: register(system, email))

    assert refused_in_time(refused)
    dead_code = code_mailed_to(system, email)
    assert activate(system, email, dead_code).status == 403
    at_commit.undo()
    wait_until(lambda: register(system, email).status == 202, seconds=10)
    assert activate(system, email, code_mailed_to(system, email, 2)).status == 200


def test_its_code_works_though_the_answer_to_commit_was_lost(servers, start_service):
    email = fresh_email()
    with way_to(servers.postgres.api_url) as way:
        api = start_service(DATABASE_URL=way.url)
        way.is_held = answering(b"INSERT INTO users", b"COMMIT")

        refused = timed(lambda: register(api, email))
        way.is_held = nothing

        assert refused_in_time(refused)
        assert named_in(refused) == ["database"]
        code = code_mailed_to(api, email)
        wait_until(lambda: activate(api, email, code).status == 200, seconds=10)


def test_it_can_be_asked_again_when_the_answer_to_commit_was_lost(
        servers, start_service):
    email = fresh_email()
    with way_to(servers.postgres.api_url) as way:
        api = start_service(DATABASE_URL=way.url, WEB_CONCURRENCY="1")
        way.is_held = answering(b"INSERT INTO users", b"COMMIT")
        assert register(api, email).status == 503
        way.is_held = nothing

        wait_until(lambda: register(api, email, ANOTHER).status == 202, seconds=10)

        code = code_mailed_to(api, email, 2)
        assert activate(api, email, code, ANOTHER).status == 200


def test_it_waits_for_commit_as_long_as_for_all_before_it_once_the_job_is_confirmed(
        servers, start_service, at_commit):
    email = fresh_email()
    with way_to(servers.rabbitmq.url) as way:
        api = start_service(BROKER_URL=way.url, WEB_CONCURRENCY="1")
        register(api, fresh_email())     # its connections are open now
        at_commit(email, "PERFORM pg_sleep(1.5)")
        way.seconds = 1.2

        accepted = timed(lambda: register(api, email))
        way.seconds = 0
        at_commit.undo()

        assert accepted.status == 202 and accepted.seconds < 5
        code = code_mailed_to(api, email)
        wait_until(lambda: activate(api, email, code).status == 200, seconds=10)


def test_it_answers_503_if_the_broker_fails_and_then_the_database_at_the_rollback(
        servers, start_service):
    email = fresh_email()
    with way_to(servers.rabbitmq.url) as way, ThreadPoolExecutor() as threads:
        api = start_service(BROKER_URL=way.url, WEB_CONCURRENCY="1")
        register(api, fresh_email())     # its connections are open now
        way.is_held = saying(b'"template"')

        under_way = threads.submit(register, api, email)
        assert way.held.wait(20)
        cut_sessions(servers.postgres)
        refused = under_way.result()
        way.released.set()

        assert refused.status == 503
        assert named_in(refused) in (["broker"], ["database"])   # both are right
        wait_until(lambda: register(api, email).status == 202, seconds=10)


def test_it_counts_no_activation_whose_commit_failed(servers, system, at_commit):
    email, code = registered(system)
    at_commit(email, "RAISE 'no'")

    refused = activate(system, email, code)

    assert refused.status == 503
    assert not is_active(servers, email)
    at_commit.undo()
    wait_until(lambda: activate(system, email, code).status == 200, seconds=10)


# -- Outages of the mail server ------------------------------------------------------


@pytest.mark.parametrize("outage", [down, paused])
def test_it_mails_once_the_mail_server_is_back(servers, system, outage):
    email, before = fresh_email(), processes(system)

    with outage(servers.mail_server):
        accepted = timed(lambda: register(system, email))
        wait_until(lambda: waiting_in(system.broker) == 0)

    assert accepted.status == 202 and accepted.seconds < 5
    assert activate(system, email, code_mailed_to(system, email)).status == 200
    assert processes(system) == before


# -- Killed servers and processes ------------------------------------------------------


def test_it_keeps_waiting_jobs_and_registrations_through_power_cuts(servers, system):
    with paused(system.consumer):
        email = fresh_email()
        accepted = register(system, email)
        for server in servers.rabbitmq, servers.postgres:
            server.kill()
            server.start()

    assert accepted.status == 202
    assert heals(system, email, code_mailed_to(system, email))


def test_it_loses_no_job_when_a_consumer_is_killed(broker, start_consumer, smtp, job):
    first = start_consumer(BROKER_URL=broker, SMTP_PORT=str(smtp.port))
    addresses = [fresh_email() for _ in range(5)]
    smtp.replies["CONTENT", addresses[0]] = [threading.Event()]
    for address in addresses:
        put(broker, job | {"email": address})
    wait_until(lambda: smtp.held)

    first.kill()
    start_consumer(BROKER_URL=broker, SMTP_PORT=str(smtp.port))

    wait_until(lambda: all(smtp.mails_to(address) for address in addresses))
    assert len(smtp.mails) == 5


def test_it_goes_on_when_its_workers_are_killed(start_service):
    api = start_service()
    with ThreadPoolExecutor(16) as threads:
        requests = [threads.submit(register, api, fresh_email()) for _ in range(16)]
        wait(requests, return_when=FIRST_COMPLETED)
        for worker in workers_of(api):
            os.kill(worker, signal.SIGKILL)

    def is_well():
        answers = at_once(*[lambda: register(api, fresh_email())] * 10)
        return {answer.status for answer in answers} == {202}

    wait_until(is_well, seconds=10)
    assert len(workers_of(api)) == 2
