"""The kind of model that a Hugging Face folder holds. Does not import torch."""

import json
from pathlib import Path

from elas.errors import UserError


def model_type(folder: Path) -> str:
    """`model_type` of a Hugging Face folder's config.json; `elas` for `--form elas`.

    Raises:
        UserError: there is no such file, or it is not one.
    """
    path = folder / "config.json"
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        why = f"no readable config.json ({error.strerror})"
        raise UserError(f"{folder}: is no Hugging Face model: {why}; give a folder that has one") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: is not JSON ({error}); give another folder") from error
    kind = found.get("model_type") if isinstance(found, dict) else None
    if not isinstance(kind, str):
        raise UserError(f"{path}: names no model_type; give a Hugging Face model's folder")
    return kind
