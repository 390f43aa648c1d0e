"""Score many token sequences with few forward passes: sorted by length, and a prompt that they
share computed once."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from inspect import signature
from typing import Any, NamedTuple, Optional

import torch
import torch.nn.functional as F
from torch import Tensor

from wagle_pl.core import distributed
from wagle_pl.data.template import IGNORE

MAX_PADDED = 8192  # tokens of a pass with those they follow: bounds keys, values and logits
LEAST_FILLED = 0.5  # a piece shorter than this share of the longest in its pass goes into the next
LEAST_SAVED = 8  # tokens that sharing a piece must save, or it costs more than it brings
LEAST_VARIANCE = 1e-6  # of log-probabilities over the vocabulary, as OpenUnlearning clamps it


class Candidate(NamedTuple):
    """A token sequence to score.

    Attributes:
        ids: its tokens.
        labels: the same where a token is to be scored, -100 elsewhere. The first token cannot be.
        greedy: also say whether each scored token is the most probable one.
        vocabulary: also give mean and standard deviation of the vocabulary's log-probabilities at
            each.
    """

    ids: Sequence[int]
    labels: Sequence[int]
    greedy: bool = False
    vocabulary: bool = False


class TokenScores(NamedTuple):
    """What :func:`score` finds of one candidate: float32 tensors on the CPU, one value a scored
    token, in order.

    Attributes:
        logprobs: (T,) log-probabilities.
        greedy: (T,) bool, or None if not asked for.
        mean: (T,) mean of the vocabulary's log-probabilities under the model's distribution, or
            None.
        std: (T,) their standard deviation, or None.
    """

    logprobs: Tensor
    greedy: Optional[Tensor] = None
    mean: Optional[Tensor] = None
    std: Optional[Tensor] = None


NOTHING = TokenScores(*(torch.zeros(0) for _ in TokenScores._fields))


class Passes:
    """Forward passes of a model. Under ZeRO-3 each is collective, so ranks say when they run one.

    Args:
        lm: a Hugging Face causal language model.
        synced_gpus: whether every pass is collective; see :meth:`level`.
    """

    def __init__(self, lm: Any, synced_gpus: bool = False) -> None:
        self.lm = lm
        self.synced_gpus = synced_gpus

    @property
    def device(self) -> torch.device:
        """Where inputs must be."""
        return next(self.lm.parameters()).device

    def __call__(self, ids: Tensor, mask: Tensor, keep: int, **options: Any) -> Any:
        """One pass.

        Args:
            ids: (B, T) tokens.
            mask: (B, S) of the attention, S ≥ T where there is a past.
            keep: logits are needed at the last so many positions only. They may be given at all.
            **options: of the model's forward.
        """
        if self.synced_gpus:  # tells ranks in `level` that there is a pass to take part in
            distributed.all_reduce_max(1)
        return self._run(ids, mask, keep, options)

    def _run(self, ids: Tensor, mask: Tensor, keep: int, options: dict[str, Any]) -> Any:
        if _accepts(type(self.lm), "logits_to_keep"):
            options["logits_to_keep"] = keep
        return self.lm(input_ids=ids, attention_mask=mask, **options)

    def level(self) -> None:
        """Take part in the passes that other ranks still run. Collective: all ranks must call it
        when their own passes are done."""
        token = torch.zeros(1, 1, dtype=torch.long, device=self.device)
        while self.synced_gpus and distributed.all_reduce_max(0):
            self._run(token, torch.ones_like(token), 1, {"use_cache": False})


@cache
def _accepts(model_class: type, argument: str) -> bool:
    return argument in signature(model_class.forward).parameters


def token_statistics(
    logits: Tensor, targets: Tensor, greedy: bool, vocabulary: bool
) -> TokenScores:
    """What the model thought of each token of one text.

    Args:
        logits: (T, V) that predict the tokens.
        targets: (T,) the tokens.
        greedy, vocabulary: what to find besides log-probabilities, see :class:`Candidate`.

    Returns:
        Float32 tensors on the logits' device. With p the model's distribution over the vocabulary
        at a token, ``mean`` is Σ p log p and ``std`` the root of Σ p (log p)² − mean² (at least
        1e-6), as in Min-K%++ (arXiv 2404.02936).
    """
    logits = logits.float()
    found = TokenScores(-F.cross_entropy(logits, targets, reduction="none"))
    if greedy:
        found = found._replace(greedy=logits.argmax(-1) == targets)
    if vocabulary:
        logprobs = logits.log_softmax(-1)
        weighted = logprobs.exp() * logprobs
        mean = weighted.sum(-1)
        variance = (weighted * logprobs).sum(-1) - mean.square()
        found = found._replace(mean=mean, std=variance.clamp(min=LEAST_VARIANCE).sqrt())
    return found


def score(
    passes: Passes, candidates: Sequence[Candidate], pad_id: int, max_rows: int, share: bool = True
) -> list[TokenScores]:
    """Score every candidate.

    Args:
        passes: the model.
        candidates: what to score.
        pad_id: token that fills short rows; masked out.
        max_rows: most sequences in a pass.
        share: compute the tokens that candidates begin with in common once, and go on from their
            keys and values: the system prompt of all, the question of its answers, the words that
            its wrong answers have in common. Needs a model with a plain cache; others are scored
            whole.

    Returns:
        One score a candidate, in order.
    """
    run = _Run(passes, candidates, pad_id, max_rows)
    longer = [c for c, candidate in enumerate(candidates) if len(candidate.ids) > 1]
    if share and _can_share(passes.lm, candidates):
        run.down(grow(candidates, longer, 0))
    run.down([Node(0, len(candidates[c].ids) - 1, [c], []) for c in longer if c not in run.scores])
    # nothing comes before a single token
    return [run.scores.get(c, NOTHING) for c in range(len(candidates))]


def _can_share(lm: Any, candidates: Sequence[Candidate]) -> bool:
    """Whether the model can go on, at given positions, from keys and values computed before."""
    if not all(_accepts(type(lm), name) for name in ("position_ids", "past_key_values")):
        return False
    window = getattr(lm.config, "sliding_window", None)
    return window is None or all(len(candidate.ids) <= window for candidate in candidates)


class Node(NamedTuple):
    """A piece of one or more candidates that is run once.

    Attributes:
        start, end: its positions in the candidates, [start, end).
        owners: which candidates it is a piece of.
        children: what follows it.
    """

    start: int
    end: int
    owners: list[int]
    children: list[Node]


def grow(candidates: Sequence[Candidate], owners: Sequence[int], start: int) -> list[Node]:
    """The prefix tree of some candidates that are the same up to ``start``, as far as sharing pays.

    A candidate's last token predicts nothing and is in no node.

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
            nodes += [Node(start, len(candidates[c].ids) - 1, [c], []) for c in group]
    return nodes


