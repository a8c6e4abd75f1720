"""Runs that 0.1.0 made, with the old names of settings: they are evaluated, but not resumed.

The folders in old_runs/0.1.0 are as that version wrote them (commit 86efd49), but for their paths.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors import safe_open
from safetensors.torch import save_file

from sgan_dist import checkpoint, evaluate, train
from sgan_dist.config import (
    RENAMED_NETWORKS,
    SETTINGS,
    AugmentConfig,
    Config,
    OptimConfig,
    load,
    parse,
    result_settings,
    resumable,
)
from sgan_dist.config.identity import BEFORE
from sgan_dist.config.names import CHANGED, REMOVED, RENAMED, upgrade
from sgan_dist.errors import UserError
from sgan_dist.evaluation.classifier import load_classifier
from sgan_dist.gan.models import DISCRIMINATORS, GENERATORS, build_discriminator
from sgan_dist.parallel.random import RANDOM_VERSION

OLD = Path(__file__).parent / "old_runs" / "0.1.0"
RUNS = ("gan", "supervised")


def as_typed_today(data: Path, run: Path, *overrides: str) -> Config:
    """The command line of the old runs, in today's names."""
    return parse(
        [
            "--name=old",
            f"--data.root={data}",
            "--data.source=digits",
            f"--run_dir={run}",
            "--batch.labeled=20",
            "--batch.unlabeled=20",
            "--batch.fake=10",
            "--loss.threshold=0.1",
            "--loss.consistency=0.5",
            "--augment.translate=1",
            "--optim.lr=0.02",
            "--ema.half_life=500",
            '--model.discriminator_args={"width": 2}',
            '--model.generator_args={"width": 1, "latent_size": 2}',
            "--train.steps=200",
            "--train.log_every=20",
            "--train.evaluate_every=0",
            "--train.sample_every=0",
            "--checkpoint.every=180",
            "--machine.precision=fp32",
            "--tracking.wandb=false",
            *overrides,
        ]
    )


def copy(name: str, folder: Path) -> Path:
    return Path(shutil.copytree(OLD / name, folder / name))


def interrupted(name: str, folder: Path) -> Path:
    """The run as it was after its checkpoint at step 180 of 200."""
    run = copy(name, folder)
    for file in ("DONE", "classifier.safetensors", "summary.json"):
        (run / file).unlink()
    return run


def meaning(name: str) -> dict[str, Any]:
    (path,) = OLD.glob(f"{name}/**/meta.json")
    settings: dict[str, Any] = json.loads(path.read_text())["meaning"]
    return settings


def test_an_old_config_is_read_under_the_new_names() -> None:
    config = load(OLD / "gan" / "config.yaml")
    expected = as_typed_today(Path("/data/digits"), Path("runs/gan"))
    assert config == expected
    assert load(OLD / "supervised" / "config.yaml").batches == {"labeled": 20}
    model = load(OLD / "tutorial" / "config.yaml").model
    assert (model.discriminator, model.generator) == ("tutorial", "tutorial")


@pytest.mark.parametrize("name", RUNS)
def test_an_old_run_is_evaluated(name: str, digits: Path) -> None:
    summary = json.loads((OLD / name / "summary.json").read_text())
    metrics = evaluate(OLD / name, "test", str(digits))
    assert metrics.error == pytest.approx(summary["test_error"], abs=0.003)  # of 500 images, one


@pytest.mark.parametrize("name", RUNS)
def test_an_old_run_whose_random_numbers_are_no_longer_drawn_is_refused(
    name: str, digits: Path, tmp_path: Path
) -> None:
    run = interrupted(name, tmp_path)
    only = [f"--train.supervised_only={str(name == 'supervised').lower()}"]
    message = (
        f"version 1, and this .* version {RANDOM_VERSION}: .* start again with another --run_dir"
    )
    with pytest.raises(UserError, match=message):
        train(as_typed_today(digits, run, *only))
    assert {path.name for path in run.iterdir()} >= {"checkpoints", "latest"}  # nothing is lost


def test_an_old_run_under_other_settings_is_refused(digits: Path, tmp_path: Path) -> None:
    run = interrupted("gan", tmp_path)
    with pytest.raises(UserError, match=r"batch\.labeled was 20 and is now 10") as error:
        train(as_typed_today(digits, run, "--batch.labeled=10"))
    assert "machine.precision" not in str(error.value)
    with pytest.raises(
        UserError, match=r"train\.supervised_only was False and is now True"
    ) as error:
        train(as_typed_today(digits, run, "--train.supervised_only=true"))
    assert "loss.consistency" not in str(error.value)  # of no effect, so no difference


def test_the_tutorials_networks_keep_their_checkpoints() -> None:
    overrides = ["--model.discriminator=tutorial", "--model.generator=tutorial"]
    config = parse([*overrides, "--machine.precision=fp32"])
    continued, saved = resumable(config, meaning("tutorial"))
    assert continued == config
    saved.pop("data_fingerprint")
    assert saved == result_settings(config)


