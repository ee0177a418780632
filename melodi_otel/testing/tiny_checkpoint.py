"""A tiny random model on disk, with its tokenizer and chat template: what a model server is given as its MODEL.

From a shell, with torch and transformers but no engine installed::

    python -m melodi_otel.testing.tiny_checkpoint DIRECTORY

The weights are seeded: the same call with the same versions of torch and transformers writes the same bytes.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Final

from melodi_otel.testing import tiny_model

HEAD_SIZE: Final = 64
"""Of each attention head: a size that CPU kernels of model servers know."""
POSITIONS: Final = 1024
"""The longest prompt and answer together, in tokens."""


def save(directory: Path, *, layers: int = 2, heads: int = 2, seed: int = 0) -> Path:
    """Write a Llama in bfloat16 (by default of half a million parameters, 1 MB) and its tokenizer into ``directory``.

    Args:
        directory: made if it is not there.
        layers: how many.
        heads: of attention in each layer; the hidden size is 64 times that.
        seed: of the weights.

    Returns:
        ``directory``.

    Raises:
        MissingDependency: torch or transformers is not installed.
    """
    hidden = heads * HEAD_SIZE
    # An end-of-sequence id that random weights may draw: whoever wants exact lengths asks with ``ignore_eos``.
    model = tiny_model.llama(
        eos=tiny_model.EOS,
        seed=seed,
        layers=layers,
        vocab_size=512,  # a multiple of what kernels pad to; the tokenizer uses the first of them
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=POSITIONS,
        tie_word_embeddings=False,
    )
    tokenizer = tiny_model.tokenizer()
    tokenizer.model_max_length = POSITIONS
    directory.mkdir(parents=True, exist_ok=True)
    model.bfloat16().save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def main() -> None:
    """Write one where the command line says."""
    parser = argparse.ArgumentParser(description="Write a tiny random model with its tokenizer.")
    parser.add_argument("directory", type=Path)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--heads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    save(given.directory, layers=given.layers, heads=given.heads, seed=given.seed)


if __name__ == "__main__":
    main()
