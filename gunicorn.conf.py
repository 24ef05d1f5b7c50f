"""A bare `gunicorn service:app` is the production set-up."""

import gc
import json
import logging
import os
import sys
import time

import psycopg2
from kombu.exceptions import KombuError

import service

# Each handles one request at a time, and has one of PostgreSQL's max_connections.
workers = service.number(
    "WEB_CONCURRENCY", str(min(2 * os.cpu_count() + 1, 40)), 1, 9999)
backlog = 50 * os.cpu_count()    # requests that queue in the kernel: about a second's
preload_app = True               # load once, then fork: a wrong setting stops the start
timeout = 15                     # seconds until a worker that hangs is replaced
graceful_timeout = 7             # seconds for the last requests after SIGTERM
control_socket_disable = True    # nobody uses it, and it is a file to write
limit_request_field_size = 16384   # bytes: cookies of other pages may be large
secure_scheme_headers = {}       # it would refuse a request whose proxies disagree
worker_tmp_dir = "/dev/shm" if os.path.isdir("/dev/shm") else None   # in memory

# Otherwise the collector writes to the memory that the workers share, and so copies it.
gc.freeze()


def post_worker_init(worker):
    """Connect a worker to both servers before its first request, which would have to
    wait; and the log shows at once if it cannot."""
    with service.app.app_context():
        service.begin()
        try:
            service.open_database()
            service.open_broker()
        except psycopg2.Error as error:
            service.log_outage("database", error)
        except KombuError as error:
            service.log_outage("broker", error)
    service.slow_until.update(database=0, broker=0)   # the first request shall try


class Logfmt(logging.Formatter):
    """One line per event: service.py's own fields, or what others say as a message."""

    converter = time.gmtime

    def format(self, record):
        event = record.getMessage()
        if not event.startswith("event="):
            # After "from ip=", gunicorn quotes what it cannot parse, maybe a password.
            message = json.dumps(event.partition(" from ip=")[0])
            event = f"event={record.name.partition('.')[0]} message={message}"
        if record.exc_info:
            event += f" trace={json.dumps(self.formatException(record.exc_info))}"
        instant = self.formatTime(record, "%Y-%m-%dT%H:%M:%SZ")
        return f"time={instant} level={record.levelname} {event}"


logconfig_dict = {
    "version": 1,
    "disable_existing_loggers": False,
    "formatters": {"logfmt": {"()": Logfmt}},
    "handlers": {"stdout": {"class": "logging.StreamHandler", "stream": sys.stdout,
                            "formatter": "logfmt"}},
    "root": {"level": service.LOG_LEVEL, "handlers": ["stdout"]},
    "loggers": {"gunicorn.error": {"propagate": True}}}
