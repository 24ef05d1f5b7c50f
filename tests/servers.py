"""Starts a private PostgreSQL, RabbitMQ and MailDev, and the program beside them.

`make run` runs this file; the tests import it. All of it listens on 127.0.0.1 only,
keeps its data below a folder of the caller's, and leaves alone what the system runs.

    with running(Postgres(folder), RabbitMQ(folder)) as (postgres, rabbitmq):
        rabbitmq.kill()     # as a power cut would
        rabbitmq.start()    # the same port, the same data

Read Server, what all of them can do, then each of them, then install_missing and run.
Only for Linux (/proc), and only the standard library, until run().
"""

import atexit
import glob
import hashlib
import http.client
import json
import os
import random
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager, suppress
from pathlib import Path

TOP = Path(__file__).resolve().parent.parent
LOCAL = TOP / ".local"  # what make run keeps, and MailDev itself
MAILDEV = "2.2.1"
ROOT = os.geteuid() == 0


# -- Any server ------------------------------------------------------------------------

class Server:
    """A process and its children, to be started, stopped, killed and paused as one."""

    stop_signal = signal.SIGTERM
    patience = 60     # seconds until it must answer
    user = {}         # subprocess's arguments for running as someone else
    env = cwd = None  # None: ours
    log = None        # where stdout and stderr are appended; None: the terminal
    process = None

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


# -- The three servers -----------------------------------------------------------------

class Postgres(Server):
    """With an empty database `registration`, and a superuser of that name."""

    name = "PostgreSQL"
    stop_signal = signal.SIGINT  # does not wait until the clients have left
    env = {"PATH": os.defpath, "LANG": "C.UTF-8"}

    def __init__(self, folder, port=None):
        super().__init__(folder)
        self.port = port or free_port()
        self.url = f"postgresql://registration@127.0.0.1:{self.port}/registration"
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
                "-c", "listen_addresses=127.0.0.1", "-c", "unix_socket_directories="]

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

    def psql(self, sql):
        """What psql prints for any number of statements, bare."""
        return run([find("psql"), "-XqAt", "-v", "ON_ERROR_STOP=1", self.url],
                   input=sql)


class RabbitMQ(Server):
    """A node of its own; 3.5 to 6 seconds until it answers, on two busy cores.

    kill() within the first second after a quorum queue was declared can break that
    queue for good: RabbitMQ notes its name on the disk only about a second later.
    """

    name = "RabbitMQ"

    def __init__(self, folder, port=None):
        super().__init__(Path(folder, "rabbitmq"))
        self.port = port or free_port()
        self.url = f"amqp://guest:guest@127.0.0.1:{self.port}//"
        self.log = self.folder / "rabbitmq.log"
        self.cwd = self.folder
        self.env = {
            "PATH": os.environ.get("PATH", os.defpath),
            "LANG": "C.UTF-8",
            "HOME": str(self.folder),  # its own Erlang cookie
            "ERL_EPMD_PORT": str(free_port()),
            "ERL_EPMD_ADDRESS": "127.0.0.1",
            "RABBITMQ_NODENAME": "registration@localhost",
            "RABBITMQ_NODE_IP_ADDRESS": "127.0.0.1",
            "RABBITMQ_NODE_PORT": str(self.port),
            "RABBITMQ_DIST_PORT": str(free_port()),
            # The second half: idle schedulers sleep, and leave the cores to the others.
            "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS":
                "-kernel inet_dist_use_interface {127,0,0,1} "
                "+sbwt none +sbwtdcpu none +sbwtdio none",
            "RABBITMQ_MNESIA_BASE": str(self.folder),
            "RABBITMQ_LOG_BASE": str(self.folder),
            "RABBITMQ_LOGS": "-",
            # None of the system's settings; these files need not exist.
            "RABBITMQ_CONF_ENV_FILE": os.devnull,
            "RABBITMQ_CONFIG_FILE": str(self.folder / "rabbitmq.conf"),
            "RABBITMQ_ADVANCED_CONFIG_FILE": str(self.folder / "advanced.config"),
            "RABBITMQ_ENABLED_PLUGINS_FILE": str(self.folder / "enabled_plugins"),
            "RABBITMQ_PID_FILE": str(self.folder / "pid"),
            # The script becomes Erlang, instead of standing between it and our signals.
            "RUNNING_UNDER_SYSTEMD": "true"}

    def command(self):
        # epmd, Erlang's name server, comes first: Erlang would start one that outlives
        # it. This one is the broker's child, and ends with it, however that ends.
        return ["sh", "-c", 'setpriv --pdeathsig KILL "$0" & '
                            'until "$0" -names >/dev/null 2>&1; do :; done; exec "$1"',
                find("epmd"), find("rabbitmq-server")]

    def answers(self):
        return says(self.port, b"AMQP\0\0\x09\x01")  # it listens when all else is ready

    def ctl(self, *arguments):
        """What rabbitmqctl prints for this node."""
        return run([find("rabbitmqctl"), "-q", *arguments],
                   env=self.env, cwd=self.folder)


