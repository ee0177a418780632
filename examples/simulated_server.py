"""Whose joules? A simulated server with two models on one GPU, where the true joules of every request are known.

    python examples/simulated_server.py

Prints a few requests: what they really used, what the meter says from the counter of the whole GPU, and how sure it is.
"""

from __future__ import annotations

from melodi_otel.testing.serving import SCENARIOS, simulate
from melodi_otel.trace.replay import replay


def main() -> None:
    """Simulate 40 s of traffic, replay the trace, compare."""
    run = simulate(SCENARIOS["two engines"], seed=4, seconds=40.0)
    lines = list(replay(run.lines))
    shares = [line for line in lines if line["kind"] == "share" and (line["id"], line["device"]) in run.truth]
    print(f"{len(shares)} requests, {run.mean_batch:.1f} at once in the mean (simulated)\n")
    print("request   model     true J   told J      ± J   error")
    for share in shares[-10:]:
        true = run.truth[(share["id"], share["device"])]
        off = share["joules"] / true.joules - 1.0
        told = f"{share['joules']:8.1f} {share['uncertainty']:8.1f} {100.0 * off:6.1f} %"
        print(f"{share['id']:8}  {true.engine:6} {true.joules:9.1f} {told}")
    (books,) = [line for line in lines if line["kind"] == "books"]
    booked = sum(value for key, value in books.items() if key not in ("kind", "device", "measured"))
    print(f"\nbooks: {books['measured']:.3f} J measured, {booked:.3f} J booked")


if __name__ == "__main__":
    main()
