"""Load on the whole system, and everything in it killed, paused, cut, again and again.

    make chaos                              about ten minutes
    make chaos OPTIONS="--only killed"      the faults whose name has this word

Ends with one table, and with an error if a 2xx was not kept, a 4xx or 503 left
something behind, an answer took over 5 seconds, healing over 10, or a process ended by
itself. servers/faults.py has the faults, load.py the callers, account.py the table.
"""

import json
import os
import random
import time
from contextlib import contextmanager, nullcontext

from servers.faults import (
    alarmed,
    crowded,
    cut_connections,
    cut_sessions,
    full,
    killed,
    paused,
    read_only,
)
from servers.process import tree
from servers.sink import Sink
from servers.system import whole_system
from steps import wait_until, workers_of

from trials import load
from trials.account import account

# -- Faults ----------------------------------------------------------------------------


@contextmanager
def queue_full(rabbitmq, consumer):
    """A consumer would make room in it, so there is none."""
    with full(rabbitmq, jobs=3), killed(consumer):
        yield


def kill_worker(api):
    os.kill(random.choice(workers_of(api)), 9)      # gunicorn's master starts another


def faults(system):
    """Each as (name, whether of the database, how, shortest and longest seconds)."""
    postgres, rabbitmq, mail = system.postgres, system.rabbitmq, system.mail_server
    api, consumer, longer = system.api, system.consumer, load.LIFETIME + 4
    return [
        ("consumer killed", False, lambda: killed(consumer), 0.2, 4),
        ("gunicorn worker killed", False, lambda: nullcontext(kill_worker(api)), 0, 0),
        ("PostgreSQL killed", True, lambda: killed(postgres), 0.2, 4),
        ("RabbitMQ killed", False, lambda: killed(rabbitmq), 0.2, 2),
        ("mail server killed", False, lambda: killed(mail), 0.5, 6),
        ("mail server killed, for long", False, lambda: killed(mail), longer, longer),
        ("PostgreSQL's sessions cut", True,
         lambda: nullcontext(cut_sessions(postgres)), 0, 0),
        ("RabbitMQ's connections cut", False,
         lambda: nullcontext(cut_connections(rabbitmq)), 0, 0),
        ("PostgreSQL's connections used up", True, lambda: crowded(postgres), 1, 4),
        ("PostgreSQL read-only", True, lambda: read_only(postgres), 1, 4),
        ("PostgreSQL paused", True, lambda: paused(postgres), 1, 6),
        ("RabbitMQ paused", False, lambda: paused(rabbitmq), 1, 6),
        ("RabbitMQ alarmed", False, lambda: alarmed(rabbitmq), 1, 4),
        ("RabbitMQ's queue full", False, lambda: queue_full(rabbitmq, consumer), 3, 6)]


OFTEN = {"consumer killed", "gunicorn worker killed", "PostgreSQL killed",
         "PostgreSQL's sessions cut", "PostgreSQL paused"}     # three times a round
# They end one process of the program themselves.
ENDS_ONE = {"consumer killed", "gunicorn worker killed", "RabbitMQ's queue full"}
HEALING = 10      # seconds from the end of a fault until everything works again


# -- The run ---------------------------------------------------------------------------


def befall(system, fault, chance, failures):
    """Does one of the faults and waits until all is healed: the Fault with its times.

    Adds a line to failures for each thing that went wrong.
    """
    name, of_database, inflict, shortest, longest = fault
    done = load.Fault(name, of_database)
    try:
        with done.under(system.callers), inflict():
            time.sleep(chance.uniform(shortest, longest))
    except RuntimeError as error:       # it did not heal
        failures.append(str(error))
        done.served = done.healed = time.time()
    if done.healed - done.ended > HEALING:
        failures.append(f"healed after {done.healed - done.ended:.1f} s only: {name}")
    gone = len(system.processes - processes(system))    # since the last fault
    system.processes = processes(system)
    if gone > (1 if name in ENDS_ONE else 0):
        failures.append(f"{gone} processes of the program ended: {name}")
    return done


def processes(system):
    """The ids of the program's."""
    return {pid for each in (system.api, system.consumer)
            for pid in tree(each.process.pid)}


def jobs_in(rabbitmq):
    """How many jobs are left, with those that it has given to a lost consumer."""
    listing = rabbitmq.ctl("list_queues", "--formatter", "json", "messages")
    return sum(queue["messages"] for queue in json.loads(listing))


def add_options(parser):
    parser.add_argument("--rounds", type=int, default=4, help="over two minutes each")
    parser.add_argument("--only", default="", metavar="WORD",
                        help="the faults whose name has it")


def main(options):
    """Does all faults in each round, in a new order."""
    load.say(f"seed {options.seed}")
    done, failures, chance = [], [], random.Random(options.seed)
    with whole_system(Sink, CODE_LIFETIME=str(load.LIFETIME), TRUSTED_PROXIES="1",
                      WEB_CONCURRENCY=None) as system:      # workers as in production
        callers = load.Load(system.api, system.mail_server, options.seed, rate=3.5)
        system.callers, system.processes = callers, processes(system)
        callers.start()
        try:
            time.sleep(5)
            for number in range(1 if options.short else options.rounds):
                load.say(f"round {number + 1}")
                for fault in one_round(system, options, chance):
                    time.sleep(chance.uniform(0.5, 2.5))
                    done.append(befall(system, fault, chance, failures))
        finally:
            callers.finish()
        wait_until(lambda: not jobs_in(system.rabbitmq))
        return failures + account(callers, done, system)


def one_round(system, options, chance):
    """The faults in a new order; those that happen often come three times."""
    turn = [fault for fault in faults(system) if options.only in fault[0]
            for _ in range(3 if fault[0] in OFTEN and not options.short else 1)]
    chance.shuffle(turn)
    return turn
