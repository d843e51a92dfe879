"""The command line of mirip-fast, installed as ``mirip_fast_cli``: one file per command."""
