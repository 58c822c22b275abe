"""The language side of an MLLM: what goes on behind prompts that went through it (scores of candidates, free answers).

Continuations share the keys and values of their prompt. Which of them a token may see, and at which position it stands,
is settled here for all families.

Source: mllm sheets `backbones.md` and `few-shot-classifier.md`, route 1 (prefix tree, shared cache); transformers 5.24.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from adaptkit.backbones.base import Backbone
from adaptkit.backbones.mllm.batches import Prefix
from adaptkit.backbones.mllm.families import Family
from adaptkit.backbones.mllm.prompts import Prompter
from adaptkit.backbones.mllm.sampling import GREEDY, Sampling, chosen, said_before
from adaptkit.backbones.mllm.trie import Trie

HEAD_BYTES = 256 * 2**20
"""Room for logits over the whole vocabulary; they are made in pieces and only what is asked for is kept."""

KEYS_BYTES = 2 * 2**30
"""Room for keys and values of prompts that are asked together."""

TREE_NODES = 512
"""Tokens of a candidate tree that go through the model together."""


class LanguageSide(Backbone):
    """A decoder with its head, and prompts that are continued in it; `MLLM` puts them through it."""

    family: Family
    model: Any
    prompter: Prompter
    _text_config: Any
    _cache_name: str

    @property
    def language(self) -> Any:
        """The decoder without its head."""
        return self.model.get_submodule(self.family.language)

    @property
    def layers(self) -> list[nn.Module]:
        """The decoder's layers."""
        count = self._text_config.num_hidden_layers
        lists = (module for module in self.language.modules() if isinstance(module, nn.ModuleList))
        return list(next(found for found in lists if len(found) == count))

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits over the vocabulary, fp32 [..., vocabulary], of last hidden states [..., width]."""
        logits: Tensor = self.model.get_output_embeddings()(hidden).float()
        cap = getattr(self._text_config, "final_logit_softcapping", None)
        return logits if cap is None else cap * torch.tanh(logits / cap)

    def rows_at_once(self, length: int, most: int = 16) -> int:
        """How many prompts of `length` tokens to put through the model together, at least 1."""
        config = self._text_config
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        token = 2 * config.num_hidden_layers * heads * size * self.model.dtype.itemsize
        return max(1, min(most, KEYS_BYTES // (token * length)))

    # --- continuations ------------------------------------------------------------------------------------------------

    def _cache(self, prefix: Prefix) -> Any:
        from transformers import DynamicCache

        cache = DynamicCache()
        for layer, (keys, values) in enumerate(prefix.layers):
            cache.update(keys, values, layer)
        return cache

    def _continue(self, cache: Any, ids: Tensor, mask: Any, positions: Tensor) -> Tensor:
        """Hidden states [rows, tokens, width] of tokens behind a cache."""
        if self.family.positions == "mrope":
            positions = positions.expand(3, *positions.shape)
        given = {"attention_mask": mask, "position_ids": positions, "use_cache": True, self._cache_name: cache}
        out: Tensor = self.language(input_ids=ids, **given).last_hidden_state
        return out

    def node_scores(self, prefix: Prefix, trie: Trie) -> Tensor:
        """log p(token of a node | prompt, tokens above it), fp32 [rows, nodes], differentiable.

        The whole tree is one sequence in which a token sees the prompt and what lies above it, so the keys and values
        of the prompts are shared and never repeated.

        Args:
            prefix: The prompts.
            trie: The candidates.
        """
        device = prefix.mask.device
        tokens, parents = trie.tokens.to(device), trie.parents.to(device)
        above = trie.ancestors
        order = [(parents < 0).nonzero()[:, 0]]
        scores = [self._picked(prefix.hidden[:, None], torch.zeros_like(order[0]), tokens[order[0]])]
        for group in trie.groups(TREE_NODES):
            sees, depths, group = above[group][:, group].to(device), trie.depths[group].to(device), group.to(device)
            mask = self._tree_mask(prefix, sees, depths)
            positions = prefix.next_position[:, None] + depths
            hidden = self._continue(self._cache(prefix), tokens[group].expand(len(prefix), -1), mask, positions)
            place = torch.full_like(parents, -1)
            place[group] = torch.arange(len(group), device=device)
            children = ((parents >= 0) & (place[parents.clamp(min=0)] >= 0)).nonzero()[:, 0]
            scores.append(self._picked(hidden, place[parents[children]], tokens[children]))
            order.append(children)
        return torch.cat(scores, dim=1)[:, torch.cat(order).argsort()]

    def _tree_mask(self, prefix: Prefix, sees: Tensor, depths: Tensor) -> Any:
        """What tree tokens see: 0 or the lowest number, [rows, 1, nodes, prompt + nodes]; by kind of layer."""
        prompt = prefix.mask.bool()[:, None, :].expand(-1, len(sees), -1)
        full = torch.cat([prompt, sees.expand(len(prompt), -1, -1)], dim=2)
        kinds = set(getattr(self._text_config, "layer_types", None) or ())
        window = getattr(self._text_config, "sliding_window", None)
        length = prompt.shape[2]
        if not window or window >= length + int(depths.max()) + 1:
            return self._added(full)
        at = torch.cat([torch.arange(length, device=depths.device), length + depths])
        near = full & (length + depths[:, None] - at < window)
        if "sliding_attention" in kinds:
            return {"full_attention": self._added(full), "sliding_attention": self._added(near)}
        return self._added(full if kinds else near)

    def _added(self, visible: Tensor) -> Tensor:
        dtype = self.model.dtype
        hidden = torch.zeros(visible.shape, dtype=dtype, device=visible.device)
        return hidden.masked_fill_(~visible, torch.finfo(dtype).min)[:, None]

    def _picked(self, hidden: Tensor, places: Tensor, tokens: Tensor) -> Tensor:
        """log p of `tokens` [k] after the states at `places` [k] of `hidden` [rows, n, width]: fp32 [rows, k]."""
        used, which = torch.unique(places, return_inverse=True)
        vocabulary = self.model.get_output_embeddings().weight.shape[0]
        step = max(1, HEAD_BYTES // (8 * vocabulary * len(hidden)))  # logits and their exponentials
        parts, order = [], []
        for start in range(0, len(used), step):
            logits = self.logits(hidden[:, used[start : start + step]])
            mine = ((which >= start) & (which < start + step)).nonzero()[:, 0]
            rows = which[mine] - start
            parts.append(logits[:, rows, tokens[mine]] - logits.logsumexp(dim=-1)[:, rows])
            order.append(mine)
        return torch.cat(parts, dim=1)[:, torch.cat(order).argsort()]

    def candidate_scores(self, prefix: Prefix, trie: Trie) -> Tensor:
        """log p(candidate | prompt), summed over its tokens, fp32 [rows, candidates], differentiable."""
        scores = self.node_scores(prefix, trie)
        return scores @ trie.paths().to(scores).T

    @torch.no_grad()
    def generate(
        self,
        prefix: Prefix,
        max_tokens: int = 32,
        *,
        sampling: Sampling = GREEDY,
        draws: Tensor | None = None,
        said: Sequence[Sequence[int]] | None = None,
        keep_end: bool = False,
    ) -> list[list[int]]:
        """Continue each prompt freely until its turn ends.

        Args:
            prefix: The prompts; `Prefix.select` repeats one for several rollouts.
            max_tokens: Most tokens of an answer.
            sampling: How tokens are chosen.
            draws: Numbers in [0, 1) that tokens are drawn by, fp64 [rows, max_tokens]; needed unless they are greedy.
            said: Token ids that the repetition penalty counts as said before (the prompts), by row; None for none.
            keep_end: Whether the token that ended an answer belongs to it; one that was cut off has none.

        Returns:
            Token ids of each answer, up to its first ending token.
        """
        ends = torch.tensor(self.prompter.end_tokens(), device=self.device)
        cache, mask, hidden = self._cache(prefix), prefix.mask, prefix.hidden
        positions, seen = prefix.next_position, None
        if sampling.repetition_penalty != 1:
            vocabulary = self.model.get_output_embeddings().weight.shape[0]
            seen = said_before(said or [[]] * len(prefix), vocabulary, self.device)
        done = torch.zeros(len(prefix), dtype=torch.bool, device=self.device)
        answers: list[list[int]] = [[] for _ in range(len(prefix))]
        for step in range(max_tokens):
            tokens = chosen(self.logits(hidden), sampling, None if draws is None else draws[:, step], seen)
            before, done = done, done | torch.isin(tokens, ends)
            over = before if keep_end else done
            for row, (token, left_out) in enumerate(zip(tokens.tolist(), over.tolist(), strict=True)):
                if not left_out:
                    answers[row].append(token)
            if bool(done.all()) or step == max_tokens - 1:
                break
            if seen is not None:
                seen[torch.arange(len(seen), device=seen.device), tokens] = True
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
            hidden = self._continue(cache, tokens[:, None], mask, positions[:, None] + step)[:, -1]
        return answers

    def answer_scores(self, prefix: Prefix, answers: Sequence[Sequence[int]], temperature: float = 1.0) -> Tensor:
        """log p of each token of one answer per prompt, fp32 [tokens of all answers, in order], differentiable.

        The head runs on these tokens alone, and its logits aren't kept for the gradient.

        Args:
            prefix: The prompts, one row per answer.
            answers: Token ids, at least one each.
            temperature: What logits are divided by.
        """
        length = max(map(len, answers))
        ids = torch.tensor([[*row, *[row[-1]] * (length - len(row))] for row in answers], device=self.device)
        counts = torch.tensor([len(row) for row in answers], device=self.device)
        steps = torch.arange(length, device=self.device)
        hidden = prefix.hidden[:, None]
        if length > 1:  # what fills up a row stands behind its answer, where no token of it looks
            mask = torch.cat([prefix.mask, prefix.mask.new_ones(len(ids), length - 1)], dim=1)
            positions = prefix.next_position[:, None] + steps[:-1]
            hidden = torch.cat([hidden, self._continue(self._cache(prefix), ids[:, :-1], mask, positions)], dim=1)
        wanted = steps < counts[:, None]
        states, tokens = hidden[wanted], ids[wanted]  # [tokens, width], [tokens]
        step = max(1, HEAD_BYTES // (8 * self.model.get_output_embeddings().weight.shape[0]))

        def part(states: Tensor, tokens: Tensor) -> Tensor:
            logits = self.logits(states) / temperature
            return logits.gather(1, tokens[:, None])[:, 0] - logits.logsumexp(dim=1)

        pairs = zip(states.split(step), tokens.split(step), strict=True)
        return torch.cat([checkpoint(part, *pair, use_reentrant=False, preserve_rng_state=False) for pair in pairs])
