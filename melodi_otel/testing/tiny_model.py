"""Tiny random models and a tokenizer, made on the spot: real transformers code paths in milliseconds, without a network.

The weights are random but seeded, so the same call gives the same ids in every process. torch and transformers are
imported by the functions, never by this module.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any, Final

from melodi_otel.errors import MissingDependency

PAD: Final = 0
BOS: Final = 1
EOS: Final = 2
SENTENCES: Final = (
    "The quick brown fox jumps over the lazy dog.",
    "A joule is one watt for one second, and a watt-hour is 3600 of them.",
    "Energy belongs to an interval, never to an instant!",
)
CHAT_TEMPLATE: Final = (
    "{% for message in messages %}<bos>{{ message['role'] }}: {{ message['content'] }}<eos>{% endfor %}"
    "{% if add_generation_prompt %}<bos>assistant: {% endif %}"
)


def _library(name: str) -> Any:
    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        raise MissingDependency(f"the tiny models need {error.name}: pip install torch transformers") from error


def tokenizer(*, pad: bool = True) -> Any:
    """A byte-level BPE tokenizer of 500 entries with left padding and a chat template.

    Args:
        pad: False leaves it without a padding token, as many published tokenizers are.
    """
    tokenizers: Any = _library("tokenizers")
    byte_level: Any = tokenizers.pre_tokenizers.ByteLevel
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = byte_level(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=["<pad>", "<bos>", "<eos>"],
        initial_alphabet=byte_level.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator([sentence for sentence in SENTENCES for _ in range(20)], trainer)
    special: dict[str, str] = {"bos_token": "<bos>", "eos_token": "<eos>"} | ({"pad_token": "<pad>"} if pad else {})
    return _library("transformers").PreTrainedTokenizerFast(
        tokenizer_object=bpe,  # Llama knows no token types, which tokenizers of 4.x would return.
        model_input_names=["input_ids", "attention_mask"],
        padding_side="left",
        chat_template=CHAT_TEMPLATE,
        **special,
    )


def llama(*, eos: int | None = None, pad: int | None = PAD, seed: int = 0, layers: int = 2, **config: Any) -> Any:
    """A decoder-only model of about 150,000 parameters.

    Args:
        eos: the end-of-sequence id; None: it never ends by itself, so lengths are exact.
        pad: the padding id.
        seed: of the weights.
        layers: how many.
        config: further fields of ``LlamaConfig``.
    """
    transformers: Any = _library("transformers")
    fields: dict[str, Any] = {
        "vocab_size": 500,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 1024,
        "pad_token_id": pad,
        "bos_token_id": BOS,
        "eos_token_id": eos,
    }
    return _finished(transformers.LlamaForCausalLM, transformers.LlamaConfig(**(fields | config)), seed, eos, pad)


def assistant(*, eos: int | None = None, seed: int = 1) -> Any:
    """A smaller model with the same vocabulary, to draft for :func:`llama`."""
    return llama(eos=eos, seed=seed, layers=1)


def mixture(*, seed: int = 0) -> Any:
    """A mixture of four experts, two of them per token."""
    transformers: Any = _library("transformers")
    config = transformers.MixtralConfig(
        vocab_size=500,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        num_experts_per_tok=2,
        max_position_embeddings=1024,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=None,
    )
    return _finished(transformers.MixtralForCausalLM, config, seed, None, PAD)


def t5(*, eos: int | None = EOS, seed: int = 0) -> Any:
    """An encoder-decoder whose output starts with the padding id."""
    transformers: Any = _library("transformers")
    config = transformers.T5Config(
        vocab_size=500,
        d_model=64,
        d_kv=16,
        d_ff=128,
        num_layers=2,
        num_heads=4,
        pad_token_id=PAD,
        eos_token_id=eos,
        decoder_start_token_id=PAD,
    )
    return _finished(transformers.T5ForConditionalGeneration, config, seed, eos, PAD)


def _finished(model: Any, config: Any, seed: int, eos: int | None, pad: int | None) -> Any:
    torch: Any = _library("torch")
    with torch.random.fork_rng():  # the program's own random numbers stay as they were
        torch.manual_seed(seed)
        made = model(config).eval()
    made.generation_config.eos_token_id = eos
    made.generation_config.pad_token_id = pad
    return made
