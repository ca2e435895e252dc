import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sora_jax import chips, sharding
from sora_jax.plan import activations, collectives, hlo, roofline


def compiled(function, *shapes, mesh, axes=("batch",)):
    args = [
        jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharding.named(mesh, *axes))
        for shape in shapes
    ]
    return hlo.parse(jax.jit(function).lower(*args).compile().as_text())


def test_a_kernel_tells_the_types_of_its_operands():
    line = (
        "  %heads_backward.3 = (f32[1,4,256]{2,1,0:T(8,128)}, f32[1,1,1,256]{3,2,1,0}) custom-call("
        '%y, %copy-done.1, %pull), custom_call_target="tpu_custom_call", operand_layout_constraints'
        '={f32[1,4,256]{2,1,0}, f32[1,256]{1,0}, bf16[1,2,4,128]{3,2,1,0}}, metadata={op_name="a"}'
    )
    call = next(iter(hlo.parse(f"ENTRY %main (a: f32[8]) -> f32[8] {{\n{line}\n}}").scheduled()))[0]
    assert call.name == "heads_backward.3" and hlo.first_size(call.type) == 1024
    assert hlo.shape_bytes(call.operand_types) == 4 * 1024 + 4 * 256 + 2 * 1024
    assert call._replace(rest="").operand_types == ""


def test_loops_within_loops_multiply():
    def outer(c, _):
        return jax.lax.fori_loop(0, 3, lambda i, y: jnp.sin(y @ y), c), None

    def f(x):
        return jax.lax.scan(outer, x, None, length=5)[0]

    text = jax.jit(f).lower(jnp.zeros((64, 64))).compile().as_text()
    program = hlo.parse(text)
    assert max(program.runs.values()) == 15 and program.unknown_loops == 0


@pytest.mark.parametrize("heavy_first", [True, False])
def test_of_branches_the_one_that_is_most_work_counts(heavy_first):
    def heavy(y):
        return jax.lax.fori_loop(0, 3, lambda i, z: jnp.sin(z @ z), y)

    def f(x):
        branches = (heavy, jnp.cos) if heavy_first else (jnp.cos, heavy)
        step = lambda y, i: (jax.lax.cond(i == 2, *branches, y), None)  # noqa: E731
        return jax.lax.scan(step, x, jnp.arange(5))[0]

    text = jax.jit(f).lower(jnp.zeros((64, 64))).compile().as_text()
    program = hlo.parse(text)
    assert program.unknown_loops == 0
    (choice,) = [i for i, _ in program.scheduled() if i.opcode == "conditional"]
    assert len(choice.branches) == 2
    assert sum(branch in program.runs for branch in choice.branches) == 1
    assert max(program.runs.values()) == 15
    # As older programs write it.
    names = choice.branches
    listed = next(part for part in text.split("branch_computations=")[1:])
    listed = listed[: listed.index("}") + 1]
    older = f"true_computation=%{names[1]}, false_computation=%{names[0]}"
    told = hlo.parse(text.replace(f"branch_computations={listed}", older))
    assert told.runs == program.runs


# Of a step compiled for v5p: a counter compared with a constant, an attribute over several lines.
EXCERPT = """HloModule m, is_scheduled=true

%body (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %p = (s32[]{:T(128)}, f32[8]{0:T(1024)}) parameter(0)
  %kernel = (f32[8]{0:T(1024)}, bf16[2,4]{1,0:T(8,128)(2,1)}) custom-call(%p), \
custom_call_target="tpu_custom_call", frontend_attributes={kernel_metadata={
"xprof_metadata":"{block}"
}}, metadata={op_name="a"}
  %g = f32[8]{0} get-tuple-element(%kernel), index=0
  %one = s32[] constant(1)
  ROOT %t = (s32[]{:T(128)}, f32[8]{0}) tuple(%one, %g)
}

%cond (q: (s32[], f32[8])) -> pred[] {
  %limit = s32[]{:T(128)} constant(40)
  %q = (s32[]{:T(128)}, f32[8]{0}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%q), index=0
  ROOT %lt = pred[]{:T(512)} compare(%i, %limit), direction=LT
}

ENTRY %main (a: f32[8]) -> f32[8] {
  %a = f32[8]{0} parameter(0)
  %start = s32[] constant(2)
  %init = (s32[]{:T(128)}, f32[8]{0}) tuple(%start, %a)
  %f = f32[8]{0} fusion(%a), kind=kLoop, calls=%c, backend_config={"estimated_cycles":"123"}
  %loop = (s32[]{:T(128)}, f32[8]{0}) while(%init), condition=%cond, body=%body
  ROOT %r = f32[8]{0} get-tuple-element(%loop), index=1
}
"""


