"""YAML files of settings, as people write them."""

from pathlib import Path
from typing import Any

import yaml

from early_exit.errors import UserError


def read_yaml(path: Path, kind: str) -> dict[str, Any]:
    """The mapping in a YAML file in UTF-8 or UTF-16; an empty file gives an empty one.

    kind: what the file is, for messages. Raises UserError if it cannot be read.
    """
    try:
        values = yaml.safe_load(path.read_bytes())
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise UserError(f"{path} holds a {type(values).__name__}; {kind} must be a mapping")
    return values
