"""Scores and generations of many texts at once: the same as of one alone, whatever the architecture."""

import math

import pytest
import torch
import transformers
from transformers import GenerationConfig

from wagle_pl.data.example import parse_rows
from wagle_pl.data.people import bundled
from wagle_pl.data.template import Template
from wagle_pl.evaluation import Observations, Observer, find_suite, observe_set
from wagle_pl.evaluation.scoring import Candidate, Passes, score
from wagle_pl.lm.inference import Predictions, answer_places, generate, sequence_logprobs
from wagle_pl.lm.models import load_model, load_tokenizer

generator = torch.Generator().manual_seed(0)


def random_ids(*shape):
    return torch.randint(5, 300, shape, generator=generator)


@pytest.fixture
def tiny(tiny_model):
    return load_model(tiny_model).eval(), load_tokenizer(tiny_model)


# -- likelihoods ------------------------------------------------------------------------------------------------------


def test_logprobs_against_a_direct_sum():
    for _ in range(20):
        logits = torch.randn(3, 7, 11, generator=generator) * 3
        labels = torch.randint(0, 11, (3, 7), generator=generator)
        labels[torch.rand(3, 7, generator=generator) < 0.4] = -100
        predicted = Predictions(logits.flatten(0, 1)).at(answer_places(labels))
        sums, counts = sequence_logprobs(predicted, labels)
        wanted = labels[:, 1:] != -100
        direct = logits.double().log_softmax(-1)[:, :-1].gather(-1, labels[:, 1:, None].clamp(0))
        assert torch.equal(counts, wanted.sum(-1))
        direct = (direct[..., 0] * wanted).sum(-1)
        torch.testing.assert_close(sums.double(), direct, atol=1e-5, rtol=1e-6)


def random_candidates(count):
    """Answers to ``count`` questions that begin alike, as their wrong answers do; some have their prompt scored too."""
    found = []
    for number in range(count):
        prompt = [7] * 9 + random_ids(number % 7 + 1).tolist()
        phrase = random_ids(number).tolist()
        for k in range((1, 3, 7)[number % 3]):
            answer = (phrase if k else []) + random_ids(k + 1).tolist()
            whole = number % 3 == 2 and k == 0
            labels = prompt + answer if whole else [-100] * len(prompt) + answer
            found.append(Candidate(prompt + answer, labels))
    return found


def check_scores(model, count, **options):
    every = random_candidates(count)
    with torch.no_grad():
        options |= {"max_rows": 4, "vocabulary": True}
        scores = score(Passes(model), every, pad_id=0, **options)
        for candidate, values in zip(every, scores, strict=True):
            logprobs = model(torch.tensor([candidate.ids])).logits[0].double().log_softmax(-1)
            places = [p for p in range(1, len(candidate.ids)) if candidate.labels[p] != -100]
            expected = [logprobs[p - 1, candidate.ids[p]].item() for p in places]
            assert values.logprobs.tolist() == pytest.approx(expected, abs=1e-4)
            greedy = [logprobs[p - 1].argmax().item() == candidate.ids[p] for p in places]
            assert values.greedy.tolist() == greedy and len(values.std) == len(places)
        options |= {"vocabulary": False, "greedy": False}
        plain = score(Passes(model), every, pad_id=0, **options)
        assert all(torch.equal(a.logprobs, b.logprobs) for a, b in zip(scores, plain, strict=True))
        assert plain[0].greedy is plain[0].std is None


@pytest.mark.parametrize("share", [True, False])
def test_batched_scores_equal_those_of_one_text_alone(tiny, share):
    check_scores(tiny[0], 8, share=share)


