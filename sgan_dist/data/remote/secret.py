"""What is secret in the URLs of shards: users, passwords and signatures, in one file beside the index.

Only its owner can read it. Nothing of it is in index.json, in messages, checkpoints or W&B.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

from sgan_dist.data.remote.urls import is_remote
from sgan_dist.errors import UserError

SECRETS = "secrets.json"


def write_secrets(root: Path, locations: Mapping[str, str]) -> None:
    """Keeps the URLs of shards, by name, that hold more than their names; replaces earlier ones."""
    secrets = {
        name: location
        for name, location in locations.items()
        if is_remote(location) and name != location
    }
    path = root / SECRETS
    path.unlink(missing_ok=True)
    if not secrets:
        return
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with open(descriptor, "w", encoding="utf-8") as file:
        json.dump(secrets, file, indent=1)
        file.flush()
        os.fsync(file.fileno())


def read_secrets(root: str) -> dict[str, str]:
    """Returns name -> URL of the shards of a local dataset whose URLs are secret.

    Raises:
        UserError: the file cannot be read.
    """
    if is_remote(root):
        return {}
    path = Path(root) / SECRETS
    try:
        secrets: dict[str, str] = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(
            f"cannot read {path}: {reason}; it holds the signed URLs of the shards: index with --renew"
        ) from None
    return secrets
