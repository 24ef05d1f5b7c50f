"""What can go wrong with a server, each thing by its one name.

    down        it was stopped in order
    killed      SIGKILL to all of it, as by a power cut
    paused      its connections stay open, and it answers nothing
    alarmed     RabbitMQ believes that it is out of memory, and lets publishers wait
    read_only   PostgreSQL takes no writes, as if its disk were full
    crowded     PostgreSQL lets no API in, as at its limit of connections
    full        RabbitMQ's mail queue takes nothing more
    cut         the clients lost their connections; the server itself is well

    with paused(servers.rabbitmq):
        ...

Each fault is real. It begins before the block and is over after it. way_to() puts a
relay before a server, which can be slow, hold something back or break off.
"""

import json
import socket
import threading
import time
from contextlib import closing, contextmanager, suppress
from functools import partial
from types import SimpleNamespace
from urllib.parse import urlsplit

import psycopg2
from steps import wait_until

from servers.process import free_port


@contextmanager
def fault(begin, end):
    """Begins it before the block, and ends it after that, whatever happens there."""
    begin()
    try:
        yield
    finally:
        end()


def down(server):
    return fault(server.stop, server.start)


def killed(server):
    return fault(server.kill, server.start)


def paused(server):
    return fault(server.pause, server.resume)


def alarmed(rabbitmq):
    watermark = partial(rabbitmq.ctl, "set_vm_memory_high_watermark")
    return fault(partial(watermark, "0.00001"), partial(watermark, "0.4"))


def full(rabbitmq, jobs=1):
    """The mail queue takes so many jobs, and what comes before the broker notices.

    A policy lowers the limit that the queue was declared with: the lower one counts.
    """
    policy = "^registration.mail$", json.dumps({"max-length": jobs})
    return fault(partial(rabbitmq.ctl, "set_policy", "full", *policy),
                 partial(rabbitmq.ctl, "clear_policy", "full"))


@contextmanager
def read_only(postgres):
    postgres.psql("ALTER SYSTEM SET default_transaction_read_only = on")
    postgres.psql("SELECT pg_reload_conf()")
    wait_until(lambda: postgres.psql("SHOW default_transaction_read_only") == "on")
    try:
        yield
    finally:
        postgres.psql("SET default_transaction_read_only = off; "
                      "ALTER SYSTEM RESET default_transaction_read_only")
        postgres.psql("SELECT pg_reload_conf()")


@contextmanager
def crowded(postgres):
    postgres.psql("ALTER ROLE registration_api CONNECTION LIMIT 0")
    cut_sessions(postgres)
    try:
        yield
    finally:
        postgres.psql("ALTER ROLE registration_api CONNECTION LIMIT -1")


@contextmanager
def row_locked(postgres, email):
    """Somebody else's transaction holds the row of an address."""
    with closing(psycopg2.connect(postgres.url)) as session:
        session.cursor().execute(
            "SELECT FROM users WHERE email = %s FOR UPDATE", [email])
        yield


@contextmanager
def table_locked(postgres, table):
    """Somebody else's transaction holds a table, as ALTER TABLE does."""
    with closing(psycopg2.connect(postgres.url)) as session:
        session.cursor().execute(f"LOCK TABLE {table}")
        yield


def statements_waiting(postgres):
    """How many statements wait for a lock."""
    return int(postgres.psql("SELECT count(*) FROM pg_locks WHERE NOT granted"))


def cut_sessions(postgres):
    """Ends every client's session but its own; returns when they have ended."""
    postgres.psql("SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity "
                  "WHERE backend_type = 'client backend' AND pid <> pg_backend_pid()")


def cut_connections(rabbitmq, vhost="/"):
    """Closes every client's connection to a virtual host."""
    rabbitmq.ctl("close_all_connections", "-p", vhost, "cut by a test")


@contextmanager
def way_to(url):
    """A relay to the server of a URL, as way.url.

    Each of the server's answers is .seconds late. Unless .answers is None, only so many
    pass: instead of the next one, the way closes both connections. What .is_held(data,
    is_answer) is true of never arrives: .held is set, and the way stands still until
    .released is. It can be saying(), answering() or nothing.
    """
    def relay(source, target, is_answer):
        with suppress(OSError):
            while data := source.recv(65536):
                if is_answer and way.answers is not None:
                    if way.answers == 0:
                        break
                    way.answers -= 1
                if way.is_held(data, is_answer):
                    way.held.set()
                    way.released.wait()
                    continue
                time.sleep(way.seconds if is_answer else 0)
                target.sendall(data)
        for end in source, target:
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def accept():
        with suppress(OSError):     # the listener was closed
            while True:
                caller = listener.accept()[0]
                server = socket.create_connection(("127.0.0.1", port))
                for ends in (caller, server, False), (server, caller, True):
                    threading.Thread(target=relay, args=ends, daemon=True).start()

    port, free = urlsplit(url).port, free_port()
    way = SimpleNamespace(url=url.replace(f":{port}", f":{free}"), seconds=0,
                          answers=None, is_held=nothing,
                          held=threading.Event(), released=threading.Event())
    with socket.create_server(("127.0.0.1", free)) as listener:
        threading.Thread(target=accept, daemon=True).start()
        yield way
        listener.shutdown(socket.SHUT_RDWR)


def saying(*texts):
    """Holds the last of these texts that the API says, once it has said the others."""
    left = list(texts)

    def is_held(data, is_answer):
        if not is_answer and left and left[0] in data:
            del left[0]
            return not left

    return is_held


def answering(*texts):
    """The same for the answer to that."""
    is_said, said = saying(*texts), []

    def is_held(data, is_answer):
        if is_said(data, is_answer):
            said.append(texts)
        return is_answer and bool(said)

    return is_held


def nothing(data, is_answer):
    """Holds nothing."""