def test_trips_are_counted_from_the_first_value_of_the_counter():
    program = hlo.parse(EXCERPT)
    assert program.entry == "main"
    assert program.runs["body"] == 38
    kernel = next(i for i, _ in program.scheduled() if i.name == "kernel")
    assert kernel.opcode == "custom-call" and hlo.shape_bytes(kernel.type) == 8 * 4 + 8 * 2
    assert [i.name for i in program.computations["body"]] == ["p", "kernel", "g", "one", "t"]
    assert [i.cycles for i, _ in program.scheduled() if i.name == "f"] == [123]


@pytest.mark.parametrize(
    ("type_", "size"),
    [("f32[2,3]{1,0}", 24), ("(bf16[4]{0}, pred[2]{0}, s32[])", 14), ("f8e4m3fn[8]{0}", 8)],
)
def test_bytes_of_types(type_, size):
    assert hlo.shape_bytes(type_) == size


def test_text_without_an_entry_is_refused():
    with pytest.raises(ValueError, match="no ENTRY"):
        hlo.parse("HloModule m\n")


def test_collectives_lie_on_the_axes_that_caused_them():
    mesh = sharding.make_mesh(fsdp=4, tensor=2)

    def local(x):
        whole = jax.lax.all_gather(x, "tensor", axis=1, tiled=True)
        ring = jax.lax.ppermute(x, "fsdp", [(i, (i + 1) % 4) for i in range(4)])
        return jnp.sin(whole[:, :8]) + ring, jax.lax.psum(x, ("fsdp", "tensor"))

    spec = sharding.spec("batch", "mlp")
    f = jax.shard_map(local, mesh=mesh, in_specs=spec, out_specs=spec)
    program = compiled(f, (16, 16), mesh=mesh, axes=("batch", "mlp"))
    found = {
        (c.kind, collectives.axes_of(c, dict(mesh.shape))): c.sent
        for c in collectives.find(program, mesh.size)
    }
    part = 4 * 8 * 4  # bytes of a device's rows and columns
    assert found == {
        ("all-gather", ("tensor",)): part,
        ("collective-permute", ("fsdp",)): part,
        ("all-reduce", ("fsdp", "tensor")): 2 * part * 7 / 8,
    }


def test_a_collective_in_a_scan_counts_as_often_as_it_runs():
    mesh = sharding.make_mesh(fsdp=8)

    def f(x):
        def body(c, _):
            return c * jax.lax.psum(jnp.sum(c), "fsdp"), None

        spec = sharding.spec("batch")
        scan = functools.partial(jax.lax.scan, body, length=6)
        local = jax.shard_map(scan, mesh=mesh, in_specs=spec, out_specs=(spec, None))
        return local(x)[0]

    found = collectives.find(compiled(f, (8,), mesh=mesh), 8)
    assert [(c.kind, c.runs, c.group_size) for c in found] == [("all-reduce", 6, 8)]


