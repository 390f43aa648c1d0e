"""Scores of token sequences in few passes: the same as of one alone, whatever the architecture."""

import pytest
import torch

from wagle_pl.evaluation.scoring import Candidate, Passes, score
from wagle_pl.lm.models import load_model

generator = torch.Generator().manual_seed(0)


def random_candidates(count):
    """Answers to ``count`` questions that begin alike, as their wrong answers do; some have their prompt scored too."""
    found = []
    for number in range(count):
        prompt = [7] * 9 + torch.randint(5, 300, (number % 7 + 1,), generator=generator).tolist()
        phrase = torch.randint(5, 300, (number,), generator=generator).tolist()
        for k in range((1, 3, 7)[number % 3]):
            answer = (phrase if k else []) + torch.randint(
                5, 300, (k + 1,), generator=generator
            ).tolist()
            labels = (
                prompt + answer if number % 3 == 2 and k == 0 else [-100] * len(prompt) + answer
            )
            found.append(Candidate(prompt + answer, labels, greedy=True, vocabulary=True))
    return found


@pytest.mark.parametrize("share", [True, False])
def test_batched_scores_equal_those_of_one_text_alone(tiny_model, share):
    model = load_model(tiny_model).eval()
    every = random_candidates(8)
    passes = Passes(model)
    with torch.no_grad():
        for candidate, values in zip(
            every, score(passes, every, pad_id=0, max_rows=4, share=share), strict=True
        ):
            logprobs = model(torch.tensor([candidate.ids])).logits[0].double().log_softmax(-1)
            places = [p for p in range(1, len(candidate.ids)) if candidate.labels[p] != -100]
            expected = [logprobs[p - 1, candidate.ids[p]].item() for p in places]
            assert values.logprobs.tolist() == pytest.approx(expected, abs=1e-4)
            greedy = [logprobs[p - 1].argmax().item() == candidate.ids[p] for p in places]
            assert values.greedy.tolist() == greedy and len(values.std) == len(places)


@pytest.mark.parametrize("kind", ["GPT2", "GPTNeoX", "Mistral", "Bloom", "Mamba"])
def test_scores_of_other_architectures(kind):
    """Learned positions, rotary ones, a window shorter than the texts, no positions, and a state that is no cache."""
    import transformers

    sizes = {"vocab_size": 300, "hidden_size": 32, "num_hidden_layers": 2}
    if kind != "Mamba":
        sizes["num_attention_heads"] = 4
    if kind == "Mistral":
        sizes |= {"num_key_value_heads": 2, "sliding_window": 8}
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**sizes)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    every = random_candidates(5)
    with torch.no_grad():
        for candidate, values in zip(
            every, score(Passes(model), every, pad_id=0, max_rows=4), strict=True
        ):
            logprobs = model(torch.tensor([candidate.ids])).logits[0].log_softmax(-1)
            places = [p for p in range(1, len(candidate.ids)) if candidate.labels[p] != -100]
            expected = [logprobs[p - 1, candidate.ids[p]].item() for p in places]
            assert values.logprobs.tolist() == pytest.approx(expected, abs=1e-4)


def test_a_shared_prompt_is_computed_once(tiny_model):
    model = load_model(tiny_model).eval()
    seen = []
    model.register_forward_pre_hook(
        lambda _, __, inputs: seen.append(inputs["input_ids"].shape), with_kwargs=True
    )
    prompt, phrase = list(range(10, 30)), list(range(60, 66))
    answers = [[40, 41, 42], [*phrase, 51, 52], [*phrase, 61, 62], [*phrase, 71, 72]]
    with torch.no_grad():
        score(
            Passes(model),
            [Candidate(prompt + a, [-100] * 20 + a) for a in answers],
            pad_id=0,
            max_rows=8,
        )
    assert [tuple(shape) for shape in seen] == [(1, 20), (2, 6), (3, 1)]


def test_all_ranks_run_as_many_passes(tiny_model, monkeypatch):
    """A rank that is done joins the passes of one that is not, each announced before it is run."""
    from wagle_pl.core import distributed

    passes = Passes(load_model(tiny_model).eval(), synced_gpus=True)
    run, said = [], []
    passes.lm.register_forward_pre_hook(lambda *_: run.append(len(said)))
    others = iter([1] * 100)
    monkeypatch.setattr(
        distributed,
        "all_reduce_max",
        lambda number: said.append(number) or max(number, next(others)),
    )
    with torch.no_grad():
        score(passes, random_candidates(1), pad_id=0, max_rows=4)
        alone = len(run)
        assert said == [1] * alone and run == list(range(1, alone + 1))
        others = iter([1, 1, 0])
        passes.level()
    assert len(run) == alone + 2 and said[alone:] == [0, 0, 0]
