"""The README's Python lines run, its commands name what exists."""

import re

import pytest

from configuration import problems
from conftest import ROOT, composed

README = (ROOT / "README.md").read_text()
COMMANDS = re.findall(r"python src/train\.py ((?:[\w/=.,+-]+ ?)+)", README)


@pytest.mark.filterwarnings("ignore:Checkpoint directory:UserWarning", "ignore:The number of training batches")
@pytest.mark.parametrize("block", re.findall(r"```python\n(.*?)```", README, re.S))
def test_library_lines(block, data_dir, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DEPTHLAB_DATA", str(data_dir))
    names: dict = {}
    exec(block, names)
    assert names["data"].num_classes == 10


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_compose(command):
    overrides = [re.sub(r"=([^,]+),.*", r"=\1", part) for part in command.split() if part != "-m"]
    assert problems(composed("train", *overrides)) == []
    assert len(COMMANDS) >= 4


GROUPS = ("sched", "optim", "grow", "augment", "data", "trainer", "logger", "analysis")  # arch: only examples


@pytest.mark.parametrize("group", GROUPS)
def test_every_name_is_listed(group):
    (line,) = re.findall(rf"^\| `{group}=` \| (.*) \|$", README, re.M)
    assert {path.stem for path in (ROOT / "conf" / group).glob("*.yaml")} <= set(re.findall(r"\w+", line))


def test_the_architectures_exist():
    (line,) = re.findall(r"^\| `arch=` \| (.*) \|$", README, re.M)
    named = re.findall(r"\b[a-z_]+\d+\w*", line)
    assert len(named) > 15
    assert all((ROOT / f"conf/arch/{name}.yaml").exists() for name in named)
