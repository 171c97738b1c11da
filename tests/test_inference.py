"""`classify` and `classify_and_explain`: the same numbers whatever the batch, and words that follow them."""

import copy
import itertools
import json
import threading
from dataclasses import replace

import pytest
import torch
from conftest import VOCABULARY, build, let_labels_mix
from transformers import (
    AutoModel,
    ContinuousBatchingConfig,
    DynamicCache,
    GenerationConfig,
)

from clsgen import explaining_clsgen
from clsgen.attribution_clsgen import sentence_spans
from clsgen.batching_clsgen import token_batches
from clsgen.caching_clsgen import SharedPrefix, can_be_padded_within, growing_cache
from clsgen.early_exit_clsgen import decoder_up_to
from clsgen.explaining_clsgen import Prefill, _without_verdict_line, generate_dropping_ended_rows, split_words
from clsgen.prediction_clsgen import NoNumberError


def test_probability_is_the_training_forwards(any_model, texts):
    predictions = any_model.classify(texts)
    for text, prediction in zip(texts, predictions, strict=True):
        ids = torch.tensor([any_model.encoder.encode(text).input_ids])
        logit = any_model(ids, labels=ids).cls_logits[0, -1]
        assert prediction.logit == pytest.approx(logit.item(), abs=1e-4)
        assert prediction.probability == pytest.approx(torch.sigmoid(logit).item(), abs=1e-4)


@pytest.mark.parametrize("mode", ["guided", "free"])
def test_explaining_does_not_change_the_number(any_model, texts, mode):
    classified = any_model.classify(texts)
    explained = any_model.classify_and_explain(texts, mode=mode, max_new_tokens=5)
    assert [p.probability for p in explained] == pytest.approx([p.probability for p in classified], abs=1e-4)
    assert [p.label for p in explained] == [p.label for p in classified]
    assert all(isinstance(p.explanation, str) for p in explained)


def test_words_differ_between_the_verdicts(any_model, texts):
    """Or nothing would be told by the tests that compare words."""
    for text in texts:
        against, in_favour = any_model.explain(text, [0, 1], max_new_tokens=8)
        assert against.explanation
        assert in_favour.explanation
        assert against.explanation != in_favour.explanation


@pytest.mark.parametrize("mode", ["guided", "free"])
def test_batches_and_order_do_not_matter(any_model, texts, mode):
    let_labels_mix(any_model, texts)
    together = any_model.classify_and_explain(texts, mode=mode, max_new_tokens=8)
    apart = [any_model.classify_and_explain(text, mode=mode, max_new_tokens=8) for text in texts]
    backwards = any_model.classify_and_explain(texts[::-1], mode=mode, max_new_tokens=8, batch_size=2)[::-1]
    for one, two, three in zip(together, apart, backwards, strict=True):
        assert one.explanation == two.explanation == three.explanation
        assert one.probability == pytest.approx(two.probability, abs=1e-4)
        assert one.probability == pytest.approx(three.probability, abs=1e-4)
        assert one.lm_probability == pytest.approx(two.lm_probability, abs=1e-4)


def test_guided_explanations_are_plain_generation_behind_the_verdict_line(any_model, texts):
    prediction = any_model.classify_and_explain(texts[0], max_new_tokens=8)
    ids = any_model.encoder.encode(texts[0]).input_ids + any_model.encoder.encode_verdict(prediction.label_id)
    generated = any_model.generate(torch.tensor([ids]), max_new_tokens=8)[0, len(ids) :]
    expected = any_model.tokenizer.decode(generated, skip_special_tokens=True)
    assert prediction.explanation == any_model.encoder.prompt.split_verdict_line(expected)[1]


def test_free_explanations_are_plain_generation(any_model, texts):
    prediction = any_model.classify_and_explain(texts[1], mode="free", max_new_tokens=8)
    ids = any_model.encoder.encode(texts[1]).input_ids
    generated = any_model.generate(torch.tensor([ids]), max_new_tokens=8)[0, len(ids) :]
    expected = any_model.tokenizer.decode(generated, skip_special_tokens=True)
    assert prediction.explanation == any_model.encoder.prompt.split_verdict_line(expected)[1]
    guided = any_model.classify_and_explain(texts[1], max_new_tokens=1)
    assert prediction.lm_probability == pytest.approx(guided.lm_probability, abs=1e-4)


