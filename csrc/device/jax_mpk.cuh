// Everything generated programs use.
#pragma once

#include "persistent.cuh"
#include "scalar.cuh"
#include "tasks/columns.cuh"
#include "tasks/contract.cuh"
#include "tasks/cumulative.cuh"
#include "tasks/map.cuh"
#include "tasks/matmul.cuh"
#include "tasks/product.cuh"
#include "tasks/reduce.cuh"
#include "tasks/sort.cuh"
#include "tasks/update.cuh"
#include "types.cuh"
