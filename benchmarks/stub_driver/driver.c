// A libcuda.so.1 for machines without a GPU: it takes every call that Triton makes, runs nothing, and notes each launch.
//
// A module is the kernel's own cubin. What a launch was given is read by the sizes that the cubin has of its parameters,
// so that a test sees the very bytes that the kernel would get.

#include <elf.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>

#define EXPORT __attribute__((visibility("default")))

typedef int CUresult;
typedef unsigned long long CUdeviceptr;

enum { MOST_KERNELS = 4096, MOST_NAME = 256, MOST_LAUNCHES = 64, MOST_PARAMS = 128, MOST_BYTES = 4096 };

// CUlaunchConfig of cuda.h, up to what is read here.
typedef struct {
    unsigned grid[3], block[3], shared;
    void *stream;
} LaunchConfig;

typedef struct {
    char name[MOST_NAME];
    int num_params;
    uint16_t offsets[MOST_PARAMS], sizes[MOST_PARAMS];
} Kernel;

typedef struct {
    int kernel; // its number: every loaded module has one of its own
    unsigned grid[3], block[3], shared;
    uint64_t stream;
    int num_bytes;
    unsigned char bytes[MOST_BYTES];
} Launch;

EXPORT Kernel stub_kernels[MOST_KERNELS];
EXPORT Launch stub_launches[MOST_LAUNCHES]; // a ring
EXPORT long long stub_num_kernels, stub_num_launches;

// Attribute 0x17 of a section .nv.info.NAME, KPARAM_INFO: ordinal and offset of a parameter, and its size in the upper
// 14 bits of a word.
static void read_params(Kernel *kernel, const unsigned char *at, const unsigned char *end) {
    while (at + 4 <= end) {
        unsigned format = at[0], attribute = at[1];
        uint16_t size = (uint16_t)(at[2] | at[3] << 8);
        if (format == 4 && attribute == 0x17) {
            uint16_t ordinal, offset;
            uint32_t word;
            memcpy(&ordinal, at + 8, 2);
            memcpy(&offset, at + 10, 2);
            memcpy(&word, at + 12, 4);
            if (ordinal < MOST_PARAMS) {
                kernel->offsets[ordinal] = offset;
                kernel->sizes[ordinal] = (uint16_t)(word >> 18);
                if (ordinal >= kernel->num_params) kernel->num_params = ordinal + 1;
            }
        }
        at += format == 4 ? 4 + size : 4;
    }
}

static void read_kernel(Kernel *kernel, const unsigned char *image) {
    const Elf64_Ehdr *header = (const Elf64_Ehdr *)image;
    const Elf64_Shdr *sections = (const Elf64_Shdr *)(image + header->e_shoff);
    const char *names = (const char *)image + sections[header->e_shstrndx].sh_offset;
    char wanted[MOST_NAME + 16];
    snprintf(wanted, sizeof wanted, ".nv.info.%s", kernel->name);
    for (int i = 0; i < header->e_shnum; i++) {
        const unsigned char *content = image + sections[i].sh_offset;
        if (strcmp(names + sections[i].sh_name, wanted) == 0) read_params(kernel, content, content + sections[i].sh_size);
    }
}

EXPORT CUresult cuModuleLoadData(void **module, const void *image) {
    *module = (void *)image; // Triton asks for its function before it lets go of the image
    return 0;
}

EXPORT CUresult cuModuleGetFunction(void **function, void *module, const char *name) {
    if (stub_num_kernels == MOST_KERNELS) return 2; // out of memory
    Kernel *kernel = &stub_kernels[stub_num_kernels++];
    snprintf(kernel->name, sizeof kernel->name, "%s", name);
    read_kernel(kernel, module);
    *function = (void *)(uintptr_t)stub_num_kernels; // from 1 on: 0 is no function
    return 0;
}