@pytest.mark.parametrize(
    ("written", "label"), [("Verdict: supported.\nAb.", "supported"), ("Verdict: not", None), ("Ab.", None)]
)
def test_free_explanations_tell_the_label_that_the_lm_wrote(model, texts, written, label):
    ids = [*model.encoder.encode_plain(written), model.encoder.end_of_turn_id]
    start = len(model.encoder.encode(texts[0]).input_ids)

    def script(input_ids, scores):
        wanted = torch.tensor([ids[input_ids.shape[1] - start]])
        return torch.full_like(scores, -torch.inf).index_fill(1, wanted, 0.0)

    prediction = model.classify_and_explain(texts[0], mode="free", logits_processor=[script])
    assert prediction.explained_label == label
    assert prediction.explanation == written.removeprefix("Verdict: supported.\n")
    first, *pieces, last = model.stream(texts[0], mode="free", logits_processor=[script])
    assert first.explained_label is None
    assert "".join(pieces) == last.explanation == prediction.explanation
    assert last.explained_label == label


def test_lm_probability_is_that_of_the_verdict_lines(model, texts):
    prediction = model.classify_and_explain(texts[0], max_new_tokens=2)
    scores = []
    prompt = model.encoder.encode(texts[0]).input_ids
    for label in (0, 1):
        verdict = model.encoder.encode_verdict(label)
        log_probabilities = model(torch.tensor([prompt + verdict])).logits[0].log_softmax(-1)
        scores.append(sum(log_probabilities[len(prompt) - 1 + i, token].item() for i, token in enumerate(verdict)))
    expected = torch.softmax(torch.tensor(scores), dim=0)[1].item()
    assert prediction.lm_probability == pytest.approx(expected, abs=1e-4)


def test_calibration_threshold_and_labels(model, texts):
    raw = model.classify(texts[0])
    model.config.calibration = {"temperature": 2.0, "bias": 0.5}
    model.config.pos_weight = 2.0
    model.config.threshold = 0.999
    prediction = model.classify(texts[0])
    logit = raw.logit - torch.tensor(2.0).log().item()
    assert prediction.logit == pytest.approx(logit)
    assert prediction.probability == pytest.approx(torch.sigmoid(torch.tensor(logit / 2 + 0.5)).item())
    assert (prediction.label_id, prediction.label) == (0, "not_supported")
    model.config.threshold = 0.0
    assert model.classify(texts[0]).label == "supported"
    assert json.loads(json.dumps(prediction.to_dict()))["threshold"] == 0.999
    assert "not_supported (P(supported) = " in str(prediction)
    assert "explained for" not in str(replace(prediction, explained_label="not_supported", explanation="It fell."))
    other = replace(prediction, explained_label="supported", explanation="It rose.")
    assert str(other).endswith(", explained for supported: It rose.")


def test_str_in_one_out_list_in_list_out(model):
    assert model.classify("Findings: A.\n\nClaim: B.") == model.classify({"findings": "A.", "claim": "B."})
    assert model.classify([]) == []
    assert model.classify_and_explain([]) == []
    assert len(model.classify(["One text"])) == 1
    assert model.classify({"findings": "word " * 100_000, "claim": "B."}).truncated


def test_bad_input_is_named(model):
    with pytest.raises(ValueError, match=r"Text 1: The field 'text' is empty"):
        model.classify(["fine", " "])
    with pytest.raises(TypeError, match=r"Text 0: A text is a `str`"):
        model.classify([None])
    with pytest.raises(ValueError, match="'guided' or 'free'"):
        model.classify_and_explain("text", mode="verbose")


