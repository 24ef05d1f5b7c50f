"""Limits on the requests of a client and for an address, and so on guessing codes."""

import ipaddress
import secrets
from functools import partial

import pytest
from servers.faults import table_locked
from steps import (
    PASSWORD,
    accepted,
    activate,
    at_once,
    code_mailed_to,
    fresh_client,
    fresh_email,
    problem_in,
    register,
    registered,
    rows_of,
    send,
    wrong,
)
from steps.jobs import take_job
from steps.logs import events

HOUR, DAY = 3600, 24 * 3600


def network_of(client):
    """What the program calls a client of fresh_client()."""
    return str(ipaddress.ip_network(f"{client['X-Forwarded-For']}/64"))


def statuses_of(answers):
    return [answer.status for answer in answers]


@pytest.fixture(scope="module")
def strict(running_api):
    """An API behind a proxy, with limits so small that they are soon reached."""
    with running_api(TRUSTED_PROXIES="1", IP_LIMIT="2", EMAIL_LIMIT_HOUR="2",
                     EMAIL_LIMIT_DAY="3", ACTIVATE_LIMIT_HOUR="2") as api:
        yield api


@pytest.fixture(scope="module")
def rationed(running_api):
    """An API behind a proxy that lets a client fail to activate twice in an hour."""
    with running_api(TRUSTED_PROXIES="1", FAILURE_LIMIT_HOUR="2",
                     CODE_ATTEMPTS="1000") as api:
        yield api


@pytest.fixture(scope="module")
def default(running_api):
    """An API with the default limits: an empty setting is one that is not set."""
    with running_api(CODE_ATTEMPTS="", EMAIL_LIMIT_HOUR="", EMAIL_LIMIT_DAY="",
                     ACTIVATE_LIMIT_HOUR="", IP_LIMIT="", FAILURE_LIMIT_HOUR="",
                     TRUSTED_PROXIES="1") as api:
        yield api


# -- Requests of a client and for an address -------------------------------------------


def test_it_limits_the_registrations_and_the_activations_of_a_client_apart(strict):
    here = fresh_client()

    registrations = [register(strict, fresh_email(), **here) for _ in range(3)]
    activations = [activate(strict, fresh_email(), "1234", **here) for _ in range(3)]

    assert statuses_of(registrations) == [202, 202, 429]
    assert statuses_of(activations) == [403, 403, 429]
    for refused in registrations[2], activations[2]:
        assert problem_in(refused) == 429
        assert 500 < int(refused.headers["Retry-After"]) <= 600
        assert refused.headers["Cache-Control"] == "no-store"


def test_it_counts_nothing_against_an_address_that_a_refused_client_names(strict):
    email, greedy = fresh_email(), fresh_client()
    for _ in range(2):
        register(strict, fresh_email(), **greedy)

    refused = [register(strict, email, **greedy) for _ in range(3)]

    assert statuses_of(refused) == [429, 429, 429]
    assert register(strict, email, **fresh_client()).status == 202


def test_it_limits_the_registrations_of_an_address_in_an_hour_and_in_a_day(
        strict, database):
    email = fresh_email()
    accepted = [register(strict, spelling, **fresh_client())
                for spelling in (email, email.upper())]
    hourly = register(strict, email.title(), **fresh_client())
    database("""UPDATE limits SET expires_at = now()
                 WHERE subject = %s AND expires_at < now() + interval '1 h'""", [email])
    accepted.append(register(strict, email, **fresh_client()))
    newest = code_mailed_to(strict, email, 3)

    daily = register(strict, email, "another password", **fresh_client())

    assert statuses_of(accepted) == [202, 202, 202]
    assert statuses_of([hourly, daily]) == [429, 429]
    assert HOUR - 100 < int(hourly.headers["Retry-After"]) <= HOUR
    assert DAY - 100 < int(daily.headers["Retry-After"]) <= DAY
    # What it refuses changes nothing.
    assert activate(strict, email, newest, **fresh_client()).status == 200


def test_it_limits_the_activations_of_an_address_known_or_not_and_the_right_one_too(
        service, strict):
    email, code = registered(service)

    def answers(address):
        return [activate(strict, address, code, password, **fresh_client())
                for password in ("a wrong one", "a wrong one", PASSWORD)]

    known, unknown = answers(email), answers(fresh_email())
    assert statuses_of(known) == [403, 403, 429]
    assert [answer.body for answer in known] == [answer.body for answer in unknown]
    assert problem_in(known[2]) == 429
    assert HOUR - 100 < int(known[2].headers["Retry-After"]) <= HOUR


