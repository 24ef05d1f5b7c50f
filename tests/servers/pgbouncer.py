"""PgBouncer in transaction mode: many clients share few sessions of a PostgreSQL."""

import os

from servers.install import find
from servers.process import ROOT, Server, free_port, says


class PgBouncer(Server):
    """In front of a PostgreSQL's database `registration`; api_url is as there."""

    name = "PgBouncer"

    def __init__(self, folder, postgres):
        super().__init__(folder)
        self.env = {"PATH": os.defpath}
        self.port = free_port()
        self.api_url = postgres.api_url.replace(f":{postgres.port}/", f":{self.port}/")
        self.log = self.folder / "pgbouncer.log"
        self.users = self.folder / "pgbouncer.users"
        self.users.write_text('"registration_api" ""\n')
        self.conf = self.folder / "pgbouncer.ini"
        self.conf.write_text(f"""
            [databases]
            registration = host={postgres.address} port={postgres.port}
            [pgbouncer]
            listen_addr = {self.address}
            listen_port = {self.port}
            unix_socket_dir =
            auth_type = trust
            auth_file = {self.users}
            pool_mode = transaction
            default_pool_size = 2
            """.replace("            ", ""))
        if ROOT:  # which PgBouncer refuses to be
            self.user = {"user": "postgres", "group": "postgres", "extra_groups": []}

    def command(self):
        return [find("pgbouncer"), self.conf]

    def answers(self):
        # To SSLRequest it says whether it can.
        return says(self.port, b"\0\0\0\x08\x04\xd2\x16\x2f", self.address)
