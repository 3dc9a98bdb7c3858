"""Triton kernels, one op per file; installed as `tdm_fast.kernels`. Import them only where triton is installed."""
