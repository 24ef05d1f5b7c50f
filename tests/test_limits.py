"""Limits on the requests of a client and of an address."""

import ipaddress
import secrets
from functools import partial

import pytest
from servers.faults import row_locked, table_locked
from steps import (
    PASSWORD,
    activate,
    activated,
    at_once,
    code_mailed_to,
    fresh_client,
    fresh_email,
    problem_in,
    register,
    registered,
    wait_until,
    wrong,
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
    assert [answer.status for answer in activations] == [403, 403, 429]
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

    assert guesses == [403, 403]
    assert problem_in(refused) == 429
    assert HOUR - 100 < int(refused.headers["Retry-After"]) <= HOUR


def test_it_limits_known_and_unknown_addresses_alike(service, strict):
    active, unknown = activated(service), fresh_email()
    activate(service, unknown, "1234")                 # as often as the active one

    answers = [(activate(strict, active, "1234", "wrong password", **fresh_client()),
                activate(strict, unknown, "1234", "wrong password", **fresh_client()))
               for _ in range(2)]

    assert [known.status for known, _ in answers] == [403, 429]
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
    assert sorted(each.status for each in activations) == [403] * 2 + [429] * 6


# -- Failed activations of a client ----------------------------------------------------


def fail(api, here):
    """The status of an activation that no account has."""
    return activate(api, fresh_email(), "1234", **here).status


def answered(call):
    """Repeats a call until it is no 503, as clients are told to."""
    return wait_until(lambda: answer if (answer := call()).status != 503 else None)


def test_it_limits_the_failed_activations_of_a_client(rationed):
    here = fresh_client()

    statuses = [fail(rationed, here) for _ in range(2)]
    refused = activate(rationed, fresh_email(), "1234", **here)

    assert statuses == [403, 403]
    assert problem_in(refused) == 429
    assert HOUR - 100 < int(refused.headers["Retry-After"]) <= HOUR
    assert fail(rationed, fresh_client()) == 403


@pytest.mark.parametrize("email, password", [
    ("no address", PASSWORD), (fresh_email(), "short")])
def test_it_counts_failures_with_credentials_that_no_account_can_have(
        rationed, email, password):
    here = fresh_client()

    statuses = [activate(rationed, email, "1234", password, **here).status
                for _ in range(3)]

    assert statuses == [403, 403, 429]


def test_it_counts_the_failures_of_an_ipv6_network_together(rationed):
    site = f"2001:db8:{secrets.randbits(16):x}"
    addresses = [f"{site}:7::1", f"{site}:7:1:2:3:4", f"{site}:7::2", f"{site}:8::1"]

    statuses = [fail(rationed, {"X-Forwarded-For": each}) for each in addresses]

    assert statuses == [403, 403, 429, 403]


def test_it_lets_a_success_and_a_409_cost_nothing_of_the_failures(rationed):
    here, (email, code) = fresh_client(), registered(rationed)

    fine = [activate(rationed, email, code, **here).status for _ in range(4)]
    failed = [fail(rationed, here) for _ in range(3)]

    assert fine == [200, 409, 409, 409]
    assert failed == [403, 403, 429]


def test_it_lets_a_503_cost_nothing_of_the_failures(servers, start_service):
    api = start_service(TRUSTED_PROXIES="1", FAILURE_LIMIT_HOUR="2")
    here, (email, code) = fresh_client(), registered(api)
    with row_locked(servers.postgres, email):
        broken = activate(api, email, wrong(code), **here)

    failed = [answered(partial(activate, api, email, wrong(code), **here)).status
              for _ in range(3)]

    assert problem_in(broken) == 503
    assert failed == [403, 403, 429]


def test_it_refuses_the_right_pair_too_once_a_client_has_failed_too_often(
        rationed, guesses):
    here, (email, code) = fresh_client(), registered(rationed)
    failed = [fail(rationed, here) for _ in range(2)]

    refused = [activate(rationed, email, each, **here) for each in (wrong(code), code)]

    assert failed == [403, 403]
    assert [answer.status for answer in refused] == [429, 429]
    assert guesses() == 0
    assert activate(rationed, email, code, **fresh_client()).status == 200


def test_it_does_not_look_at_an_account_once_a_client_has_failed_too_often(
        servers, rationed):
    here, (email, code) = fresh_client(), registered(rationed)
    failed = [fail(rationed, here) for _ in range(2)]

    with table_locked(servers.postgres, "users"):
        refused = activate(rationed, email, code, **here)

    assert failed == [403, 403]
    assert refused.status == 429


def test_it_compares_no_more_codes_at_once_than_a_client_may_fail(
        rationed, start_service, guesses):
    other = start_service(TRUSTED_PROXIES="1", FAILURE_LIMIT_HOUR="2",
                          CODE_ATTEMPTS="1000")
    here, (email, code) = fresh_client(), registered(rationed)

    answers = at_once(*[partial(activate, api, email, wrong(code), **here)
                        for api in (rationed, other) * 6])

    assert sorted(each.status for each in answers) == [403] * 2 + [429] * 10
    assert guesses() == 2


def test_it_lets_a_client_fail_again_after_an_hour(rationed, database):
    here = fresh_client()
    first = [fail(rationed, here) for _ in range(3)]
    network = here["X-Forwarded-For"].removesuffix("0") + "%"
    database("UPDATE limits SET expires_at = now() WHERE subject LIKE %s", [network])

    again = [fail(rationed, here) for _ in range(3)]

    assert first == again == [403, 403, 429]


# -- Who a client is -------------------------------------------------------------------


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
                      client=str(ipaddress.ip_network(f"{real}/64")))) == 3


