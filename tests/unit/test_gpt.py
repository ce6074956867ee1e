"""The transformer: its sizes, its first loss and steps, its cache; and each option against the formula."""

import math

import pytest
import torch
from torch.nn import functional

from reroll import GPT
from reroll.errors import UsageError
from reroll.models.gpt import QK_EPS, attend, rms_norm, rotate
from reroll.models.roles import roles
from reroll.recipes import fineweb_124m

OLD = dict(position="learned", qk_norm=False, activation="gelu", zero_init=False, tied=True, embed_norm=False)
NEW = dict(zero_init=False, softcap=5.0, value_residual=True, embed_shortcut=True)


def spread(model):
    """Weights that leave no part of the model without an influence."""
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.4)
    return model.double()


def test_parameters_of_record_8():
    with torch.device("meta"):
        model = GPT(50_304)
    stored = sum(p.numel() for p in model.parameters())
    assert stored == 162_201_600
    assert stored - model.embed.weight.numel() == 123_568_128
    count = {role: sum(r == role for r in roles(model).values()) for role in ("embedding", "head", "matrix", "vector")}
    assert count == {"embedding": 1, "head": 1, "matrix": 72, "vector": 0}


@pytest.mark.parametrize("vocab", [50_304, 257])
def test_the_first_loss_is_ln_v_and_the_first_step_changes_the_head_alone(vocab):
    model = GPT(vocab, layers=2, heads=2, width=32)
    symbols = torch.randint(min(vocab, 50_257), (3, 17))
    optim = fineweb_124m().optim
    optimizer = optim.build(model, optim.lr)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    changed = []
    for _ in range(3):
        loss = functional.cross_entropy(model(symbols).flatten(0, 1), symbols.flatten())
        if not changed:
            assert abs(loss.item() - math.log(vocab)) < 1e-4
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        changed.append({n.split(".")[-2] for n, p in model.named_parameters() if not torch.equal(p, before[n])})
    assert changed[0] == {"head"}
    assert changed[1] == {"head", "embed", "out", "down"}
    assert changed[2] == {"head", "embed", "out", "down", "query", "key", "value", "up"}


def std(tensor):
    return tensor.detach().std().item()


def test_matrices_begin_as_they_are_said_to():
    width = 64
    model = GPT(4000, layers=3, heads=2, width=width)
    assert std(model.embed.weight) == pytest.approx(1, rel=0.02)
    assert not model.head.weight.any()
    for block in model.blocks:
        for matrix in (block.attention.query, block.attention.key, block.attention.value, block.up):
            assert std(matrix.weight) == pytest.approx((3 * width) ** -0.5, rel=0.05)  # uniform within 1/√width
            assert matrix.weight.abs().max() <= width**-0.5
        assert not block.attention.out.weight.any()
        assert not block.down.weight.any()


def test_matrices_begin_as_in_gpt2_without_zeros():
    width, layers = 64, 8
    model = GPT(4000, layers=layers, heads=2, width=width, zero_init=False, position="learned", context=500)
    assert std(model.head.weight) == pytest.approx(width**-0.5, rel=0.02)
    assert std(model.positions.weight) == pytest.approx(0.02, rel=0.05)
    for block in model.blocks:
        for matrix, inputs in ((block.attention.out, width), (block.down, 4 * width)):
            assert std(matrix.weight) == pytest.approx((3 * inputs) ** -0.5 / (2 * layers) ** 0.5, rel=0.05)
    for zero_init in (True, False):  # as record 5, and as GPT-2
        tied = GPT(4000, layers=2, heads=2, width=width, tied=True, zero_init=zero_init)
        assert tied.head.weight is tied.embed.weight
        assert std(tied.embed.weight) == pytest.approx(0.02, rel=0.02)
        assert tied.blocks[0].down.weight.any() == tied.blocks[1].attention.out.weight.any() == (not zero_init)


def norm(x, eps=2.0**-23):
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt()


