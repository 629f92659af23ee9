"""A program with two flags, for test_readme_commands.py."""

import argparse

parser = argparse.ArgumentParser()
parser.add_argument("--depth", type=int)
parser.add_argument("--sizes", type=int)
parser.parse_args()