@pytest.mark.parametrize(
    ("attribute", "groups"),
    [
        ("replica_groups={{0,1},{2,3}}", ((0, 1), (2, 3))),
        ("replica_groups=[2,2]<=[4]", ((0, 1), (2, 3))),
        ("replica_groups=[2,2]<=[2,2]T(1,0)", ((0, 2), (1, 3))),
        ("replica_groups=mesh['a'=2,'b'=2] {'b'}, dimensions={1}", ((0, 1), (2, 3))),
        ("replica_groups=mesh['a'=2,'b'=2] {'a'}", ((0, 2), (1, 3))),
        ("replica_groups=mesh['a'=4] {'a':(2)2}", ((0, 1), (2, 3))),
        ("replica_groups=mesh['a'=4] {'a':(1)2}", ((0, 2), (1, 3))),
        ("replica_groups=mesh['a'=2,'b'=2], device_ids=([2,2]T(1,0)) {'b'}", ((0, 2), (1, 3))),
        ("replica_groups={}", ((0, 1, 2, 3),)),
    ],
)
def test_every_form_of_groups(attribute, groups):
    assert collectives._groups(f", channel_id=1, {attribute}, x=1", 4, "all-gather") == groups


def test_permutations_are_pairs_without_those_that_stay():
    rest = ", source_target_pairs={{0,1},{1,0},{2,2}}"
    assert collectives._groups(rest, 4, "collective-permute") == ((0, 1), (1, 0))


CHAIN = """HloModule m, is_scheduled=true

%step1 (p: f32[2,8]) -> f32[8,8] {
  %p = f32[2,8]{1,0} parameter(0)
  ROOT %ag1 = f32[8,8]{1,0} all-gather(%p), channel_id=7, replica_groups={{0,1,2,3}}
}

%async_collective_fusion.1 (p2: f32[2,8]) -> f32[8,8] {
  %p2 = f32[2,8]{1,0} parameter(0)
  ROOT %ag2 = f32[8,8]{1,0} all-gather(%p2), channel_id=7, replica_groups={{0,1,2,3}}
}

%all-reduce-scatter.3 (p3: f32[8,8]) -> f32[2,8] {
  %p3 = f32[8,8]{1,0} parameter(0)
  %ar = f32[8,8]{1,0} all-reduce(%p3), channel_id=9, replica_groups={{0,1,2,3}}, to_apply=%add
  ROOT %ds = f32[2,8]{1,0} dynamic-slice(%ar)
}

ENTRY %main (a: f32[2,8]) -> f32[2,8] {
  %a = f32[2,8]{1,0} parameter(0)
  %async-collective-start = f32[8,8]{1,0} fusion(%a), kind=kCustom, calls=%step1
  %fusion.1 = f32[8,8]{1,0} fusion(%a), kind=kOutput, calls=%async_collective_fusion.1
  %rs = f32[2,8]{1,0} fusion(%fusion.1), kind=kCustom, calls=%all-reduce-scatter.3
  %s = (f32[2,8]{1,0}, f32[2,8]) all-to-all-start(%rs), channel_id=3, replica_groups={{0,1,2,3}}
  %MIDDLE
  %d = f32[2,8]{1,0} all-to-all-done(%s)
  ROOT %out = f32[2,8]{1,0} copy(%d)
}
"""


@pytest.mark.parametrize(
    ("between", "overlapped"),
    [
        ("w = f32[2,8]{1,0} fusion(%a), kind=kLoop, calls=%c", True),
        ("w = s32[] constant(1)", False),
    ],
)
def test_steps_of_one_collective_count_once_and_work_between_overlaps(between, overlapped):
    found = collectives.find(hlo.parse(CHAIN.replace("MIDDLE", between)), 4)
    assert [(c.kind, c.sent, c.overlapped) for c in found] == [
        ("all-gather", 256 * 3 / 4, True),
        ("reduce-scatter", 256 * 3 / 4, False),
        ("all-to-all", 64 * 3 / 4, overlapped),
    ]


