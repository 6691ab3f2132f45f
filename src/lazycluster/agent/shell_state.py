"""State that a shell's start-up files set beside its environment: told by one shell, taken over by others of its kind.

A shell tells it as records: a line with a random word, the kind of the record and a name, then the shell's own text
for it. What is to be taken over is written as files, which the shells of commands read in place of the start-up files.
"""

from __future__ import annotations

TYPE_CHECKING = False  # importing typing would cost more than the rest of the module
if TYPE_CHECKING:
    from typing import Any, Dict, List, Mapping, Optional, Tuple

    Records = List[Tuple[str, str, str]]  # (kind, name, text)

ORIGINAL = "LAZYCLUSTER_ORIGINAL"  # what the variable was that leads a shell to the files
_FLAGS = {  # of `ulimit`, and the bytes that one of its units is; 0: a block, which is the shell's own
    "RLIMIT_CORE": ("c", 0), "RLIMIT_DATA": ("d", 1024), "RLIMIT_FSIZE": ("f", 0), "RLIMIT_MEMLOCK": ("l", 1024),
    "RLIMIT_NOFILE": ("n", 1), "RLIMIT_STACK": ("s", 1024), "RLIMIT_CPU": ("t", 1), "RLIMIT_NPROC": ("u", 1),
    "RLIMIT_AS": ("v", 1024),
}  # fmt: skip
_LAZY = 400  # characters of a function from which on it is read when it is called for the first time

_BASH_TELLS = (
    "builtin echo {0} option; builtin shopt -p; set +o; set +eux; builtin echo {0} alias; builtin alias -p; "
    "builtin echo {0} variable IFS; builtin declare -p IFS; unset IFS; set -f; "
    "for n in $(builtin compgen -A variable); do builtin echo {0} variable $n; builtin declare -p $n; done; "
    "builtin echo {0} names; builtin declare -F; "
    "for n in $(builtin compgen -A function); do builtin echo {0} function $n; builtin declare -f $n; done"
)
_ZSH_TELLS = (
    "builtin print -r -- {0} option; setopt; emulate zsh; builtin print -r -- {0} alias; alias -L; "
    "builtin print -r -- {0} variable fpath; builtin print -r -- fpath=\\( ${{(q)fpath}} \\); "
    "for n t in ${{(kv)parameters}}; do case $t in (*special*|*export*|*local*) ;; "
    "(*) builtin print -r -- {0} variable $n; typeset -p -- $n ;; esac; done; "
    "builtin print -r -- {0} function; typeset -f"
)
_FISH_TELLS = (
    "echo {0} function; for f in (functions -n | string split ', '); set d (functions -D $f); "
    "string match -q $__fish_data_dir'*' $d; or functions $f; end; "
    "echo {0} variable; echo set -g fish_function_path (string escape -- $fish_function_path); "
    "for v in (set -gu --names); echo set -q $v';' or set -g $v (string escape -- $$v) 2\\>/dev/null; end"
)
_TCSH_TELLS = "echo {0} alias; alias"
# How a shell that is started for it tells on a descriptor, and becomes what tells the rest.
_ASKED = '{{ {tell}; }} >&{fd}; exec "{python}" -ISc "{program}"'
# What a login shell is given; the other shells read it, too, and pass it over. The one that most have needs no program
# to see which one it is.
_AT_LOGIN = (
    'eval \'test "$SHELL" = /bin/bash || test "$SHELL" = /usr/bin/bash || expr "$SHELL" : ".*/{kind}" >/dev/null && '
    'test -n "${{{version}-}}" && '
    'eval "exec {fd}< <({tell}; builtin echo {word} end)" || :\' 2>/dev/null; '
)

_BASH_ON = frozenset(
    """
    checkwinsize cmdhist complete_fullquote extquote force_fignore globasciiranges globskipdots hostcomplete
    interactive_comments patsub_replacement progcomp promptvars sourcepath braceexpand hashall
    interactive-comments
    """.split()  # noqa: SIM905
)
_BASH_FIXED = frozenset(("login_shell", "restricted_shell", "history", "monitor", "emacs", "vi"))
_BASH_LAST = ("errexit", "nounset", "posix", "verbose", "xtrace")  # what would disturb what comes after it
_BASH_OWN = frozenset(
    """
    COMP_WORDBREAKS COPROC DIRSTACK EPOCHREALTIME EPOCHSECONDS EUID FUNCNAME GROUPS HISTCMD HOSTNAME HOSTTYPE
    LINENO MACHTYPE OLDPWD OPTARG OPTERR OPTIND OSTYPE PIPESTATUS PPID PS4 PWD RANDOM SECONDS SHELL SHELLOPTS
    SHLVL SRANDOM TERM UID _ n
    """.split()  # noqa: SIM905
)
_ZSH_FIXED = frozenset(
    """
    interactive login privileged restricted shinstdin singlecommand monitor zle norcs rcs noglobalrcs
    nohashdirs exec noexec
    """.split()  # noqa: SIM905
)


