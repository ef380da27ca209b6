"""The GPU kernels lowered for CUDA on every run, and compiled for an H200 where the environment for it is given."""

import dataclasses
import functools
import os

import jax
import jax.numpy as jnp
import pytest
from jax import export

from kernels.aot import gpu as aot
from kernels.attention import gpu as attention
from kernels.cross_entropy import gpu as cross_entropy

GEMMA = (8192, 2304, 256000)
TINY = (4096, 256, 8192)
SMOLLM = (4095, 576, 49152)
ODD = (1000, 100, 5003)


def loss_arrays(n, d, v, dtype="bfloat16", bias=False):
    """Return (shape, dtype) of e, c, bias, targets, lse, soft, hot."""
    row = (n,), "float32"
    return ((n, d), dtype), ((v, d), dtype), ((v,), dtype) if bias else None, ((n,), "int32"), row, row, row


def attention_arrays(a, dtype="bfloat16", s=2048, t=2048, segments=False, sinks=False):
    """Return (shape, dtype) of q, k, v, segments of both, sinks, out, lse, dout: four rows, eight heads over four."""
    q, kv = ((4, s, 8, a), dtype), ((4, t, 4, a), dtype)
    ids = (((4, s), "int32"), ((4, t), "int32")) if segments else (None, None)
    return q, kv, kv, *ids, ((8,), "float32") if sinks else None, q, ((4, 8, s), "float32"), q


PLAIN = {"causal": True, "window": None, "softcap": None, "scale": 0.125}
# What takes most registers: everything that masks and the cap.
FULL = {"causal": True, "window": 1024, "softcap": 50.0, "scale": 0.125}
HEADS = [64, 80, 128, 256]


def loss_job(program, sizes, dtype="bfloat16", bias=False, blocks=None, **options):
    arrays = loss_arrays(*sizes, dtype, bias)
    arrays = arrays[:4] if program == "forward" else arrays
    return aot.Job("kernels.cross_entropy.gpu", program, arrays, options, blocks and dataclasses.asdict(blocks))


def attention_job(program, options, *arguments, blocks=None, **more):
    arrays = attention_arrays(*arguments, **more)
    arrays = arrays[:6] if program == "forward" else arrays
    return aot.Job("kernels.attention.gpu", program, arrays, options, blocks and dataclasses.asdict(blocks))


def _jobs():
    jobs = {
        "gemma forward": loss_job("forward", GEMMA, softcap=30.0),
        "gemma backward": loss_job("backward", GEMMA, softcap=30.0),
        "gemma backward, filter": loss_job("backward", GEMMA, softcap=30.0, filter_eps=2.0**-12),
        "gemma backward, input": loss_job("backward", GEMMA, softcap=30.0, filter_eps=2.0**-12, accumulate="input"),
        "tiny float32 forward": loss_job("forward", TINY, "float32"),
        "tiny float32 backward": loss_job("backward", TINY, "float32"),
    }
    for name, sizes in (("tiny", TINY), ("smollm", SMOLLM), ("odd", ODD), ("one", (1, 1, 1))):
        for program in ("forward", "backward"):
            jobs[f"{name} {program}"] = loss_job(program, sizes, bias=True, softcap=30.0)
    for a in HEADS:
        for program in ("forward", "backward"):
            jobs[f"{a} {program}"] = attention_job(program, PLAIN, a)
            jobs[f"{a} {program}, full"] = attention_job(program, FULL, a, sinks=True)
            ragged = {"s": 2049, "t": 2047, "segments": True}
            jobs[f"{a} {program}, ragged"] = attention_job(program, FULL, a, **ragged)
            if a != 80:
                jobs[f"{a} float32 {program}"] = attention_job(program, FULL, a, "float32", **ragged)
    return jobs


JOBS = _jobs()
# Without registers for wgmma's 64 rows these keep to the older mma.sync.
NO_WGMMA = {"one forward", "one backward", "256 float32 forward", "256 float32 backward", "128 float32 backward"}


@pytest.fixture(scope="module")
def compiler():
    """Return the interpreter that compiles for GPUs, or skip."""
    python = os.environ.get(aot.PYTHON)
    if not python:
        pytest.skip(
            f"{aot.PYTHON} names no interpreter with JAX's CUDA plug-in; kernels/aot/gpu.py says how to make one"
        )
    return python