EXPORT CUresult cuLaunchKernelEx(const LaunchConfig *config, void *function, void **params, void **extra) {
    int number = (int)(uintptr_t)function - 1;
    const Kernel *kernel = &stub_kernels[number];
    Launch *launch = &stub_launches[stub_num_launches++ % MOST_LAUNCHES];
    launch->kernel = number;
    memcpy(launch->grid, config->grid, sizeof launch->grid);
    memcpy(launch->block, config->block, sizeof launch->block);
    launch->shared = config->shared;
    launch->stream = (uint64_t)(uintptr_t)config->stream;
    launch->num_bytes = 0;
    for (int i = 0; i < kernel->num_params; i++) {
        int end = kernel->offsets[i] + kernel->sizes[i];
        if (end > MOST_BYTES) return 1; // invalid value
        memcpy(launch->bytes + kernel->offsets[i], params[i], kernel->sizes[i]);
        if (end > launch->num_bytes) launch->num_bytes = end;
    }
    return 0;
}

// 128 opaque bytes: here what they would be made of.
EXPORT CUresult cuTensorMapEncodeTiled(void *map, int dtype, uint32_t rank, void *address, const uint64_t *dims,
                                       const uint64_t *strides, const uint32_t *box, const uint32_t *element_strides,
                                       int interleave, int swizzle, int promotion, int fill) {
    memset(map, 0, 128);
    uint32_t words[4] = {(uint32_t)dtype, rank, (uint32_t)swizzle, (uint32_t)fill};
    memcpy(map, &address, 8);
    memcpy((char *)map + 8, words, sizeof words);
    for (uint32_t i = 0; i < rank && i < 5; i++) {
        uint32_t size = (uint32_t)dims[i];
        memcpy((char *)map + 24 + 4 * i, &size, 4);
        memcpy((char *)map + 44 + 4 * i, &box[i], 4);
        if (i + 1 < rank) memcpy((char *)map + 64 + 8 * i, &strides[i], 8);
    }
    return 0;
}

EXPORT CUresult cuDeviceGetAttribute(int *value, int attribute, int device) {
    switch (attribute) {
        case 8:   // shared memory of a block
        case 81:  // and of a multiprocessor
        case 97:  // and of a block that asks for more than 48 KB
            *value = 232448;
            break;
        case 12:  // registers of a block
        case 82:  // and of a multiprocessor
            *value = 65536;
            break;
        case 10:  // lanes of a warp
            *value = 32;
            break;
        default:  // multiprocessors, and what nobody here reads
            *value = 132;
    }
    return 0;
}

EXPORT CUresult cuFuncGetAttribute(int *value, int attribute, void *function) {
    *value = attribute == 0 ? 1024 : 0; // threads of a block; bytes of shared and of local memory
    return 0;
}

EXPORT CUresult cuPointerGetAttribute(void *data, int attribute, CUdeviceptr pointer) {
    *(CUdeviceptr *)data = pointer;
    return 0;
}

EXPORT CUresult cuGetErrorString(int code, const char **text) {
    *text = "an error of the stub driver";
    return 0;
}

EXPORT CUresult cuInit(unsigned flags) { return 0; }
EXPORT CUresult cuDriverGetVersion(int *version) { return *version = 13000, 0; }
EXPORT CUresult cuCtxGetCurrent(void **context) { return *context = (void *)1, 0; }
EXPORT CUresult cuCtxSetCurrent(void *context) { return 0; }
EXPORT CUresult cuCtxGetLimit(size_t *value, int limit) { return *value = 0, 0; }
EXPORT CUresult cuCtxSetLimit(int limit, size_t value) { return 0; }
EXPORT CUresult cuDeviceGet(int *device, int ordinal) { return *device = ordinal, 0; }
EXPORT CUresult cuDevicePrimaryCtxRetain(void **context, int device) { return *context = (void *)1, 0; }
EXPORT CUresult cuFuncSetAttribute(void *function, int attribute, int value) { return 0; }
EXPORT CUresult cuFuncSetCacheConfig(void *function, int config) { return 0; }
EXPORT CUresult cuOccupancyMaxActiveClusters(int *count, void *function, const void *config) { return *count = 1, 0; }
EXPORT CUresult cuTensorMapEncodeIm2col(void *map) { return 1; }
EXPORT CUresult cuMemcpyHtoD(CUdeviceptr to, const void *from, size_t size) { return 0; }
EXPORT CUresult cuStreamSynchronize(void *stream) { return 0; }
