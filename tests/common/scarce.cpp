// Simulates memory shortage: preloaded (LD_PRELOAD), this library makes the C++ allocations fail that a test selects.

#include <atomic>
#include <csignal>
#include <cstdlib>
#include <dlfcn.h>
#include <new>

namespace {

constexpr long NEVER = -1;

std::atomic<long> allocations_left{NEVER};
std::atomic<bool> only_one{false};
std::atomic<bool> has_failed{false};

bool fails() {
    long left = allocations_left.load();
    while (left > 0 && !allocations_left.compare_exchange_weak(left, left - 1)) {
    }
    if (left != 0) {
        return false;
    }
    has_failed = true;
    if (only_one) {
        allocations_left = NEVER;
    }
    return true;
}

} // namespace

// Makes one allocation after the next `n` fail, or all of them until scarce_end().
extern "C" void scarce_begin(long n, bool one) {
    has_failed       = false;
    only_one         = one;
    allocations_left = n;
}

// For programs that do not call scarce_begin(): all allocations fail after the number given in SCARCE_AFTER, counted from when the program
// installs its handler for SIGABRT. Failures before main() could not be handled.
extern "C" int sigaction(int signal, const struct sigaction * action, struct sigaction * old) {
    using type = int (*)(int, const struct sigaction *, struct sigaction *);
    static const type next = reinterpret_cast<type>(dlsym(RTLD_NEXT, "sigaction"));
    const char * n = std::getenv("SCARCE_AFTER");
    if (n != nullptr && signal == SIGABRT) {
        scarce_begin(std::atol(n), false);
    }
    return next(signal, action, old);
}

// Ends the failures. Returns whether any allocation failed.
extern "C" bool scarce_end() {
    allocations_left = NEVER;
    return has_failed;
}

void * operator new(std::size_t size) {
    void * memory = fails() ? nullptr : std::malloc(size > 0 ? size : 1);
    if (memory == nullptr) {
        throw std::bad_alloc();
    }
    return memory;
}

void operator delete(void * memory) noexcept { std::free(memory); }
void operator delete(void * memory, std::size_t) noexcept { std::free(memory); }
