"""A bare `gunicorn service:app` is the production set-up."""

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

# Each worker handles one request at a time. While one waits for a server, others hash.
workers = int(WEB_CONCURRENCY)
backlog = 128 * os.cpu_count()   # two seconds of work; the kernel accepts no more
preload_app = True               # a wrong setting stops the start; memory is shared
timeout = 15                     # seconds until a worker that hangs is replaced
graceful_timeout = 7             # seconds after SIGTERM: the process ends within 10
control_socket_disable = True
worker_tmp_dir = "/dev/shm" if os.path.isdir("/dev/shm") else None


def shorten(record):
    """gunicorn quotes what it cannot parse, and that may be an Authorization header."""
    if record.getMessage().startswith("Invalid request"):
        record.msg, record.args = record.getMessage().partition(": ")[0], ()
    return True


# One line per event, logfmt, UTC. service.py logs the requests itself.
logging.Formatter.converter = time.gmtime
EVENT = "time=%(asctime)s level=%(levelname)s "
logconfig_dict = {
    "version": 1, "disable_existing_loggers": False,
    "filters": {"shorten": {"()": lambda: shorten}},
    "formatters": {
        "ours": {"format": EVENT + "%(message)s", "datefmt": "%Y-%m-%dT%H:%M:%SZ"},
        "gunicorn's": {"format": EVENT + 'event=gunicorn message="%(message)s"',
                       "datefmt": "%Y-%m-%dT%H:%M:%SZ"}},
    "handlers": {
        "ours": {"class": "logging.StreamHandler", "stream": sys.stdout,
                 "formatter": "ours"},
        "gunicorn's": {"class": "logging.StreamHandler", "stream": sys.stdout,
                       "formatter": "gunicorn's", "filters": ["shorten"]}},
    "root": {"level": LOG_LEVEL, "handlers": ["ours"]},
    "loggers": {"gunicorn.error": {"handlers": ["gunicorn's"], "propagate": False}},
}
