"""The process that holds throw-away hosts: run as a script by ``sshhosts.hosts``, as root, standard library only.

It reads one JSON description of the hosts from its standard input, makes them, answers with one JSON line, and then
serves requests (one JSON line each) until its input ends or it is told to terminate. The first process of every host
dies with this process, and all others of the host with the first, so that nothing survives, however this one ends.
"""

import contextlib
import glob
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import time

# It runs isolated (-I), which leaves its own directory out.
sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
from furniture import check, furnish, libc

CLONE_NEWNS = 0x00020000
CLONE_NEWUTS = 0x04000000
CLONE_NEWIPC = 0x08000000
CLONE_NEWPID = 0x20000000
CLONE_NEWNET = 0x40000000
PR_SET_PDEATHSIG = 1

START_DEADLINE = 20.0  # seconds for all hosts together, on a busy machine


def unshare(flags):
    check(libc.unshare(flags), "unshare")


def ip_batch(lines, netns=None, program="ip"):
    """Run several ``ip`` commands in one process, in the network namespace ``netns`` (a file descriptor) if given."""
    if not lines:
        return
    enter = None if netns is None else lambda: check(libc.setns(netns, CLONE_NEWNET), "setns")
    outcome = subprocess.run(
        [program, "-batch", "-"],
        input="\n".join(lines) + "\n",
        text=True,
        capture_output=True,
        preexec_fn=enter,
        check=False,
    )
    if outcome.returncode != 0:
        raise OSError(
            f"{program} failed: {outcome.stderr.strip() or outcome.stdout.strip()}; the commands were: {lines}"
        )


def mac_of(address):
    return "02:4c:" + ":".join(f"{int(part):02x}" for part in address.split("."))


class Host:
    """One host: the process that becomes its first one, and how it is wired."""

    def __init__(self, spec):
        self.spec = spec
        self.pid = 0
        self.go = -1

    def fork(self, own_pid_namespace):
        """Start the first process of the host; it waits for its network before it starts sshd."""
        read, write_end = os.pipe()
        unshare(CLONE_NEWPID)
        pid = os.fork()
        if pid == 0:
            try:
                os.close(write_end)
                init(self.spec, read)
            except BaseException as error:  # noqa: BLE001 - the only way to tell the parent is the log
                os.write(2, f"host {self.spec['name']}: {error!r}\n".encode())
            finally:
                os._exit(1)
        # Children of this process must be ordinary again until the next host.
        check(libc.setns(own_pid_namespace, CLONE_NEWPID), "setns")
        os.close(read)
        self.pid, self.go = pid, write_end

    def unshared(self):
        """Whether the host's first process has its own network namespace already."""
        try:
            return os.readlink(f"/proc/{self.pid}/ns/net") != os.readlink("/proc/self/ns/net")
        except FileNotFoundError:
            self.raise_if_ended()
            return False

    def raise_if_ended(self):
        """Raise when the first process has ended."""
        if os.waitpid(self.pid, os.WNOHANG)[0]:
            raise ChildProcessError(f"host {self.spec['name']} ended while it started")

    def links(self):
        """``ip`` commands that join the host to its bridges, to be run in the switch's namespace."""
        lines = []
        for number, interface in enumerate(self.spec["interfaces"]):
            port = f"{self.spec['name'][:10]}-{number}"
            mac = mac_of(interface["address"])
            peer = f"peer name eth{number} address {mac} netns {self.pid}"
            lines.append(f"link add name {port} type veth {peer}")
            lines.append(f"link set dev {port} master {interface['bridge']}")
            lines.append(f"link set dev {port} up")
        return lines

    def answers(self):
        """``ip`` and ``bridge`` commands, once all are joined, for a switch that answers who has the host's address."""
        lines, forwarded = [], []
        for number, interface in enumerate([] if self.spec["flooding"] else self.spec["interfaces"]):
            address, port = interface["address"], f"{self.spec['name'][:10]}-{number}"
            lines.append(f"neigh replace {address} lladdr {mac_of(address)} dev {interface['bridge']} nud permanent")
            lines.append(f"link set dev {port} type bridge_slave proxy_arp on")
            forwarded.append(f"fdb replace {mac_of(address)} dev {port} master static")
        return lines, forwarded

    def neighbours(self, interface):
        """``ip`` commands that make the host known to the manager, whose port is given.

        Nobody is asked for the host's address on the wire then: one that is off is a time-out, as behind any
        router, and one that is back is found at once.
        """
        front = [entry["address"] for entry in self.spec["interfaces"] if entry["bridge"] == "front"]
        return [f"neigh replace {address} lladdr {mac_of(address)} dev {interface} nud permanent" for address in front]

    def release(self):
        os.write(self.go, b"1")
        os.close(self.go)

    def listening(self):
        """Whether sshd listens; raises when the first process has ended."""
        wanted = f":{self.spec['port']:04X} "
        try:
            with open(f"/proc/{self.pid}/net/tcp") as table:
                if any(wanted in line and " 0A " in line for line in table):
                    return True
        except OSError:
            pass
        self.raise_if_ended()
        return False


