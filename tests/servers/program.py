"""The program: the API under Gunicorn, and the consumer."""

import os
import sys
from pathlib import Path
from typing import NamedTuple

from servers.process import TOP, Server, free_port, responds


class Home(NamedTuple):
    """Where a program is, and the Python that has its packages."""

    folder: Path
    python: str | Path


HERE = Home(TOP, sys.executable)


class Program(Server):
    """A process of the program, with exactly the given settings: no .env is read."""

    cwd, python = HERE

    def __init__(self, folder, env):
        super().__init__(folder)
        self.log = self.folder / f"{self.name}.log"
        self.env = {name: os.environ[name] for name in ("PATH", "HOME", "LANG", "TZ")
                    if name in os.environ}
        self.env |= {"PYTHON_DOTENV_DISABLED": "1", **env}


class Gunicorn(Program):
    name = "gunicorn"
    patience = 30

    def __init__(self, folder, env, port=None, options=()):
        super().__init__(folder, env)
        self.port = port or free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.options = options

    def command(self):
        return [self.python, "-m", "gunicorn", "service:app",
                "--bind", f"127.0.0.1:{self.port}", *self.options]

    def answers(self):
        return self.alive() and responds(self.port, "/healthz")


class Consumer(Program):
    name = "consumer"

    def command(self):
        return [self.python, "consumer.py"]

    def answers(self):
        return self.alive()
