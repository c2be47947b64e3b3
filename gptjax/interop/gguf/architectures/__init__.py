"""The supported architectures of llama.cpp. To add one, add a file here and its architecture to the list."""

from __future__ import annotations

from gptjax.interop.gguf.architectures import deepseek2, gemma, gpt2, gpt_oss, llama, olmo2, phi3, qwen

ARCHITECTURES = (
    *(llama.ARCHITECTURE, qwen.QWEN2, qwen.QWEN3, qwen.QWEN3_MOE, gpt2.ARCHITECTURE, gemma.GEMMA2, gemma.GEMMA3),
    *(phi3.ARCHITECTURE, olmo2.ARCHITECTURE, gpt_oss.ARCHITECTURE, deepseek2.ARCHITECTURE),
)
