"""What became of every request: all answers, against the tables and the mails.

    kept         2xx, and there is what it promised
    refused      4xx or 503, and nothing changed
    outlived     202, but outages outlasted the code before it could be mailed
    unconfirmed  200 and active, but the confirmation is missing: the API's log says so
    unknown      no answer, or COMMIT happened and its answer was lost: see repeat()
    lost         2xx, and something is missing; or the right code was refused
    left behind  4xx or 503, and yet there is a change
    unexpected   another status

Which request wrote a row is told by now() of its transaction, which lies between the
request's beginning and its end: callers use an address of their own, one at a time.
"""

import statistics
from collections import Counter, defaultdict
from contextlib import suppress

import argon2
import psycopg2
import steps
from psycopg2.extras import NamedTupleCursor
from servers.system import digest
from steps.logs import events

from trials.load import LIFETIME, PATIENCE, Fault


def account(load, faults, system):
    """Prints the table and returns a line for each failure; system: whole_system()."""
    users = select_users(system.postgres.url)
    requests = sorted(load.requests, key=lambda request: request.began)
    by_email, verdicts = defaultdict(list), defaultdict(list)
    for request in requests:
        by_email[request.email].append(request)
    for request in requests:
        verdict = judge(request, users.get(request.email), by_email[request.email],
                        load, faults)
        verdicts[verdict].append(request)
    print_table(requests, verdicts, load, faults)

    unknown, outlived = verdicts["unknown"], verdicts["outlived"]
    expired = jobs_that_were(system.consumer, "expired")
    dropped = jobs_that_were(system.consumer, "refused", "unreadable")
    missing, unnamed = missing_confirmations(load, system.api)
    unsafe = [request for request in unknown
              if not repeat(load, request, users.get(request.email))]
    print(f"unknown: {sum(request.status is None for request in unknown)} without an "
          f"answer, {sum(request.status == 503 for request in unknown)} with a 503 "
          f"though COMMIT happened; all repeated now, in vain: {len(unsafe)}")
    print(f"outages outlasted {len(outlived)} codes; {len(expired)} jobs expired")
    print(f"{len(verdicts['unconfirmed'])} activations without a confirmation; the "
          f"API's log names {missing - len(unnamed)}")

    slow = [request for request in requests
            if request.status and request.seconds > PATIENCE]
    failures = [f"{kind}: {request}" for kind, found in (
        *verdicts.items(), ("slow", slow), ("repeated in vain", unsafe))
        if kind not in ("kept", "refused", "outlived", "unconfirmed", "unknown")
        for request in found]
    failures += [f"a confirmation is missing, and the log does not say so: {job}"
                 for job in unnamed]
    failures += [f"dropped by a consumer: {job}" for job in dropped]
    if len(verdicts["unconfirmed"]) > missing:
        failures.append("the API's log does not have all activations")
    if len(outlived) > len(expired):
        failures.append("more codes are outlived than jobs expired")
    return failures


def jobs_that_were(consumer, *outcomes):
    """Ids of the jobs with one of these outcomes."""
    return {event["job"] for event in events(consumer.log, event="job")
            if event["outcome"] in outcomes}


def missing_confirmations(load, api):
    """(how many were not mailed, the ids of those jobs that the API's log hides).

    An activation without a connection to RabbitMQ has no job: its line says job=-.
    """
    activated = [event["job"] for event in events(
                 api.log, event="request", route="/users/activate", status="200")]
    named = {event["job"] for event in events(api.log, event="outage")}
    mailed = {mail.id.strip("<>").partition("@")[0]
              for mails in load.mails.values() for mail in mails}
    missing = [job for job in activated if job not in mailed]
    return len(missing), {job for job in missing if job != "-"} - named


def select_users(url):
    with psycopg2.connect(url, cursor_factory=NamedTupleCursor) as session:
        cursor = session.cursor()
        cursor.execute("""
            SELECT email, password_hash, code_digest,
                   extract(epoch FROM registered_at)::float AS registered_at,
                   extract(epoch FROM activated_at)::float AS activated_at
              FROM users
            """)
        return {user.email: user for user in cursor}


# -- One request -----------------------------------------------------------------------

def judge(request, user, siblings, load, faults):
    """The verdict, a word of the list at the top.

    user: the address's row or None; siblings: all requests of the address, in order.
    """
    if request.status is None:
        return "unknown"
    if request.status == 202:
        return judge_accepted(request, user, siblings, load, faults)
    changed = user and request.caused(
        user.registered_at if request.action == "register" else user.activated_at)
    if request.status == 200:
        confirmed = mailed(load, request, "Your account is active")
        return "lost" if not changed else "kept" if confirmed else "unconfirmed"
    if changed:
        # Only a lost answer to COMMIT excuses it, and its mail was published before.
        in_commit = request.status == 503 and any(
            fault.of_database and fault.began <= request.ended
            and request.began <= fault.healed for fault in faults)
        published = request.action == "activate" or load.mail_of(request)
        return "unknown" if in_commit and published else "left behind"
    if request.status == 403:
        return judge_refused(request, siblings, load)
    return "refused" if request.status in (409, 422, 503) else "unexpected"


