"""Runs a command of the program to its end, with settings of its own."""

import os
import subprocess
import sys

from servers.process import TOP

PROGRAM = ["service.py", "consumer.py", "gunicorn.conf.py"]
API = [sys.executable, "-m", "gunicorn", "--bind", "127.0.0.1:0", "service:app"]
CONSUMER = [sys.executable, "consumer.py"]

# Nothing listens there: a program that gets past its settings is not stopped by them.
GOOD = {
    "DATABASE_URL": "postgresql://nobody@127.0.0.1:1/nothing",
    "BROKER_URL": "amqp://guest:guest@127.0.0.1:1//",
    "SECRET_KEY": "only for the tests, 32 characters and more",
    "MAIL_FROM": "registration@example.com", "PYTHON_DOTENV_DISABLED": "1"}


def run(command, folder=TOP, **settings):
    """Runs a command with these settings and no others: (its exit code, its lines)."""
    environment = {"PATH": os.environ["PATH"]} | settings
    done = subprocess.run(command, check=False, cwd=folder, env=environment,
                          text=True, timeout=30, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT)
    return done.returncode, done.stdout.splitlines()
