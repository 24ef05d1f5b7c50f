"""A bare `gunicorn service:app` is the production set-up."""

import gc
import json
import logging
import os
import re
import sys
import time
from pathlib import Path

from dotenv import load_dotenv

load_dotenv(Path(__file__).with_name(".env"))
LOG_LEVEL = (os.environ.get("LOG_LEVEL") or "INFO").upper()
WEB_CONCURRENCY = os.environ.get("WEB_CONCURRENCY") or str(2 * os.cpu_count() + 1)
if LOG_LEVEL not in ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"):
    raise SystemExit("LOG_LEVEL is malformed; see .env.example")
if not re.fullmatch("[1-9][0-9]{0,3}", WEB_CONCURRENCY):
    raise SystemExit("WEB_CONCURRENCY is malformed; see .env.example")

# Sync workers: each handles one request at a time. While some wait, others hash.
workers = int(WEB_CONCURRENCY)
backlog = 100 * os.cpu_count()   # two seconds of work may queue in the kernel
preload_app = True               # a wrong setting stops the start; memory is shared
timeout = 15                     # seconds until a worker that hangs is replaced
graceful_timeout = 7             # seconds for the last requests after SIGTERM
control_socket_disable = True    # nobody uses it, and it is a file to write
secure_scheme_headers = {}       # or it refuses requests whose proxies disagree
worker_tmp_dir = "/dev/shm" if os.path.isdir("/dev/shm") else None   # heartbeat files


def when_ready(server):
    """Exempt what was loaded before the fork from garbage collection, which would write
    to the shared memory and so copy it into each worker."""
    gc.freeze()


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
    "root": {"level": LOG_LEVEL, "handlers": ["stdout"]},
    "loggers": {"gunicorn.error": {"propagate": True}}}
