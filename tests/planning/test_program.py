"""Counting what a compiled program does, against programs whose counts are known."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgpt.planning.program import Collective, Program, axis_of

AXES, SIZES = ("data", "fsdp", "tensor"), (2, 2, 2)

HLO = """HloModule jit_f

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%fused (p0: bf16[12,64,32], p1: s32[]) -> bf16[64,32] {
  %p0 = bf16[12,64,32]{2,1,0} parameter(0)
  %p1 = s32[] parameter(1)
  %zero = s32[] constant(0)
  %piece = bf16[1,64,32]{2,1,0} dynamic-slice(%p0, %p1, %zero, %zero), dynamic_slice_sizes={1,64,32}
  ROOT %out = bf16[64,32]{1,0} bitcast(%piece)
}

%all-reduce-scatter (p: f32[64,32]) -> f32[32,32] {
  %p = f32[64,32]{1,0} parameter(0)
  %zero.1 = s32[] constant(0)
  %whole = f32[64,32]{1,0} all-reduce(%p), channel_id=7, replica_groups={{0,2},{1,3},{4,6},{5,7}}, use_global_device_ids=true, to_apply=%add
  ROOT %mine = f32[32,32]{1,0} dynamic-slice(%whole, %zero.1, %zero.1), dynamic_slice_sizes={32,32}
}

%condition (state: (s32[], bf16[8,64], bf16[12,64,32])) -> pred[] {
  %state = (s32[], bf16[8,64]{1,0}, bf16[12,64,32]{2,1,0}) parameter(0)
  %i = s32[] get-tuple-element(%state), index=0
  %limit = s32[]{:T(128)} constant(12)
  ROOT %more = pred[] compare(%i, %limit), direction=LT
}

%body (state.1: (s32[], bf16[8,64], bf16[12,64,32])) -> (s32[], bf16[8,64], bf16[12,64,32]) {
  %state.1 = (s32[], bf16[8,64]{1,0}, /*index=2*/bf16[12,64,32]{2,1,0}) parameter(0)
  %i.1 = s32[] get-tuple-element(%state.1), index=0
  %x = bf16[8,64]{1,0:T(8,128)(2,1)} get-tuple-element(%state.1), index=1
  %w = bf16[12,64,32]{2,1,0} get-tuple-element(%state.1), index=2
  %layer = bf16[64,32]{1,0} fusion(%w, %i.1), kind=kLoop, calls=%fused
  %y = bf16[8,32]{1,0:T(8,128)S(1)} convolution(%x, %layer), dim_labels=bf_io->bf
  %gathered-start = (bf16[8,32]{1,0}, bf16[8,64]{1,0}) all-gather-start(%y), channel_id=3, dimensions={1}, replica_groups=mesh['a'=4,'b'=2] {'b'}, use_global_device_ids=true
  %gathered = bf16[8,64]{1,0} all-gather-done(%gathered-start)
  ROOT %next = (s32[], bf16[8,64]{1,0}, bf16[12,64,32]{2,1,0}) tuple(%i.1, %gathered, %w)
}