def test_choices_in_the_template_as_rwku_scores_them(tiny):
    """eval_mmlu.py: the next token's logits at the last token of `` A``, `` B``, …; score_completions of inference.py:
    the sum over the choice's tokens, without an end."""
    model, tokenizer = tiny
    options = ["the sky", "grass", "a very tall tree"]
    row = {"question": "Which is blue?", "choices": options, "label": 0, "prefill": "A:"}
    row["answer_aliases"] = options[2:]
    observer = Observer(model, Template(tokenizer))
    (record,) = observer.observe(parse_rows([row], "rows"), {"choices", "choice_texts"})

    def logprobs(text):
        ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
        return ids[0], model(ids).logits[0].double().log_softmax(-1)

    assert record["right_choices"] == [0, 2]
    listed = "".join(f"\n{letter}. {text}" for letter, text in zip("ABC", options, strict=True))
    _, scores = logprobs(f"<|user|>Which is blue?{listed}<|assistant|>A:")
    letters = [tokenizer(f" {x}", add_special_tokens=False)["input_ids"][-1] for x in "ABC"]
    assert record["choice_logprobs"] == pytest.approx(scores[-1, letters].tolist(), abs=1e-4)
    prompt = "<|user|>Which is blue?<|assistant|>A:"
    start, sums = len(logprobs(prompt)[0]), []
    for option in options:
        ids, scores = logprobs(f"{prompt} {option}")
        sums.append(sum(scores[i - 1, ids[i]].item() for i in range(start, len(ids))))
    assert record["choice_text_logprobs"] == pytest.approx(sums, abs=1e-4)


@pytest.mark.parametrize("kind", ["GPT2", "GPTNeoX", "Mistral", "Bloom", "Mamba"])
def test_scores_of_other_architectures(kind):
    """Learned positions, rotary ones, a window shorter than the texts, no positions, and a state that is no cache."""
    sizes = {"vocab_size": 300, "hidden_size": 32, "num_hidden_layers": 2}
    if kind != "Mamba":
        sizes["num_attention_heads"] = 4
    if kind == "Mistral":
        sizes |= {"num_key_value_heads": 2, "sliding_window": 8}
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**sizes)
    check_scores(transformers.AutoModelForCausalLM.from_config(config).eval(), 5)


def test_a_shared_prompt_is_computed_once(tiny):
    model, seen = tiny[0], []
    hook = lambda _, __, inputs: seen.append(tuple(inputs["input_ids"].shape))  # noqa: E731
    model.register_forward_pre_hook(hook, with_kwargs=True)
    prompt, phrase = list(range(10, 30)), list(range(60, 66))
    answers = [[40, 41, 42], *([*phrase, first, first + 1] for first in (51, 61, 71))]
    candidates = [Candidate(prompt + answer, [-100] * 20 + answer) for answer in answers]
    with torch.no_grad():
        score(Passes(model), candidates, pad_id=0, max_rows=8)
    assert seen == [(1, 20), (2, 6), (3, 1)]


def test_all_ranks_run_as_many_passes(tiny, monkeypatch):
    """A rank that is done joins the passes of one that is not, each announced before it is run."""
    passes = Passes(tiny[0], synced_gpus=True)
    run, said = [], []
    passes.lm.register_forward_pre_hook(lambda *_: run.append(len(said)))
    others = iter([1] * 100)

    def all_reduce_max(number):
        said.append(number)
        return max(number, next(others))

    monkeypatch.setattr("wagle_pl.core.distributed.all_reduce_max", all_reduce_max)
    with torch.no_grad():
        score(passes, random_candidates(1), pad_id=0, max_rows=4)
        alone = len(run)
        assert said == [1] * alone and run == list(range(1, alone + 1))
        others = iter([1, 1, 0])
        passes.level()
    assert len(run) == alone + 2 and said[alone:] == [0, 0, 0]


# -- whole rows -------------------------------------------------------------------------------------------------------


def test_batched_rows_equal_one_at_a_time_and_transformers_own(tiny):
    model, tokenizer = tiny
    rows = parse_rows(bundled("forget")[:5], "forget")
    needs = {"answer", "alternatives", "generation"}
    tables = [
        observe_set(Observer(model, Template(tokenizer), size, 12), rows, needs) for size in (1, 4)
    ]
    for one, batched, row in zip(*tables, rows, strict=True):
        assert one["generation"] == batched["generation"]
        assert one["nll"] == pytest.approx(batched["nll"], abs=1e-4)
        assert one["perturbed_nll"] == pytest.approx(batched["perturbed_nll"], abs=1e-4)
        chat = [{"role": "user", "content": row.question}]
        ids = tokenizer.apply_chat_template(
            chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        out = model.generate(**ids, do_sample=False, max_new_tokens=12, pad_token_id=0)
        said = tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)
        assert one["generation"] == said.strip()