@pytest.fixture(scope="module")
def compiled(compiler):
    """Return the result of every job; one child compiles them all."""
    return dict(zip(JOBS, aot.run(JOBS.values(), compiler, timeout=1800.0), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("name", JOBS)
def test_kernels_compile_without_spilling_and_use_tensor_cores(name, compiled):
    result = compiled[name]
    assert result.error is None, result.reason
    # One token with one feature loads nothing that could overlap with arithmetic.
    assert name.startswith("one") or result.instructions["async_copy"] > 0
    assert result.instructions["mma" if name in NO_WGMMA else "wgmma"] > 0


@pytest.mark.slow
def test_memory_at_the_size_of_gemma_2_2b_stays_near_that_of_its_gradients(compiled):
    """Gradients take 1161 MiB (Wijmans et al. 2024, table 1), the logits would take 4000."""
    mib = {name: compiled[f"gemma {name}"].temp_bytes / 2**20 for name in ("forward", "backward", "backward, input")}
    assert compiled["gemma backward"].output_bytes / 2**20 == pytest.approx(1161, abs=1)
    assert mib["forward"] < 4
    # 72 MiB are the sum of the gradients of e in float32.
    assert mib["backward"] < 72 + 0.02 * 1161
    assert compiled["gemma backward, filter"].temp_bytes / 2**20 < 72 + 0.02 * 1161
    assert mib["backward, input"] < 0.05 * 1161


@pytest.mark.slow
def test_attention_keeps_no_table_of_scores(compiled):
    table = 4 * 8 * 2048 * 2048 * 2
    for a in HEADS:
        for options in ("", ", full", ", ragged"):
            assert compiled[f"{a} forward{options}"].temp_bytes < table / 1000
            # Backward: one float32 per query and head.
            assert compiled[f"{a} backward{options}"].temp_bytes < table / 100


@pytest.mark.slow
def test_what_does_not_fit_is_refused(compiler):
    wide = cross_entropy.Tile(tokens=256, columns=128, depth=64, warps=8, stages=3)
    vast = dataclasses.replace(wide, columns=256, depth=128, stages=4)
    jobs = [
        loss_job("backward", TINY, softcap=30.0, blocks=cross_entropy.Blocks(tile, tile, splits=1, chunk=1024))
        for tile in (wide, vast)
    ]
    jobs.append(aot.Job("kernels.cross_entropy.gpu", "forward", loss_arrays(*TINY)[:4], {"no_such": 1}))
    jobs.append(aot.Job("os", "system", (), {}))
    jobs.append(loss_job("forward", (1, 1, 1)))
    assert [x.error for x in aot.run(jobs, compiler)] == ["registers", "shared memory", "compile", "died", None]


# Lowering needs no plug-in: JAX writes the kernels for Triton on any machine.


@pytest.fixture(autouse=True)
def _a_device_to_lower_for(request):
    """JAX 0.11 and later lower Pallas for a device, which may be abstract; 0.10 asks for none."""
    if (
        "compiler" in request.fixturenames
        or "compiled" in request.fixturenames
        or not hasattr(jax.sharding, "AbstractDevice")
    ):
        yield
        return
    device = jax.sharding.AbstractDevice("NVIDIA H200", 132, "gpu")
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=device)):
        yield


def lowered(function, arrays, **options):
    """Return the text of a program exported for CUDA."""
    shapes = [None if x is None else jax.ShapeDtypeStruct(*x) for x in arrays]
    checks = [export.DisabledSafetyCheck.custom_call("__gpu$xla.gpu.triton")]
    program = jax.jit(functools.partial(function, **options))
    return export.export(program, platforms=["cuda"], disabled_checks=checks)(*shapes).mlir_module()


# JAX 0.12 says that it will drop this backend of Pallas in favour of Mosaic's.
@pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated:DeprecationWarning")
class TestLowering:
    @pytest.mark.parametrize("sizes", [GEMMA, TINY, ODD, (1, 1, 1)])
    @pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
    def test_the_loss(self, sizes, dtype):
        arrays = loss_arrays(*sizes, dtype, bias=True)
        forward = lowered(cross_entropy.forward, arrays[:4], softcap=30.0)
        assert forward.count("__gpu$xla.gpu.triton") == 1
        backward = lowered(cross_entropy.backward, arrays, softcap=30.0, filter_eps=1e-4)
        n, _, v = sizes
        rest = v % min(v, cross_entropy.default_blocks(*sizes, dtype).chunk)
        # One kernel in the loop over chunks, and one for what is left of the vocabulary.
        assert backward.count("__gpu$xla.gpu.triton") == (2 if rest else 1)
        assert n == 1 or f"tensor<{n}x{v}x" not in forward

    @pytest.mark.parametrize("a", [64, 80, 256])
    @pytest.mark.parametrize("options", [PLAIN, FULL, FULL | {"causal": False, "window": None}])
    def test_attention(self, a, options):
        arrays = attention_arrays(a, s=300, t=301, segments=options["softcap"] is not None, sinks=True)
        assert lowered(attention.forward, arrays[:6], **options).count("__gpu$xla.gpu.triton") == 1
        backward = lowered(attention.backward, arrays, **options)
        assert backward.count("__gpu$xla.gpu.triton") == 2
        assert "300x301" not in backward

    def test_a_tile_that_triton_cannot_hold_is_refused(self):
        """Sizes that are not powers of two run when interpreted; only lowering shows that they cannot on a GPU."""
        tile = cross_entropy.Tile(tokens=48, columns=32, depth=32, warps=4, stages=2)
        blocks = cross_entropy.Blocks(tile, tile, splits=1, chunk=64)
        with pytest.raises(Exception, match="power of 2"):
            lowered(cross_entropy.forward, loss_arrays(*ODD)[:4], blocks=blocks)

    def test_default_tiles_are_powers_of_two_for_any_shape(self):
        for n, d, v in ((1, 1, 1), (3, 17, 100), (5000, 600, 50257), (8192, 2304, 256000)):
            for dtype in (jnp.bfloat16, jnp.float32):
                blocks = cross_entropy.default_blocks(n, d, v, dtype)
                for tile in (blocks.forward, blocks.backward):
                    assert all(x >= 16 and x & (x - 1) == 0 for x in (tile.tokens, tile.columns, tile.depth))
                assert blocks.splits >= 1 and blocks.chunk >= 128
