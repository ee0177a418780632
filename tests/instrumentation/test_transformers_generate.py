"""Every way into ``generate()``: one call each, with exact counts, and the caller's own result."""

from __future__ import annotations

import asyncio
import threading

import pytest
import torch
import transformers

from melodi_otel.attribution.meter import current
from melodi_otel.instrumentation.transformers import TransformersInstrumentor
from melodi_otel.testing import tiny_model

PROMPT = torch.tensor([[5, 6, 7, 8]])


def at_step(step, row, token, rows):
    """A logits processor that makes ``row`` emit ``token`` as its ``step``-th token (from 1)."""

    class Force(transformers.LogitsProcessor):
        def __init__(self):
            self.calls = 0

        def __call__(self, input_ids, scores):
            self.calls += 1
            scores = scores.clone()
            scores[:, token] = -torch.inf
            if self.calls == step:
                scores[row] = -torch.inf
                scores[row, token] = 0.0
            return scores

    return transformers.LogitsProcessorList([Force()])


def test_plain(instrumented, llama):
    """A plain generate is one call: prompt known at the start, output, reason and first token at the end."""
    llama.generate(PROMPT, max_new_tokens=6, do_sample=False)
    call = instrumented.only
    begin, end = call.begin, call.ended
    assert (begin.operation, begin.provider, begin.model) == ("text_completion", "transformers", "LlamaForCausalLM")
    assert (begin.prompt_tokens, begin.cached_tokens) == (4, 0)
    assert begin.thread == threading.get_native_id()
    assert begin.devices == ()
    assert begin.attributes == {"gen_ai.request.max_tokens": 6}
    assert (end.output_tokens, end.outcome, end.finish_reasons) == (6, "length", ("length",))
    assert begin.start_ns < end.first_token_ns < end.end_ns
    assert end.error is None
    assert (call.entered, call.left_with) == (1, [None])


@pytest.mark.parametrize(
    "options",
    [
        {"do_sample": False},
        {"do_sample": True},
        {"num_beams": 3, "do_sample": False},
        {"do_sample": True, "num_return_sequences": 2},
        {"prompt_lookup_num_tokens": 3, "do_sample": False, "eos_token_id": 2},  # 4.57 needs one here
        {"return_dict_in_generate": True, "output_scores": True},
    ],
    ids=str,
)
def test_same_result(calls, llama, options):
    """With one seed, the same ids come back with and without us."""
    ids = []
    for instrument in (False, True):
        instrumentor = TransformersInstrumentor(calls)
        if instrument:
            instrumentor.instrument()
        torch.manual_seed(7)
        result = llama.generate(PROMPT, max_new_tokens=8, **options)
        instrumentor.uninstrument()
        ids.append(getattr(result, "sequences", result))
    assert torch.equal(*ids)
    assert len(calls.made) == 1


def test_arguments_stay_as_they_are(instrumented, llama):
    """Nothing of the caller's is changed: mask, ids, config, criteria, the dict of arguments."""
    mask = torch.ones_like(PROMPT)
    config = transformers.GenerationConfig(max_new_tokens=3, pad_token_id=0)
    before = config.to_dict()
    criteria, processors = transformers.StoppingCriteriaList(), transformers.LogitsProcessorList()
    arguments = {
        "input_ids": PROMPT.clone(),
        "attention_mask": mask,
        "generation_config": config,
        "stopping_criteria": criteria,
        "logits_processor": processors,
    }
    names = set(arguments)
    llama.generate(**arguments)
    assert torch.equal(arguments["input_ids"], PROMPT)
    assert torch.equal(mask, torch.ones_like(PROMPT))
    assert config.to_dict() == before
    assert (list(criteria), list(processors), set(arguments)) == ([], [], names)


def test_left_padding(instrumented, llama):
    """Padding is no prompt: a batch of 4 and 9 tokens has 13, though its shape says 18."""
    ids = torch.full((2, 9), 5)
    mask = torch.ones_like(ids)
    ids[0, :5] = mask[0, :5] = 0
    llama.generate(ids, attention_mask=mask, max_new_tokens=3)
    call = instrumented.only
    assert call.begin.prompt_tokens == 13
    assert call.ended.output_tokens == 6
    assert [(row.tokens, row.context) for row in call.steps[0].prefill] == [(4, 0), (9, 0)]


def test_padding_without_mask(instrumented, llama):
    """Without a mask, padding ids are left out where the padding id ends no sequence."""
    ids = torch.tensor([[0, 0, 5, 6], [5, 6, 7, 8]])
    llama.generate(ids, max_new_tokens=2)
    assert instrumented.only.begin.prompt_tokens == 6


