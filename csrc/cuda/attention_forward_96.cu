#include "attention_forward.cuh"

namespace hopper {

template void launch_forward<96>(const ForwardArguments&, const Device&);

}  // namespace hopper
