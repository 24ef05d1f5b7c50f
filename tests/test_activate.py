"""PATCH /users/activate: HTTP Basic and the code, and how long a code lives."""

from functools import partial

import argon2
import pytest
from servers.system import digest
from steps import (
    activate,
    activated,
    at_once,
    code_mailed_to,
    fresh_client,
    fresh_email,
    mailed_to,
    problem_in,
    register,
    registered,
    registered_anew,
    rows_of,
    shown,
    wrong,
)


@pytest.fixture(scope="module")
def lenient(running_api):
    """An API behind a proxy, with another key, a day for a code, and five tries."""
    with running_api(TRUSTED_PROXIES="1", CODE_LIFETIME="86400", CODE_ATTEMPTS="5",
                     SECRET_KEY="another key, also of 32 characters") as api:
        yield api


# -- 200 and 409 -----------------------------------------------------------------------


def test_it_activates_once_mails_a_confirmation_and_then_answers_409_to_any_code(
        service, database):
    email, code = registered(service)

    done, again, other = [activate(service, email, each)
                          for each in (code, code, wrong(code))]

    assert [done.status, problem_in(again), other.status] == [200, 409, 409]
    assert done.headers["Content-Type"] == "application/json"
    assert mailed_to(service, email, 2)["subject"] == "Your account is active"
    assert rows_of(database, email, "activated_at > registered_at") == [(True,)]


def test_it_answers_409_to_all_but_one_of_the_clients_who_send_the_pair_at_once(
        lenient):
    email, code = registered(lenient)

    answers = at_once(*[partial(activate, lenient, email, code, **fresh_client())
                        for _ in range(4)])

    assert sorted(answer.status for answer in answers) == [200, 409, 409, 409]


def test_it_verifies_a_common_password_and_a_hash_of_another_library_and_cost(
        service, database):
    email, password = fresh_email(), "password"     # it was not in the list in its time
    other_library = argon2.PasswordHasher(time_cost=2, memory_cost=19 * 1024)
    database("""INSERT INTO users (email, password_hash, code_digest, expires_at)
                VALUES (%s, %s, %s, now() + interval '60 s')""",
             [email, other_library.hash(password), digest(email, "0427")])

    assert activate(service, email, "0427", password).status == 200


# -- 403 -------------------------------------------------------------------------------


def test_it_gives_one_answer_to_all_that_fails(service, database):
    active, (waiting, old) = activated(service), registered(service)
    newest = registered_anew(service, waiting, old)

    unknown = activate(service, fresh_email(), newest)
    answers = {
        "wrong password": activate(service, waiting, newest, "another passphrase"),
        "wrong password, active": activate(service, active, old, "another passphrase"),
        "wrong code": activate(service, waiting, wrong(newest)),
        "superseded code": activate(service, waiting, old)}
    database("UPDATE users SET expires_at = now() WHERE email = %s", [waiting])
    answers["expired code"] = activate(service, waiting, newest)
    database("""UPDATE users SET expires_at = now() + interval '60 s', attempts = 3
                 WHERE email = %s""", [waiting])
    answers["used-up code"] = activate(service, waiting, newest)

    assert problem_in(unknown) == 403 and "errors" not in unknown.json
    assert "WWW-Authenticate" not in unknown.headers    # a browser would ask
    for what, answer in answers.items():
        assert shown(answer) == shown(unknown), what


@pytest.mark.parametrize("email, password", [
    ("ann", "long enough"), ("ann@exa\0mple.com", "long enough"),
    ("a" * 5000, "long enough"), ("ann@a.com", "short"), ("ann@a.com", "x" * 129),
    ("ann@a.com", "NUL \0 inside")],
    ids=lambda text: ascii(text)[:20])
def test_it_answers_403_to_a_pair_that_no_account_can_have(service, email, password):
    answer = activate(service, email, "0427", password)

    assert problem_in(answer) == 403
    assert shown(answer) == shown(activate(service, fresh_email(), "0427"))


def test_it_does_not_tell_who_registered_a_pair_whether_the_account_is_active(service):
    active, new = activated(service), fresh_email()
    for email in (active, new):
        register(service, email, "the stranger's password")
    code = wrong(code_mailed_to(service, new))

    answers = [activate(service, email, code, "the stranger's password")
               for email in (active, new)]

    assert answers[0].status == 403
    assert shown(answers[0]) == shown(answers[1])


def test_it_neither_takes_nor_counts_another_password_or_a_malformed_code(
        service, database):
    email = fresh_email()
    register(service, email, "some passphrase")
    code = code_mailed_to(service, email)

    others = {other: activate(service, email, code, other).status for other in (
        "Some passphrase", " some passphrase", "some passphras", "ſome passphrase")}
    both_wrong = activate(service, email, wrong(code), "another passphrase")
    malformed = {activate(service, email, each, "some passphrase").status
                 for each in (int(code), f"{code}\n", code[:3], None)}

    assert set(others.values()) == {403}, others
    assert (both_wrong.status, malformed) == (403, {422})
    assert rows_of(database, email, "attempts") == [(0,)]
    assert activate(service, email, code, "some passphrase").status == 200


def test_it_takes_no_code_that_was_made_for_another_address_or_with_another_key(
        service, lenient):
    email, code = registered(service)
    other, other_code = registered(service)
    while other_code == code:
        other, other_code = registered(service)

    refused = [activate(service, email, other_code), activate(service, other, code),
               activate(lenient, email, code)]

    assert [answer.status for answer in refused] == [403, 403, 403]
    assert activate(service, email, code).status == 200


# -- How long a code lives -------------------------------------------------------------


@pytest.mark.parametrize("wrong_ones, status", [(2, 200), (3, 403), (5, 403)])
def test_it_refuses_the_right_code_after_three_wrong_ones_even_if_sent_at_once(
        service, database, wrong_ones, status):
    email, code = registered(service)

    refused = at_once(*[partial(activate, service, email, wrong(code))] * wrong_ones)

    assert {answer.status for answer in refused} == {403}
    assert rows_of(database, email, "attempts") == [(min(wrong_ones, 3),)]
    assert activate(service, email, code).status == status


def test_it_lets_a_code_live_as_long_and_fail_as_often_as_its_settings_say(
        lenient, database):
    email = fresh_email()
    accepted = register(lenient, email)
    code = code_mailed_to(lenient, email)

    for _ in range(4):
        activate(lenient, email, wrong(code))

    assert accepted.json["expires_in"] == 86400
    assert rows_of(database, email, "expires_at - registered_at = interval '1 day'"
                   ) == [(True,)]
    assert activate(lenient, email, code).status == 200
