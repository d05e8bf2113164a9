// Rotary embedding, the write of keys and values into their blocks, and attention over blocks.
#pragma once

#include "scratch.h"
#include "team.h"

namespace headrace {

// Fills the rotation of each row and cuts the batch into tiles; once per step, on one thread.
void plan_attend(const Step& step, int threads, int group, Scratch& scratch);

void run_attend(const Attend& layer, const Step& step, Scratch& scratch, Worker& worker);

}  // namespace headrace
