"""The faults of a network: packets that are late or lost, links that go down.

    make chaos OPTIONS="--network --rounds 1"   about half an hour; as root

PostgreSQL, RabbitMQ, the mail server, the consumer and a DNS server each have a machine
of their own, which is a network namespace. The API and its callers share another one,
so that an answer's way to its caller is always well.
"""

from contextlib import ExitStack, contextmanager

from servers.faults import cut_connections, cut_sessions
from servers.network import Network
from servers.postgres import Postgres
from servers.program import Consumer, resolver_options
from servers.rabbitmq import RabbitMQ
from servers.sink import Sink
from servers.system import running_program, running_servers, settings_for


class Database(Postgres):
    def create(self, new):
        """Clients from other machines need no password either."""
        super().create(new)
        with open(self.data / "pg_hba.conf", "a") as file:
            file.write("host all all samenet trust\n")


class Broker(RabbitMQ):
    def launch(self):
        """guest may come from other machines, too."""
        (self.folder / "rabbitmq.conf").write_text("loopback_users = none\n")
        super().launch()


def on(machine, server):
    """A kind of server that runs on a machine."""
    return type(server.__name__, (server,),
                {"machine": machine, "address": machine.address})


@contextmanager
def system_on_machines(**changes):
    """As whole_system() of servers/system.py; .network and .machines besides."""
    network = Network()
    database, broker, mail, worker = machines = [
        network.machine(f"{name}.test") for name in (
            "database", "broker", "mail", "worker")]
    with running_servers(on(mail, Sink), on(database, Database),
                         on(broker, Broker)) as system:
        settings = settings_for(
            system.postgres.api_url.replace(database.address, "database.test"),
            system.rabbitmq.url.replace(broker.address, "broker.test"),
            system.mail_server.smtp_port, SMTP_HOST="mail.test",
            RES_OPTIONS=resolver_options(), **changes)
        with running_program(system.folder / "program", settings,
                             consumer=on(worker, Consumer)) as processes:
            system.api, system.consumer = processes
            system.network, system.machines = network, machines
            yield system


def faults(system):
    """As faults() of __main__.py: each fault for each of the three servers."""
    database, broker, mail, _ = system.machines
    found = []
    for machine in database, broker, mail:
        wire, of_database = machine.wire, machine is database
        found += [(name, of_database, how, shortest, longest) for (
            name, how, shortest, longest) in [
            ("packets lost in both directions",
             lambda wire=wire: wire.failing(drops=("in", "out")), 1, 6),
            ("packets to the server lost",
             lambda wire=wire: wire.failing(drops=("in",)), 1, 6),
            ("packets from the server lost",
             lambda wire=wire: wire.failing(drops=("out",)), 1, 6),
            ("round trips of 100 ms",
             lambda wire=wire: wire.failing(seconds=0.05), 4, 8),
            ("round trips of 2 s",
             lambda wire=wire: wire.failing(seconds=1), 4, 8),
            ("5 % of the packets lost",
             lambda wire=wire: wire.failing(loss=0.05), 6, 10),
            ("30 % of the packets lost",
             lambda wire=wire: wire.failing(loss=0.3), 6, 10),
            ("link down for 3 s", machine.link_down, 3, 3),
            ("link down for 30 s", machine.link_down, 30, 30),
            ("idle connections forgotten",
             lambda wire=wire: forgotten(wire), 0, 0)]]
    return [*found,
            ("all links down for 150 s", True,
             lambda: all_down(system.machines), 150, 150),
            ("DNS server silent", True, lambda: dns_silent(system), 3, 6)]


@contextmanager
def forgotten(wire):
    """Connections are cut without a word, as by a NAT; new ones are well."""
    wire.forget()
    yield


@contextmanager
def all_down(machines):
    with ExitStack() as stack:
        for machine in machines:
            stack.enter_context(machine.link_down())
        yield


@contextmanager
def dns_silent(system):
    """It matters to who has to connect anew, so all have to."""
    with system.network.dns.wire.failing(drops=("in", "out")):
        cut_sessions(system.postgres)
        cut_connections(system.rabbitmq)
        yield
