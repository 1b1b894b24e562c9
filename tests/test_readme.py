"""README.md against the code: its line numbers, its commands, and the block that CI runs.

    python tests/test_readme.py        # set the line numbers right after an edit
"""

import ast
import re
import shlex
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
REFERENCE = re.compile(r"`([\w/]+\.py):(\d+) ([^`]+)`")
ARGUMENT = re.compile(r'"(--[\w-]+)"')


def places(file: str, name: str) -> list[int]:
    """Lines of a file that define `name`; if none does, lines that hold it."""
    lines = (ROOT / file).read_text(encoding="utf-8").splitlines()
    word = re.escape(name)
    defines = re.compile(rf"\s*(def|class) {word}\b|{word}(: \w+)? = ")
    found = [i for i, line in enumerate(lines, 1) if defines.match(line)]
    holds = re.compile(rf"(?<!\w){word}(?!\w)")
    return found or [i for i, line in enumerate(lines, 1) if holds.search(line)
                     and not line.startswith(("from ", "import "))]


def commands(readme: str) -> list[list[str]]:
    """Words of every python or torchrun command in the README's sh blocks."""
    out = []
    for block in re.findall(r"^```sh\n(.*?)^```$", readme, re.M | re.S):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            cuts = [i for i, w in enumerate(words) if w in ("|", "&&", ";")]
            for first, last in zip([0, *(i + 1 for i in cuts)], [*cuts, len(words)]):
                part = words[first:last]
                if part and Path(part[0]).name in ("python", "python3", "torchrun"):
                    out.append(part)
    return out


def known_flags(script: Path, command: str) -> set[str]:
    """Flags that a script's argparse takes, those of `command` only where it is a sub-command."""
    source = script.read_text(encoding="utf-8")
    lists = re.findall(r'\blists, .* = "([^"]+)"', source)  # what several commands share
    own = {flag for call in re.findall(r"\badd\(([^)]+)", source) for flag in ARGUMENT.findall(call)
           if command in re.findall(r"[\w-]+", call.replace("lists", " ".join(lists)))}
    return (own or set(ARGUMENT.findall(source))) | {"--help"}


def test_line_numbers():
    references = REFERENCE.findall(README.read_text(encoding="utf-8"))
    assert len(references) > 20
    wrong = [f"{file}:{line} {name}: now at {places(file, name)}"
             for file, line, name in references if int(line) not in places(file, name)]
    assert not wrong, "\n".join(["run `python tests/test_readme.py`", *wrong])


def test_commands():
    found = commands(README.read_text(encoding="utf-8"))
    scripts = [words for words in found if "-m" not in words[:2]]
    assert len(scripts) > 20
    for words in scripts:
        at = next(i for i, word in enumerate(words) if word.endswith(".py"))
        script, line = ROOT / words[at], shlex.join(words)
        assert script.exists(), line
        rest = words[at + 1:]
        flags = {w.partition("=")[0] for w in rest if w.startswith("--")}
        assert flags <= known_flags(script, rest[0] if rest else ""), line
        source = script.read_text(encoding="utf-8")
        if "add_subparsers" in source:
            assert f'"{rest[0]}"' in source, line
        for flag in ("--stage", "--task"):  # of which the README names the most
            if flag in rest:
                assert f'"{rest[rest.index(flag) + 1]}"' in source, line


def test_ci_finds_the_test_command():
    """.ci/run takes the sh block after this marker, as it stands."""
    block = re.search(r"^<!-- test command -->\n```sh\n(.*?)^```$",
                      README.read_text(encoding="utf-8"), re.M | re.S)
    assert "python3 -m pytest" in block[1] and "requirements.txt" in block[1]


def renumber(match: re.Match) -> str:
    """A reference with the nearest line that is right; one whose name is gone stays as it is."""
    file, line, name = match.groups()
    here = min(places(file, name), key=lambda i: abs(i - int(line)), default=line)
    return f"`{file}:{here} {name}`"


@pytest.mark.parametrize("name", ["encoder", "adapter", "decoder", "flow", "vocoder"])
def test_components_stand_alone(name):
    """Each can be read, and taken elsewhere, by itself."""
    tree = ast.parse((ROOT / f"{name}.py").read_text(encoding="utf-8"))
    used = {n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    used |= {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
    assert not used & {path.stem for path in ROOT.glob("*.py")}


if __name__ == "__main__":
    text = README.read_text(encoding="utf-8")
    README.write_text(REFERENCE.sub(renumber, text), encoding="utf-8")
