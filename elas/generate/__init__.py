"""Text from a checkpoint or an exported folder."""
