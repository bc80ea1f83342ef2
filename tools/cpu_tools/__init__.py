"""The parts of tools/bench_cpu.py: who is timed, how, against which limits, and the table."""
