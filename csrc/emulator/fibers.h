// Switching between stacks: six pushes and pops where we know the machine, the C library's contexts elsewhere.
#pragma once
#include <cstddef>

#if !defined(__x86_64__) || defined(EMULATOR_UCONTEXT)
#define EMULATOR_C_CONTEXTS
#include <ucontext.h>
#endif

#if defined(__has_feature)
#if __has_feature(address_sanitizer)
#define EMULATOR_ASAN
#endif
#endif
#if defined(__SANITIZE_ADDRESS__)
#define EMULATOR_ASAN
#endif
#ifdef EMULATOR_ASAN
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace emulator {

constexpr int kStack = 128 * 1024;

// What AddressSanitizer must be told, since it watches the stack that it knows: where the next one lies, and that the
// frames of a fiber that was left for good are no more.
struct Stack {
    const void* bottom = nullptr;
    size_t size = 0;
};
#ifdef EMULATOR_ASAN
inline void* leave_for(const Stack& next) {
    void* frames;
    __sanitizer_start_switch_fiber(&frames, next.bottom, next.size);
    return frames;
}
inline Stack arrive(void* frames) {  // from the stack that it returns
    Stack last;
    __sanitizer_finish_switch_fiber(frames, &last.bottom, &last.size);
    return last;
}
inline void forget_frames(const Stack& stack) { __asan_unpoison_memory_region(stack.bottom, stack.size); }
#else
inline void* leave_for(const Stack&) { return nullptr; }
inline Stack arrive(void*) { return {}; }
inline void forget_frames(const Stack&) {}
#endif

#ifdef EMULATOR_C_CONTEXTS
struct Context {
    ucontext_t state;
    Stack stack;
};
inline void exchange_stacks(Context& from, Context& to) { swapcontext(&from.state, &to.state); }
inline void prepare(Context& context, char* stack, void (*entry)()) {
    context.stack = {stack, kStack};
    getcontext(&context.state);
    context.state.uc_stack = {stack, 0, kStack};
    context.state.uc_link = nullptr;
    makecontext(&context.state, entry, 0);
}
#else
struct Context {
    void* stack_pointer;
    Stack stack;
};
extern "C" void emulator_switch(void** from, void* to);  // in scheduler.cpp
inline void exchange_stacks(Context& from, Context& to) { emulator_switch(&from.stack_pointer, to.stack_pointer); }
inline void prepare(Context& context, char* stack, void (*entry)()) {
    context.stack = {stack, kStack};
    void** top = reinterpret_cast<void**>(stack + kStack - 64);
    *--top = nullptr;  // where entry would return to: keeps the stack aligned as after a call
    *--top = reinterpret_cast<void*>(entry);
    context.stack_pointer = top - 6;
}
#endif

inline void switch_to(Context& from, Context& to) {
    void* frames = leave_for(to.stack);
    exchange_stacks(from, to);
    arrive(frames);
}

}  // namespace emulator
