"""The reader of PTX and of ptxas's log, on loops written by hand."""

import pytest
from machine_code import Resources, Traffic, occupancy, resources, streaming_loops

# A loop as NVRTC writes it: two vectors in, one out, and one more under a condition.
PTX = """\
.visible .entry other(
	.param .u64 other_param_0
)
{
$L__BB0_1:
	ld.global.v4.f32 	{%f1, %f2, %f3, %f4}, [%rd1];
	add.s64 	%rd1, %rd1, 4096;
	@%p1 bra 	$L__BB0_1;
	ret;
}
.visible .entry evk_update(
	.param .align 8 .b8 evk_update_param_0[512]
)
.maxntid 256, 1, 1
{
	.reg .pred 	%p<9>;

	ld.param.u64 	%rd1, [evk_update_param_0];
	ld.global.u64 	%rd2, [%rd1];
	@%p1 bra 	$L__BB1_4;

$L__BB1_1:
	.pragma "nounroll";
	add.s64 	%rd3, %rd2, %rd9;
	ld.global.v4.f32 	{%f1, %f2, %f3, %f4}, [%rd3];
	ld.global.nc.v2.u64 	{%rd5, %rd6}, [%rd3+16];
	ld.shared.v4.f32 	{%f5, %f6, %f7, %f8}, [%rd3];
EXTRA
	st.global.v4.u32 	[%rd3], {%r1, %r1, %r1, %r1};
	@%p2 bra 	$L__BB1_3;

	st.global.v4.f32 	[%rd3+16], {%f1, %f1, %f1, %f1};

$L__BB1_3:
	add.s64 	%rd9, %rd9, 4096;
	@%p3 bra 	$L__BB1_1;

$L__BB1_4:
	ld.global.u16 	%rs1, [%rd2];
	st.global.u16 	[%rd2], %rs1;
	add.s64 	%rd2, %rd2, 2;
	@%p4 bra 	$L__BB1_4;
	ret;

}
"""

WIDE = (16, 16)


def loop(loaded=(32, 32), stored=(16, 32), loads=WIDE, stores=WIDE, reread=0, doubles=0):
    return Traffic(loaded, stored, loads, stores, reread, doubles)


@pytest.mark.parametrize(
    ("extra", "expected"),
    [
        ("", loop()),
        ("ld.global.f32 %f9, [%rd3];", loop((36, 36), loads=(4, *WIDE))),
        ("ld.volatile.global.f64 %fd9, [%rd3];", loop((40, 40), loads=(8, *WIDE))),
        # an address that the loop does not change
        ("ld.global.u64 %rd7, [%rd2+8];", loop(reread=8)),
        ("ld.global.u64 %rd7, [%rd1];", loop(reread=8)),
        (
            "ld.global.v2.u64 {%rd7, %rd1}, [%rd1+-8];",
            loop((48, 48), loads=(16, *WIDE)),
        ),  # a chain of addresses
        ("@%p5 ld.global.v4.u32 {%r1, %r2, %r3, %r4}, [%rd3];", loop((32, 48), loads=(16, *WIDE))),
        ("@!%p5 bra $L__BB1_3;", loop(stored=(0, 32))),
        ("@%p5 bra $L__BB1_4;", loop()),  # leaves the loop
        ("st.global.u8 [%rd2], %rs1;", loop(stored=(17, 33), stores=(1, *WIDE))),
        ("ld.local.v4.f32 {%f1, %f2, %f3, %f4}, [%rd3];", loop()),
        ("ld.param.u64 %rd8, [%rd3];", loop()),
        ("@!%p5 fma.rn.f64 %fd1, %fd1, %fd2, %fd3;", loop(doubles=1)),
        ("cvt.rn.f32.f64 %f1, %fd1;\n\tcvt.f64.f32 %fd1, %f1;", loop(doubles=2)),
        ("mov.f64 %fd1, 0d0000000000000000;\n\tld.shared.f64 %fd2, [%rd3];", loop()),
        # whatever memory that is
        ("ld.v2.u32 {%r1, %r2}, [%rd3];", loop((40, 40), loads=(8, *WIDE))),
        ("@%p5 st.u32 [%rd3], %r1;", loop(stored=(16, 36), stores=(4, *WIDE))),
    ],
)
def test_what_a_loop_moves(extra, expected):
    assert streaming_loops(PTX.replace("EXTRA", extra), "evk_update") == [expected]


INNER = "$L__BB1_2:\n\tadd.s64 %rd7, %rd7, 1;\nEXTRA\n\t@%p7 bra $L__BB1_2;"