def records(data: bytes) -> Optional[Records]:
    """Return what a shell has told, None if it did not come to the end."""
    text = data.decode("utf-8", "surrogateescape")
    word, _, _ = text.partition(" ")
    parts = ("\n" + text).split("\n" + word + " ")[1:]
    found: Records = []
    for part in parts:
        head, _, body = part.partition("\n")
        kind, _, name = head.partition(" ")
        found.append((kind, name, body + "\n" if body else ""))
    return found if found and found[-1][0] == "end" else None


def quoted(path: str) -> str:
    """Return a path as one word of any shell; `shlex` would take longer to import than this module."""
    return "'{}'".format(path.replace("'", "'\\''"))


def reading(shell: str, path: str) -> str:
    """Return what has a shell run the text of a file as if it were given with `-c`: with the same `$0` and input."""
    kind = shell.rpartition("/")[2]
    if kind in ("bash", "zsh"):
        return 'eval "$(<{})"'.format(quoted(path))
    return ("source {}" if kind in ("fish", "tcsh", "csh") else ". {}").format(quoted(path))


class Bash:
    """bash: reads `.bashrc` for commands over ssh, unless told not to, and then the file that BASH_ENV names."""

    name = "bash"
    variable = "BASH_ENV"
    file = "state"
    block = 1024
    asked = _ASKED
    is_closing = False
    check = ("--norc", "-c", '. {0}/state && for f in {0}/*; do . "$f" || exit; done')
    tells = _BASH_TELLS
    at_login = ("bash", "BASH_VERSION")

    @staticmethod
    def argv(path: str, command: str, directory: str) -> List[str]:
        """Return what runs a line without reading the start-up files."""
        return [path, "--norc", "-c", command]

    @staticmethod
    def reads(env: Mapping[str, str], own: Mapping[str, str]) -> bool:
        """Return whether it would read start-up files that the user has not named just for this command."""
        try:
            level = int(env.get("SHLVL") or 0)
        except ValueError:
            level = 0
        by_ssh = "SSH_CLIENT" in env or "SSH2_CLIENT" in env
        return (by_ssh and level < 1) or bool(env.get("BASH_ENV") and env["BASH_ENV"] == own.get("BASH_ENV"))

    @staticmethod
    def files(found: Records, directory: str, more: List[str]) -> Dict[str, str]:
        """Return the files, by name.

        Args:
            found: What the shell has told.
            directory: Where they will be.
            more: Lines that are to be run, too.
        """
        options: List[str] = []
        for kind, _, text in found:
            if kind == "option":
                options = text.splitlines()
        early, late = _bash_options(options)
        lines, others = _bash_functions(found, directory)
        aliases = [text for kind, _, text in found if kind == "alias" and "shopt -s expand_aliases" in options]
        variables = [_guarded(name, text) for kind, name, text in found if kind == "variable" and _is_set(name, text)]
        body = [*early, *variables, *lines, *aliases, *more, *late]
        state = "".join(line if line.endswith("\n") else line + "\n" for line in body)
        return dict(others, state=_restore("BASH_ENV") + state + ":\n")

    @staticmethod
    def is_empty(files: Mapping[str, str]) -> bool:
        """Return whether the files set nothing, so that the shell need not read them."""
        return files == {Bash.file: _restore("BASH_ENV") + ":\n"}


def _restore(variable: str) -> str:
    """Return what gives the variable back that has led to the files: no child of the shell is to be led there."""
    text = 'if [ "${{{0}+x}}" ]; then export {1}="${0}"; unset {0}; else unset {1}; fi\n'
    return text.format(ORIGINAL, variable)


