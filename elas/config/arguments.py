"""Commands that take settings: `--section.key VALUE` beside their own options."""

import textwrap

from elas.command import Parser
from elas.config.hints import meant_option
from elas.config.reading import presets
from elas.config.schema import SECTIONS


class SettingsParser(Parser):
    """A parser whose `--help` names sections and presets, and whose mistakes name the setting that may be meant.

    It knows the command's own options only: `elas.config.split_overrides` takes the settings out first.
    """

    def __init__(self, prog: str, description: str, example: str):
        presets_ = textwrap.fill(
            f"  presets: {' '.join(presets())}", 100, subsequent_indent=" " * 11, break_on_hyphens=False
        )
        about = (
            "settings:\n"
            "  --section.key VALUE wins over the configuration file; `elas config` explains every key\n"
            f"  sections: {' '.join(SECTIONS)}\n{presets_}\n\n"
        )
        super().__init__(prog, description, example, about=about)

    def meant(self, word: str) -> str | None:
        """The setting that an unknown option may stand for."""
        return meant_option(word)
