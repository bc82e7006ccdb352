"""From an exit record and a goal to a policy, in numpy, without the network."""