def _alike(texts: Sequence[Sequence[int]]) -> int:
    """How many first tokens all texts share."""
    columns = enumerate(zip(*texts, strict=False))
    return next((i for i, column in columns if len(set(column)) > 1), min(map(len, texts)))


class _Past(NamedTuple):
    """Keys and values of nodes that were run, and what they are of."""

    layers: list[tuple[Tensor, Tensor]]  # of each layer (B, heads, S, D)
    mask: Tensor  # (B, S)
    pieces: list[list[tuple[int, Tensor]]]  # of each row (position of the first, logits), in order


class _Run:
    """One call of :func:`score`: the passes it makes, and what they find."""

    def __init__(
        self, passes: Passes, candidates: Sequence[Candidate], pad_id: int, max_rows: int
    ) -> None:
        self.passes = passes
        self.candidates = candidates
        self.firsts = [_first_label(candidate) for candidate in candidates]
        self.pad_id = pad_id
        self.max_rows = max_rows
        self.scores: dict[int, TokenScores] = {}

    def down(
        self, nodes: Sequence[Node], past: Optional[_Past] = None, parents: Sequence[int] = ()
    ) -> None:
        """Run nodes that follow rows of ``past``, then what follows them.

        Args:
            nodes: to run.
            past: of their parents, if they have any.
            parents: row of ``past`` that each node follows.
        """
        rows = list(zip(nodes, parents, strict=True)) if past else [(node, 0) for node in nodes]
        for part in _parts(rows, past.mask.shape[1] if past else 0, self.max_rows):
            here = self._run([node for node, _ in part], past, [parent for _, parent in part])
            if here is None:
                return  # a state that is no plain cache: what follows is scored whole
            children = [(child, i) for i, (node, _) in enumerate(part) for child in node.children]
            following = {owner for child, _ in children for owner in child.owners}
            for i, (node, _) in enumerate(part):
                for owner in set(node.owners) - following:
                    self.scores[owner] = _of_candidate(self.candidates[owner], here.pieces[i])
            if children:
                self.down([child for child, _ in children], here, [i for _, i in children])

    def _run(
        self, nodes: Sequence[Node], past: Optional[_Past], parents: Sequence[int]
    ) -> Optional[_Past]:
        """One pass over some nodes; None if they have children and the model keeps no plain
        cache."""
        texts = [self.candidates[node.owners[0]].ids[node.start : node.end] for node in nodes]
        ids, own_mask = _padded(texts, self.pad_id, self.passes.device)
        starts = torch.tensor([node.start for node in nodes], device=ids.device)
        options: dict[str, Any] = {"use_cache": any(node.children for node in nodes)}
        mask = own_mask
        if past is not None:
            rows = torch.tensor(list(parents), device=ids.device)
            mask = torch.cat([past.mask[rows], own_mask], -1)
            options |= {"past_key_values": _selected(past.layers, rows), "use_cache": True}
        if _accepts(type(self.passes.lm), "position_ids"):
            options["position_ids"] = starts[:, None] + (own_mask.cumsum(-1) - 1).clamp(min=0)
        firsts = [min(self.firsts[owner] for owner in node.owners) for node in nodes]
        keep = max(
            node.end - max(min(first - 1, node.end - 1), node.start)
            for node, first in zip(nodes, firsts, strict=True)
        )
        output = self.passes(ids, mask, keep, **options)
        pieces = []
        for i, node in enumerate(nodes):
            width = min(output.logits.shape[1], node.end - node.start)
            before = past.pieces[parents[i]] if past else []
            pieces.append([*before, (node.end - width, output.logits[i, -width:])])
        if not any(node.children for node in nodes):
            return _Past([], mask, pieces)
        cached = getattr(output.past_key_values, "layers", [])
        layers = [(getattr(x, "keys", None), getattr(x, "values", None)) for x in cached]
        width = mask.shape[1]
        if layers and all(k is not None and k.ndim == 4 and k.shape[2] == width for k, _ in layers):
            return _Past(layers, mask, pieces)
        return None