def test_padding_is_end_of_sequence(instrumented):
    """Where padding and end of sequence are one id, an unmasked prompt counts whole and output ends at the first."""
    model = tiny_model.llama(eos=2, pad=2)
    model.generate(
        torch.tensor([[2, 5, 6], [5, 6, 7]]), max_new_tokens=6, do_sample=False, logits_processor=at_step(3, 0, 2, 2)
    )
    call = instrumented.only
    assert call.begin.prompt_tokens == 6
    assert call.ended.output_tokens == 3 + 6
    assert call.ended.finish_reasons == ("stop", "length")
    assert call.ended.outcome == "length"


def test_first_end_of_sequence(instrumented):
    """A row counts up to and including its end of sequence; what pads it afterwards does not."""
    model = tiny_model.llama(eos=2)
    result = model.generate(
        torch.tensor([[5, 6, 7], [7, 6, 5]]), max_new_tokens=6, do_sample=False, logits_processor=at_step(3, 0, 2, 2)
    )
    assert result[0, 3:].tolist()[2:] == [2, 0, 0, 0]
    assert instrumented.only.ended.output_tokens == 9
    assert instrumented.only.ended.finish_reasons == ("stop", "length")


def test_padding_id_as_output(instrumented):
    """A model that says the padding id said a token: only an end of sequence is followed by padding."""
    model = tiny_model.llama(eos=2)

    class Say(transformers.LogitsProcessor):
        calls = 0

        def __call__(self, input_ids, scores):
            self.calls += 1
            scores = torch.full_like(scores, -torch.inf)
            scores[0, 0] = 0.0
            scores[1, 2 if self.calls == 3 else 7] = 0.0
            return scores

    result = model.generate(
        PROMPT.repeat(2, 1),
        max_new_tokens=5,
        do_sample=False,
        logits_processor=transformers.LogitsProcessorList([Say()]),
    )
    assert result[:, 4:].tolist() == [[0] * 5, [7, 7, 2, 0, 0]]
    end = instrumented.only.ended
    assert (end.output_tokens, end.finish_reasons) == (5 + 3, ("length", "stop"))


