"""A network of our own: machines in network namespaces, each on a wire that can fail.

    network = Network()                 # this process is on its first machine
    database = network.machine("database.test")
    with database:
        subprocess.run(...)             # it runs on that machine, and stays there
    with database.wire.failing(loss=0.3):
        ...

A machine has an address in 10.9.0.0/24, and 127.0.0.1 for itself alone. The switch
between them is a thread of ours: it carries packets from one TUN device to another. The
kernel's netem could delay and lose packets as well, but not every kernel has it. A DNS
server, on a machine of its own, knows their names. All of it is gone when we end.

Only for root on Linux, with /dev/net/tun.
"""

import ctypes
import fcntl
import heapq
import itertools
import os
import random
import select
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import contextmanager, suppress
from pathlib import Path

from servers.install import install_missing
from servers.process import ROOT, run

CLONE_NEWNS, CLONE_NEWNET = 0x00020000, 0x40000000
TUNSETIFF, IFF_TUN, IFF_NO_PI = 0x400454CA, 0x0001, 0x1000
IPV4, TCP = 4, 6     # of an IP header


def system_call(name, *arguments):
    """unshare() or setns(), which Python has from 3.12 on."""
    libc = ctypes.CDLL(None, use_errno=True)
    if getattr(libc, name)(*arguments):
        error = ctypes.get_errno()
        raise OSError(error, f"{name}: {os.strerror(error)}")


def own_mounts():
    """From now on, only this thread and what it starts see what we mount."""
    system_call("unshare", CLONE_NEWNS)
    run(["mount", "--make-rprivate", "/"])


# -- Machines --------------------------------------------------------------------------


class Network:
    """The machines, by name, and the switch between them."""

    def __init__(self):
        if not ROOT:
            sys.exit("network namespaces: only root can make them")
        install_missing("network")
        self.machines = {}      # by name
        try:
            own_mounts()
            self.machine("here.test").enter()
            self.dns = self.machine("dns.test")
        except OSError as error:
            sys.exit(f"network namespaces cannot be made here: {error}")
        threading.Thread(target=self.carry, daemon=True).start()
        with self.dns:
            questions = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
            questions.bind((self.dns.address, 53))
        threading.Thread(target=self.resolve, args=[questions], daemon=True).start()
        mount_over("/etc/resolv.conf", f"nameserver {self.dns.address}\n")
        mount_over("/etc/nsswitch.conf", "hosts: files dns\n")

    def machine(self, name):
        machine = Machine(f"10.9.0.{len(self.machines) + 1}")
        self.machines[name] = machine
        return machine

    def carry(self):
        """The switch: takes packets off the wires, and puts them on others in time."""
        order, late = itertools.count(), []     # late: (when, order, wire, packet)
        while True:
            machines = self.machines.copy().values()
            by_device = {machine.wire.device: machine.wire for machine in machines}
            by_address = {socket.inet_aton(machine.address): machine.wire
                          for machine in machines}
            seconds = max(0, late[0][0] - time.monotonic()) if late else 0.1
            for device in select.select(by_device, [], [], min(seconds, 0.1))[0]:
                packet = os.read(device, 65536)
                target = by_address.get(packet[16:20])
                if packet[0] >> 4 != IPV4 or not target:
                    continue
                source = by_device[device]
                if source.passes(packet, "out") and target.passes(packet, "in"):
                    when = time.monotonic() + source.seconds + target.seconds
                    heapq.heappush(late, (when, next(order), target, packet))
            while late and late[0][0] <= time.monotonic():
                _, _, target, packet = heapq.heappop(late)
                with suppress(OSError):     # that machine's link is down
                    os.write(target.device, packet)

    def resolve(self, questions):
        """The DNS server: an address for a name that it knows, else none."""
        while True:
            query, asker = questions.recvfrom(512)
            end = query.index(b"\0", 12)
            labels, kind = [], query[end + 1:end + 3]
            position = 12
            while position < end:
                length = query[position]
                labels.append(query[position + 1:position + 1 + length].decode())
                position += 1 + length
            machine = self.machines.get(".".join(labels).lower())
            answers = [] if kind != b"\0\1" or not machine else [
                b"\xc0\x0c\0\1\0\1\0\0\0\0\0\4" + socket.inet_aton(machine.address)]
            header = query[:2] + struct.pack(
                ">HHHHH", 0x8580 if machine else 0x8583, 1, len(answers), 0, 0)
            questions.sendto(header + query[12:end + 5] + b"".join(answers), asker)


class Machine:
    """A network namespace. What a thread starts in its block runs there."""

    def __init__(self, address):
        self.address, self.before = address, []
        here = this_namespace()
        system_call("unshare", CLONE_NEWNET)
        self.namespace = this_namespace()
        device = os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC)
        fcntl.ioctl(device, TUNSETIFF, struct.pack("16sH22x", b"wire",
                                                   IFF_TUN | IFF_NO_PI))
        for command in ("link set lo up", f"address add {address}/24 dev wire",
                        "link set wire up"):
            run(["ip", *command.split()])
        system_call("setns", here, CLONE_NEWNET)
        os.close(here)
        self.wire = Wire(device)

    def enter(self):
        system_call("setns", self.namespace, CLONE_NEWNET)

    def __enter__(self):
        self.before.append(this_namespace())
        self.enter()

    def __exit__(self, *_):
        before = self.before.pop()
        system_call("setns", before, CLONE_NEWNET)
        os.close(before)

    @contextmanager
    def link_down(self):
        """As if its cable were pulled, and it knew."""
        with self:
            run(["ip", "link", "set", "wire", "down"])
        try:
            yield
        finally:
            with self:
                run(["ip", "link", "set", "wire", "up"])


def this_namespace():
    return os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)


def mount_over(path, text):
    """Puts another file over one of the system's, for us and what we start."""
    with tempfile.NamedTemporaryFile("w") as file:
        file.write(text)
        file.flush()
        Path(file.name).chmod(0o644)
        subprocess.run(["mount", "--bind", file.name, path], check=True)


# -- Wires -----------------------------------------------------------------------------


class Wire:
    """Between a machine and the switch. It carries everything, at once, if well.

    loss     the share of packets that are lost in each direction, 0 to 1
    drops    directions in which all of them are: "in" to the machine, "out" of it
    seconds  how late each packet is, in each direction
    """

    def __init__(self, device):
        self.device = device
        self.loss, self.drops, self.seconds = 0, (), 0
        self.seen, self.forgotten = set(), set()    # TCP connections

    @contextmanager
    def failing(self, **changes):
        before = {name: getattr(self, name) for name in changes}
        vars(self).update(changes)
        try:
            yield
        finally:
            vars(self).update(before)

    def forget(self):
        """As a NAT or a firewall forgets connections: what they send goes nowhere."""
        self.forgotten |= self.seen

    def passes(self, packet, direction):
        """Whether a packet comes through in its direction."""
        if packet[9] == TCP:
            ports = 4 * (packet[0] & 15)
            connection = frozenset([packet[12:16] + packet[ports:ports + 2],
                                    packet[16:20] + packet[ports + 2:ports + 4]])
            self.seen.add(connection)
            if connection in self.forgotten:
                return False
        return direction not in self.drops and random.random() >= self.loss