ENTRY %main (x0: bf16[8,64], w0: bf16[12,64,32], g0: f32[64,32]) -> f32[32,32] {
  %x0 = bf16[8,64]{1,0} parameter(0)
  %w0 = bf16[12,64,32]{2,1,0} parameter(1)
  %g0 = f32[64,32]{1,0} parameter(2)
  %start = s32[] constant(0)
  %first = (s32[], bf16[8,64]{1,0}, bf16[12,64,32]{2,1,0}) tuple(%start, %x0, %w0)
  %loop = (s32[], bf16[8,64]{1,0}, bf16[12,64,32]{2,1,0}) while(%first), condition=%condition, body=%body
  %total = f32[64,32]{1,0} all-reduce(%g0), channel_id=5, replica_groups=[2,4]<=[2,2,2]T(1,0,2), use_global_device_ids=true, to_apply=%add
  ROOT %scattered = f32[32,32]{1,0} fusion(%total), kind=kCustom, calls=%all-reduce-scatter
}
"""


def newer(text: str) -> str:
    """The same program as XLA writes it from jax 0.12 on: elements of tuples inside operands."""
    element = re.compile(r"  %(\S+) = .* get-tuple-element\(%(\S+)\), index=(\d+)\n")
    kept = element.sub("", text)
    for name, whole, index in element.findall(text):
        kept = re.sub(rf"%{re.escape(name)}(?=[,)])", f"%{whole}#{index}", kept)
    assert "get-tuple-element" not in kept and kept.count("#") >= len(element.findall(text))
    return kept


SPELLINGS = pytest.mark.parametrize("spelled", [str, newer])


@SPELLINGS
def test_instructions_count_as_often_as_they_run(spelled):
    program = Program(spelled(HLO))
    assert program.flops() == 12 * 2 * 8 * 32 * 64
    found = {c.kind: c for c in program.collectives(AXES, SIZES)}
    assert found == {
        "all-gather": Collective("all-gather", "tensor", (0, 1), 12, 2 * 8 * 32 * 2),
        "all-reduce": Collective("all-reduce", "data+tensor", (0, 1, 4, 5), 1, 64 * 32 * 4),
        "reduce-scatter": Collective("reduce-scatter", "fsdp", (0, 2), 1, 64 * 32 * 4),
    }


@pytest.mark.parametrize(
    ("groups", "axis"),
    [
        ("{{0,2},{1,3},{4,6},{5,7}}", "fsdp"),
        ("[4,2]<=[8]", "tensor"),
        ("[4,2]<=[2,4]T(1,0)", "data"),
        ("mesh['a'=2,'b'=4] {'b'}", "fsdp+tensor"),
        ("mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'b'}", "data"),
    ],
)
def test_the_ways_to_write_groups(groups, axis):
    text = (
        "ENTRY %main (a: f32[3]) -> f32[3] {\n  %a = f32[3] parameter(0)\n"
        "  ROOT %b = f32[3] all-reduce(%a),"
        f" channel_id=1, replica_groups={groups}, use_global_device_ids=true, to_apply=%add\n}}\n"
    )
    (found,) = Program(text).collectives(AXES, SIZES)
    assert found.axis == axis


@SPELLINGS
def test_bytes_are_those_of_slices_and_not_of_memory_on_the_chip(spelled):
    layer, x = 64 * 32 * 2, 8 * 64 * 2
    # in the loop: the slice is read and written; the product reads x and the slice, writes to S(1)
    inside = 2 * layer + 4 + (x + layer)
    scattered = 64 * 32 * 4 + 32 * 32 * 4
    assert Program(spelled(HLO)).hbm_bytes() == 12 * inside + scattered


def test_axes_of_groups():
    assert axis_of([0, 4], AXES, SIZES) == "data"
    assert axis_of([1, 3], AXES, SIZES) == "fsdp"
    assert axis_of([0, 1, 4, 5], AXES, SIZES) == "data+tensor"
    assert axis_of(range(8), AXES, SIZES) == "data+fsdp+tensor"
    assert axis_of([3], AXES, SIZES) == "none"


@pytest.mark.parametrize(
    ("labels", "window", "lhs", "rhs", "out", "depth"),
    [
        ("bf_io->bf", "", (8, 64), (64, 32), (8, 32), 64),
        # MNH,NHD->MD as a convolution over the heads
        ("b0f_0io->b0f", "window={size=12}", (96, 12, 64), (12, 64, 7), (96, 1, 7), 12 * 64),
        # a batched product: of every shift only the one that does not stand on padding counts
        (
            "0bf_0io->0bf",
            "window={size=4 stride=3 pad=3_3 lhs_dilate=4 rhs_reversal=1}",
            (4, 5, 6),
            (4, 6, 7),
            (4, 5, 7),
            6,
        ),
    ],
)
def test_products_written_as_convolutions(labels, window, lhs, rhs, out, depth):
    def typed(shape):
        return f"f32[{','.join(map(str, shape))}]"

    text = (
        f"ENTRY %main (a: f32[], b: f32[]) -> f32[] {{\n  %a = {typed(lhs)} parameter(0)\n"
        f"  %b = {typed(rhs)} parameter(1)\n"
        f"  ROOT %c = {typed(out)} convolution(%a, %b), {window}{', ' * bool(window)}"
        f"dim_labels={labels}\n}}\n"
    )
    assert Program(text).flops() == 2 * int(np.prod(out)) * depth


def test_a_program_of_jax():
    """A scan of sharded products, compiled for eight devices."""
    mesh = jax.make_mesh((2, 4), ("data", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    P, sharded = jax.P, lambda *spec: jax.NamedSharding(mesh, jax.P(*spec))

    def f(x, ws):
        def layer(x, w):
            return jnp.tanh(jax.lax.with_sharding_constraint(x @ w, sharded("data", None))), None

        return jax.lax.scan(layer, x, ws)[0]

    assert P
    args = (
        jax.ShapeDtypeStruct((64, 256), jnp.float32, sharding=sharded("data", None)),
        jax.ShapeDtypeStruct((6, 256, 256), jnp.float32, sharding=sharded(None, "tensor", None)),
    )
    program = Program(jax.jit(f).lower(*args).compile().as_text())
    assert program.flops() == 6 * 2 * (64 // 2) * (256 // 4) * 256
    (found,) = program.collectives(("data", "tensor"), (2, 4))
    assert found == Collective("all-reduce", "tensor", (0, 1, 2, 3), 6, 32 * 256 * 4)


GPU = """HloModule jit_f

