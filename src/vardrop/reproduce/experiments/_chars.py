"""A small language model of characters: the network, its text, its loss.

Legend: B sequences of a minibatch, T characters of context, C width, H heads, V characters of the alphabet.
"""

from __future__ import annotations

import bisect

import torch
from torch import Tensor, nn
from torch.nn import functional as F

_LETTERS = "abcdefghij "


class Block(nn.Module):
    """Pre-norm attention and feed-forward block, with dropout where GPT-2 has it: attention weights and branches.

    Args:
        width: C.
        heads: H, which divides C.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.attn_drop, self.resid_drop1, self.resid_drop2 = nn.Dropout(0.0), nn.Dropout(0.0), nn.Dropout(0.0)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.resid_drop1(self.out(self._mixed(self.norm1(x))))
        return x + self.resid_drop2(self.down(F.gelu(self.up(self.norm2(x)))))

    def _mixed(self, x: Tensor) -> Tensor:
        length, size = x.shape[1], x.shape[2] // self.heads
        q, k, v = (t.unflatten(-1, (self.heads, size)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))  # B, H, T, .
        scores = q @ k.transpose(-2, -1) * size**-0.5
        future = torch.ones(length, length, dtype=torch.bool, device=x.device).triu(1)
        weights = self.attn_drop(scores.masked_fill(future, -torch.inf).softmax(-1))  # B, H, T, T
        return (weights @ v).transpose(1, 2).flatten(2)


class Transformer(nn.Module):
    """Decoder-only transformer: codes ``[B, T]`` -> logits ``[B, T, V]`` of the characters that come next.

    It has dropouts on embedding, attention and residual branches, all at rate 0 to begin with.

    Args:
        alphabet: V.
        context: the largest T.
        width: C.
        layers: how many blocks.
        heads: H.
    """

    def __init__(self, alphabet: int, context: int, width: int, layers: int, heads: int) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(alphabet, width), nn.Embedding(context, width)
        self.embed_drop = nn.Dropout(0.0)
        blocks = [Block(width, heads) for _ in range(layers)]
        self.blocks = nn.ModuleList(blocks)
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, alphabet)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)
        for block in blocks:  # the residual stream is a sum of 2 · layers branches
            for last in (block.out, block.down):
                nn.init.normal_(last.weight, std=0.02 / (2 * layers) ** 0.5)

    def forward(self, codes: Tensor) -> Tensor:
        x = self.embed_drop(self.tokens(codes) + self.positions.weight[: codes.shape[1]])
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(self.norm(x))
        return logits


def mean_nll(model: nn.Module, windows: Tensor) -> Tensor:
    """Mean negative log-likelihood of a character given those before it in its window ``[B, T + 1]``, in nats."""
    logits = model(windows[:, :-1])
    return F.cross_entropy(logits.flatten(0, 1).float(), windows[:, 1:].flatten())


def draw(codes: Tensor, batch: int, context: int, generator: torch.Generator) -> Tensor:
    """A minibatch of windows ``[B, T + 1]`` that begin anywhere in a text."""
    starts = torch.randint(len(codes) - context, (batch, 1), generator=generator).to(codes.device)
    return codes[starts + torch.arange(context + 1, device=codes.device)]


def cover(codes: Tensor, context: int) -> Tensor:
    """Windows ``[n, T + 1]`` side by side, in which every character but the first and a rest is predicted once."""
    return codes.unfold(0, context + 1, context)


@torch.no_grad()
def evaluate(model: nn.Module, windows: Tensor, batch: int = 128) -> float:
    """The mean nll of windows without noise; the model is left in training mode."""
    model.eval()
    total = sum(mean_nll(model, part).item() * len(part) for part in windows.split(batch))
    model.train()
    return total / len(windows)


def markov_text(length: int, seed: int) -> str:
    """A text of a Markov chain of order two over eleven letters, to try things out on where there is no data."""
    generator = torch.Generator().manual_seed(seed)
    letters = len(_LETTERS)
    tables = torch.randn(letters, letters, letters, generator=generator).mul(3).softmax(-1).cumsum(-1).tolist()
    codes = [0, 0]
    for uniform in torch.rand(length, generator=generator).tolist():
        table = tables[codes[-2]][codes[-1]]
        codes.append(min(bisect.bisect(table, uniform), letters - 1))  # the last sum may be a rounding below 1
    return "".join(_LETTERS[code] for code in codes[2:])
