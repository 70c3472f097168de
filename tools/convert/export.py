"""Export the network of a checkpoint to ONNX, torch.export or TorchScript."""

from mmela.tools.export import main

if __name__ == '__main__':
    main()