class MailDev(Server):
    name = "MailDev"

    def __init__(self, folder, smtp_port=None, web_port=None):
        super().__init__(folder)
        self.smtp_port = smtp_port or free_port()
        self.web_port = web_port or free_port()
        self.web_url = f"http://127.0.0.1:{self.web_port}"
        self.log = self.folder / "maildev.log"

    def command(self):
        return [find("node"), LOCAL / "maildev/node_modules/.bin/maildev",
                "--ip", "127.0.0.1", "--smtp", str(self.smtp_port),
                "--web", str(self.web_port), "--mail-directory", self.folder / "mail"]

    def answers(self):
        return responds(self.web_port) and says(self.smtp_port)


# -- The program -----------------------------------------------------------------------

class Program(Server):
    """A process of the program, with exactly the given settings: no .env is read."""

    cwd = TOP
    python = sys.executable

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
    """SIGSTOP to the tree until there are no new branches; returns all of them."""
    frozen = []
    while new := [each for each in tree(pid) if each not in frozen]:
        send(signal.SIGSTOP, new)
        frozen += new
    return frozen


def end(pid):
    """SIGKILL to the tree; returns when all of it is dead and its ports are free."""
    pids = freeze(pid)
    send(signal.SIGKILL, pids)
    while any(stat(each)[0] != "Z" for each in pids):
        time.sleep(0.01)


