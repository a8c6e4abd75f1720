"""Checkpoints: written whole or not at all, verified before they are read, the last few kept.

`RUN/checkpoints/step-00001000/` holds `state.pt` (tensors and numbers) and `meta.json` (the step,
what the run means, versions, and the sha256 of `state.pt`).
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch

from sgan_dist.distributed import as_bytes
from sgan_dist.errors import Outage, UserError

PREFIX = "step-"
PARTIAL = ".partial-"


def save(run: Path, step: int, state: dict[str, Any], meta: dict[str, Any], keep: int) -> Path:
    """Writes a checkpoint under a temporary name, renames it into place, then prunes old ones.

    A kill at any moment leaves the earlier checkpoints as they were.

    Raises:
        UserError: the disk is full or not writable.
    """
    folder = run / "checkpoints"
    name = f"{PREFIX}{step:08d}"
    partial, final = folder / f"{PARTIAL}{name}", folder / name
    try:
        for left_over in folder.glob(f"{PARTIAL}*"):
            shutil.rmtree(left_over)
        partial.mkdir(parents=True)
        with open(partial / "state.pt", "wb") as file:
            torch.save(state, file)
            _flush(file)
        meta = meta | {"step": step, "sha256": _sha256(partial / "state.pt")}
        with open(partial / "meta.json", "w") as text:
            json.dump(meta, text, indent=1)
            _flush(text)
        _flush_folder(partial)
        if final.exists():  # a damaged one that was passed over at resume
            shutil.rmtree(final)
        partial.rename(final)
        _flush_folder(folder)
        _replace_text(run / "latest", f"checkpoints/{name}\n")
        kept = _all(run)
        # Those of later steps were passed over as damaged; the run makes them anew.
        later = [path for path in kept if path.name > name]
        for old in later + [path for path in kept if path.name <= name][keep:]:
            shutil.rmtree(old)
    except (OSError, RuntimeError) as error:  # torch's writer wraps a full disk in a RuntimeError
        raise Outage(
            f"can't write checkpoint {final}: {error}; free some space and run the same command again"
        ) from error
    return final


def latest(run: Path) -> tuple[Path | None, list[str]]:
    """The newest whole checkpoint, and a line for each newer one that is damaged."""
    passed_over: list[str] = []
    for path in _all(run):
        problem = _damage(path)
        if problem is None:
            return path, passed_over
        passed_over.append(f"checkpoint {path.name} is damaged ({problem}): passed over")
    return None, passed_over


def read_meta(path: Path) -> dict[str, Any]:
    """The step and fingerprints of a checkpoint."""
    return json.loads((path / "meta.json").read_text())  # type: ignore[no-any-return]


def read_state(path: Path) -> dict[str, Any]:
    """The tensors of a checkpoint, on the CPU."""
    if not path.is_dir():
        raise UserError(
            f"checkpoint {path} is not visible on every rank: put run_dir on a file system that all"
            " nodes share"
        )
    return torch.load(path / "state.pt", map_location="cpu", weights_only=True)  # type: ignore[no-any-return]


def refuse_other_meaning(path: Path, saved: dict[str, Any], now: dict[str, Any]) -> None:
    """Raises UserError where a checkpoint was made under another configuration or dataset."""
    changed = [
        f"{key} was {saved.get(key)!r} and is now {now.get(key)!r}"
        for key in sorted(saved.keys() | now.keys())
        if saved.get(key) != now.get(key)
    ]
    if changed:
        raise UserError(
            f"{path.parent.parent} holds another run: {'; '.join(changed)}. Go back to the old"
            " values, or start anew with another --run_dir"
        )


def weights_sha256(networks: dict[str, torch.nn.Module]) -> str:
    """sha256 over all parameters and buffers, in name order: equal weights, equal digest."""
    digest = hashlib.sha256()
    tensors = {
        f"{name}.{key}": value
        for name, network in networks.items()
        for key, value in network.state_dict().items()
    }
    for key in sorted(tensors):
        value = tensors[key]
        digest.update(f"{key} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(as_bytes(value))
    return digest.hexdigest()


def _all(run: Path) -> list[Path]:
    """Checkpoint folders, newest first."""
    found = (run / "checkpoints").glob(f"{PREFIX}{'[0-9]' * 8}")
    return sorted((path for path in found if path.is_dir()), reverse=True)


def _damage(path: Path) -> str | None:
    try:
        meta = read_meta(path)
        if _sha256(path / "state.pt") != meta["sha256"]:
            return "state.pt does not match its checksum"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"it can't be read: {error!r}"
    return None


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())


def _flush_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _replace_text(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.partial")
    with open(temporary, "w") as file:
        file.write(text)
        _flush(file)
    temporary.replace(path)
