"""A bare `gunicorn service:app` is the production set-up."""

import ctypes
import gc
import logging
import os
import sys
import time
from pathlib import Path

from dotenv import load_dotenv

load_dotenv(Path(__file__).with_name(".env"))

worker_class = "gthread"
workers = int(os.environ.get("WEB_CONCURRENCY") or os.cpu_count())
# More threads than places (see service.py): the others answer 503 while those work. A
# thread has no connection of its own; places have, at most 90 of them over all workers.
threads = 32
preload_app = True                 # a wrong setting stops the start; memory is shared
timeout = 30
graceful_timeout = 7               # SIGTERM: exit within 10 seconds
keepalive = 5
control_socket_disable = True
worker_tmp_dir = "/dev/shm" if os.path.isdir("/dev/shm") else None

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -3, -8    # glibc's malloc.h


def when_ready(server):
    """What was loaded before the fork stays shared by the workers."""
    gc.freeze()


def post_fork(server, worker):
    """Keep Argon2's 12 MiB for the next hash, in one arena: 61 MB a worker, not 230."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)           # musl has none
    if mallopt:
        mallopt(M_ARENA_MAX, 1)
        mallopt(M_MMAP_THRESHOLD, 32 << 20)
        mallopt(M_TRIM_THRESHOLD, 256 << 20)


# Everything in the one form, logfmt. service.py logs the requests itself.
logging.Formatter.converter = time.gmtime


def shorten(record):
    """gunicorn quotes what it cannot parse, and that may be an Authorization header."""
    if record.getMessage().startswith("Invalid request"):
        record.msg, record.args = record.getMessage().partition(": ")[0], ()
    return True


logconfig_dict = {
    "version": 1,
    "disable_existing_loggers": False,
    "filters": {"shorten": {"()": lambda: shorten}},
    "formatters": {
        "logfmt": {"format": "time=%(asctime)s level=%(levelname)s %(message)s",
                   "datefmt": "%Y-%m-%dT%H:%M:%SZ"},
        "gunicorn": {"format": 'time=%(asctime)s level=%(levelname)s event=gunicorn '
                               'message="%(message)s"',
                     "datefmt": "%Y-%m-%dT%H:%M:%SZ"}},
    "handlers": {
        "logfmt": {"class": "logging.StreamHandler", "formatter": "logfmt",
                   "stream": sys.stdout},
        "gunicorn": {"class": "logging.StreamHandler", "formatter": "gunicorn",
                     "filters": ["shorten"], "stream": sys.stdout}},
    "root": {"level": (os.environ.get("LOG_LEVEL") or "INFO").upper(),
             "handlers": ["logfmt"]},
    "loggers": {
        "gunicorn.error": {"handlers": ["gunicorn"], "propagate": False}},
}
