"""The gradient loop: how a method's own parameters are trained next to a frozen backbone."""
