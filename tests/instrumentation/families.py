"""Tiny random models of families that have a ``generate`` of their own, each made from its configuration in milliseconds."""

from __future__ import annotations

import torch
import transformers

EOS = 1


def made(kind, config):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return kind(config).eval()


def whisper():
    """Speech to text: ids of the transcript, for a long recording window by window."""
    config = transformers.WhisperConfig(
        vocab_size=200,
        d_model=32,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        max_source_positions=1500,
        max_target_positions=64,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=3,
        begin_suppress_tokens=None,
        suppress_tokens=None,
    )
    model = made(transformers.WhisperForConditionalGeneration, config)
    model.generation_config.no_timestamps_token_id = 150
    return model


def blip_2(*, encoder_decoder):
    """A picture and text to text: hands embeddings over to its language model."""
    text = (
        transformers.T5Config(
            vocab_size=100, d_model=32, d_kv=16, d_ff=32, num_layers=1, num_heads=2, decoder_start_token_id=0
        )
        if encoder_decoder
        else transformers.OPTConfig(
            vocab_size=100,
            hidden_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            ffn_dim=32,
            max_position_embeddings=64,
            word_embed_proj_dim=32,
        )
    )
    text.eos_token_id = None
    vision = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.Blip2Config(
        vision_config=vision | {"image_size": 32, "patch_size": 16},
        qformer_config=vision | {"vocab_size": 50, "encoder_hidden_size": 32},
        text_config=text.to_dict(),
        num_query_tokens=4,
        image_token_index=99,
    )
    model = made(transformers.Blip2ForConditionalGeneration, config)
    model.language_model.generation_config.eos_token_id = None
    return model


def rag():
    """Retrieved text to text: prepares and runs transformers' decoding without its ``generate``."""
    generator = transformers.BartConfig(
        vocab_size=99,
        d_model=32,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        max_position_embeddings=64,
    )
    question = transformers.DPRConfig(
        vocab_size=99, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    )
    config = transformers.RagConfig.from_question_encoder_generator_configs(
        question, generator, n_docs=2, max_combined_length=8
    )
    return made(transformers.RagTokenForGeneration, config)


def musicgen():
    """Text to sound: prepares and runs transformers' decoding without its ``generate``."""
    text = transformers.T5Config(vocab_size=99, d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    decoder = transformers.MusicgenDecoderConfig(
        vocab_size=32,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        ffn_dim=32,
        num_codebooks=2,
        max_position_embeddings=64,
        pad_token_id=32,
        bos_token_id=32,
    )
    sound = transformers.EncodecConfig(
        audio_channels=1,
        chunk_length_s=None,
        codebook_size=32,
        codebook_dim=16,
        num_filters=4,
        hidden_size=16,
        num_lstm_layers=1,
        upsampling_ratios=[4, 2],
        target_bandwidths=[20.0],
        sampling_rate=8000,
    )
    config = transformers.MusicgenConfig(
        text_encoder=text.to_dict(), audio_encoder=sound.to_dict(), decoder=decoder.to_dict()
    )
    model = made(transformers.MusicgenForConditionalGeneration, config)
    model.generation_config.decoder_start_token_id = model.generation_config.pad_token_id = 32
    return model


def patchtst():
    """A time series to its future."""
    config = transformers.PatchTSTConfig(
        num_input_channels=2,
        context_length=16,
        patch_length=4,
        patch_stride=4,
        prediction_length=4,
        d_model=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        ffn_dim=16,
        loss="nll",
    )
    return made(transformers.PatchTSTForPrediction, config)


def diffusion_gemma():
    """Text to text in blocks, by a loop of its own; in 5.x only."""
    from transformers.models import diffusion_gemma as family

    text = {
        "vocab_size": 100,
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "global_head_dim": 16,
        "num_experts": 2,
        "top_k_experts": 1,
        "moe_intermediate_size": 16,
        "sliding_window": 16,
        "max_position_embeddings": 256,
    }
    vision = {
        "model_type": "gemma4_vision",
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 8,
    }
    config = family.DiffusionGemmaConfig(
        text_config=text, vision_config=vision, canvas_length=8, image_token_id=98, boi_token_id=97, eoi_token_id=96
    )
    model = made(family.DiffusionGemmaForBlockDiffusion, config)
    model.generation_config.pad_token_id = 0
    return model
