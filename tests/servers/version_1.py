"""Version 1 of the program, to compare with: a worktree of a commit, in .local/."""

import shutil
import sys

from servers.process import LOCAL, TOP, run
from servers.program import Home

COMMIT = "7371f40"      # with gunicorn's threads and argon2-cffi


def version_1():
    """Its Home. If it is missing, it is made, in half a minute."""
    folder = LOCAL / f"version-{COMMIT}"
    home = Home(folder, folder / ".venv/bin/python")
    complete = folder / ".venv/complete"
    if not complete.exists():
        shutil.rmtree(folder, ignore_errors=True)
        run(["git", "-C", TOP, "worktree", "add", "--force", "--detach", folder,
             COMMIT])
        run([sys.executable, "-m", "venv", folder / ".venv"])
        run([home.python, "-m", "pip", "install", "--quiet",
             "--disable-pip-version-check", "--require-hashes",
             "--requirement", folder / "requirements.lock"])
        complete.touch()
    return home
