"""Any server: a process that is started, awaited, stopped, killed and paused.

    with running(Postgres(folder), RabbitMQ(folder)) as (postgres, rabbitmq):
        rabbitmq.kill()     # as a power cut would
        rabbitmq.start()    # the same port, the same data

Nothing outlives us: a guard, this very file as a second process, kills what is left.
That is why it imports only the standard library.
"""

import atexit
import glob
import http.client
import os
import random
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager, suppress
from pathlib import Path
from types import MappingProxyType

TOP = Path(__file__).resolve().parents[2]
LOCAL = TOP / ".local"  # what make run keeps, and MailDev itself
ROOT = os.geteuid() == 0


# -- Any server ------------------------------------------------------------------------

class Server:
    """A process and its children, to be started, stopped, killed and paused as one."""

    stop_signal = signal.SIGTERM
    patience = 60     # seconds until it must answer
    user = MappingProxyType({})     # subprocess's arguments for running as someone else
    env = cwd = None  # None: ours
    log = None        # where stdout and stderr are appended; None: the terminal
    process = None
    address = "127.0.0.1"       # where it listens

    def __init__(self, folder):
        self.folder = Path(folder).resolve()
        self.folder.mkdir(parents=True, exist_ok=True)

    def start(self):
        """Returns when it really answers; RuntimeError with its last words if not."""
        self.launch()
        self.wait()

    def launch(self):
        """Only the first half of start(), so that several can come up side by side.

        In a session of its own: Ctrl-C in the terminal is for us, and we stop in order.
        """
        with open(self.log or os.devnull, "ab") as log:
            output = log if self.log else None
            self.process = subprocess.Popen(
                self.command(), stdin=subprocess.DEVNULL, stdout=output, stderr=output,
                env=self.env, cwd=self.cwd, start_new_session=True,
                **self.user)
        guard(self.process.pid)

    def wait(self):
        deadline = time.monotonic() + self.patience
        try:
            while not self.answers():
                if not self.alive() or time.monotonic() > deadline:
                    raise RuntimeError(f"{self.name} does not start:\n{self.tail()}")
                time.sleep(0.05)
        except BaseException:  # Ctrl-C too
            self.kill()
            raise

    def stop(self, seconds=30):
        """Ends it in order, after so many seconds by force; returns the exit code."""
        if self.alive():
            self.resume()
            self.process.send_signal(self.stop_signal)
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(seconds)
        self.kill()
        return self.process and self.process.returncode

    def kill(self):
        """SIGKILL to all of it, and to nothing else."""
        if self.alive():
            end(self.process.pid)
            self.process.wait()

    def pause(self):
        """SIGSTOP to all of it: connections stay open, and nobody answers on them."""
        freeze(self.process.pid)

    def resume(self):
        send(signal.SIGCONT, tree(self.process.pid))

    def alive(self):
        return self.process is not None and self.process.poll() is None

    def tail(self):
        return "".join(self.log.open().readlines()[-15:]) if self.log else ""

    def __enter__(self):
        self.start()
        return self

    def __exit__(self, *_):
        self.stop()


@contextmanager
def running(*servers):
    """Starts them side by side; stops them in the reverse order, whatever happens."""
    try:
        for server in servers:
            server.launch()
        for server in servers:
            server.wait()
        yield servers
    finally:
        for server in reversed(servers):
            server.stop()


# -- Processes -------------------------------------------------------------------------

def stat(pid):
    """State, parent and time of birth of a process; "Z", as of a dead one, if none."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return "Z", 0, 0
    return fields[0], int(fields[1]), int(fields[19])


def tree(pid):
    """Those of a process and its descendants that live, parents first."""
    children = {}
    for path in glob.glob("/proc/[0-9]*"):
        child = int(path[6:])
        state, parent, _ = stat(child)
        if state != "Z":
            children.setdefault(parent, []).append(child)
    pids = [pid] if stat(pid)[0] != "Z" else []
    for each in pids:
        pids += children.get(each, [])
    return pids


def send(number, pids):
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, number)


def freeze(pid):
    """SIGSTOP to the tree until there are no new branches; returns all of them.

    One thread takes the signal and stops the others. On a busy machine they go on until
    it is that thread's turn: 39 ms were seen. So this waits until all have stopped.
    """
    frozen = []
    while new := [each for each in tree(pid) if each not in frozen]:
        send(signal.SIGSTOP, new)
        frozen += new
        while not all(has_stopped(each) for each in new):
            time.sleep(0.001)
    return frozen


def has_stopped(pid):
    """Whether each of its threads is stopped, or dead."""
    with suppress(FileNotFoundError, ProcessLookupError):
        return all(path.read_text().rpartition(")")[2].split()[0] in "TtXZ"
                   for path in Path(f"/proc/{pid}/task").glob("*/stat"))
    return not Path(f"/proc/{pid}").exists()


def end(pid):
    """SIGKILL to the tree; returns when all of it is dead and its ports are free."""
    pids = freeze(pid)
    send(signal.SIGKILL, pids)
    while any(stat(each)[0] != "Z" for each in pids):
        time.sleep(0.01)


guards = []    # the one that we have, once it is needed


def guard(pid):
    """Hands a process to our guard, which kills it when we end, even by SIGKILL.

    The guard is this file as a second process; it notices our end by its input's.
    """
    if not guards:
        guards.append(subprocess.Popen(
            [sys.executable, "-I", __file__], stdin=subprocess.PIPE,
            start_new_session=True))
        atexit.register(guards[0].communicate)
    guards[0].stdin.write(b"%d\n" % pid)
    guards[0].stdin.flush()


def be_the_guard():
    births = {int(line): stat(int(line))[2] for line in sys.stdin}
    for pid, birth in births.items():
        if stat(pid)[2] == birth:  # and not another's, who was given its id
            end(pid)


def run(command, **options):
    """What a command prints; RuntimeError with its complaint if it fails."""
    done = subprocess.run(command, check=False, capture_output=True, text=True,
                          **options)
    if done.returncode:
        raise RuntimeError(f"{command[0]}: {(done.stderr or done.stdout).strip()}")
    return done.stdout.strip()


def interrupt(*_):
    """Ctrl-C or SIGTERM: all is stopped in order, which a second one cannot disturb."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise KeyboardInterrupt


# -- Ports -----------------------------------------------------------------------------

def taken(port):
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        with suppress(OSError):
            listener.bind(("127.0.0.1", port))
            return False
        return True


blocks, ports = [], []    # those that are ours: see free_port()


def free_port():
    """A port that nobody else is given, in any process that asks here: who binds the
    first port of a hundred has the others.

    They are below the ephemeral ones: of those, a client's connection could be given a
    server's port while that is down, and keep it from coming back.
    """
    while not ports:
        first, block = random.randrange(20000, 32000, 100), socket.socket()
        with suppress(OSError):
            block.bind(("127.0.0.1", first))
            ports.extend(range(first + 1, first + 100))
            blocks.append(block)
    port = ports.pop()
    return free_port() if taken(port) else port


def says(port, greeting=b"", address="127.0.0.1"):
    """Whether a server says anything, to our greeting or without."""
    with suppress(OSError), socket.create_connection((address, port), 5) as server:
        server.sendall(greeting)
        return server.recv(1) != b""


def responds(port, path="/"):
    """Whether an HTTP server gives an answer, whichever it is."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    with suppress(OSError, http.client.HTTPException):
        connection.request("GET", path)
        return connection.getresponse().status


if __name__ == "__main__":
    be_the_guard()
