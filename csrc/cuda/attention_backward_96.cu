#include "attention_kernels.cuh"

template void hopper::launch_width<96>(const BackwardArguments&, const Device&);
