"""``python -m mirip_fast_cli``: the same as ``mirip-fast``, for torchrun."""

from .main import main

main()
