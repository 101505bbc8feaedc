#include "step.h"
#define STEP step_portable
#define PRODUCT product_portable
#include "kernels.inc"
#include "weights.inc"
#include "rows.inc"
#include "attention.inc"
#include "step.inc"
