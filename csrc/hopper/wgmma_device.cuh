// wgmma m64nNk16 with fp32 sums, for the N that the kernels use. PTX numbers its operands, so the text depends on N.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace hopper {

template <class T, int COUNT>
struct Wgmma;  // COUNT: floats of a thread's accumulator, N / 2

#define WGMMA_8(i) \
    "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), "+f"(d[i + 7])
#define WGMMA_16(i) WGMMA_8(i), WGMMA_8(i + 8)
#define WGMMA_32(i) WGMMA_16(i), WGMMA_16(i + 16)
#define WGMMA_D32 WGMMA_32(0)
#define WGMMA_D40 WGMMA_32(0), WGMMA_8(32)
#define WGMMA_D48 WGMMA_32(0), WGMMA_16(32)
#define WGMMA_D64 WGMMA_32(0), WGMMA_32(32)

#define WGMMA_NAMES_32                                                                                   \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, " \
    "%22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define WGMMA_NAMES_40 WGMMA_NAMES_32 ", %32, %33, %34, %35, %36, %37, %38, %39"
#define WGMMA_NAMES_48 WGMMA_NAMES_40 ", %40, %41, %42, %43, %44, %45, %46, %47"
#define WGMMA_NAMES_64 \
    WGMMA_NAMES_48 ", %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"

// N, COUNT = N / 2, and the numbers of the operands after the accumulator: COUNT, COUNT + 1, ...
#define WGMMA(T, TYPE, N, COUNT, P0, P1, P2, P3, P4, P5, P6)                                                               \
    template <>                                                                                                            \
    struct Wgmma<T, COUNT> {                                                                                               \
        template <bool B_ROWS_ARE_K>                                                                                       \
        __device__ __forceinline__ static void ss(float (&d)[COUNT], uint64_t a, uint64_t b, bool accumulate) {            \
            asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #P2 ", 0;\n"                                                 \
                         "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE " {" WGMMA_NAMES_##COUNT "}, "    \
                         "%" #P0 ", %" #P1 ", p, 1, 1, 0, %" #P3 ";\n}\n"                                                  \
                         : WGMMA_D##COUNT                                                                                  \
                         : "l"(a), "l"(b), "r"(int(accumulate)), "n"(int(B_ROWS_ARE_K)));                                  \
        }                                                                                                                  \
        template <bool B_ROWS_ARE_K>                                                                                       \
        __device__ __forceinline__ static void rs(float (&d)[COUNT], const uint32_t* a, uint64_t b, bool accumulate) {     \
            asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #P5 ", 0;\n"                                                 \
                         "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE " {" WGMMA_NAMES_##COUNT "}, "    \
                         "{%" #P0 ", %" #P1 ", %" #P2 ", %" #P3 "}, %" #P4 ", p, 1, 1, %" #P6 ";\n}\n"                     \
                         : WGMMA_D##COUNT                                                                                  \
                         : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(int(accumulate)),                       \
                           "n"(int(B_ROWS_ARE_K)));                                                                        \
        }                                                                                                                  \
    }
#define WGMMA_SHAPES(T, TYPE)                              \
    WGMMA(T, TYPE, 64, 32, 32, 33, 34, 35, 36, 37, 38);    \
    WGMMA(T, TYPE, 80, 40, 40, 41, 42, 43, 44, 45, 46);    \
    WGMMA(T, TYPE, 96, 48, 48, 49, 50, 51, 52, 53, 54);    \
    WGMMA(T, TYPE, 128, 64, 64, 65, 66, 67, 68, 69, 70)

WGMMA_SHAPES(__nv_bfloat16, "bf16");
WGMMA_SHAPES(__half, "f16");

}  // namespace hopper
