"""The whole system under steady load, and everything in it killed, again and again.

    make chaos                              about ten minutes
    make chaos OPTIONS="--rounds 1"         about three
    make chaos OPTIONS="--only killed"      the faults whose name has this word
    make chaos OPTIONS="--network --rounds 1"   network faults, half an hour; as root
    make chaos OPTIONS=--disks                  disks are full, four minutes; as root

Ends with one table, and with an error if a 2xx was not kept, a 4xx or 503 left
something behind, an answer took over 5 seconds, healing over 10, or a process ended by
itself. Only the network's faults may keep mails back for three minutes, which is how
long RabbitMQ takes to miss the consumer.
servers/faults.py has the faults, load.py the callers, account.py the table.
"""

import argparse
import json
import os
import random
import sys
import time
from contextlib import contextmanager
from functools import partial

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

from chaos import disks, load, network
from chaos.account import account

# -- Faults ----------------------------------------------------------------------------


@contextmanager
def at_once(action):
    """A fault that is over as soon as it is done."""
    action()
    yield


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
        ("gunicorn worker killed", False, lambda: at_once(
            lambda: kill_worker(api)), 0, 0),
        ("PostgreSQL killed", True, lambda: killed(postgres), 0.2, 4),
        ("RabbitMQ killed", False, lambda: killed(rabbitmq), 0.2, 2),
        ("mail server killed", False, lambda: killed(mail), 0.5, 6),
        ("mail server killed, for long", False, lambda: killed(mail), longer, longer),
        ("PostgreSQL's sessions cut", True, lambda: at_once(
            lambda: cut_sessions(postgres)), 0, 0),
        ("RabbitMQ's connections cut", False, lambda: at_once(
            lambda: cut_connections(rabbitmq)), 0, 0),
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
FORGOTTEN = 180   # with --network, which may lose the consumer's connection


# -- The run ---------------------------------------------------------------------------


def run(system, callers, rounds, chance, faults_of=faults):
    """Does all faults in each round, in a new order; returns (faults, failures)."""
    done, failures = [], []
    system.processes = processes(system)
    for number in range(rounds):
        load.say(f"round {number + 1} of {rounds}")
        turn = [each for each in faults_of(system)
                for _ in range(3 if each[0] in OFTEN else 1)]
        chance.shuffle(turn)
        for each in turn:
            time.sleep(chance.uniform(0.5, 2.5))
            done.append(befall(system, callers, each, chance, failures))
    return done, failures


def befall(system, callers, each, chance, failures):
    """Does one of the faults and waits until all is healed: the Fault with its times.

    Adds a line to failures for each thing that went wrong.
    """
    name, of_database, inflict, shortest, longest = each
    fault = load.Fault(name, of_database)
    try:
        with fault.under(callers), inflict():
            time.sleep(chance.uniform(shortest, longest))
    except RuntimeError as error:       # it did not heal
        failures.append(str(error))
        fault.served = fault.healed = time.time()
    for what, instant, most in (("registrations", fault.served, HEALING),
                                ("all", fault.healed, system.healing)):
        if instant - fault.ended > most:
            failures.append(f"{what} healed after {instant - fault.ended:.1f} s only: "
                            f"{name}")
    gone = len(system.processes - processes(system))    # since the last fault
    system.processes = processes(system)
    if gone > (1 if name in ENDS_ONE else 0):
        failures.append(f"{gone} processes of the program ended: {name}")
    return fault


def processes(system):
    """The ids of the program's."""
    return {pid for each in (system.api, system.consumer)
            for pid in tree(each.process.pid)}


def jobs_in(rabbitmq):
    """How many jobs there are still, with those that it has given to a lost consumer."""
    queues = json.loads(rabbitmq.ctl("list_queues", "--formatter", "json", "messages"))
    return sum(queue["messages"] for queue in queues)


def main():
    parser = argparse.ArgumentParser("chaos", description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=4, help="over two minutes each")
    parser.add_argument("--seed", type=int, default=random.randrange(10_000))
    parser.add_argument("--network", action="store_const", const=network, dest="kind",
                        help="the faults of network.py, half an hour a round")
    parser.add_argument("--disks", action="store_const", const=disks, dest="kind",
                        help="the faults of disks.py, one minute a round")
    parser.add_argument("--only", default="", metavar="WORD",
                        help="the faults whose name has it")
    options = parser.parse_args()
    load.say(f"seed {options.seed}")
    system_with, faults_of = {
        None: (partial(whole_system, Sink), faults),
        network: (network.system_on_machines, network.faults),
        disks: (disks.system_on_small_disks, disks.faults)}[options.kind]
    with system_with(CODE_LIFETIME=str(load.LIFETIME), TRUSTED_PROXIES="1",
                     WEB_CONCURRENCY=None) as system:   # workers as in production
        system.healing = FORGOTTEN if options.kind is network else HEALING
        callers = load.Load([system.api], system.mail_server, options.seed)
        callers.start()
        try:
            time.sleep(5)
            done, failures = run(
                system, callers, options.rounds, random.Random(options.seed),
                lambda system: [each for each in faults_of(system)
                                if options.only in each[0]])
        finally:
            callers.finish()
        wait_until(lambda: not jobs_in(system.rabbitmq), system.healing)
        failures += account(callers, done, system.postgres.url, [system.api],
                            [system.consumer])
    return "\n".join(failures)


if __name__ == "__main__":
    sys.exit(main() or 0)
