"""Checkpoints: written whole or not at all, verified before they are read, the last few kept.

`RUN/checkpoints/step-00001000/` holds `state.pt` (tensors and numbers) and `meta.json` (the step,
the settings that decide the result, versions, and the sha256 of `state.pt`).
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch

from sgan_dist.errors import TransientError, UserError
from sgan_dist.files import flush_folder, write_whole
from sgan_dist.parallel.collectives import as_bytes

PREFIX = "step-"
PARTIAL = ".partial-"


def save(run: Path, step: int, state: dict[str, Any], meta: dict[str, Any], keep: int) -> Path:
    """Writes a checkpoint under a temporary name, renames it into place, then prunes old ones.

    A kill at any moment leaves the earlier checkpoints as they were. Returns the new one's folder.

    Raises:
        TransientError: the disk is full or not writable.
    """
    folder = run / "checkpoints"
    name = f"{PREFIX}{step:08d}"
    partial, final = folder / f"{PARTIAL}{name}", folder / name
    try:
        for leftover in folder.glob(f"{PARTIAL}*"):
            shutil.rmtree(leftover)
        partial.mkdir(parents=True)
        with open(partial / "state.pt", "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        meta = meta | {"step": step, "sha256": _sha256(partial / "state.pt")}
        write_whole(partial / "meta.json", json.dumps(meta, indent=1), fsync=True)
        if final.exists():  # a damaged one, which the resume skipped
            shutil.rmtree(final)
        partial.rename(final)
        flush_folder(folder)
        write_whole(run / "latest", f"checkpoints/{name}\n", fsync=True)
        checkpoints = _all(run)
        # Those of later steps are damaged and were skipped; the run writes them again.
        kept = [path for path in checkpoints if path.name <= name][:keep]
        for path in set(checkpoints).difference(kept):
            shutil.rmtree(path)
    except (OSError, RuntimeError) as error:  # torch's writer wraps a full disk in a RuntimeError
        raise TransientError(
            f"cannot write checkpoint {final}: {error}; free some space and run the same command again"
        ) from error
    return final


def latest(run: Path) -> tuple[Path | None, list[str]]:
    """Returns the newest whole checkpoint, and a line for each newer one that is damaged."""
    damaged: list[str] = []
    for path in _all(run):
        try:
            if _sha256(path / "state.pt") == read_meta(path)["sha256"]:
                return path, damaged
            problem = "state.pt does not match its checksum"
        except FileNotFoundError as error:
            problem = f"{Path(error.filename).name} is missing"
        except (OSError, ValueError, KeyError, TypeError) as error:
            problem = f"it cannot be read: {error!r}"
        damaged.append(f"checkpoint {path.name} is damaged ({problem}): skipped")
    return None, damaged


def read_meta(path: Path) -> dict[str, Any]:
    """Returns the step, settings and versions of a checkpoint."""
    return json.loads((path / "meta.json").read_text())  # type: ignore[no-any-return]


def read_state(path: Path) -> dict[str, Any]:
    """Returns the tensors of a checkpoint, on the CPU."""
    return torch.load(path / "state.pt", map_location="cpu", weights_only=True)  # type: ignore[no-any-return]


def refuse_other_run(path: Path, saved: dict[str, Any], current: dict[str, Any]) -> None:
    """Raises UserError where a checkpoint was made under other settings, or from another dataset."""
    changed = [
        f"{key} was {saved[key]!r} and is now {current[key]!r}"
        for key in sorted(saved.keys() & current.keys())
        if saved[key] != current[key]
    ]
    if changed:
        raise UserError(
            f"{path.parent.parent} holds another run: {'; '.join(changed)}. Use the old values again,"
            " or start a new run with another --run_dir"
        )


def weights_sha256(networks: dict[str, torch.nn.Module]) -> str:
    """Returns the sha256 of all parameters and buffers, in name order: equal weights, equal digest.

    Extra state that is no tensor is left out.
    """
    digest = hashlib.sha256()
    for key, value in sorted(torch.nn.ModuleDict(networks).state_dict().items()):
        if not isinstance(value, torch.Tensor):
            continue
        digest.update(f"{key} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(as_bytes(value))
    return digest.hexdigest()


def _all(run: Path) -> list[Path]:
    """Returns the checkpoint folders, newest first."""
    folders = (run / "checkpoints").glob(f"{PREFIX}{'[0-9]' * 8}")
    return sorted((path for path in folders if path.is_dir()), reverse=True)


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
