// Attention of many queries of one sequence, over keys and values that were spread once for all of them.
#pragma once

#include "scratch.h"
#include "team.h"

namespace headrace {

// Cuts the rows of a sequence into tiles and asks for room for its keys.
void plan_prompt(const Step& step, int64_t sequence, Scratch& scratch);

// Attends for all prompts of a step; ends with a barrier.
void attend_prompts(const Attend& layer, const Step& step, Scratch& scratch, Worker& worker);

}  // namespace headrace
