"""Finds the programs that the servers need, and installs what is missing.

    python -m servers.install       everything, as the Dockerfile does
"""

import fcntl
import glob
import json
import os
import shutil
import subprocess
import sys
from contextlib import contextmanager, suppress
from pathlib import Path

from servers.process import LOCAL, ROOT, run

MAILDEV = "2.2.1"
PACKAGES = {  # by a server's name: {program: package of Debian}
    "PostgreSQL": {"initdb": "postgresql"},
    "PgBouncer": {"pgbouncer": "pgbouncer"},
    "RabbitMQ": {"rabbitmq-server": "rabbitmq-server"},
    "MailDev": {"node": "nodejs", "npm": "npm"},
    "nginx": {"nginx": "nginx"},
    "Chromium": {"chromium": "chromium"},
    "wrk": {"wrk": "wrk"},
    "commands": {"curl": "curl", "openssl": "openssl"}}


def find(program):
    """A program's path or None. Debian keeps most of these out of PATH.

    Its folders come first: in PATH, rabbitmq-server is a wrapper that wants to be root
    or rabbitmq, and psql one that picks a version by the system's own servers.
    """
    versions = glob.glob("/usr/lib/postgresql/*/bin")
    versions.sort(key=lambda path: float(path.split("/")[4]), reverse=True)
    return shutil.which(program, path=os.pathsep.join(
        ["/usr/lib/rabbitmq/bin", *versions, os.environ.get("PATH", os.defpath),
         "/usr/sbin"]))


def install_missing(*servers):
    """Installs what these servers need, if we may; else exits, saying what to do.

    One process at a time: the tests run in several.
    """
    LOCAL.mkdir(exist_ok=True)
    with open(LOCAL / "install.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        install(servers)


def install(servers):
    missing = {package: server for server in servers
               for program, package in PACKAGES.get(server, {}).items()
               if not find(program)}
    packages, names = " ".join(missing), ", ".join(dict.fromkeys(missing.values()))
    if missing and not (ROOT and find("apt-get")):
        sys.exit(f"missing for {names}: sudo apt-get install {packages}")
    if missing:
        print(f"installing {packages} ...", flush=True)
        with services_kept_from_starting():
            apt_get("update")
            apt_get("install", "--no-install-recommends", *missing)
    if "MailDev" in servers and not maildev_is_installed():
        print(f"installing MailDev {MAILDEV} ...", flush=True)
        run([find("npm"), "install", "--prefix", LOCAL / "maildev", "--no-audit",
             "--no-fund", "--loglevel=error", f"maildev@{MAILDEV}"])


def maildev_is_installed():
    """As said by the file that npm writes last."""
    lock = LOCAL / "maildev/node_modules/.package-lock.json"
    with suppress(OSError, ValueError, KeyError):
        packages = json.loads(lock.read_text())["packages"]
        return packages["node_modules/maildev"]["version"] == MAILDEV


def apt_get(command, *arguments):
    run(["apt-get", command, "-qq", *arguments], stdin=subprocess.DEVNULL,
        env=os.environ | {"DEBIAN_FRONTEND": "noninteractive"})


@contextmanager
def services_kept_from_starting():
    """Debian's packages start their server when installed, unless this file says no.

    RUNLEVEL=1 would not do: only invoke-rc.d looks at it, the helper for systemd not.
    """
    policy = Path("/usr/sbin/policy-rc.d")
    if policy.exists():  # the machine's own, which is most often a container's no
        yield
        return
    policy.write_text("#!/bin/sh\nexit 101\n")
    policy.chmod(0o755)
    try:
        yield
    finally:
        policy.unlink()


if __name__ == "__main__":
    install_missing(*PACKAGES)
