"""What a kernel's source asks for, by hand and of its loops only."""

from benchmarks.ttir import loop_flops

_TTIR = """
  tt.func public @kernel(%x: !tt.ptr<f32> {tt.divisibility = 16 : i32} loc("x"(#loc))) attributes {noinline = false} {
    %s = tt.dot %a, %b, %c : tensor<64x64xbf16> * tensor<64x64xbf16> -> tensor<64x64xf32> loc(#loc)
    scf.for %tile = %c0 to %tiles step %c1 : i32 {
      %sums = scf.for %step = %c0 to %steps step %c1 iter_args(%acc = %cst) -> (tensor<128x128xf32>)  : i32 {
        %s = tt.dot %q, %k, %c, inputPrecision = tf32 : tensor<128x80xbf16> * tensor<80x64xbf16> -> tensor<128x64xf32>
        %m = "tt.reduce"(%s) <{axis = 1 : i32}> ({
        ^bb0(%l: f32, %r: f32):
          tt.reduce.return %l : f32 loc(#loc)
        }) : (tensor<128x64xf32>) -> tensor<128xf32> loc(#loc)
        %w = scf.if %cut -> (tensor<128x64xf32>) {
          scf.yield %s : tensor<128x64xf32> loc(#loc)
        } else {
          scf.yield %s : tensor<128x64xf32> loc(#loc)
        } loc(#loc)
        %o = tt.dot %w, %v, %acc : tensor<128x64xbf16> * tensor<64x80xbf16> -> tensor<128x80xf32> loc(#loc)
        scf.yield %o : tensor<128x128xf32> loc(#loc)
      } loc(#loc)
      scf.for %step = %c0 to %steps step %c1  : i32 {
        %s = tt.dot %a, %b, %c : tensor<16x16xf32> * tensor<16x32xf32> -> tensor<16x32xf32> loc(#loc)
      } loc(#loc)
      scf.for %step = %c0 to %steps step %c1  : i32 {
        tt.store %p, %x : tensor<16x!tt.ptr<f32>> loc(#loc)
      } loc(#loc)
    } loc(#loc)
    tt.return loc(#loc)
  } loc(#loc)
"""


def test_innermost_loops_with_products_in_order() -> None:
    assert loop_flops(_TTIR) == [4 * 128 * 64 * 80, 2 * 16 * 16 * 32]


def test_a_loop_around_a_loop_is_no_innermost_one() -> None:
    """Not even with products of its own, before or behind the inner one."""
    dot = "%s = tt.dot %a, %b, %c : tensor<16x16xf32> * tensor<16x16xf32> -> tensor<16x16xf32>"
    inner = ["%s = scf.for %i = %a to %b step %c {", dot, "}"]
    assert loop_flops("\n".join(["scf.for %i {", dot, *inner, dot, *inner, "}"])) == [8192, 8192]


def test_products_outside_of_loops_are_no_loops() -> None:
    assert loop_flops(_TTIR.replace("scf.for", "scf.execute")) == []
