"""Pages of the documentation, and the code blocks in them."""

import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "docs" / "site"))  # `commands`, `generated`

_BLOCK = re.compile(
    r"(?:<!-- not run: (?P<why>[^\n]+) -->\n)?^```(?P<kind>\w*)\n(?P<text>.*?)^```$", re.DOTALL | re.MULTILINE
)


@dataclass(frozen=True)
class Block:
    """A fenced block.

    Attributes:
        page: relative to the repository.
        line: its first line in the page.
        kind: bash, python, yaml, text; empty without one.
        text: what stands in it.
        not_run: the reason in `<!-- not run: REASON -->` on the line before; empty without one.
    """

    page: str
    line: int
    kind: str
    text: str
    not_run: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def pages() -> list[Path]:
    """README and every page of the documentation."""
    found = sorted((ROOT / "docs").rglob("*.md"))
    return [ROOT / "README.md", *(path for path in found if "experiments" not in path.parts)]


def blocks(page: Path) -> Iterator[Block]:
    """The fenced blocks of a page, in order."""
    text = page.read_text(encoding="utf-8")
    for match in _BLOCK.finditer(text):
        line = text.count("\n", 0, match.start("text"))
        yield Block(str(page.relative_to(ROOT)), line, match["kind"], match["text"], match["why"] or "")


def all_blocks(kind: str) -> list[Block]:
    """Those of one kind in all pages."""
    return [block for page in pages() for block in blocks(page) if block.kind == kind]


def shell_lines(text: str) -> list[str]:
    """Commands of a block: continued lines joined; comments, here-documents' bodies and empty lines left out."""
    lines, until = [], None
    for line in re.sub(r"\\\n\s*", " ", text).splitlines():
        if until is not None:
            until = None if line.strip() == until else until
        elif line.strip() and not line.lstrip().startswith("#"):
            lines.append(line.strip().removeprefix("$ "))
            until = here[1] if (here := re.search(r"<<\s*'?(\w+)'?", line)) else None
    return lines
