"""The tiny model on disk: the same bytes every time, and everything a model server reads is there."""

from __future__ import annotations

import transformers

from melodi_otel.testing import tiny_checkpoint


def test_the_same_bytes_every_time(tmp_path):
    """Two calls write the same files; another seed writes other weights and the same rest."""
    first, second, other = (
        tiny_checkpoint.save(tmp_path / name, seed=seed) for name, seed in (("a", 0), ("b", 0), ("c", 1))
    )
    names = sorted(path.name for path in first.iterdir())
    files = [{name: (directory / name).read_bytes() for name in names} for directory in (first, second, other)]
    assert files[0] == files[1]
    assert [name for name in names if files[2][name] != files[0][name]] == ["model.safetensors"]


def test_loads_and_chats(tmp_path):
    """What was written is loaded back with its chat template, in bfloat16, and answers."""
    path = tiny_checkpoint.save(tmp_path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype="auto")
    assert str(model.dtype) == "torch.bfloat16"
    assert len(tokenizer) <= model.config.vocab_size
    messages = [{"role": "user", "content": "the quick brown fox"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == "<bos>user: the quick brown fox<eos><bos>assistant: "
    ids = tokenizer(text, return_tensors="pt")
    answer = model.generate(**ids, max_new_tokens=5, min_new_tokens=5, do_sample=False)
    assert answer.shape[1] - ids["input_ids"].shape[1] == 5
