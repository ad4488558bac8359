"""What the scripts' command lines share: a refusal is one line and exit code 2, Ctrl-C is 130, a closed pipe 141."""

import contextlib
import os
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path

from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from depthlab.problem import Problem


@contextlib.contextmanager
def answering(program: str) -> Iterator[None]:
    """Around Hydra's `main`, and once more inside it, where Hydra has not yet added words of its own."""
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra hands its errors on instead of printing them
    try:
        yield
    except Problem as problem:
        refuse(program, problem)
    except (HydraException, OmegaConfBaseException) as error:
        from configuration import explain

        refuse(program, explain(error))
    except ValueError as error:
        if "Config group override" not in str(error):
            raise
        refuse(program, "a group (arch=, data=, grow=, ...) takes a name, not null or a number; see --help")
    except BrokenPipeError:  # --help | head
        sys.exit(141)
    except KeyboardInterrupt:  # before or after a fit, which answers itself
        print(f"{program}: stopped", file=sys.stderr)
        sys.exit(130)
    except OSError as error:
        frames = [Path(frame.filename).name for frame in traceback.extract_tb(error.__traceback__)]
        if "basic_sweeper.py" not in frames or "process_launcher.py" in frames:
            raise
        # Hydra makes its sweep folder before we can look at runs_dir
        refuse(program, f"{error.filename}: cannot be written ({error.strerror}); set runs_dir to another folder")


def refuse(program: str, message: object) -> None:
    print(f"{program}: {message}", file=sys.stderr)
    sys.exit(2)
