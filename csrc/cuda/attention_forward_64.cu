#include "attention_forward.cuh"

namespace hopper {

template void launch_forward<64>(const ForwardArguments&, const Device&);

}  // namespace hopper
