//! Records: one narrow trait with etcd's semantics, SQLite and memory drivers, one contract suite.