def guard(pid, guards=[]):
    """Hands a process to our guard, which kills it when we end, even by SIGKILL.

    The guard is this file as a second process; it notices our end by its input's.
    """
    if not guards:
        guards.append(subprocess.Popen(
            [sys.executable, "-I", __file__, "guard"], stdin=subprocess.PIPE,
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
    done = subprocess.run(command, capture_output=True, text=True, **options)
    if done.returncode:
        raise RuntimeError(f"{command[0]}: {(done.stderr or done.stdout).strip()}")
    return done.stdout.strip()


# -- Ports -----------------------------------------------------------------------------

def taken(port):
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        with suppress(OSError):
            listener.bind(("127.0.0.1", port))
            return False
        return True


def free_port(given=set()):
    """A port below the ephemeral ones: of those, a client's connection could be given
    a server's port while that is down, and keep it from coming back."""
    while (port := random.randrange(20000, 32000)) in given or taken(port):
        pass
    given.add(port)
    return port


def says(port, greeting=b""):
    """Whether a server says anything, to our greeting or without."""
    with suppress(OSError), socket.create_connection(("127.0.0.1", port), 5) as server:
        server.sendall(greeting)
        return server.recv(1) != b""


def responds(port, path="/"):
    """Whether an HTTP server gives an answer, whichever it is."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    with suppress(OSError, http.client.HTTPException):
        connection.request("GET", path)
        return connection.getresponse().status


# -- Installing what is missing --------------------------------------------------------

PACKAGES = {  # program: package of Debian
    Postgres: {"initdb": "postgresql"},
    RabbitMQ: {"rabbitmq-server": "rabbitmq-server"},
    MailDev: {"node": "nodejs", "npm": "npm"}}


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


def install_missing(servers=(Postgres, RabbitMQ, MailDev)):
    """Installs what these servers need, if we may; else exits, saying what to do."""
    missing = {package: server.name for server in servers
               for program, package in PACKAGES[server].items() if not find(program)}
    packages, names = " ".join(missing), ", ".join(dict.fromkeys(missing.values()))
    if missing and not (ROOT and find("apt-get")):
        sys.exit(f"missing for {names}: sudo apt-get install {packages}")
    if missing:
        print(f"installing {packages} ...", flush=True)
        with services_kept_from_starting():
            apt_get("update")
            apt_get("install", "--no-install-recommends", *missing)
    if MailDev in servers and not maildev_is_installed():
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


# -- make run --------------------------------------------------------------------------

WELCOME = """
API   http://localhost:8000/
docs  http://localhost:8000/docs/
mail  {mail}

curl -i http://localhost:8000/users/register -H 'Content-Type: application/json' \\
     -d '{{"email": "ann@example.com", "password": "correct horse battery"}}'
"""


def main():
    """Everything, until Ctrl-C; returns what went wrong otherwise."""
    from dotenv import load_dotenv

    load_dotenv(TOP / ".env")
    setting = {Postgres: "DATABASE_URL", RabbitMQ: "BROKER_URL", MailDev: "SMTP_HOST"}
    private = [server for server in setting if not os.environ.get(setting[server])]
    for port in [8000, 1025, 1080] if MailDev in private else [8000]:
        if taken(port):
            return f"port {port} is taken: something else listens there"

    install_missing(private)
    LOCAL.mkdir(exist_ok=True)
    env = dict(os.environ)
    env["SECRET_KEY"] = env.get("SECRET_KEY") or kept_secret()
    env["MAIL_FROM"] = env.get("MAIL_FROM") or "registration@example.com"
    servers = []
    if Postgres in private:
        servers.append(postgres := Postgres(LOCAL))
        env["DATABASE_URL"] = postgres.url
    if RabbitMQ in private:
        servers.append(rabbitmq := RabbitMQ(LOCAL))
        env["BROKER_URL"] = rabbitmq.url
    if MailDev in private:
        servers.append(MailDev(LOCAL, 1025, 1080))
        env |= {"SMTP_HOST": "127.0.0.1", "SMTP_PORT": "1025"}

    program = Gunicorn(LOCAL, env, 8000), Consumer(LOCAL, env)
    for process in program:
        process.log = None
    with running(*servers):
        if Postgres in private and not postgres.psql("SELECT to_regclass('users')"):
            postgres.psql((TOP / "sql/schema.sql").read_text())
        with running(*program):
            mail = "http://localhost:1080/" if MailDev in private else env["SMTP_HOST"]
            print(WELCOME.format(mail=mail), flush=True)
            os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOWAIT)  # until one of them ends
            ended = [each.name for each in (*program, *servers) if not each.alive()]
            return f"{' and '.join(ended)} ended by itself, so all is stopped"


def kept_secret():
    """The same in every run, or the codes of the last one would be void."""
    path = LOCAL / "secret_key"
    if not path.exists():
        path.touch(mode=0o600)
        path.write_text(secrets.token_urlsafe(32))
    return path.read_text()


def interrupt(*_):
    """Ctrl-C or SIGTERM: all is stopped in order, which a second one cannot disturb."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise KeyboardInterrupt


if __name__ == "__main__":
    if sys.argv[1:] == ["guard"]:
        sys.exit(be_the_guard())
    signal.signal(signal.SIGINT, interrupt)
    signal.signal(signal.SIGTERM, interrupt)
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(0)
    except RuntimeError as error:
        sys.exit(str(error))
