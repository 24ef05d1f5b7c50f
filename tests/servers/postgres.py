"""A PostgreSQL of our own, beside the one that the system may run."""

import hashlib
import os
import shutil
import signal
from contextlib import suppress
from pathlib import Path

from servers.install import find
from servers.process import ROOT, Server, free_port, run


class Postgres(Server):
    """With an empty database `registration`, and a superuser of that name.

    url is the superuser's, api_url that of the API's role, which schema.sql makes.
    """

    name = "PostgreSQL"
    stop_signal = signal.SIGINT  # does not wait until the clients have left

    def __init__(self, folder, port=None):
        super().__init__(folder)
        self.env = {"PATH": os.defpath, "LANG": "C.UTF-8"}
        self.port = port or free_port()
        self.url = self.url_of("registration")
        self.api_url = self.url_of("registration", "registration_api")
        self.log = self.folder / "postgres.log"
        self.data = self.folder / "postgres"
        if ROOT:  # which PostgreSQL refuses to be
            self.user = {"user": "postgres", "group": "postgres", "extra_groups": []}
            if not all(parent.stat().st_mode & 0o001 for parent in self.data.parents):
                # A clone below /root, say: that user cannot get there, but to its home.
                key = hashlib.sha256(bytes(self.data)).hexdigest()[:12]
                self.data = Path(f"~postgres/registration-{key}").expanduser()

    def command(self):
        return [find("postgres"), "-D", self.data, "-p", str(self.port),
                "-c", f"listen_addresses={self.address}",
                "-c", "unix_socket_directories="]

    def launch(self):
        if not self.data.exists():
            self.create(self.data.with_suffix(".new"))
        self.cwd = self.data
        super().launch()

    def create(self, new):
        """Under another name until it is complete: it may be interrupted."""
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir(mode=0o700)
        if ROOT:
            shutil.chown(new, "postgres", "postgres")
        options = {"cwd": new, "env": self.env, **self.user}
        run([find("initdb"), "-D", new, "--username=registration", "--auth=trust",
             "--encoding=UTF8", "--locale=C.UTF-8", "--no-sync"], **options)
        run([find("postgres"), "--single", "-D", new, "postgres"],
            input="CREATE DATABASE registration", **options)
        new.rename(self.data)

    def answers(self):
        with suppress(RuntimeError):
            return self.psql("SELECT 'yes'")

    def psql(self, sql, database="registration"):
        """What psql prints for any number of statements, bare."""
        return run([find("psql"), "-XqAt", "-v", "ON_ERROR_STOP=1",
                    self.url_of(database)], input=sql)

    def url_of(self, database, role="registration"):
        return f"postgresql://{role}@{self.address}:{self.port}/{database}"
