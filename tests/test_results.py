"""The committed tables follow from the committed records."""

import pytest

import report
from conftest import ROOT

RESULTS = ROOT / "results"


@pytest.mark.parametrize("id", ["barz2018/table1_cpu"])
def test_tables_follow_from_records(id, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    assert report.main([id, "--runs", "results/runs", "--out", str(tmp_path)]) == 0
    for suffix in ("csv", "md"):
        assert (tmp_path / f"{id}.{suffix}").read_text() == (RESULTS / f"{id}.{suffix}").read_text()
    assert "6 of 6 runs" in capsys.readouterr().out