def test_a_classifier_of_a_renamed_network_is_loaded(tmp_path: Path) -> None:
    path = tmp_path / "classifier.safetensors"
    with safe_open(OLD / "gan" / "classifier.safetensors", framework="pt") as file:
        about = json.loads(file.metadata()["sgan_dist"])
    about |= {"discriminator": "book", "discriminator_args": {}}
    network = build_discriminator("tutorial", (1, 28, 28), 10, {})
    save_file(network.state_dict(), path, metadata={"sgan_dist": json.dumps(about)})
    loaded = load_classifier(path).network
    assert checkpoint.weights_sha256({"d": loaded}) == checkpoint.weights_sha256({"d": network})


def test_settings_that_are_newer_than_a_checkpoint_take_what_reproduces_it() -> None:
    old = {key: value for key, value in meaning("gan").items() if key != "augment.flip"}
    config = as_typed_today(Path("d"), Path("r"))
    assert resumable(config, old)[0] == config  # its default, 0, is what reproduces older runs
    flipped = dataclasses.replace(config, augment=AugmentConfig(translate=1, flip=0.5))
    continued, saved = resumable(flipped, old)
    assert continued == flipped
    with pytest.raises(UserError, match=r"augment\.flip was 0\.0 and is now 0\.5"):
        checkpoint.refuse_other_run(Path("r/c/s"), saved, result_settings(continued))


def test_a_new_default_does_not_change_an_older_run(monkeypatch: pytest.MonkeyPatch) -> None:
    # as if optim.clip_norm had been added since, at a default that changes the result
    monkeypatch.setitem(BEFORE, "optim.clip_norm", 0.25)
    old = {key: value for key, value in meaning("gan").items() if key != "optim.clip_norm"}
    config = as_typed_today(Path("d"), Path("r"))
    continued, saved = resumable(config, old)
    assert continued.optim.clip_norm == saved["optim.clip_norm"] == 0.25
    assert continued == dataclasses.replace(config, optim=OptimConfig(lr=0.02, clip_norm=0.25))


def test_a_setting_without_such_a_value_refuses_older_checkpoints() -> None:
    old = {key: value for key, value in meaning("gan").items() if key != "optim.decay"}
    with pytest.raises(UserError, match=r"made before optim\.decay existed.*another --run_dir"):
        resumable(as_typed_today(Path("d"), Path("r")), old)


def test_a_removed_setting_counts_only_where_it_was_on() -> None:
    config = as_typed_today(Path("d"), Path("r"))
    off = {key: value for key, (_, value) in REMOVED.items() if value is not None}
    assert resumable(config, meaning("gan") | off)[0] == config
    for key in off:
        with pytest.raises(UserError, match=f"made with {key} 0.7, and {key} was removed because"):
            resumable(config, meaning("gan") | off | {key: 0.7})


def test_a_newer_versions_checkpoint_is_refused() -> None:
    with pytest.raises(UserError, match=r"by a newer version, which has a setting loss\.magic"):
        resumable(as_typed_today(Path("d"), Path("r")), meaning("gan") | {"loss.magic": 1})


def test_a_run_with_a_removed_setting_is_read_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = copy("gan", tmp_path)
    old = yaml.safe_load((run / "config.yaml").read_text())
    old["loss"]["vat"], old["loss"]["entropy"] = 1.0, 0.0
    del old["augment"]["flip"]
    (run / "config.yaml").write_text(yaml.safe_dump(old))
    assert load(run / "config.yaml") == load(OLD / "gan" / "config.yaml")
    assert [record.message for record in caplog.records] == [
        f"{run} was trained with loss.vat 1.0, which no longer exists"
    ]


def test_the_tables_of_names_lead_to_what_exists() -> None:
    assert set(RENAMED.values()) <= SETTINGS.keys()
    assert not (RENAMED.keys() | REMOVED.keys()) & SETTINGS.keys()
    assert CHANGED.keys() <= RENAMED.keys()
    assert set(RENAMED_NETWORKS.values()) <= DISCRIMINATORS.keys() & GENERATORS.keys()


def test_an_old_window_is_divided_by_its_lanes() -> None:
    window = "stream.lane_window_mib"
    values, removed = upgrade({"data.window_mib": 100, "data.lanes": 16})
    assert values == {window: 6.25, "stream.lanes": 16} and not removed
    assert upgrade({"data.window_mib": 256})[0] == {window: Config().stream.lane_window_mib}
    assert upgrade({window: 5, "stream.lanes": 16})[0][window] == 5


def test_an_old_config_of_a_user_is_refused_with_all_new_names(tmp_path: Path) -> None:
    path = tmp_path / "own.yaml"
    path.write_text("data: {labeled_batch: 3, lanes: 2}\ntrain: {baseline_steps: 4}\n")
    with pytest.raises(UserError) as error:
        parse([f"--config={path}"])
    assert str(error.value) == (
        "data.labeled_batch is now called batch.labeled; data.lanes is now called stream.lanes;"
        " train.baseline_steps was removed because the supervised baseline is a run of its own, with"
        " --train.supervised_only=true: leave it out"
    )