def turned(y, t):
    """Normalised and rotated features [B, d] of a head at place t."""
    half, y = y.shape[1] // 2, norm(y, QK_EPS)
    angle = t * 10_000.0 ** (-torch.arange(half, dtype=torch.float32) / half)
    c, s, a, b = angle.cos(), angle.sin(), y[:, :half], y[:, half:]
    return torch.cat([a * c + b * s, b * c - a * s], 1)


def by_hand(model, ids):
    """The forward pass of record 8, position by position, from the formulas."""
    weight, time, size = dict(model.named_parameters()), ids.shape[1], model.width // model.heads
    x = norm(weight["embed.weight"][ids])
    for i in range(model.layers):
        of = {name.split(f"{i}.", 1)[1]: w for name, w in weight.items() if name.startswith(f"blocks.{i}.")}
        h, out = norm(x), torch.zeros_like(x)
        q, k, v = (h @ of[f"attention.{n}.weight"].T for n in ("query", "key", "value"))
        for head in range(model.heads):
            part = slice(size * head, size * (head + 1))
            for t in range(time):
                query = turned(q[:, t, part], t)
                logits = torch.stack([(query * turned(k[:, s, part], s)).sum(1) for s in range(t + 1)], 1)
                weights = (logits / size**0.5).softmax(1)
                out[:, t, part] = (weights[:, :, None] * v[:, : t + 1, part]).sum(1)
        x = x + out @ of["attention.out.weight"].T
        x = x + (norm(x) @ of["up.weight"].T).clamp(min=0).square() @ of["down.weight"].T
    return norm(x) @ weight["head.weight"].T


def test_against_the_formulas():
    model, ids = spread(GPT(13, layers=2, heads=3, width=18)), torch.randint(13, (2, 7))
    torch.testing.assert_close(model(ids), by_hand(model, ids), rtol=0, atol=1e-6)  # angles are in fp32


def test_queries_and_keys_are_normalised_with_the_eps_of_record_8():
    """2⁻⁷ is felt where features are small."""
    assert QK_EPS == 0.0078125
    model, ids = spread(GPT(13, layers=1, heads=1, width=16)), torch.randint(13, (1, 6))
    for matrix in (model.blocks[0].attention.query, model.blocks[0].attention.key):
        matrix.weight.data *= 0.05
    torch.testing.assert_close(model(ids), by_hand(model, ids), rtol=0, atol=1e-6)


def test_options_against_the_formulas():
    """Values of the first layer, the embedding before every layer, gelu and softcap, layer by layer."""
    model = spread(GPT(13, layers=3, heads=1, width=8, activation="gelu", **NEW))
    ids, time = torch.randint(13, (2, 7)), 7
    seen, first = torch.ones(time, time).tril().bool(), None
    x = embedded = norm(model.embed.weight[ids])
    for i, block in enumerate(model.blocks):
        x = block.mix[0] * x + block.mix[1] * embedded
        h, a = norm(x), block.attention
        q, k, v = (h @ m.weight.T for m in (a.query, a.key, a.value))
        if i == 0:
            first = v
            assert a.mix is None
        else:
            v = (1 - a.mix) * v + a.mix * first
        q, k = (torch.stack([turned(y[:, t], t) for t in range(time)], 1) for y in (q, k))
        weights = (q @ k.mT / 8**0.5).masked_fill(~seen, -torch.inf).softmax(-1)
        x = x + weights @ v @ a.out.weight.T
        hidden = norm(x) @ block.up.weight.T
        x = x + hidden * (1 + torch.erf(hidden / 2**0.5)) / 2 @ block.down.weight.T
    expected = 5 * torch.tanh(norm(x) @ model.head.weight.T / 5)
    torch.testing.assert_close(model(ids), expected, rtol=0, atol=1e-6)


def test_mixes_begin_halfway_and_without_the_embedding():
    model = GPT(13, layers=3, heads=1, width=8, value_residual=True, embed_shortcut=True)
    assert [block.mix.tolist() for block in model.blocks] == [[1.0, 0.0]] * 3
    assert [block.attention.mix and block.attention.mix.item() for block in model.blocks] == [None, 0.5, 0.5]


