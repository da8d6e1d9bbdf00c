"""How much of a corpus was held out. Documents are drawn by a hash, so a few large ones may be much of the text."""

FAR = 2
"""Times the share that was asked for, from which on it is a warning."""


def held_out_share(facts: dict, asked: float) -> dict:
    """What was held out, as shares of all that came out.

    Args:
        facts: `documents`, `tokens`, `bytes_in`, and the same of what is held out with `valid_` before them.
        asked: `--valid-fraction`.

    Returns:
        `held_out` {`asked`, `documents`, `tokens`, `bytes`}, each from 0 to 1; empty where nothing was to be held out.
    """
    if "valid_documents" not in facts:
        return {}
    shares = {"asked": asked}
    for name, key in (("documents", "documents"), ("tokens", "tokens"), ("bytes", "bytes_in")):
        held_out = facts[f"valid_{key}"]
        shares[name] = round(held_out / max(1, held_out + facts[key]), 6)
    return {"held_out": shares}


def held_out_in_words(shares: dict) -> str:
    """`2.5% of the documents, 14.2% of the bytes, 14.0% of the tokens`."""
    return ", ".join(f"{shares[name]:.2%} of the {name}" for name in ("documents", "bytes", "tokens"))


def held_out_warning(facts: dict) -> str:
    """A line where far more text was held out than was asked for; else empty."""
    shares = facts.get("held_out")
    if not shares or max(shares["bytes"], shares["tokens"]) <= FAR * shares["asked"]:
        return ""
    mean = (facts["bytes_in"] + facts["valid_bytes_in"]) / (facts["documents"] + facts["valid_documents"])
    what = f"held out {held_out_in_words(shares)}"
    fix = f"give --valid-max-bytes N to hold out no document of more bytes (they have {mean:,.0f} on average)"
    return f"--valid-fraction {shares['asked']:g}: {what}; {fix}, and --overwrite"
