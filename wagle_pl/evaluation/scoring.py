"""Score many token sequences with few forward passes: they are sorted by length, and prefixes that
they have in common are computed only once.

:func:`grow` makes a prefix tree of the sequences; :class:`_Run` runs it from the roots down, nodes
of similar length in one pass, each continuing from the keys and values of its parent.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from inspect import signature
from typing import Any, NamedTuple, Optional

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache

from wagle_pl.core import distributed
from wagle_pl.data.template import IGNORE
from wagle_pl.lm.inference import Predictions, in_chunks, logprobs_of, predict

MAX_PADDED = 8192  # tokens of a pass, prefixes included: bounds keys and values
LEAST_FILLED = 0.5  # a node shorter than this share of the longest in its pass goes into the next
LEAST_SAVED = 8  # tokens that sharing a node must save to be worth its cost
LEAST_VARIANCE = 1e-6  # of log-probabilities over the vocabulary, as OpenUnlearning clamps it


@dataclass
class Candidate:
    """A token sequence to score."""

    ids: Sequence[int]
    labels: Sequence[int]  # the id if the token is scored, else -100; the first cannot be scored


class TokenScores(NamedTuple):
    """Scores of T tokens: (T,) tensors; None if not wanted."""

    logprobs: Tensor
    greedy: Optional[Tensor] = None  # whether the token is the most probable one
    mean: Optional[Tensor] = None
    std: Optional[Tensor] = None


@dataclass
class Passes:
    """Forward passes of a Hugging Face causal language model."""

    lm: Any
    synced_gpus: bool = False  # every pass is collective (ZeRO-3): ranks announce each

    @property
    def device(self) -> torch.device:
        """Where inputs must be."""
        return next(self.lm.parameters()).device

    def __call__(
        self,
        ids: Tensor,
        mask: Tensor,
        places: Optional[Tensor] = None,
        announce: bool = True,
        **options: Any,
    ) -> tuple[Any, Predictions]:
        """Run (B, T) tokens with a (B, S) attention mask, S ≥ T if there is a past; return the
        output and the predictions at ``places`` of the flattened tokens (the first when None).
        ``options`` are those of the model's forward."""
        if self.synced_gpus and announce:
            distributed.all_reduce_max(1)
        places = torch.zeros(1, dtype=torch.long) if places is None else places
        options |= {"input_ids": ids, "attention_mask": mask}
        return predict(self.lm, places.to(ids.device), not self.synced_gpus, **options)

    def level(self) -> None:
        """After this rank's passes, join those that other ranks still announce. Collective."""
        token = torch.zeros(1, 1, dtype=torch.long, device=self.device)
        while self.synced_gpus and distributed.all_reduce_max(0):
            self(token, torch.ones_like(token), announce=False, use_cache=False)


def accepts(model_class: type, argument: str) -> bool:
    return argument in signature(model_class.forward).parameters


def token_statistics(
    logits: Tensor, targets: Tensor, vocabulary: bool = False, greedy: bool = True
) -> TokenScores:
    """Scores of (T,) targets by the (T, V) logits that predict them, float32.

    With p the model's distribution over the vocabulary at a token, ``mean`` is Σ p log p and
    ``std`` the root of Σ p (log p)² − mean² (at least 1e-6), as in Min-K%++ (arXiv 2404.02936).
    """
    likeliest = logits.argmax(-1) == targets if greedy else None
    scores = TokenScores(logprobs_of(logits, targets), likeliest)
    if not vocabulary:
        return scores
    logprobs = logits.log_softmax(-1)
    weighted = logprobs.exp() * logprobs
    mean = weighted.sum(-1)
    variance = (weighted * logprobs).sum(-1) - mean.square()
    return scores._replace(mean=mean, std=variance.clamp(min=LEAST_VARIANCE).sqrt())