@pytest.mark.parametrize("options", [{}, OLD, NEW], ids=["record 8", "old", "new"])
def test_symbols_one_after_another_give_what_all_at_once_give(options):
    model = spread(GPT(50, layers=3, heads=2, width=32, **options))
    ids = torch.randint(50, (2, 11))
    whole, state, parts = model(ids), None, []
    for size in (4, 1, 3, 1, 2):
        part, state = model.advance(ids[:, sum(p.shape[1] for p in parts) :][:, :size], state)
        parts.append(part)
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=0, atol=1e-12)
    # Causal: what comes later changes nothing.
    other = torch.cat([ids[:, :6], torch.randint(50, (2, 5))], 1)
    torch.testing.assert_close(model(other)[:, :6], whole[:, :6], rtol=0, atol=1e-12)
    if model.headed:
        torch.testing.assert_close(model.head(model.features(ids)), whole)


@pytest.mark.parametrize("options", [{}, OLD, NEW], ids=["record 8", "old", "new"])
def test_every_parameter_has_a_gradient(options):
    model = spread(GPT(20, layers=2, heads=2, width=16, **options))
    model(torch.randint(20, (2, 9))).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters())


def test_rotation_depends_on_the_distance_alone():
    q, k = torch.randn(2, 1, 1, 1, 8, dtype=torch.float64)
    frequencies = 10_000.0 ** (-torch.arange(4) / 4)

    def dot(i, j):
        at = lambda x, t: rotate(x, (t * frequencies).cos().double(), (t * frequencies).sin().double())
        return (at(q, i) * at(k, j)).sum()

    torch.testing.assert_close(dot(5, 3), dot(105, 103), rtol=1e-4, atol=1e-4)
    assert abs(dot(5, 3) - dot(5, 4)) > 1e-4
    assert rms_norm(q).square().mean().item() == pytest.approx(1, rel=1e-4)


@pytest.mark.parametrize("new, all_", [(1, 1), (5, 5), (1, 6), (3, 7)])
def test_attention_of_the_last_positions(new, all_):
    q, k, v = torch.randn(2, 3, new, 4), torch.randn(2, 3, all_, 4), torch.randn(2, 3, all_, 4)
    logits = q @ k.mT / 2
    seen = torch.arange(all_) <= torch.arange(all_ - new, all_)[:, None]
    expected = logits.masked_fill(~seen, -torch.inf).softmax(-1) @ v
    torch.testing.assert_close(attend(q, k, v), expected)


def test_softcap_bounds_the_logits_and_ends_headed():
    model = spread(GPT(20, layers=1, heads=2, width=16, zero_init=False, softcap=0.5))
    assert not model.headed
    assert model(torch.randint(20, (1, 5))).abs().max() <= 0.5


def test_tied_and_padded():
    model = GPT(20, layers=1, heads=2, width=16, tied=True, zero_init=False)
    assert roles(model)["embed.weight"] == "embedding"
    assert "head.weight" not in roles(model)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(vocab=9, heads=5, width=16), "width=16 must be heads=5 times"),
        (dict(vocab=9, heads=2, width=6), "even number"),
        (dict(vocab=0), "vocab=0"),
        (dict(vocab=9, position="learnd"), r"position='learnd' is unknown. Did you mean \"learned\""),
        (dict(vocab=9, position=None), "position=None is unknown"),
        (dict(vocab=9, activation="relu"), r"activation='relu' is unknown. Did you mean \"relu2\""),
        (dict(vocab=9, softcap=-1.0), "softcap=-1"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(arguments, message):
    with pytest.raises(UsageError, match=message):
        GPT(**arguments)


def test_inputs_that_are_no_symbols_or_too_many_are_refused():
    model = GPT(9, 1, 2, 16, context=5, **OLD)
    with pytest.raises(UsageError, match="must be symbols"):
        model(torch.zeros(2, 3))
    with pytest.raises(UsageError, match="6 positions are more than context=5"):
        model(torch.zeros(2, 6, dtype=torch.int64))
    with pytest.raises(UsageError, match="6 positions"):
        model.generate([1, 2, 3], 4)
    assert model.generate([1, 2, 3], 3).shape == (3,)
