"""The energy of a block of code: of a function, of a model call, of both together.

    python examples/measure_block.py

On a machine without a meter every figure is None; MELODI_SOURCES=estimate gives estimates that say so.
"""

from __future__ import annotations

import melodi_otel


@melodi_otel.measure("squares")
def squares(n: int) -> int:
    return sum(i * i for i in range(n))


with melodi_otel.measure("two rounds") as m:
    for _ in range(2):
        squares(3_000_000)

if m.joules is None:
    print(f"no joules: {m.quality} ({m.reason})")
else:
    print(
        f"{m.name}: {m.joules:.2f} J ± {m.uncertainty or float('nan'):.2f} J = {m.watt_hours:.6f} Wh in {m.duration:.2f} s"
    )
    print(f"quality {m.quality}, method {m.method}")

print(melodi_otel.recent())
melodi_otel.uninstrument()
