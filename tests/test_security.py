"""What SECURITY.md claims of files that are read."""

from __future__ import annotations

import ast
import pickle
from pathlib import Path

import pytest

from sgan_dist.checkpoint import read_state
from sgan_dist.errors import UserError
from sgan_dist.evaluation.classifier import load_classifier
from tests.ranks import REPOSITORY

UNPICKLERS = {"pickle", "dill", "joblib", "cloudpickle", "shelve"}
MESSAGES = REPOSITORY / "sgan_dist" / "parallel" / "agreement.py"  # of a job's own ranks


class Touches:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[Path]]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("folder", ["sgan_dist", "launch", "examples"])
def test_no_module_unpickles(folder: str) -> None:
    for file in (REPOSITORY / folder).rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                imported = {name.name.split(".")[0] for name in node.names}
                assert imported & UNPICKLERS <= ({"pickle"} if file == MESSAGES else set()), file
            elif isinstance(node, ast.ImportFrom):
                assert (node.module or "").split(".")[0] not in UNPICKLERS, file
                if node.module in ("torch", "numpy", "yaml"):  # else the calls below are missed
                    assert "load" not in {name.name for name in node.names}, file
            elif isinstance(node, ast.Call):
                options = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
                assert options.get("allow_pickle", "False") == "False", file
                if ast.unparse(node.func) == "torch.load":
                    assert options.get("weights_only") == "True", file
                assert ast.unparse(node.func) not in ("yaml.load", "yaml.unsafe_load"), file


def test_a_checkpoint_that_is_a_pickle_runs_nothing(tmp_path: Path) -> None:
    (tmp_path / "state.pt").write_bytes(pickle.dumps(Touches(tmp_path / "ran"), protocol=2))
    with pytest.raises(pickle.UnpicklingError, match=r"[Ww]eights"):
        read_state(tmp_path)
    assert not (tmp_path / "ran").exists()


def test_a_classifier_that_is_a_pickle_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "classifier.safetensors"
    path.write_bytes(pickle.dumps(Touches(tmp_path / "ran")))
    with pytest.raises(UserError, match="is not a classifier of sgan_dist"):
        load_classifier(path)
    assert not (tmp_path / "ran").exists()
