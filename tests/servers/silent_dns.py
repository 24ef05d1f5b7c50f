"""Runs a command where the only DNS server never answers.

    unshare --map-root-user --mount --net python tests/servers/silent_dns.py COMMAND ...

It needs a mount namespace, for a resolv.conf of its own, and a network namespace, in
which port 53 is free. An ordinary user may have both.
"""

import fcntl
import os
import socket
import struct
import subprocess
import sys
import tempfile

SIOCSIFFLAGS, IFF_UP = 0x8914, 1

for path, text in (("/etc/resolv.conf", "nameserver 127.0.0.1\n"),
                   ("/etc/nsswitch.conf", "hosts: files dns\n")):
    with tempfile.NamedTemporaryFile("w") as file:
        file.write(text)
        file.flush()
        subprocess.run(["mount", "--bind", file.name, path], check=True)

dns = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
fcntl.ioctl(dns, SIOCSIFFLAGS, struct.pack("16sh", b"lo", IFF_UP))
dns.bind(("127.0.0.1", 53))
dns.set_inheritable(True)     # the command keeps it open, and never reads from it
os.execvp(sys.argv[1], sys.argv[1:])
