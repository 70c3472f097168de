"""Draw pictures of a run for a talk or a README."""

from mmela.tools.pictures import main

if __name__ == '__main__':
    main()
