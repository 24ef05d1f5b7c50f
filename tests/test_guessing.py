"""Guessing codes, and squatting on somebody else's address."""

from functools import partial

import pytest
from servers.program import Gunicorn
from steps import (
    activate,
    at_once,
    code_mailed_to,
    fresh_client,
    fresh_email,
    register,
    registered,
    registered_anew,
    wrong,
)


@pytest.fixture(scope="module")
def default(servers, settings, service, tmp_path_factory):
    """An API with the default limits: an empty setting is one that is not set."""
    with Gunicorn(tmp_path_factory.mktemp("default"), settings | {
            "CODE_LIFETIME": "", "CODE_ATTEMPTS": "", "EMAIL_LIMIT_HOUR": "",
            "EMAIL_LIMIT_DAY": "", "ACTIVATE_LIMIT_HOUR": "", "IP_LIMIT": "",
            "FAILURE_LIMIT_HOUR": "", "TRUSTED_PROXIES": "1"}) as api:
        api.maildev_url = service.maildev_url
        yield api


def test_it_compares_at_most_15_codes_of_an_address_in_an_hour(default, guesses):
    email = fresh_email()
    calls = [partial(activate, default, email, "1234", **fresh_client())
             for _ in range(7)]

    statuses = [answer.status for _ in range(7) for answer in at_once(
        partial(register, default, email, **fresh_client()), *calls)]

    assert statuses.count(202) == 5
    assert 3 <= guesses() <= 15


def test_it_compares_all_15_where_each_registration_is_used_up(default, guesses):
    email = fresh_email()

    for count in range(1, 7):
        register(default, email, **fresh_client())
        code = code_mailed_to(default, email, min(count, 5))
        at_once(*[partial(activate, default, email, wrong(code), **fresh_client())] * 4)

    assert guesses() == 15


@pytest.mark.parametrize("window, allowed", [("1 h", 5), ("1 day", 20)])
def test_it_takes_5_registrations_an_hour_and_20_a_day(
        default, database, window, allowed):
    email = fresh_email()
    register(default, email, **fresh_client())
    database("""UPDATE limits SET count = %s WHERE subject = %s AND expires_at
                BETWEEN now() + interval %s * 0.9 AND now() + interval %s""",
             [allowed - 1, email, window, window])

    statuses = [register(default, email, **fresh_client()).status for _ in range(2)]

    assert statuses == [202, 429]


def test_it_takes_100_activations_an_hour_of_an_address(default, database):
    email = fresh_email()
    activate(default, email, "1234", **fresh_client())
    database("UPDATE limits SET count = 99 WHERE subject = %s", [email])

    statuses = [activate(default, email, "1234", **fresh_client()).status
                for _ in range(2)]

    assert statuses == [403, 429]


def test_it_takes_60_requests_of_a_client_in_10_minutes(default, database):
    here = fresh_client()
    register(default, fresh_email(), **here)
    database("UPDATE limits SET count = 59 WHERE subject LIKE %s",
             [here["X-Forwarded-For"].removesuffix("0") + "%"])

    statuses = [register(default, fresh_email(), **here).status for _ in range(2)]

    assert statuses == [202, 429]


def test_it_lets_a_client_fail_20_times_in_an_hour(default):
    here = fresh_client()

    answers = [activate(default, fresh_email(), "1234", **here) for _ in range(21)]
    elsewhere = activate(default, fresh_email(), "1234", **fresh_client())

    assert [answer.status for answer in answers] == [403] * 20 + [429]
    assert 3500 < int(answers[20].headers["Retry-After"]) <= 3600
    assert elsewhere.status == 403


def test_it_keeps_a_squatter_who_came_first_out(service):
    email, old = registered(service)                       # the squatter, with PASSWORD
    code = registered_anew(service, email, old, "the owner's password")

    before = [activate(service, email, each).status for each in (old, code)]
    owner = activate(service, email, code, "the owner's password")
    after = [activate(service, email, each).status for each in (old, code)]

    assert before == after == [403, 403]
    assert owner.status == 200


def test_it_keeps_a_squatter_who_came_second_out(service):
    email, old = registered(service)                       # the owner, with PASSWORD
    squatted = registered_anew(service, email, old, "the squatter's password")

    owner = [activate(service, email, each).status for each in (old, squatted)]
    code = registered_anew(service, email, squatted)
    squatter = [activate(service, email, each, "the squatter's password").status
                for each in (old, wrong(code), code)]
    at_last = activate(service, email, code)

    assert owner == [403, 403]
    assert squatter == [403, 403, 403]
    assert at_last.status == 200
    assert activate(service, email, code, "the squatter's password").status == 403