def _bash_options(lines: List[str]) -> Tuple[List[str], List[str]]:
    """Return what sets the options that are not as always: before all else, and after it."""
    early: List[str] = []
    late: List[str] = []
    for line in lines:
        words = line.split()
        if len(words) != 3 or words[0] not in ("shopt", "set") or words[2] in _BASH_FIXED:
            continue
        is_on = words[1] in ("-s", "-o")
        if is_on != (words[2] in _BASH_ON):
            (late if words[2] in _BASH_LAST else early).append(line)
    return early, late


def _is_set(name: str, text: str) -> bool:
    """Return whether a variable of bash was set by start-up files and is not in the environment."""
    if name in _BASH_OWN or name.startswith("BASH"):
        return False
    if name == "IFS":
        return text.strip() != "declare -- IFS=$' \\t\\n'" and text.strip() != 'declare -- IFS=" \t\n"'.strip()
    flags = text[len("declare ") :].partition(" ")[0]
    return "x" not in flags or "a" in flags or "A" in flags


def _guarded(name: str, text: str) -> str:
    """Return what sets a variable unless the command's environment does."""
    return text if name == "IFS" else '[ "${{{}+x}}" ] || {}'.format(name, text)


def _bash_functions(found: Records, directory: str) -> Tuple[List[str], Dict[str, str]]:
    """Return what defines the functions, and the files with those that are read when they are called.

    nvm's alone take bash ten milliseconds to read.
    """
    flags: Dict[str, str] = {}
    for kind, _, text in found:
        if kind == "names":
            flags = {words[2]: words[1] for words in map(str.split, text.splitlines()) if len(words) == 3}
    lines: List[str] = []
    files: Dict[str, str] = {}
    for kind, name, text in found:
        if kind != "function" or "x" in flags.get(name, ""):  # those that are exported are in the environment
            continue
        whole = text + "".join(
            "{} -f {}\n".format(how, name)
            for flag, how in (("t", "declare -t"), ("r", "readonly"))
            if flag in flags.get(name, "")
        )
        if len(whole) < _LAZY:
            lines.append(whole)
        else:
            file = "function-{}".format(len(files))
            files[file] = whole
            lines.append('{0} () {{ builtin . {1}; {0} "$@"; }}\n'.format(name, quoted(directory + "/" + file)))
    return lines, files


class Zsh:
    """zsh: reads `.zshenv` in the directory that ZDOTDIR names, always."""

    name = "zsh"
    variable = "ZDOTDIR"
    file = ".zshenv"
    block = 512
    asked = _ASKED
    is_closing = False
    check = ("-f", "-c", ". {0}/.zshenv")
    tells = _ZSH_TELLS
    at_login = ("zsh", "ZSH_VERSION")

    @staticmethod
    def argv(path: str, command: str, directory: str) -> List[str]:
        """Return what runs a line without reading the start-up files."""
        return [path, "-c", command]

    @staticmethod
    def reads(env: Mapping[str, str], own: Mapping[str, str]) -> bool:
        """Return whether it would read start-up files that the user has not named just for this command."""
        return env.get("ZDOTDIR") == own.get("ZDOTDIR")

    @staticmethod
    def files(found: Records, directory: str, more: List[str]) -> Dict[str, str]:
        """Return the files, by name; see :meth:`Bash.files`."""
        body: Dict[str, List[str]] = {"option": [], "alias": [], "variable": [], "function": []}
        for kind, name, text in found:
            if kind == "option":
                body[kind] += ["setopt {}\n".format(o) for o in text.split() if o not in _ZSH_FIXED]
            elif kind == "variable" and name not in ("n", "t") and not name.startswith("ZSH_") and text.strip():
                body[kind].append(text if name == "fpath" else "(( ${{+{}}} )) || {}".format(name, text))
            elif kind in body:
                body[kind].append(text)
        order = ("variable", "function", "alias")
        lines = [*(line for kind in order for line in body[kind]), *more, *body["option"]]
        state = "".join(line if line.endswith("\n") else line + "\n" for line in lines)
        return {".zshenv": _restore("ZDOTDIR") + state + ":\n"}

    @staticmethod
    def is_empty(files: Mapping[str, str]) -> bool:
        """Never: it would read the start-up files."""
        return False


