"""Training commands: `qscope sft` and `qscope grpo`."""