%fused (p0: bf16[12,64,32], p1: s32[], p2: bf16[64,32]) -> bf16[12,64,32] {
  %p0 = bf16[12,64,32]{2,1,0} parameter(0)
  %p1 = s32[] parameter(1)
  %p2 = bf16[64,32]{1,0} parameter(2)
  %zero = s32[] constant(0)
  %piece = bf16[1,64,32]{2,1,0} bitcast(%p2)
  ROOT %out = bf16[12,64,32]{2,1,0} dynamic-update-slice(%p0, %piece, %p1, %zero, %zero)
}

ENTRY %main (x: bf16[12,64,32], i: s32[], y: bf16[64,32]) -> bf16[12,64,32] {
  %x = bf16[12,64,32]{2,1,0} parameter(0)
  %i = s32[] parameter(1)
  %y = bf16[64,32]{1,0} parameter(2)
  %attention_fwd.3 = (bf16[64,32]{1,0}, u8[0]{0}) custom-call(%y), custom_call_target="__cudnn$fmhaSoftmax", backend_config={}
  %sum-start = ((bf16[64,32]{1,0}), bf16[64,32]{1,0}) all-reduce-start(%y), channel_id=2, replica_groups={{0,1}}, to_apply=%add
  %sum-done = bf16[64,32]{1,0} all-reduce-done(%sum-start)
  %fusion-start = ((bf16[12,64,32]{2,1,0}, s32[], bf16[64,32]{1,0}), bf16[12,64,32]{2,1,0}, u32[]) fusion-start(%x, %i, %y), kind=kLoop, calls=%fused
  ROOT %fusion-done = bf16[12,64,32]{2,1,0} fusion-done(%fusion-start)
}
"""


def test_a_gpu_s_program():
    """Async fusions and sums carry their operands in their type: those count once."""
    program, one = Program(GPU), 64 * 32 * 2
    assert program.kernels() == {"attention_fwd": 1}
    assert program.collectives(AXES, SIZES) == [Collective("all-reduce", "tensor", (0, 1), 1, one)]
    update, attention = 2 * one + one + 4, 2 * one  # the layer is read, its place read and written
    assert program.hbm_bytes() == update + attention


SPREAD = """ENTRY %main (x: bf16[8,4]) -> bf16[8,8] {
  %x = bf16[8,4]{1,0} parameter(0)
  %start = (bf16[8,4]{1,0}, bf16[8,8]{1,0}, u32[]{:S(2)}) fusion(%x), kind=kCustom, calls=%begins
  %part = bf16[8,4]{1,0} get-tuple-element(%start), index=0
  %flag = u32[]{:S(2)} get-tuple-element(%start), index=2
  ROOT %done = bf16[8,8]{1,0} fusion(%part, %flag), kind=kCustom, calls=%ends
}

%begins (p: bf16[8,4]) -> (bf16[8,4], bf16[8,8], u32[]) {
  %p = bf16[8,4]{1,0} parameter(0)
  %gather.1 = bf16[8,8]{1,0} all-gather(%p), channel_id=1, replica_groups={{0,1},{2,3},{4,5},{6,7}}, dimensions={1}
  ROOT %out = (bf16[8,4]{1,0}, bf16[8,8]{1,0}, u32[]{:S(2)}) tuple(%p, %gather.1, %p)
}

