// Threads that run one function together and wait for each other by spinning briefly.
#pragma once

#include <immintrin.h>
#include <sched.h>

#include <atomic>
#include <cstdint>
#include <thread>
#include <vector>

namespace headrace {

class Team;

// One thread's view of a running team.
class Worker {
public:
    Worker(Team& team, int index, int count) : index(index), count(count), team_(team) {}

    // Waits for all; afterwards claims begin at 0 again.
    void barrier();

    // Returns the first of the next `size` items that nobody has yet, until the next barrier.
    int64_t claim(int64_t size);

    const int index;
    const int count;

private:
    Team& team_;
};

class Team {
public:
    using Work = void (*)(void* what, Worker& worker);

    explicit Team(int most) {  // 1 to 255
        for (int index = 1; index < most; ++index) helpers_.emplace_back([this, index] { help(index); });
    }

    ~Team() {
        start(0);
        for (auto& helper : helpers_) helper.join();
    }

    Team(const Team&) = delete;
    Team& operator=(const Team&) = delete;

    int most() const { return static_cast<int>(helpers_.size()) + 1; }

    // Runs `work` on `count` threads, the caller among them, and returns when all have ended.
    void run(int count, Work work, void* what) {
        count = count < 1 ? 1 : count > most() ? most() : count;
        work_ = work;
        what_ = what;
        next_.store(0, std::memory_order_relaxed);
        if (count > 1) start(count);
        Worker self(*this, 0, count);
        work(what, self);
        self.barrier();
    }

private:
    friend class Worker;

    // About a tenth of a millisecond: longer than the gap between two runs of one step.
    static constexpr int kSpins = 4000;
    // Whoever else wants this core gets it from a thread that waits, and not from one that the others wait for:
    // beside a program that keeps both cores busy a decode step takes a third of the time that it takes without.
    static constexpr int kSpinsPerYield = 16;

    // Number of the round and its threads are one word: a helper that comes late, because the last
    // round was not for it, must not pair one with the other's.
    void start(int count) {
        const uint32_t number = (round_.load(std::memory_order_relaxed) >> 8) + 1;
        round_.store(number << 8 | static_cast<uint32_t>(count), std::memory_order_release);
        round_.notify_all();
    }

    void help(int index) {
        uint32_t seen = 0;
        for (;;) {
            await(round_, seen);
            seen = round_.load(std::memory_order_acquire);
            const int count = static_cast<int>(seen & 0xff);
            if (count == 0) return;
            if (index >= count) continue;
            Worker self(*this, index, count);
            work_(what_, self);
            self.barrier();
        }
    }

    // Waits until `value` is no longer `old`: spins, then sleeps.
    static void await(std::atomic<uint32_t>& value, uint32_t old) {
        for (int spin = 0; spin < kSpins; ++spin) {
            if (value.load(std::memory_order_acquire) != old) return;
            _mm_pause();
            if (spin % kSpinsPerYield == kSpinsPerYield - 1) sched_yield();
        }
        value.wait(old, std::memory_order_acquire);
    }

    std::vector<std::thread> helpers_;
    alignas(64) std::atomic<uint32_t> round_{0};
    alignas(64) std::atomic<uint32_t> passed_{0};
    alignas(64) std::atomic<int> arrived_{0};
    alignas(64) std::atomic<int64_t> next_{0};
    Work work_ = nullptr;
    void* what_ = nullptr;
};

inline void Worker::barrier() {
    if (count == 1) {
        team_.next_.store(0, std::memory_order_relaxed);
        return;
    }
    const uint32_t passed = team_.passed_.load(std::memory_order_acquire);
    if (team_.arrived_.fetch_add(1, std::memory_order_acq_rel) == count - 1) {
        team_.arrived_.store(0, std::memory_order_relaxed);
        team_.next_.store(0, std::memory_order_relaxed);
        team_.passed_.fetch_add(1, std::memory_order_release);
        team_.passed_.notify_all();
    } else {
        Team::await(team_.passed_, passed);
    }
}

inline int64_t Worker::claim(int64_t size) { return team_.next_.fetch_add(size, std::memory_order_relaxed); }

}  // namespace headrace
