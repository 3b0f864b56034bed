#include "attention_kernels.cuh"

template void hopper::launch_width<80>(const ForwardArguments&, const Device&);
