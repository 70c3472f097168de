"""Unpack an archive of CIFAR-10 or CIFAR-100 into what the configs read."""

from mmela.tools.cifar import main

if __name__ == '__main__':
    main()
