#include "step.h"
#define STEP step_portable
#define PRODUCT product_portable
#include "all.inc"
