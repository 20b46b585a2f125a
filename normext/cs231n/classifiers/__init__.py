"""The assignment's networks: `fc_net` holds the fully connected ones, `cnn` the convolutional one."""
