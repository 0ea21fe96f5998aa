"""Files that hold tensors, whatever they mean: safetensors, torch.save archives, numpy archives, and JSON beside them.

Each reader checks what the file claims before anything is allocated, and maps the tensors instead of reading them.
"""
