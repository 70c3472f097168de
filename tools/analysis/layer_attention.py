"""Show what the layer attentions of a checkpoint do, in pictures and numbers."""

from mmela.tools.layer_attention import main

if __name__ == '__main__':
    main()
