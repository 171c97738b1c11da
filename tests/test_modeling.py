"""The model: independent numerics, every way of padding, generation, saving and loading."""

import json
import math
import pickle
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import CHAT_TEMPLATE, CONFIGS, READS, VOCABULARY, build
from peft import LoraConfig, PeftModel, get_peft_model
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, DynamicCache, Gemma3Config, TextIteratorStreamer
from transformers.models.gpt2.modeling_gpt2 import GPT2LMHeadModel
from transformers.quantizers.base import HfQuantizer

from clsgen.configuration_clsgen import AUTO_MAP, ClsGenConfig
from clsgen.head_clsgen import running_sum
from clsgen.modeling_clsgen import ClsGenForCausalLMAndClassification
from clsgen.prediction_clsgen import DecisionRule

IGNORE = -100


def random_rows(lengths=(9, 14, 6), seed=0):
    """Ids, labels behind a decision token, and that token's label, of each row."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for i, length in enumerate(lengths):
        ids = torch.randint(0, 250, (length,), generator=generator)
        decision = length // 2
        labels = torch.full((length,), IGNORE)
        labels[decision + 1 :] = ids[decision + 1 :]
        cls_labels = torch.full((length,), float(IGNORE))
        cls_labels[decision] = i % 2
        rows.append((ids, labels, cls_labels, decision))
    return rows


def batch_of(rows, side):
    """The rows padded on a side, by `pad_sequence`."""

    def pad(columns, fill):
        return pad_sequence(columns, batch_first=True, padding_value=fill, padding_side=side)

    return {
        "input_ids": pad([row[0] for row in rows], 258),
        "attention_mask": pad([torch.ones(len(row[0]), dtype=torch.long) for row in rows], 0),
        "labels": pad([row[1] for row in rows], IGNORE),
        "cls_labels": pad([row[2] for row in rows], IGNORE),
    }


def packed(rows):
    """All rows in one sequence, without a mask."""
    labels = [row[1].clone() for row in rows]
    for row_labels in labels:
        row_labels[0] = IGNORE
    return {
        "input_ids": torch.cat([row[0] for row in rows])[None],
        "labels": torch.cat(labels)[None],
        "cls_labels": torch.cat([row[2] for row in rows])[None],
        "position_ids": torch.cat([torch.arange(len(row[0])) for row in rows])[None],
    }


def reference(model, rows):
    """Logits and losses by plain torch, row by row without padding, from the backbone's own outputs."""
    lm_losses, cls_logits, cls_labels = [], [], []
    weights = model.cls_head.weight[0].chunk(len(model.config.cls_reads))
    for ids, labels, row_labels, decision in rows:
        outputs = model.lm(ids[None], output_hidden_states=True)
        log_probabilities = outputs.logits[0, :-1].log_softmax(-1)
        targets = labels[1:]
        lm_losses += [-log_probabilities[i, t] for i, t in enumerate(targets.tolist()) if t != IGNORE]
        logit = model.cls_head.bias[0]
        for weight, (layer, pooling) in zip(weights, model.config.cls_reads, strict=True):
            hidden = outputs.hidden_states[layer][0]
            logit = logit + weight @ (hidden[decision] if pooling == "decision" else hidden[: decision + 1].mean(0))
        cls_logits.append(logit)
        cls_labels.append(row_labels[decision])
    logits, labels = torch.stack(cls_logits), torch.stack(cls_labels)
    probabilities = torch.sigmoid(logits)
    bce = -(labels * probabilities.log() + (1 - labels) * (1 - probabilities).log()).mean()
    return logits, torch.stack(lm_losses).mean(), bce


