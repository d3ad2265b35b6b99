// Element types, numbered in the order of scalar_ops.def. Word streams name them, so the numbers are private.
#pragma once

#include <cstdint>
#include <string_view>

namespace jax_mpk::host {

enum class Type : uint8_t {
#define VM_TYPE(name, bytes, storage) k_##name,
#include "host/scalar_ops.def"
};

inline constexpr std::string_view kTypeName[] = {
#define VM_TYPE(name, bytes, storage) #name,
#include "host/scalar_ops.def"
};
inline constexpr uint8_t kTypeBytes[] = {
#define VM_TYPE(name, bytes, storage) bytes,
#include "host/scalar_ops.def"
};
inline constexpr int kTypes = sizeof(kTypeBytes);

constexpr int bytes_of(Type type) { return kTypeBytes[static_cast<int>(type)]; }
constexpr std::string_view name_of(Type type) { return kTypeName[static_cast<int>(type)]; }

enum class Op : uint8_t {
#define VM_OP(name, arity, types) k_##name,
#include "host/scalar_ops.def"
};

struct OpInfo {
  std::string_view name;
  uint8_t arity;
  uint16_t types;  // bit t: the operation exists for Type t
};

// Sets of types that scalar_ops.def speaks of.
namespace type_set {
constexpr uint16_t bit(Type t) { return static_cast<uint16_t>(1u << static_cast<int>(t)); }
inline constexpr uint16_t kInt = bit(Type::k_s8) | bit(Type::k_s16) | bit(Type::k_s32) | bit(Type::k_s64) |
                                 bit(Type::k_u8) | bit(Type::k_u16) | bit(Type::k_u32) | bit(Type::k_u64);
inline constexpr uint16_t kWords = bit(Type::k_u32) | bit(Type::k_u64);
inline constexpr uint16_t kFloat = bit(Type::k_f32) | bit(Type::k_f64);
inline constexpr uint16_t kHalf = bit(Type::k_f16) | bit(Type::k_bf16);
inline constexpr uint16_t kBits = kInt | bit(Type::k_b1);
inline constexpr uint16_t kNumber = kInt | kFloat;
inline constexpr uint16_t kOrdered = kNumber | bit(Type::k_b1);
inline constexpr uint16_t kAnyFloat = kFloat | kHalf;
inline constexpr uint16_t kRaw = kOrdered | kHalf;
}  // namespace type_set

inline constexpr OpInfo kOpInfo[] = {
#define VM_OP(name, arity, types) {#name, arity, type_set::types},
#include "host/scalar_ops.def"
};
inline constexpr int kOps = sizeof(kOpInfo) / sizeof(kOpInfo[0]);

}  // namespace jax_mpk::host