@pytest.mark.parametrize("method", ["classify", "classify_and_explain"])
def test_texts_without_a_number_are_named_by_their_places(backbones, texts, method):
    model = build(backbones["qwen3"])  # its LM head has weights of its own
    token = model.tokenizer.convert_tokens_to_ids("~")
    model.get_input_embeddings().weight.data[token] = float("nan")
    broken = {**texts[0], "claim": "A ~ B."}
    with pytest.raises(NoNumberError, match=r"2 text\(s\), \[1, 4\]"):
        getattr(model, method)([texts[0], broken, *texts[2:], broken])


def test_the_head_is_read_without_the_layers_above_it(any_model, texts):
    layers = []
    decoder = any_model.get_decoder()
    stack = next(child for child in decoder.children() if isinstance(child, torch.nn.ModuleList))
    for i, layer in enumerate(stack):
        layer.register_forward_hook(lambda *_, i=i: layers.append(i))
    expected = [any_model(torch.tensor([any_model.encoder.encode(t).input_ids])).cls_logits[0, -1] for t in texts]
    layers.clear()
    predictions = any_model.classify(texts)
    assert set(layers) == {0, 1, 2}  # the head reads layers 2 and 3 of 4
    assert [p.logit for p in predictions] == pytest.approx([logit.item() for logit in expected], abs=1e-4)


@pytest.mark.parametrize("reads", [[(-1, "decision")], [(4, "mean"), (1, "decision")], [(0, "mean")]])
def test_reads_at_the_ends_need_the_whole_decoder(backbones, texts, reads):
    model = build(backbones["llama"], reads=reads)
    expected = model(torch.tensor([model.encoder.encode(texts[0]).input_ids])).cls_logits[0, -1].item()
    assert model.classify(texts[0]).logit == pytest.approx(expected, abs=1e-4)
    assert decoder_up_to(model.get_decoder(), 4) is model.get_decoder()


@pytest.mark.parametrize("whole", [True, False])
def test_a_shared_prefix_changes_no_number(any_model, texts, whole):
    prompts = [any_model.encoder.encode(text).input_ids for text in texts]
    prefix = SharedPrefix.of(any_model, prompts, whole)
    assert all(prompt[: len(prefix.input_ids)] == prefix.input_ids for prompt in prompts)
    windowed = any_model.config.text_config.model_type == "gemma3_text"
    assert len({tuple(prompt[: len(prefix.input_ids) + 1]) for prompt in prompts}) == (1 if windowed else 4)
    logits, _ = any_model._read(prompts, prefix)
    expected = [any_model(torch.tensor([prompt])).cls_logits[0, -1].item() for prompt in prompts]
    assert logits.tolist() == pytest.approx(expected, abs=1e-4)


def test_equal_prompts_share_all_but_their_last_token(model):
    prompts = [model.encoder.encode("The same text.").input_ids] * 9
    prefix = SharedPrefix.of(model, prompts, whole=False)
    assert prefix.input_ids == prompts[0][:-1]
    assert model._read(prompts, prefix)[0].tolist() == pytest.approx([model.classify("The same text.").logit] * 9)
    assert SharedPrefix.of(model, prompts[:1], whole=False).input_ids == []


def test_continuous_batching_writes_what_generate_writes(model, texts):
    prompts = [[*model.encoder.encode(text).input_ids, *model.encoder.encode_verdict(1)] for text in texts]
    config = GenerationConfig(max_new_tokens=6, do_sample=False, eos_token_id=-1, pad_token_id=model.pad_token_id)
    pages = ContinuousBatchingConfig(page_size=32, num_blocks=64, max_batch_tokens=256)  # or it takes all memory
    found = model.generate_batch(prompts, config, continuous_batching_config=pages, progress_bar=False)
    for prompt, request in zip(prompts, found.values(), strict=True):
        alone = model.generate(torch.tensor([prompt]), generation_config=config)[0, len(prompt) :].tolist()
        assert request.generated_tokens == alone


def test_drafted_tokens_change_no_word(any_model, texts):
    written = any_model.classify_and_explain(texts[1], max_new_tokens=12)
    drafted = any_model.classify_and_explain(texts[1], max_new_tokens=12, prompt_lookup_num_tokens=3)
    assert drafted.explanation == written.explanation
    assert "".join(list(any_model.stream(texts[1], max_new_tokens=12, prompt_lookup_num_tokens=3))[1:-1]).strip() == (
        written.explanation
    )


