"""Every way to run an LSTM sequence equals the loop in float64, values and gradients."""

import pytest
import torch

from reroll.errors import UsageError
from reroll.kernels import dispatch
from reroll.kernels.lstm_scan import lstm_scan

#        batch, time, inputs, heads, width
SIZES = [(1, 1, 3, 1, 4), (2, 5, 3, 2, 3), (16, 7, 5, 1, 33), (17, 4, 6, 3, 8), (33, 3, 40, 2, 20), (4, 64, 1, 1, 1)]


def problem(batch, time, size, heads, width, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    hidden = heads * width
    shapes = [
        (batch, time, size),
        (4 * hidden, size),
        (4 * hidden, width),
        (4 * hidden,),
        (batch, hidden),
        (batch, hidden),
    ]
    scales = [1, size**-0.5, width**-0.5, 0.5, 0.5, 1]
    return [torch.randn(s, generator=generator, dtype=torch.float64).mul(k).to(dtype) for s, k in zip(shapes, scales)]


def by_hand(x, weight_ih, weight_hh, bias, h, c):
    """Head by head, gate by gate, with nothing but matrix products."""
    width = weight_hh.shape[1]
    heads, gates = h.shape[1] // width, 4 * width
    parts = []
    for n in range(heads):
        lanes, rows = slice(n * width, (n + 1) * width), slice(n * gates, (n + 1) * gates)
        hn, cn, steps = h[:, lanes], c[:, lanes], []
        for t in range(x.shape[1]):
            pre = x[:, t] @ weight_ih[rows].T + hn @ weight_hh[rows].T + bias[rows]
            i, f, z, o = pre.split(width, 1)
            cn = f.sigmoid() * cn + i.sigmoid() * z.tanh()
            hn = o.sigmoid() * cn.tanh()
            steps.append(hn)
        parts.append((torch.stack(steps, 1), hn, cn))
    return tuple(torch.cat(tensors, -1) for tensors in zip(*parts))


def implementations(heads):
    return ["reference", "cpu"] + (["library"] if heads == 1 else [])


@pytest.mark.parametrize("size", SIZES)
def test_all_implementations_agree(size):
    arguments = problem(*size)
    truth = by_hand(*(a.double() for a in arguments))
    for name in implementations(size[3]):
        with dispatch.use("lstm_scan", name), torch.no_grad():
            for got, expected in zip(lstm_scan(*arguments), truth):
                assert got.shape == expected.shape
                torch.testing.assert_close(got.double(), expected, rtol=0, atol=5e-6, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("name, heads", [("reference", 1), ("reference", 3), ("library", 1)])
def test_gradients_agree_with_the_loop(name, heads):
    arguments = [a.requires_grad_() for a in problem(3, 6, 4, heads, 5, dtype=torch.float64)]
    truth = torch.autograd.grad(sum((o * o).sum() for o in by_hand(*arguments)), arguments)
    with dispatch.use("lstm_scan", name):
        got = torch.autograd.grad(sum((o * o).sum() for o in lstm_scan(*arguments)), arguments)
    for a, b in zip(got, truth):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_a_sequence_is_its_two_halves():
    x, *weights, h, c = problem(20, 9, 4, 3, 7)
    with dispatch.use("lstm_scan", "cpu"), torch.no_grad():
        whole = lstm_scan(x, *weights, h, c)
        first, h, c = lstm_scan(x[:, :4], *weights, h, c)
        second, h, c = lstm_scan(x[:, 4:], *weights, h, c)
    assert torch.equal(torch.cat([first, second], 1), whole[0])
    assert torch.equal(h, whole[1])
    assert torch.equal(c, whole[2])


def test_the_batch_is_computed_row_by_row():
    x, *weights, h, c = problem(19, 5, 4, 2, 6)
    with dispatch.use("lstm_scan", "cpu"), torch.no_grad():
        whole = lstm_scan(x, *weights, h, c)[0]
        alone = lstm_scan(x[17:18], *weights, h[17:18], c[17:18])[0]
    assert torch.equal(whole[17:18], alone)


def test_threads_do_not_change_the_result():
    arguments = problem(40, 30, 50, 6, 40)
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        with dispatch.use("lstm_scan", "cpu"), torch.no_grad():
            results.append(lstm_scan(*arguments)[0])
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.parametrize("share_inputs", [True, False])
def test_vmap_over_weights_is_a_loop_over_weights(share_inputs):
    copies = [problem(5, 4, 6, 2, 3, seed=s) for s in range(3)]
    x = copies[0][0]
    if share_inputs:
        copies = [[x, *rest] for _, *rest in copies]
    stacked = [torch.stack(tensors) for tensors in zip(*copies)]
    axes = (None, 0, 0, 0, 0, 0) if share_inputs else 0
    with dispatch.use("lstm_scan", "cpu"), torch.no_grad():
        got = torch.vmap(lstm_scan, in_dims=axes)(x if share_inputs else stacked[0], *stacked[1:])
        for k, arguments in enumerate(copies):
            for a, b in zip(lstm_scan(*arguments), got):
                assert torch.equal(a, b[k])


def test_nan_reaches_the_output():
    arguments = problem(6, 4, 3, 2, 4)
    arguments[1][5] = float("nan")
    with dispatch.use("lstm_scan", "cpu"), torch.no_grad():
        assert lstm_scan(*arguments)[0].isnan().any()


def test_bf16_is_computed_in_fp32_and_rounded():
    arguments = [a.bfloat16() for a in problem(6, 4, 3, 2, 4)]
    with dispatch.use("lstm_scan", "cpu"), torch.no_grad():
        low = lstm_scan(*arguments)[0]
        high = lstm_scan(*(a.float() for a in arguments))[0]
    assert low.dtype == torch.bfloat16
    assert torch.equal(low, high.bfloat16())


def test_static_rules():
    for size, gradient, expected in [
        ((16, 5, 4, 3, 8), False, "cpu"),  # several heads
        ((2, 5, 4, 3, 8), False, "reference"),  # a batch too small to fill the lanes
        ((16, 5, 4, 1, 200), False, "library"),  # one wide head
        ((16, 5, 4, 1, 20), True, "library"),
        ((16, 5, 4, 3, 8), True, "reference"),
    ]:
        arguments = problem(*size)
        arguments[1].requires_grad_(gradient)
        lstm_scan(*arguments)
        assert dispatch.report()["lstm_scan"].name == expected


def test_shapes_are_checked_by_name():
    arguments = problem(2, 5, 3, 2, 3)
    arguments[3] = arguments[3][:-1]
    with pytest.raises(UsageError, match=r"bias has shape \(23,\); expected \(24,\)"):
        lstm_scan(*arguments)
