"""``cluster.toml``: what is read from it, what is wrong with it and where, and what a stranger may not set."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lazycluster import ClusterSpec, load_cluster_file
from lazycluster.cluster.engine import Option
from lazycluster.cluster.exceptions import ClusterFileError
from lazycluster.cluster_file import load
from lazycluster.cluster_file.keys import HOST_KEYS, SAFE_VARIABLES, TOP_KEYS, option_key
from lazycluster.cluster_file.schema import schema
from lazycluster.cluster_file.toml_lines import KeyLines
from lazycluster.core import toml
from lazycluster.core.durations import duration
from lazycluster.group.settings import _ONLY_OWN, _OWN
from lazycluster.ssh.config import Settings

ROOT = Path(__file__).parents[2]
LEAST = "engine = 'dask'\nhosts = 'node1'\n"

COMPLETE = """
engine = "dask"
name = "training"
hosts = ["node[1-3]", "@gpu"]
exclude = ["node2"]
workers = 8
master_port = 8786
idle_timeout = "30 min"
lifetime = "12 h"
python = "auto"
environment = "manager"
env = { OMP_NUM_THREADS = 4 }

[groups]
gpu = ["gpu-a", "gpu-b"]
fast = "@gpu,node3"

[options]
nthreads = 2
memory_limit = "4 GiB"

[host."*"]
user = "me"

[host."@fast"]
port = 2222
env.CUDA_VISIBLE_DEVICES = "0"