@pytest.mark.parametrize("mode", ["guided", "free"])
def test_a_batch_may_be_prefilled_in_several_passes(any_model, texts, mode, monkeypatch):
    together = any_model.classify_and_explain(texts, mode=mode, max_new_tokens=8)
    passes = []
    whole = explaining_clsgen.Prefill._run
    monkeypatch.setattr(explaining_clsgen, "pass_tokens", lambda device: 1)
    monkeypatch.setattr(explaining_clsgen.Prefill, "_run", lambda *args: passes.append(len(args[1])) or whole(*args))
    apart = any_model.classify_and_explain(texts, mode=mode, max_new_tokens=8)
    assert sum(passes) == len(texts)
    windowed = not can_be_padded_within(growing_cache(any_model.config.text_config))
    assert len(passes) == (1 if windowed else len(texts))
    for one, two in zip(together, apart, strict=True):
        assert one.explanation == two.explanation
        assert one.probability == pytest.approx(two.probability, abs=1e-4)
        assert one.lm_probability == pytest.approx(two.lm_probability, abs=1e-4)


def test_a_growing_cache_holds_what_a_dynamic_cache_holds(model):
    caches = DynamicCache(config=model.config.text_config), growing_cache(model.config.text_config)
    generator = torch.Generator().manual_seed(0)

    def update(batch_size, length):
        for layer in range(4):
            states = [torch.rand(batch_size, 2, length, 8, generator=generator) for _ in range(2)]
            for expected, found in zip(*(cache.update(*states, layer) for cache in caches), strict=True):
                torch.testing.assert_close(found, expected, rtol=0, atol=0)

    update(3, 7)
    update(3, 1)
    for change in (
        lambda cache: cache.crop(-2),
        lambda cache: cache.batch_select_indices(torch.tensor([2, 0])),
        lambda cache: cache.reorder_cache(torch.tensor([1, 0])),
        lambda cache: cache.batch_repeat_interleave(2),
    ):
        for cache in caches:
            change(cache)
        batch_size = len(caches[0].layers[0].keys)
        kept = copy.deepcopy(caches[1])
        update(batch_size, 1)
        update(batch_size, 90)
        torch.testing.assert_close(kept.layers[3].keys, caches[0].layers[3].keys[:, :, :-91], rtol=0, atol=0)


def test_token_batches_hold_every_row_once_within_the_budget():
    lengths = [5, 90, 7, 6, 200, 5]
    batches = list(token_batches(lengths, max_tokens=20))
    assert sorted(i for batch in batches for i in batch) == list(range(6))
    assert all(len(batch) * max(lengths[i] for i in batch) <= 20 or len(batch) == 1 for batch in batches)
    assert batches[0] == [4]
    assert max(map(len, token_batches(lengths, max_tokens=10**6, batch_size=4))) == 4


def test_iterators_read_no_more_than_a_window_ahead(model, texts, monkeypatch):
    monkeypatch.setattr("clsgen.inference_clsgen.WINDOW", 3)
    read = []

    def source():
        for i in range(10):
            read.append(i)
            yield texts[i % 4]

    predictions = model.classify_iter(source())
    first = next(predictions)
    assert read == [0, 1, 2]
    rest = list(predictions)
    alone = [model.classify(texts[i % 4]).logit for i in range(10)]
    assert [p.logit for p in [first, *rest]] == pytest.approx(alone, abs=1e-4)
    with pytest.raises(ValueError, match="Text 4: The field 'text' is empty"):
        list(model.classify_iter(["a", "b", "c", "d", ""]))
    explained = list(model.classify_and_explain_iter(iter(texts), max_new_tokens=3))
    assert explained == model.classify_and_explain(texts, max_new_tokens=3)


ENDING = {"max_new_tokens": 24, "no_repeat_ngram_size": 2}  # or a random model says one thing for ever


def generate_apart(model, prompts):
    rows = [torch.tensor([prompt]) for prompt in prompts]
    return [model.generate(row, **ENDING)[0, row.shape[1] :].tolist() for row in rows]


