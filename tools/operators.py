"""Put operators into the folder of an mmcv that has none, or take them out."""

from mmela.tools.operators import main

if __name__ == '__main__':
    main()
