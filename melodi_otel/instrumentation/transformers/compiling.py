"""Whether torch compiled something: read from the compiler's own counters, if it is loaded."""

from __future__ import annotations

import sys
from typing import Any, Final

_MODULE: Final = "torch._dynamo.utils"


def compiled_frames() -> int:
    """Frames that torch.compile has worked on in this process so far; 0 where it is not loaded.

    The counters are the process's: what another thread compiles meanwhile counts too. It may fall, where the program
    resets the compiler.
    """
    module: Any = sys.modules.get(_MODULE)
    if module is None:
        return 0
    try:
        frames = module.counters.get("frames")
        return 0 if frames is None else int(frames.get("total", 0))
    except Exception:
        return 0