class Fish:
    """fish: reads `config.fish` and `conf.d` always, unless told not to."""

    name = "fish"
    variable = ""
    file = "state"
    block = 1024
    asked = 'begin; {tell}; end >&{fd}; exec "{python}" -ISc "{program}"'
    check = ("--no-config", "-c", "source {0}/state")
    tells = _FISH_TELLS
    is_closing = False
    at_login = None  # it cannot go on writing when it has become another program

    @staticmethod
    def argv(path: str, command: str, directory: str) -> List[str]:
        """Return what runs a line without reading the start-up files."""
        return [path, "--no-config", "-C", "source {}/state".format(quoted(directory)), "-c", command]

    @staticmethod
    def reads(env: Mapping[str, str], own: Mapping[str, str]) -> bool:
        """Return whether it would read start-up files that the user has not named just for this command."""
        return env.get("XDG_CONFIG_HOME") == own.get("XDG_CONFIG_HOME")

    @staticmethod
    def files(found: Records, directory: str, more: List[str]) -> Dict[str, str]:
        """Return the files, by name; see :meth:`Bash.files`."""
        body = {kind: text for kind, _, text in found}
        own = ("set -q __fish", "set -q fish_", "set -q d;", "set -q argv;", "set -q IFS;", "set -q _;")
        variables = [line + "\n" for line in body.get("variable", "").splitlines() if not line.startswith(own)]
        return {"state": "".join([*variables, body.get("function", ""), *(line + "\n" for line in more), "true\n"])}

    @staticmethod
    def is_empty(files: Mapping[str, str]) -> bool:
        """Never: it would have the functions of its own only."""
        return False


class Tcsh:
    """tcsh: reads `.tcshrc` always, unless told not to. Its aliases are what functions are elsewhere."""

    name = "tcsh"
    variable = ""
    file = "state"
    block = 0
    asked = '( {tell} ) > {fd}; exec "{python}" -ISc "{program}"'
    check = ("-f", "-c", "source {0}/state")
    tells = _TCSH_TELLS
    is_closing = True  # all descriptors that it gets
    at_login = None

    @staticmethod
    def argv(path: str, command: str, directory: str) -> List[str]:
        """Return what runs a line without reading the start-up files; aliases hold from the next line on."""
        return [path, "-f", "-c", "source {}/state\n{}".format(quoted(directory), command)]

    @staticmethod
    def reads(env: Mapping[str, str], own: Mapping[str, str]) -> bool:
        """Return whether it would read start-up files that the user has not named just for this command."""
        return True

    @staticmethod
    def files(found: Records, directory: str, more: List[str]) -> Dict[str, str]:
        """Return the files, by name; see :meth:`Bash.files`."""
        lines = []
        for kind, _, text in found:
            for line in text.splitlines() if kind == "alias" else ():
                name, tab, value = line.partition("\t")
                # Words are shown in parentheses; so is a command in a subshell, in which more than words may stand.
                if value[:1] == "(" and value[-1:] == ")" and not set(value) & set(";|&<>"):
                    value = value[1:-1]
                if tab:
                    lines.append("alias {} {}\n".format(name, quoted(value).replace("!", "\\!")))
        return {"state": "".join([*lines, *(line + "\n" for line in more if line.startswith("umask"))])}

    @staticmethod
    def is_empty(files: Mapping[str, str]) -> bool:
        """Never: it would read the start-up files."""
        return False


def inherited_lines(
    block: int, umask: int, limits: Dict[str, List[int]], own: Mapping[str, Tuple[int, int]]
) -> List[str]:
    """Return what sets the limits that differ from the agent's own, and the umask."""
    lines = ["umask {:04o}".format(umask)]
    for name, (flag, unit) in _FLAGS.items():
        if name not in limits or name not in own or not (unit or block):
            continue
        for how, value, before in zip("SH", limits[name], own[name]):
            if value not in (before, -1):
                lines.append("ulimit -{} -{} {}".format(how, flag, value // (unit or block)))
    return lines


KINDS: Dict[str, Any] = {"bash": Bash, "zsh": Zsh, "fish": Fish, "tcsh": Tcsh}


def telling(kind: str, word: str) -> str:
    """Return what has a shell tell of itself, on its standard output."""
    return str(KINDS[kind].tells.format(word))


def telling_at_login(word: str, fd: int) -> str:
    """Return what has a login shell tell of itself on a descriptor; any shell can be given it."""
    return "".join(
        _AT_LOGIN.format(kind=name, version=version, fd=fd, word=word, tell=telling(kind, word).replace("$", "\\$"))
        for kind, (name, version) in ((kind, shell.at_login) for kind, shell in KINDS.items() if shell.at_login)
    )
