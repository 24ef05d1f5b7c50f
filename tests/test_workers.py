"""The API's workers, and the connections that each of them has."""

import os
from functools import partial
from pathlib import Path

import pytest
from servers.faults import crowded, cut_connections, cut_sessions
from steps import (
    activate,
    at_once,
    fresh_email,
    problem_in,
    register,
    registered,
    send,
    wait_until,
    workers_of,
)


def test_it_has_two_workers_for_each_core_and_one_more(default_api):
    expected = min(2 * os.cpu_count() + 1, 40)

    with default_api as api:
        wait_until(lambda: len(workers_of(api)) >= expected)
        at_once(*[partial(register, api, fresh_email())] * 50)     # no more come

        assert len(workers_of(api)) == expected


def test_a_worker_that_gets_no_session_says_so_before_its_first_request(
        servers, default_api):
    with crowded(servers.postgres):
        default_api.launch()     # and nobody asks it for anything
        try:
            wait_until(lambda: "too many connections for role"
                       in default_api.log.read_text())
        finally:
            default_api.stop()


@pytest.fixture
def connections_of(servers):
    """A worker's open connections to the servers: {(our port, the server's port)}."""
    ours = servers.postgres.port, servers.rabbitmq.port

    def list_them(worker):
        files = Path(f"/proc/{worker}/fd")
        sockets = {os.readlink(file) for file in files.iterdir() if file.is_symlink()}
        rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()]
        open_here = [row for row in rows if f"socket:[{row[9]}]" in sockets]
        ports = [[int(end.partition(":")[2], 16) for end in row[1:3]]
                 for row in open_here]
        return {(port, server) for port, server in ports if server in ours}

    return list_them


def test_it_keeps_one_connection_to_each_server_in_a_worker(
        servers, start_service, connections_of):
    api = start_service(WEB_CONCURRENCY="3")
    both = sorted([servers.postgres.port, servers.rabbitmq.port])

    def ask():
        at_once(*[partial(register, api, fresh_email()),
                  partial(activate, api, fresh_email(), "0427"),
                  partial(send, api, "GET", "/healthz")] * 10)
        return workers_of(api)

    wait_until(lambda: all(connections_of(worker) for worker in ask()))
    for _ in range(5):
        workers = ask()

    servers_of = [sorted(server for _, server in connections_of(worker))
                  for worker in workers]
    assert servers_of == [both] * 3


def test_it_goes_on_over_the_same_connections_after_a_refusal(
        start_service, connections_of):
    api = start_service(WEB_CONCURRENCY="1", EMAIL_LIMIT_HOUR="1")
    [worker], (email, code) = workers_of(api), registered(api)
    before = connections_of(worker)

    refused = [register(api, email).status, register(api, "nobody").status,
               activate(api, fresh_email(), code).status]

    assert refused == [429, 422, 403]
    assert connections_of(worker) == before


def test_it_goes_on_over_the_same_connections_after_an_error_that_it_did_not_expect(
        start_service, connections_of, database):
    api = start_service(WEB_CONCURRENCY="1")
    [worker], (email, code) = workers_of(api), registered(api)
    before = connections_of(worker)
    database("""UPDATE users SET activated_at = '10000-01-01'
                 WHERE email = %s""", [email])     # a year that Python does not know

    failed = activate(api, email, code)
    following = register(api, fresh_email())

    assert (problem_in(failed), following.status) == (500, 202)
    assert workers_of(api) == [worker]
    assert connections_of(worker) == before


@pytest.mark.parametrize("name", ["postgres", "rabbitmq"])
def test_it_opens_only_the_connection_anew_that_was_cut(
        servers, start_service, connections_of, name):
    api = start_service(WEB_CONCURRENCY="1")
    [worker], _ = workers_of(api), registered(api)
    before = connections_of(worker)

    if name == "postgres":
        cut_sessions(servers.postgres)
    else:
        cut_connections(servers.rabbitmq)
    registered(api)

    new = connections_of(worker) - before
    assert [port for _, port in new] == [getattr(servers, name).port]
    assert len(connections_of(worker)) == 2