# A v6e gives some collectives to cores of its own; the work beside them is the matrix unit's.
OFFLOADED = """HloModule m, is_scheduled=true

%called.1 (p: f32[8,8], q: token[]) -> f32[2,8] {
  %p = f32[8,8]{1,0} parameter(0)
  %q = token[] parameter(1)
  ROOT %rs = f32[2,8]{1,0} reduce-scatter(%p), channel_id=5, replica_groups={{0,1,2,3}}, \
to_apply=%add
}, execution_thread="sparsecore"

ENTRY %main (a: f32[8,8], t: token[]) -> f32[2,8] {
  %a = f32[8,8]{1,0} parameter(0)
  %t = token[] parameter(1)
  %rs.call-start = ((f32[8,8]{1,0}, token[]), f32[2,8]{1,0}) call-start(%a, %t), \
async_execution_thread="sparsecore", to_apply=%called.1
  %w = f32[8,8]{1,0} fusion(%a), kind=kLoop, calls=%c, backend_config={"estimated_cycles":"175"}
  ROOT %rs.call-done = f32[2,8]{1,0} call-done(%rs.call-start)
}
"""


def test_collectives_of_other_cores_are_found_and_take_no_time_of_these():
    program = hlo.parse(OFFLOADED)
    (found,) = collectives.find(program, 4)
    assert (found.kind, found.sent, found.overlapped) == ("reduce-scatter", 256 * 3 / 4, True)
    v6e = next(chip for chip in chips.CHIPS if chip.name == "v6e")
    assert roofline._compute_seconds(program, v6e) == (pytest.approx(175 / v6e.clock), 0.0)


def places(shape):
    grid = np.stack(np.unravel_index(np.arange(np.prod(shape)), shape), axis=1)
    return np.concatenate([np.zeros((len(grid), 1), int), grid, np.zeros((len(grid), 1), int)], 1)


def test_time_over_the_torus():
    v5p = next(chip for chip in chips.CHIPS if chip.name == "v5p")
    link = v5p.ici_link * collectives.LINK_EFFICIENCY

    def seconds(kind, groups, shape):
        one = collectives.Collective(kind, "c", groups, 1, 1e9, False)
        return collectives.seconds(one, v5p, places(shape), shape)

    # Four in a row that is joined at its ends: two links; two by two, not joined: one a dimension.
    assert seconds("all-gather", ((0, 1, 2, 3),), (1, 1, 4)) == pytest.approx(1e9 / (2 * link))
    assert seconds("all-gather", ((0, 1, 2, 3),), (2, 2, 1)) == pytest.approx(1e9 / (2 * link))
    # Of the 4/3 GB that each of a ring has, two send a half of it through either middle.
    assert seconds("all-to-all", ((0, 1, 2, 3),), (1, 1, 4)) == pytest.approx(
        4 / 3 * 1e9 / 2 / link
    )
    # What two neighbours send goes through the one link between them.
    assert seconds("all-to-all", ((0, 1),), (2, 1, 1)) == pytest.approx(1e9 / link)
    ring = tuple((i, (i + 1) % 4) for i in range(4))
    assert seconds("collective-permute", ring, (1, 1, 4)) == pytest.approx(1e9 / link)
    assert seconds("collective-permute", ((0, 2), (2, 0)), (1, 1, 4)) == pytest.approx(2e9 / link)


def test_time_between_slices_and_within_a_chip():
    v7x = next(chip for chip in chips.CHIPS if chip.name == "v7x")
    one = collectives.Collective("all-reduce", "c", ((0, 1),), 1, 1e9, False)
    two_slices = np.array([[0, 0, 0, 0, 0], [1, 0, 0, 0, 0]])
    assert collectives.seconds(one, v7x, two_slices, (2, 2, 1)) == pytest.approx(
        1e9 / (v7x.dcn_host / 8)
    )
    two_cores = np.array([[0, 0, 0, 0, 0], [0, 0, 0, 0, 1]])
    assert collectives.seconds(one, v7x, two_cores, (2, 2, 1)) < 1e9 / v7x.ici_link / 5


