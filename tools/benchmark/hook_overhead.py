"""Measure what the pruning hook and the import of mmela cost."""

from mmela.benchmark.hook_overhead import main

if __name__ == '__main__':
    main()
