#include "attention_kernels.cuh"

template void hopper::launch_width<64>(const ForwardArguments&, const Device&);
