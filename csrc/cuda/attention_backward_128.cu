#include "attention_kernels.cuh"

template void hopper::launch_width<128>(const BackwardArguments&, const Device&);
