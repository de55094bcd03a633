"""Scores against one sample at a time, without padding."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from upcycle.data.chat import Sample, end_of_turn
from upcycle.data.splits import load_splits
from upcycle.evaluation.score import _greedy, exact_matches, held_out, score, short_answers
from upcycle.experts.kinds import load_model
from upcycle.recipe import Recipe
from upcycle.records.scores import ModelScores, best_checkpoint
from upcycle.settings import EvaluateSettings
from upcycle.weights.base import load_tokenizer

SETTINGS = EvaluateSettings(max_answer_tokens=9, tokens_per_batch=150)


@pytest.fixture
def samples(recipe: Recipe, base: Path) -> list[Sample]:
    return load_splits(recipe, load_tokenizer(base, None), 128).train[:8]


def test_loss_is_the_mean_over_samples_by_domain(base: Path, samples: list[Sample]) -> None:
    model, tokenizer = load_model(base, torch.float32), load_tokenizer(base, None)
    settings = SETTINGS.model_copy(update={"exact_match": False})
    found = score(model, tokenizer, samples, settings, "base").loss
    alone = []
    for sample in samples:
        with torch.no_grad():
            logits = model(torch.tensor([sample.input_ids])).logits[0, :-1]
        alone.append(torch.nn.functional.cross_entropy(logits, torch.tensor(sample.labels[1:])).item())
    copies = [loss for loss, s in zip(alone, samples, strict=True) if s.domain == "copy"]
    assert found["all"] == pytest.approx(sum(alone) / len(alone), abs=1e-5)
    assert found["copy"] == pytest.approx(sum(copies) / len(copies), abs=1e-5)


def test_batched_greedy_answers_equal_those_of_one_prompt(base: Path, samples: list[Sample]) -> None:
    model, tokenizer = load_model(base, torch.float32), load_tokenizer(base, None)
    expected = []
    for sample in samples:
        ids = torch.tensor([sample.input_ids[: sample.answer_start]])
        output = model.generate(ids, max_new_tokens=9, do_sample=False, attention_mask=torch.ones_like(ids))
        expected.append(tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True).strip())
    # the references are replaced by what the model says: now all must match, and none with another reference
    said = [replace(s, answer=e) for s, e in zip(samples, expected, strict=True)]
    assert exact_matches(model, tokenizer, said, SETTINGS, "base") == [1.0] * len(samples)
    other = [replace(s, answer=e + "!") for s, e in zip(samples, expected, strict=True)]
    assert exact_matches(model, tokenizer, other, SETTINGS, "base") == [0.0] * len(samples)


@pytest.mark.parametrize("text", ["yes", "<think>x</think>\n yes "])
def test_an_answer_is_what_stands_behind_thoughts_until_the_template_s_end_of_turn(
    text: str, base: Path, samples: list[Sample], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A base ends texts with another token than its template ends turns with."""
    other = Path(shutil.copytree(base, tmp_path / "other"))
    for name, values in (("config.json", {"eos_token_id": 0}), ("tokenizer_config.json", {"eos_token": "<|pad|>"})):
        (other / name).write_text(json.dumps({**json.loads((other / name).read_text()), **values}))
    (other / "generation_config.json").write_text(json.dumps({"eos_token_id": 0}))
    tokenizer, model = load_tokenizer(other, None), load_model(other, torch.float32)
    end = end_of_turn(tokenizer)
    assert end == tokenizer.convert_tokens_to_ids("<|im_end|>") == [i for i in samples[0].labels if i >= 0][-1]
    said = tokenizer(f"{text}<|im_end|>no", add_special_tokens=False)["input_ids"]

    def generate(input_ids: torch.Tensor, **_: Any) -> torch.Tensor:
        ends = model.generation_config.eos_token_id
        stop = next(i for i, token in enumerate([*said, 0]) if token in ends)
        return torch.cat([input_ids, torch.tensor([said[: stop + 1]])], dim=1)

    monkeypatch.setattr(model, "generate", generate)
    assert exact_matches(model, tokenizer, [replace(samples[0], answer="yes")], SETTINGS, "x") == [1.0]


def test_answers_are_greedy_whatever_the_model_s_settings_say(base: Path, samples: list[Sample]) -> None:
    model, tokenizer = load_model(base, torch.float32), load_tokenizer(base, None)
    plain = _greedy(model, tokenizer, samples, 9)
    own = model.generation_config
    own.update(repetition_penalty=9.0, num_beams=3, no_repeat_ngram_size=1)
    assert _greedy(model, tokenizer, samples, 9) == plain
    assert model.generation_config is own


def test_a_row_cut_within_its_answer_has_no_prompt_to_answer(samples: list[Sample]) -> None:
    assert (
        short_answers([replace(samples[0], answer_start=0)], SETTINGS.model_copy(update={"max_answer_tokens": 99}))
        == []
    )


def test_long_answers_are_left_out_of_the_exact_match(samples: list[Sample]) -> None:
    lengths = [len(s.input_ids) - s.answer_start for s in samples]
    limit = sorted(lengths)[3]
    chosen = short_answers(samples, SETTINGS.model_copy(update={"max_answer_tokens": limit}))
    assert len(chosen) == sum(length <= limit for length in lengths) < len(samples)


def test_shares_count_the_routed_slots_without_padding(
    base: Path, checkpoints: list[Path], samples: list[Sample], tmp_path: Path
) -> None:
    from worlds import assembled

    assembled(base, checkpoints, tmp_path, router_std=0.5)
    model = load_model(tmp_path, torch.float32)
    _, together = held_out(model, samples, SETTINGS, 0, "moe")
    counts = torch.zeros(2, 3)
    for sample in samples:
        _, alone = held_out(model, [sample], SETTINGS, 0, "moe")
        counts += alone["all"] * len(sample.input_ids)
    torch.testing.assert_close(together["all"], counts / sum(len(s.input_ids) for s in samples), atol=1e-5, rtol=0)
    assert set(together) == {"all", "copy", "reverse"}


def test_best_checkpoint_is_the_one_with_the_lowest_loss() -> None:
    losses = {"base": 0.1, "c1": 2.0, "c2": 1.0, "MoE": 0.5}
    scores = {name: ModelScores(loss={"all": loss}) for name, loss in losses.items()}
    scores["MoE"] = scores["MoE"].model_copy(update={"expert_share": {"all": [[1.0]]}})
    assert best_checkpoint(scores) == "c2"