def judge_accepted(request, user, siblings, load, faults):
    """A 202: a row, its own or a later one's, and a mail in time."""
    if user and user.activated_at and user.activated_at < request.began:
        noticed = mailed(load, request, "You already have an account")
        return "kept" if noticed else "lost"
    later = [other for other in siblings if other.action == "register"
             and other.began >= request.began]
    if not user or not any(other.caused(user.registered_at) for other in later):
        return "lost"
    mail = load.mail_of(request)
    if request.caused(user.registered_at) and not user.activated_at:
        if not verifies(user.password_hash, request.password):
            return "lost"
        if mail and bytes(user.code_digest) != digest(request.email, mail.code):
            return "lost"
    if mail and mail.arrived <= request.ended + LIFETIME:
        return "kept"
    return "outlived" if longest_health(request, faults) < 2 else "lost"


def judge_refused(request, siblings, load):
    """A 403: right if password or code is another's, or the code's time was over."""
    registration = [other for other in siblings if other.status == 202
                    and other.ended <= request.began][-1]
    alive = request.ended < registration.began + LIFETIME
    right = (request.password == registration.password
             and request.code == load.mail_of(registration).code)
    return "lost" if alive and right else "refused"


def longest_health(request, faults):
    """The longest stretch without a fault, of the life of its code; in seconds."""
    instant, end, longest = request.ended, request.ended + LIFETIME, 0
    for fault in faults:
        if fault.healed > instant:
            longest = max(longest, min(fault.began, end) - instant)
            instant = fault.healed
    return max(longest, end - instant)


def mailed(load, request, subject):
    return any(mail.subject == subject for mail in load.mails[request.email])


def verifies(password_hash, password):
    with suppress(argon2.exceptions.VerifyMismatchError):
        return argon2.PasswordHasher().verify(password_hash, password)


def repeat(load, request, user):
    """Repeats a request of unknown outcome; whether that ends as a first one would."""
    active = user and user.activated_at
    if request.action == "activate":
        answer = load.activate(request.email, request.password, request.code).status
        return answer in ((403, 409) if active else (200, 403))
    again = load.register(request.email, request.password)
    if active or again.status != 202:
        return again.status in (202, 422)     # 422: it was meant to be refused
    mail = steps.wait_until(lambda: load.mail_of(again))
    return load.activate(request.email, request.password, mail.code).status == 200


# -- The table -------------------------------------------------------------------------

LINE = "| {:34} | {} | {} | {} | {} | {} | {} | {} | {} | {} |".format


def print_table(requests, verdicts, load, faults):
    """In Markdown, for docs/measured.md: a line for each kind of fault.

    What ends belongs to the last fault before it.
    """
    calm = Fault("(before the first)", False)
    kinds = {}
    for fault in [calm, *faults]:
        kinds.setdefault(fault.name, []).append(fault)

    def kind_at(instant):
        return [fault.name for fault in [calm, *faults] if fault.began <= instant][-1]

    def count(found):
        return Counter(kind_at(request.ended) for request in found)

    duplicates, seen, slowest = Counter(), set(), Counter()
    for mail in sorted((mail for mails in load.mails.values() for mail in mails),
                       key=lambda mail: mail.arrived):
        duplicates[kind_at(mail.arrived)] += mail.id in seen
        seen.add(mail.id)
    for request in requests:
        kind = kind_at(request.ended)
        slowest[kind] = max(slowest[kind], request.seconds if request.status else 0)
    columns = [count(requests), count(r for r in requests if r.status in (200, 202)),
               *(count(verdicts[each]) for each in ("lost", "left behind", "unknown")),
               duplicates]

    print()
    print(LINE("fault", "times", "requests", "2xx", "lost", "left behind", "unknown",
               "mailed twice", "slowest answer", "healed within"))
    print("|---" * 10 + "|")
    for kind, same in kinds.items():
        print(LINE(kind, len(same) if same[0].began else "",
                   *(column[kind] for column in columns), f"{slowest[kind]:.1f} s",
                   f"{max(each.healed - each.ended for each in same):.1f} s"))
    print(LINE("all", len(faults), *(column.total() for column in columns),
               f"{max(slowest.values()):.1f} s",
               f"{max(each.healed - each.ended for each in faults):.1f} s"))
    print(f"\nhalf of the answers within "
          f"{statistics.median(request.seconds for request in requests):.3f} s")
