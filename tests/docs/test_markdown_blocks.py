"""The harness of the documentation tests: what it takes for a block, and that a failing block fails."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.docs.markdown_blocks import Block, read_blocks
from tests.docs.served_command import served_command

import moesaic

PAGE = """# Title

```python
answer = 6 * 7
```

<!-- no-run: takes an hour -->

```bash title="slow"
sleep 3600
```

- in a list:

  ```bash
  echo listed
  ```

```yaml
not: run
```
"""


def test_blocks_keep_order_line_and_reason():
    found = [(block.line, block.language, block.source, block.no_run) for block in read_blocks(PAGE, "page.md")]
    assert found == [
        (3, "python", "answer = 6 * 7\n", None),
        (9, "bash", "sleep 3600\n", "takes an hour"),
        (15, "bash", "echo listed\n", None),
    ]


@pytest.mark.parametrize(
    "text",
    [
        "<!-- no-run: -->\n```bash\nls\n```\n",
        "<!-- no-run: moved -->\n\nprose\n\n```bash\nls\n```\n",
        "<!-- no-run: wrong language -->\n```yaml\na: b\n```\n",
        "<!-- no-run: last -->\n",
    ],
)
def test_a_no_run_comment_needs_a_reason_and_a_block(text: str):
    with pytest.raises(ValueError, match=r"page\.md:1"):
        read_blocks(text, "page.md")


def test_python_blocks_share_a_namespace_and_report_the_page_line():
    namespace: dict[str, object] = {}
    Block("page.md", 3, "python", "answer = 42\n").run(namespace)
    with pytest.raises(ZeroDivisionError) as error:
        Block("page.md", 9, "python", "unused = 1\nanswer / 0\n").run(namespace)
    assert (str(error.traceback[-1].path).endswith("page.md"), error.traceback[-1].lineno + 1) == (True, 11)


def test_bash_blocks_stop_at_the_first_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    Block("page.md", 1, "bash", "echo kept > file\n").run({})
    assert (tmp_path / "file").read_text() == "kept\n"
    with pytest.raises(AssertionError, match=r"page\.md:5 exited 1:\nshown"):
        Block("page.md", 5, "bash", "echo shown\nfalse | cat\necho never\n").run({})


def test_bash_blocks_find_the_commands_of_this_environment():
    Block("page.md", 1, "bash", "command -v moesaic\npython -c 'import moesaic'\n").run({})


def test_a_served_command_is_a_process_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "served").mkdir()
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    script = (
        "moesaic --version > version\n"
        "moesaic inspect nothing --json 2> error || echo $? > code\n"
        "COLUMNS=40 moesaic --help | cat > narrow\n"
        "moesaic --help > /dev/full || echo $? > full\n"
    )
    with served_command(tmp_path / "served") as commands:
        Block("page.md", 1, "bash", script).run({}, commands)
        with pytest.raises(AssertionError, match=r"page\.md:1 exited 2:\n(.|\n)*No such command 'reticulate'"):
            Block("page.md", 1, "bash", "moesaic reticulate\necho never\n").run({}, commands)
    here = {path.name: path.read_text() for path in Path().iterdir()}
    assert here["version"] == f"moesaic {moesaic.__version__}\n"
    assert here["code"] == "2\n"
    assert here["error"].startswith("error: model = 'nothing'")
    assert here["full"] != "0\n"
    assert max(map(len, here["narrow"].splitlines())) <= 40
