"""Compare the speed and memory of a network with different layer attentions."""

from mmela.benchmark.compare import main

if __name__ == '__main__':
    main()