[host.gpu-b]
user = "you"
env = { TZ = "UTC" }
"""


@pytest.fixture
def write(tmp_path: Path):
    config = tmp_path / "config"
    config.write_text("Host gpu-a gpu-b node1 node2\n  HostName 127.0.0.1\n")

    def written(text: str | bytes, **options: Any) -> ClusterSpec:
        file = tmp_path / "cluster.toml"
        file.write_bytes(text if isinstance(text, bytes) else text.encode())
        return load_cluster_file(file, config_file=str(config), **options)

    written.directory = tmp_path
    return written


def problems(write: Any, text: str | bytes, **options: Any) -> list[tuple[int | None, str]]:
    with pytest.raises(ClusterFileError) as caught:
        write(text, **options)
    return caught.value.problems


# --- what it says -------------------------------------------------------------------------------
def test_a_file_says_all_of_a_cluster(write) -> None:
    spec = write(COMPLETE)
    assert (spec.engine, spec.name, spec.workers, spec.master_port) == ("dask", "training", 8, 8786)
    assert spec.hosts == ("node1", "node3", "gpu-a", "gpu-b")
    assert (spec.idle_timeout, spec.lifetime) == (1800.0, 43200.0)
    assert spec.options == {"nthreads": 2, "memory_limit": "4 GiB"}
    assert spec.group_options == {"python": "auto", "environment": "manager", "env": {"OMP_NUM_THREADS": 4}}
    assert spec.settings["node1"] == {"user": "me"}
    assert spec.settings["node3"] == {"user": "me", "port": 2222, "env": {"CUDA_VISIBLE_DEVICES": "0"}}
    assert spec.settings["gpu-b"]["env"] == {"CUDA_VISIBLE_DEVICES": "0", "TZ": "UTC"}
    assert spec.settings["gpu-b"]["user"] == "you", "what comes later wins"
    assert not spec.everyone


def test_what_may_be_secret_is_in_no_repr(write) -> None:
    text = LEAST + "env = { TOKEN = 'hidden-1' }\nsetup = 'export A=hidden-2'\n[host.node1]\nproxy_jump = 'hidden-3'"
    assert "hidden" not in repr(write(text, trust=True))


def test_all_and_patterns_stand_for_hosts_of_the_ssh_configuration(write) -> None:
    assert write("engine = 'dask'\nhosts = '@all'\nexclude = 'node*'").everyone
    assert write("engine = 'dask'\nhosts = '@all'\nexclude = 'node*'").hosts == ("gpu-a", "gpu-b")
    assert write("engine = 'dask'\nhosts = 'gpu-*'").hosts == ("gpu-a", "gpu-b")


def test_other_hosts_get_the_settings_of_patterns(write) -> None:
    spec = write(COMPLETE, hosts=["node9", "gpu-a"])
    assert spec.hosts == ("node9", "gpu-a")
    assert spec.settings["node9"] == {"user": "me"}
    assert set(spec.settings) == {"node9", "gpu-a"}


def test_paths_are_relative_to_the_file(write, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("requirements.txt", "key", "ssh_config"):
        (tmp_path / name).touch()
    monkeypatch.chdir("/")
    text = "engine = 'hyperopt'\nhosts = 'node1'\nenvironment = 'requirements.txt'\n[options]\ndbpath = 'trials'\n"
    text += "[host.node1]\nkey_filename = ['key']\nconfig_file = 'ssh_config'\n"
    spec = write(text, trust=True)
    here = str(tmp_path)
    assert spec.group_options["environment"] == f"{here}/requirements.txt"
    assert spec.options["dbpath"] == f"{here}/trials"
    assert spec.settings["node1"] == {"key_filename": [f"{here}/key"], "config_file": f"{here}/ssh_config"}
    spec = write(LEAST + "environment = ['numpy', './mine', '../mine']", trust=True)
    assert spec.group_options["environment"] == ["numpy", f"{here}/mine", f"{here}/../mine"]
    assert write(LEAST + "environment = '/opt/ml'", trust=True).group_options["environment"] == "/opt/ml"


def test_a_byte_order_mark_and_lines_of_windows_do_no_harm(write) -> None:
    text = LEAST.replace("\n", "\r\n") + "workers = 'x'\r\n"
    assert problems(write, b"\xef\xbb\xbf" + text.encode()) == [(3, "workers must be an integer, not a string")]


# --- what is wrong ------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("text", "line", "said"),
    [
        ("", None, "it is empty"),
        (" \n\n", None, "it is empty"),
        ("# nothing\n", None, "engine is missing"),
        (b"\x7fELF\x00\xff\xfe", 1, "it is not UTF-8 text"),
        ("a = 1\n" + "#" * 1024 * 1024, None, "it has more than 1 MiB"),
        ("a = " + "[" * 100_000, None, "it is nested too deeply"),
        (LEAST + ".".join("a" * 200_000) + " = 1", 3, "it is nested too deeply: a key has more than 32 parts"),
        (LEAST + "[" + " . ".join(["a", "'b.'", '"c\\""'] * 20) + "]", 3, "it is nested too deeply"),
        (LEAST + "workers = " + "9" * 5000, None, "it cannot be read: Exceeds the limit"),
        ("engine = 'dask'\nhosts", 2, "it is not valid TOML"),
        (LEAST + "engine = 'dask'\n", 3, "it is not valid TOML: Can"),
        ("hosts = 'node1'", None, "engine is missing"),
        ("engine = 'dask'", None, "hosts is missing"),
        ("engine = 'dsak'\nhosts = 'node1'", 1, "there is no engine 'dsak'; did you mean 'dask'?"),
        ("engine = 1\nhosts = 'node1'", 1, "engine must be a string"),
        ("engine = 'dask'\nhosts = 3", 2, "hosts must be a string or a list of strings, not a number"),
        ("engine = 'dask'\nhosts = []", 2, "no host is left"),
        ("engine = 'dask'\nhosts = 'node1'\nexclude = 'node1'", 2, "no host is left: all named hosts are excluded"),
        ("engine = 'dask'\nhosts = 'x-*'", 2, "no host of the ssh configuration fits 'x-*'"),
        ("engine = 'dask'\nhosts = '@gup'\n[groups]\ngpu = 'a'", 2, "no group '@gup'; did you mean 'gpu'?"),
        ("engine = 'dask'\nhosts = '-oProxyCommand=x'", 2, "which ssh would take for an option"),
        ("engine = 'dask'\nhosts = ['node1', '\\u001b]0;x']", 2, "a bracket has no partner"),
        (LEAST + "worker = 3", 3, "unknown key 'worker'; did you mean 'workers'?"),
        (LEAST + "port = 3", 3, "it is a setting of hosts"),
        (LEAST + "workers = -1", 3, "workers must be from 1 to 1000000, not -1"),
        (LEAST + "workers = true", 3, "workers must be an integer, not a boolean"),
        (LEAST + "workers = 1979-05-27", 3, "workers must be an integer, not a date or time"),
        (LEAST + "master_port = 70000", 3, "master_port must be from 1 to 65535"),
        (LEAST + "idle_timeout = '3 fortnights'", 3, "the unit 'fortnights' is none of"),
        (LEAST + "idle_timeout = -3", 3, "a time must be greater than 0"),
        (LEAST + "name = '../x'", 3, "'../x' is not a name"),
        (LEAST + "name = 'a\\nb'", 3, "is not a name"),
        (LEAST + "startup_files = 'never'", 3, "startup_files must be 'once' or 'always'"),
        (LEAST + "[options]\nthreads = 2", 4, "unknown key 'threads'; did you mean 'nthreads'?"),
        (LEAST + "[options]\nnthreads = 'many'", 4, "nthreads must be an integer"),
        (LEAST + "[options]\nmemory_limit = 'much'", 4, "memory_limit"),
        (LEAST + "[host]\nnode1 = 3", 4, "'node1' must be a table with settings"),
        (LEAST + "[host.node1]\nprot = 3", 4, "unknown key 'prot'; did you mean 'port'?"),
        (LEAST + "[host.node1]\ntimeout = 0", 4, "timeout must be greater than 0"),
        (LEAST + "[host.node1]\nenv = { 'A' = [1] }", 4, "environment variable A must be a string"),
        (LEAST + "[groups]\nall = 'a'", 4, "@all stands for all hosts of the ssh configuration already"),
        (LEAST + "[groups]\n'a b' = 'a'", 4, "'a b' is not a name"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_with_its_line(write, text: str | bytes, line: int | None, said: str) -> None:
    found = problems(write, text)
    assert any(where == line and said in what for where, what in found), found


@pytest.mark.parametrize(
    "text",
    [
        "hosts = '@b'\n[groups]\na = 'n[1-400]'\nb = ['@a', '@a', '@a']",
        "hosts = '@a'\n[groups]\na = 'n[1-400]'\nb = '@a'\nc = '@a'",
        "hosts = ['a[1-400]', 'b[1-400]', 'c[1-400]']",
        "hosts = 'n[1-400]'\n[host.'*1']\n[host.'*2']\n",
    ],
)
def test_a_small_file_does_not_stand_for_more_hosts_than_there_is_memory_for(
    write, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(load, "_MOST_NAMED", 1000)
    found = problems(write, f"engine = 'dask'\n{text}")
    assert [what for _, what in found] == ["more than 1000 hosts are named, each counted as often as it is"]
    monkeypatch.setattr(load, "_MOST_NAMED", 3000)
    assert len(write(f"engine = 'dask'\n{text}").hosts) >= 400


def test_dots_in_texts_make_no_key_too_deep(write) -> None:
    text = LEAST + "setup = '" + "echo 1. 2. 3. " * 100 + "'\n# " + ".".join(["10.0.0.1"] * 5)
    assert "echo" in str(write(text, trust=True).group_options["setup"])


def test_many_hosts_with_settings_each_are_no_problem(write) -> None:
    tables = "".join(f"[host.n{n}]\nport = {n}\n" for n in range(1, 2001))
    spec = write("engine = 'dask'\nhosts = 'n[1-5000]'\n" + tables + "[host.'n[1-5000]']\nuser = 'you'\n")
    assert spec.settings["n2000"] == {"port": 2000, "user": "you"}
    assert list(spec.settings["n2001"]) == ["user"]


def test_all_problems_are_said_at_once_in_order(write) -> None:
    text = LEAST + "setup = 'x'\nworkers = 0\nfoo = 1\n[host.node1]\nport = 'x'"
    assert [line for line, _ in problems(write, text)] == [3, 4, 5, 7]
    many = problems(write, LEAST + "".join(f"x{n} = 1\n" for n in range(30)))
    assert many[-1] == (None, "and 20 more")
    assert len(many) == 11


@pytest.mark.parametrize(
    "text",
    [
        LEAST + "".join(f"x{n} = 1\n" for n in range(30_000)),
        "engine = 'dask'\nhosts = [" + "".join(f"'@x{n}'," for n in range(30_000)) + "]\n[groups]\n"
        + "".join(f"g{n:x} = 'a'\n" for n in range(30_000)),
        LEAST + "".join(f"[host.x{n}]\nsetup = 'x'\n" for n in range(1000)),
    ],
    ids=["keys", "groups", "values"],
)  # fmt: skip
def test_a_file_of_nothing_but_problems_is_not_looked_at_to_its_end(write, text: str) -> None:
    found = problems(write, text)
    assert len(found) <= 11
    assert found[-1] == (None, "and at least 90 more")
    assert all(len(what) <= 1000 for _, what in found)


def test_the_message_names_file_and_line_and_cannot_steer_the_terminal(write) -> None:
    with pytest.raises(ClusterFileError) as caught:
        write(LEAST + '"\\u001b]0;x" = 1')
    assert str(caught.value).startswith(f"{write.directory}/cluster.toml, line 3: unknown key ")
    assert "\x1b" not in str(caught.value)


@pytest.mark.parametrize("kind", ["missing", "directory", "pipe", "device", "loop"])
def test_what_is_no_file_is_said_and_does_not_hang(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "it"
    if kind == "directory":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "loop":
        path.symlink_to(path)
    with pytest.raises(ClusterFileError):
        load_cluster_file(path)


def test_a_link_to_a_file_is_followed(write, tmp_path: Path) -> None:
    write(LEAST)
    (tmp_path / "link.toml").symlink_to(tmp_path / "cluster.toml")
    assert load_cluster_file(tmp_path / "link.toml").hosts == ("node1",)


def test_a_file_that_everybody_may_write_is_warned_of_and_never_trusted(
    write, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write(LEAST)
    file = tmp_path / "cluster.toml"
    file.chmod(0o666)
    with caplog.at_level(logging.WARNING):
        load_cluster_file(file)
    assert "everybody on this machine may write to it (chmod o-w" in caplog.text
    with pytest.raises(ClusterFileError, match="cannot be trusted"):
        load_cluster_file(file, trust=True)


# --- what a stranger may not set ----------------------------------------------------------------
REFUSED = {
    "setup": "'x'",
    "environment": "['numpy']",
    "python": "'./evil'",
    "shell": "'/tmp/evil'",
    "env": "{ LD_PRELOAD = 'evil.so' }",
    "working_dir": "'repo'",
    "host_keys": "'accept-new'",
    "proxy_jump": "'evil'",
    "relay": "'agent'",
    "ssh_options": "['ProxyCommand=evil']",
    "config_file": "'evil'",
    "key_filename": "'~/.ssh/id_rsa'",
    "password": "'x'",
    "passphrase": "'x'",
}
FREE = {
    "address": "'10.0.0.7'",
    "environment": "'manager'",
    "python": "'python3.12'",
    "shell": "'bash'",
    "env": "{ OMP_NUM_THREADS = 2 }",
    "startup_files": "'always'",
    "host_keys": "'strict'",
    "user": "'me'",
    "port": "22",
    "timeout": "3",
    "link_timeout": "3",
    "grace": "0",
    "reconnect": "3",
}


def test_each_setting_of_a_host_is_classified_here_too() -> None:
    about_ssh = {one.name for one in dataclasses.fields(Settings)} - {"host", "target"}
    assert {key.name for key in HOST_KEYS} == about_ssh | set(_OWN) | set(_ONLY_OWN)
    assert {key.name for key in HOST_KEYS} == set(REFUSED) | set(FREE)
    assert all(key.reason for key in (*TOP_KEYS, *HOST_KEYS) if key.trust == "needed")


@pytest.mark.parametrize(
    ("name", "where"), [(name, "host") for name in REFUSED] + [(name, "top") for name in REFUSED if name in _OWN]
)
def test_what_could_run_code_is_refused(write, name: str, where: str) -> None:
    text = LEAST + ("[host.node1]\n" if where == "host" else "") + f"{name} = {REFUSED[name]}"
    ((line, said),) = problems(write, text)
    assert line == text.count("\n") + 1
    assert said.startswith(name)


@pytest.mark.parametrize("name", FREE)
def test_what_does_no_harm_is_taken(write, name: str) -> None:
    spec = write(LEAST + f"[host.node1]\n{name} = {FREE[name]}")
    assert name in spec.settings["node1"]


@pytest.mark.parametrize("value", ["OMP_TOOL_LIBRARIES", "PATH", "PYTHONPATH", "BASH_ENV", "DASK_CONFIG"])
def test_variables_that_run_code_are_not_among_the_safe_ones(write, value: str) -> None:
    assert value not in SAFE_VARIABLES
    assert problems(write, LEAST + f"env = {{ OMP_NUM_THREADS = 1, {value} = 'x' }}")


def test_the_documentation_has_each_key_and_each_safe_variable() -> None:
    page, security = ((ROOT / "docs" / name).read_text() for name in ("cluster-file.md", "security.md"))
    assert not [
        key.name
        for key in (*TOP_KEYS, *HOST_KEYS)
        if key.trust != "never" and f"`{key.name}`" not in page and f"`[{key.name}" not in page
    ]
    assert not [name for name in SAFE_VARIABLES if f"`{name}`" not in security]


def test_nothing_of_a_distrusted_file_is_opened(write, tmp_path: Path) -> None:
    ((_, said),) = problems(write, LEAST + f"environment = '{tmp_path}/nothing.txt'")
    assert "no such file" not in said


def test_a_password_is_taken_from_no_file(write) -> None:
    ((line, said),) = problems(write, LEAST + "[host.node1]\npassword = 'hidden'", trust=True)
    assert line == 4
    assert "hidden" not in said


def test_a_trusted_file_may_do_all_else(write) -> None:
    text = LEAST + "setup = ['a', 'b']\nenv = { A = 1 }\n[host.node1]\nssh_options = ['ProxyCommand=x']"
    spec = write(text, trust=True)
    assert spec.group_options == {"setup": "a\nb", "env": {"A": 1}}


def test_options_of_engines_are_refused_unless_they_are_stated_to_be_safe(write) -> None:
    ((_, said),) = problems(write, "engine = 'hyperopt'\nhosts = 'node1'\n[options]\ndbpath = 'trials'")
    assert "since it names files of this machine" in said
    unstated = Option("--program", "program", "A program.", "PATH")
    assert not option_key(unstated).is_free("evil")
    assert option_key(dataclasses.replace(unstated, default="usual")).is_free("usual")
    assert option_key(dataclasses.replace(unstated, safe=True)).is_free("evil")
    assert option_key(Option("--depth", "depth", "How deep.", "N", "count")).is_free(3)


# --- lines of keys ------------------------------------------------------------------------------
_NAMES = st.text("abcXYZ-_09", min_size=1, max_size=5)
_VALUES = st.sampled_from(
    [
        "1",
        "'#['",
        '"\\"]"',
        "'''\na = 1\n[x]\n'''",
        '"""\n\\"""\nb = 2"""',
        "[\n 1, # ]\n [2],\n]",
        "{ a = [1], b = '}' }",
    ]
)


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(st.tuples(_NAMES, st.dictionaries(_NAMES, _VALUES, max_size=3)), max_size=4, unique_by=lambda t: t[0]))
def test_lines_of_keys_are_found_whatever_the_values_are(tables: list[tuple[str, dict[str, str]]]) -> None:
    lines, expected = ["# first"], {}
    for table, values in tables:
        lines.append(f"[ {table} . 'in' ] # = [")
        expected[table, "in"] = "\n".join(lines).count("\n") + 1
        for name, value in values.items():
            lines += ["", f'  "{name}"  = {value} # x']
            expected[table, "in", name] = "\n".join(lines[:-1]).count("\n") + 2
    text = "\n".join(lines)
    toml.loads(text)
    assert {path: KeyLines(text).of(path) for path in expected} == expected