@pytest.mark.parametrize("form", ["left", "right", "packed"])
def test_losses_and_logits_equal_plain_torch_on_unpadded_rows(any_model, form):
    rows = random_rows()
    batch = packed(rows) if form == "packed" else batch_of(rows, form)
    output = any_model(**batch)
    logits, lm_loss, bce = reference(any_model, rows)
    torch.testing.assert_close(output.cls_logits[batch["cls_labels"] != IGNORE], logits, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(output.lm_loss, lm_loss, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(output.cls_loss, bce, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(output.loss, output.lm_loss + output.cls_loss)


def test_logits_are_the_backbones_bit_for_bit(any_model, backbones, request):
    family = request.node.callspec.params["any_model"]
    lm = AutoModelForCausalLM.from_pretrained(backbones[family], dtype=torch.float32).eval()
    ids = torch.randint(0, 250, (2, 21))
    assert torch.equal(any_model(ids).logits, lm(ids).logits)


def test_lm_head_is_applied_where_labels_need_it_while_training(model):
    batch = batch_of(random_rows(), "right")
    labelled = (batch["labels"] != IGNORE).sum()
    with torch.no_grad():
        expected = model(**batch)
        found = model.train()(**batch)
    assert found.logits.shape == (labelled, expected.logits.shape[-1])
    torch.testing.assert_close(found.logits, expected.logits[:, :-1][batch["labels"][:, 1:] != IGNORE])
    torch.testing.assert_close(found.loss, expected.loss)


@pytest.mark.parametrize("side", ["left", "right"])
def test_attention_gets_a_mask_only_where_padding_stands_before_a_row(model, side):
    masks = []
    layer = model.get_decoder().layers[0]
    layer.register_forward_pre_hook(
        lambda module, args, kwargs: masks.append(kwargs["attention_mask"]), with_kwargs=True
    )
    model(**batch_of(random_rows(), side))
    assert (masks[0] is None) == (side == "right")


def test_decision_does_not_see_the_completion(any_model):
    (ids, _, _, decision), *_ = random_rows((20,))
    whole = any_model(ids[None]).cls_logits[0, decision]
    prompt = any_model(ids[None, : decision + 1]).cls_logits[0, decision]
    other = any_model(torch.cat([ids[: decision + 1], ids[decision + 1 :].flip(0)])[None]).cls_logits[0, decision]
    torch.testing.assert_close(whole, prompt, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(whole, other, atol=1e-5, rtol=1e-5)


def test_pos_weight_and_loss_weights(model):
    rows = random_rows()
    batch = batch_of(rows, "right")
    model.config.pos_weight, model.config.lm_weight, model.config.cls_weight = 3.0, 0.5, 2.0
    output = model(**batch)
    logits, lm_loss, _ = reference(model, rows)
    labels = torch.tensor([0.0, 1.0, 0.0])
    expected = F.binary_cross_entropy_with_logits(logits, labels, pos_weight=torch.tensor(3.0))
    torch.testing.assert_close(output.cls_loss, expected)
    torch.testing.assert_close(output.loss, 0.5 * lm_loss + 2 * expected)
    rule = DecisionRule.from_config(model.config)
    corrected = rule.logits(torch.tensor([1.0]))
    assert corrected.item() == pytest.approx(1 - torch.tensor(3.0).log().item())
    assert rule.probabilities(corrected).item() == pytest.approx(torch.sigmoid(corrected).item())


def test_a_batch_without_labels_gives_zero_losses_that_still_reach_every_weight(model):
    ids = torch.randint(0, 250, (2, 8))
    nothing = torch.full_like(ids, IGNORE)
    output = model.train()(ids, labels=nothing, cls_labels=nothing.float())
    assert output.loss.item() == 0
    output.loss.backward()
    assert all(parameter.grad is not None for parameter in model.cls_head.parameters())


def test_head_dropout_is_dropout_on_the_pooled_features(model):
    batch = batch_of(random_rows(), "left")
    expected = model(**batch).cls_logits
    model.config.cls_dropout = 0.5
    torch.testing.assert_close(model.eval()(**batch).cls_logits, expected)
    torch.manual_seed(0)
    with torch.no_grad():
        samples = torch.stack([model.train()(**batch).cls_logits for _ in range(3000)])
    assert samples.std(dim=0)[batch["attention_mask"] == 1].min() > 0
    real = batch["attention_mask"] == 1
    error = (samples.mean(dim=0) - expected)[real].abs() / (samples.std(dim=0)[real] / 3000**0.5)
    assert error.max() < 5


def test_running_sum_restarts_with_each_sequence_and_goes_on_from_earlier_calls():
    scores = torch.tensor([[1.0, 3.0, 5.0, 10.0, 20.0]])
    ones = torch.ones_like(scores)
    positions = torch.tensor([[0, 1, 2, 0, 1]])
    torch.testing.assert_close(running_sum(scores, ones, positions), torch.tensor([[1.0, 4.0, 9.0, 10.0, 30.0]]))
    positions = torch.tensor([[7, 8, 9, 0, 1]])
    sums = running_sum(scores, ones, positions, past_scores=torch.tensor([100.0]))
    torch.testing.assert_close(sums, torch.tensor([[101.0, 104.0, 109.0, 10.0, 30.0]]))


@pytest.mark.parametrize("chunk", [1, 5])
@pytest.mark.parametrize("padded", [True, False])
def test_a_prompt_may_come_in_chunks(any_model, chunk, padded):
    ids = torch.randint(3, 250, (2, 17))
    mask = torch.ones_like(ids)
    mask[0, : 4 * padded] = 0
    whole = any_model(ids, attention_mask=mask)
    cache, past_scores = DynamicCache(config=any_model.config.text_config), None
    for start in range(0, 17, chunk):
        part = any_model(
            ids[:, start : start + chunk],
            attention_mask=mask[:, : start + chunk] if padded else None,
            past_key_values=cache,
            cls_past_scores=past_scores,
        )
        past_scores = part.cls_past_scores
    torch.testing.assert_close(part.cls_logits[:, -1], whole.cls_logits[:, -1], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(part.logits[:, -1], whole.logits[:, -1], atol=1e-4, rtol=1e-4)


def test_generate_in_its_usual_modes_equals_the_backbone(any_model, tokenizer):
    ids = torch.randint(0, 250, (2, 12))
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    lm = any_model.lm
    lm.generation_config = any_model.generation_config
    common = {"attention_mask": mask, "max_new_tokens": 6}
    for kwargs in ({}, {"num_beams": 2}, {"use_cache": False}, {"cache_implementation": "static"}):
        kwargs = {**common, **kwargs}
        if isinstance(lm, GPT2LMHeadModel) and "cache_implementation" in kwargs:
            kwargs.pop("cache_implementation")
        assert torch.equal(any_model.generate(ids, **kwargs), lm.generate(ids, **kwargs)), kwargs
    torch.manual_seed(0)
    sampled = any_model.generate(ids, do_sample=True, **common)
    torch.manual_seed(0)
    assert torch.equal(sampled, lm.generate(ids, do_sample=True, **common))
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True)
    one = any_model.generate(ids[1:], max_new_tokens=6, streamer=streamer)
    assert "".join(streamer) == tokenizer.decode(one[0, 12:])


def test_save_load_resave(any_model, tmp_path):
    ids = torch.randint(0, 250, (2, 10))
    expected = any_model(ids)
    any_model.config.calibration = {"temperature": 1.7, "bias": -0.3}
    any_model.save_pretrained(tmp_path / "first", max_shard_size="20KB")
    assert len(list((tmp_path / "first").glob("*.safetensors"))) > 1
    assert (tmp_path / "first" / "prompting_clsgen.py").is_file()
    loaded = ClsGenForCausalLMAndClassification.from_pretrained(tmp_path / "first")
    loaded.save_pretrained(tmp_path / "second")
    again = ClsGenForCausalLMAndClassification.from_pretrained(tmp_path / "second")
    for other in (loaded, again):
        output = other(ids)
        torch.testing.assert_close(output.logits, expected.logits)
        torch.testing.assert_close(output.cls_logits, expected.cls_logits)
        assert other.config.calibration == {"temperature": 1.7, "bias": -0.3}
        tied = other.lm.get_output_embeddings().weight is other.lm.get_input_embeddings().weight
        assert tied == any_model.config.text_config.tie_word_embeddings
    configs = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("first", "second")]
    assert configs[0] == configs[1]
    assert set(configs[0]["auto_map"]) == set(AUTO_MAP)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_head_is_float32_after_every_way_of_loading(backbones, tmp_path, dtype):
    model = ClsGenForCausalLMAndClassification.from_backbone(backbones["llama"], dtype=dtype)
    assert model.lm.dtype == dtype
    assert model.cls_head.weight.dtype == torch.float32
    model.save_pretrained(tmp_path)
    for kwargs in ({}, {"dtype": dtype}, {"dtype": "auto"}, {"device_map": "cpu"}):
        loaded = ClsGenForCausalLMAndClassification.from_pretrained(tmp_path, **kwargs)
        assert loaded.cls_head.weight.dtype == torch.float32, kwargs
        assert loaded(torch.tensor([[1, 2, 3]])).cls_logits.dtype == torch.float32


def test_lora_trains_saves_reloads_and_merges_to_the_same_probability(model, backbones, tmp_path):
    ids = torch.randint(0, 250, (2, 10))
    lora = LoraConfig(target_modules="all-linear", modules_to_save=["cls_head"], init_lora_weights=False)
    peft_model = get_peft_model(model, lora)
    trained = [name for name, parameter in peft_model.named_parameters() if parameter.requires_grad]
    assert any("cls_head" in name for name in trained)
    assert not any("lora" in name and "cls_head" in name for name in trained)
    with torch.no_grad():
        peft_model.base_model.model.cls_head.weight.mul_(1.5)
    expected = peft_model.eval()(input_ids=ids).cls_logits
    peft_model.save_pretrained(tmp_path)
    reloaded = PeftModel.from_pretrained(build(backbones["llama"]), tmp_path).eval()
    torch.testing.assert_close(reloaded(input_ids=ids).cls_logits, expected)
    merged = reloaded.merge_and_unload()
    torch.testing.assert_close(merged(ids).cls_logits, expected, atol=1e-4, rtol=1e-4)


def test_an_adapter_comes_back_on_its_backbone_with_the_config_of_its_model(backbones, texts, tmp_path):
    model = build(backbones["llama"], reads=[(1, "mean"), (3, "decision")])
    model.config.calibration = {"temperature": 1.7, "bias": 0.3}
    model.config.threshold = 0.31
    lora = LoraConfig(target_modules="all-linear", modules_to_save=["cls_head"], init_lora_weights=False)
    peft_model = get_peft_model(model, lora).eval()
    peft_model.save_pretrained(tmp_path)
    model.config.save_pretrained(tmp_path)
    expected = peft_model.get_base_model().classify_and_explain(texts[0], max_new_tokens=4)
    like = ClsGenConfig.from_pretrained(tmp_path)
    fresh = ClsGenForCausalLMAndClassification.from_backbone(backbones["llama"], like=like, dtype=torch.float32)
    found = (
        PeftModel.from_pretrained(fresh, tmp_path).merge_and_unload().classify_and_explain(texts[0], max_new_tokens=4)
    )
    assert found.probability == pytest.approx(expected.probability, abs=1e-5)
    assert (found.label, found.threshold, found.explanation) == (expected.label, 0.31, expected.explanation)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_activation_checkpointing_keeps_gradients(model, use_reentrant):
    batch = batch_of(random_rows(), "left")
    model.train()(**batch).loss.backward()
    expected = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    model.activation_checkpointing_enable({"use_reentrant": use_reentrant})
    model.enable_input_require_grads()
    model(**batch).loss.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], atol=1e-4, rtol=1e-4, msg=name)


def test_compiles_without_a_graph_break(model):
    batch = batch_of(random_rows(), "left")
    del batch["labels"]
    expected = model(**batch)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(**batch).cls_loss, expected.cls_loss)


