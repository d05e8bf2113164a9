// Linear layers over packed weights.
#pragma once

#include "scratch.h"
#include "team.h"

namespace headrace {

void run_linear(const Linear& layer, const Step& step, Scratch& scratch, Worker& worker);

void run_embed(const Embed& layer, const Step& step, Worker& worker);

// Writes normalised `x` of one row; `out` may be `x`.
void normalise(const float* x, const float* weight, float eps, int64_t size, float* out);

}  // namespace headrace
