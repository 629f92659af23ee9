"""The command `megatron-ross`: one module per subcommand. tools/*.py and pretrain_ross.py call the same functions.

A module imports its parser and nothing large; what the work needs is imported once the command line is understood. So
`--help` and refusals of a flag come at once and without the notes of libraries.
"""
