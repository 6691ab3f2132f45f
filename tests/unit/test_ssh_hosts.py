"""Reading the hosts of an ssh configuration."""

from __future__ import annotations

import asyncio
import codecs
import getpass
import os
import subprocess

import pytest

from lazycluster.ssh.config import Settings
from lazycluster.ssh.config_hosts import _HostBlock, configured_hosts
from lazycluster.ssh.config_text import option_values
from lazycluster.ssh.connect_limit import ConnectLimit, jump_key


@pytest.fixture
def write(tmp_path):
    def write(text, name="config"):
        path = tmp_path / name
        path.write_text(text.replace("{here}", str(tmp_path)))
        return path

    return write


def names(path):
    return [host.name for host in configured_hosts(path) if not host.skipped]


def why(path):
    return {host.name: host.skipped for host in configured_hosts(path) if host.skipped}


def test_names_in_all_ways_to_write_them(write):
    path = write("# one\nHost a b\n HostName 1.2.3.4\nhost=c\nHOST = \"d\" 'e' # f\nHost a\n\tHost g\n")
    assert names(path) == ["a", "b", "c", "d", "e", "g"]
    first = configured_hosts(path)[0]
    assert (first.hostname, first.place) == ("1.2.3.4", f"{path}:2")


def test_patterns_services_and_hostile_names_are_skipped_with_the_reason(write):
    path = write('Host *.org w? !x y\nHost github.com\n User git\nHost -evil "a b"\nHost z\n')
    assert names(path) == ["y", "z"]
    reasons = why(path)
    assert "pattern" in reasons["*.org"]
    assert "pattern" in reasons["w?"]
    assert "pattern" in reasons["!x"]
    assert "git" in reasons["github.com"]
    assert "-" in reasons["-evil"]
    assert "' '" in reasons["a b"]


def test_the_first_value_of_all_blocks_counts(write):
    path = write("Host a\n User me\nHost a b c !b\n User git\nHost b\nHost *\n User git\n")
    assert names(path) == ["a"]


def test_jump_hosts_are_skipped(write):
    path = write(
        "Host w1 w2\n ProxyJump me@gate:22,ssh://second\nHost gate second third fourth byname\n"
        "Host w3\n ProxyCommand ssh -q -W %h:%p third\nHost *.inner\n ProxyJump fourth\n"
        "Host byname\n HostName 10.0.0.9\nMatch user x\n ProxyJump 10.0.0.9\nHost w4\n ProxyJump none\n"
    )
    assert names(path) == ["w1", "w2", "w3", "w4"]
    assert "w1 w2" in why(path)["gate"]


def test_includes(write, tmp_path, caplog):
    write("Host i1\n", "a.conf")
    write("Host i2 other\n User git\n", "b.conf")
    (tmp_path / "folder").mkdir()
    path = write(
        "Include {here}/a.* {here}/none\nHost i2\n Include {here}/b.conf\nMatch all\nInclude {here}/folder\n"
        'Match exec "false"\n Include {here}/b.conf\nHost last\n'
    )
    assert names(path) == ["i1", "last"]
    assert list(why(path)) == ["i2"]
    assert "folder" in caplog.text


def test_endless_includes_end(write, caplog):
    path = write("Host a\nHost *\nInclude {here}/config\n")
    assert names(path) == ["a"]
    assert "nested too deeply" in caplog.text


ACCEPTED = {
    "home of nobody": b"Include ~nosuchuser/*\nInclude ~nosuchuser\nInclude ~nosuchuser/a ~nosuchuser/b\n",
    "home of nobody, quoted": b'Include "~nosuchuser/a b" ~/nothing/*\n',
    "bad globs": b"Include {here}/[ {here}/[!] {here}/[z-a]* {here}/**none {here}/*/../*/*.none\n",
    "a name that is too long": b"Include {here}/" + b"x" * 3000 + b"/*\n",
    "many stars": b"Match host " + b"*a" * 40 + b"z\nHost " + b"*a" * 40 + b"z\nHost *\n",
    "a folder": b"Include {here}/folder {here}/folder/*\n",
    "a link to itself": b"Include {here}/loop/* {here}/*/loop\n",
    "a file that is none": b"Include {here}/folder/../config.none\n",
    "bytes that are no text": b"# \xff\xfe\x80\n  User \xff\xfe\n",
    "a null character": b"# \0\nInclude {here}/none\0*\nUser me\0you\n",
    "what ends lines elsewhere": "# a\x0cHost b\x0bHost c\x1cHost d\x85Host e\u2028Host f\rHost g\n".encode(),
    "a long line": b"# " + b"x" * 200_000 + b"\nUser m" + b" " * 60_000 + b"\n",
    "brackets": b"Host [a-z] a[ {x}\nHost *\n",
}


