"""Losing a machine: a RabbitMQ cluster, and a PostgreSQL with a standby, under load.

    make failover                           about four minutes

Three RabbitMQ nodes with the mail queue on each of them, a primary with a synchronous
standby, two APIs and two consumers, told of it by DATABASE_URL and BROKER_URL alone.
The node that leads the mail queue is killed and comes back, a few times. Then the
standby is killed, comes back, is killed again, and the primary told to go on without
it. When it is back, the primary is killed and the standby promoted.
"""

import json
import random
import secrets
import shutil
import time
from contextlib import ExitStack
from itertools import pairwise

import steps
from servers.install import find, install_missing
from servers.postgres import Postgres
from servers.process import ROOT, Server, free_port, run, running, says
from servers.rabbitmq import RabbitMQ
from servers.sink import Sink
from servers.system import (
    create_tables,
    running_program,
    settings_for,
    temporary_folder,
)
from steps.jobs import MAIL

from trials import load
from trials.account import account

AIMS = {"broker": 3, "database": 2}     # seconds without a success


# -- The machines ----------------------------------------------------------------------


class Epmd(Server):
    """Erlang's name server. All three nodes use it, so it is none of theirs."""

    name = "epmd"

    def __init__(self, folder):
        super().__init__(folder)
        self.port = free_port()

    def command(self):
        return [find("epmd"), "-address", "127.0.0.1", "-port", str(self.port)]

    def answers(self):
        return says(self.port, b"\x00\x01n")


class Node(RabbitMQ):
    """One of three; they share the cookie in HOME and a list of all of them."""

    def __init__(self, folder, number, epmd):
        super().__init__(folder / f"node{number}")
        self.nodename, self.name = f"node{number}@localhost", f"RabbitMQ {number}"
        self.env |= {"HOME": str(folder), "ERL_EPMD_PORT": str(epmd.port),
                     "RABBITMQ_NODENAME": self.nodename}
        self.env["RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS"] += " +S 1:1 +sbwt none"
        (self.folder / "rabbitmq.conf").write_text(
            "cluster_formation.peer_discovery_backend = classic_config\n" + "".join(
                f"cluster_formation.classic_config.nodes.{n} = node{n}@localhost\n"
                for n in (1, 2, 3)))

    def command(self):
        return [find("rabbitmq-server")]


class Standby(Postgres):
    """Follows the primary; every COMMIT there waits until it is written here, too."""

    name = "PostgreSQL standby"

    def __init__(self, folder, primary):
        super().__init__(folder)
        self.primary = primary

    def create(self, new):
        new.mkdir(mode=0o700)
        if ROOT:
            shutil.chown(new, "postgres", "postgres")
        run([find("pg_basebackup"), "-D", new, "-d", self.primary.url,
             "--write-recovery-conf", "--wal-method=stream", "--checkpoint=fast",
             "--create-slot", "--slot=standby"],
            cwd=new, env=self.env, **self.user)
        new.rename(self.data)


def cluster(folder, machines):
    """Three nodes that know each other."""
    cookie = folder / ".erlang.cookie"
    cookie.write_text(secrets.token_hex(16))
    cookie.chmod(0o400)
    epmd = machines.enter_context(Epmd(folder))
    nodes = [Node(folder, number, epmd) for number in (1, 2, 3)]
    machines.enter_context(running(*nodes))
    while len(json.loads(nodes[0].ctl("cluster_status", "--formatter", "json"))
              ["running_nodes"]) < 3:
        time.sleep(0.5)
    return nodes


def replicated(folder, machines):
    """A primary with the schema, and its synchronous standby."""
    primary = machines.enter_context(Postgres(folder / "primary"))
    create_tables(primary)
    standby = machines.enter_context(Standby(folder / "standby", primary))
    wait_for_standbys(primary, "*")
    return primary, standby


def wait_for_standbys(primary, names):
    """Has COMMIT wait for these: * is any, the empty string none."""
    primary.psql(f"ALTER SYSTEM SET synchronous_standby_names = '{names}'")
    primary.psql("SELECT pg_reload_conf()")
    steps.wait_until(lambda: not names or primary.psql(
        "SELECT 1 FROM pg_stat_replication WHERE sync_state = 'sync'"))


def programs(folder, machines, brokers, database, smtp_port):
    """Two of each; the second ones try the broker's hosts in another order."""
    apis, consumers = [], []
    for number in (0, 1):
        settings = settings_for(
            database, ";".join(brokers[number:] + brokers[:number]), smtp_port,
            CODE_LIFETIME=str(load.LIFETIME), WEB_CONCURRENCY=None)
        place = folder / f"program{number}"
        api, consumer = machines.enter_context(running_program(place, settings))
        apis.append(api)
        consumers.append(consumer)
    return apis, consumers


