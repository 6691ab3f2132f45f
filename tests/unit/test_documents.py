"""What runs the code of the documentation notices when a page is wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

import documents
import lazycluster.cluster.exceptions
import lazycluster.exceptions


def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> int:
    monkeypatch.chdir(tmp_path)
    page = tmp_path / "page.md"
    page.write_text(text)
    return documents.Page(page).run()


def test_a_page_that_is_right(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = """# Title

```text title="data.csv"
a,b
```

```python
import pathlib
print(pathlib.Path("data.csv").read_text(), end="")
x = 1
```

```text
a,...
```

Words.

```python
print(x)
```

<!-- raises -->
```python
1 / 0
```

```text
ZeroDivisionError: division by zero
```

```console
$ cat data.csv
a,b
$ echo a \\
> b
a b
```

<!-- exit: 3 -->
```console
$ exit 3
```

<!-- not run: it is for another machine -->
```console
$ exit 3
```

<!-- background -->
```console
$ sh -c 'echo ready; exec sleep 100'
ready
```
"""
    assert run(tmp_path, monkeypatch, text) == 6


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("```python\nprint(1)\n```\n\n```text\n2\n```\n", "it printed"),
        ("```python\nraise ValueError('x')\n```\n", "x"),
        ("<!-- raises -->\n```python\npass\n```\n", "to raise"),
        ("```console\n$ echo 1\n2\n```\n", "and not"),
        ("```console\n$ exit 3\n```\n", "exit status 3"),
        ("```console\necho 1\n```\n", "starts with"),
        ("```sh\nls\n```\n", "as 'console'"),
        ("<!-- not run: -->\n```python\n1\n```\n", "say why"),
        ("<!-- nonsense -->\n", "nothing known"),
        ("<!-- background -->\n```console\n$ echo 1\n2\n```\n", "ended with 0"),
    ],
)
def test_a_page_that_is_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, problem: str) -> None:
    with pytest.raises(documents.DocumentError, match=problem):
        run(tmp_path, monkeypatch, text)


def test_what_stands_for_anything() -> None:
    assert documents.same("a ... c", "a b\nb c  \n")
    assert not documents.same("a b", "a c")
    assert not documents.same("a ...", "b")
    assert documents.same("host1   1.5 ms  9%", "host1  12.25 ms 10%", numbers=False)
    assert not documents.same("host1  1.5 ms", "host1  a ms", numbers=False)
    assert documents.same_lines("a 1\nb ...", "b 2\na 1\n")
    assert not documents.same_lines("a\na", "a\nb")
    assert not documents.same_lines("a", "a\na")


def test_every_error_has_its_cause_and_cure() -> None:
    page = (Path(__file__).parents[2] / "docs" / "tutorials" / "when-things-go-wrong.md").read_text()
    names = {*lazycluster.exceptions.__all__, *lazycluster.cluster.exceptions.__all__}
    missing = [name for name in sorted(names) if f"`{name}" not in page]
    assert not missing, f"say in docs/tutorials/when-things-go-wrong.md what to do about {missing}"


def test_code_of_pages_fits_into_the_width_of_a_page() -> None:
    top = Path(__file__).parents[2]
    for page, most in [(top / "README.md", 100), *((page, 82) for page in (top / "docs").rglob("*.md"))]:
        for block in documents.blocks(page.read_text()):
            if block.language in ("python", "console"):
                too_long = [line for line in block.code.splitlines() if len(line) > most]
                assert not too_long, f"{page}: of these lines the end is not seen: {too_long}"
