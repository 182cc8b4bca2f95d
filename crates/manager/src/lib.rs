//! One cluster: the door, workflows, reconcilers, policy, audit, placement.
