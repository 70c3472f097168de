"""Make a data set of images with a lesion mask each, for segmentation."""

from mmela.tools.lesions import main

if __name__ == '__main__':
    main()