def test_it_counts_from_zero_when_the_window_is_over_which_the_first_request_began(
        strict, database):
    email = fresh_email()
    ends = "SELECT name, expires_at FROM limits WHERE subject = %s ORDER BY name"
    first = [register(strict, email, **fresh_client())]
    before = database(ends, [email])

    first += [register(strict, email, **fresh_client()) for _ in range(2)]
    after = database(ends, [email])
    database("UPDATE limits SET expires_at = now() WHERE subject = %s", [email])
    again = [register(strict, email, **fresh_client()) for _ in range(3)]

    assert before == after
    assert statuses_of(first) == statuses_of(again) == [202, 202, 429]


def test_it_counts_for_all_apis_and_workers_together(service, strict):
    email = fresh_email()
    elsewhere = [register(service, email), activate(service, email, "1234", "wrong")]

    registrations = at_once(*[
        partial(register, strict, email, **fresh_client()) for _ in range(6)])
    activations = at_once(*[
        partial(activate, strict, email, "1234", "wrong", **fresh_client())
        for _ in range(6)])

    assert statuses_of(elsewhere) == [202, 403]
    assert sorted(statuses_of(registrations)) == [202] + [429] * 5
    assert sorted(statuses_of(activations)) == [403] + [429] * 5


# -- Failed activations of a client ----------------------------------------------------


def test_it_limits_the_failed_activations_of_a_client_whatever_was_wrong(rationed):
    site = f"2001:db8:{secrets.randbits(16):x}"
    addresses = [f"{site}:7::1", f"{site}:7:1:2:3:4", f"{site}:7::2", f"{site}:8::1"]
    credentials = [("no address", "a password"), ("ann@example.com", "short"),
                   (fresh_email(), "a password"), (fresh_email(), "a password")]

    answers = [activate(rationed, email, "1234", password, **{"X-Forwarded-For": each})
               for each, (email, password) in zip(addresses, credentials)]

    assert statuses_of(answers) == [403, 403, 429, 403]
    assert problem_in(answers[2]) == 429
    assert HOUR - 100 < int(answers[2].headers["Retry-After"]) <= HOUR


def test_it_lets_a_503_a_success_and_a_409_cost_nothing_of_the_failures(
        rationed, database):
    here, (email, code) = fresh_client(), registered(rationed)
    database("ALTER TABLE users ADD CONSTRAINT no_attempt "
             "CHECK (email <> %s OR attempts = 0) NOT VALID", [email])
    broken = activate(rationed, email, code, **here)
    database("ALTER TABLE users DROP CONSTRAINT no_attempt")

    fine = [activate(rationed, email, code, **here) for _ in range(4)]
    failed = [activate(rationed, fresh_email(), "1234", **here) for _ in range(3)]

    assert problem_in(broken) == 503
    assert statuses_of(fine) == [200, 409, 409, 409]
    assert statuses_of(failed) == [403, 403, 429]


def test_it_does_not_look_at_an_account_once_a_client_has_failed_too_often(
        servers, rationed):
    here, (email, code) = fresh_client(), registered(rationed)
    failed = [activate(rationed, fresh_email(), "1234", **here) for _ in range(2)]

    with table_locked(servers.postgres, "users"):
        refused = [activate(rationed, email, each, **here)
                   for each in (wrong(code), code)]

    assert statuses_of(failed) == [403, 403]
    assert statuses_of(refused) == [429, 429]
    assert activate(rationed, email, code, **fresh_client()).status == 200


def test_it_compares_no_more_codes_at_once_than_a_client_may_fail(rationed, database):
    here, (email, code) = fresh_client(), registered(rationed)

    answers = at_once(*[partial(activate, rationed, email, wrong(code), **here)] * 8)

    assert sorted(statuses_of(answers)) == [403] * 2 + [429] * 6
    assert rows_of(database, email, "attempts") == [(2,)]


# -- The default limits ----------------------------------------------------------------


