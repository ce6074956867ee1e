"""The noise stream: one definition, three implementations with the same bits, and the moments it promises."""

import hashlib
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from reroll.errors import UsageError
from reroll.kernels import dispatch
from reroll.kernels.noise_axpy import Stream, layout, noise, noise_axpy, noise_axpy_each, noise_axpy_rows, noise_of
from reroll.kernels.philox import philox
from reroll.keys import Key

KEY = Key(11).at(3)
KINDS = ["rademacher", "sparse", "sparse:0.125", "normal"]
SHAPES = [(), (1,), (7,), (300,), (2, 3), (5, 31), (5, 32), (3, 4, 100), (3, 129), (2, 257), (40, 128), (2, 2100)]
DTYPES = [torch.float32, torch.float64, torch.bfloat16]


def random(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def by_definition(key, shape, probe, name):
    """The signs written from the specification alone: scalar Python, hashlib, one bit at a time."""
    stream = int.from_bytes(hashlib.sha256(name.encode() + b"\0").digest()[:4], "little")
    count = int(np.prod(shape, dtype=int))
    columns = count if len(shape) < 2 or shape[-1] < 32 else shape[-1]
    per_row = -(-columns // 128)
    signs = []
    for flat in range(count):
        row, column = divmod(flat, columns)
        block = row * per_row + column // 128
        words = philox(block % 2**32, block // 2**32, probe, stream, key.words)
        bit = words[column % 128 // 32] >> (column % 32) & 1
        signs.append(1.0 - 2.0 * bit)
    return torch.tensor(signs).reshape(shape)


@pytest.mark.parametrize("shape", [(2, 3), (5, 31), (3, 2, 40), (2, 200), (300,)])
def test_signs_follow_the_definition(shape):
    assert torch.equal(noise(KEY, shape, 6, "layer.weight"), by_definition(KEY, shape, 6, "layer.weight"))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_cpu_kernel_has_the_bits_of_the_reference(shape, kind, dtype):
    check_same_bits("cpu", shape, kind, dtype, probes=[2**32 - 1, 5, 5, *range(140)])


@pytest.mark.parametrize(
    "shape, kind, dtype, probes",
    [
        ((2, 3), "rademacher", torch.float32, range(130)),
        ((3, 2, 100), "rademacher", torch.bfloat16, [1, 2]),
        ((3, 300), "sparse:0.25", torch.float32, [2**32 - 1, 0]),
        ((7,), "rademacher", torch.float64, [0, 9]),
        ((), "sparse", torch.float32, [4]),
        ((5, 31), "normal", torch.float32, [3]),
        ((9, 130), "normal", torch.float64, [3]),
    ],
)
def test_triton_kernel_has_the_bits_of_the_reference(shape, kind, dtype, probes):
    pytest.importorskip("triton", reason="triton is in the dev extra, for Linux only")
    check_same_bits("triton", shape, kind, dtype, probes=list(probes))


def check_same_bits(implementation, shape, kind, dtype, probes):
    p, stream = random(*shape, dtype=dtype), Stream(KEY, "rnn.weight", noise_of(kind))
    alphas = random(len(probes), seed=1).tolist()
    results = {}
    for name in ("reference", implementation):
        with dispatch.use("noise_axpy", name):
            out = [torch.empty(shape, dtype=d) for d in (dtype, torch.bfloat16, torch.float32)]
            noise_axpy(p, stream, probes, alphas, out=out[0])
            noise_axpy(p, stream, probes[:1], [0.01], out=out[1])
            noise_axpy(p, stream, probes, alphas, out=out[2], sums=torch.float64)
            each = torch.empty(2, *shape, dtype=dtype)
            noise_axpy_each(p, stream, probes[:1] * 2, [0.25, -0.25], out=each)
            results[name] = [*out, each]
    for expected, got in zip(results["reference"], results[implementation]):
        assert torch.equal(expected, got)


@pytest.mark.parametrize("implementation", ["reference", "cpu", "triton"])
@pytest.mark.parametrize("kind", ["rademacher", "sparse", "normal"])
def test_rows_made_alone_are_the_rows_of_the_whole(implementation, kind):
    if implementation == "triton":
        pytest.importorskip("triton", reason="triton is in the dev extra, for Linux only")
    p, stream = random(11, 150), Stream(KEY, "w", noise_of(kind))
    with dispatch.use("noise_axpy", implementation):
        whole = torch.empty_like(p)
        noise_axpy(p, stream, [3], [0.1], out=whole)
        part = torch.empty(4, 150)
        noise_axpy(p[5:9], stream, [3], [0.1], out=part, first_row=5)
        assert torch.equal(part, whole[5:9])
        rows = torch.tensor([10, 0, 0, 7])
        looked_up = torch.empty(4, 150)
        noise_axpy_rows(p, rows, stream, 3, 0.1, out=looked_up)
        assert torch.equal(looked_up, whole[rows])


def test_result_does_not_depend_on_threads():
    p, stream = random(700, 300), Stream(KEY, "w")
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        out = torch.empty_like(p)
        noise_axpy(p, stream, range(9), [0.3] * 9, out=out)
        results.append(out)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_strides_do_not_matter_only_the_logical_index_does():
    stream = Stream(KEY, "w")
    p = random(60, 40).t()
    strided, dense = torch.empty(60, 40).t(), torch.empty(40, 60)
    noise_axpy(p, stream, [1, 2], [0.1, 0.2], out=strided)
    noise_axpy(p.contiguous(), stream, [1, 2], [0.1, 0.2], out=dense)
    assert torch.equal(strided, dense)


@pytest.mark.parametrize("kind", KINDS)
def test_moments(kind):
    z = torch.stack([noise(KEY, (40, 50), k, "w", kind=kind) for k in range(50)]).double().flatten()
    n = len(z)
    assert abs(z.mean()) < 5 / n**0.5
    assert abs((z * z).mean() - 1) < 5 * (z.pow(4).mean() - 1).sqrt() / n**0.5 + 1e-6
    assert abs((z[1:] * z[:-1]).mean()) < 5 / n**0.5


@pytest.mark.parametrize("kind, density", [("sparse", 0.5), ("sparse:0.25", 0.25), ("sparse:0.0625", 0.0625)])
def test_sparse_density_and_scale(kind, density):
    z = noise(KEY, (1000, 40), 0, "w", kind=kind)
    kept = z[z != 0]
    assert torch.equal(kept.abs().unique(), torch.tensor([density**-0.5]))
    assert abs(len(kept) / z.numel() - density) < 5 * (density / z.numel()) ** 0.5


def test_streams_of_names_probes_steps_and_kinds_are_uncorrelated():
    base = noise(KEY, (64, 64), 0, "a")
    others = [
        noise(KEY, (64, 64), 1, "a"),
        noise(KEY, (64, 64), 0, "b"),
        noise(Key(11).at(4), (64, 64), 0, "a"),
        noise(KEY, (64, 64), 0, "a", kind="sparse").sign() * 2**0.5 - base * 0.7071,
    ]
    for other in others[:3]:
        assert abs((base * other).mean()) < 5 / 64
    # The masks of sparse noise are another stream than its signs: where it is kept, it is the sign of "a" …
    sparse = noise(KEY, (64, 64), 0, "a", kind="sparse")
    kept = sparse != 0
    assert torch.equal(sparse[kept].sign(), base[kept])
    # … and what is kept does not depend on the sign.
    assert abs((base * kept.float()).mean()) < 5 / 64


def test_adding_and_removing_in_the_same_order_of_operations():
    # p + (Σ): with one probe the sum is the term itself, so p ± alpha is what every implementation computes.
    p, z = random(50, 40), noise(KEY, (50, 40), 2, "w")
    out = torch.empty_like(p)
    noise_axpy(p, Stream(KEY, "w"), [2], [0.01], out=out)
    assert torch.equal(out, p + z * torch.tensor(0.01))


def test_sums_over_many_probes_follow_the_written_order():
    p, alphas = random(40), random(300, seed=2).float()
    total = torch.zeros(40)
    for start in range(0, 300, 128):
        partial = torch.zeros(40)
        for k in range(start, min(start + 128, 300)):
            partial = partial + alphas[k] * noise(KEY, (40,), k, "w")
        total = total + partial
    noise_axpy(q := p.clone(), Stream(KEY, "w"), range(300), alphas.tolist())
    assert torch.equal(q, p + total)


def test_no_probes_is_a_copy():
    p = random(3, 40)
    out = torch.empty(3, 40, dtype=torch.bfloat16)
    noise_axpy(p, Stream(KEY, "w"), [], [], out=out)
    assert torch.equal(out, p.bfloat16())


def test_layout():
    assert layout((4, 3, 64)) == (12, 64)
    assert layout((100, 31)) == (1, 3100)
    assert layout((7,)) == (1, 7)
    assert layout(()) == (1, 1)


@pytest.mark.parametrize(
    "kind, message",
    [
        ("radmacher", 'noise="radmacher" is not a kind'),
        ("sparse:0.3", "density must be 1/2, 1/4"),
        ("sparse:0", "density must be"),
        ("sparse:x", "is not a kind"),
        ("normal:2", "is not a kind"),
    ],
)
def test_bad_kind(kind, message):
    with pytest.raises(UsageError, match=message):
        noise(KEY, (3,), 0, "w", kind=kind)


@pytest.mark.parametrize("implementation", ["reference", "cpu"])
@pytest.mark.parametrize("bad", [-1, 11, 1 << 40])
def test_rows_out_of_range_are_refused(implementation, bad):
    p, out = random(11, 40), torch.zeros(3, 40)
    with dispatch.use("noise_axpy", implementation), pytest.raises(IndexError, match=f"index {bad} is out of range"):
        noise_axpy_rows(p, torch.tensor([0, bad, 10]), Stream(KEY, "w"), 0, 0.1, out=out)
    assert not out.any()


def test_bad_shapes():
    p, stream = random(4, 20), Stream(KEY, "w")
    with pytest.raises(UsageError, match="2 probes but 1 alphas"):
        noise_axpy(p, stream, [0, 1], [0.1])
    with pytest.raises(UsageError, match="must agree"):
        noise_axpy(p, stream, [0], [0.1], out=torch.empty(3, 20))
    with pytest.raises(UsageError, match="laid out as one row"):
        noise_axpy(p, stream, [0], [0.1], first_row=1)
    for shape in ((), (7,)):
        with pytest.raises(UsageError, match="laid out as one row"):
            noise_axpy(torch.zeros(shape), stream, [0], [0.1], first_row=1)
    with pytest.raises(UsageError, match="at least 32 columns"):
        noise_axpy_rows(p, torch.tensor([0]), stream, 0, 0.1, out=torch.empty(1, 20))


@pytest.mark.slow
@pytest.mark.parametrize("masks, normal, rows", [(0, False, False), (2, False, True), (0, True, False)])
@pytest.mark.parametrize("p, real", [("*fp32", "*fp32"), ("*i16", "*fp32"), ("*fp64", "*fp64")])
def test_triton_kernel_compiles_for_a_gpu(masks, normal, rows, p, real, tmp_path):
    """The interpreter accepts more than the compiler; Triton brings its own assembler, so no GPU is needed for this."""
    pytest.importorskip("triton", reason="triton is in the dev extra, for Linux only")
    script = f"""
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from reroll.kernels.noise_axpy import triton as module
signature = dict.fromkeys(module._kernel.arg_names, "i32")
signature |= {{"p": "{p}", "out": "{p}", "rows": "*i64" if {rows} else "*i32", "indices": "*i32", "ids": "*i32"}}
signature |= {{"factors": "{real}", "key": "u64"}}
constants = dict(MASKS={masks}, NORMAL={normal}, ROWS={rows}, DOUBLE={real == "*fp64"}, BLOCKS=8)
signature |= dict.fromkeys(constants, "constexpr")
source = ASTSource(fn=module._kernel, signature=signature, constexprs=constants)
kernel = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=dict(enable_fp_fusion=False))
assert kernel.asm["cubin"]
"""
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    subprocess.run([sys.executable, "-c", script], check=True, env=environment)