def test_padding_after_a_criterion(instrumented):
    """A row that a criterion of the caller's ended has no end of sequence: what pads it is no output."""
    model = tiny_model.llama(eos=2)

    class First(transformers.StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            return torch.tensor([input_ids.shape[1] >= 6, False])

    result = model.generate(
        PROMPT.repeat(2, 1),
        max_new_tokens=5,
        do_sample=False,
        stopping_criteria=transformers.StoppingCriteriaList([First()]),
    )
    assert result[0, 6:].tolist() == [0, 0, 0]
    end = instrumented.only.ended
    assert (end.output_tokens, end.finish_reasons) == (2 + 5, ("stop", "length"))


def test_end_id_taken_away(instrumented):
    """An end id that the call takes away ends nothing, and the count goes on too."""
    model = tiny_model.llama(eos=2)
    model.generate(PROMPT, max_new_tokens=6, do_sample=False, eos_token_id=None, logits_processor=at_step(3, 0, 2, 1))
    end = instrumented.only.ended
    assert (end.output_tokens, end.finish_reasons) == (6, ("length",))


@pytest.mark.parametrize("made_by", [None, "4.40.0"], ids=["this version", "an old version"])
def test_settings_of_the_model(instrumented, made_by):
    """Beams of the model's own config under a config of the caller's: as many rows are told as are computed."""
    model = tiny_model.llama()
    model.generation_config.num_beams = 3
    if made_by is not None:
        model.generation_config.transformers_version = made_by
    rows = set()

    class Look(transformers.LogitsProcessor):
        def __call__(self, input_ids, scores):
            rows.add(input_ids.shape[0])
            return scores

    config = transformers.GenerationConfig(max_new_tokens=4, pad_token_id=0)
    model.generate(PROMPT, generation_config=config, logits_processor=transformers.LogitsProcessorList([Look()]))
    call = instrumented.only
    assert rows == {len(call.children)}
    assert call.ended.output_tokens == 4


@pytest.mark.filterwarnings("ignore:Using the model-agnostic default")
@pytest.mark.parametrize(("at", "reason"), [(22, "stop"), (99, "length")], ids=["stopped", "run out"])
def test_no_limit_given(instrumented, llama, at, reason):
    """Without a limit transformers ends after 20 tokens; a criterion that ends it earlier is a stop."""

    class After(transformers.StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            return torch.full((input_ids.shape[0],), input_ids.shape[1] >= at)

    llama.generate(PROMPT, stopping_criteria=transformers.StoppingCriteriaList([After()]))
    end = instrumented.only.ended
    assert (end.output_tokens, end.finish_reasons) == (min(at - 4, 20), (reason,))


def test_stop(instrumented):
    """A single sequence that ends by itself has stopped."""
    model = tiny_model.llama(eos=2)
    model.generate(PROMPT, max_new_tokens=6, do_sample=False, logits_processor=at_step(4, 0, 2, 1))
    end = instrumented.only.ended
    assert (end.output_tokens, end.outcome, end.finish_reasons) == (4, "stop", ("stop",))


def test_stopping_criteria(instrumented, llama):
    """The caller's own criterion stops: the reason is not length."""

    class After(transformers.StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            return torch.full((input_ids.shape[0],), input_ids.shape[1] >= 7)

    llama.generate(PROMPT, max_new_tokens=20, stopping_criteria=transformers.StoppingCriteriaList([After()]))
    end = instrumented.only.ended
    assert (end.output_tokens, end.finish_reasons) == (3, ("stop",))


def test_beams(instrumented, llama):
    """Beams: the sequences that come back are counted, the beams are bound."""
    llama.generate(torch.tensor([[5, 6], [7, 8]]), num_beams=3, num_return_sequences=2, max_new_tokens=5)
    call = instrumented.only
    assert call.begin.prompt_tokens == 4
    assert call.begin.attributes["gen_ai.request.choice.count"] == 2
    assert call.ended.output_tokens == 2 * 2 * 5
    assert len(call.ended.finish_reasons) == 4
    assert len(call.children) == 6


def test_return_sequences(instrumented, llama):
    """Three sequences of one prompt: its tokens once, their tokens three times."""
    llama.generate(PROMPT, do_sample=True, temperature=0.5, top_k=7, num_return_sequences=3, max_new_tokens=4)
    call = instrumented.only
    assert (call.begin.prompt_tokens, call.ended.output_tokens) == (4, 12)
    assert call.begin.attributes == {
        "gen_ai.request.max_tokens": 4,
        "gen_ai.request.temperature": 0.5,
        "gen_ai.request.top_k": 7.0,
        "gen_ai.request.choice.count": 3,
    }


def test_encoder_decoder(instrumented, t5):
    """An encoder-decoder: the encoder's mask is the prompt, the start token is no output."""
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]])
    result = t5.generate(
        torch.tensor([[5, 6, 7, 0], [5, 6, 7, 8]]),
        attention_mask=mask,
        max_new_tokens=5,
        do_sample=False,
        logits_processor=at_step(2, 1, 2, 2),
    )
    call = instrumented.only
    assert result.shape == (2, 6)
    assert (call.begin.prompt_tokens, call.ended.output_tokens) == (7, 5 + 2)
    assert call.ended.finish_reasons == ("length", "stop")


@pytest.mark.parametrize(("given", "tokens"), [([[0, 9, 9]], 4), ([[9, 9]], 4)], ids=["with start", "without"])
def test_decoder_prompt(instrumented, given, tokens):
    """Given decoder ids are no output, whether or not transformers has to put the start token before them."""
    model = tiny_model.t5(eos=None)
    result = model.generate(PROMPT, decoder_input_ids=torch.tensor(given), max_new_tokens=tokens)
    assert result.shape == (1, 3 + tokens)
    assert instrumented.only.ended.output_tokens == tokens


def test_embeddings(instrumented, llama):
    """With embeddings only, the returned ids are all output."""
    embeds = llama.get_input_embeddings()(PROMPT).detach()
    llama.generate(inputs_embeds=embeds, max_new_tokens=5)
    call = instrumented.only
    assert (call.begin.prompt_tokens, call.ended.output_tokens) == (4, 5)


