"""Studies on pretrained models that come as packages: SmolLM2-135M-Instruct and Gemma 3 270M. Run by `make real`."""