def score(
    passes: Passes,
    candidates: Sequence[Candidate],
    pad_id: int,
    max_rows: int,
    share: bool = True,
    vocabulary: bool = False,
    greedy: bool = True,
) -> list[TokenScores]:
    """Scores of every candidate, in order, on the CPU; they are copied from the device at once.

    Args:
        passes: the model.
        candidates: what to score.
        pad_id: token that fills short rows; masked out.
        max_rows: most sequences in a pass.
        share: compute common prefixes of candidates only once: the system prompt of all, a question
            with its answers, the words with which its wrong answers begin. Needs a model with a
            plain cache; with others, each candidate is scored as a whole.
        vocabulary: also give mean and std of the vocabulary's log-probabilities.
        greedy: also say which tokens are the most probable ones.
    """
    run = _Run(passes, candidates, pad_id, max_rows, {"vocabulary": vocabulary, "greedy": greedy})
    # a single token has none before it
    longer = [c for c, candidate in enumerate(candidates) if len(candidate.ids) > 1]
    takes = all(accepts(type(passes.lm), name) for name in ("position_ids", "past_key_values"))
    window = getattr(passes.lm.config, "sliding_window", None) or math.inf
    # whether the model can go on, at given positions, from cached keys and values
    if share and takes and all(len(candidate.ids) <= window for candidate in candidates):
        run.down(grow(candidates, longer, 0))
    run.down([_leaf(candidates, c, 0) for c in longer if c not in run.scored])
    names = ["logprobs", *["greedy"] * greedy, *["mean", "std"] * vocabulary]
    columns = torch.cat(run.columns, -1).cpu() if run.columns else torch.zeros(len(names), 0)
    named = dict(zip(names, columns, strict=True))
    if greedy:
        named["greedy"] = named["greedy"].bool()
    places = [torch.tensor(run.scored.get(c, []), dtype=torch.long) for c in range(len(candidates))]
    return [TokenScores(**{name: named[name][index] for name in names}) for index in places]


# -- the prefix tree -----------------------------------------------------------------------------


class Node(NamedTuple):
    """The positions [start, end) of one or more candidates that are identical up to ``end``."""

    start: int
    end: int
    owners: list[int]  # the candidates
    children: list[Node]

    @property
    def length(self) -> int:
        return self.end - self.start


def grow(candidates: Sequence[Candidate], owners: Sequence[int], start: int) -> list[Node]:
    """The prefix tree of some candidates that are the same up to ``start``, as far as sharing pays.

    >>> texts = ([*range(9), 20, 0], [*range(9), 21, 0], [30, 31, 32])
    >>> texts = [Candidate(ids, ids) for ids in texts]
    >>> [(node.start, node.end, node.owners) for node in grow(texts, [0, 1, 2], 0)]
    [(0, 9, [0, 1]), (0, 2, [2])]
    """
    nodes = []
    by_token: dict[int, list[int]] = {}
    for owner in owners:
        if start < len(candidates[owner].ids) - 1:
            by_token.setdefault(candidates[owner].ids[start], []).append(owner)
    for group in by_token.values():
        end = start + _alike([candidates[c].ids[start:-1] for c in group])
        if (end - start) * (len(group) - 1) >= LEAST_SAVED:
            nodes.append(Node(start, end, group, grow(candidates, group, end)))
        else:
            nodes += [_leaf(candidates, c, start) for c in group]
    return nodes


def _leaf(candidates: Sequence[Candidate], owner: int, start: int) -> Node:
    """The rest of a candidate except its last token, which predicts nothing."""
    return Node(start, len(candidates[owner].ids) - 1, [owner], [])


def _alike(texts: Sequence[Sequence[int]]) -> int:
    """How many tokens at their beginning all texts share."""
    columns = enumerate(zip(*texts, strict=False))
    return next((i for i, column in columns if len(set(column)) > 1), min(map(len, texts)))


# -- running it ----------------------------------------------------------------------------------


class _Past(NamedTuple):
    """Keys and values of B nodes that were run, and the tokens scored on the way to each."""

    layers: list[tuple[Tensor, Tensor]]  # (B, heads, S, D) each
    mask: Tensor  # (B, S)
    scored: list[dict[int, list[int]]]  # of each row: candidate -> places of its tokens' scores


