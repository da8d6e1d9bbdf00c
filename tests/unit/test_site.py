"""The documentation's site, which `make docs` builds: links, generated pages, and nothing from the network."""

import re
import xml.etree.ElementTree as ET
from dataclasses import dataclass
from urllib.parse import unquote

import pytest
import yaml
from support.docs import ROOT, pages

from elas.config import KEYS, presets, schema
from elas.config.catalogue import catalogue

import commands  # isort: skip  docs/site, found by support.docs
import generated  # isort: skip

DOCS = ROOT / "docs"
_ADDRESS = re.compile(r"https?://[^\s)>\"`\]|]+")


class _Loader(yaml.SafeLoader):
    """Reads mkdocs.yml."""


def nav_of(config: dict) -> list[str]:
    def walk(item) -> list[str]:
        if isinstance(item, str):
            return [item]
        return [path for one in (item.values() if isinstance(item, dict) else item) for path in walk(one)]

    return walk(config["nav"])


@pytest.fixture(scope="module")
def config() -> dict:
    return yaml.load((DOCS / "site" / "mkdocs.yml").read_text(), _Loader)


def test_every_page_is_in_the_menu_once(config):
    there = [path.relative_to(DOCS).as_posix() for path in pages()[1:]]
    assert sorted(nav_of(config)) == sorted([*there, *generated.PAGES])


@pytest.mark.parametrize("page", pages(), ids=lambda path: path.name)
def test_links_lead_to_files_that_exist(page):
    """Those of README too, which is no page of the site; anchors within the site are `make docs`'s."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        path = unquote(link.partition("#")[0])
        if not path or "://" in link:
            continue
        target = (page.parent / path).resolve()
        made = target.is_relative_to(DOCS) and target.relative_to(DOCS).as_posix() in generated.PAGES
        assert made or target.exists(), f"{page.name}: {link}"


def test_links_to_the_outside_are_listed_in_one_file():
    listed = set(_ADDRESS.findall((DOCS / "links.md").read_text()))
    used = {address for page in pages() if page.name != "links.md" for address in _ADDRESS.findall(page.read_text())}
    assert listed == used


def test_configuration_page_has_every_key():
    text = generated.configuration()
    assert [key for key in KEYS if f"\n### {key} " not in text] == []
    says = (
        "Peak learning rate; with muon, of matrices, whose steps are scaled by √(256 / hidden size).\n\n"
        "`float` · default `0.001` · a value from 1e-12 to 1000\n"
    )
    assert says in text


def test_presets_page_has_every_preset():
    text = generated.presets_page()
    assert [name for name in presets() if f"| `{name}` |" not in text] == []


def test_commands_page_has_every_command_and_option():
    text = generated.commands_page()
    for group in commands.groups():
        for command in group.commands:
            assert f" {command.title}\n" in text
            for action in command.parser._actions:
                if action.help != "==SUPPRESS==" and action.option_strings and action.dest != "help":
                    assert action.option_strings[0] in text


def test_a_key_without_a_description_fails_the_build(monkeypatch):
    @dataclass(kw_only=True)
    class Bare:
        """A section."""

        word: str = ""

    monkeypatch.setitem(schema.SECTIONS, "bare", Bare)
    monkeypatch.setattr(generated, "catalogue", catalogue.__wrapped__)
    with pytest.raises(KeyError, match="word"):
        generated.configuration()


def test_an_option_without_a_description_fails_the_build(monkeypatch):
    found = commands.groups()
    found[0].commands[0].parser.add_argument("--bare")
    monkeypatch.setattr(generated, "groups", lambda: found)
    with pytest.raises(ValueError, match="elas quickstart --bare: has no description"):
        generated.commands_page()


def test_nothing_is_loaded_from_the_network(config):
    assert config["theme"]["font"] is False and "repo_url" not in config
    assert [*config["plugins"], *config["extra_css"]] == ["search", "site/style.css"]
    assert not _ADDRESS.findall((DOCS / "site" / "style.css").read_text())


def test_the_build_fails_for_a_warning():
    """`--quiet` would drop warnings before `--strict` counts them."""
    (line,) = [line for line in (ROOT / "Makefile").read_text().splitlines() if "mkdocs build" in line]
    assert "--strict" in line and "--quiet" not in line and " -q" not in line


@pytest.mark.parametrize("path", sorted((DOCS / "figures").glob("*.svg")), ids=lambda path: path.stem)
def test_drawings_follow_light_and_dark(path):
    """Colours are variables: in the file for both schemes, in the site's style sheet for its own toggle."""
    root = ET.parse(path).getroot()
    assert root.get("class") == "elas"
    text, style = path.read_text(), (DOCS / "site" / "style.css").read_text()
    light, dark = text.split("@media (prefers-color-scheme: dark)")
    used = set(re.findall(r"var\((--[a-z-]+)\)", text))
    for where in (light, dark, style.split('"slate"')[0], style.split('"slate"')[1]):
        assert used <= set(re.findall(r"(--[a-z-]+):", where))
    fixed = [one for one in root.iter() if re.match("#|rgb", one.get("fill", "") + one.get("stroke", ""))]
    assert not fixed
