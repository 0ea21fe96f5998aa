"""The tiny release that the tests of this folder read and write."""

RELEASE = "SAE-Res-Tiny-1M-Base-W1K-L0_8"
D_SAE, D_MODEL, K = 1024, 24, 8