@pytest.mark.parametrize("policy", ["input", "everything"])
def test_what_scanned_blocks_keep_is_told_from_gradients_and_the_rest(policy):
    layers, rows, width = 5, 64, 32

    def block(x, w):
        return jnp.sin(x @ w)

    blocks = jax.checkpoint(block) if policy == "input" else block

    def loss(w, x):
        return jnp.sum(jax.lax.scan(lambda x, w: (blocks(x, w), None), x, w)[0] ** 2)

    w, x = jnp.zeros((layers, width, width)), jnp.zeros((rows, width))
    program = hlo.parse(jax.jit(jax.grad(loss)).lower(w, x).compile().as_text())
    found = activations.kept(program)
    # Each block's input; of a sine that is not computed again, its derivative too.
    arrays = {"input": 1, "everything": 2}[policy]
    assert found.activations == arrays * 4 * layers * rows * width
    assert found.gradients == 4 * layers * width * width
    forward = hlo.parse(jax.jit(loss).lower(w, x).compile().as_text())
    assert activations.kept(forward) == (0, 0)


# A loop that stacks up an array of 4 x 8, and one that reads it and stacks up 4 x 2; both carry an
# array of as many rows as there are trips.
LOOPS = """HloModule m, is_scheduled=true

%forward (p: (s32[], f32[4,8], f32[4,3])) -> (s32[], f32[4,8], f32[4,3]) {
  %p = (s32[], f32[4,8]{1,0:T(8,128)SPACE}, f32[4,3]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %kept = f32[4,8]{1,0:T(8,128)SPACE} get-tuple-element(%p), index=1
  %x = f32[4,3]{1,0} get-tuple-element(%p), index=2
  %part = f32[1,8]{1,0} constant({...})
  %filled = f32[4,8]{1,0:T(8,128)SPACE} dynamic-update-slice(%kept, %part, %i, %i)
  %y = f32[4,3]{1,0} add(%x, %x)
  ROOT %t = (s32[], f32[4,8]{1,0:T(8,128)SPACE}, f32[4,3]{1,0}) tuple(%i, %filled, %y)
}

%backward (p.1: (s32[], f32[4,8], f32[4,2])) -> (s32[], f32[4,8], f32[4,2]) {
  %p.1 = (s32[], f32[4,8]{1,0:T(8,128)SPACE}, f32[4,2]{1,0}) parameter(0)
  %i.1 = s32[] get-tuple-element(%p.1), index=0
  %read = f32[4,8]{1,0:T(8,128)SPACE} get-tuple-element(%p.1), index=1
  %g = f32[4,2]{1,0} get-tuple-element(%p.1), index=2
  %part.1 = f32[1,2]{1,0} constant({...})
  %summed = f32[4,2]{1,0} dynamic-update-slice(%g, %part.1, %i.1, %i.1)
  ROOT %t.1 = (s32[], f32[4,8]{1,0:T(8,128)SPACE}, f32[4,2]{1,0}) tuple(%i.1, %read, %summed)
}

ENTRY %main (a: f32[8]) -> f32[8] {
  %a = f32[8]{0} parameter(0)
  %w = (s32[], f32[4,8]{1,0:T(8,128)SPACE}, f32[4,3]{1,0}) while(%a), condition=%c, \
body=%forward, backend_config={"known_trip_count":{"n":"4"}}
  %v = (s32[], f32[4,8]{1,0:T(8,128)SPACE}, f32[4,2]{1,0}) while(%w), condition=%c, \
body=%backward, backend_config={"known_trip_count":{"n":"4"}}
  ROOT %r = f32[8]{0} copy(%a)
}
"""


@pytest.mark.parametrize(("space", "activations_"), [("", 4 * 4 * 8), ("S(5)", 0)])
def test_what_waits_on_hosts_is_no_activation_and_a_carry_no_gradient(space, activations_):
    program = hlo.parse(LOOPS.replace("SPACE", space))
    assert activations.kept(program) == (activations_, 4 * 4 * 2)
