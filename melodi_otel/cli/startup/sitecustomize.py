"""Loaded by every Python that ``melodi-otel run`` starts: turns the meter on, then makes way for the user's own.

Nothing here may disturb the program: whatever fails becomes one line on standard error.
"""

import os
import sys


def _start_meter():
    try:
        import melodi_otel

        melodi_otel.instrument(console=os.environ.get("MELODI_CONSOLE", "1") not in ("0", "false", "no", "off"))
    except ImportError as error:
        print(f"melodi-otel run: not installed for {sys.executable}: {error}", file=sys.stderr)
    except Exception as error:
        print(f"melodi-otel run: nothing is measured: {error}", file=sys.stderr)


def _load_next():
    # An interpreter has one sitecustomize; the one that ours hides must run too.
    from importlib.machinery import PathFinder
    from importlib.util import module_from_spec

    here = os.path.dirname(os.path.abspath(__file__))
    rest = [entry for entry in sys.path if os.path.abspath(entry or os.getcwd()) != here]
    spec = PathFinder.find_spec("sitecustomize", rest)
    if spec is None or spec.loader is None:
        return
    module = module_from_spec(spec)
    sys.modules["sitecustomize"] = module
    spec.loader.exec_module(module)


def _stay_first():
    # opentelemetry-instrument puts its own directory in front again, and would hide this file from every child.
    here = os.path.dirname(os.path.abspath(__file__))
    path = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    if here in path[1:]:
        os.environ["PYTHONPATH"] = os.pathsep.join([here, *(entry for entry in path if entry != here)])


try:
    _load_next()
finally:
    _stay_first()
    _start_meter()