@pytest.mark.parametrize("limit, allowed, seconds", [
    ("register client", 60, 600), ("activate client", 60, 600),
    ("register address hour", 5, HOUR), ("register address day", 20, DAY),
    ("activate address hour", 100, HOUR), ("activate failures", 20, HOUR)])
def test_it_allows_so_many_requests_in_a_window(
        default, database, limit, allowed, seconds):
    email, here = fresh_email(), fresh_client()
    ask, fine = {
        "register": (partial(register, default, email, **here), 202),
        "activate": (partial(activate, default, email, "1234", **here), 403),
    }[limit.split()[0]]
    first = ask()
    database("UPDATE limits SET count = %s WHERE name = %s AND subject IN (%s, %s)",
             [allowed - 1, limit, email, network_of(here)])

    answers = [ask(), ask()]

    assert statuses_of([first, *answers]) == [fine, fine, 429]
    assert seconds - 100 < int(answers[1].headers["Retry-After"]) <= seconds


def test_it_compares_3_codes_of_each_of_5_registrations_in_an_hour(default, database):
    email, compared = fresh_email(), []

    for count in range(1, 7):
        register(default, email, **fresh_client())
        code = code_mailed_to(default, email, min(count, 5))
        at_once(*[partial(activate, default, email, wrong(code), **fresh_client())] * 4)
        compared += rows_of(database, email, "attempts")

    assert compared == [(3,)] * 6     # the sixth was refused, so these are the fifth's


# -- Who a client is -------------------------------------------------------------------


def client_in_log(api, forwarded):
    """Who the API takes the sender of a request for."""
    send(api, "GET", "/docs", headers={"X-Forwarded-For": forwarded})
    return events(api.log, event="request")[-1]["client"]


@pytest.mark.parametrize("forwarded, client", [
    ("192.0.2.7", "192.0.2.7"), (" 192.0.2.7:80 ", "192.0.2.7"),
    ("::ffff:192.0.2.7", "192.0.2.7"), ("[::ffff:192.0.2.7]:80", "192.0.2.7"),
    ("2001:DB8:1:2:ffff::3", "2001:db8:1:2::/64"),
    (" [2001:db8:1:2::3]:443 ", "2001:db8:1:2::/64"),
    # What came before the proxy added its part is anybody's claim.
    ("10.0.0.1, 192.0.2.7", "192.0.2.7"), ('"10.0.0.1, 192.0.2.7', "192.0.2.7"),
    *[(garbage, "unknown") for garbage in [
        "", ", ,", "x" * 4000, "\xe9", "999.1.1.1", "1.2.3.4/0", "::g", "[::1",
        "::1]:80", "[1.2.3.4", "[]:80", "1:2:3:80"]]],
    ids=lambda text: ascii(text)[:30])
def test_it_knows_a_client_by_what_its_proxy_has_appended(strict, forwarded, client):
    assert client_in_log(strict, forwarded) == client


@pytest.mark.parametrize("header", [
    "Forwarded", "X-Real-IP", "X-Client-IP", "X_Forwarded_For", "X-Forwarded-For "])
def test_it_lets_no_other_header_choose_a_client(strict, header):
    here, other = fresh_client(), fresh_client()

    answer = send(strict, "GET", "/docs",
                  headers=here | {header: other["X-Forwarded-For"]})

    assert answer.status == 400 or events(strict.log, client=network_of(here))
    assert not events(strict.log, client=network_of(other))


def test_it_counts_two_proxies_from_the_right_and_who_came_past_one_as_unknown(
        start_service):
    api = start_service(TRUSTED_PROXIES="2")

    clients = [client_in_log(api, chain) for chain in (
        "192.0.2.7, 10.0.0.1", "6.6.6.6, 8, 192.0.2.7, 10.0.0.1", "192.0.2.7")]

    assert clients == ["192.0.2.7", "192.0.2.7", "unknown"]


def test_it_ignores_x_forwarded_for_without_a_proxy(service):
    assert client_in_log(service, "192.0.2.7") == "127.0.0.1"


# -- Whose clock counts ----------------------------------------------------------------


def test_it_goes_by_the_clock_of_the_database_alone(queue, database):
    accepted(queue, email := fresh_email())

    job = take_job(queue.broker)
    assert rows_of(database, email, """
        extract(epoch FROM registered_at)::float, extract(epoch FROM expires_at)::float
        """) == [(job["issued_at"], job["expires_at"])]
