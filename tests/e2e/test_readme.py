"""The README's commands, run exactly as they stand there, in a fresh copy, and compared with what it shows.

```console blocks hold commands after `$ ` and what they print; ```python blocks that begin with `# NAME.py` are files
to save. ```sh blocks hold the set-up, which every test has behind it: they are not run, only their make targets are
looked for.
Numbers, times and widths of columns differ from machine to machine and are not compared.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).parents[2]
README: Final = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCK: Final = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
END: Final = "--- here ends what the command printed ---"


def test_the_commands_show_what_the_readme_shows(tmp_path: Path) -> None:
    here = fresh_copy(tmp_path)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PERDURE")}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    script, expected = [], []
    for kind, text in BLOCK.findall(README):
        if kind == "python":
            name = re.match(r"# (\w+\.py)\n", text)
            if name is not None:
                (here / name[1]).write_text(text, encoding="utf-8")
        elif kind == "console":
            for command, shown in commands(text):
                script.append(f"{{ {command}\n}} 2>&1\necho '{END}'\n")
                expected.append((command, shown))
    # One shell for all of them: a README is read in one terminal, and `$!` is the worker before.
    done = subprocess.run(
        ["bash", "-c", "".join(script) + "wait\n"],
        cwd=here,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        timeout=240,
        check=False,
    )
    outputs = done.stdout.split(f"{END}\n")
    assert len(outputs) == len(expected) + 1
    for (command, shown), output in zip(expected, outputs, strict=False):
        assert alike(output) == alike(shown), f"`{command}` prints\n{output}\nand not\n{shown}"


def test_the_set_up_is_made_of_make_targets() -> None:
    """Looked up, not run: `make test` would run itself."""
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = re.findall(r"^make ([\w-]+)", "".join(text for kind, text in BLOCK.findall(README) if kind == "sh"), re.M)
    assert targets[:2] == ["demo", "test"]
    for target in targets:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_every_link_leads_somewhere() -> None:
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    for page in pages:
        for link in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text(encoding="utf-8")):
            if "://" not in link:
                assert (page.parent / link).exists(), f"{page.name}: {link}"


def fresh_copy(folder: Path) -> Path:
    """What a clone has: the files that git knows, as they are now.

    Where git knows nothing of this folder (an unpacked sdist, no git): everything but what set-up and tests have made.
    """
    here = folder / "perdure"
    names = known_to_git()
    if not names:
        shutil.copytree(ROOT, here, ignore=shutil.ignore_patterns(".*", "__pycache__", "*.db*", "dist"))
    for name in names:
        if (ROOT / name).is_file():  # and was not just removed
            (here / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, here / name)
    return here


def known_to_git() -> list[str]:
    """The tracked files, named from here; none if this folder is in no repository or git is not installed."""
    try:
        said = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return []
    return said.split("\0")[:-1]


def commands(text: str) -> Iterator[tuple[str, str]]:
    """Each command of a console block, and what it shows."""
    for part in re.split(r"^\$ ", text, flags=re.MULTILINE)[1:]:
        command, _, shown = part.partition("\n")
        yield command, shown


def alike(text: str) -> list[str]:
    """What two runs of a command have in common."""
    # A shell that nobody types into says more about a command that was killed.
    text = re.sub(r"^bash: line .* Killed .*$", "Killed", text, flags=re.MULTILINE)
    text = re.sub(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d", "DATE", text)
    text = re.sub(r"\d+(\.\d+)? (ms|s|min|h|d)\b( \d+ (s|min|h))?", "TIME", text)
    lines = [re.sub(" +", " ", line).strip() for line in text.strip().splitlines()]
    # On a slow machine a step may be worth a line before it is done.
    return [line for line in lines if not line.endswith(": running")]