def let_rows_end_at_different_times(model, prompts):
    """Takes for the stop id what the model says behind these prompts first at the most different times."""
    model.generation_config.eos_token_id = None
    endless = generate_apart(model, prompts)
    said = {token for row in endless for token in row}
    stop = max(said, key=lambda token: len({row.index(token) for row in endless if token in row}))
    model.generation_config.eos_token_id = [stop]


def test_rows_that_end_leave_the_batch_and_all_say_the_same(model, texts):
    prompts = [model.encoder.encode(text).input_ids for text in texts * 2]
    let_rows_end_at_different_times(model, prompts)
    apart = generate_apart(model, prompts)
    assert len({len(row) for row in apart}) > 1
    sizes = []
    with torch.inference_mode():
        inputs = Prefill(model, prompts).start(ENDING)
        model.lm.register_forward_pre_hook(
            lambda module, args, kwargs: sizes.append(len(kwargs["input_ids"])), with_kwargs=True
        )
        rows = generate_dropping_ended_rows(model, inputs)
    assert rows == apart
    assert sizes[0] == 8
    assert sizes[-1] < 8


def test_an_explanation_that_has_no_end_says_so(model, texts):
    prompts = [model.encoder.encode(text).input_ids for text in texts]
    let_rows_end_at_different_times(model, prompts)
    lengths = [len(row) for row in generate_apart(model, prompts)]
    options = {"mode": "free", **ENDING, "max_new_tokens": max(lengths) - 1}
    expected = [length == max(lengths) for length in lengths]
    assert set(expected) == {True, False}
    assert [p.explanation_cut for p in model.classify_and_explain(texts, **options)] == expected
    for text, cut in zip(texts, expected, strict=True):
        assert model.classify_and_explain(text, **options).explanation_cut is cut
        first, *_, last = model.stream(text, **options)
        assert (first.explanation_cut, last.explanation_cut) == (None, cut)
        assert ("explanation cut" in str(last)) is cut
    assert model.classify(texts[0]).explanation_cut is None


@pytest.mark.parametrize("stored", [{"min_new_tokens": 6}, {"exponential_decay_length_penalty": (3, 1.5)}])
def test_stored_options_that_count_tokens_count_them_once(model, texts, stored):
    let_rows_end_at_different_times(model, [model.encoder.encode(text).input_ids for text in texts])
    model.generation_config.update(**stored)
    together = model.classify_and_explain(texts, mode="free", **ENDING)
    apart = [model.classify_and_explain(text, mode="free", **ENDING) for text in texts]
    assert [p.explanation for p in together] == [p.explanation for p in apart]


def test_generate_options_reach_generate(model, texts):
    sampled = model.classify_and_explain(texts, do_sample=True, temperature=5.0, max_new_tokens=12)
    assert [p.explanation for p in sampled] != [
        p.explanation for p in model.classify_and_explain(texts, max_new_tokens=12)
    ]
    beams = model.classify_and_explain(texts, num_beams=2, max_new_tokens=5)
    assert [p.logit for p in beams] == pytest.approx([p.logit for p in sampled], abs=1e-4)
    alone = [model.classify_and_explain(text, num_beams=2, max_new_tokens=5).explanation for text in texts]
    assert [p.explanation for p in beams] == alone
    with pytest.raises(ValueError, match="num_return_sequences"):
        model.classify_and_explain(texts[0], do_sample=True, num_return_sequences=2)
    with pytest.raises(ValueError, match="nonsense"):
        model.classify_and_explain(texts[0], nonsense=3)


