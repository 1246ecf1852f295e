"""The architectures that convert, in the order in which an export without a source configuration tries them."""

from megatron_cpt.checkpoint.mapping.families import (
    deepseek2,
    deepseek3,
    llama,
    mistral,
    mixtral,
    qwen2,
    qwen3,
    qwen3_moe,
)

FAMILIES = {
    module.FAMILY.architecture: module.FAMILY
    for module in (llama, mistral, qwen2, qwen3, mixtral, qwen3_moe, deepseek3, deepseek2)
}
