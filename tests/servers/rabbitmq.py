"""A RabbitMQ of our own, with its own epmd, Erlang's name server."""

import os
from pathlib import Path

from servers.install import find
from servers.process import Server, free_port, run, says


class RabbitMQ(Server):
    """A node of its own; 3.5 to 6 seconds until it answers, on two busy cores.

    kill() within the first second after a quorum queue was declared can break that
    queue for good: RabbitMQ notes its name on the disk only about a second later.
    """

    name = "RabbitMQ"

    def __init__(self, folder, port=None):
        super().__init__(Path(folder, "rabbitmq"))
        self.port = port or free_port()
        self.url = self.url_of("/")
        self.log = self.folder / "rabbitmq.log"
        self.cwd = self.folder
        self.env = {
            "PATH": os.environ.get("PATH", os.defpath),
            "LANG": "C.UTF-8",
            "HOME": str(self.folder),  # its own Erlang cookie
            "ERL_EPMD_PORT": str(free_port()),
            "ERL_EPMD_ADDRESS": "127.0.0.1",
            "RABBITMQ_NODENAME": "registration@localhost",
            "RABBITMQ_NODE_IP_ADDRESS": self.address,
            "RABBITMQ_NODE_PORT": str(self.port),
            "RABBITMQ_DIST_PORT": str(free_port()),
            # The second line: idle schedulers sleep, and leave the cores to the others.
            # The third: a queue's log in memory has 64 MiB at most, as in Compose.
            "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS":
                "-kernel inet_dist_use_interface {127,0,0,1} "
                "+sbwt none +sbwtdcpu none +sbwtdio none "
                "-ra wal_max_size_bytes 67108864",
            "RABBITMQ_MNESIA_BASE": str(self.folder),
            "RABBITMQ_LOG_BASE": str(self.folder),
            "RABBITMQ_LOGS": "-",
            # None of the system's settings; these files need not exist.
            "RABBITMQ_CONF_ENV_FILE": os.devnull,
            "RABBITMQ_CONFIG_FILE": str(self.folder / "rabbitmq.conf"),
            "RABBITMQ_ADVANCED_CONFIG_FILE": str(self.folder / "advanced.config"),
            "RABBITMQ_ENABLED_PLUGINS_FILE": str(self.folder / "enabled_plugins"),
            "RABBITMQ_PID_FILE": str(self.folder / "pid"),
            # The script becomes Erlang, instead of standing between it and our signals.
            "RUNNING_UNDER_SYSTEMD": "true"}

    def command(self):
        # epmd, Erlang's name server, comes first: Erlang would start one that outlives
        # it. This one is the broker's child, and ends with it, however that ends.
        script = ('setpriv --pdeathsig KILL "$0" & '
                  'until "$0" -names >/dev/null 2>&1; do :; done; exec "$1"')
        return ["sh", "-c", script, find("epmd"), find("rabbitmq-server")]

    def answers(self):
        # It listens when all else is ready.
        return says(self.port, b"AMQP\0\0\x09\x01", self.address)

    def url_of(self, vhost):
        return f"amqp://guest:guest@{self.address}:{self.port}/{vhost}"

    def ctl(self, *arguments):
        """What rabbitmqctl prints for this node."""
        return run([find("rabbitmqctl"), "-q", *arguments],
                   env=self.env, cwd=self.folder)
