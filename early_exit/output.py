"""Where evaluations write: into their run, or into another directory that names the run.

Such a directory has `records/` and `eval/NAME/` as a run has, and in place of a checkpoint a file
`run.txt` with the path of the run. It can be evaluated, exported, compared and used to predict as
the run itself; the run is only read.
"""

import os
from pathlib import Path

from early_exit.errors import UserError
from early_exit.manifest import refuse_deployed
from early_exit.system.disk_errors import is_writable, read_error
from early_exit.system.files import atomic_file
from early_exit.training import checkpoint

LINK = "run.txt"


def source_run(directory: Path) -> Path:
    """The run that a directory is the output of; the directory itself if it names none."""
    try:
        return Path(os.fsdecode((directory / LINK).read_bytes().rstrip(b"\r\n")))
    except (FileNotFoundError, NotADirectoryError):
        return directory
    except OSError as error:
        raise read_error(str(directory / LINK), error) from None


def prepare_output(run_dir: Path, out: Path | None = None) -> Path:
    """The directory that an evaluation of a run writes into: the run, or `out`, which is made.

    Raises UserError if it cannot be written, or if `out` belongs to another run.
    """
    run = source_run(run_dir)
    refuse_deployed(run)
    if not run.is_dir():
        advice = "training prints its path"
        if run != run_dir:
            advice = f"{run_dir / LINK} names it; correct the path there"
        raise UserError(f"there is no run directory at {run}; {advice}")
    if out is None or out.resolve() in (run_dir.resolve(), run.resolve()):
        target = run_dir if out is None or out.resolve() == run_dir.resolve() else run
        places = (target, target / "records", target / "eval")
        if not all(map(is_writable, places)):
            raise UserError(
                f"{target} cannot be written; name a directory for the records and the report"
                " with --out"
            )
        return target
    if not is_writable(out):
        raise UserError(f"{out} cannot be written; choose another --out")
    if checkpoint.exists_in(out):
        raise UserError(f"{out} is a run itself; choose another --out")
    if not (out / LINK).exists():
        with atomic_file(out / LINK) as file:
            file.write(os.fsencode(run.resolve()) + b"\n")
    if source_run(out).resolve() != run.resolve():
        raise UserError(f"{out} has evaluations of {source_run(out)}; choose another --out")
    return out
