// Memory that runs out: put before the libraries of a program (LD_PRELOAD), it lets those allocations of C++ fail that a test
// names.

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

// After `n` more allocations one fails, or all do, until scarce_end().
extern "C" void scarce_begin(long n, bool one) {
    has_failed       = false;
    only_one         = one;
    allocations_left = n;
}

// A program that does not know of this: after as many allocations as the variable says all fail, from when it has said what is
// to happen at an abort. Before that is what runs ahead of main(), and nobody could help it.
extern "C" int sigaction(int signal, const struct sigaction * action, struct sigaction * old) {
    using type = int (*)(int, const struct sigaction *, struct sigaction *);
    static const type next = reinterpret_cast<type>(dlsym(RTLD_NEXT, "sigaction"));
    const char * n = std::getenv("SCARCE_AFTER");
    if (n != nullptr && signal == SIGABRT) {
        scarce_begin(std::atol(n), false);
    }
    return next(signal, action, old);
}

// Whether any has failed.
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
