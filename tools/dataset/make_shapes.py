"""Render a small instance data set of shapes in COCO format."""

from mmela.tools.shapes import main

if __name__ == '__main__':
    main()
