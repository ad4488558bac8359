"""trainer=exact, the default, and trainer=fast."""

import json

import pytest
from hydra import compose, initialize_config_dir

from configuration import resolve
from conftest import ROOT, TINY
from depthlab import records
from tests.analysis.nets import DEVICES


def config(*overrides):
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return resolve(compose("train", list(overrides)))


def test_two_modes_two_names():
    default, exact, fast = config(), config("trainer=exact"), config("trainer=fast")
    assert default == exact
    assert [records.mode(c["trainer"]) for c in (exact, fast)] == ["exact", "fast"]
    assert records.run_name(exact) == records.run_name(default) != records.run_name(fast)
    assert records.identity_of(fast)["trainer"]["precision"] == "bf16-mixed"
    for choice in ("trainer.graph=true", "trainer.fused=false", "trainer.channels_last=true"):  # rounding only
        assert records.run_name(config(choice)) == records.run_name(default)


@pytest.mark.parametrize(
    ("choice", "mode"),
    [
        ("trainer.precision=64-true", "exact"),
        ("trainer.precision=bf16-mixed", "fast"),
        ("trainer.deterministic=false", "fast"),
        ("trainer.deterministic=warn", "fast"),
        ("trainer.compile=true", "fast"),
    ],
)
def test_the_mode_is_what_is_computed(choice, mode):
    assert records.mode(config(choice)["trainer"]) == mode


def test_the_record_says_so(cli, tmp_path):
    """On a CPU there is no CUDA graph: null does without, true refuses."""
    code, output = cli(*TINY, "trainer=fast", "sched=sgdr", "budget=0.006")
    assert code == 0, output
    (path,) = tmp_path.glob("runs/*/result.json")
    result = json.loads(path.read_text())
    assert (result["mode"], result["precision"], result["graph"]) == ("fast", "bf16-mixed", False)
    code, output = cli(*TINY, "trainer=fast", "trainer.graph=true", "seed=1")
    assert code == 2, output
    assert "train.py: trainer.graph=true needs a CUDA GPU; take trainer.graph=null" in output


@pytest.mark.parametrize("device", DEVICES)
def test_what_makes_it_fast_changes_rounding_only(device, cli, tmp_path):
    """Kernels of ours against PyTorch's; on a GPU in a CUDA graph against eager steps."""
    found = []
    for name, choices in (("ours", []), ("torch", ["trainer.graph=false", "trainer.fused=false"])):
        places = [f"runs_dir={tmp_path}/{name}", f"trainer.accelerator={device}"]
        code, output = cli(*TINY, "trainer=fast", "sched=sgdr", "budget=0.006", *choices, *places)
        assert code == 0, output
        (path,) = tmp_path.glob(f"{name}/*/result.json")
        found.append(json.loads(path.read_text()))
    ours, torchs = found
    assert [r["graph"] for r in found] == [device == "cuda", False]
    assert ours["test_loss"] == pytest.approx(torchs["test_loss"], rel=0.05)
    assert ours["test_loss"] != torchs["test_loss"]
