// Switching between stacks: six pushes and pops where we know the machine, the C library's contexts elsewhere.
#pragma once
#if !defined(__x86_64__) || defined(EMULATOR_UCONTEXT)
#include <ucontext.h>
#endif

namespace emulator {

constexpr int kStack = 128 * 1024;

#if !defined(__x86_64__) || defined(EMULATOR_UCONTEXT)
struct Context {
    ucontext_t state;
};
inline void switch_to(Context& from, Context& to) { swapcontext(&from.state, &to.state); }
inline void prepare(Context& context, char* stack, void (*entry)()) {
    getcontext(&context.state);
    context.state.uc_stack = {stack, 0, kStack};
    context.state.uc_link = nullptr;
    makecontext(&context.state, entry, 0);
}
#else
struct Context {
    void* stack_pointer;
};
extern "C" void emulator_switch(void** from, void* to);  // in scheduler.cpp
inline void switch_to(Context& from, Context& to) { emulator_switch(&from.stack_pointer, to.stack_pointer); }
inline void prepare(Context& context, char* stack, void (*entry)()) {
    void** top = reinterpret_cast<void**>(stack + kStack - 64);
    *--top = nullptr;  // where entry would return to: keeps the stack aligned as after a call
    *--top = reinterpret_cast<void*>(entry);
    context.stack_pointer = top - 6;
}
#endif

}  // namespace emulator
