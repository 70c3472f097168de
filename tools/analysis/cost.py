"""Count what networks cost: parameters, FLOPs and memory for training."""

from mmela.tools.cost import main

if __name__ == '__main__':
    main()