# -- The run ---------------------------------------------------------------------------


def leader_of(nodes):
    """The node that leads the mail queue; RuntimeError if not all three have it."""
    node = next(node for node in nodes if node.alive())
    queues = json.loads(node.ctl("list_queues", "--formatter", "json",
                                 "name", "leader", "members"))
    [queue] = [queue for queue in queues if queue["name"] == MAIL]
    if len(queue["members"]) < 3:
        raise RuntimeError(f"the mail queue is on {queue['members']} only")
    return next(node for node in nodes if node.nodename == queue["leader"])


def lose_leader(callers, nodes, faults):
    """Kills the mail queue's leader, and starts it again after a while."""
    leader = leader_of(nodes)
    faults.append(load.Fault("mail queue's leader killed", False))
    with faults[-1].under(callers):
        leader.kill()
    time.sleep(5)
    gap = print_gaps(callers, faults[-1].began, f"after {leader.name} was killed")
    faults.append(load.Fault("it comes back", False))
    with faults[-1].under(callers):
        leader.start()
    time.sleep(5)
    print_gaps(callers, faults[-1].began, "while it comes back")
    return gap


def lose_standby(callers, primary, standby, faults, pause):
    """Kills the standby, for which each COMMIT waits: once until it is back, once until
    the primary is told to do without."""
    faults.append(load.Fault("standby killed, comes back", True))
    with faults[-1].under(callers):
        standby.kill()
        time.sleep(pause)
        standby.start()
    time.sleep(5)
    faults.append(load.Fault("standby killed, primary goes on", True))
    with faults[-1].under(callers):
        standby.kill()
        time.sleep(pause)
        told = time.time()
        wait_for_standbys(primary, "")
    time.sleep(5)
    gap = print_gaps(callers, told, f"since the primary was told {pause:.1f} s later")
    standby.start()
    wait_for_standbys(primary, "*")
    return gap


def lose_primary(callers, primary, standby, faults, pause):
    """Kills the primary; after a pause somebody promotes the standby."""
    faults.append(load.Fault("primary killed, standby promoted", True))
    with faults[-1].under(callers):
        primary.kill()
        time.sleep(pause)
        promoted = time.time()
        standby.psql("SELECT pg_promote()")
    time.sleep(5)
    return print_gaps(callers, promoted, f"since the promotion {pause:.1f} s later")


def print_gaps(callers, since, text):
    """The longest time without a success, from an instant until now; in seconds."""
    gaps = []
    for action in ("register", "activate"):
        instants = sorted(request.ended for request in callers.successes(action)
                          if request.ended > since)
        gaps.append(max(after - before for before, after in
                        pairwise([since, *instants, time.time()])))
    load.say(f"longest gap without a success {text}: register {gaps[0]:.1f} s, "
             f"activate {gaps[1]:.1f} s")
    return max(gaps)


def add_options(parser):
    parser.add_argument("--rounds", type=int, default=3,
                        help="how often a leader is killed")


def main(options):
    load.say(f"seed {options.seed}")
    install_missing("PostgreSQL", "RabbitMQ")
    faults, chance = [], random.Random(options.seed)
    with temporary_folder() as folder, ExitStack() as machines:
        mail = machines.enter_context(Sink(folder))
        primary, standby = replicated(folder, machines)
        nodes = cluster(folder, machines)
        database = (f"postgresql://registration_api@127.0.0.1:{primary.port},127.0.0.1:"
                    f"{standby.port}/registration?target_session_attrs=read-write")
        apis, consumers = programs(
            folder, machines, [node.url for node in nodes], database, mail.smtp_port)

        callers = load.Load(apis, mail, options.seed, rate=6)
        callers.start()
        try:
            time.sleep(5)
            calm = time.time()
            time.sleep(10)
            print_gaps(callers, calm, "while nothing happens")
            gaps = [("broker", lose_leader(callers, nodes, faults))
                    for _ in range(1 if options.short else options.rounds)]
            for lose in lose_standby, lose_primary:
                gaps.append(("database", lose(
                    callers, primary, standby, faults, chance.uniform(0.5, 3))))
        finally:
            callers.finish()
        failures = account(callers, faults, database, apis, consumers)
    return failures + [f"the {server}'s gap of {gap:.1f} s is over {AIMS[server]} s"
                       for server, gap in gaps if gap > AIMS[server]]