def init(spec, go):
    """The life of a host's first process."""
    check(libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL), "prctl")
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.setsid()
    unshare(CLONE_NEWNET | CLONE_NEWNS | CLONE_NEWUTS | CLONE_NEWIPC)
    hostname = spec["hostname"].encode()
    check(libc.sethostname(hostname, len(hostname)), "sethostname")
    furnish(spec)
    if not os.read(go, 1):
        return
    os.close(go)
    lines = ["link set dev lo up"]
    for number, interface in enumerate(spec["interfaces"]):
        lines.append(f"addr add {interface['address']}/24 dev eth{number}")
        lines.append(f"link set dev eth{number} up")
    ip_batch(lines)
    sshd = subprocess.Popen(
        [spec["sshd"], "-D", "-f", "/run/host/sshd_config", "-E", "/run/host/sshd.log"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"},
    )
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 0)
    os.dup2(null, 1)
    os.closerange(3, 1024)
    reap(sshd.pid)


def reap(sshd):
    """Do what a first process does. An sshd that ends before it has listened ends the host, and says why."""
    # Else it is lost when there is no child, as after a restart of sshd, and one comes and ends.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD})
    while True:
        try:
            ended, _ = os.wait()
        except ChildProcessError:
            signal.sigwait({signal.SIGCHLD})
            continue
        if ended == sshd:
            with open("/run/host/sshd.log") as log:
                said = log.read()
            if "Server listening" not in said:
                raise OSError(f"sshd did not start: {said.strip()}")