%ends (q: bf16[8,4], f: u32[]) -> bf16[8,8] {
  %q = bf16[8,4]{1,0} parameter(0)
  %f = u32[]{:S(2)} parameter(1)
  ROOT %gather.2 = bf16[8,8]{1,0} all-gather(%q), channel_id=1, replica_groups={{0,1},{2,3},{4,5},{6,7}}, dimensions={1}
}
"""


@SPELLINGS
def test_a_collective_spread_over_fusions_counts_once(spelled):
    found = Program(spelled(SPREAD)).collectives(AXES, SIZES)
    assert found == [Collective("all-gather", "tensor", (0, 1), 1, 2 * 8 * 4 * 2)]


# As libtpu writes a step under jax 0.12, in layouts and spelling, made small.
VARIADIC = """ENTRY %main (w: (s32[], (bf16[8,64], f32[4]), bf16[12,64])) -> f32[12,1,64] {
  %w = (s32[]{:T(128)}, (bf16[8,64]{1,0:T(8,128)(2,1)}, f32[4]{0:T(1024)S(1)}), bf16[12,64]{1,0:T(8,128)(2,1)}) parameter(0)
  %all-reduce.40 = (bf16[8,64]{1,0:T(8,128)(2,1)}, f32[4]{0:T(1024)S(1)}, /*index=2*/bf16[12,64]{1,0:T(8,128)(2,1)}) all-reduce(%w#1#0, %w#1#1, /*index=2*/%w#2), channel_id=9, replica_groups=mesh['data'=2,'fsdp'=2,'tensor'=2] {'data'}, use_global_device_ids=true, to_apply=%add
  ROOT %convert.7 = f32[12,1,64]{2,0,1:T(1,128)} convert(%all-reduce.40#2), metadata={op_name="a#b"}
}
"""


def test_elements_of_tuples_inside_operands():
    """Not the whole carry is read or sent, only the elements that are named."""
    program = Program(VARIADIC)
    sent = 8 * 64 * 2 + 4 * 4 + 12 * 64 * 2
    assert program.collectives(AXES, SIZES) == [Collective("all-reduce", "data", (0, 4), 1, sent)]
    assert program.hbm_bytes() == 12 * 64 * 2 + 12 * 64 * 4


# One of two slices of four chips, as libtpu writes what goes over the data-centre network.
SLICE = """ENTRY %main (x: f32[6,8]) -> f32[6,8] {
  %x = f32[6,8]{1,0} parameter(0)
  %inside = f32[6,8]{1,0} all-reduce(%x), channel_id=3, replica_groups={{0,1,2,3}}, use_global_device_ids=true, to_apply=%add
  %after = token[] after-all()
  %send.1 = (f32[6,8]{1,0:T(8,128)}, u32[]{:S(2)}, token[]) send(%inside, %after), channel_id=2, is_host_transfer=true, frontend_attributes={_xla_host_transfer_rendezvous="all-reduce.1_0",_xla_megascale_target="{1,2}x{0:3}",_xla_megascale_transfer_type="ALL_REDUCE"}
  %sent = token[] send-done(%send.1), channel_id=2
  %recv.1 = (f32[6,8]{1,0:T(8,128)}, u32[]{:S(2)}, token[]) recv(%sent), channel_id=4, is_host_transfer=true, frontend_attributes={_xla_host_transfer_rendezvous="all-reduce.1_0",_xla_megascale_target="{1,2}x{0:3}",_xla_megascale_transfer_type="ALL_REDUCE"}
  %received = (f32[6,8]{1,0}, token[]) recv-done(%recv.1), channel_id=4
  ROOT %y = f32[6,8]{1,0} get-tuple-element(%received), index=0
}
"""


def test_what_goes_between_slices():
    """A slice's program numbers its own devices; one from each slice takes part in the sum."""
    found = Program(SLICE).collectives(AXES, (4, 2, 1), slices=2)
    assert found == [
        Collective("all-reduce", "data+fsdp", (0, 1, 2, 3), 1, 6 * 8 * 4),
        Collective("all-reduce", "data", (0, 4), 1, 6 * 8 * 4),
    ]


RAGGED = """HloModule jit_f

ENTRY %main (x: bf16[96,64], w: bf16[4,64,32], n: s32[4], y: bf16[96,32]) -> bf16[96,64] {
  %x = bf16[96,64]{1,0} parameter(0)
  %w = bf16[4,64,32]{2,1,0} parameter(1)
  %n = s32[4]{0} parameter(2)
  %y = bf16[96,32]{1,0} parameter(3)
  %ragged-dot-metadata = (s32[5]{0}, s32[1]{0}) custom-call(%n), custom_call_target="tpu_custom_call"
  %ragged-dot-none.1 = bf16[96,32]{1,0} custom-call(%ragged-dot-metadata#1, %ragged-dot-metadata#0, %x, %w), custom_call_target="tpu_custom_call"
  %ragged-dot-none.2 = bf16[4,64,32]{2,1,0} custom-call(%ragged-dot-metadata#1, %ragged-dot-metadata#0, %x, %y), custom_call_target="tpu_custom_call"
  ROOT %sent = bf16[96,64]{1,0} ragged-all-to-all(%x, %x, %n, %n, %n, %n), channel_id=1, replica_groups={{0,1},{2,3},{4,5},{6,7}}
}
"""


def test_ragged_products_and_collectives_count_by_their_rows():
    program = Program(RAGGED)
    assert program.flops() == 2 * (2 * 96 * 64 * 32)
    (sent,) = program.collectives(AXES, SIZES)
    assert sent == Collective("ragged-all-to-all", "tensor", (0, 1), 1, 96 * 64 * 2)


def test_of_the_branches_of_a_conditional_the_longest_counts():
    f = jax.jit(lambda good, a: jax.lax.cond(good, lambda a: a @ a @ a, lambda a: a, a))
    program = Program(f.lower(True, jnp.ones((8, 8))).compile().as_text())
    assert program.flops() == 2 * (2 * 8**3)
