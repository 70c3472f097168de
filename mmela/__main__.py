"""``python -m mmela``: the command ``mmela``."""

from mmela_light.command import main

if __name__ == '__main__':
    main(prog_name='mmela')
