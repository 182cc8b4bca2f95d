//! Stub.
super::stub! { RestoreSnapshot SnapshotRestore }
