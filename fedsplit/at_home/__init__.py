"""Labels at home: the trunk's last layer computes where the labels are, and labels never travel.

The trunk is cut once more, before its last layer (the *head*). Devices release as always, but no labels; the server
sends down what its other layers (the *body*) make of the releases, and the head; the devices compute outputs and loss
on their own labels and return gradients at these features, and the head's, summed over a node's records. Not those at
the outputs: softmax minus one-hot is the label. (U-shaped split learning: Vepakomma et al., arXiv 1812.00564.)

A round is one batch, so that it computes what ``labels = "shared"`` does: the head is stepped by the trunk's optimizer
like the body, and stays in the trunk's checkpoint. What keeps labels off the wire does not keep them secret: a server
that knows features and head finds them out from the gradients; see ``simulations/labels.py``.
"""
