"""trainer=exact, the default, and trainer=fast."""

import json

import pytest
from hydra import compose, initialize_config_dir

from configuration import resolve
from conftest import ROOT, TINY
from depthlab import records


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
