"""The first task: fine-tune a small multilingual model that switches languages unasked, with and without SASFT."""
