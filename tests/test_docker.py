"""The image's files, and its install and start steps, without a container engine."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.ranks import REPOSITORY, environment

TEXT = (REPOSITORY / "docker" / "Dockerfile").read_text()
# target -> its instructions, a line each: (name, arguments)
STAGES = {
    stage.split("\n")[0].split(" AS ")[1]: re.findall(
        r"^([A-Z]+) (.*)$", re.sub(r" *\\\n *", " ", stage), re.M
    )
    for stage in re.split(r"^FROM ", TEXT, flags=re.M)[1:]
}


def arguments(target: str, name: str) -> list[str]:
    return [text for instruction, text in STAGES[target] if instruction == name]


def copied(target: str) -> set[str]:
    return {source for line in arguments(target, "COPY") for source in line.split()[:-1]}


def test_there_are_three_targets() -> None:
    assert list(STAGES) == ["cpu", "gpu", "deepspeed"]
    assert "nvidia/cuda" not in TEXT.split(" AS gpu")[0] and "NCCL_" not in TEXT


@pytest.mark.parametrize("target", STAGES)
def test_a_target_is_pinned_and_runs_as_a_user(target: str) -> None:
    assert arguments(target, "USER") == ["1000"]
    installs = [line for line in arguments(target, "RUN") if "pip install" in line]
    assert len(installs) == 2
    assert "grep '^torch==' constraints.txt" in installs[0]
    assert "--constraint constraints.txt" in installs[1]
    assert all("--mount=type=cache,target=/root/.cache/pip" in line for line in installs)


@pytest.mark.parametrize("target", STAGES)
def test_what_a_target_copies_is_there_and_is_sent_to_the_build(target: str) -> None:
    lines = (REPOSITORY / ".dockerignore").read_text().split()
    assert copied(target) == {line[1:] for line in lines if line.startswith("!")}
    assert all((REPOSITORY / name).exists() for name in copied(target))


def test_compose_builds_a_target_and_keeps_the_runs() -> None:
    folder = REPOSITORY / "docker"
    compose = yaml.safe_load((folder / "compose.yaml").read_text())
    service = compose["services"]["train"]
    assert service["build"]["target"] in STAGES
    assert (folder / service["build"]["context"] / service["build"]["dockerfile"]).is_file()
    assert service["volumes"] == ["runs:/home/sgan/runs"] and "runs" in compose["volumes"]
    assert service["command"] == json.loads(arguments("cpu", "CMD")[0])


@pytest.mark.process
@pytest.mark.slow
def test_the_steps_of_the_cpu_target_install_and_start(tmp_path: Path) -> None:
    source, programs = tmp_path / "src", tmp_path / "venv" / "bin"
    source.mkdir()
    for name in copied("cpu"):
        copy = shutil.copytree if (REPOSITORY / name).is_dir() else shutil.copy
        copy(REPOSITORY / name, source / name)
    subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "venv")], check=True)
    variables = {
        **environment(PYTHONPATH=None, VIRTUAL_ENV=None),
        "HOME": str(Path.home()),  # pip's cache
        "PATH": f"{programs}:{os.defpath}",
    }
    for line in arguments("cpu", "RUN"):
        command = re.sub(r"--mount=\S+ ", "", line)
        if "useradd" in command:  # the one step that changes this machine
            continue
        shell = [*json.loads(arguments("cpu", "SHELL")[0]), command]
        subprocess.run(shell, cwd=source, env=variables, check=True, timeout=900)
    work = tmp_path / "work"
    work.mkdir()
    start = json.loads(arguments("cpu", "ENTRYPOINT")[0]) + json.loads(arguments("cpu", "CMD")[0])
    start[0] = str(programs / start[0])
    subprocess.run([*start, "--train.steps=3"], cwd=work, env=variables, check=True, timeout=300)
    assert json.loads((work / "runs" / "digits" / "summary.json").read_text())["step"] == 3
