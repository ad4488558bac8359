"""Ten thousand records: in seconds, on a page that a browser opens."""

import json
import time
from itertools import product

import pytest
from test_report import record

import report
from depthlab.report import html, load_experiment

ID = "barz2018/table1"


@pytest.mark.slow
def test_ten_thousand_records(tmp_path, capsys):
    experiment = load_experiment(report.CONF / f"experiment/{ID}.yaml", ID)
    expected = report.identities(experiment)
    whole = {key: record() | {"study": ID, "identity": identity} for key, identity in expected.items()}
    for number, (seed, key) in enumerate(product(range(1667), whole)):
        one = whole[key]
        names = {section: one["identity"][section]["name"] for section in ("arch", "sched")}
        identity = one["identity"] | {"seed": seed}
        about = {"name": f"run{number}", "seed": seed, "identity": identity, "test_error": 25 + seed % 7, **names}
        (tmp_path / f"runs/run{number}").mkdir(parents=True)
        (tmp_path / f"runs/run{number}/result.json").write_text(json.dumps(one | about))
    (tmp_path / "runs/run0/result.json").write_text("{")
    started = time.process_time()
    assert report.main([ID, "--runs", str(tmp_path / "runs"), "--out", str(tmp_path / "out")]) == 0
    assert time.process_time() - started < 60  # 4 on an AMD EPYC
    text = capsys.readouterr().out
    assert "(1666)" in text  # seeds in a cell, one of them broken
    assert "run0/result.json: Expecting" in text
    if html.available():
        assert (tmp_path / f"out/{ID}.html").stat().st_size < 20e6
