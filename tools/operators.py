"""Write operators into the folder of an mmcv without them, or remove them."""

from mmela.tools.operators import main

if __name__ == '__main__':
    main()
