"""Limits on the requests of a client and of an address."""

import ipaddress
import secrets
from functools import partial

import pytest
from steps import (
    activate,
    activated,
    at_once,
    code_mailed_to,
    fresh_client,
    fresh_email,
    problem_in,
    register,
)
from steps.logs import events

HOUR = 3600


def test_it_limits_the_registrations_of_a_client(strict):
    here = fresh_client()

    answers = [register(strict, fresh_email(), **here) for _ in range(3)]
    elsewhere = register(strict, fresh_email(), **fresh_client())

    assert [answer.status for answer in [*answers, elsewhere]] == [202, 202, 429, 202]
    assert problem_in(answers[2]) == 429
    assert 500 < int(answers[2].headers["Retry-After"]) <= 600
    assert answers[2].headers["Cache-Control"] == "no-store"


def test_it_limits_the_activations_of_a_client_apart(strict):
    here = fresh_client()

    registrations = [register(strict, fresh_email(), **here).status for _ in range(3)]
    activations = [activate(strict, fresh_email(), "1234", **here) for _ in range(3)]

    assert registrations == [202, 202, 429]
    assert [answer.status for answer in activations] == [401, 401, 429]
    assert problem_in(activations[2]) == 429
    assert 500 < int(activations[2].headers["Retry-After"]) <= 600


def test_it_counts_nothing_against_an_address_that_a_refused_client_names(strict):
    email, greedy = fresh_email(), fresh_client()
    for _ in range(2):
        register(strict, fresh_email(), **greedy)

    refused = [register(strict, email, **greedy).status for _ in range(3)]

    assert refused == [429, 429, 429]
    assert register(strict, email, **fresh_client()).status == 202


def test_it_limits_the_registrations_of_an_address_in_an_hour(strict):
    email = fresh_email()

    answers = [register(strict, spelling, **fresh_client())
               for spelling in (email, email.upper(), email.title())]

    assert [answer.status for answer in answers] == [202, 202, 429]
    assert HOUR - 100 < int(answers[2].headers["Retry-After"]) <= HOUR


def test_it_limits_the_registrations_of_an_address_in_a_day(strict, database):
    email = fresh_email()
    statuses = [register(strict, email, **fresh_client()).status for _ in range(2)]
    database("""UPDATE limits SET expires_at = now()
                 WHERE subject = %s AND expires_at < now() + interval '1 h'""", [email])

    accepted, refused = [register(strict, email, **fresh_client()) for _ in range(2)]

    assert [*statuses, accepted.status, refused.status] == [202, 202, 202, 429]
    assert 24 * HOUR - 100 < int(refused.headers["Retry-After"]) <= 24 * HOUR


def test_it_limits_the_activations_of_an_address_the_right_one_too(strict):
    email = fresh_email()
    register(strict, email, **fresh_client())
    code = code_mailed_to(strict, email)

    guesses = [activate(strict, email, code, "wrong password", **fresh_client()).status
               for _ in range(2)]
    refused = activate(strict, email.upper(), code, **fresh_client())

    assert guesses == [401, 401]
    assert problem_in(refused) == 429
    assert HOUR - 100 < int(refused.headers["Retry-After"]) <= HOUR


def test_it_limits_known_and_unknown_addresses_alike(service, strict):
    active, unknown = activated(service), fresh_email()
    activate(service, unknown, "1234")                 # as often as the active one

    answers = [(activate(strict, active, "1234", "wrong password", **fresh_client()),
                activate(strict, unknown, "1234", "wrong password", **fresh_client()))
               for _ in range(2)]

    assert [known.status for known, _ in answers] == [401, 429]
    assert all(known.body == other.body for known, other in answers)


def test_it_changes_nothing_once_a_limit_is_reached(strict):
    email = fresh_email()
    for _ in range(2):
        register(strict, email, **fresh_client())
    newest = code_mailed_to(strict, email, 2)

    refused = register(strict, email, "the password of another", **fresh_client())

    assert refused.status == 429
    assert activate(strict, email, newest, **fresh_client()).status == 200


def test_it_counts_from_zero_when_the_window_is_over(strict, database):
    email, before = fresh_email(), fresh_client()
    first = [register(strict, email, **before).status for _ in range(3)]
    database("UPDATE limits SET expires_at = now() WHERE subject = %s", [email])

    again = [register(strict, email, **fresh_client()).status for _ in range(3)]

    assert first == again == [202, 202, 429]


