"""A run pays for no import that it does not need, and its first step comes soon."""

import re
import subprocess
import sys

from conftest import ROOT, TINY

HEAVY = ("wandb", "tensorboard", "matplotlib", "torchvision", "scipy.signal", "scipy.stats", "scipy.linalg", "sklearn",
         "pandas", "plotly", "jinja2", "IPython")  # fmt: skip
RUN = f"""
import atexit, runpy, sys, time
sys.argv[0] = {str(ROOT / "src/train.py")!r}
sys.path.insert(0, {str(ROOT / "src")!r})

@atexit.register
def look():
    print("HEAVY", *[name for name in {HEAVY!r} if name in sys.modules])
    print("SECONDS", time.process_time())

runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_no_import_that_a_run_does_not_need(data_dir, tmp_path, import_seconds):
    line = [*TINY, "budget=0.006", f"data_dir={data_dir}", f"runs_dir={tmp_path}"]
    done = subprocess.run([sys.executable, "-c", RUN, *line], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert "test error" in done.stdout, done.stderr
    assert re.search(r"^HEAVY(.*)$", done.stdout, re.M)[1].split() == []
    # the whole of it: 2.3 times on a slow Xeon; on two quiet cores the first step is to come within 6 s
    assert float(re.search(r"^SECONDS (.*)$", done.stdout, re.M)[1]) < 4 * import_seconds