# --- times --------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("value", "seconds"),
    [(90, 90), ("90", 90), ("90s", 90), ("1.5 h", 5400), ("1h30m", 5400), (" 2 Days ", 172800), ("1w", 604800)],
)
def test_times_are_read(value: Any, seconds: float) -> None:
    assert duration(value) == seconds


@pytest.mark.parametrize("value", ["", "h", "-1 h", "1 h x", "1e3", "1 y", "inf", "nan", 0, float("nan"), "9999999 d"])
def test_what_is_no_time_is_an_error(value: Any) -> None:
    with pytest.raises(ValueError, match="time"):
        duration(value)
    with pytest.raises(TypeError):
        duration(True)


# --- the schema ---------------------------------------------------------------------------------
def test_the_schema_in_the_documentation_is_current() -> None:
    kept = json.loads((ROOT / "docs" / "cluster.schema.json").read_text())
    assert kept == json.loads(json.dumps(schema(["dask", "hyperopt"]))), "lazycluster schema > docs/cluster.schema.json"


def test_the_schema_takes_what_is_taken_and_refuses_what_is_not() -> None:
    made = schema(["dask", "hyperopt"])
    jsonschema.Draft7Validator.check_schema(made)
    validator = jsonschema.Draft7Validator(made)
    assert validator.is_valid(toml.loads(COMPLETE))
    for wrong in ("worker = 3", "workers = 0", "[options]\ndbpath = 'x'", "[host.a]\npassword = 'x'", "python = 3"):
        assert not validator.is_valid(toml.loads(LEAST + wrong)), wrong
