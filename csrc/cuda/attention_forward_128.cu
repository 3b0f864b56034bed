#include "attention_forward.cuh"

namespace hopper {

template void launch_forward<128>(const ForwardArguments&, const Device&);

}  // namespace hopper
