"""A clock of its own for a server, which can be wrong: libfaketime, of faketime.

    clock = Clock(folder)
    postgres.env |= clock.env           # before it starts
    with clock.wrong_by(-3600):         # seconds
        ...
"""

import glob
from contextlib import contextmanager
from pathlib import Path

from servers.install import install_missing


class Clock:
    """The time of day, as processes with .env see it; timeouts stay as they are."""

    def __init__(self, folder):
        install_missing("clock")
        [library] = glob.glob("/usr/lib/*/faketime/libfaketimeMT.so.1")
        self.offset = Path(folder, "clock")
        self.set(0)
        self.env = {"LD_PRELOAD": library, "FAKETIME_TIMESTAMP_FILE": str(self.offset),
                    "FAKETIME_NO_CACHE": "1", "FAKETIME_DISABLE_SHM": "1",
                    "FAKETIME_DONT_FAKE_MONOTONIC": "1"}

    def set(self, seconds):
        new = self.offset.with_suffix(".new")
        new.write_text(f"{seconds:+d}\n")
        new.rename(self.offset)     # nobody reads half of it

    @contextmanager
    def wrong_by(self, seconds):
        self.set(seconds)
        try:
            yield
        finally:
            self.set(0)
