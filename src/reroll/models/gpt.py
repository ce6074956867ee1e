"""A decoder-only transformer, whole in this file.

    x = norm(embed(ids))
    x = x + attention(norm(x));  x = x + mlp(norm(x))      once a layer
    logits = head(norm(x))

    attention   q, k = rotate(norm(q)), rotate(norm(k));  softmax(q kᵀ / √d, causal) v
    mlp         W₂ max(W₁ x, 0)²
    norm        x / √(mean x² + ε), without a gain

As it stands this is record 8 of the NanoGPT speedrun (2024-11-03): matrices that write to the residual stream, and the
head, begin at zero, so the first loss is ln V, and the first step changes nothing but the head. The options lead back
to the GPT-2 that the speedrun began with, and on to what came later.

References: Radford et al., "Language Models are Unsupervised Multitask Learners", 2019; Su et al., "RoFormer"
(arXiv:2104.09864); Henry et al., "Query-Key Normalization" (2010.04245); So et al., "Primer" (2109.08668), squared
ReLU; Jordan et al., modded-nanogpt.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from reroll.data.tokenizers import Tokenizer
from reroll.errors import UsageError, did_you_mean, require_positive
from reroll.models.generate import generate

EPS = 2.0**-23
"""Of the norms of the residual stream."""
QK_EPS = 2.0**-7
"""Of the norms of q and k: what torch took for bf16 when record 8 was run (2.5). Newer ones take 2⁻²³ by default."""
POSITIONS, ACTIVATIONS = ("rotary", "learned"), ("relu2", "gelu")
BASE = 10_000.0
"""Of the rotary frequencies."""

Cache = tuple[tuple[Tensor, Tensor], ...]
"""Keys and values of the positions so far, [B, heads, T, d], of every layer."""


def rms_norm(x: Tensor, eps: float = EPS) -> Tensor:
    """Return x / √(mean x² + ε) over the last axis."""
    return functional.rms_norm(x, (x.shape[-1],), eps=eps)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the pairs (x_i, x_{i + d/2}) of [..., T, d] by −t f_i, where cos and sin are those of t f_i, [T, d/2]."""
    a, b = x.chunk(2, -1)
    return torch.cat((a * cos + b * sin, b * cos - a * sin), -1)


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention of the last T positions on all S ≥ T: q [B, heads, T, d], k and v [B, heads, S, d].

    The one place that a faster kernel belongs.
    """
    new, all_ = q.shape[-2], k.shape[-2]
    if new in (1, all_):
        return functional.scaled_dot_product_attention(q, k, v, is_causal=new == all_ > 1)
    seen = torch.ones(new, all_, dtype=torch.bool, device=q.device).tril(all_ - new)
    return functional.scaled_dot_product_attention(q, k, v, attn_mask=seen)


class Attention(nn.Module):
    """Causal attention of several heads; q, k and v are matrices of their own, as Muon needs them."""

    def __init__(self, width: int, heads: int, qk_norm: bool, mixes: bool):
        super().__init__()
        self.heads, self.qk_norm = heads, qk_norm
        self.query, self.key, self.value, self.out = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.mix = nn.Parameter(torch.tensor(0.5)) if mixes else None

    def forward(
        self,
        x: Tensor,
        angles: tuple[Tensor, Tensor] | None,
        past: tuple[Tensor, Tensor] | None,
        first: Tensor | None,
    ) -> tuple[Tensor, tuple[Tensor, Tensor], Tensor]:
        """Return the output, keys and values of all positions so far, and the values of these ones."""
        q, k, v = (
            project(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for project in (self.query, self.key, self.value)
        )
        if self.mix is not None and first is not None:
            v = v.lerp(first, self.mix.to(v.dtype))
        if self.qk_norm:
            q, k = rms_norm(q, QK_EPS), rms_norm(k, QK_EPS)
        if angles is not None:
            cos, sin = (table.to(q.dtype) for table in angles)
            q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        new = v
        if past is not None:
            k, v = torch.cat((past[0], k), -2), torch.cat((past[1], v), -2)
        return self.out(attend(q, k, v).transpose(1, 2).flatten(-2)), (k, v), new


class Block(nn.Module):
    """Attention, and then a layer of 4 × width units, each added to the residual stream."""

    def __init__(self, width: int, heads: int, options: Options, mixes: bool):
        super().__init__()
        self.attention = Attention(width, heads, options.qk_norm, mixes)
        self.up, self.down = nn.Linear(width, 4 * width, bias=False), nn.Linear(4 * width, width, bias=False)
        self.squared = options.activation == "relu2"
        self.mix = nn.Parameter(torch.tensor([1.0, 0.0])) if options.embed_shortcut else None

    def forward(
        self, x: Tensor, embedded: Tensor, angles: Any, past: Any, first: Tensor | None
    ) -> tuple[Tensor, tuple[Tensor, Tensor], Tensor]:
        if self.mix is not None:
            x = self.mix[0] * x + self.mix[1] * embedded
        attended, cache, values = self.attention(rms_norm(x), angles, past, first)
        x = x + attended
        hidden = self.up(rms_norm(x))
        hidden = functional.relu(hidden).square() if self.squared else functional.gelu(hidden)
        return x + self.down(hidden), cache, values


class Options(NamedTuple):
    """What was added to the model over the years, each with its source; the arguments of `GPT` explain them."""

    position: Literal["rotary", "learned"]
    qk_norm: bool
    activation: Literal["relu2", "gelu"]
    embed_shortcut: bool


class GPT(nn.Module):
    """A decoder-only transformer: symbols [B, T] in, logits [B, T, vocab] out.

    Args:
        vocab: symbols. The speedrun pads GPT-2's 50,257 to 50,304, a multiple of 128, for its kernels.
        layers, heads, width: its size; heads divide the width into parts of an even number of features.
        context: longest sequence with position="learned"; with rotary ones, any.
        position: "rotary", or "learned" vectors (GPT-2).
        qk_norm: normalise queries and keys, so that attention logits are at most √d.
        activation: "relu2", max(x, 0)², or "gelu" (GPT-2).
        zero_init: begin with zeros in what writes to the residual stream, and in the head unless it is tied. False: the
            head from N(0, 1/width), what writes to the stream scaled by 1/√(2 · layers) (Radford et al., 2019).
        tied: the head is the embedding, as in GPT-2 (Press & Wolf, arXiv:1608.05859); both begin at N(0, 0.02²).
        embed_norm: normalise the embedding.
        softcap: c in c · tanh(logits / c) (Gemma 2, arXiv:2408.00118), at which it is no longer `Headed`.
        value_residual: mix the values of the first layer into those of the others (Zhou et al., arXiv:2410.17897).
        embed_shortcut: mix the embedding into the stream before every layer (modded-nanogpt, record 9).

    It is `Headed` (`reroll.models.base`). `generate` keeps keys and values, as `advance` returns them.

    Raises:
        UsageError: if sizes do not fit together.

    Example:
        >>> model = GPT(vocab=256, layers=2, heads=2, width=32)
        >>> sum(p.numel() for p in model.parameters())
        40960
        >>> loss = functional.cross_entropy(model(torch.arange(5)[None]).flatten(0, 1), torch.arange(5))
        >>> f"{loss:.4f}"  # ln 256: the head begins at zero
        '5.5452'
        >>> model.generate([1, 2, 3], 4, seed=1).shape
        torch.Size([4])
    """

    inputs = None
    readout = "every"
    tokenizer: Tokenizer | None = None

    def __init__(
        self,
        vocab: int,
        layers: int = 12,
        heads: int = 6,
        width: int = 768,
        *,
        context: int = 1024,
        position: Literal["rotary", "learned"] = "rotary",
        qk_norm: bool = True,
        activation: Literal["relu2", "gelu"] = "relu2",
        zero_init: bool = True,
        tied: bool = False,
        embed_norm: bool = True,
        softcap: float | None = None,
        value_residual: bool = False,
        embed_shortcut: bool = False,
    ):
        super().__init__()
        require_positive(vocab=vocab, layers=layers, heads=heads, width=width, context=context, softcap=softcap)
        if width % heads or width // heads % 2:
            raise UsageError(f"width={width} must be heads={heads} times an even number of features.")
        for name, value, known in (("position", position, POSITIONS), ("activation", activation, ACTIVATIONS)):
            if value not in known:
                raise UsageError(f"{name}={value!r} is unknown.{did_you_mean(str(value), known)}")
        self.vocab = self.outputs = vocab
        self.layers, self.heads, self.width, self.context = layers, heads, width, context
        self.zero_init, self.embed_norm = zero_init, embed_norm
        self.softcap, self.value_residual = softcap, value_residual
        options = Options(position, qk_norm, activation, embed_shortcut)
        self.embed = nn.Embedding(vocab, width)
        self.positions = nn.Embedding(context, width) if position == "learned" else None
        self.blocks = nn.ModuleList(Block(width, heads, options, value_residual and i > 0) for i in range(layers))
        self.head = nn.Linear(width, vocab, bias=False)
        if tied:
            self.head.weight = self.embed.weight
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Embedding from N(0, 1), matrices uniform within ±1/√fan-in; what else, see the arguments of the class."""
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                module.reset_parameters()
        with torch.no_grad():
            for block in self._blocks:
                for writes in (block.attention.out, block.down):
                    writes.weight.mul_(0.0 if self.zero_init else (2 * self.layers) ** -0.5)
            if self.head.weight is self.embed.weight:
                self.embed.weight.normal_(std=0.02)
            else:
                self.head.weight.normal_(std=self.width**-0.5).mul_(0.0 if self.zero_init else 1.0)
            if self.positions is not None:
                self.positions.weight.normal_(std=0.02)

    @property
    def headed(self) -> bool:
        """Whether the logits are a linear map of the features."""
        return self.softcap is None

    def forward(self, inputs: Tensor, *, present: Tensor | None = None) -> Tensor:
        """Return the logits of whole sequences, [B, T, vocab]; `present` changes nothing, as attention is causal."""
        return self._logits(self.features(inputs))

    def features(self, inputs: Tensor, *, present: Tensor | None = None) -> Tensor:
        """Return what the head maps to logits, [B, T, width]."""
        return self._run(inputs, None)[0]

    def advance(self, inputs: Tensor, state: Cache | None = None, *, head: bool = True) -> tuple[Tensor, Cache]:
        """Run the symbols that follow those of a state: return their logits, and keys and values of all so far."""
        features, cache = self._run(inputs, state)
        return self._logits(features) if head else features, cache

    def compile(self, *arguments: Any, **options: Any) -> None:
        """Compile every block in place, by the arguments of `torch.compile`: one graph for all, and no other names.

        Unlike `torch.compile(model)` this reaches `features` too, by which a loss avoids storing all logits.
        """
        for block in self._blocks:
            block.compile(*arguments, **options)

    def flops_per_token(self, length: int) -> float:
        """Return the FLOPs of a token's forward and backward pass in sequences of some length: 6 N + 12 L T D.

        N weights are multiplied with every token: all but those that are looked up. Attention counts as if no position
        were masked (Chowdhery et al., "PaLM", arXiv:2204.02311, appendix B).

        Example:
            >>> GPT(vocab=50_304).flops_per_token(1024) / 1e6  # of record 8, 741.4 + 113.2
            854.654976
        """
        looked_up = [self.embed.weight] if self.embed.weight is not self.head.weight else []
        looked_up += [] if self.positions is None else [self.positions.weight]
        weights = sum(p.numel() for p in self.parameters()) - sum(p.numel() for p in looked_up)
        return 6 * weights + 12 * self.layers * length * self.width

    generate = generate

    @property
    def _blocks(self) -> tuple[Block, ...]:
        return tuple(block for block in self.blocks if isinstance(block, Block))

    def _logits(self, features: Tensor) -> Tensor:
        logits = self.head(features)
        if self.softcap is None:
            return logits
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return self.softcap * torch.tanh(logits / self.softcap)

    def _run(self, inputs: Tensor, past: Cache | None) -> tuple[Tensor, Cache]:
        if inputs.dim() != 2 or inputs.is_floating_point():
            raise UsageError(f"inputs {tuple(inputs.shape)} of {inputs.dtype} must be symbols, [batch, time].")
        begin = 0 if past is None else past[0][0].shape[-2]
        end, angles = begin + inputs.shape[1], None
        x = self.embed(inputs)
        if self.positions is None:
            angles = self._angles(begin, end, inputs.device)
        elif end <= self.context:
            x = x + self.positions.weight[begin:end]
        else:
            raise UsageError(f"{end} positions are more than context={self.context}, of which there are vectors.")
        x = embedded = rms_norm(x) if self.embed_norm else x
        caches, first = [], None
        for i, block in enumerate(self.blocks):
            x, cache, values = block(x, embedded, angles, None if past is None else past[i], first)
            first = values if first is None and self.value_residual else first
            caches.append(cache)
        return rms_norm(x), tuple(caches)

    def _angles(self, begin: int, end: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """cos and sin of t f_i for the positions t, [T, d/2]: f_i = BASE^(−2i/d)."""
        half = self.width // self.heads // 2
        frequencies = BASE ** (-torch.arange(half, device=device, dtype=torch.float32) / half)
        angles = torch.arange(begin, end, device=device, dtype=torch.float32).outer(frequencies)
        return angles.cos(), angles.sin()
