"""The share of a corpus that was held out. Documents are chosen by hash, so a few large ones may dominate the text."""

WARNING_FACTOR = 2
"""A held-out share above this multiple of the requested share gives a warning."""


def held_out_share(facts: dict, asked: float) -> dict:
    """Held-out documents as shares of all written documents.

    Args:
        facts: `documents`, `tokens`, `bytes_in` of the training side, and with prefix `valid_` of the held-out side.
        asked: `--valid-fraction`.

    Returns:
        `held_out` {`asked`, `documents`, `tokens`, `bytes`}, each from 0 to 1; empty without a held-out side.
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
    """A warning line if far more text was held out than requested; else empty."""
    shares = facts.get("held_out")
    if not shares or max(shares["bytes"], shares["tokens"]) <= WARNING_FACTOR * shares["asked"]:
        return ""
    mean = (facts["bytes_in"] + facts["valid_bytes_in"]) / (facts["documents"] + facts["valid_documents"])
    what = f"held out {held_out_in_words(shares)}"
    fix = f"give --valid-max-bytes N to keep larger documents in training (the mean is {mean:,.0f} bytes)"
    return f"--valid-fraction {shares['asked']:g}: {what}; {fix}, and --overwrite"