def test_it_does_not_lengthen_a_window_by_counting(strict, database):
    email = fresh_email()
    ends = "SELECT name, expires_at FROM limits WHERE subject = %s ORDER BY name"
    register(strict, email, **fresh_client())
    before = database(ends, [email])

    for _ in range(3):
        register(strict, email, **fresh_client())

    assert database(ends, [email]) == before


def test_it_holds_its_limits_over_two_processes(strict, start_service):
    other = start_service(EMAIL_LIMIT_HOUR="2", ACTIVATE_LIMIT_HOUR="2")
    email = fresh_email()

    registrations = at_once(*[partial(register, api, email, **fresh_client())
                              for api in (strict, other) * 4])
    activations = at_once(*[partial(activate, api, email, "1234", "wrong one",
                                    **fresh_client())
                            for api in (strict, other) * 4])

    assert sorted(each.status for each in registrations) == [202] * 2 + [429] * 6
    assert sorted(each.status for each in activations) == [401] * 2 + [429] * 6


def test_it_counts_the_addresses_of_an_ipv6_network_together(strict):
    site = f"2001:db8:{secrets.randbits(16):x}"
    addresses = [f"{site}:7::1", f"{site}:7:ffff:ffff:ffff:ffff",
                 f"{site.upper()}:7::2", f"{site}:8::1"]

    statuses = [register(strict, fresh_email(), **{"X-Forwarded-For": address}).status
                for address in addresses]

    assert statuses == [202, 202, 429, 202]


def test_it_counts_an_ipv4_address_alone_mapped_or_not(strict):
    network = "10.{}.{}".format(*secrets.token_bytes(2))
    addresses = [f"{network}.1", f"::ffff:{network}.1", f"{network}.1", f"{network}.2",
                 f"::ffff:{network}.3"]

    statuses = [register(strict, fresh_email(), **{"X-Forwarded-For": address}).status
                for address in addresses]

    assert statuses == [202, 202, 429, 202, 202]


@pytest.mark.parametrize("claim", [
    "10.{}.{}.1", '"', '"10.{}.{}.1', '10.{}.{}.1, "a', '"a, b", "', "\\", ",", "%"])
def test_it_trusts_only_what_its_proxy_has_appended(strict, claim):
    real = fresh_client()["X-Forwarded-For"]
    chains = [f"{claim.format(*secrets.token_bytes(2))}, {real}" for _ in range(3)]

    statuses = [register(strict, fresh_email(), **{"X-Forwarded-For": chain}).status
                for chain in chains]

    assert statuses == [202, 202, 429]
    assert len(events(strict.log, event="request",
                      client=str(ipaddress.ip_address(real)))) == 3


def test_it_counts_clients_without_a_proper_address_together(strict):
    garbage = ["unknown", "_hidden", "1.2.3.4.5", "::g", "999.1.1.1", "x" * 4000, "é",
               "1.2.3.4/0", "%", "a b=c", "0x7f000001", ", ,", "[::1]:80"]

    answers = [register(strict, fresh_email(),
                        **{"X-Forwarded-For": each.encode("latin-1")})
               for each in garbage]

    assert {answer.status for answer in answers[2:]} == {429}


def test_it_ignores_x_forwarded_for_without_a_proxy(start_service):
    api = start_service(IP_LIMIT="1", TRUSTED_PROXIES="0")
    register(api, fresh_email())

    statuses = [register(api, fresh_email(), **fresh_client()).status for _ in range(2)]

    assert statuses == [429, 429]


@pytest.mark.parametrize("allowed", [0, 1, 7, 60, 1000])
def test_it_names_the_shortest_pause_in_which_repeating_keeps_within_the_limit(
        start_service, allowed):
    nowhere = "postgresql://127.0.0.1:1/nothing"
    api = start_service(DATABASE_URL=nowhere, IP_LIMIT=str(allowed))

    refused = register(api, fresh_email())

    pause = int(refused.headers["Retry-After"])
    assert problem_in(refused) == 503
    assert len(range(0, 600, pause)) <= max(allowed, 1)     # requests in ten minutes
    assert pause == 1 or len(range(0, 600, pause - 1)) > allowed
