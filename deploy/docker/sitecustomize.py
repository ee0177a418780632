"""Puts what melodi_otel needs behind everything that the server has itself, then makes way for the image's own sitecustomize.

Stands in a directory that PYTHONPATH names. The server's own packages win: only what it has none of is taken from here.
"""

import sys
from pathlib import Path


def _behind() -> Path:
    here = Path(__file__).resolve().parent
    behind = here.parent / "behind"
    if behind.is_dir() and str(behind) not in sys.path:
        sys.path.append(str(behind))
    return here


def _load_next(here: Path) -> None:
    # An interpreter has one sitecustomize; the one that this hides must run too.
    from importlib.machinery import PathFinder
    from importlib.util import module_from_spec

    rest = [entry for entry in sys.path if Path(entry or ".").resolve() != here]
    spec = PathFinder.find_spec("sitecustomize", rest)
    if spec is not None and spec.loader is not None:
        module = module_from_spec(spec)
        sys.modules["sitecustomize"] = module
        spec.loader.exec_module(module)


_load_next(_behind())