class Supervisor:
    def __init__(self, spec):
        self.spec = spec
        self.hosts = {}
        self.manager_netns = os.open("/proc/self/ns/net", os.O_RDONLY)
        self.own_pid_namespace = os.open("/proc/self/ns/pid", os.O_RDONLY)
        self.manager_port = ""
        self.subnet = 0

    def make_switch(self):
        """A namespace for the bridges, and the manager's port on the first of them."""
        unshare(CLONE_NEWNET)
        for filtered in glob.glob("/proc/sys/net/bridge/bridge-nf-call-*"):
            # A switch has no firewall, and 200 hosts ask each other for their addresses.
            with contextlib.suppress(OSError), open(filtered, "w") as file:
                file.write("0")
        lines = ["link set dev lo up"]
        for bridge in self.spec["bridges"]:
            lines += [f"link add name {bridge} type bridge forward_delay 0", f"link set dev {bridge} up"]
        ip_batch(lines)
        pid = self.spec["manager_pid"]
        for number in range(250):
            self.manager_port = f"lzhosts{number}"
            add = f"link add name manager type veth peer name {self.manager_port} netns {pid}"
            try:
                ip_batch([add])
            except OSError as error:
                if "exists" not in str(error):
                    raise
                continue
            self.subnet = number
            break
        else:
            raise OSError("no free subnet in 198.18.0.0/16: too many sets of hosts are up (scripts/hosts status)")
        ip_batch([f"link set dev manager master {self.spec['bridges'][0]}", "link set dev manager up"])
        ip_batch(
            [f"addr add 198.18.{number}.1/24 dev {self.manager_port}", f"link set dev {self.manager_port} up"],
            self.manager_netns,
        )

    def start(self, specs):
        hosts = [Host(self.complete(spec)) for spec in specs]
        for host in hosts:
            host.fork(self.own_pid_namespace)
            self.hosts[host.spec["name"]] = host
        deadline = time.monotonic() + START_DEADLINE
        wait_for(lambda: all(host.unshared() for host in hosts), deadline, "the hosts' namespaces")
        lines = [line for host in hosts for line in host.links()]
        answers = [host.answers() for host in hosts]
        ip_batch([*lines, *(line for lines, _ in answers for line in lines)])
        ip_batch([line for _, lines in answers for line in lines], program="bridge")
        known = [line for host in hosts for line in host.neighbours(self.manager_port)]
        ip_batch(known, self.manager_netns)
        for host in hosts:
            host.release()
        waiting = set(hosts)

        def all_listen():
            waiting.difference_update([host for host in waiting if host.listening()])
            return not waiting

        wait_for(all_listen, deadline, "the hosts' sshd")
        return {
            "hosts": {host.spec["name"]: host.pid for host in hosts},
            "subnet": self.subnet,
            "interface": self.manager_port,
            "pid": os.getpid(),
        }

    def complete(self, spec):
        for interface in spec["interfaces"]:
            interface["address"] = interface["address"].replace("SUBNET", str(self.subnet))
        mode, text = spec["files"]["hosts"]
        spec["files"]["hosts"] = (mode, text.replace("SUBNET", str(self.subnet)))
        return spec

    def stop(self, name):
        """Power a host off: first its network, so that it says good-bye to no one, then all its processes."""
        host = self.hosts.pop(name)
        # Deleted, not put down: the kernel would delete them some time later, and the names may be needed.
        ip_batch([f"link del dev {name[:10]}-{number}" for number in range(len(host.spec["interfaces"]))])
        os.kill(host.pid, signal.SIGKILL)
        os.waitpid(host.pid, 0)
        return {}

    def serve(self, keep):
        """Answer requests until the input ends (``keep``: until a signal comes)."""
        buffer = b""
        sources = [] if keep else [0]
        while True:
            if not select.select(sources, [], [])[0]:
                continue
            data = os.read(0, 65536)
            if not data:
                return
            buffer += data
            while b"\n" in buffer:
                line, buffer = buffer.split(b"\n", 1)
                answer(self.handle, json.loads(line))

    def handle(self, request):
        if "stop" in request:
            return self.stop(request["stop"])
        return self.start(request["start"])

    def close(self):
        for host in self.hosts.values():
            try:
                os.kill(host.pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        for host in self.hosts.values():
            try:
                os.waitpid(host.pid, 0)
            except ChildProcessError:
                continue
        if self.manager_port:
            subprocess.run(["ip", "link", "del", "dev", "manager"], capture_output=True, check=False)
        shutil.rmtree(self.spec["directory"], ignore_errors=True)


def wait_for(condition, deadline, what):
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what} were not there within {START_DEADLINE:.0f} s")
        time.sleep(0.002)


def answer(handler, request):
    try:
        reply = handler(request)
    except (OSError, KeyError) as error:
        reply = {"error": f"{type(error).__name__}: {error}"}
    say(reply)


def say(reply):
    os.write(1, json.dumps(reply).encode() + b"\n")


def main():
    keep = "--keep" in sys.argv
    with open(0, closefd=False) as source:
        spec = json.loads(source.readline())
    os.setsid()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    supervisor = Supervisor(spec)
    try:
        supervisor.make_switch()
        answer(lambda request: supervisor.start(request["hosts"]), spec)
        supervisor.serve(keep)
    except OSError as error:
        say({"error": f"{type(error).__name__}: {error}"})
    finally:
        supervisor.close()


if __name__ == "__main__":
    main()
