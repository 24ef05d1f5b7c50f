"""Disks that are full, or nearly so.

    make chaos OPTIONS="--disks --rounds 4"     about four minutes; as root

PostgreSQL and RabbitMQ have a small file system each, in memory. A file takes what is
left of it, for some seconds. RabbitMQ does not recover its queues if nothing was left,
so it is killed and started again. So is PostgreSQL if it has ended, as Docker would do.
"""

import shutil
import sys
import tempfile
from contextlib import contextmanager, suppress
from pathlib import Path

from servers.network import own_mounts
from servers.postgres import Postgres
from servers.process import ROOT, run
from servers.rabbitmq import RabbitMQ
from servers.sink import Sink
from servers.system import whole_system
from steps import wait_until

SIZE = 300 << 20
NEARLY = 10 << 20       # left; RabbitMQ is alarmed below 50 MB


@contextmanager
def small_disk():
    """A folder with a file system of its own, which only our processes see."""
    with tempfile.TemporaryDirectory(prefix="reg-") as folder:
        run(["mount", "-t", "tmpfs", "-o", f"size={SIZE},mode=755", "disk", folder])
        try:
            yield Path(folder)
        finally:
            run(["umount", folder])


@contextmanager
def system_on_small_disks(**changes):
    """As whole_system() of servers/system.py."""
    if not ROOT:
        sys.exit("small file systems: only root can mount them")
    own_mounts()
    with small_disk() as database, small_disk() as broker, whole_system(
            Sink, servers=(lambda _: Postgres(database), lambda _: RabbitMQ(broker)),
            **changes) as system:
        yield system


def faults(system):
    """As faults() of __main__.py."""
    postgres, rabbitmq = system.postgres, system.rabbitmq
    return [("PostgreSQL's disk full", True, lambda: full_disk(postgres), 2, 20),
            ("RabbitMQ's disk nearly full", False,
             lambda: full_disk(rabbitmq, NEARLY), 5, 20),
            ("RabbitMQ's disk full, then restarted", False,
             lambda: full_disk(rabbitmq, restart=True), 2, 20)]


@contextmanager
def full_disk(server, left=0, restart=False):
    ballast = server.folder / "ballast"
    try:
        with suppress(OSError), open(ballast, "wb", buffering=0) as file:
            while (free := shutil.disk_usage(server.folder).free) > left:
                file.write(bytes(min(free - left, 1 << 20)))
        yield
    finally:
        ballast.unlink()
        if restart:
            server.kill()
        wait_until(lambda: not server.alive() or server.answers(), 60)
        if not server.alive():
            server.start()
