//! Stub.
super::stub! { CreateSnapshot SnapshotCreate DeleteSnapshot SnapshotDelete }