def test_embeddings_and_ids(instrumented, llama):
    """With embeddings and ids, the ids come back in front of the output."""
    embeds = llama.get_input_embeddings()(PROMPT).detach()
    llama.generate(input_ids=PROMPT, inputs_embeds=embeds, max_new_tokens=5)
    assert instrumented.only.begin.prompt_tokens == 4
    assert instrumented.only.ended.output_tokens == 5


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_reused_cache(instrumented, llama, cache):
    """A second turn on a kept cache: the whole conversation is prompt, what the cache held is told apart."""
    kept = (
        transformers.DynamicCache(config=llama.config)
        if cache == "dynamic"
        else transformers.StaticCache(config=llama.config, max_cache_len=64)
    )
    first = llama.generate(PROMPT, past_key_values=kept, max_new_tokens=5)
    held = int(kept.get_seq_length())
    second = torch.cat([first, torch.tensor([[11, 12, 13]])], dim=-1)
    llama.generate(second, attention_mask=torch.ones_like(second), past_key_values=kept, max_new_tokens=4)
    call = instrumented.made[1]
    assert held == 4 + 5 - 1  # the last token is not computed until someone continues
    assert (call.begin.prompt_tokens, call.begin.cached_tokens) == (12, 8)
    assert call.ended.output_tokens == 4
    assert call.work == (4, 3, 0)
    assert call.steps[0].prefill[0].context == 8


def test_static_cache(instrumented, llama):
    """A static cache changes nothing in the figures."""
    llama.generate(PROMPT, cache_implementation="static", max_new_tokens=5)
    call = instrumented.only
    assert (call.begin.prompt_tokens, call.begin.cached_tokens, call.ended.output_tokens) == (4, 0, 5)


def test_assisted(instrumented, llama):
    """Assisted decoding is one call: the assistant's own generate() are part of it."""
    result = llama.generate(PROMPT, assistant_model=tiny_model.assistant(), max_new_tokens=10, do_sample=False)
    call = instrumented.only
    assert result.shape == (1, 14)
    assert (call.begin.prompt_tokens, call.ended.output_tokens) == (4, 10)
    assert call.begin.start_ns < call.ended.first_token_ns < call.ended.end_ns


def test_own_loop(instrumented, llama):
    """A loop of the caller's gives a result that may be anything: no output count is made up."""

    def loop(model, input_ids, **kwargs):
        return "done"

    assert llama.generate(PROMPT, custom_generate=loop, max_new_tokens=3) == "done"
    end = instrumented.only.ended
    assert (end.output_tokens, end.outcome, end.finish_reasons) == (None, "stop", ())


def test_nothing_given(instrumented, llama):
    """Without any prompt, transformers starts from one token of its own."""
    llama.generate(max_new_tokens=3)
    call = instrumented.only
    assert (call.begin.prompt_tokens, call.ended.output_tokens) == (1, 3)


def test_empty_prompt_in_a_pipeline(instrumented, llama, tokenizer):
    """An empty text is a call like any other."""
    pipe = transformers.pipeline("text-generation", model=llama, tokenizer=tokenizer)
    pipe("", max_new_tokens=3)
    call = instrumented.only
    assert (call.begin.prompt_tokens, call.ended.output_tokens) == (1, 3)


def test_pipeline(instrumented, llama, tokenizer):
    """A pipeline over three texts is three calls, each with the tokens of its text."""
    pipe = transformers.pipeline("text-generation", model=llama, tokenizer=tokenizer)
    texts = ["The quick brown fox", "Energy", "A joule is one watt"]
    pipe(texts, max_new_tokens=2)
    assert [call.begin.prompt_tokens for call in instrumented.made] == [len(tokenizer(t)["input_ids"]) for t in texts]
    assert {call.begin.operation for call in instrumented.made} == {"text_completion"}
    assert {call.ended.output_tokens for call in instrumented.made} == {2}


def test_batched_pipeline(instrumented, llama, tokenizer):
    """Texts of different length in one batch are one call without the padding."""
    pipe = transformers.pipeline("text-generation", model=llama, tokenizer=tokenizer)
    texts = ["The quick brown fox", "Energy"]
    pipe(texts, batch_size=2, max_new_tokens=2)
    assert instrumented.only.begin.prompt_tokens == sum(len(tokenizer(t)["input_ids"]) for t in texts)


def test_chat(instrumented, llama, tokenizer):
    """Messages in a pipeline are a chat; the next text is a completion again."""
    pipe = transformers.pipeline("text-generation", model=llama, tokenizer=tokenizer)
    messages = [{"role": "user", "content": "The quick brown fox"}]
    pipe(messages, max_new_tokens=2)
    pipe([messages, messages], max_new_tokens=2, batch_size=2)
    pipe("Energy", max_new_tokens=2)
    assert [call.begin.operation for call in instrumented.made] == ["chat", "chat", "text_completion"]
    templated = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
    assert instrumented.made[0].begin.prompt_tokens == len(templated)