@dataclass
class _Run:
    """One call of :func:`score`: the passes it makes, and the scores, which stay on the device."""

    passes: Passes
    candidates: Sequence[Candidate]
    pad_id: int
    max_rows: int
    wanted: dict[str, bool]  # options of :func:`token_statistics`
    columns: list[Tensor] = field(default_factory=list)  # of each pass, (1 to 4, tokens)
    count: int = 0  # of scored tokens
    scored: dict[int, list[int]] = field(default_factory=dict)  # candidate -> places in columns

    def down(
        self, nodes: Sequence[Node], past: Optional[_Past] = None, parents: Sequence[int] = ()
    ) -> None:
        """Run nodes, each after its row (``parents``) of ``past`` if any, then what follows."""
        rows = list(zip(nodes, parents, strict=True)) if past else [(node, 0) for node in nodes]
        for part in _parts(rows, past.mask.shape[1] if past else 0, self.max_rows):
            state = self._run([node for node, _ in part], past, [parent for _, parent in part])
            if state is None:
                return  # the state is not a plain cache: what follows is scored whole
            children = [(child, i) for i, (node, _) in enumerate(part) for child in node.children]
            following = {owner for child, _ in children for owner in child.owners}
            for (node, _), places in zip(part, state.scored, strict=True):
                self.scored |= {c: places[c] for c in node.owners if c not in following}
            if children:
                self.down([child for child, _ in children], state, [i for _, i in children])

    def _run(
        self, nodes: Sequence[Node], past: Optional[_Past], parents: Sequence[int]
    ) -> Optional[_Past]:
        """One pass over some nodes; None if what follows them needs a cache that is missing."""
        texts = [self.candidates[node.owners[0]].ids[node.start : node.end] for node in nodes]
        tokens = [torch.tensor(list(text)) for text in texts]
        padded = partial(pad_sequence, batch_first=True, padding_side="left")
        ids = padded(tokens, padding_value=self.pad_id).to(self.passes.device)
        mask = new = padded([torch.ones_like(row) for row in tokens]).to(ids.device)
        goes_on = any(node.children for node in nodes)
        options: dict[str, Any] = {"use_cache": goes_on}
        if past is not None:
            rows = torch.tensor(list(parents), device=ids.device)
            mask = torch.cat([past.mask[rows], new], -1)
            cache = DynamicCache()  # a new one, with these rows of the past
            for number, (keys, values) in enumerate(past.layers):
                cache.update(keys[rows], values[rows], number)
            options = {"past_key_values": cache, "use_cache": True}
        if accepts(type(self.passes.lm), "position_ids"):
            starts = torch.tensor([node.start for node in nodes], device=ids.device)
            options["position_ids"] = starts[:, None] + (new.cumsum(-1) - 1).clamp(min=0)
        scored = [dict(past.scored[parent]) for parent in parents] if past else [{} for _ in nodes]
        # candidates of a node have its tokens in common: each of these is scored once
        pairs: dict[tuple[int, int], int] = {}
        for i, node in enumerate(nodes):
            first = (i + 1) * ids.shape[1] - node.length  # place of the node's first token
            for owner in node.owners:
                labels = enumerate(self.candidates[owner].labels[node.start + 1 : node.end + 1])
                targets = ((first + p, label) for p, label in labels if label != IGNORE)
                places = [pairs.setdefault(pair, self.count + len(pairs)) for pair in targets]
                scored[i][owner] = [*scored[i].get(owner, ()), *places]
        output = self._score(list(pairs), ids, mask, options)
        if not goes_on:
            return _Past([], mask, scored)
        cached = getattr(output.past_key_values, "layers", [])
        layers = [(getattr(x, "keys", None), getattr(x, "values", None)) for x in cached]
        width = mask.shape[1]
        plain = all(k is not None and k.ndim == 4 and k.shape[2] == width for k, _ in layers)
        return _Past(layers, mask, scored) if layers and plain else None

    def _score(
        self, pairs: Sequence[tuple[int, int]], ids: Tensor, mask: Tensor, options: dict[str, Any]
    ) -> Any:
        """Run the model, add the scores of (place, target) pairs, and return the output."""
        places, targets = torch.tensor(pairs, dtype=torch.long).view(-1, 2).T
        output, predicted = self.passes(ids, mask, places, **options)

        def of_chunk(logits: Tensor, targets: Tensor) -> Tensor:
            scores = token_statistics(logits, targets, **self.wanted)
            return torch.stack([c.to(logits.dtype) for c in scores if c is not None], -1)

        self.columns.append(in_chunks(of_chunk, predicted, targets.to(ids.device)).T)
        self.count += len(pairs)
        return output


def _parts(
    rows: Sequence[tuple[Node, int]], past: int, max_rows: int
) -> list[list[tuple[Node, int]]]:
    """Groups of nodes of similar length, longest first: at most ``max_rows`` in each, and a bounded
    number of tokens, including the ``past`` tokens before each node."""
    parts: list[list[tuple[Node, int]]] = []
    for row in sorted(rows, key=lambda row: row[0].length, reverse=True):
        if parts:
            count, longest, length = len(parts[-1]), parts[-1][0][0].length, row[0].length
            fits = count < max_rows and (count + 1) * (past + longest) <= MAX_PADDED
            if fits and (length >= LEAST_FILLED * longest or longest - length <= LEAST_SAVED):
                parts[-1].append(row)
                continue
        parts.append([row])
    return parts