@pytest.mark.parametrize("spelling", [
    "{}", "{}:51001", "{}:443", " {}:80 ", "::ffff:{}", "[::ffff:{}]", "[::ffff:{}]:80"])
def test_it_knows_an_ipv4_address_with_and_without_a_port(strict, spelling):
    one, other = [f"10.{a}.{b}.{c}" for a, b, c in (secrets.token_bytes(3),
                                                    secrets.token_bytes(3))]
    hops = [one, one, spelling.format(one), spelling.format(other)]

    statuses = [register(strict, fresh_email(), **{"X-Forwarded-For": hop}).status
                for hop in hops]

    assert statuses == [202, 202, 429, 202]


@pytest.mark.parametrize("spelling", [
    "{}::1", "[{}::1]", "[{}::1]:443", "[{}:ffff:2:3:4]:51001", " [{}::1]:80 "])
def test_it_knows_an_ipv6_network_with_and_without_a_port(strict, spelling):
    one, other = [fresh_client()["X-Forwarded-For"].removesuffix("::0")
                  for _ in range(2)]
    hops = [f"{one}::", f"{one}::", spelling.format(one), spelling.format(other)]

    statuses = [register(strict, fresh_email(), **{"X-Forwarded-For": hop}).status
                for hop in hops]

    assert statuses == [202, 202, 429, 202]


@pytest.mark.parametrize("header", [
    "Forwarded", "X-Real-IP", "X-Client-IP", "True-Client-IP", "X_Forwarded_For",
    "X-Forwarded-For ", "X-Forwarded-Host", "Via", "From"])
def test_it_lets_no_other_header_choose_a_client(strict, header):
    here = fresh_client()

    answers = [register(strict, fresh_email(),
                        **here, **{header: fresh_client()["X-Forwarded-For"]})
               for _ in range(3)]

    assert [answer.status for answer in answers] in ([202, 202, 429], [400] * 3)


def test_it_counts_hops_from_the_right(start_service):
    api = start_service(TRUSTED_PROXIES="2", IP_LIMIT="2")
    real, proxy = [fresh_client()["X-Forwarded-For"] for _ in range(2)]
    chains = [f"{claim}{real}, {proxy}" for claim in ("", "6.6.6.6, ", "7.7.7.7, 8, ")]

    statuses = [register(api, fresh_email(), **{"X-Forwarded-For": chain}).status
                for chain in chains]

    assert statuses == [202, 202, 429]
    assert len(events(api.log, event="request",
                      client=str(ipaddress.ip_network(f"{real}/64")))) == 3


def test_it_counts_clients_that_came_past_a_proxy_together(start_service):
    api = start_service(TRUSTED_PROXIES="2", IP_LIMIT="2")

    statuses = [register(api, fresh_email(), **headers).status
                for headers in (fresh_client(), {}, fresh_client(), fresh_client())]

    assert statuses[2:] == [429, 429]
    assert len(events(api.log, client="unknown", route="/users/register")) == 4


def test_it_counts_clients_without_a_proper_address_together(strict):
    garbage = ["unknown", "_hidden", "1.2.3.4.5", "::g", "999.1.1.1", "x" * 4000, "é",
               "1.2.3.4/0", "%", "a b=c", "0x7f000001", ", ,", "[::1", "::1]:80",
               "1.2.3:80", "[1.2.3.4", "[]:80", ":80", "example.com:80", "1:2:3:80"]

    answers = [register(strict, fresh_email(),
                        **{"X-Forwarded-For": each.encode("latin-1")})
               for each in garbage]

    assert {answer.status for answer in answers[2:]} == {429}


def test_it_ignores_x_forwarded_for_without_a_proxy(start_service):
    api = start_service(IP_LIMIT="1", TRUSTED_PROXIES="0")
    register(api, fresh_email())

    statuses = [register(api, fresh_email(), **fresh_client()).status for _ in range(2)]

    assert statuses == [429, 429]


def test_it_asks_a_client_to_wait_while_a_limit_cannot_be_counted(start_service):
    api = start_service(DATABASE_URL="postgresql://127.0.0.1:1/nothing")

    answers = [register(api, fresh_email()), activate(api, fresh_email(), "1234")]

    assert [problem_in(answer) for answer in answers] == [503, 503]
    assert {answer.headers["Retry-After"] for answer in answers} == {"10"}
