// The threads of one model. They meet at barriers inside a step, and sleep between steps.
#pragma once
#include <cstdint>

struct Team;
using Work = void (*)(void* given, int thread);

Team* team_open(int threads);
void team_close(Team*);
int team_size(const Team*);

// Runs `work` on every thread, the caller's among them, and waits for all.
void team_run(Team*, Work work, void* given);

// Inside `work`: waits for the others, after which `team_take` counts from 0 again.
void team_meet(Team*);

// Inside `work`: the next number that no thread has taken since the last meeting.
int64_t team_take(Team*);