def _selected(layers: Sequence[tuple[Tensor, Tensor]], rows: Tensor) -> Any:
    """A cache of its own with the given rows of another's layers."""
    from transformers import DynamicCache

    cache = DynamicCache()
    for number, (keys, values) in enumerate(layers):
        cache.update(keys[rows], values[rows], number)
    return cache


def _of_candidate(candidate: Candidate, pieces: Sequence[tuple[int, Tensor]]) -> TokenScores:
    """The statistics of a candidate's labelled tokens.

    Args:
        candidate: the sequence.
        pieces: (position of the first, logits (T, V)) in order of position; logits at p predict
            token p + 1.
    """
    found: list[TokenScores] = []
    for start, logits in pieces:
        places = [p for p in range(start, start + len(logits)) if candidate.labels[p + 1] != IGNORE]
        if not places:
            continue
        targets = torch.tensor([candidate.labels[p + 1] for p in places], device=logits.device)
        at = logits[places[0] - start : places[-1] - start + 1]
        if len(at) > len(places):
            at = at[torch.tensor(places, device=logits.device) - places[0]]
        found.append(token_statistics(at, targets, candidate.greedy, candidate.vocabulary))
    if not found:
        return NOTHING
    columns = zip(*found, strict=True)
    return TokenScores(*(None if part[0] is None else torch.cat(part).cpu() for part in columns))


def _first_label(candidate: Candidate) -> int:
    """Position of the first token that is scored; the length if none is."""
    labels = candidate.labels
    return next((p for p in range(1, len(labels)) if labels[p] != IGNORE), len(labels))


def _parts(
    rows: Sequence[tuple[Node, int]], past: int, max_rows: int
) -> list[list[tuple[Node, int]]]:
    """Pieces of similar length together, longest first: at most ``max_rows``, and a bounded number
    of tokens.

    Args:
        rows: pieces, and the row of the past that each follows.
        past: how many tokens, padding too, each follows.
        max_rows: most in a part.
    """

    def length(row: tuple[Node, int]) -> int:
        return row[0].end - row[0].start

    parts: list[list[tuple[Node, int]]] = []
    for row in sorted(rows, key=length, reverse=True):
        count, longest = (len(parts[-1]), length(parts[-1][0])) if parts else (max_rows, 0)
        full = count >= max_rows or (count + 1) * (past + longest) > MAX_PADDED
        if full or (length(row) < LEAST_FILLED * longest and longest - length(row) > LEAST_SAVED):
            parts.append([])
        parts[-1].append(row)
    return parts


def _padded(
    rows: Sequence[Sequence[int]], pad_id: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """(ids, mask), both (B, longest) int64, filled on the left: the last positions are the last
    tokens."""
    width = max(len(row) for row in rows)
    ids = [[*[pad_id] * (width - len(row)), *row] for row in rows]
    mask = [[*[0] * (width - len(row)), *[1] * len(row)] for row in rows]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)
