"""`patchc fmt`: what it writes, names and leaves alone; and the examples, which are formatted."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from patchc.diagnostics import Source
from patchc.parse import format_spec
from tests.unit.commands import Ran

if TYPE_CHECKING:
    from tests.unit.commands import Run

ROOT = Path(__file__).parents[2]
EXAMPLES = sorted((ROOT / "examples").rglob("*.patch"))

UGLY = 'let a=head # c\r\nmodel  "gpt2"'
PRETTY = 'let a = head  # c\nmodel "gpt2"\n'


def written(content: str, name: str = "a.patch") -> Path:
    path = Path(name)
    path.write_bytes(content.encode())
    return path


def test_a_file_is_rewritten_and_keeps_its_mode(run: Run) -> None:
    path = written("\ufeff" + UGLY)
    path.chmod(0o640)
    assert run("fmt", "a.patch") == Ran(0, "", "a.patch reformatted\n")
    assert path.read_bytes() == PRETTY.encode()
    assert path.stat().st_mode & 0o777 == 0o640
    assert [*Path().iterdir()] == [path]


def test_a_formatted_file_is_not_written(run: Run) -> None:
    path = written(PRETTY)
    before = path.stat()
    assert run("fmt", "a.patch") == Ran(0, "", "")
    assert (path.stat().st_mtime_ns, path.stat().st_ino) == (before.st_mtime_ns, before.st_ino)


def test_a_link_stays_a_link(run: Run) -> None:
    path = written(UGLY, "real.patch")
    Path("link.patch").symlink_to(path)
    assert run("fmt", "link.patch").exit == 0
    assert Path("link.patch").is_symlink()
    assert path.read_text() == PRETTY


def test_check_names_what_would_change_and_writes_nothing(run: Run) -> None:
    paths = [written(UGLY), written(PRETTY, "b.patch")]
    assert run("fmt", "--check", *map(str, paths)) == Ran(1, "a.patch would be reformatted\n", "")
    assert paths[0].read_bytes() == UGLY.encode()
    assert run("fmt", "--check", "b.patch").exit == 0


def test_diff_is_unified_and_writes_nothing(run: Run) -> None:
    path = written('let a=head\nmodel "gpt2"')
    ran = run("fmt", "--diff", "a.patch")
    assert ran.exit == 1
    assert ran.out.splitlines()[2:] == [
        "@@ -1,2 +1,2 @@",
        "-let a=head",
        '-model "gpt2"',
        "\\ No newline at end of file",
        "+let a = head",
        '+model "gpt2"',
    ]
    assert path.read_text() == 'let a=head\nmodel "gpt2"'


def test_what_diff_prints_is_a_patch(run: Run) -> None:
    path = written("let a=head\nlet b = mlp\n\n\n\nlet c =\n  head\n")
    diff = run("fmt", "--diff", "a.patch").out
    subprocess.run(["patch", "-s", str(path)], input=diff, text=True, check=True)
    assert run("fmt", "--check", "a.patch").exit == 0


def test_stdin_goes_to_stdout(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(UGLY.encode())))
    assert run("fmt", "-") == Ran(0, PRETTY, "")


def test_a_file_with_errors_is_left_alone_and_the_others_are_not(run: Run) -> None:
    written("experiment {\nlet = 3\n", "bad.patch")
    good = written(UGLY)
    ran = run("fmt", "bad.patch", "a.patch", "missing.patch")
    assert ran.exit == 1
    assert ran.codes == ["syntax-error", "syntax-error", "missing-spec"]
    assert Path("bad.patch").read_text() == "experiment {\nlet = 3\n"
    assert good.read_text() == PRETTY


def test_a_folder_that_may_not_be_written_is_said(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    path = written(UGLY)
    monkeypatch.setattr("os.replace", refuse)
    ran = run("fmt", "a.patch")
    assert (ran.exit, ran.codes) == (3, ["cannot-write"])
    assert [*Path().iterdir()] == [path]


def test_what_would_change_the_meaning_is_refused(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written(UGLY)
    monkeypatch.setattr("patchc.parse.format.lay_out", lambda *_: "let a = mlp # c\n")
    assert run("fmt", "a.patch").codes == ["internal"]
    assert path.read_bytes() == UGLY.encode()


def test_it_needs_no_torch() -> None:
    code = f"import sys; from patchc.cli import main\ntry: main(['fmt', '--check', {str(EXAMPLES[0])!r}])\n" + (
        "except SystemExit as e: assert e.code == 0\nassert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# ---- the examples


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda p: p.name)
def test_every_example_is_formatted(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert format_spec(Source(path.name, text)) == text