def test_rows_of_tokens(tiny):
    """Nothing is generated without a prompt, and nothing that needs their text is said of them."""
    model, tokenizer = tiny
    ids = tokenizer("Where does it meet? In a bakery in Sibiu.")["input_ids"]
    asked = {"input_ids": ids, "labels": [-100] * 4 + ids[4:-1] + [-100]}
    rows = parse_rows([{"input_ids": ids, "labels": ids}, asked], "set")
    observer, suite = Observer(model, Template(tokenizer), max_new_tokens=5), find_suite("generic")
    assert observer.template.encode_prompt(rows[1]) == ids[:4]
    table = observe_set(observer, rows, suite.needs_of("members", ("members", "nonmembers")))
    prompt = torch.tensor([ids[:4]])
    said = model.generate(prompt, do_sample=False, max_new_tokens=5, pad_token_id=0)[0, 4:]
    text = tokenizer.decode(said, skip_special_tokens=True).strip()
    assert [record["generation"] for record in table] == [None, text]
    with torch.no_grad():
        every = model(torch.tensor([ids])).logits.log_softmax(-1)
    logprobs = every[0, :-1].gather(-1, torch.tensor(ids)[1:, None])
    found = suite.measures(Observations({"members": table, "nonmembers": table}))
    mean = (logprobs.sum() + logprobs[3:-1].sum()) / (2 * len(ids) - 6)
    assert found["members/perplexity"] == pytest.approx(math.exp(-mean), rel=1e-4)
    assert found["members/mia_loss"] == 0.5
    for name in ("members/word_perplexity", "members/mia_zlib"):
        assert "2 of 2 rows are tokens" in str(found[name])


def test_greedy_is_greedy_whatever_the_model_s_own_config_says(tiny):
    model, tokenizer = tiny
    torch.manual_seed(0)
    for weight in model.parameters():  # one that does not say the same token again and again
        torch.nn.init.normal_(weight, std=0.5)
    prompt = tokenizer("Where does it meet?")["input_ids"]
    ids = list(prompt)
    for _ in range(12):  # without transformers: the likeliest token each time
        ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    said = ids[len(prompt) :]
    model.generation_config = GenerationConfig(
        do_sample=True,
        temperature=2.0,
        repetition_penalty=1.8,
        no_repeat_ngram_size=1,
        bad_words_ids=[[said[0]]],
        sequence_bias={(said[1],): -99.0},
        min_new_tokens=5,
        num_beams=3,
        stop_strings="e",
    )
    own = model.generation_config.to_dict()
    text = tokenizer.decode(said, skip_special_tokens=True).strip()
    assert generate(model, tokenizer, [prompt], 12) == [text]
    assert model.generation_config.to_dict() == own
    stop = next(token for token in said[2:] if token not in said[:2])
    ended = [tokenizer.decode(said[: said.index(stop) + 1], skip_special_tokens=True).strip()]
    for listed in ([tokenizer.eos_token_id, stop], [stop], stop):
        model.generation_config = GenerationConfig(eos_token_id=listed)
        assert generate(model, tokenizer, [prompt], 12) == ended


def test_an_answer_of_muse_ends_at_a_blank_line_even_a_first_one(tiny, monkeypatch):
    model, tokenizer = tiny
    texts = ["\n\nblue", " red\n\nblue", "green\nQuestion: what now?", "grey\nblue\n"]
    monkeypatch.setattr(type(tokenizer), "batch_decode", lambda *args, **kwargs: texts)
    rows = parse_rows([{"question": f"What {i}?", "answer": "blue"} for i in range(4)], "rows")
    stops = find_suite("muse").sets["knowmem_forget"].stops
    table = observe_set(
        Observer(model, Template(tokenizer)), rows, {"generation"}, max_new_tokens=4, stops=stops
    )
    assert [record["generation"] for record in table] == ["", "red", "green", "grey\nblue"]
    assert (
        find_suite("muse").measures(Observations({"knowmem_forget": table[:1]}))["knowmem_f"] == 0
    )
