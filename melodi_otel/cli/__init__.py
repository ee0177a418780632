"""The command line ``melodi-otel``: one small file per sub-command."""
