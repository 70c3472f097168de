"""Draw the pictures of the README from a run."""

from mmela.tools.pictures import main

if __name__ == '__main__':
    main()