@pytest.mark.parametrize(
    ("extra", "expected"),
    [
        ("", [loop()]),
        # nobody knows how often
        ("ld.global.f32 %f9, [%rd7];", []),
        ("ld.global.v4.f32 {%f1, %f2, %f3, %f4}, [%rd7];", [loop((16, 16), (0, 0), (16,), ())]),
    ],
)
def test_a_loop_with_another_one_in_it(extra, expected):
    inner = INNER.replace("EXTRA", extra)
    assert streaming_loops(PTX.replace("EXTRA", inner), "evk_update") == expected


def test_a_branch_by_a_table():
    table = "$L_brx_0: .branchtargets\n\t\t$L__BB1_4,\n\t\t$L__BB1_3;\n\tbrx.idx \t%r1, $L_brx_0;"
    expected = loop(stored=(0, 0), stores=())  # what follows cannot be reached
    assert streaming_loops(PTX.replace("EXTRA", table), "evk_update") == [expected]


def test_a_branch_to_nowhere_is_not_guessed():
    with pytest.raises(ValueError, match=r"not read: .*table"):
        streaming_loops(PTX.replace("EXTRA", "brx.idx %r1, table;"), "evk_update")


def test_kernels_are_told_apart():
    found = streaming_loops(PTX.replace("EXTRA", ""), "other")
    assert found == [loop((16, 16), (0, 0), (16,), ())]


# As Triton writes it: comments, lines and labels for debuggers, also behind a branch, accesses
# under conditions, and one that all threads share.
TRITON = """\
.visible .entry update(
	.param .u64 .ptr .global .align 1 update_param_0
)
.reqntid 256
.maxnreg 80
{
	.reg .b64 	%rd<9>;
	.loc	1 813 0                         // <module>:813:0
$L__func_begin0:
// %bb.0:
	ld.param.b64 	%rd1, [update_param_0];
$L__BB0_1:                              // =>This Loop Header: Depth=1
	ld.global.b64 { %rd2 }, [ %rd1 + 0 ];
	bra.uni 	$L__BB0_2;
$L__tmp5:
	.loc	1 814 0                         // <module>:814:0
$L__BB0_2:                              // %.lr.ph
                                        // =>   Parent Loop BB0_1 Depth=1
	setp.lt.s32 	%p1, %r1, %r2;
	add.s64 	%rd3, %rd2, %rd4;
$L__tmp6:
	// begin inline asm
	mov.u32 %r3, 0x0;
	@%p1 ld.global.v4.b32 { %r3, %r4, %r5, %r6 }, [ %rd3 + 0 ];
	// end inline asm
	@%p1 ld.global.v2.b32 { %r7, %r8 }, [ %rd3 + 16 ];
	ld.global.b32 { %r9 }, [ %rd1 + 16 ];
	and.pred 	%p2, %p3, %p1;
	@%p2 st.global.v4.b32 [ %rd3 + 0 ], { %r3, %r4, %r5, %r6 };
	add.s32 	%r1, %r1, 1024;
	@%p4 bra 	$L__BB0_2;
	@%p5 bra 	$L__BB0_1;
	ret;
$L__tmp7:
}
"""


def test_a_loop_of_triton():
    assert streaming_loops(TRITON, "update") == [loop((0, 24), (0, 16), (8, 16), (16,), 4)]


LOG = """\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'evk_update' for 'sm_75'
ptxas info    : Function properties for evk_update
ptxas         .     16 bytes stack frame, 12 bytes spill stores, 8 bytes spill loads
ptxas info    : Used 80 registers, used 1 barriers, 368 bytes smem, 864 bytes cmem[0]
ptxas info    : Function properties for _Z6scalari
ptxas         .     24 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
"""


def test_the_log_of_ptxas():
    assert resources(LOG) == {
        "evk_update": Resources(80, 16, 20),
        "_Z6scalari": Resources(None, 24, 0),
    }


@pytest.mark.parametrize(
    ("registers", "architecture", "expected"),
    [
        *((32, 75, 1.0), (64, 75, 1.0), (65, 75, 0.75), (80, 75, 0.75), (81, 75, 0.5)),
        *((32, 80, 1.0), (33, 80, 0.75), (80, 80, 0.375), (80, 86, 0.5), (255, 90, 0.125)),
    ],
)
def test_occupancy(registers, architecture, expected):
    """As NVIDIA's occupancy calculator says for blocks of 256 threads."""
    assert occupancy(registers, architecture, 256) == expected