def test_options_may_come_in_a_generation_config_or_be_stored(model, texts):
    letters = model.tokenizer("abcdefghijklmnopqrstuvwxyz")["input_ids"]
    model.generation_config.suppress_tokens = [i for i in range(VOCABULARY) if i not in letters]

    def explanations(**kwargs):
        with torch.inference_mode():
            prompts = [model.encoder.encode(text).input_ids for text in texts]
            return Prefill(model, prompts).explain(kwargs)

    short, beams = explanations(max_new_tokens=5), explanations(max_new_tokens=5, num_beams=2)
    assert [len(words) for _, words, _ in short] == [5] * 4
    assert explanations(generation_config=GenerationConfig(max_new_tokens=5)) == short
    assert explanations(generation_config=GenerationConfig(max_new_tokens=50), max_new_tokens=5) == short
    assert explanations(generation_config=GenerationConfig(max_new_tokens=5, num_beams=2)) == beams
    several = GenerationConfig(do_sample=True, num_return_sequences=2)
    with pytest.raises(ValueError, match="`num_return_sequences` must be 1"):
        model.classify_and_explain(texts[0], generation_config=several)
    model.generation_config.max_new_tokens = 5
    assert explanations(max_new_tokens=None) == short
    model.generation_config.update(max_new_tokens=5, num_beams=2)
    assert explanations() == beams


def test_explain_argues_for_any_label_from_one_prefill(any_model, texts):
    both = any_model.explain(texts[1], label=["not_supported", 1], max_new_tokens=6)
    assert [p.explained_label for p in both] == ["not_supported", "supported"]
    assert both[0].label == both[1].label
    own = any_model.classify_and_explain(texts[1], max_new_tokens=6)
    assert any_model.explain(texts[1], max_new_tokens=6) == own
    assert own == both[own.label_id]
    apart = [any_model.explain(texts[1], label=i, max_new_tokens=6) for i in (0, 1)]
    assert both == apart
    with pytest.raises(ValueError, match="`label` is one of"):
        any_model.explain(texts[1], label="maybe")


def test_attributions_are_the_logits_fall_without_each_sentence(model):
    text = {"findings": "Death fell. It was 3 vs. 5 deaths (p=0.01)! Nobody else died.", "claim": "It works."}
    prediction = model.classify(text, attributions=True)
    sentences = [text[a.field][a.start : a.end] for a in prediction.attributions]
    assert sentences == ["Death fell.", "It was 3 vs. 5 deaths (p=0.01)!", "Nobody else died.", "It works."]
    without = model.classify({**text, "findings": "Death fell.  Nobody else died."})
    assert prediction.attributions[1].score == pytest.approx(prediction.logit - without.logit, abs=1e-4)
    assert prediction.attributions[3].score == pytest.approx(
        prediction.logit - model.classify({**text, "claim": "..."}).logit, abs=1e-4
    )
    assert (
        model.classify_and_explain(text, attributions=True, max_new_tokens=2).attributions == prediction.attributions
    )


def test_attributions_of_a_long_text_leave_the_cut_out(model):
    text = {"findings": " ".join(f"Sentence number {i} of many." for i in range(60)), "claim": "It works."}
    prediction = model.classify(text, attributions=True)
    assert prediction.truncated
    inside = [a for a in prediction.attributions if a.field == "findings"]
    assert 3 < len(inside) < 30
    assert inside[-1].end == len(text["findings"])
    assert any(b.start - a.end > 100 for a, b in itertools.pairwise(inside))


def test_attributions_of_many_sentences_are_of_joined_ones(backbones):
    model = build(backbones["llama"], max_prompt_length=700)
    text = {"findings": " ".join(f"{'AB'[i % 2]}." for i in range(100)), "claim": "It works."}
    prediction = model.classify(text, attributions=True)
    assert not prediction.truncated
    sentences = [text[a.field][a.start : a.end] for a in prediction.attributions]
    assert sentences == ["A. B."] * 50 + ["It works."]
    without = model.classify({**text, "findings": text["findings"].removeprefix("A. B. ")})
    assert prediction.attributions[0].score == pytest.approx(prediction.logit - without.logit, abs=1e-4)
    long = model.classify({**text, "findings": "A. " * 500}, attributions=True)
    assert long.truncated
    spans = [(a.start, a.end) for a in long.attributions if a.field == "findings"]
    assert 32 < len(spans) < 64
    gaps = [after - before for (_, before), (after, _) in itertools.pairwise(spans)]
    assert max(gaps) > 500  # what was cut
    assert sorted(gaps)[:-1] == [1] * (len(gaps) - 1)


