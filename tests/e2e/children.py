"""A user's program that generates before, in and after a child: ``children.py fork|forkserver|spawn|subprocess|os.fork``."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import urllib.request


def generate(tokens: int) -> None:
    import torch

    from melodi_otel.testing import tiny_model

    torch.set_num_threads(1)
    model, tokenizer = tiny_model.llama(), tiny_model.tokenizer()
    model.generate(**tokenizer("hello", return_tensors="pt"), max_new_tokens=tokens, do_sample=False)


def page() -> None:
    """The parent's page, if it serves one."""
    address = os.environ.get("MELODI_METRICS_ADDR")
    if address:
        with urllib.request.urlopen(f"http://{address}/metrics", timeout=10) as answer:
            shown = answer.read().decode()
        lines = [line for line in shown.splitlines() if line.startswith("melodi_requests_total{")]
        print("page", sum(float(line.rpartition(" ")[2]) for line in lines))


def main() -> None:
    kind = sys.argv[1]
    if kind == "child":
        generate(16)
        return
    generate(8)
    if kind == "subprocess":
        subprocess.run([sys.executable, __file__, "child"], check=True)
    elif kind == "os.fork":
        pid = os.fork()
        if pid == 0:
            generate(16)
            sys.exit(0)
        assert os.waitpid(pid, 0)[1] == 0
    else:
        child = multiprocessing.get_context(kind).Process(target=generate, args=(16,))
        child.start()
        child.join()
        assert child.exitcode == 0, child.exitcode
    generate(24)
    if "melodi_otel.program" in sys.modules:
        import melodi_otel

        melodi_otel.recent()
        page()


if __name__ == "__main__":
    main()
