"""What mkdocs does beside its own work: pages made from the code, source files that pages link to, and drawings.

- `reference/*.md` are made by `generated.py` at each build.
- A link that leaves the documentation (`../launch/ssh/hostfile.example`, `experiments`) goes to a page that shows the
  file or lists the folder.
- A link whose text is a page's file name, `[kernels.md](kernels.md)`, shows the page's title.
- A drawing `figures/NAME.svg` is put into its page, so that it has the colours of the page in light and dark mode.
"""

import os
import re
import sys
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

SITE = Path(__file__).resolve().parent
DOCS, ROOT = SITE.parent, SITE.parents[1]
sys.path.insert(0, str(SITE))
os.environ["COLUMNS"] = "80"  # the width of usages

import generated  # noqa: E402  found through the path above

_LINK = re.compile(r"(?<!!)\]\(([^)\s#]+)(#[^)\s]*)?\)")
_NAMED = re.compile(r"\[[\w-]+\.md\]\(([^)\s#]+\.md)(#[^)\s]*)?\)")
_IMAGE = re.compile(r'(<p>\s*)?<img alt="([^"]*)" src="[^"]*figures/([\w-]+)\.svg"\s*/?>(\s*</p>)?')
_LANGUAGES = {".py": "python", ".json": "json", ".yaml": "yaml", ".sbatch": "bash", ".sh": "bash"}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages and the pages of source files."""
    for path, page in generated.PAGES.items():
        try:
            files.append(File.generated(config, path, content=page()))
        except (KeyError, TypeError, ValueError) as error:
            raise PluginError(f"{path}: {error}") from error
    shown = {target for file in files.documentation_pages() for target in _sources(file, files)}
    for target in sorted(shown):
        files.append(File.generated(config, _page_of(target), content=_source_page(target)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Links to source files go to their pages; links named after a page's file have its title."""
    here = Path(page.file.src_uri).parent

    def changed(match: re.Match) -> str:
        target = _target(match[1], here, files)
        if target is None:
            return match[0]
        return f"]({os.path.relpath(_page_of(target), here)})"

    def titled(match: re.Match) -> str:
        file = files.get_file_from_path(os.path.normpath(here / match[1]))
        if file is None:
            return match[0]
        title = next((line[2:] for line in file.content_string.splitlines() if line.startswith("# ")), match[1])
        return f"[{title}]({match[1]}{match[2] or ''})"

    return _NAMED.sub(titled, _LINK.sub(changed, markdown))


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Drawings in the page, rather than beside it."""

    def inlined(match: re.Match) -> str:
        svg = (DOCS / "figures" / f"{match[3]}.svg").read_text(encoding="utf-8")
        return f'<figure class="drawing" role="img" aria-label="{match[2]}">{svg}</figure>'

    return _IMAGE.sub(inlined, html)


def _sources(file: File, files: Files) -> set[Path]:
    here = Path(file.src_uri).parent
    found = (_target(match[1], here, files) for match in _LINK.finditer(file.content_string))
    return {target for target in found if target is not None}


def _target(link: str, here: Path, files: Files) -> Path | None:
    """The file or folder outside of the documentation that a link names, from the repository's root; else None."""
    if "://" in link or link.startswith(("mailto:", "/")):
        return None
    path = Path(os.path.normpath(DOCS / here / link))
    if not path.exists() or not path.is_relative_to(ROOT):
        return None
    if path.is_relative_to(DOCS):
        file = files.get_file_from_path(path.relative_to(DOCS).as_posix())
        if file is not None and file.inclusion.is_included():
            return None
    return path.relative_to(ROOT)


def _page_of(target: Path) -> str:
    return f"source/{target.as_posix()}.md"


def _source_page(target: Path) -> str:
    path = ROOT / target
    head = f"---\nsearch:\n  exclude: true\n---\n# {target}\n\n"
    if path.is_dir():
        names = sorted(one.name + "/" * one.is_dir() for one in path.iterdir() if one.name != "__pycache__")
        return head + "A folder of the repository:\n\n" + "".join(f"- `{name}`\n" for name in names)
    text = path.read_text(encoding="utf-8")
    return f"{head}`````{_LANGUAGES.get(path.suffix, 'text')}\n{text.rstrip()}\n`````\n"