def test_sentences_end_at_stops_and_lines():
    text = "A 1.5 mg dose. See e.g. Smith et al. 2020.\n\nRESULTS: none\n"
    assert [text[a:b] for a, b in sentence_spans(text)] == [
        "A 1.5 mg dose.",
        "See e.g. Smith et al. 2020.",
        "RESULTS: none",
    ]
    assert sentence_spans(" ") == []
    blanks = " " * 200_000  # seconds where a pattern goes over them once, hours where from each place anew
    assert sentence_spans(f"a{blanks}b") == [(0, 200_002)]
    assert sentence_spans(f"a{blanks}\n{blanks}b") == [(0, 1), (400_002, 400_003)]


def test_threads_get_the_same_answers(any_model, texts):
    expected = any_model.classify_and_explain(texts, max_new_tokens=6)
    answers = {}

    def work(i):
        answers[i] = any_model.classify_and_explain(texts, max_new_tokens=6) if i % 2 else any_model.classify(texts)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i in range(6):
        assert [p.logit for p in answers[i]] == pytest.approx([p.logit for p in expected], abs=1e-4)
        if i % 2:
            assert [p.explanation for p in answers[i]] == [p.explanation for p in expected]


@pytest.mark.parametrize("batch_size", [1, 8])
def test_an_explanation_does_not_repeat_itself_but_may_repeat_the_prompt(model, texts, batch_size):
    letters = model.tokenizer("abcdefgh")["input_ids"]  # so few that it has to
    model.generation_config.suppress_tokens = [i for i in range(VOCABULARY) if i not in letters]
    said = []
    model.lm.register_forward_pre_hook(lambda *call: said.append(call[2]["input_ids"]), with_kwargs=True)

    def explain():
        said.clear()
        model.classify_and_explain(texts[0], mode="free", max_new_tokens=30, batch_size=batch_size)
        return [ids[0, -1].item() for ids in said if ids.shape[1] == 1]

    def repeats(tokens):
        pairs = list(itertools.pairwise(tokens[1:]))
        return len(pairs) - len(set(pairs))

    assert repeats(explain()) > 0
    model.config.explanation_no_repeat_ngram_size = 2
    assert repeats(explain()) == 0
    # A processor that knows the prompt would forbid what it holds; ours equals generation behind an empty prompt.
    whole = model.classify_and_explain(texts * 2, mode="free", max_new_tokens=30)
    assert whole[0].explanation == model.classify_and_explain(texts[0], mode="free", max_new_tokens=30).explanation


def test_the_tokenizer_comes_from_where_the_model_came_from(model, texts, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    (tmp_path / "elsewhere").mkdir()
    model.save_pretrained(tmp_path / "here" / "model")
    model.tokenizer.save_pretrained(tmp_path / "here" / "model")
    monkeypatch.chdir(tmp_path / "here")
    loaded = AutoModel.from_pretrained("model", trust_remote_code=True, local_files_only=True)
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert loaded.classify(texts[0]).probability == pytest.approx(model.classify(texts[0]).probability, abs=1e-5)
    assert loaded._loaded_from == {"place": str(tmp_path / "here" / "model"), "local_files_only": True}


def test_words_that_contradict_their_verdict_line_are_not_hidden(model):
    prompt = model.encoder.prompt
    against, in_favour = (prompt.verdict_line(label) for label in (0, 1))
    assert split_words(prompt, f"{in_favour}It fell.", given=1) == (1, "It fell.")
    assert split_words(prompt, f"{against}It rose.", given=None) == (0, "It rose.")
    assert split_words(prompt, "It fell.", given=1) == (None, "It fell.")
    contradicting = f"{against}It rose."
    assert split_words(prompt, contradicting, given=1) == (1, contradicting)
    pieces = [contradicting[i : i + 3] for i in range(0, len(contradicting), 3)]
    assert "".join(_without_verdict_line(pieces, prompt, 1)) == contradicting
    assert "".join(_without_verdict_line(pieces, prompt, 0)) == "It rose."
