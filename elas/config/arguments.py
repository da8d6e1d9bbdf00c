"""Parser for commands that accept settings (`--section.key VALUE`) besides their own options."""

import textwrap

from elas.command import Parser
from elas.config.hints import meant_option
from elas.config.reading import presets
from elas.config.schema import SECTIONS


class SettingsParser(Parser):
    """A parser whose `--help` lists sections and presets, and whose errors suggest the setting that was meant.

    It knows only the command's own options: `elas.config.split_overrides` must remove the settings first.
    """

    def __init__(self, prog: str, description: str, example: str):
        presets_ = textwrap.fill(
            f"  presets: {' '.join(presets())}", 100, subsequent_indent=" " * 11, break_on_hyphens=False
        )
        about = (
            "settings:\n"
            "  --section.key VALUE overrides the configuration file; `elas config` explains every key\n"
            f"  sections: {' '.join(SECTIONS)}\n{presets_}\n\n"
        )
        super().__init__(prog, description, example, about=about)

    def meant(self, word: str) -> str | None:
        """A suggestion for an unknown option; None without one."""
        return meant_option(word)
