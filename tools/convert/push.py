"""Upload a pruned network to the Hugging Face Hub."""

from mmela.tools.push import main

if __name__ == '__main__':
    main()