def test_resizing_embeddings_keeps_both_heads(model):
    ids = torch.randint(0, 250, (1, 10))
    expected = model(ids)
    model.resize_token_embeddings(320)
    output = model(ids)
    assert output.logits.shape[-1] == 320
    torch.testing.assert_close(output.logits[..., :VOCABULARY], expected.logits)
    torch.testing.assert_close(output.cls_logits, expected.cls_logits)


def test_config_refuses_what_cannot_be():
    for kwargs, message in (
        ({"cls_reads": [(99, "mean")]}, "layer must lie in"),
        ({"cls_reads": [(1, "max")]}, "pooling must be one of"),
        ({"pos_weight": 0.0}, "pos_weight"),
        ({"calibration": {"temperature": -1.0}}, "temperature"),
        ({"explanation_mode": "loud"}, "explanation_mode"),
    ):
        with pytest.raises(ValueError, match=message):
            ClsGenConfig(**kwargs)


FRESH = """
import json, sys
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification
assert not any("clsgen" in path for path in sys.path), sys.path
text = {"findings": "Death in 3% and 9%.", "claim": "It works."}
results = []
for auto in (AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification):
    model = auto.from_pretrained(sys.argv[1], trust_remote_code=True)
    results.append(model.classify_and_explain(text, max_new_tokens=4).to_dict())
assert results[0] == results[1] == results[2]
print("RESULT " + json.dumps(results[0]))
"""