@pytest.mark.parametrize("text", ACCEPTED.values(), ids=ACCEPTED)
def test_what_ssh_accepts_can_be_read(tmp_path, text):
    (tmp_path / "folder" / "inner").mkdir(parents=True)
    (tmp_path / "loop").symlink_to("loop")
    path = tmp_path / "config"
    path.write_bytes(b"Host a\n HostName 192.0.2.1\n" + text.replace(b"{here}", os.fsencode(tmp_path)) + b"Host a z\n")
    done = subprocess.run(["ssh", "-G", "-F", path, "a"], capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    assert [name for name in names(path) if not name.startswith(("[", "a[", "{"))] == ["a", "z"]
    assert asyncio.run(jump_key(Settings.parse("a", {"config_file": str(path)}))) == frozenset()


# Each text is read by ssh, too, which has to say the same of each host.
SAME = {
    "case": b"Host CASE\n User x\nHost case\n User y\nHost Case\nHost C*\n User z\n",
    "a match of names": b"Host a A b\nMatch host a,c\n User git\n"
    b"Match originalhost b,x !user git\n User git\nMatch all\n User z\n",
    "a match of the name that is meant": b"Host a\n HostName B.c\nHost d\n HostName %h.c\nMatch host b.c\n User git\n"
    b'Match !host "d.c,b.*"\n User n\nMatch originalhost D host=D.C\n User d\n',
    "a match that renames": b"Host a b\nMatch host a\n HostName c\n User git\nMatch host c\n Port 1\n User n\n",
    "a match of users": b"Host a\n User one\nHost b\nMatch user one localuser *\n HostName u\n"
    b"Match localuser none\n User x\n",
    "a match that a command decides": b"Host a\nMatch host a exec false\n User x\nMatch all\n User y\n",
    "blanks that are none": "Host a\xa0b\x0bc\u2028d\x85e\n User x\nHost a b c d e\n User y\xa0z # n\n".encode(),
    "line ends that are none": (
        "# a\u2028Host b\n# c\x85Host d\x0bHost e\x0cHost f\rHost g\nHost h \t\x0c\n User x\r\n".encode()
    ),
    "quotes": b'Host a"b"c d\'e\' #f\n User "x" # y\n"Host" g\nHost=h\n User = y\nHost "i" j\\"k\n',
    "negated": b"Host !a b c\n User x\nHost a b\n HostName z\nHost * !c\n User y\n",
}


@pytest.mark.parametrize("text", SAME.values(), ids=SAME)
def test_hosts_are_read_as_ssh_reads_them(tmp_path, text):
    path = tmp_path / "config"
    path.write_bytes(text)
    found = [host for host in configured_hosts(path) if host.skipped != "a pattern, not a host"]
    assert found
    for host in found:
        done = subprocess.run(["ssh", "-G", "-F", path, "--", host.name], capture_output=True, check=False)
        if b"invalid characters" in done.stderr:
            assert host.skipped
            continue
        assert done.returncode == 0, done.stderr
        means = {option: values[0] for option, values in option_values(done.stdout).items()}
        assert means["user"] == (host.user or getpass.getuser()), host
        hostname = (host.hostname or host.name).replace("%h", host.name)
        assert means["hostname"] == hostname.lower()
        assert host.skipped.startswith("its user is 'git'") == (host.user == "git"), host


def test_names_are_those_that_ssh_knows(tmp_path):
    path = tmp_path / "config"
    path.write_bytes(SAME["line ends that are none"])
    assert names(path) == ["h"]
    path.write_bytes(SAME["blanks that are none"])
    assert names(path) == ["a", "b", "c", "d", "e"]
    assert list(why(path)) == ["a\xa0b\x0bc\u2028d\x85e"]


def test_a_byte_order_mark_is_named(tmp_path, caplog):
    path = tmp_path / "my config"
    path.write_bytes(codecs.BOM_UTF8 + b"Host a\n User me\n")
    assert names(path) == ["a"]
    assert "byte order mark" in caplog.text
    command = caplog.text.partition("remove it with: ")[2].strip()
    subprocess.run(["sh", "-c", command], check=True)
    assert path.read_bytes() == b"Host a\n User me\n"


def test_thousands_of_hosts_are_read_in_one_pass(tmp_path, monkeypatch):
    path = tmp_path / "config"
    path.write_text("".join(f"Host n{n}\n HostName 10.0.0.{n % 250}\n User me\n" for n in range(5000)))
    asked = []
    held = _HostBlock.holds
    monkeypatch.setattr(_HostBlock, "holds", lambda *args: asked.append(args) or held(*args))
    assert len(names(path)) == 5000
    assert len(asked) <= 3 * 5000


def test_what_would_be_read_for_ever_is_given_up_as_by_ssh(write, caplog):
    for number in range(9):
        write("Host x\n", f"other{number}")
    path = write("Host a\nHost *\n Include {here}/*\nHost b\n")
    done = subprocess.run(["ssh", "-G", "-F", path, "a"], capture_output=True, check=False)
    assert b"Too many recursive" in done.stderr
    assert names(path) == ["a"]
    assert caplog.text.count("nested too deeply") == 1


def test_a_configuration_that_cannot_be_named(tmp_path, caplog):
    for path in ("~nosuchuser/config", tmp_path / "x\0y", tmp_path, tmp_path / "file" / "config"):
        (tmp_path / "file").touch()
        caplog.clear()
        assert configured_hosts(path) == []
        assert "not read" in caplog.text
        if "\0" not in str(path):
            with pytest.raises(ValueError, match="no readable file"):
                Settings.parse("a", {"config_file": str(path)})


@pytest.mark.parametrize("what", ["device", "pipe", "large"])
def test_what_has_no_end_is_not_read(tmp_path, caplog, what):
    odd = tmp_path / "odd"
    if what == "pipe":
        os.mkfifo(odd)
    elif what == "large":
        with odd.open("wb") as file:
            file.truncate(1 << 34)
    else:
        odd.symlink_to("/dev/zero")
    (tmp_path / "config").write_text(f"Host a\nInclude {odd} /dev/null\nHost b\n")
    assert names(tmp_path / "config") == ["a", "b"]
    assert caplog.text.count("not read") == 1
    assert f"{odd}: not read" in caplog.text


def test_a_file_that_is_not_there(tmp_path, caplog):
    assert configured_hosts(tmp_path / "none") == []
    assert "not read" in caplog.text
    assert configured_hosts("none") == []


def test_what_stands_between(write):
    path = write(
        "Host w1 w2\n ProxyJump me@gate\nHost gate\n ProxyJump outer\nHost w3\n ProxyCommand ssh -W %h:%p gate\n"
        "Host w4\n ProxyCommand connect %h %p\nHost w5\n ProxyJump none\n"
    )

    def key(host, **kwargs):
        return asyncio.run(jump_key(Settings.parse(host, {"config_file": str(path), **kwargs})))

    assert key("w1") == key("w2") == {"gate", "outer"}
    assert key("w3") == {"gate"}
    assert key("w4") == {"connect %h %p"}
    assert key("w5") == key("elsewhere") == key("w1", proxy_jump="none") == frozenset()
    assert key("x", proxy_jump="a,u@B:2") == {"a", "b"}
    assert key("x", ssh_options={"ProxyCommand": "ssh -W %h:%p far"}) == {"far"}
    assert asyncio.run(jump_key(Settings.parse("w1", {"config_file": "none"}))) == frozenset()


def test_handshakes_are_limited_per_jump_host():
    async def main():
        limiter = ConnectLimit(per_jump_host=2, at_once=5)
        now, most = {"j": 0, "": 0}, {"j": 0, "": 0}

        async def connect(kind):
            settings = Settings.parse("host", {"config_file": "none", **({"proxy_jump": kind} if kind else {})})
            async with limiter.slot(settings):
                now[kind] += 1
                most[kind] = max(most[kind], now[kind])
                await asyncio.sleep(0.001)
                now[kind] -= 1

        await asyncio.gather(*(connect(kind) for kind in ("j", "") for _ in range(10)))
        return most

    most = asyncio.run(main())
    assert most["j"] == 2
    assert 2 < most[""] <= 5