def test_tokenizer_without_padding(instrumented, llama):
    """A tokenizer without a padding token, and a model without one, count like any other."""
    model, bare = tiny_model.llama(pad=None), tiny_model.tokenizer(pad=False)
    inputs = bare("The quick brown fox", return_tensors="pt")
    model.generate(inputs["input_ids"], attention_mask=inputs["attention_mask"], max_new_tokens=3)
    call = instrumented.only
    assert (call.begin.prompt_tokens, call.ended.output_tokens) == (inputs["input_ids"].shape[1], 3)


def test_streamer(instrumented, llama, tokenizer):
    """A streamer in the caller's thread is served as before; the call says that it streamed and on which thread."""
    streamer = transformers.TextIteratorStreamer(tokenizer, skip_prompt=True)
    ran_on = []

    def work():
        ran_on.append(threading.get_native_id())
        llama.generate(PROMPT, streamer=streamer, max_new_tokens=6, do_sample=False)

    worker = threading.Thread(target=work)
    worker.start()
    "".join(streamer)
    worker.join()
    call = instrumented.only
    assert call.begin.attributes["gen_ai.request.stream"] is True
    assert call.begin.thread == ran_on[0]
    assert call.ended.output_tokens == 6


def test_threads(instrumented, llama):
    """Concurrent calls on one model are calls of their own, on lanes of their own, with the serial result."""
    alone = llama.generate(PROMPT, max_new_tokens=20, do_sample=False)
    results = {}
    gate = threading.Barrier(3)

    def work(index):
        gate.wait()
        results[index] = llama.generate(PROMPT, max_new_tokens=20, do_sample=False)

    workers = [threading.Thread(target=work, args=(index,)) for index in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert all(torch.equal(result, alone) for result in results.values())
    assert [call.ended.output_tokens for call in instrumented.made] == [20] * 4
    assert [call.work for call in instrumented.made] == [(4, 19, 0)] * 4


def test_to_thread(instrumented, llama):
    """asyncio.to_thread copies the context: three calls at once are three, not nested ones."""

    async def main():
        await asyncio.gather(*(asyncio.to_thread(llama.generate, PROMPT, max_new_tokens=4) for _ in range(3)))

    asyncio.run(main())
    assert [call.ended.output_tokens for call in instrumented.made] == [4, 4, 4]


def test_context_copied_to_another_thread(instrumented, llama):
    """A generate() on another thread, in a context copied from inside a call, is a call of its own."""
    import contextvars

    class Sideways(transformers.generation.BaseStreamer):
        done = False

        def put(self, value):
            if not self.done:
                self.done = True
                context = contextvars.copy_context()
                work = lambda: context.run(llama.generate, PROMPT, max_new_tokens=2)
                worker = threading.Thread(target=work)
                worker.start()
                worker.join()

        def end(self):
            pass

    llama.generate(PROMPT, streamer=Sideways(), max_new_tokens=5)
    outer, inner = instrumented.made
    assert (outer.ended.output_tokens, inner.ended.output_tokens) == (5, 2)
    assert (len(outer.steps), len(inner.steps)) == (5, 2)


def test_nested_on_the_same_model(instrumented, llama):
    """A generate() inside a generate() of the same thread adds no call, no tokens and no steps."""

    class Again(transformers.generation.BaseStreamer):
        done = False

        def put(self, value):
            if not self.done:
                self.done = True
                llama.generate(PROMPT, max_new_tokens=7)

        def end(self):
            pass

    llama.generate(PROMPT, streamer=Again(), max_new_tokens=3)
    call = instrumented.only
    assert call.ended.output_tokens == 3
    assert len(call.steps) == 3


def test_span_is_current_inside(instrumented, llama):
    """While it generates, the call is the current activity; afterwards it is not."""
    seen = []

    class Look(transformers.StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            seen.append(current.get())
            return torch.zeros(input_ids.shape[0], dtype=torch.bool)

    llama.generate(PROMPT, max_new_tokens=2, stopping_criteria=transformers.StoppingCriteriaList([Look()]))
    assert seen == [instrumented.only.key] * 2
    assert current.get() is None


def test_subclass_that_calls_super(instrumented):
    """A model with a generate() of its own that calls super() is one call."""

    class Own(transformers.LlamaForCausalLM):
        def generate(self, *args, **kwargs):
            return super().generate(*args, **kwargs)

    plain = tiny_model.llama()
    model = Own(plain.config)
    model.generate(PROMPT, max_new_tokens=2)
    assert instrumented.only.begin.model == "Own"
