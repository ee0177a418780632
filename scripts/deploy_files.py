"""Write deploy/ from the code.

python scripts/deploy_files.py          writes the files that are made of settings and names
python scripts/deploy_files.py --check  says whether they are current (exit code 1: they are not)
"""

from __future__ import annotations

import sys
from pathlib import Path

from melodi_otel.deploy.files import files
from melodi_otel.deploy.settings import Settings

DEPLOY = Path(__file__).parent.parent / "deploy"


def main() -> int:
    stale = 0
    for name, text in files(Settings()).items():
        path = DEPLOY / name
        if path.exists() and path.read_text(encoding="utf-8") == text:
            continue
        stale += 1
        if "--check" not in sys.argv:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
        print(f"{name}: {'not current' if '--check' in sys.argv else 'written'}")
    return int("--check" in sys.argv and stale > 0)


if __name__ == "__main__":
    raise SystemExit(main())
