// The entry points: a team of threads that runs the operations of a model over a batch.
#include <new>

#include "attend.h"
#include "linear.h"
#include "scratch.h"
#include "team.h"

namespace headrace {
namespace {

struct Machine {
    explicit Machine(int threads) : team(threads), scratch(threads) {}

    Team team;
    Scratch scratch;
};

struct Run {
    const Op* ops;
    int64_t count;
    const Step* step;
    Scratch* scratch;
};

void run_norm_add(const NormAdd& layer, const Step& step, Worker& worker) {
    for (int64_t row = worker.index; row < step.num_rows; row += worker.count) {
        float* x = step.buffers[layer.source] + row * layer.size;
        float* total = step.buffers[layer.target] + row * layer.size;
        normalise(x, layer.norm_weight, layer.norm_eps, layer.size, x);
        for (int64_t i = 0; i < layer.size; ++i) total[i] += x[i];
    }
    worker.barrier();
}

void work(void* what, Worker& worker) {
    const Run& run = *static_cast<const Run*>(what);
    for (int64_t i = 0; i < run.count; ++i) {
        const void* op = run.ops[i].what;
        switch (run.ops[i].kind) {
            case kEmbedOp: run_embed(*static_cast<const Embed*>(op), *run.step, worker); break;
            case kLinearOp: run_linear(*static_cast<const Linear*>(op), *run.step, *run.scratch, worker); break;
            case kAttendOp: run_attend(*static_cast<const Attend*>(op), *run.step, *run.scratch, worker); break;
            default: run_norm_add(*static_cast<const NormAdd*>(op), *run.step, worker); break;
        }
    }
}

}  // namespace
}  // namespace headrace

extern "C" {

// Returns the size of each structure of step.h, so that its mirror can be checked.
int64_t headrace_sizes(int index) {
    using namespace headrace;
    constexpr int64_t sizes[] = {sizeof(Linear), sizeof(Attend), sizeof(Embed), sizeof(NormAdd), sizeof(Op), sizeof(Step)};
    return sizes[index];
}

// Returns a machine of at most `threads` threads (1 to 255), or null without memory.
void* headrace_open(int threads) { return new (std::nothrow) headrace::Machine(threads); }

void headrace_close(void* machine) { delete static_cast<headrace::Machine*>(machine); }

// Prepares what all layers of a step share; `group` is the number of query heads of a KV head.
void headrace_begin(void* machine, const headrace::Step* step, int threads, int group) {
    headrace::plan_attend(*step, threads, group, static_cast<headrace::Machine*>(machine)->scratch);
}

// Runs operations in order.
void headrace_run(void* machine, const headrace::Op* ops, int64_t count, const headrace::Step* step, int threads) {
    auto& parts = *static_cast<headrace::Machine*>(machine);
    headrace::Run run{ops, count, step, &parts.scratch};
    parts.team.run(threads, headrace::work, &run);
}

}  // extern "C"