def test_checkpoint_alone_works_in_a_fresh_process_elsewhere(model, tmp_path):
    model.save_pretrained(tmp_path / "saved")
    model.tokenizer.save_pretrained(tmp_path / "saved")
    moved = tmp_path / "moved"
    (tmp_path / "saved").rename(moved)
    run = subprocess.run(
        [sys.executable, "-I", "-c", FRESH, str(moved)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={"HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1", "PATH": ""},
        check=False,
    )
    assert run.returncode == 0, run.stderr
    fresh = json.loads(run.stdout.partition("RESULT ")[2])
    text = {"findings": "Death in 3% and 9%.", "claim": "It works."}
    assert fresh == pytest.approx(model.classify_and_explain(text, max_new_tokens=4).to_dict())
    refused = subprocess.run(
        [sys.executable, "-I", "-c", FRESH.replace("True)", "False)", 1), str(moved)],
        cwd=tmp_path, capture_output=True, text=True, env={"HF_HUB_OFFLINE": "1", "PATH": ""}, check=False,
    )  # fmt: skip
    assert "trust_remote_code" in refused.stderr


def test_real_small_model(smollm2, texts):
    model = build(smollm2, reads=[(14, "mean"), (18, "decision")])
    lm = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32).eval()
    ids = torch.randint(0, 40000, (2, 17))
    assert torch.equal(model(ids).logits, lm(ids).logits)
    assert torch.equal(model.generate(ids, max_new_tokens=5), lm.generate(ids, max_new_tokens=5, do_sample=False))
    assert model.config.cls_reads != READS
    classified = model.classify(texts[:2])
    explained = model.classify_and_explain(texts[:2], max_new_tokens=5)
    assert [p.probability for p in classified] == pytest.approx([p.probability for p in explained], abs=1e-4)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"threshold": math.nan}, "`threshold` must lie between 0 and 1"),
        ({"threshold": 2.0}, "`threshold`"),
        ({"threshold": "0.5"}, "`threshold`"),
        ({"threshold": None}, "`threshold`"),
        ({"calibration": {"bias": math.nan}}, "a finite `bias`"),
        ({"calibration": {"temperatur": 2.0}}, "`calibration` has a `temperature`"),
        ({"max_prompt_length": 0}, "`max_prompt_length` must be a whole number"),
        ({"max_prompt_length": "a"}, "`max_prompt_length` must be a whole number"),
    ],
)
def test_a_config_that_gives_no_number_is_refused(wrong, message, model):
    with pytest.raises(ValueError, match=message):
        ClsGenConfig(text_config=model.config.text_config, **wrong)


def test_no_quantiser_converts_the_head(model):
    assert "cls_head" in HfQuantizer.get_modules_to_not_convert(model, None, model._keep_in_fp32_modules)


def test_the_tokenizer_comes_from_the_cache_that_the_backbone_comes_from(backbones, tmp_path):
    commit, repository = "0" * 40, tmp_path / "models--somebody--tiny"
    shutil.copytree(backbones["llama"], repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    model = ClsGenForCausalLMAndClassification.from_backbone(
        "somebody/tiny", cache_dir=str(tmp_path), local_files_only=True
    )
    assert model.tokenizer.chat_template == CHAT_TEMPLATE


def test_a_model_goes_through_pickle(model, texts):
    restored = pickle.loads(pickle.dumps(model))
    assert restored.classify(texts[0]).logit == pytest.approx(model.classify(texts[0]).logit, abs=1e-5)


def test_a_multimodal_backbone_is_refused(tmp_path):
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = Gemma3Config(
        text_config=CONFIGS["gemma3"].to_dict(), vision_config={**vision, "image_size": 28, "patch_size": 14}
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"multimodal \(Gemma3ForConditionalGeneration\).*'gemma3_text'"):
        ClsGenForCausalLMAndClassification.from_backbone(str(tmp_path))
